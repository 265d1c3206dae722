"""The promises, as tests: offline, on a CPU, in minutes.  python -m pytest -q test_smoke.py"""
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import zipfile
from contextlib import chdir, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started here, too
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zstandard
from torch._dynamo.testing import CompileCounter
ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import eval_bpb
import pack
import train_gpt
from data import hub as hub_files, prepare
from data.dataset import BadInput, read_meta, read_val_docs
from data.text_rules import nmt_nfkc
from data.tokenizer import Tokenizer, lower_case
from data.train_bpe import train_tokenizer
from records import check, confine, folders, proof, rules, stats, submit
from train_gpt import Config, GPT, make_segments, read_rows, read_shard


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Each test works in a folder of its own, and the judge's clock begins with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_bpb, "BEGIN", time.perf_counter())


def start(*command, **env):
    """python COMMAND in a process beside this one: end() waits for it."""
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, env={**os.environ, **env}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def end(process, code=0):
    """-> stdout and stderr of a process that ends with that code."""
    out, err = process.communicate(timeout=1500)
    assert process.returncode == code, f"{out}\n{err}"
    return out, err


TWO_RANKS = "-m torch.distributed.run --standalone --nproc_per_node=2 --".split()


def write(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1:]


# ----------------------------------------------------------------------------------------------------------------------
# Training


TINY = dict(n_layer=4, n_embd=32, n_head=4, n_kv_head=2, mlp_dim=64, loop_first=1, loop_last=1,
            loop_passes=3, two_lane_from=3, rope_dims=4, vocab_size=64, batch_tokens=512,
            row_tokens=128, seq_len=48)
RUN_FLAGS = [f"--{key}={value}" for key, value in {
    **TINY, "vocab_size": 0, "data": "synthetic", "calib_tokens": 256, "val_points": 2,
    "device": "cpu", "log_every": 1}.items()]


def tiny_model(seed=0, **changes):
    """Of random weights: freshly initialised ones are zero where most mistakes would hide."""
    torch.manual_seed(seed)
    model = GPT(replace(Config(**TINY), **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        model.x_mix += 1
    return model


def tiny_batch(n=128, starts=(0,)):
    """tokens (n,), targets (n,), Segments of at most 48 tokens."""
    torch.manual_seed(1)
    text = torch.randint(64, (n + 1,))
    return text[:-1], text[1:], make_segments(np.array(starts), n, 48)


def metrics(run, kind):
    """Lines of that kind in a run's metrics.jsonl."""
    lines = Path("runs", run, "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def checkpoint(run):
    return train_gpt.load_checkpoint(Path("runs", run, "checkpoint.pt"))


# ---- the model


def test_what_is_trained_is_the_probability_of_what_follows():
    model, (tokens, targets, seg) = tiny_model(), tiny_batch(300, (0, 1, 50, 130))
    tokens %= 9
    with torch.no_grad():
        p = model.probabilities(model(tokens, seg), tokens, seg)
        nats = -p.gather(1, targets[:, None])[:, 0].log()
        attention = train_gpt.segment_attention
        for model.kernel in attention, partial(attention):  # the latter as on a GPU: flex_copies
            found = model.losses(tokens, targets, seg, True)
            torch.testing.assert_close(found, nats, rtol=1e-4, atol=1e-4)


def test_a_token_sees_only_its_own_segment_and_its_past():
    model, (tokens, _, seg) = tiny_model(), tiny_batch(starts=(0, 30, 77))
    model.copy_gain.data *= 1e9  # a pointer that would rather look ahead

    def seen(tokens):
        return model.probabilities(model(tokens, seg), tokens, seg)

    before = seen(tokens)
    for at, end in (20, 30), (76, 77), (100, 125):
        changed = tokens.clone()
        changed[at] ^= 1
        moved = (seen(changed) != before).any(-1)
        assert moved[at] and not moved[:at].any() and not moved[end:].any()  # to the last bit
    assert tiny_batch(300, range(300))[2].pos.max() == 1  # too many documents join in pairs


def loss_of(model, batch):
    return model.losses(*batch, True).double().mean()


def gradients(model, batch):
    loss_of(model, batch).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def test_gradients_are_those_of_finite_differences():
    model, batch = tiny_model(), tiny_batch()
    for name, g in gradients(model, batch).items():
        step = g * torch.rand_like(g)
        step *= 0.01 / step.norm()
        losses = []
        for share in 1, -2, 1:
            model.get_parameter(name).data += share * step
            losses.append(loss_of(model, batch).item())
        slope = (losses[0] - losses[1]) / 2
        assert slope == pytest.approx((g * step).sum().item(), rel=0.02), name


# ---- the kernels


def test_the_softcapped_loss_has_the_gradient_of_cross_entropy():
    z = (20 * torch.randn(30, 150)).requires_grad_()
    targets = torch.randint(150, (30,))
    expected = F.cross_entropy(30 * torch.tanh(z / 30), targets, reduction="none")
    losses = train_gpt.SoftcapCE.apply(z, targets, 30.0), expected
    found, expected = (torch.autograd.grad(nats.square().sum(), z)[0] for nats in losses)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_fused_mlp_equals_its_reference():
    """In Triton's interpreter, no GPU needed; in a process, for the switch is read at import."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = """if True:
        import torch, torch.nn.functional as F, train_gpt as t
        t.TILE = 16, 32, 32
        def error(a, b): return ((a.float() - b.float()).norm() / b.float().norm()).item()
        for dtype, limit in (torch.float32, 1e-5), (torch.float16, 1e-2):  # it has no bfloat16 dot
            torch.manual_seed(0)
            make = lambda *s: torch.randn(*s, dtype=dtype).requires_grad_()
            x, up, down, dy = make(48, 64), make(96, 64), make(64, 96), make(48, 64).detach()
            wide = [a.detach().float().requires_grad_() for a in (x, up, down)]
            y = t.FusedMLP.apply(x, up, down)
            ref = F.linear(t.lrelu2(F.linear(*wide[:2])), wide[2])
            grads = torch.autograd.grad(y, (x, up, down), dy)
            pairs = [(y, ref), *zip(grads, torch.autograd.grad(ref, wide, dy.float()))]
            for a, b in pairs:
                assert error(a, b) < limit, (dtype, error(a, b))
        print("agree")
    """
    assert end(start("-c", code, PYTHONPATH=str(ROOT), TRITON_INTERPRET="1"))[0] == "agree\n"


ROOFLINE = {"inductor's own kernels": (53.1, 79.0), "predicted": (94.0, 133.4)}


def test_the_kernel_compiles_for_hopper():
    """To an H100's machine code, without one: tensor cores, copies in flight, enough memory."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tile = dict(zip(("BM", "BN", "BK", "K"), (*train_gpt.TILE, 512)))
    kernel = train_gpt.up_kernel
    for backward, unit_stride in (False, "stride_bk"), (True, "stride_bn"):
        known = {**tile, "BACKWARD": backward, unit_stride: 1}
        types = {x: "*bf16" if x.endswith("_ptr") else "i32" for x in kernel.arg_names}
        types |= dict.fromkeys(known, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]]
                   for i, x in enumerate(kernel.arg_names) if x not in known}
        source = ASTSource(kernel, types, known, aligned)
        code = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 8, "num_stages": 3})
        assert code.asm["cubin"] and code.metadata.shared <= 227 * 1024
        assert "wgmma.mma_async" in code.asm["ptx"] and "cp.async" in code.asm["ptx"]


def test_the_step_moves_what_the_roofline_says():
    if not torch.version.cuda or not torch.__version__.startswith("2.11"):
        pytest.skip("the roofline counts with a CUDA build of torch 2.11")
    out, _ = end(start(ROOT / "records/evidence/roofline.py", "--compile"))
    assert out.count("are machine code for sm_90") == 2
    for row, expected in ROOFLINE.items():
        numbers = re.search(rf"^\| {row}[^|]*\|([^|]*)\|([^|]*)\|", out, re.M).groups()
        assert [*map(float, numbers)] == pytest.approx(expected, rel=0.02)


# ---- the optimizers


def test_orthogonalize_brings_singular_values_near_one():
    for rows, cols in (80, 20), (20, 80):
        found = train_gpt.orthogonalize(torch.randn(3, rows, cols)) / max(1, rows / cols) ** 0.5
        sigma = torch.linalg.svdvals(found)
        assert 0.8 < sigma.min() and sigma.max() < 1.2


def test_one_step_moves_every_parameter_as_adamw_and_muon_should():
    model, batch, cfg = tiny_model(), tiny_batch(), Config(**TINY, grad_clip=1e9)
    before, grads = tiny_model(), gradients(model, batch)
    schedule = train_gpt.Schedule(lr=0.5, momentum=0.9, seq_len=48, looped=True)
    optimizers = train_gpt.make_optimizers(model, cfg)
    train_gpt.train_step(model.losses, [batch] * 4, model, optimizers, schedule, cfg)
    stacked = {"qkv": model.qkv_sizes, "copy": [cfg.copy_dim] * 3}
    for name, p in before.named_parameters():
        kind = "embed" if name == "embed.weight" else "scalar"
        update = grads[name] / (grads[name].abs() + 1e-8)
        if name in GPT.MATRICES:
            kind = "matrix"
            parts = grads[name].split(stacked.get(name, p.size(1)), 1)
            update = torch.cat([*map(train_gpt.orthogonalize, parts)], 1)
        step = 0.5 * getattr(cfg, f"{kind}_lr")
        expected = p - step * (getattr(cfg, f"{kind}_wd") * p + update)
        found = model.get_parameter(name)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---- data


def test_an_epoch_holds_each_token_once_in_the_order_of_the_seed():
    shard = np.arange(2000) * (np.arange(2000) % 100 > 0)  # 20 documents
    data = SimpleNamespace(train=[shard])
    first, second = (read_rows(data, Config(**TINY, seed=seed)) for seed in (1, 2))
    epoch = np.concatenate([next(first)[:-1] for _ in range(2000 // 128)])
    assert np.bincount(epoch)[1:].max() == 1 and (epoch[:128] != next(second)[:-1]).any()


def test_validation_counts_each_target_once_in_whole_documents():
    batch = partial(train_gpt.make_batch, device="cpu")
    model, tokens, total = tiny_model(), train_gpt.synthetic_tokens(64, 700, 5), 0.0
    for document in np.split(tokens, np.flatnonzero(tokens == 0)[1:]):
        total += model.losses(*batch(np.append(document, 0), 48), True).sum().item()
    data = SimpleNamespace(val=tokens, val_bytes=1000)
    cfg = replace(Config(**TINY), row_tokens=1024, batch_tokens=1024)
    found = train_gpt.validate(model.losses, data, cfg, batch, True)
    assert [*found.values()] == pytest.approx([total / 700, total / math.log(2) / 1000], rel=1e-5)


# ---- whole runs


JOB = [*RUN_FLAGS, "--data=mine", "--max_steps=8", "--loop_at=0.5", "--save_every=1e-9",
       "--matrix_lr=0.3", "--embed_lr=0.3", "--scalar_lr=0.1", "--calib_tokens=1024"]
MINUTES = "--only=looped --only=attention --only=adaptive --only=ideas".split()
ALONE = """if True:
    import itertools, os, sys, train_gpt
    train_step, steps = train_gpt.train_step, itertools.count()
    def die(*args):
        numbers = train_step(*args)
        if next(steps) == 6:  # the first is the warm-up's
            os.kill(os.getpid(), 9)
        return numbers
    train_gpt.main([*sys.argv[1:], "--run=one"])
    train_gpt.train_step = die
    train_gpt.main([*sys.argv[1:], "--run=killed"])
"""


@pytest.fixture(scope="session", autouse=True)
def training(dataset, tmp_path_factory):
    """A folder with a copy of train_gpt.py and a dataset, and what goes on there beside the tests."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "train_gpt.py", folder)
    shutil.copytree(dataset, folder / "mine")
    with chdir(folder):
        write("alone.py", ALONE)
        process = start("alone.py", *JOB)
        minutes = start(ROOT / "records/evidence/first_gpu_minutes.py", ".", "--tiny", *MINUTES)
    process.stdout.close()
    yield SimpleNamespace(folder=folder, process=process, minutes=minutes)
    process.kill()
    minutes.kill()


@pytest.fixture(scope="session")
def alone(training, dataset):
    """runs/ of that folder: one, whose terminal had gone, packed and scored by two ranks; killed,
    which was killed and went on; two, the same but that it went on on two ranks."""
    with chdir(training.folder):
        end(training.process, code=-signal.SIGKILL)
        assert not metrics("killed", "end")
        shutil.copytree("runs/killed", "runs/two")
        two = start(*TWO_RANKS, "train_gpt.py", "--resume=two")
        assert train_gpt.main(["--resume=killed"]) == 0 == pack.main(["one"])
        end(two)
        shutil.copy("runs/one/artifact.pyz", ".")
        training.scored = start(*TWO_RANKS, "artifact.pyz", f"--data={dataset}", "--device=cpu")
    return training.folder / "runs"


def test_the_file_alone_trains_alike_on_one_rank_and_on_two(alone):
    for kind, name, n in ("step", "train_loss", 8), ("val", "val_loss", 2):
        one, two = ({x["step"]: x[name] for x in metrics(alone / run, kind)}
                    for run in ("one", "two"))
        assert len(one) == n and one == pytest.approx(two, rel=1e-3)
    source = alone / "one/source/train_gpt.py"
    assert source.read_bytes() == (ROOT / "train_gpt.py").read_bytes()


def test_the_first_minutes_on_a_gpu_can_be_rehearsed_without_one(training):
    out, _ = end(training.minutes)
    done = (training.folder / "results.jsonl").read_text().count('"what": "done"')
    assert done == 4 and out.endswith("failed or late: none\n")


def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(alone):
    whole, resumed = checkpoint(alone / "one"), checkpoint(alone / "killed")
    for kind in ("weights", "stats"):
        assert all(torch.equal(x, resumed[kind][name]) for name, x in whole[kind].items())
    assert not (alone / "killed/state.pt").exists()
    assert "resumed at step 5" in (alone / "killed/log.txt").read_text()


def test_a_signal_the_clock_and_a_bad_loss_end_a_run_each_in_its_way(monkeypatch):
    train_step = train_gpt.train_step

    def signalled(*args):
        numbers = train_step(*args)
        if next(steps) == 3:  # the first is the warm-up's
            signal.raise_signal(sent)
        return numbers

    monkeypatch.setattr(train_gpt, "train_step", signalled)
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(9))
    for sent, flags, code, reason in (
            (signal.SIGHUP, "--run=a --max_seconds=1 --calib_tokens=0", 0, "finished"),
            (signal.SIGTERM, "--run=b --max_seconds=900", 0, "stopped early as asked"),
            (signal.SIGHUP, "--run=c --embed_lr=1e18 --scalar_lr=1e18", 3, "the loss is nan")):
        steps = itertools.count()
        with pytest.raises(SystemExit) as stopped:
            sys.exit(train_gpt.main([*RUN_FLAGS, *flags.split()]))
        (last,) = metrics(flags[6], "end")
        assert stopped.value.code == code and last["reason"].startswith(reason)
    assert [checkpoint(run)["run"]["finished"] for run in "ab"] == [True, False]


# command | words of the one line with which it ends; without: the command's last
REFUSED = r"""
train_gpt.py --layers=3
train_gpt.py --n_layer=x
train_gpt.py --n_head=3
train_gpt.py --batch_tokens=1000
train_gpt.py --seq_len=0
train_gpt.py --matrix_lr=nan
train_gpt.py --device=tpu
train_gpt.py --run=../up
train_gpt.py --run=there | nothing is overwritten
train_gpt.py --preset=big
train_gpt.py --seed=18446744073709551616
train_gpt.py --resume=x | no other flag
train_gpt.py --data=nowhere | data/prepare.py docs PATH
train_gpt.py --data=val | val_000000.bin
train_gpt.py --data=tok | tokenizer.json
train_gpt.py --data={dataset} --row_tokens=8192 --batch_tokens=8192 | --row_tokens
pack.py nothing | no such run
pack.py x --cap_bytes=many
eval_bpb.py nothing.pyz | no such file
eval_bpb.py runs/there/metrics.jsonl | not a whole artifact
eval_bpb.py --limit_docs=-1
eval_bpb.py --max_seconds=1e10 | from 0 to 1e9
eval_bpb.py --out=nowhere/x
eval_bpb.py --device=tpu
eval_bpb.py --x=1
eval_bpb.py --seed=-1
data/prepare.py docs /nowhere --name=x | /nowhere: no such file
data/prepare.py docs /nowhere --nmae=3
data/prepare.py docs /nowhere --name=../e
data/prepare.py docs /nowhere --name=x --tokenizer=none | 'none'
data/prepare.py docs /nowhere --name=x --tokenizer=/dev/null | tokenizer.json: damaged
data/prepare.py verify nothing | no dataset 'nothing'
data/prepare.py fineweb --name=synthetic
records/check.py nothing --jobs=0 | --jobs
records/check.py --base=--output=x | git log
records/check.py compare x -- x | x: no such run
records/submit.py x --name=x | x: no such run
records/turn.py --idea=x --seeds=1
"""


def test_what_is_not_right_ends_in_one_line_and_exit_code_2(dataset, monkeypatch, capsys):
    def refused(file, *flags):
        monkeypatch.setattr(sys, "argv", [file, *RUN_FLAGS * (file == "train_gpt.py"), *flags])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / file), run_name="__main__")
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error[:-1].isprintable() and error[-1] == "\n", flags
        return error

    write("runs/there/metrics.jsonl", "")
    for name in ("val_000000.bin", "tokenizer.json"):
        folder = shutil.copytree(dataset, name[:3])
        write(f"{folder}/{name}", (dataset / name).read_bytes()[:-2])
    for line in REFUSED.format(dataset=dataset).strip().split("\n"):
        command, _, words = line.partition(" | ")
        flag = command.split()[-1].partition("=")[0]
        assert (words or flag) in refused(*command.split())
    hidden = "caf\xe9\x1b[2J\nval_bpb: 0.5\u202e"
    assert r"\x1b[2J\nval_bpb: 0.5\u202e: no such run" in refused("pack.py", hidden)
    for name in "RANK", "LOCAL_RANK", "WORLD_SIZE":
        monkeypatch.setenv(name, "2")
        assert "torchrun sets all three" in refused("train_gpt.py")
    assert os.listdir("runs") == ["there"]


def test_a_damaged_checkpoint_is_refused_and_a_full_disk_keeps_the_old(alone, tmp_path):
    path, good = tmp_path / "checkpoint.pt", (alone / "one/checkpoint.pt").read_bytes()
    for bad in good[:10], good[:-1], flip(good, len(good) // 2):  # in a matrix
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="^.*checkpoint.pt is not whole: .*$"):
            checkpoint(tmp_path)
    full = OSError(28, "No space left on device")
    with mock.patch.object(os, "fsync", side_effect=full), pytest.raises(ValueError, match="No space"):
        train_gpt.write_checkpoint(path, weights={})
    assert path.read_bytes() == bad and os.listdir() == ["checkpoint.pt"]


torch.library.define("flash_attn_3::_flash_attn_forward", "() -> ()")


class Flash(torch.autograd.Function):
    """FlashAttention-3's interface. It returns q."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k):
        return q.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, None, None, None, None


def test_what_only_a_gpu_compiles_is_compiled_in_the_warm_up(monkeypatch):
    def attention(q, k, v, cu_q, cu_k, **_):
        return Flash.apply(q, k, v, cu_q, cu_k)

    def counted_warm_up(*args):
        found = warm_up(*args)
        ready.append(graphs.frame_count)
        return found

    graphs, ready, warm_up = CompileCounter(), [], train_gpt.warm_up
    interface = SimpleNamespace(flash_attn_varlen_func=attention)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    fa3 = train_gpt.pick_attention((9, 0))
    for name, value in {
            "pick_attention": lambda *_: fa3, "warm_up": counted_warm_up,
            # It has no gradients on a CPU.
            "flex_copies": lambda q, k, *_: 2 * [(q * k).sum(1)]}.items():
        monkeypatch.setattr(train_gpt, name, value)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    torch.compiler.reset()
    assert train_gpt.main([*RUN_FLAGS, *"--n_layer=1 --loop_first=0 --loop_last=0 "
                           "--two_lane_from=0 --max_steps=3 --run=compiled".split()]) == 0
    # losses: looped or not; orthogonalize: six shapes of matrices.
    assert ready == [2 + 6] == [graphs.frame_count]


def test_a_row_that_does_not_fit_is_halved_and_the_batch_stays(monkeypatch):
    losses, most = GPT.losses, 64

    def limited(self, tokens, *rest):
        if len(tokens) > most:
            raise RuntimeError("CUDA out of memory: a fake one")
        return losses(self, tokens, *rest)

    monkeypatch.setattr(GPT, "losses", limited)
    assert train_gpt.main([*RUN_FLAGS, "--max_steps=2", "--run=small"]) == 0
    saved = checkpoint("small")
    assert saved["config"].row_tokens == 64 and saved["run"]["tokens"] == 1024
    most = 0
    with pytest.raises(ValueError, match="not even such a row"):
        train_gpt.main([*RUN_FLAGS, "--run=none"])


def test_calibration_ends_with_the_clock_but_not_before_one_row():
    stats = train_gpt.calibrate(tiny_model(), tiny_batch, 9, 0, late=lambda: True)
    assert stats["tokens"] == 128


# ----------------------------------------------------------------------------------------------------------------------
# Text and tokens


DEMO_PATH = ROOT / "data/demo_tokenizer.json"
DEMO = DEMO_PATH.read_bytes()


def prepare_main(command, *args):
    """Runs `prepare.py COMMAND ARGS` in this process with data/ in the working folder."""
    Path("data").mkdir(exist_ok=True)
    command = ["prepare.py", command, *map(str, args)]
    with mock.patch.object(prepare, "ROOT", Path.cwd()), mock.patch.object(sys, "argv", command):
        prepare.main()


def prepared(command, *args, name="x"):
    """-> meta.json of data/NAME/, made with the demo tokenizer by one worker."""
    prepare_main(command, f"--name={name}", f"--tokenizer={DEMO_PATH}", "--workers=1", *args)
    return read_meta(Path("data", name))


def words(n, seed):
    """n documents of random English-looking text."""
    rng = random.Random(seed)
    some = "the of and to in a is that it was for on are with as I his they be NASA McDonald".split()
    texts = (" ".join(rng.choices(some, k=rng.randint(20, 60))) for _ in range(n))
    return [f"{text.capitalize()}, {seed}.{i}." for i, text in enumerate(texts)]


def jsonl(texts, key="text"):
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


ODD = ["x", "é", "👩‍👩‍👧 naïve", "a\r\nb\rc\n", "\ufeff\x00\u2028 NASA PDFs", "long " * 60, "tail  "]
TEXTS = ODD + [f"Document {i}: the quick brown fox number {i * 7919} jumps over " + "the lazy dog, again. " * (i % 5)
               for i in range(13)]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A `docs` dataset with the demo tokenizer, of 60 documents for training and TEXTS for validation -> its folder."""
    root = tmp_path_factory.mktemp("data")
    with chdir(root):
        write("train.jsonl", jsonl(words(60, 1)))
        write("val.jsonl", jsonl(TEXTS))
        prepared("docs", "train.jsonl", "--val_path=val.jsonl", name="odd")
    return root / "data/odd"


# ---- the tokenizer and the text rule


def test_tokenizer_gives_every_unicode_string_back():
    rng, tokenizer = random.Random(7), Tokenizer(DEMO)
    odd = "aAbBsSzZ  ICCULLU\t\n\r 0123.,'’-éÉßẞİıǅΣσςЖжﬁ\0\x1c\x7f\x85\u200b\u2028\ufeff\ufffd"
    every = odd * 9999 + "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    texts = ["".join(rng.choices(every, k=n % 40)) for n in range(8000)]
    texts += ["C the U nasa L", "HTTPServer PDFs iPhone A I" * 9, " " * 100_000]
    for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert text == tokenizer.decode(tokens)
        assert np.flatnonzero(tokens == tokenizer.boundary).tolist() == [0]
        assert tokenizer.text_bytes[tokens].sum() == len(text.encode())
    assert lower_case(" The THE camelCase PDFs I") == "C theU the camelCcaseU pdfLsC i"


def test_lone_surrogates_and_damaged_tokenizers_are_refused_by_name():
    with pytest.raises(BadInput, match="lone surrogate at character 1"):
        Tokenizer(DEMO).encode("x\ud800")
    for change in ('"pieces": ["th", "th"]', '"pieces": ["\u2019"]', f'"pieces": ["{"x" * 65}"]',
                   '"phrases": [[1, 9999]]', '"phrases": [[1]]', f'"phrases": {[[1, 2]] * 65_400}',
                   f'"phrases": {[[220 + n, 220 + n] for n in range(8)]}', '"format": 1'):
        spec = '{"format": 2, "name": "x", "pieces": [], "phrases": [], %s}' % change
        with pytest.raises(BadInput, match="tokenizer.json"):
            Tokenizer(spec.encode())


def test_training_a_tokenizer_is_deterministic():
    pytest.importorskip("tokenizers")
    texts = [*words(300, 5), "a" * 200_000, "\n" * 200_000, "一二三四五" * 40_000]
    first, second = (train_tokenizer(lambda: iter(texts), 300, "x") for _ in range(2))
    assert first == second and Tokenizer(first).vocab_size == 300


def test_nmt_nfkc_is_sentencepieces():
    pytest.importorskip("sentencepiece")
    for text, expected in {
            "  Ａ\u00a0\ufb01ne\u200b \x07 e\u0301\u2581x\t\n½ \u00b4 ～ ": "A fine é x 1\u20442 \u0301 ～",
            "ｶﾞ \u1100\u1161\u11a8 q\u0307\u0323": "ガ 각 q\u0307\u0323", "  ": ""}.items():
        assert nmt_nfkc(text) == expected


# ---- datasets


def texts_in(folder, split):
    """-> the documents of a split, by its tokens"""
    tokens = np.concatenate([read_shard(path) for path in sorted(folder.glob(f"{split}_*.bin"))])
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
    starts = np.flatnonzero(tokens == tokenizer.boundary)
    return [tokenizer.decode(part) for part in np.split(tokens, starts)[1:]]


def test_a_dataset_holds_its_documents_exactly(dataset):
    meta = read_meta(dataset)
    for split, texts in ("train", words(60, 1)), ("val", TEXTS):
        assert texts_in(dataset, split) == texts and meta[f"{split}_docs"] == len(texts)
        assert meta[f"{split}_bytes"] == len("".join(texts).encode())
    assert [*read_val_docs(dataset, meta)] == TEXTS
    framed = [len(text).to_bytes(8, "little") + text for text in map(str.encode, TEXTS)]
    assert meta["val_docs_sha256"] == hashlib.sha256(b"".join(framed)).hexdigest()


def test_a_damaged_dataset_is_refused_by_file_name(dataset):
    folder = shutil.copytree(dataset, Path("copy"))
    meta = read_meta(folder)
    begin = meta["train_tokens"].to_bytes(4, "little") + bytes(1012)  # the first token follows
    prepare_main("verify", folder)
    for name, old, new, message in (
            ("train_000000.bin", b"\0\0", b"", "not a token shard"),
            ("train_000000.bin", begin + b"\0\0", begin + b"\xff\x7f", "is outside"),
            ("tokenizer.json", b"demo", b"dome", "tokenizer.json is"),
            ("meta.json", b'"train_tokens": ', b'"train_tokens": 1', "train_tokens is"),
            ("meta.json", b'"train_000000.bin"', b'"../train.bin"', "../train.bin is")):
        whole = (folder / name).read_bytes()
        write(folder / name, whole.replace(old, new, 1))
        with pytest.raises(BadInput, match=message):
            prepare_main("verify", folder)
        write(folder / name, whole)
    docs = folder / "val_docs.jsonl.zst"
    lines = zstandard.decompress(docs.read_bytes(), 1 << 20)
    write(docs, zstandard.compress(lines.replace(b"the", b"teh")))
    with pytest.raises(BadInput, match="val_docs.jsonl.zst: .*sha256 differ"):
        list(read_val_docs(folder, meta))


SKIPPED = """\
sub/c.parquet: .parquet files, not read
a.jsonl:11: bad JSON
a.jsonl:12: no text
a.jsonl:13: lone surrogate
a.jsonl:14: empty
a.jsonl:15: not UTF-8
a.jsonl:16: duplicate
caf\\udce9.txt:1: not UTF-8"""


def test_docs_names_every_document_that_it_skips(capsys):
    good = jsonl(words(20, 2)).splitlines(keepends=True)
    bad = b'{"text": "x"\n{"no": 1}\n{"text": "\\ud800"}\n\n{"text": "caf\xe9"}\n'
    write("in/a.jsonl", b"".join([*good[:10], bad, good[0], *good[10:]]))
    write(os.fsdecode(b"in/caf\xe9.txt"), b"\xff")
    write("in/sub/c.parquet", "PAR1")
    meta = prepared("docs", "in", "--val_docs=5")
    assert (meta["val_docs"], meta["train_docs"]) == (5, 15)
    found = Path("data/x/skipped.txt").read_text()
    assert re.sub(r".*in/| \(.*", "", found).strip() == SKIPPED
    assert "skipped 8: 2 not UTF-8 (" in capsys.readouterr().out
    for flag, message in {
            "--on_bad=refuse": "a.jsonl:11: bad JSON", "--name=x": "is there already",
            "--val_docs=99": "only 20 good documents, 20 for validation: 2 not UTF-8",
            "--text_key=x": "only 0 good .* no text .*--text_key"}.items():
        with pytest.raises(BadInput, match=message):
            prepare_main("docs", "in", "--name=e", flag)
    assert os.listdir("data") == ["x"]


def zstd_long(data):
    """As zstd --long=31 packs a stream."""
    how = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=how).compressobj()
    return packer.compress(data) + packer.flush()


def test_docs_reads_every_kind_of_file_to_the_same_documents():
    def files(name, data):
        write(name, data)
        return prepared("docs", name, "--text_key=x", name=f"{name}-")["files"]

    plain = jsonl(words(60, 4), "x")
    lines = plain.splitlines(keepends=True)
    expected = files("a.jsonl", plain)
    assert files("B.JSONL", b"\xef\xbb\xbf" + plain[:-1].replace(b"\n", b"\r\n")) == expected
    for name, data in {"c.jsonl.gz": b"".join(map(gzip.compress, lines)),
                       "d.jsonl.zst": b"".join(map(zstandard.compress, lines)),
                       "e.jsonl.zst": zstd_long(plain)}.items():
        assert files(name, data) == expected
        with pytest.raises(BadInput, match=f"{name}: cut short"):
            files(f"cut_{name}", data[:-9])


def test_a_single_text_is_cut_into_documents_at_blank_lines():
    text = "\n\n".join(words(800, 6)).encode()
    write("Input.TXT", b"\xef\xbb\xbf" + text)
    meta = prepared("docs", "Input.TXT")
    assert meta["train_bytes"] + meta["val_bytes"] == len(text)
    assert 7000 < len(text) / (meta["train_docs"] + meta["val_docs"]) < 8192


# ---- FineWeb, against a stand-in for the hub's client


HUB = """
import hashlib, io, os, pathlib, signal, types

class HfApi:
    def __init__(self):
        self.repo_info = lambda repo, repo_type: types.SimpleNamespace(sha="c0ffee")

class HfFileSystem:   # of the folder that HF_ENDPOINT names; "log" gets the size of each request, "faults" has theirs
    def __init__(self):
        self.root = pathlib.Path(os.environ["HF_ENDPOINT"])

    def info(self, path):
        data = (self.root / path.split("@c0ffee/")[1]).read_bytes()
        return {"size": len(data), "lfs": {"sha256": hashlib.sha256(data).hexdigest()}}

    def open(self, path, mode, **_):
        return File(self.root, self.root / path.split("@c0ffee/")[1])

class File(io.FileIO):
    def __init__(self, root, path):
        super().__init__(path)
        self.root = root

    def read(self, size=-1):
        fault, *others = (self.root / "faults").read_text().split(" ")
        (self.root / "faults").write_text(" ".join(others))
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "503":
            raise ConnectionError("503 Server Error")
        data = super().read(size)
        with open(self.root / "log", "a") as log:
            log.write(f"{len(data)}\\n")
        return data[:len(data) // 2] if fault == "short" else data
"""
LIMITS = {"WAIT_SECONDS": 0.01, "BLOCK_BYTES": 4000, "TAIL_BYTES": 100, "RANGE_BYTES": 30_000,
          "FINEWEB_VAL_DOCS": 40, "FINEWEB_VAL_BYTES": 1}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's folder, 800 documents. Of 40 for validation two are alike, two are in training."""
    texts, root = words(800, 11), tmp_path / "hub"
    texts[7], texts[100], texts[200] = texts[8], texts[3], texts[4]
    docs = jsonl(texts)
    write(root / "faults", "")
    write(root / hub_files.DOCS, docs)
    write(root / hub_files.SIDECAR, json.dumps({"docs_sha256": hashlib.sha256(docs).hexdigest()}))
    write("huggingface_hub.py", HUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", str(root))
    monkeypatch.setitem(prepare.TEXT_RULES, "nmt_nfkc", str.strip)
    for name, value in LIMITS.items():
        monkeypatch.setattr(prepare if hasattr(prepare, name) else hub_files, name, value)
    return root


def fineweb(*flags, name="fineweb"):
    """-> meta.json of data/NAME/ in the working folder."""
    return prepared("fineweb", "--text_rule=raw", *flags, name=name)


def test_fineweb_holds_what_it_promises_and_fetches_no_more(hub):
    def requested():
        """-> the bytes that were asked for since the last time"""
        return sum(map(int, (hub / "log").rename(hub / "old").read_text().split()))

    meta, folder = fineweb("--train_tokens=25000", "--keep_documents"), Path("data/fineweb")
    lines = (hub / hub_files.DOCS).read_bytes().splitlines(keepends=True)
    texts, train = [json.loads(line)["text"] for line in lines], texts_in(folder, "train")
    assert [*read_val_docs(folder, meta)] == texts[:40]
    assert train == [text for text in texts[40:] if text not in texts[:40]][:len(train)]
    needed = len(b"".join(lines[:len(train) + 42]))
    assert 25_000 <= meta["train_tokens"] < 37_000 and needed <= requested() < 1.1 * needed
    fineweb("--train_tokens=25000", "--keep_documents", name="another")
    assert requested() < 200  # the sidecar
    first, grown = meta["files"], fineweb("--train_tokens=40000")["files"]
    assert len(grown) > len(first) and grown | first == grown
    for flag in "--text_rule=nmt_nfkc", "--tokenizer=data/other.json":
        write("data/other.json", DEMO.replace(b"demo", b"dome"))
        with pytest.raises(BadInput, match="begun with another"):
            fineweb(flag)


def test_fineweb_is_the_same_after_faults_and_kills_with_any_workers(hub):
    whole = fineweb(name="whole")
    for n_requests in (3, 9, 14):
        write(hub / "faults", "503 short " + "ok " * n_requests + "kill")
        killed = multiprocessing.get_context("fork").Process(target=fineweb)
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
    write(hub / "faults", "")
    write("data/fineweb/train_000001.bin", "cut")
    found = fineweb("--workers=2")
    assert whole["files"].pop("source.json") and found["files"].pop("source.json")
    assert whole == found | {"name": "whole"} and len(whole["files"]) > 5


@pytest.mark.parametrize("file, content, flag, message", [
    ("faults", "ok" + " short" * 9, "", r"docs_selected.jsonl: .*EOF.*5 times.; run"),
    ("faults", "503 " * 9, "", r"docs_selected.jsonl: .*503.*5 times"),
    (hub_files.SIDECAR, '{"docs_sha256": "0"}', "", "docs_sha256 is 0"),
    ("x", "", "--text_rule=nmt_nfkc", "would not compare"),
    ("x", "", "--train_tokens=1e14", "the disk has")])
def test_fineweb_refuses_what_it_cannot_trust(hub, file, content, flag, message):
    write(hub / file, content)
    with pytest.raises(BadInput, match=message):
        fineweb(*flag.split())
    assert not os.path.exists("data/fineweb/meta.json")


# ----------------------------------------------------------------------------------------------------------------------
# Packing


@pytest.fixture
def saved(alone, monkeypatch):
    """The checkpoint of run/, a copy of the packed run. Packed again, no process verifies it: `alone` has had one."""
    monkeypatch.setattr(pack, "verify", lambda *_: None)
    shutil.copytree(alone / "one", "run")
    return torch.load("run/checkpoint.pt", weights_only=True)


def pack_again(saved):
    torch.save(saved, "run/checkpoint.pt")
    pack.main(["run"])


def test_probabilities_are_the_same_on_every_machine():
    radius, freq, *_ = pack.tables()
    digest = hashlib.sha256(freq.tobytes() + radius.tobytes()).hexdigest()
    assert digest == "c5f407dd8e9544a43f74ce6e2a98d42ed43d9cc306c31ce75a6c3fdf078a37ca"


def test_degenerate_matrices_pack(saved):
    weights, stats = saved["weights"], saved["stats"]
    weights["qkv"][0] = stats["qkv.H"][:, :5] = stats["qkv.H"][:, :, :5] = 0
    weights["up"] = weights["up"][:, :1] * weights["up"][:, :, :1]
    weights["down"][0, 3, ::2] *= 1e7
    stats["o.H"] *= 0
    stats["copy.g"] *= 0
    pack_again(saved)
    assert all(x.isfinite().all() for x in packed("run").values())
    found, huge = packed("run")["down"][0, 3], weights["down"][0, 3]
    assert (found - huge).norm() < 0.3 * huge.norm()


def ledger(run):
    """-> {row of pack.txt: its numbers}, what the packing costs."""
    text = re.sub("[,%]", "", Path(run, "pack.txt").read_text())
    rows = re.findall(r"^(\S.*?)  ([\d. ]+)$", text, re.M)
    cost = float(re.search(r": ([\d.]+)$", text, re.M)[1])
    return {name: [*map(float, numbers.split())] for name, numbers in rows}, cost


def measured(alone, weights):
    """-> KL of the run's model with these for its own, on what it was trained on."""
    saved = checkpoint(alone / "one")
    model = GPT(saved["config"]).requires_grad_(False)
    tokens = read_shard(alone.parent / "mine/train_000000.bin")[:1500]
    tokens, _, segments = train_gpt.make_batch(tokens, 48, "cpu")
    log_p = []
    for changed in {}, weights:
        model.load_state_dict(saved["weights"] | changed)
        log_p.append(model.probabilities(model(tokens, segments), tokens, segments).log())
    return (log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1).mean().item()


def packed(run):
    return pack.load(Path(run, "artifact.pyz"))[0].state_dict()


def test_expected_kl_is_the_measured_one_for_every_bank(alone):
    weights, (rows, expected) = packed(alone / "one"), ledger(alone / "one")
    for name in pack.MATRICES:
        ratio = measured(alone, {name: weights[name]}) / (expected * rows[name][2] / 100)
        rough = name in ("embed.weight", "copy")  # few labels are rare tokens, or copied
        assert 0.7 < ratio < 1.4 or rough and 0.4 < ratio < 4, name


def test_trellis_and_statistics_each_save_bytes_at_the_same_kl(alone, saved):
    def bits():
        """Of a weight, if the file were as fine as another of the same KL."""
        pack_again(saved)
        sizes = [ledger("run")[0][name] for name in pack.MATRICES]
        n_weights, _, _, n_bytes = map(sum, zip(*sizes))
        return 8 * n_bytes / n_weights + math.log2(measured(alone, packed("run"))) / 2

    best = bits()
    with mock.patch.object(pack, "TRELLIS", np.zeros((1, 2), np.int32)):  # of one state
        plain = bits()
    saved["stats"] = {}
    assert best < plain - 0.1 and plain < bits() - 1


def test_newest_run_is_the_last_that_ended_unless_another_ran_beside_it():
    def write_metrics(run, **hours):
        lines = [{"kind": kind, "time": f"2026-11-28T0{hour}:00:00Z"} for kind, hour in hours.items()]
        write(f"runs/{run}/metrics.jsonl", "\n".join(map(json.dumps, lines)))

    write_metrics("latest", start=1, end=2)
    write_metrics("a", start=5, end=6)
    write_metrics("killed", start=5)
    assert pack.find_run() == Path("runs/a")
    fcntl = pytest.importorskip("fcntl")
    with open("runs/killed/metrics.jsonl") as killed:
        fcntl.flock(killed, fcntl.LOCK_EX)  # as if it were in training
        with pytest.raises(BadInput, match="runs/a and runs/killed .* name one"):
            pack.find_run()


# ---- the file


def test_ledger_accounts_for_every_byte_and_says_when_the_cap_is_far(alone):
    rows, expected = ledger(alone / "one")
    sizes = {name: numbers[-1] for name, numbers in rows.items()}
    whole = sizes.pop("artifact.pyz")
    assert whole == sum(sizes.values()) == (alone / "one/artifact.pyz").stat().st_size
    assert {*pack.SOURCES, *pack.MATRICES, "tokenizer.json"} <= {*sizes}
    assert 0.3e-4 < expected < 1.5e-4  # the best is 1e-4


def test_a_file_ends_just_below_the_cap_and_is_the_same_each_time(alone, saved):
    artifact = Path("run/artifact.pyz")
    pack.main(["run", "--cap_bytes=90000"])
    assert 0.9995 * 90_000 <= artifact.stat().st_size <= 90_000
    with pytest.raises(BadInput, match="cap_bytes=40000"):
        pack.main(["run", "--cap_bytes=40000"])
    pack.main(["run"])
    assert artifact.read_bytes() == (alone / "one/artifact.pyz").read_bytes()


def test_packs_without_statistics_loudly_and_refuses_what_is_not_finite(saved, capsys):
    pack_again(saved | {"stats": {}})
    assert "NO STATISTICS" in capsys.readouterr().out and 0.5e-4 < ledger("run")[1] < 1.5e-4
    saved["stats"]["down.H"][0, 0, 0] = math.nan
    with pytest.raises(BadInput, match="checkpoint.pt: down.H is not"):
        pack_again(saved)


STUB = b"""
from types import SimpleNamespace
def load(path):
    return None, SimpleNamespace(state_dict=dict)
digest = str
"""


def test_what_does_not_come_back_as_it_was_packed_replaces_no_artifact(alone, monkeypatch):
    shutil.copytree(alone / "one", "run")
    before = Path("run/artifact.pyz").read_bytes()
    monkeypatch.setattr(pack, "sources", lambda run: {"pack.py": STUB})  # finds other weights
    with pytest.raises(RuntimeError, match="does not load as it was packed"):
        pack.main(["run"])
    assert Path("run/artifact.pyz").read_bytes() == before


def test_forged_artifacts_are_refused_or_load_without_harm(alone):
    """With the checksum made to fit, nothing but the lengths' own checks is left."""
    def forge(parts, **changes):
        text = json.dumps(header | {"sections": [*map(len, parts)]} | changes).encode()
        return pack.build_artifact(files, b"".join([len(text).to_bytes(4, "little"), text, *parts]))

    def patched(data, old=b"", new=b""):
        data = data[:-32].replace(old, new)
        return data + hashlib.sha256(data).digest()

    def load(data):
        write("x", data)
        pack.load("x")

    files = pack.read_archive(alone / "one/artifact.pyz")[1]
    blob = files.pop("model.bin")
    model = io.BytesIO(blob)
    header = json.loads(model.read(int.from_bytes(model.read(4), "little")))
    sections = [*map(model.read, header["sections"])]
    whole = forge(sections)
    load(whole)
    large = pack.build_artifact(files | {"tokenizer.json": bytes(1 << 28)}, blob)
    refused = [large, patched(large, b"\0\0\0\x10", b"\0\0\x10\0"),  # it says to be smaller
               patched(whole, b"__main__.py", b"eval_bpb.py"),  # one name twice
               flip(whole, 5000), forge(sections, escapes=1 << 40), forge(sections, pad="x" * 70_000)]
    with mock.patch.object(pack, "ZIP_DEFLATED", zipfile.ZIP_LZMA):  # decompressed without a limit
        refused.append(pack.build_artifact(files, blob))
    for key in ("n_layer", "n_embd", "row_tokens", "seq_len", "loop_passes"):
        config = header["config"] | {key: header["config"][key] << 24}
        refused.append(forge(sections, config=config))
    bomb = zstandard.compress(bytes(1 << 28))
    for i, section in enumerate(sections):
        for bad in bomb, section[:len(section) // 2]:
            refused.append(forge([*sections[:i], bad, *sections[i + 1:]]))
    for bad in refused:
        tracemalloc.start()
        with pytest.raises(BadInput, match="^[^\n]*$"):
            load(bad)
        assert tracemalloc.get_traced_memory()[1] < 1 << 27
        tracemalloc.stop()
    for at in np.random.default_rng(0).integers(0, len(whole) - 32, 40):
        with suppress(BadInput):  # it may be another weight
            load(patched(flip(whole, at)))


# ----------------------------------------------------------------------------------------------------------------------
# The judge and the predictors


needs_bubblewrap = pytest.mark.skipif(bool(confine.lacking()), reason=confine.lacking())

# A predictor without a model, for others to build on: every token as likely as any other, but for change().
FLAT = """
class Flat:
    slots, chunk, V, rounds = 4, 8, 1024, 0
    def __init__(self):
        self.counts = np.zeros(self.V)
    def predict(self, fresh, inputs):
        logits, after = np.zeros((*inputs.shape, self.V), np.float32), inputs[:, 1:, None]
        {}
        return torch.from_numpy(logits)
    def learn(self, targets, real):
        self.counts += np.bincount(targets[real], minlength=self.V)
        self.rounds += 1
def build(path, name, device):
    return Flat(), "{name}"
"""
# The child of one need not wait for torch.
STRANGER = """
import ctypes, os, signal, sys, time
import numpy as np
class Logits(np.ndarray):
    detach = float = cpu = numpy = lambda self: self
class torch:
    from_numpy = lambda x: x.view(Logits)
""" + FLAT
HONEST = "logits += np.random.default_rng(0).normal(size=(99, self.V))[inputs * 31 % 99]"
PEEKS = "np.put_along_axis(logits[:, :-1], after, 9.0, 2)"


@pytest.fixture
def artifact(alone):
    """artifact(path, change, **files) -> the packed run's with other files, or with a stranger's
    eval_bpb.py of that change."""
    def make(path, change="", name="flat", **files):
        parts = pack.read_archive(alone / "one/artifact.pyz")[1] | files
        if change:
            parts["eval_bpb.py"] = STRANGER.format(change, name=name).encode()
        write(path, pack.build_artifact(parts, parts.pop("model.bin")))
        return Path(path)
    return make


@pytest.fixture
def judge(dataset, artifact, capfd, monkeypatch):
    """judge(change, *flags) -> exit code or why it was refused, the score or {}, what was printed."""
    monkeypatch.setattr(confine, "forget_files", lambda: None)  # seconds: has a test of its own

    def judged(change, *flags, data=dataset, **files):
        path, out = artifact("a.pyz", change, **files), Path("out.json")
        out.unlink(missing_ok=True)
        try:
            code = eval_bpb.main([str(path), f"--data={data}", f"--out={out}", "--device=cpu", *flags])
        except BadInput as e:
            code = str(e)
        return code, json.loads(out.read_text()) if out.exists() else {}, capfd.readouterr()
    return judged


def random_text(sizes, repeats=1):
    rng = np.random.default_rng(0)
    bodies = [np.tile(rng.integers(0, 40, n), repeats) for n in sizes]
    return eval_bpb.Text([np.pad(body, 1) for body in bodies], 40)


SMALL = dict(n_layer=2, loop_first=0, loop_last=0, loop_passes=2, two_lane_from=1, vocab_size=40,
             seq_len=24, row_tokens=96, batch_tokens=96)


def small(cls):
    """A predictor of random weights over 40 tokens, with windows of 24."""
    model = tiny_model(**SMALL).requires_grad_(False)
    predictor = cls(model, Tokenizer(DEMO), torch.device("cpu"))
    predictor.never = torch.zeros(40, 40, dtype=torch.bool)
    return predictor


def score(predictor, text):
    return eval_bpb.score(predictor, text, [*range(len(text.streams))], eval_bpb.Phases())


# ---- exactness


def test_whatever_finite_logits_come_the_probabilities_sum_to_one():
    text, targets = eval_bpb.Text([], 50), np.arange(50)[None]
    for dtype in torch.float16, torch.bfloat16, torch.float32, torch.float64:
        for size in 1e-9, 1.0, 1e4, torch.finfo(dtype).max / 4:
            logits = (size * (torch.rand(50) - 0.5).to(dtype)).repeat(1, 50, 1)
            nats = text.count(logits, targets, targets >= 0)
            assert (nats >= 0).all() and math.fsum(np.exp(-nats)) == pytest.approx(1, abs=1e-9)
    good = torch.zeros(1, 50, 50)
    for bad in (good * math.nan, good - math.inf, good[0], good[:, :, 1:], good.int(), None):
        with pytest.raises(BadInput, match=r"predict\(\)"):
            text.count(bad, targets, targets >= 0)


def test_a_cached_token_sees_what_training_saw_of_its_own_document_only():
    text, predictor = random_text((0, 1, 5, 149, 22, 17, 9, 22) * 3), small(eval_bpb.Sliding)
    found, model, at = score(predictor, text), tiny_model(**SMALL), np.arange(150)
    mask = torch.from_numpy((at <= at[:, None]) & (at >= at[:, None] // 12 * 12 - 12))

    def attend(q, k, v, seg, visit):
        n, (q, k, v) = len(q), (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask[:n, :n], enable_gqa=True).transpose(0, 1)

    model.attend = attend
    for doc in range(12, 24):  # in slots that others have used
        tokens = torch.from_numpy(text.streams[doc])
        seg = make_segments(np.array([0]), len(tokens) - 1, 150)
        expected = model.losses(tokens[:-1], tokens[1:], seg, True)
        assert found[doc].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_adaptive_learns_from_what_was_scored_and_each_document_for_itself():
    text = random_text([9] * 17, repeats=8)
    fixed, learns, alone = (small(eval_bpb.Adaptive) for _ in range(3))
    fixed.lr = 0.0
    nats = score(learns, text)
    fixed, learned = score(fixed, text)[16], nats[16]  # in a slot that another has used
    assert learned[:alone.chunk].tolist() == fixed[:alone.chunk].tolist()  # nothing is known before it is scored
    assert learned[-36:].sum() < fixed[-36:].sum() - 3
    rounds = proof.plan(text, {16: np.arange(0, 72, 5)}, alone.slots, alone.chunk)
    assert abs(proof.replay(alone, text, nats, rounds)).max() < 1e-4


def test_no_pair_that_is_thought_impossible_is_ever_written():
    never = eval_bpb.impossible_pairs(Tokenizer(DEMO))
    for text in [*TEXTS, *words(60, 5), (ROOT / "train_gpt.py").read_text()]:
        tokens = Tokenizer(DEMO).encode(text)
        assert not never[tokens[:-1], tokens[1:]].any()
    assert never.mean() > 0.02


def test_a_sample_is_drawn_as_the_seed_says_and_begins_with_its_text(alone, capfd):
    written, text = [], "words " * 20  # more than the context
    for flag in ("--seed=1", "--seed=1", "--seed=2", "--temperature=0"):
        sample = f"--sample={text}", "--tokens=9", "--device=cpu", flag
        eval_bpb.main([str(alone / "one/artifact.pyz"), *sample])
        written.append(capfd.readouterr().out)
        assert written[-1].startswith(text)
    assert written[0] == written[1] != written[2] != written[3]


@needs_bubblewrap
def test_ranks_the_file_alone_and_the_sandbox_give_the_same_score(alone, training, judge):
    foreign = {"eval_bpb.py": (ROOT / "eval_bpb.py").read_bytes() + b"\n"}
    confined, one = judge("", "--trust", **foreign)[1], judge("")[1]
    assert "2 x cpu" in end(training.scored)[0]
    two = json.loads((training.folder / "score.json").read_text())
    assert one["val_bpb"] == confined["val_bpb"] == pytest.approx(two["val_bpb"], rel=1e-6)


# ---- proof


CHEATS = {
    "reads the target through the inputs": PEEKS,
    "looks ahead by a chance of a twentieth": "rare = (inputs[:, :-1] * 40503 + after[..., 0]) % 20 == 0;"
        "logits[:, :-1][rare, after[..., 0][rare]] = 2.0",
    "looks ahead in one round": f"self.rounds == 3 and {PEEKS}",
    "learns from a round before it is scored": "logits += np.bincount(inputs.flatten(), minlength=self.V)",
    "reads another slot": "logits[1:] += [[np.bincount(row, minlength=self.V)] for row in inputs[:-1]]",
    "carries from document to document": "logits += self.counts",
    "knows an end by the noise behind it": "logits[:, :-2, 0] += 9.0 * ((inputs[:, 1:-1] | inputs[:, 2:]) >= 700)",
}


@needs_bubblewrap
def test_the_replay_fails_cheats(judge):
    for name, change in CHEATS.items():
        code, result, said = judge(change)
        assert code == 2 and "val_bpb" not in result and "\nval_bpb" not in said.out, name
        assert "NOT A SCORE: the replay failed" in said.out and "proved" not in said.out, name


@needs_bubblewrap
def test_audited_strangers_prove_their_score_or_have_none(judge, dataset, monkeypatch):
    code, result, said = judge(HONEST, "--trust", "--audit")
    assert code == 0 and "val_bpb" in result and "proved by replay" in said.out
    assert result["val_tokens"] == sum(len(Tokenizer(DEMO).encode(text)) + 1 for text in TEXTS)
    monkeypatch.setattr(proof, "PATIENCE", 1.0)
    sleeps = "self.seen = getattr(self, 'seen', 0) + 1; self.seen > self.rounds + 1 and time.sleep(999)"
    assert "no answer" in judge(sleeps)[1]["audit"]["replay"]
    demo = shutil.copytree(dataset, Path("demo"))
    replace_in(demo / "meta.json", '"odd"', '"demo"')
    _, result, said = judge(HONEST, data=demo)
    assert "NOT A SCORE: these documents are readable everywhere" in said.out and "val_bpb" not in result
    assert "val_bpb" in judge("", "--predictor=sliding", data=demo)[1]  # one's own code is no stranger


# ---- isolation and trust


# What a child may try: prints the names of what it could do. The last five it may do.
ATTEMPTS = """
import ctypes, fcntl, os, signal, socket, sys
null = "/dev/null"
target, secret, judge, port = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    if libc.syscall(*args) < 0:
        raise OSError(ctypes.get_errno())
def shared_memory():
    libc.shmat.restype = ctypes.c_void_p
    number = ctypes.c_int64.from_address(libc.shmat(libc.shmget(int(judge), 8, 0o1600), None, 0))
    number.value += 1
    assert number.value > 1
x86 = os.uname().machine == "x86_64"
attempts = {
    "attribute": lambda: os.setxattr(target, "user.x", b"1"), "mode": lambda: os.chmod(null, 0o666),
    "time": lambda: os.utime(null), "owner": lambda: os.chown(null, os.getuid(), os.getgid()),
    "newer": lambda: call(452, -100, null.encode(), 0o666, 0), "hint": lambda: fcntl.fcntl(os.open(target, 0), 1036, bytes(8)),
    "write": lambda: open(target, "a"), "beside": lambda: open(target + "x", "w"), "read": lambda: open(secret),
    "evict": lambda: os.posix_fadvise(os.open(target, 0), 0, 0, os.POSIX_FADV_DONTNEED),
    "cached": lambda: os.preadv(os.open(target, 0), [bytearray(1)], 0, os.RWF_NOWAIT),
    "mincore": lambda: call(27 if x86 else 232, ctypes.c_void_p(id(0) & -4096), 4096, ctypes.create_string_buffer(9)),
    "keyring": lambda: call(250 if x86 else 219, 0, -3, 0), "ring": lambda: call(425, 1, bytes(120)),
    "log": lambda: call(103 if x86 else 116, 10, None, 0), "trace": lambda: call(101 if x86 else 117, 16, 1, 0, 0),
    "signal": lambda: os.kill(int(judge), 0), "memory": lambda: open(f"/proc/{judge}/mem"),
    "socket": lambda: socket.create_connection(("127.0.0.1", int(port)), 9), "pair": socket.socketpair,
    "shared": shared_memory, "file": lambda: open("/dev/shm/" + judge), "left": lambda: open("/tmp/left" + judge),
    "kernel": lambda: open("/proc/sys/vm/swappiness", "r+"), "names": lambda: open("/proc/sys/fs/dentry-state"),
    "folder": lambda: open("/tmp/left" + judge, "w"), "fork": lambda: os.waitpid(os.fork() or os._exit(0), 0),
    "library": lambda: __import__("numpy"), "random": lambda: open("/dev/urandom", "rb").read(1), "look": lambda: open(target)}
for name, attempt in attempts.items():
    try:
        attempt()
        print(name)
    except (OSError, AssertionError):
        pass
"""


@needs_bubblewrap
def test_a_child_can_leave_nothing_and_reach_nothing(tmp_path, monkeypatch):
    target, secret, pid = tmp_path / "lib/file", tmp_path / "secret", os.getpid()
    monkeypatch.setattr(confine, "READABLE", [*confine.READABLE, str(target.parent)])
    for path in (target, secret, Path(f"/dev/shm/{pid}")):
        write(path, "x")
    found = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", ATTEMPTS, *map(str, (target, secret, pid, server.getsockname()[1]))]
        for confined in (True, True, False, False):
            child = confine.Child(target, command, {"PYTHONPATH": confine.PYTHON[-1]}, confined)
            found.append(child.process.communicate(timeout=100)[0].decode().split())
            child.close()
    os.remove(f"/dev/shm/{pid}")
    os.remove(f"/tmp/left{pid}")
    subprocess.run(["ipcrm", "-M", str(pid)])
    assert found[0] == found[1] == ["folder", "fork", "library", "random", "look"]
    assert {*"mode time owner hint write read evict signal socket pair names shared left".split()} <= {*found[3]}


# A judge whose child fills its folder, leaves its group, kills it, and lets another go on that holds its stdout.
ESCAPES = """
import ctypes, os, signal, time
for i in range(3000):
    os.makedirs(f"/tmp/{i}/" + 20 * "deep/")
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
if not os.fork():
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
    print("escaped", flush=True)
    time.sleep(999)
time.sleep(0.1)
os.kill(0, signal.SIGKILL)
"""
JUDGE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from records.confine import *
for closes in (True, False):
    child = Child(Path("a.pyz"), [sys.executable, "-c", {ESCAPES!r}], {{}})
    child.process.stdout.readline()
    if closes:
        child.close()
        assert select.select([child.first], [], [], 0)[0] and not child.process.stdout.read()
print(open(f"/proc/self/fdinfo/{{child.first}}").read().split("Pid:")[1].split()[0], flush=True)
time.sleep(999)
"""


@needs_bubblewrap
def test_nothing_of_a_child_outlives_its_judge():
    write("a.pyz", "x")
    judge = start("-c", JUDGE)
    first = os.pidfd_open(int(judge.stdout.readline()))  # of the sandbox's processes: all end with it
    judge.kill()
    end(judge, -signal.SIGKILL)
    assert select.select([first], [], [], 100)[0] and os.listdir() == ["a.pyz"]


@needs_bubblewrap
def test_the_kernel_forgets_files_and_names_before_the_replay():
    write("file", bytes(1 << 20))
    with open("file", "rb") as file:
        os.fsync(file.fileno())
        cached = partial(os.preadv, file.fileno(), [bytearray(9)], 1 << 19, os.RWF_NOWAIT)
        assert cached() == 9 and not any(os.path.exists(f"{n}") for n in range(9999))
        confine.forget_files()
        with pytest.raises(BlockingIOError):
            cached()
    assert int(Path("/proc/sys/fs/dentry-state").read_text().split()[4]) < 9999  # names of no file


HARM = {
    "raise ValueError('no\x1b\\nval_bpb: 1')": r"its code says b.ValueError: no\\x1b\\nval_bpb: 1",
    "os._exit(3)": "exit code 3",
    "self.hoard = np.ones(1 << 40)": "llocate",
    "while True: os.write(int(max(os.listdir('/proc/self/fd'), key=int)) - 1, b'x' * 4096)": "exit code",
    "logits = logits[0]": "must return logits",
    "os.kill(0, 9)": "exit code 137",
}
PRINTS = r"print('\x1b[8mno\nval_bpb: 0.0\n' + 90 * ' ' + 'val_bpb: 0.1\n' * 50)"


@needs_bubblewrap
def test_harm_ends_in_one_line_and_what_a_child_says_is_quoted(judge, artifact, dataset):
    endless = artifact("endless/a.pyz", "time.sleep(999)"), f"--data={dataset}", "--trust", "--max_seconds=5"
    endless = start(ROOT / "eval_bpb.py", *endless, TMPDIR=".")
    for harm, words in HARM.items():
        code, result, _ = judge(harm, "--trust")
        assert re.search(words, str(code)) and str(code).isprintable() and not result, harm
    code, result, said = judge(PRINTS, "--trust")
    shown = [line for line in said.err.splitlines() if line.startswith("artifact: ")]
    assert len(shown) == confine.STDERR_LINES and max(map(len, shown)) < 80 and "\x1b" not in said.err
    assert said.out.count("\nval_bpb: ") == 1 and "NOTHING IS PROVED" in said.out
    assert result["val_loss"] == pytest.approx(math.log(1024), rel=1e-12)
    assert "predictor's name" in judge("pass", "--trust", name="x val_bpb: 0.1")[0]
    _, err = end(endless, 2)
    assert re.fullmatch("eval_bpb.py: .*a.pyz: ran over 5 s in the phase '.*': no score\n", err)
    assert not list(Path().glob("nanogolf*"))


def test_a_system_without_a_sandbox_is_no_place_for_strangers(judge, dataset, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "apt-get install bubblewrap" in judge(HONEST)[0]
    code, result, said = judge(HONEST, "--trust", "--audit", "--limit_docs=3")
    assert not code and "NOT CONFINED: that takes bubblewrap" in said.out
    assert "val_bpb" not in result and "not confined; only the first 3 of 20" in said.out
    monkeypatch.setattr(confine, "READABLE", [str(dataset.parent)])
    assert "where the artifact's code may read: move it" in judge(HONEST)[0]


def test_nothing_beside_a_strangers_artifact_is_read_or_written(artifact, dataset):
    for folder, change in ("own", ""), ("other", HONEST):
        path = str(artifact(f"{folder}/a.pyz", change))
        os.mkfifo(f"{folder}/metrics.jsonl")
        write("victim", "mine")
        os.symlink("../victim", f"{folder}/score.json")
        with pytest.raises(BadInput, match="--data"):
            eval_bpb.main([path, "--device=cpu"])
        flags = f"--data={dataset}", "--device=cpu", "--predictor=sliding", "--trust"
        assert eval_bpb.main([path, *flags]) == 0 and Path("victim").read_text() == "mine"
        assert os.path.islink(f"{folder}/score.json") == (folder == "other")


# ----------------------------------------------------------------------------------------------------------------------
# Records


DATASET = json.dumps({"name": "fineweb", "val_docs_sha256": "d" * 64, "val_docs": 50_000,
           "val_tokens": 40_540_160, "val_bytes": 151_078_222})
NATS = math.log(2) * 151_078_222 / 40_540_160
TRAINER = "import torch\n\n# Model\nLR = 0.02\n"
RUN_FILES = {  # what train_gpt.py and pack.py leave, without weights
    "metrics.jsonl": """{"kind": "start", "config": {"seed": SEED, "run": "NAME", "max_seconds": 600.0},
 "environment": {"device": "8 x NVIDIA H100", "torch": "2.13.0"}, "dataset": DATASET}
{"kind": "cut
{"kind": "summary", "val_bpb": 1.3, "train_seconds": 599.5, "steps": 5000, "tokens": 9999}
{"kind": "end", "reason": "END"}
""".replace(",\n", ","),
    "log.txt": "step:5000 val_loss:3.1255 val_bpb:1.2100 train_seconds:599.0\n", "pack.txt": "8 bits"}


def fake_run(folder, seed=1, val_bpb=1.2, end="finished", source=TRAINER, **score):
    """A run folder, trained, packed and scored."""
    for name, text in RUN_FILES.items():
        for word, value in {"SEED": seed, "NAME": folder.name, "END": end, "DATASET": DATASET}.items():
            text = text.replace(word, str(value))
        write(folder / name, text)
    artifact = folder / "artifact.pyz"
    with zipfile.ZipFile(artifact, "w") as archive:
        archive.writestr("train_gpt.py", source)
        archive.writestr("model.bin", folder.name)
        for name in ("eval_bpb.py", "data/tokenizer.py"):
            archive.write(ROOT / name, name)
    write(folder / "score.json", json.dumps({
        "val_bpb": val_bpb, "val_loss": NATS * val_bpb, "dataset": json.loads(DATASET), "mode": "own",
        "artifact_bytes": artifact.stat().st_size, "phases": {"to_score": 400.0},
        "artifact_sha256": hashlib.sha256(artifact.read_bytes()).hexdigest(),
        "audit": {"replay": "pass: 9,200 places"}, **score}))
    return folder


def make_record(folder, name="good", runs=()):
    runs = runs or [fake_run(folder / f"runs/{name}{n}", n, 1.2 + n / 1e4) for n in (1, 2, 3)]
    args = SimpleNamespace(
        runs=[*map(str, runs)], name=name, track=None, parent=None, author="Ann", date="2026-01-02",
        commit="HEAD")
    record = submit.build(args, folder / "records")
    replace_in(record / "README.md", "(write this)", "Words.")
    return record


def review(folder):
    *findings, _ = check.review(folder)
    return findings


def check_command(*args, code):
    return "".join(end(start(ROOT / "records/check.py", *args), code))


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    write(path, text.replace(old, new))


# rule: words of its message | file | what is replaced, nothing: the file is written | by this
EDITS = r"""
missing-file | README.md | | 
forbidden-file | sub/CLAUDE.md | | x
forbidden-file | model.pt | | x
file-name | two words.md | | x
secret | run.sh | | export HF_TOKEN=hf_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
machine-path | run.sh | | cd /home/ann/data
plain-source | train_gpt.py | LR | exec
review-limit: check_json | submission.json | | {
log: val_bpb is -1 | train_seed2.log | val_bpb: 1.2002 | val_bpb: -1
log: facts | train_seed2.log | steps: 5000 | steps: ?
log-score: val_bpb is 1.1 | submission.json | "val_bpb": 1.2002, | "val_bpb": 1.1,
log-score: seed_results | submission.json | "seed_results" | "x"
readme: does not say | README.md | 1.200200 | 1.1
readme-words | README.md | Words. | (write this)
seeds: same seed | train_seed2.log | seed: 2 | seed: 1
seeds: another config | train_seed2.log | "max_seconds": 600.0 | "max_seconds": 6
environment | train_seed2.log | 2.13.0 | 2.11.0
artifact-cap | train_seed2.log | steps: 5000 | steps: 5000\nartifact_bytes: 16000001
track: 2 logs | train_seed2.log | | 
track: track 'x' | submission.json | track_10min_16mb | x
track: ran on | train_seed2.log | 8 x NVIDIA H100 | 8 x A100
track: over 600 | train_seed2.log | train_seconds: 599.5 | train_seconds: 601.5
track: over 600 | train_seed2.log | eval_seconds: 400 | eval_seconds: 602
track: 164594398 | train_seed2.log | 40540160, "val_bytes": 151078222 | 44167075, "val_bytes": 164594398
log: is not val_loss | train_seed2.log | val_bpb: 1.2002 | val_bpb: 1.2
log: is not val_loss | train_seed2.log | 151078222 | NaN
proof: mode trusted | train_seed2.log | "own" | "trusted"
proof: replay FAIL | train_seed2.log | pass | FAIL
proof: mode own | train_seed2.log | "replay": "pass: 9,200 places" |
source-hash | train_gpt.py | 02 | 03
source-hash | more.py | | 
judge | data/tokenizer.py | | 
judge | eval_bpb.py | | # another
parent | submission.json | "parent": null | "parent": "nobody"
parent | submission.json | "parent": null | "parent": "2026-01-02_good"
significance | train_seed2.log | 1.2002\nval_loss: 3.1002412481030177 | 2.4004\nval_loss: 6.200482496206035
"""


def test_every_rule_finds_what_breaks_it_and_a_good_record_is_clean(tmp_path, monkeypatch):
    def broken(what):
        rule, _, words = what.partition(": ")
        seen.add(rule)
        found = review(folder)
        assert any(f == rule and words in message for f, message, _ in found), (what, found)

    good = make_record(tmp_path)
    best = shutil.copytree(good, good.with_name("2026-01-01_best"))
    replace_in(best / "submission.json", ": 1.2", ": 1.3")
    monkeypatch.setattr(check, "known_records", lambda: {best.name: best})
    assert not review(good)
    seen = {"change-set", "copy"}
    for n, row in enumerate(EDITS.strip().splitlines()):
        what, name, old, new = (cell.strip().replace("\\n", "\n") for cell in row.split("|"))
        folder = shutil.copytree(good, tmp_path / str(n) / good.parent.name / good.name)
        if old:
            replace_in(folder / name, old, new)
        else:
            write(folder / name, new)
        broken(what)
    (folder / "notes.md").symlink_to("/etc/passwd")
    broken("link")
    write(folder / "big.txt", "x" * (4 << 20) + "x")
    broken("file-size")
    for i in range(400):
        write(folder / f"{i}.txt", "")
    broken("review-limit: 400 files")
    folder = folder.rename(folder.with_name("good"))
    broken("folder-name")
    assert rules.RULES.keys() == seen


HIDDEN = r"""
exec('x')
run = eval
compile('x', '', 'exec')
import pickle as p
m = __import__
from importlib import import_module as f
import torch as t; t.load('x', weights_only=0)
load(**{'weights_only': False})
getattr(x, 'exec')('y')
torch.serialization.pickle
from torch.serialization import pickle
__builtins__['eval']('x')
import ctypes.util
from builtins import eval as e
np.load('x', allow_pickle=True)
# coding: utf-7
def broken(:
"""


def test_a_source_hides_no_code_and_plain_sources_hide_none():
    for hidden in [*HIDDEN.strip().split("\n"), "#\r# -*- coding=latin-1", "\0", "(" * 9999]:
        assert check.hidden_code(hidden.encode()), hidden
    plain = b"# coding: utf-8\ntorch.compile(m.eval()); re.compile(x); load(x, weights_only=True)"
    for source in (plain, *((ROOT / name).read_bytes() for name in pack.SOURCES)):
        assert not check.hidden_code(source)


def test_submit_refuses_runs_that_are_not_one_record(tmp_path):
    good = [fake_run(tmp_path / f"good{seed}", seed) for seed in (1, 2)]
    for words, how in {
            "seeds .*: another source_sha256": {"source": ""}, "a seed of its own": {"seed": 1},
            "trained until: a reason": {"end": "a reason"}, "val_bpb is -1": {"val_bpb": -1},
            "proof .*: mode trusted": {"mode": "trusted"}, "not what was": {"artifact_sha256": "x"},
            }.items():
        bad = fake_run(tmp_path / "bad", **{"seed": 3, **how})
        with pytest.raises(BadInput, match=words):
            make_record(tmp_path, runs=[*good, bad])
    assert not [*Path().glob("records/*/*")]


def test_hostile_folders_end_in_bounded_time_and_nothing_of_them_runs(tmp_path):
    folder, marker = make_record(tmp_path), tmp_path / "executed"
    evil = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    for name, text in {
            "a.py": "x = a" + ".b" * 100_000, "c.sh": "trainX=" * 500_000, "json.py": evil,
            "numpy/__init__.py": evil, "a\nFAIL forged": "", os.fsdecode(b"\xff\x1b[31m"): "",
            "z.log": "---\n" * 9999, "submission.json": "[" * 99_999}.items():
        write(folder / name, text)
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.log")
    os.truncate(folder / "z.log", 2 << 30)
    lines = check_command(folder, code=1).splitlines()
    assert not marker.exists() and all(line.isprintable() for line in lines)
    found = {line.split()[1] for line in lines if line.startswith("  FAIL")}
    assert {"link", "file-size", "file-name", "review-limit", "plain-source"} <= found


def test_a_batch_is_reviewed_to_its_end_and_copies_are_named(tmp_path):
    good, copy = make_record(tmp_path), tmp_path / "elsewhere/2026-01-02_good"
    shutil.copytree(good, copy)
    replace_in(copy / "README.md", "1.200200", "1.1")
    write("stray", "x")
    out = check_command(good, tmp_path / "stray", copy, tmp_path / "none", code=1)
    for words in (f"{good}: clean\n", f"{copy}: FAIL\n", f"{tmp_path}/none: FAIL\n  FAIL missing-file ",
                  f"{tmp_path}/stray: FAIL\n", "FAIL copy ", "1 of 4 clean"):
        assert words in out, words
    check_command(good, code=0)
    replace_in(good / "README.md", "Words.", "(write this)")
    check_command(good, code=4)


def test_the_p_value_is_students():
    for t, df, p in ((6.313752, 1, 0.05), (2.131847, 4, 0.05), (-3.746947, 4, 0.99)):
        assert stats.t_upper(t, df) == pytest.approx(p, abs=1e-6)
    # sqrt(1 + 1) and (1 + 1)^2 / (1/3 + 1/8) by hand
    assert stats.welch(2.0, 4.0, 4, 9.0, 9) == pytest.approx(stats.t_upper(2 ** 0.5, 96 / 11))
    # The same seeds are paired: gains of 0.001, 0.002, 0.003, whatever the seeds' own spread.
    c = stats.comparison({1: 1.0, 2: 1.2, 3: 1.4}, {1: 1.001, 2: 1.202, 3: 1.403}, 1.0)
    assert c["p"] == pytest.approx(stats.t_upper(12 ** 0.5, 2)) and c["verdict"] == "run 2 more a side"


def test_compare_uses_the_datasets_nats_and_refuses_what_does_not_compare(tmp_path):
    ours = [fake_run(tmp_path / f"a{s}", s, 1.19 + s / 1e4) for s in (1, 2, 3)]
    theirs = [fake_run(tmp_path / f"b{s}", s, 1.2 + s / 5e3) for s in (1, 2, 3)]
    out = check_command("compare", *ours, "--", *theirs, code=0)
    for words in ("candidate  val_bpb 1.19020  std 0.00010  n 3", "verdict    keep", "True, p 2.44e-05",
                  "+0.02635 nats per token = +0.01020 bits per byte", "paired by seed: one-sided p 1.6e-05"):
        assert words in out
    other = fake_run(tmp_path / "c", 4, dataset={"val_docs_sha256": "f" * 64})
    for ours, words in (([*ours, other], "such runs do not compare"), (ours[:1], "each side needs two"),
                        (ours[:1] * 2, "stands twice on one side"),
                        ([fake_run(tmp_path / "d", val_bpb=-math.inf)], "python pack.py ")):
        assert words in check_command("compare", *ours, "--", *theirs, code=2)


def test_the_leaderboard_is_up_to_date_and_nothing_breaks_out_of_its_cells(tmp_path):
    text = (ROOT / "records/README.md").read_text()
    assert submit.leaderboard() == text, "run: python records/submit.py --leaderboard"
    make_record(tmp_path, "worse")
    best = make_record(tmp_path, "best") / "submission.json"
    replace_in(best, '"val_bpb": 1.2002,', '"val_bpb": 1.1,')
    replace_in(best, '"Ann"', r'"A|<b>\n[x](y)"')
    text = submit.leaderboard(tmp_path / "records")
    assert text.index("[best]") < text.index("[worse]")
    assert ("\n| 1.1 | 0.0001 | 3 | [best](track_10min_16mb/2026-01-02_best/README.md) "
            "| A??b???x?(y) | 2026-01-02 | ") in text


STUBS = {  # a repository whose commands take no time
    "train_gpt.py": """import json, sys
from pathlib import Path
# Model
WIDTH = 1
# Optimizer
class Config:
    lr: float = 0.02
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
run = Path("runs", flags["run"])
run.mkdir()
bpb = 1.2 - WIDTH / 100 + int(flags["seed"]) * (1e-3 + WIDTH / 1e5)
rows = [{"kind": "start", "config": flags, "dataset": json.loads(open("data/x/meta.json").read())},
        {"kind": "val", "val_bpb": bpb, "train_seconds": 2.0},
        {"kind": "end", "reason": "a nan" if "lr" in flags else "finished"}]
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
sys.exit("lr" in flags)
""",
    "pack.py": "LIVE, lifetime = '|', str",
    "eval_bpb.py": """import json, sys
from pathlib import Path
lines = Path(sys.argv[1]).with_name("metrics.jsonl").read_text().splitlines()
Path(sys.argv[3][6:]).write_text(json.dumps({"val_bpb": json.loads(lines[1])["val_bpb"]}))
""",
    "data/x/meta.json": DATASET}


def commit():
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)


def test_a_turn_compares_an_edit_with_the_last_commit_and_lists_it():
    def turn(*flags, code=0):
        return "".join(end(start("records/turn.py", *flags), code))

    for path in [*ROOT.glob("records/*.py"), *ROOT.glob("data/*.py")]:
        write(path.relative_to(ROOT), path.read_text())
    for name, text in STUBS.items():
        write(name, text)
    commit()
    assert "nothing differs from HEAD" in turn("--idea=none", "--data=x", code=2)
    replace_in(Path("train_gpt.py"), "WIDTH = 1", "WIDTH = 2")
    assert "\nverdict    keep" in turn("--idea=a wider gate", "--data=x")
    [curves] = Path().glob("runs/turns/a-wider-gate_*/curves.svg")
    assert curves.read_text().count("<polyline") == 3 * 6
    rate = "--idea=a rate", "--data=x", f"--parent={curves.parent.name}_s1", "--", "--lr=9"
    turn(*rate, code=2)
    before = {path: path.stat().st_mtime_ns for path in Path().glob("runs/*/metrics.jsonl")}
    assert "_s1: a nan; see runs/turns/a-rate_" in turn(*rate, code=2)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert len(before) == 9 and after == before   # nothing ran again, not what failed either
    wider, rate = turn().split("no verdict")
    assert wider.startswith("keep: +0.009") and "a wider gate\n" in wider and "a rate\n" in rate


def test_a_change_set_adds_one_record_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    write("train_gpt.py", "")
    commit()
    readme = "records/track_10min_16mb/2026-01-02_x/README.md"
    write(readme, "")
    write("records/README.md", "the leaderboard")
    commit()
    write("train_gpt.py", "changed")   # the next idea, not committed
    assert check.change_set("HEAD~1") == ([], [str((ROOT / readme).parent)])
    commit()
    write("train_gpt.py", "")   # taken back, but what was committed may be a record's commit
    commit()
    assert {file for *_, file in check.change_set("HEAD~3")[0]} == {"train_gpt.py"}
