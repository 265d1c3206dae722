"""The promises, as tests: offline, on a CPU, in minutes.  python -m pytest -q test_smoke.py"""
import argparse
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
import tempfile
import time
import tracemalloc
import zipfile
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from xml.dom import minidom

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
from data.dataset import BadInput, read_meta, read_shard, read_val_docs
from data.text_rules import nmt_nfkc
from data.tokenizer import Tokenizer, lower_case, restore_case
from data.train_bpe import train_tokenizer
from records import check, confine, folders, plot, proof, rules, stats, submit
from train_gpt import Config, GPT, Loader, make_segments


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
        model.x0_mix[:, 0] += 1
    return model


def tiny_batch(n=128, starts=(0,)):
    """tokens (n,), targets (n,), Segments of at most 48 tokens."""
    torch.manual_seed(1)
    text = torch.randint(64, (n + 1,))
    return text[:-1], text[1:], make_segments(np.array(starts), n, 48)


def start(*command, ranks=1, cwd=None, **env):
    """python COMMAND, or by torchrun, in a process beside this one: end() waits for it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"]
    command = [sys.executable, *torchrun * (ranks > 1), *map(str, command)]
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, **env}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process, code=0):
    """-> stdout and stderr of a process that ends with that code."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, f"{out}"[-2000:] + err[-2000:]
    return out, err


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1:]


def metrics(folder, run, kind):
    """Lines of that kind in a run's metrics.jsonl."""
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def checkpoint(folder, run):
    return train_gpt.load_checkpoint(folder / "runs" / run / "checkpoint.pt")


# ---- the model


def test_what_is_trained_is_the_probability_of_what_follows():
    model, (tokens, targets, seg) = tiny_model(), tiny_batch(300, (0, 1, 50, 130))
    tokens %= 9
    with torch.no_grad():
        p = model.probabilities(model(tokens, seg), tokens, seg)
        nats = -p.gather(1, targets[:, None])[:, 0].log()
        gpu = lambda *qkv: train_gpt.segment_attention(*qkv)  # with which flex_copies is used
        for model.kernel in train_gpt.segment_attention, gpu:
            found = model.losses(tokens, targets, seg, True)
            torch.testing.assert_close(found, nats, rtol=1e-4, atol=1e-4)


def test_a_token_sees_only_its_own_segment_and_its_past():
    model, (tokens, _, seg) = tiny_model(), tiny_batch(starts=(0, 30, 77))
    before = model(tokens, seg)
    for at, end in (20, 30), (29, 30), (30, 77), (76, 77), (100, 125), (125, 128):
        changed = tokens.clone()
        changed[at] ^= 1
        moved = (model(changed, seg) != before).any(-1)
        assert moved[at] and not moved[:at].any() and not moved[end:].any()  # to the last bit


def test_documents_stay_apart_or_where_too_many_only_the_short_ones_join():
    crowd = [*range(0, 4000, 2), 50_000]
    for starts, kept in ([0, 500, 501], {500, 501, 1525, 2549}), (crowd, {3998, 50_000}):
        edges = make_segments(np.array(starts), 98304, 1024, longest=3072).cu_seqlens
        assert kept <= {*edges.tolist()} and edges.diff().max() <= 1024


def test_the_record_has_the_public_ones_parameters_and_flops():
    with torch.device("meta"):
        model = GPT(Config(vocab_size=8192))
    n_params = sum(p.numel() for p in model.parameters()) - model.copy.numel()
    flops = [train_gpt.count_flops(model.cfg, looped) for looped in (False, True)]
    assert [n_params, *flops] == pytest.approx([35_945_671, 215.5e6, 319.3e6], rel=0.02)


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
        with torch.no_grad():
            model.get_parameter(name).add_(step)
            above = loss_of(model, batch)
            model.get_parameter(name).sub_(2 * step)
            slope = (above - loss_of(model, batch)) / 2
            model.get_parameter(name).add_(step)
        assert slope.item() == pytest.approx((g * step).sum().item(), rel=0.02), name


# ---- the kernels


def test_fused_kernels_equal_their_references():
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
            dtype = torch.float32 if dtype is torch.float32 else torch.bfloat16
            z = (5 * make(30, 1500)).detach().requires_grad_()
            targets, w = torch.randint(1500, (30,)), torch.rand(30)
            loss, zr = t.FusedCE.apply(z, targets, 30.0), z.detach().float().requires_grad_()
            ref = F.cross_entropy(30 * torch.tanh(zr / 30), targets, reduction="none")
            grads = torch.autograd.grad(loss, z, w)[0], torch.autograd.grad(ref, zr, w)[0]
            for a, b in pairs + [(loss, ref), grads]:
                assert error(a, b) < limit, (dtype, error(a, b))
        print("agree")
    """
    assert end(start("-c", code, cwd=ROOT, TRITON_INTERPRET="1"))[0] == "agree\n"


def test_kernels_compile_for_hopper():
    """To an H100's machine code, without one: tensor cores, copies in flight, enough memory."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tile = {**dict(zip(("BM", "BN", "BK"), train_gpt.TILE)), "K": 512}
    loss = {"cap": 30.0, "V": 16384, "BV": 1024}
    for name, known in (("up_kernel", {**tile, "BACKWARD": False, "stride_bk": 1}),
                        ("up_kernel", {**tile, "BACKWARD": True, "stride_bn": 1}),
                        ("ce_forward", loss), ("ce_backward", loss)):
        kernel = getattr(train_gpt, name)
        types = {x: "*bf16" if x.endswith("_ptr") else "i32" for x in kernel.arg_names}
        types |= dict.fromkeys(known, "constexpr")
        if "target_ptr" in types:
            types["target_ptr"] = "*i64"
        aligned = {(i,): [["tt.divisibility", 16]]
                   for i, x in enumerate(kernel.arg_names) if x not in known}
        source = ASTSource(kernel, types, known, aligned)
        options = {"num_warps": 8, "num_stages": 3}
        code = triton.compile(source, GPUTarget("cuda", 90, 32), options)
        assert code.asm["cubin"] and code.metadata.shared <= 227 * 1024
        if name == "up_kernel":
            assert "wgmma.mma_async" in code.asm["ptx"] and "cp.async" in code.asm["ptx"]


def test_the_step_moves_what_the_roofline_says():
    if not torch.version.cuda or not torch.__version__.startswith("2.11"):
        pytest.skip("the roofline counts with a CUDA build of torch 2.11")
    out, _ = end(start(ROOT / "records/evidence/roofline.py", "--compile"))
    assert out.count("are machine code for sm_90") == 2, out
    for row, expected in (("inductor's own kernels", (51.0, 76.2)), ("products, attention", (86.2, 126.2)),
                          ("saved", (23.9, 34.6)), ("predicted", (93.2, 132.3))):
        line = next(line for line in out.splitlines() if line.startswith(f"| {row}"))
        assert [float(x) for x in line.split("|")[2:4]] == pytest.approx(expected, rel=0.02), line


def test_the_first_minutes_on_a_gpu_can_be_rehearsed_without_one(tmp_path):
    out, _ = end(start(ROOT / "records/evidence/first_gpu_minutes.py", tmp_path, "--tiny"))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines].count("done") == 9 and out.endswith("failed or late: none\n"), out


# ---- the optimizers


def test_orthogonalize_brings_singular_values_near_one():
    for rows, cols in (40, 40), (80, 20), (20, 80):
        left, _, right = torch.linalg.svd(torch.randn(3, rows, cols), full_matrices=False)
        sigma = torch.linspace(0.05, 1, min(rows, cols))
        sigma = torch.linalg.svdvals(train_gpt.orthogonalize(left * sigma @ right))
        sigma /= max(1, rows / cols) ** 0.5
        assert 0.8 < sigma.min() and sigma.max() < 1.2


def test_one_step_moves_every_parameter_as_adamw_and_muon_should():
    model, batch, cfg = tiny_model(), tiny_batch(), Config(**TINY, grad_clip=1e9)
    before, grads = tiny_model(), gradients(model, batch)
    rows = {"qkv": model.qkv_sizes, "copy": [cfg.copy_dim] * 3}
    schedule = train_gpt.Schedule(lr=0.5, momentum=0.9, seq_len=48, looped=True)
    optimizers = train_gpt.make_optimizers(model, cfg)
    train_gpt.train_step(model.losses, [batch] * 4, model, optimizers, schedule, cfg)
    for name, p in before.named_parameters():
        g = grads[name]
        kind = "embed" if name == "embed.weight" else "scalar"
        update = g / (g.abs() + 1e-8)
        if name in GPT.MATRICES:
            parts = g.split(rows.get(name, g.size(1)), 1)
            kind, update = "matrix", torch.cat([train_gpt.orthogonalize(x) for x in parts], 1)
        lr, decay = (getattr(cfg, f"{kind}_{what}") for what in ("lr", "wd"))
        expected = p * (1 - 0.5 * lr * decay) - 0.5 * lr * update
        found = model.get_parameter(name)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=name)


# ---- data


def test_an_epoch_holds_each_token_once_in_the_order_of_the_seed():
    shards = [train_gpt.synthetic_tokens(64, 2000, seed) for seed in (1, 2)]
    data = SimpleNamespace(train=[lambda shard=shard: shard for shard in shards])
    first, second = (Loader(data, Config(**TINY, seed=seed)) for seed in (1, 2))
    epoch = np.concatenate([first.next()[:-1] for _ in range(2 * (2000 // 128))])
    left = np.bincount(np.concatenate(shards)) - np.bincount(epoch, minlength=64)
    assert left.min() >= 0 and not np.array_equal(epoch[:128], second.next()[:-1])


def cpu_batch(row, seq_len):
    return train_gpt.make_batch(row, seq_len, "cpu")


def test_validation_counts_each_target_once_in_whole_documents():
    model, cfg, total = tiny_model(), Config(**TINY), 0.0
    tokens = train_gpt.synthetic_tokens(64, 700, 5)
    for document in np.split(tokens, np.flatnonzero(tokens == 0)[1:]):
        total += model.losses(*cpu_batch(np.append(document, 0), 48), True).sum().item()
    cfg = replace(cfg, row_tokens=1024, batch_tokens=1024)
    data = SimpleNamespace(val=tokens, val_bytes=1000)
    found = train_gpt.validate(model.losses, data, cfg, cpu_batch, True)
    expected = {"val_loss": total / 700, "val_bpb": total / math.log(2) / 1000}
    assert found == pytest.approx(expected, rel=1e-5)


# ---- calibration


def test_calibration_ends_with_the_clock_and_its_fisher_is_the_exact_one():
    model, (tokens, targets, seg) = tiny_model(), tiny_batch(64, (0, 40))
    late = iter((False, True)).__next__
    stats = train_gpt.calibrate(model, lambda: (tokens, targets, seg), 5, 0, late)
    assert stats["tokens"].item() == 2 * 64

    def log_p(z):
        return (30 * torch.tanh(z / 30)).log_softmax(-1)

    z = F.linear(model(tokens, seg), model.embed.weight).detach()
    slopes = torch.vmap(torch.func.jacrev(log_p))(z)  # (64, label, logit)
    fisher = (log_p(z).exp()[..., None] * slopes ** 2).sum((0, 1))
    torch.testing.assert_close(stats["embed.g"][0] / 2, fisher, rtol=1e-3, atol=1e-4)


# ---- whole runs


DIES = """if True:
    import itertools, os, sys, train_gpt
    train_step, steps = train_gpt.train_step, itertools.count()
    def die(*args):
        numbers = train_step(*args)
        if next(steps) == 9:  # one is the warm-up's
            os.kill(os.getpid(), 9)
        return numbers
    train_gpt.train_step = die
    sys.exit(train_gpt.main())
"""


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    """A folder with a copy of train_gpt.py, a dataset, and runs of one rank, of two, and of two
    that were killed and went on."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "train_gpt.py", folder)
    shutil.copytree(dataset, folder / "mine")
    (folder / "dies.py").write_text(DIES)
    flags = [*RUN_FLAGS, "--data=mine", "--max_steps=12", "--loop_at=0.5", "--save_every=1e-9"]
    one = start("train_gpt.py", *flags, "--run=one", cwd=folder)
    one.stdout.close()  # its terminal has gone
    two = start("train_gpt.py", *flags, "--run=two", ranks=2, cwd=folder)
    end(start("dies.py", *flags, "--run=killed", ranks=2, cwd=folder), code=1)
    assert not metrics(folder, "killed", "end")
    end(start("train_gpt.py", "--resume=killed", ranks=2, cwd=folder))
    end(one), end(two)
    return folder


def test_the_file_alone_trains_alike_on_any_number_of_ranks(trained, monkeypatch):
    monkeypatch.chdir(trained)
    for kind, name, n in ("step", "train_loss", 12), ("val", "val_loss", 2):
        one, two = ([x[name] for x in metrics(trained, run, kind)] for run in ("one", "two"))
        assert len(one) == n and one == pytest.approx(two, abs=1e-4)
    source = trained / "runs/one/source/train_gpt.py"
    assert source.read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert pack.main(["one"]) == 0


def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(trained, monkeypatch):
    whole, resumed = (checkpoint(trained, run) for run in ("two", "killed"))
    for kind in ("weights", "stats"):
        assert all(torch.equal(x, resumed[kind][name]) for name, x in whole[kind].items())
    files = {"checkpoint.pt", "log.txt", "metrics.jsonl", "source"}
    assert {*os.listdir(trained / "runs/killed")} == files
    assert "resumed at step 8" in (trained / "runs/killed/log.txt").read_text()


def test_a_signal_the_clock_and_a_bad_loss_end_a_run_each_in_its_way(tmp_path, monkeypatch):
    train_step = train_gpt.train_step

    def signalled(*args):
        numbers = train_step(*args)
        if next(steps) == 3:  # one is the warm-up's
            signal.raise_signal(sent)
        return numbers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "train_step", signalled)
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(9))
    for sent, flags, code, reason in (
            (signal.SIGHUP, "--run=a --max_seconds=2", 0, "finished"),
            (signal.SIGTERM, "--run=b --max_seconds=900", 0, "stopped early as asked"),
            (signal.SIGHUP, "--run=c --embed_lr=1e18 --scalar_lr=1e18", 3, "the loss is nan")):
        steps = itertools.count()
        with pytest.raises(SystemExit) as stopped:
            sys.exit(train_gpt.main([*RUN_FLAGS, *flags.split()]))
        run = flags[6]
        (last,) = metrics(tmp_path, run, "end")
        assert stopped.value.code == last["exit_code"] == code and last["reason"].startswith(reason)
    timed, stopped = (checkpoint(tmp_path, run) for run in "ab")
    assert 1 < timed["run"]["train_seconds"] < 10 and timed["run"]["finished"]
    assert stopped["run"]["steps"] == 3 and not stopped["run"]["finished"] and stopped["stats"]


def test_bad_flags_and_data_end_in_one_line(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/there").mkdir(parents=True)
    for name in ("val_000000.bin", "tokenizer.json"):
        folder = shutil.copytree(dataset, tmp_path / name[:3])
        (folder / name).write_bytes((dataset / name).read_bytes()[:-2])
    long_row = f"--data={dataset} --row_tokens=8192 --batch_tokens=8192"
    for flags, message in {
            "--layers=3": "--layers", "--n_layer=x": "--n_layer", "--n_head=3": "--n_head",
            "--batch_tokens=1000": "--batch_tokens",
            "--seq_len=0": "--seq_len", "--matrix_lr=nan": "--matrix_lr", "--device=tpu": "--device",
            "--run=../up": "--run", "--run=there": "nothing is overwritten",
            "--preset=big": "--preset", "--seed=18446744073709551616": "--seed",
            "--resume=x": "no other flag", "--data=nowhere": "data/prepare.py docs PATH",
            "--data=val": "val_000000.bin", "--data=tok": "tokenizer.json",
            long_row: "--row_tokens", "--seed=1": "torchrun sets all three"}.items():
        if "torchrun" in message:
            monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *RUN_FLAGS, *flags.split()])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "train_gpt.py"), run_name="__main__")
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert os.listdir("runs") == ["there"]


def test_a_damaged_checkpoint_is_refused_and_a_full_disk_keeps_the_old(tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "checkpoint.pt"
    content = {"config": asdict(model.cfg), "stats": {}, "run": {}, "tokenizer": ""}
    train_gpt.write_checkpoint(path, weights=model.state_dict(), **content)
    good = path.read_bytes()
    weights = good.index(model.up.detach().numpy().tobytes())
    for bad in good[:10], good[:-1], flip(good, weights), flip(good, weights + 9999):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="^.*checkpoint.pt is not whole: .*$"):
            train_gpt.load_checkpoint(path)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="checkpoint.pt: No space"):
        train_gpt.write_checkpoint(path, weights={}, **content)
    assert path.read_bytes() == bad and os.listdir(tmp_path) == ["checkpoint.pt"]


torch.library.define("flash_attn_3::_flash_attn_forward", "() -> ()")


class Flash(torch.autograd.Function):
    """FlashAttention-3's interface. It returns q."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k):
        return q.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, None, None, None, None


def test_what_only_a_gpu_compiles_is_compiled_in_the_warm_up(tmp_path, monkeypatch):
    graphs, ready = CompileCounter(), []
    compiler, warm_up = torch.compile, train_gpt.warm_up

    def attention(q, k, v, cu_q, cu_k, **_):
        return Flash.apply(q, k, v, cu_q, cu_k)

    monkeypatch.chdir(tmp_path)
    interface = SimpleNamespace(flash_attn_varlen_func=attention)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    fa3 = train_gpt.pick_attention(torch.device("cuda"), torch.bfloat16)
    for name, value in {
            "warm_up": lambda *args: (warm_up(*args), ready.append(graphs.frame_count))[0],
            "pick_attention": lambda *_: fa3,
            # flex_copies has no gradients on a CPU.
            "flex_copies": lambda q, k, *_: 2 * [(q * k).sum(1)]}.items():
        monkeypatch.setattr(train_gpt, name, value)
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=graphs, **how))
    torch.compiler.reset()
    shape = "--n_layer=2 --loop_first=0 --loop_last=0 --loop_passes=2 --two_lane_from=1"
    assert train_gpt.main([*RUN_FLAGS, *shape.split(), "--max_steps=12", "--run=compiled"]) == 0
    # losses: looped or not, with gradients or without; orthogonalize: six shapes of matrices.
    assert ready == [4 + 6] and graphs.frame_count == 4 + 6
    assert len(metrics(tmp_path, "compiled", "step")) == 12


def test_a_row_that_does_not_fit_is_halved_and_the_batch_stays(tmp_path, monkeypatch):
    losses = GPT.losses

    def limited(self, tokens, *rest):
        if len(tokens) > fits:
            raise RuntimeError("CUDA out of memory: a fake one")
        return losses(self, tokens, *rest)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GPT, "losses", limited)
    fits = 64
    assert train_gpt.main([*RUN_FLAGS, "--max_steps=2", "--run=small"]) == 0
    saved = checkpoint(tmp_path, "small")
    assert saved["config"].row_tokens == 64 and saved["run"]["tokens"] == 2 * 512
    fits = 0
    with pytest.raises(ValueError, match="--row_tokens=32: not even"):
        train_gpt.main([*RUN_FLAGS, "--max_steps=2", "--run=none"])


# ----------------------------------------------------------------------------------------------------------------------
# Text and tokens


DEMO_PATH = ROOT / "data" / "demo_tokenizer.json"
DEMO = DEMO_PATH.read_bytes()


def prepare_main(monkeypatch, root, command, *args):
    """Runs `prepare.py COMMAND ARGS` in this process with data/ under `root`, one worker."""
    monkeypatch.setattr(prepare, "ROOT", root)
    workers = ["--workers=1"] * (command in ("docs", "fineweb"))
    monkeypatch.setattr(sys, "argv", ["prepare.py", command, *workers, *map(str, args)])
    (root / "data").mkdir(exist_ok=True)
    prepare.main()


def prepare_docs(monkeypatch, root, *args, name="x"):
    """-> meta.json of data/NAME/, made of the user's files with the demo tokenizer."""
    tokenizer = f"--tokenizer={DEMO_PATH}"
    prepare_main(monkeypatch, root, "docs", *args, f"--name={name}", tokenizer)
    return read_meta(root / "data" / name)


def words(n, seed):
    """n documents of random English-looking text."""
    rng = random.Random(seed)
    some = "the of and to in a is that it was for on are with as I his they be NASA McDonald".split()
    return [" ".join(rng.choices(some, k=rng.randint(20, 60))).capitalize() + f", {seed}.{i}."
            for i in range(n)]


def jsonl(texts, key="text"):
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


ODD = ["x", "é", "👩‍👩‍👧 naïve", "a\r\nb\rc\n", "\ufeff\x00\u2028 NASA PDFs", "long " * 60, "tail  "]
TEXTS = ODD + [f"Document {i}: the quick brown fox number {i * 7919} jumps over " + "the lazy dog, again. " * (i % 5)
               for i in range(13)]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A `docs` dataset with the demo tokenizer, of 60 documents for training and TEXTS for validation -> its folder."""
    root = tmp_path_factory.mktemp("data")
    (root / "train.jsonl").write_bytes(jsonl(words(60, 1)))
    (root / "val.jsonl").write_bytes(jsonl(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        prepare_docs(patch, root, root / "train.jsonl", f"--val_path={root / 'val.jsonl'}", name="odd")
    return root / "data/odd"


# ---- the tokenizer and the text rule


def test_tokenizer_gives_every_unicode_string_back():
    rng, tokenizer = random.Random(7), Tokenizer(DEMO)
    odd = "aAbBsSzZ  ICCULLU\t\n\r 0123.,'’-éÉßẞİıǅΣσςЖжﬁ\0\x1c\x7f\x85\u200b\u2028\ufeff\ufffd"
    any_text = odd * 9999 + "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    texts = ["".join(rng.choices(any_text, k=n % 40)) for n in range(8000)]
    texts += ["C the U nasa L", "A" * 999, "HTTPServer PDFs iPhone A I" * 9, " " * 100_000]
    for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert restore_case(lower_case(text)) == text == tokenizer.decode(tokens)
        assert np.flatnonzero(tokens == tokenizer.boundary).tolist() == [0]
        assert tokenizer.text_bytes[tokens].sum() == len(text.encode())


def test_case_costs_one_token_before_the_space():
    assert lower_case(" The THE camelCase PDFs I") == "C theU the camelCcaseU pdfLsC i"
    plain, title = (Tokenizer(DEMO).encode("x" + word).tolist() for word in (" return", " Return"))
    assert len(title) == len(plain) + 1 and title[-1] == plain[-1]


def test_lone_surrogates_and_damaged_tokenizers_are_refused_by_name():
    with pytest.raises(BadInput, match="lone surrogate at character 1"):
        Tokenizer(DEMO).encode("x\ud800")
    for change in ({"pieces": ["th", "th"]}, {"pieces": ["\u2019"]}, {"pieces": ["x" * 65]},
                   {"phrases": [[1, 9999]]}, {"phrases": [[1]]}, {"phrases": [[1, 2]] * 65_400},
                   {"phrases": [[220 + n, 220 + n] for n in range(8)]}, {"format": 1}):
        spec = {"format": 2, "name": "x", "pieces": [], "phrases": [], **change}
        with pytest.raises(BadInput, match="tokenizer.json"):
            Tokenizer(json.dumps(spec).encode())


def test_training_a_tokenizer_is_deterministic_and_quick_on_stretches():
    pytest.importorskip("tokenizers")
    texts = [*words(300, 5), "a" * 200_000, "\n" * 200_000, "一二三四五" * 40_000]
    begin = time.process_time()
    first, second = (train_tokenizer(lambda: iter(texts), 300, "x") for _ in range(2))
    assert first == second and Tokenizer(first).vocab_size == 300
    assert time.process_time() - begin < 30  # s; uncut, each of the three took a minute


def test_nmt_nfkc_is_sentencepieces():
    pytest.importorskip("sentencepiece")
    assert nmt_nfkc("  Ａ\u00a0\ufb01ne\u200b \x07 e\u0301\u2581x\t\n½ \u00b4 ～ ") == "A fine é x 1\u20442 \u0301 ～"
    assert nmt_nfkc("ｶﾞ \u1100\u1161\u11a8 q\u0307\u0323") == "ガ 각 q\u0307\u0323" and nmt_nfkc("  ") == ""


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
        assert meta[f"{split}_bytes"] == sum(len(text.encode()) for text in texts)
    assert list(read_val_docs(dataset, meta)) == TEXTS
    assert list(read_val_docs(dataset, meta, 2)) == TEXTS[:2]
    framed = [len(text).to_bytes(8, "little") + text for text in map(str.encode, TEXTS)]
    assert meta["val_docs_sha256"] == hashlib.sha256(b"".join(framed)).hexdigest()


def test_a_damaged_dataset_is_refused_by_file_name(dataset, tmp_path, monkeypatch):
    folder = shutil.copytree(dataset, tmp_path / "copy")
    meta = read_meta(folder)
    train, docs, about = "train_000000.bin", "val_docs.jsonl.zst", "meta.json"
    begin = meta["train_tokens"].to_bytes(4, "little") + bytes(1012)  # the first token follows
    for name, old, new, message in (
            (train, b"\0\0", b"", "not a token shard"),
            (train, begin + b"\0\0", begin + b"\xff\x7f", "is outside"),
            (train, begin + b"\0\0", begin + b"\1\0", f"{train} is"),
            (train, begin, b"\5\0\0" + begin[3:], "header says 5 tokens"),
            ("tokenizer.json", b"demo", b"dome", "tokenizer.json is"),
            (about, b'"train_tokens": ', b'"train_tokens": 1', "train_tokens is"),
            (about, b'"train_000000.bin"', b'"../train.bin"', "../train.bin is"),
            (docs, b"\n", b"", "damaged"),
            (docs, b"the", b"teh", "sha256 differ")):
        whole = (folder / name).read_bytes()
        damaged = whole.replace(old, new, 1)
        if name == docs:
            lines = zstandard.decompress(whole, 1 << 20)
            damaged = zstandard.compress(lines.replace(old, new, 1))
        prepare_main(monkeypatch, tmp_path, "verify", folder)
        (folder / name).write_bytes(damaged)
        with pytest.raises(BadInput, match=message):
            if name == docs:  # whose sha256 verify() compares first
                list(read_val_docs(folder, meta))
            prepare_main(monkeypatch, tmp_path, "verify", folder)
        (folder / name).write_bytes(whole)


def test_demo_is_whole_and_disjoint(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "DEMO_TRAIN_BYTES", 200_000)
    for _ in range(2):  # the second takes the place of the first
        prepare_main(monkeypatch, tmp_path, "demo")
    assert 100_000 < read_meta(tmp_path / "data/demo")["val_tokens"] < 300_000
    val, train = (texts_in(tmp_path / "data/demo", split) for split in ("val", "train"))
    assert not {*val} & {*train} and not any("sysconfigdata" in text for text in val + train)


def test_docs_names_every_document_that_it_skips(tmp_path, monkeypatch, capsys):
    good = jsonl(words(20, 2)).splitlines(keepends=True)
    bad = b'{"text": "x"\n{"no": 1}\n{"text": "\\ud800"}\n\n{"text": "caf\xe9"}\n'
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.jsonl").write_bytes(b"".join([*good[:10], bad, good[0], *good[10:]]))
    Path(os.fsdecode(bytes(tmp_path) + b"/in/caf\xe9.txt")).write_bytes(b"\xff")
    (tmp_path / "in/sub/c.parquet").write_bytes(b"PAR1")
    meta = prepare_docs(monkeypatch, tmp_path, tmp_path / "in", "--val_docs=5")
    assert (meta["val_docs"], meta["train_docs"]) == (5, 15)
    skipped = (tmp_path / "data/x/skipped.txt").read_text().splitlines()
    assert [line.split("in/")[1].partition(" (")[0] for line in skipped] == [
        "sub/c.parquet: .parquet files, not read", "a.jsonl:11: bad JSON", "a.jsonl:12: no text",
        "a.jsonl:13: lone surrogate", "a.jsonl:14: empty", "a.jsonl:15: not UTF-8",
        "a.jsonl:16: duplicate", "caf\\udce9.txt:1: not UTF-8"]
    assert "skipped 8: 2 not UTF-8 (" in capsys.readouterr().out
    for flags, message in {
            "--on_bad=refuse": "a.jsonl:11: bad JSON", "--nmae=3": "--nmae=3",
            "--name=x": "is there already", "--name=../e": "--name",
            "--val_docs=99": "only 20 good documents, 20 for validation: 2 not UTF-8",
            "--text_key=x": "only 0 good .* no text .*--text_key", "--tokenizer=none": "'none'",
            "--val_path=none --val_docs=5": "not with --val_path"}.items():
        with pytest.raises((BadInput, OSError), match=message):
            prepare_main(monkeypatch, tmp_path, "docs", tmp_path / "in", "--name=e", *flags.split())
    assert os.listdir(tmp_path / "data") == ["x"]


def zstd_long(data):
    """As zstd --long=31 packs a stream."""
    how = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=how).compressobj()
    return packer.compress(data) + packer.flush()


def test_docs_reads_every_kind_of_file_to_the_same_documents(tmp_path, monkeypatch):
    plain = jsonl(words(60, 4))
    lines = plain.splitlines(keepends=True)
    packed = {"c.jsonl.gz": b"".join(map(gzip.compress, lines)), "f.jsonl": gzip.compress(plain),
              "d.jsonl.zst": b"".join(map(zstandard.compress, lines)),
              "e.jsonl.zst": zstd_long(plain)}
    others = {"B.JSONL": b"\xef\xbb\xbf" + plain[:-1], "g.jsonl": plain.replace(b"\n", b"\r\n"),
              "i.jsonl": plain.replace(b"text", b"x")}

    def prepared(name, data, key="--text_key=text"):
        (tmp_path / name).write_bytes(data)
        meta = prepare_docs(monkeypatch, tmp_path, tmp_path / name, key, name=f"{name}-")
        return meta["files"]

    expected = prepared("a.jsonl", plain)
    for name, data in (packed | others).items():
        assert prepared(name, data, *["--text_key=x"] * (name == "i.jsonl")) == expected
    for name, data in packed.items():
        with pytest.raises(BadInput, match=f"{name}: cut short"):
            prepared(f"cut_{name}", data[:-9])


def test_a_single_text_is_cut_into_documents_at_blank_lines(tmp_path, monkeypatch):
    text = "\n\n".join(words(800, 6)).encode()
    (tmp_path / "Input.TXT").write_bytes(b"\xef\xbb\xbf" + text)
    meta = prepare_docs(monkeypatch, tmp_path, tmp_path / "Input.TXT")
    assert meta["train_bytes"] + meta["val_bytes"] == len(text)
    assert 7000 < len(text) / (meta["train_docs"] + meta["val_docs"]) < 8192


def test_an_error_is_one_line_that_shows_what_cannot_be_printed(monkeypatch):
    def fail():
        raise BadInput("café \x1b[2J\nval_bpb: 0.5 \u202e")

    monkeypatch.setattr(sys, "stderr", stderr := io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True))
    assert prepare.command(fail) == 2
    assert stderr.buffer.getvalue().endswith(rb": caf\xe9 \x1b[2J\nval_bpb: 0.5 \u202e" + b"\n")


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
SMALL = {"WAIT_SECONDS": 0.01, "BLOCK_BYTES": 4000, "TAIL_BYTES": 100, "RANGE_BYTES": 30_000,
         "FINEWEB_VAL_DOCS": 40, "FINEWEB_VAL_BYTES": 1}
FINEWEB = ["fineweb", f"--tokenizer={DEMO_PATH}", "--text_rule=raw"]


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    """A hub's folder, 800 documents. Of 40 for validation two are alike, two are in training."""
    texts = words(800, 11)
    texts[7], texts[100], texts[200] = texts[8], texts[3], texts[4]
    docs, root = jsonl(texts), tmp_path / "hub"
    (root / "datasets").mkdir(parents=True)
    (root / "faults").write_text("")
    (root / hub_files.DOCS).write_bytes(docs)
    sidecar = {"docs_sha256": hashlib.sha256(docs).hexdigest()}
    (root / hub_files.SIDECAR).write_text(json.dumps(sidecar))
    (tmp_path / "huggingface_hub.py").write_text(HUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", str(root))
    monkeypatch.setitem(prepare.TEXT_RULES, "nmt_nfkc", str.strip)
    for name, value in SMALL.items():
        monkeypatch.setattr(prepare if hasattr(prepare, name) else hub_files, name, value)
    return root


def requested(hub):
    """-> the bytes that were asked for since the last time"""
    return sum(map(int, (hub / "log").rename(hub / "old").read_text().split()))


def test_fineweb_holds_what_it_promises_and_fetches_no_more(hub, tmp_path, monkeypatch):
    prepare_main(monkeypatch, tmp_path, *FINEWEB, "--train_tokens=25000")
    folder = tmp_path / "data/fineweb"
    lines = (hub / hub_files.DOCS).read_bytes().splitlines(keepends=True)
    texts, train = [json.loads(line)["text"] for line in lines], texts_in(folder, "train")
    assert list(read_val_docs(folder, read_meta(folder))) == texts[:40]
    assert train == [text for text in texts[40:] if text not in texts[:40]][:len(train)]
    needed = sum(map(len, lines[:len(train) + 42]))
    assert 25_000 <= read_meta(folder)["train_tokens"] < 37_000
    assert needed <= requested(hub) < 1.1 * needed


def test_fineweb_is_the_same_after_faults_and_kills_with_any_workers(hub, tmp_path, monkeypatch):
    prepare_main(monkeypatch, tmp_path, *FINEWEB, "--name=whole")
    command = (monkeypatch, tmp_path, *FINEWEB, "--workers=2")
    for n_requests in (3, 9, 14):
        (hub / "faults").write_text("503 short " + "ok " * n_requests + "kill")
        killed = multiprocessing.get_context("fork").Process(target=prepare_main, args=command[:-1])
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
    (hub / "faults").write_text("")
    (tmp_path / "data/fineweb/train_000001.bin").write_bytes(b"cut")
    prepare_main(*command)
    whole, found = (read_meta(tmp_path / "data" / name) for name in ("whole", "fineweb"))
    assert whole["files"].pop("source.json") and found["files"].pop("source.json")
    assert whole == found | {"name": "whole"} and len(whole["files"]) > 5


@pytest.mark.parametrize("file, content, flag, message", [
    ("faults", "ok" + " short" * 9, "", r"docs_selected.jsonl: .*EOF.*5 times.; run"),
    ("faults", "503 " * 9, "", r"docs_selected.jsonl: .*503.*5 times"),
    (hub_files.SIDECAR, '{"docs_sha256": "0"}', "", "docs_sha256 is 0"),
    ("x", "", "--text_rule=nmt_nfkc", "would not compare"),
    ("x", "", "--train_tokens=1e14", "the disk has"),
    ("x", "", "--name=synthetic", "--name")])
def test_fineweb_refuses_what_it_cannot_trust(hub, tmp_path, monkeypatch, file, content, flag, message):
    (hub / file).write_text(content)
    with pytest.raises(BadInput, match=message):
        prepare_main(monkeypatch, tmp_path, *FINEWEB, *flag.split())
    assert not (tmp_path / "data/fineweb/meta.json").exists()


def test_fineweb_grows_and_keeps_documents_for_another_tokenizer(hub, tmp_path, monkeypatch):
    def prepared(*flags, name="fineweb"):
        prepare_main(monkeypatch, tmp_path, *FINEWEB, f"--name={name}", *flags)
        return read_meta(tmp_path / "data" / name)["files"]

    first = prepared("--train_tokens=9000", "--keep_documents")
    requested(hub)
    prepared("--train_tokens=9000", "--keep_documents", name="another")
    assert requested(hub) < 200  # the sidecar
    grown = prepared("--train_tokens=20000")
    assert len(grown) > len(first) and grown | first == grown
    assert prepared("--train_tokens=9000") == grown  # nothing is taken away
    (tmp_path / "other.json").write_bytes(DEMO.replace(b"demo", b"dome"))
    for flag in "--text_rule=nmt_nfkc", f"--tokenizer={tmp_path / 'other.json'}":
        with pytest.raises(BadInput, match="begun with another"):
            prepared(flag)


# ----------------------------------------------------------------------------------------------------------------------
# Packing


@pytest.fixture(scope="session")
def run_to_pack(tmp_path_factory):
    """A run folder with the checkpoint of a small random model and its statistics."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(vocab_size=1024, seq_len=24, row_tokens=96, batch_tokens=96)
    tokens = torch.from_numpy(train_gpt.synthetic_tokens(1024, 513, 1).astype(np.int64))
    batch = tokens[:-1], tokens[1:], make_segments(np.arange(0, 512, 60), 512, 24)
    stats = train_gpt.calibrate(model, lambda: batch, 8, 0)
    train_gpt.write_checkpoint(folder / "checkpoint.pt", config=asdict(model.cfg), stats=stats, run={"steps": 7},
                               weights=model.state_dict(), tokenizer=DEMO.decode())
    return folder


@pytest.fixture(scope="session")
def packed_run(run_to_pack):
    """The same folder after pack.py, with what it printed."""
    with redirect_stdout(io.StringIO()) as out:
        pack.main([str(run_to_pack)])
    return run_to_pack, out.getvalue()


@pytest.fixture
def copied_run(run_to_pack, tmp_path, monkeypatch):
    """A copy of the run without its artifact, packed without the process that verifies: packed_run has had it."""
    monkeypatch.setattr(pack, "verify", lambda *_: None)
    shutil.copy(run_to_pack / "checkpoint.pt", tmp_path)
    return tmp_path


def gaussian_matrix(rows=384, n=256):
    """A random matrix (1, rows, n) with a skewed Hessian (1, n, n) and sensitivities (1, rows, 1)."""
    torch.manual_seed(0)
    x = torch.randn(4 * n, n) @ torch.randn(n, n) * n ** -0.5 * (torch.randn(n).abs() + 0.1)
    return torch.randn(1, rows, n), (x.mT @ x / len(x))[None], torch.randn(1, rows, 1) ** 2


def quantised(bank, constant):
    """-> values (1, R, n), the weights that they stand for."""
    values = pack.quantise(bank, 0, 0, constant)[None]
    return values, pack.dequantise(values, bank.row, bank.col, constant)


def coded(*values):
    """values (L, R, n) of banks, which decode as they are -> bits of their code, without the lanes' start."""
    sigmas = [*map(pack.scales, values)]
    words, escapes, ideal = pack.encode(values, sigmas)
    assert all(map(np.array_equal, pack.decode(words, escapes, sigmas), values))
    for cut in ((words[:-1], escapes), (np.append(words, 0), escapes), (words, np.append(escapes, 0))):
        with pytest.raises(ValueError):
            pack.decode(*cut, sigmas)
    bits = 16 * len(words) - 32 * pack.count_lanes(sigmas)
    assert bits < 8.04 * ideal.sum() + 8
    return bits


def test_probabilities_are_the_same_on_every_machine():
    radius, freq, *_ = pack.tables()
    digest = hashlib.sha256(freq.tobytes() + radius.tobytes()).hexdigest()
    assert digest == "c5f407dd8e9544a43f74ce6e2a98d42ed43d9cc306c31ce75a6c3fdf078a37ca"


def test_coder_returns_every_value_and_wastes_nothing():
    W, _, g = gaussian_matrix(300, 200)
    sigma = 2 ** torch.rand(W.shape[1:]).add(1).sort().values        # in steps, from 2 to 4
    bank = pack.plan(W * sigma, torch.eye(200)[None], g * 0 + 1)
    values, _ = quantised(bank, float(1 / (pack.quarter(bank.col) * pack.quarter(bank.row)).mean()))
    entropy = (sigma * math.sqrt(2 * math.pi * math.e)).log2().sum()
    assert 0.95 * entropy < coded(values) < 1.02 * entropy
    values[0, 5, 100] += 4 * 10 ** 6                                 # far outside of any table
    coded(values, values[:, :1, :7], values[:, :, :50].reshape(3, 100, 50))


def test_trellis_gains_at_least_0_8_dB_and_statistics_3_dB_more(monkeypatch):
    W, H, g = gaussian_matrix()
    known = pack.plan(W, H, g)
    blind = pack.plan(W, torch.eye(256)[None], 1 / W.square().mean(2, True))

    def measure(bank, constant):
        """-> KL, and what it is worth in dB: equal for equal quality at 6.02 dB a bit."""
        values, packed = quantised(bank, constant)
        kl = pack.expected_kl(known, packed)
        return kl, 10 * math.log10(kl / W.numel()) + 6.0206 * coded(values) / W.numel()

    _, trellis = measure(known, 0.05)
    monkeypatch.setattr(pack, "TRELLIS", np.zeros((1, 2), np.int32))        # of one state: plain rounding
    kl, scalar = measure(known, 0.05)
    assert trellis < scalar - 0.8 and scalar < measure(blind, 0.3)[1] - 3
    assert 0.6 < kl / (known.price * 0.05 ** 2 / 24) < 1.02          # uniform errors at the plan's price


def test_expected_kl_is_the_measured_one_for_every_bank(run_to_pack):
    checkpoint = train_gpt.load_checkpoint(run_to_pack / "checkpoint.pt")
    banks = pack.gather(checkpoint)
    sections, _ = pack.pack_model(checkpoint, banks, 3e-4)
    packed = pack.unpack_model(b"".join(sections.values()))[1].state_dict()
    model = GPT(checkpoint["config"]).requires_grad_(False)
    tokens = torch.from_numpy(train_gpt.synthetic_tokens(1024, 2048, 1).astype(np.int64))
    segments = make_segments(np.arange(0, 2048, 60), 2048, 24)

    def log_p(weights):
        model.load_state_dict(weights)
        return model.probabilities(model(tokens, segments), tokens, segments).log()

    exact = log_p(checkpoint["weights"])
    for name, bank in zip(pack.MATRICES, banks):
        error = exact - log_p(checkpoint["weights"] | {name: packed[name]})
        measured = (exact.exp() * error).sum(-1).mean()
        most = 4 if name == "embed.weight" else 1.25  # as an input, a row is weighed by how likely it is
        assert 0.8 < measured / pack.expected_kl(bank, packed[name]) < most, name


@pytest.mark.filterwarnings("error")
def test_degenerate_matrices_pack():
    W, H, g = gaussian_matrix(48, 40)
    alive = torch.arange(40) % 2
    outliers = W * 1e7 ** (alive * (torch.arange(48)[:, None] == 3))
    for W, H, g in ((W * 0, H, g), (W[:, :1] * W[:, :, :1], H, g), (outliers, H, g), gaussian_matrix(1, 40),
                    gaussian_matrix(48, 1), (W, H * alive * alive[:, None], g), (W, H * 0, g), (W, H, g * 0)):
        values, packed = quantised(pack.plan(W, H, g), 0.05)
        coded(values)
        if H.count_nonzero() == H.numel() and g.any():               # else errors may cost nothing
            assert ((packed - W).abs() < 20 + 1e-6 * W.abs()).all()
        assert packed.isfinite().all()


def test_newest_run_is_the_last_that_ended_unless_another_trained_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_metrics(run, **hours):
        (folder := Path("runs") / run).mkdir(parents=True)
        lines = [{"kind": kind, "time": f"2026-11-28T0{hour}:00:00Z"} for kind, hour in hours.items()]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    write_metrics("latest", start=1, end=2)
    write_metrics("z", start=3, end=4)
    write_metrics("a", start=5, end=6)
    write_metrics("killed", start=5)
    write_metrics("later", start=7)
    assert pack.find_run() == pack.find_run("a") == Path("runs/a")
    assert pack.find_run("latest") == Path("runs/latest")
    fcntl = pytest.importorskip("fcntl")
    with open("runs/later/metrics.jsonl") as later, open("runs/killed/metrics.jsonl") as killed:
        fcntl.flock(later, fcntl.LOCK_EX)                            # as if they were in training
        assert pack.find_run() == Path("runs/a")
        fcntl.flock(killed, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="runs/a and runs/killed .* name one"):
            pack.find_run()
    write_metrics("b", start=4, end=7)
    assert end(start(ROOT / "pack.py"), 2)[1].startswith("pack.py: runs/b and runs/a ")


# ---- the file


def test_ledger_accounts_for_every_byte_and_says_when_the_cap_is_far(packed_run):
    folder, out = packed_run
    size = (folder / "artifact.pyz").stat().st_size
    assert f"{folder} has not ended: packed as of step 7" in out     # it has no metrics.jsonl
    assert f"\nartifact_bytes: {size}\n" in out and "best quality setting" in out
    text = (folder / "pack.txt").read_text()
    rows = [line.split("  ") for line in text.split("\nartifact.pyz")[0].splitlines()[1:]]
    assert sum(int(row[-1].replace(",", "")) for row in rows) == size
    assert {*pack.SOURCES, *pack.MATRICES, "tokenizer.json"} <= {row[0] for row in rows}
    assert 0.3e-4 < float(re.search(r"statistics: ([\d.]+)", text)[1]) < 1.5e-4     # the best is 1e-4
    assert not pack.load(folder / "artifact.pyz")[1].training


def test_an_artifact_that_its_own_code_cannot_load_replaces_nothing(packed_run, tmp_path):
    """The run's train_gpt.py goes into the artifact, and this one makes other weights of it."""
    run = shutil.copytree(packed_run[0], tmp_path / "run")
    (run / "source").mkdir()
    other = "\nGPT.state_dict = lambda self: {k: v + 1 for k, v in nn.Module.state_dict(self).items()}\n"
    (run / "source/train_gpt.py").write_text((ROOT / "train_gpt.py").read_text() + other)
    with pytest.raises(RuntimeError, match="does not load as it was packed"):
        pack.main([str(run)])
    assert (run / "artifact.pyz").read_bytes() == (packed_run[0] / "artifact.pyz").read_bytes()


def test_file_ends_within_a_twentieth_percent_below_the_cap_and_is_reproducible(copied_run):
    files = []
    for cap in (100_000, 90_000, 100_000):
        pack.main([str(copied_run), f"--cap_bytes={cap}"])
        files.append((copied_run / "artifact.pyz").read_bytes())
        assert 0.9995 * cap <= len(files[-1]) <= cap
    assert files[0] == files[2]
    with pytest.raises(BadInput, match="cap_bytes=40000"):
        pack.main([str(copied_run), "--cap_bytes=40000"])


def test_packs_without_statistics_loudly_and_refuses_what_is_not_finite_by_name(copied_run, capsys):
    path = copied_run / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"stats": {}}, path)
    pack.main([str(copied_run)])
    assert "NO STATISTICS" in capsys.readouterr().out
    W = saved["weights"]["qkv"]
    error = pack.load(copied_run / "artifact.pyz")[1].qkv - W
    assert 0.5e-4 < error.square().mean() / W.square().mean() < 1.5e-4
    for kind, name in (("stats", "down.H"), ("stats", "tokens"), ("weights", "up")):
        saved[kind][name].view(-1)[0] = math.nan
        torch.save(saved, path)
        with pytest.raises(BadInput, match=f"checkpoint.pt: {name} is not"):
            pack.main([str(copied_run)])


def test_damaged_artifacts_end_in_one_line(packed_run, tmp_path):
    data = (packed_run[0] / "artifact.pyz").read_bytes()
    for at in np.random.default_rng(0).integers(0, len(data), 100):
        for bad in (data[:at], flip(data, at)):
            (tmp_path / "x").write_bytes(bad)
            with pytest.raises(BadInput, match="x: .* damaged"):
                pack.load(tmp_path / "x")


def test_forged_artifacts_are_refused_or_load_without_harm(packed_run, tmp_path, monkeypatch):
    """With the checksum made to fit, nothing but the lengths' own checks is left."""
    files = pack.read_archive(packed_run[0] / "artifact.pyz")[1]
    blob = files.pop("model.bin")
    start = 4 + int.from_bytes(blob[:4], "little")
    header = json.loads(blob[4:start])
    ends = start + np.cumsum([0, *header["sections"]])
    sections = [blob[a:b] for a, b in zip(ends, ends[1:])]
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))

    def forge(parts=sections, **changes):
        text = json.dumps(header | {"sections": [*map(len, parts)]} | changes).encode()
        return pack.build_artifact(files, b"".join([len(text).to_bytes(4, "little"), text, *parts]))

    def patched(data, old=b"", new=b""):
        data = data[:-32].replace(old, new)
        return data + hashlib.sha256(data).digest()

    whole = pack.build_artifact(files, blob)
    (tmp_path / "x").write_bytes(forge())
    pack.load(tmp_path / "x")
    large = pack.build_artifact(files | {"tokenizer.json": bytes(1 << 28)}, blob)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "ZIP_DEFLATED", zipfile.ZIP_LZMA)        # which zipfile decompresses without a limit
        refused = [pack.build_artifact(files, blob)]
    refused += [large, patched(large, (1 << 28).to_bytes(4, "little"), (1 << 20).to_bytes(4, "little")),
                pack.build_artifact(files | {"data/x/__init__.py": b""}, blob),
                patched(whole, b"__main__.py", b"eval_bpb.py"),       # one name twice
                forge(escapes=1 << 40), forge(sections=[1]), forge(config=[]), forge(constant=1e308),
                forge(pad="x" * 70_000),
                forge(config=header["config"] | {"loop_first": 0, "loop_passes": 63})]
    for key in ("n_layer", "n_embd", "mlp_dim", "vocab_size", "row_tokens", "seq_len"):
        refused.append(forge(config=header["config"] | {key: header["config"][key] << 24}))
    for i, section in enumerate(sections):
        for part in (bomb, section[:-2]):
            refused.append(forge([*sections[:i], part, *sections[i + 1:]]))
    for bad in refused:
        (tmp_path / "x").write_bytes(bad)
        tracemalloc.start()
        with pytest.raises(BadInput, match="^[^\n]*$"):
            pack.load(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 1 << 27
        tracemalloc.stop()
    for at in np.random.default_rng(0).integers(0, len(whole) - 32, 40):
        (tmp_path / "x").write_bytes(patched(flip(whole, at)))
        with suppress(BadInput):                                     # it may be another weight
            pack.load(tmp_path / "x")


def test_bad_input_exits_2_with_one_line(packed_run, tmp_path):
    commands = {(ROOT / "train_gpt.py", "--layers=3"): "train_gpt.py: .*--layers",
                (ROOT / "pack.py", "nothing"): "pack.py: nothing: no such run",
                (packed_run[0] / "artifact.pyz", "--data=nowhere"): "artifact.pyz: .*no dataset 'nowhere'",
                (ROOT / "data/prepare.py", "docs", "/nowhere", "--name=x"): "prepare.py: /nowhere: "}
    for process, words in [(start(*command, cwd=tmp_path), words) for command, words in commands.items()]:
        err = end(process, 2)[1]
        assert re.fullmatch(words + r".*\n", err), err


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


def make_artifact(packed_run, path: Path, stranger="", name="flat", **files) -> Path:
    """The packed model with other files, or with a stranger's eval_bpb.py of that change."""
    with zipfile.ZipFile(packed_run[0] / "artifact.pyz") as z:
        parts = {name: z.read(name) for name in z.namelist()} | files
    if stranger:
        parts["eval_bpb.py"] = STRANGER.format(stranger or "pass", name=name).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack.build_artifact(parts, parts.pop("model.bin")))
    return path


@pytest.fixture
def judge(tmp_path, dataset, packed_run, capfd, monkeypatch):
    """judge(change, *flags) -> exit code or why it was refused, the score or None, what was printed."""
    monkeypatch.setattr(confine, "forget_files", lambda: None)  # seconds: has a test of its own

    def judged(change, *flags, data=dataset, name="flat"):
        artifact, out = make_artifact(packed_run, tmp_path / "a.pyz", change, name), tmp_path / "out.json"
        out.unlink(missing_ok=True)
        try:
            code = eval_bpb.main([str(artifact), f"--data={data}", f"--out={out}", "--device=cpu", *flags])
        except BadInput as e:
            code = str(e)
        return code, json.loads(out.read_text()) if out.exists() else {}, capfd.readouterr()
    return judged


def random_text(sizes, repeats=1):
    rng = np.random.default_rng(0)
    return eval_bpb.Text([np.concatenate([[0], np.tile(rng.integers(0, 40, n), repeats), [0]]) for n in sizes], 40)


def small(cls):
    """A predictor of random weights over 40 tokens, with windows of 24."""
    model = tiny_model(n_layer=2, loop_first=0, loop_last=0, loop_passes=2, two_lane_from=1, vocab_size=40,
                       seq_len=24, row_tokens=96, batch_tokens=96).eval().requires_grad_(False)
    predictor = cls(model, Tokenizer(DEMO), torch.device("cpu"))
    predictor.never = torch.zeros(40, 40, dtype=torch.bool)
    return predictor


def score(predictor, text):
    return eval_bpb.score(predictor, text, [*range(len(text.streams))], eval_bpb.Phases())


# ---- exactness


def test_whatever_finite_logits_come_the_probabilities_sum_to_one():
    rng, text, everything = np.random.default_rng(0), eval_bpb.Text([], 50), np.arange(50)[None]
    for dtype, exponent in itertools.product((torch.float16, torch.bfloat16, torch.float32, torch.float64),
                                             (-30, -3, 0, 4, 15, 38, 100, 308)):
        size = min(10.0 ** exponent, torch.finfo(dtype).max / 4)
        for row in (rng.uniform(-1, 1, 50), rng.choice([-1.0, 1.0], 50), np.eye(50)[3], np.ones(50)):
            logits = torch.from_numpy(size * row).to(dtype).repeat(1, 50, 1)
            nats = text.count(logits, everything, everything >= 0)
            assert (nats >= 0).all() and math.fsum(np.exp(-nats)) == pytest.approx(1, abs=1e-9), (dtype, size)
    rows = ([[math.nan, 0]], [[-math.inf, 0]], [[1.7e308, -1.7e308]], [[0, 0], [0, 0]], [[0, 0, 0]])
    liar = torch.zeros(1, 1, 2).as_subclass(type("Liar", (torch.Tensor,), {}))
    for bad in (*(torch.tensor([row], dtype=torch.float64) for row in rows), torch.zeros(1, 1, 2).int(), liar, None):
        with pytest.raises(BadInput, match=r"predict\(\)"):
            eval_bpb.Text([], 2).count(bad, np.zeros((1, 1), int), np.ones((1, 1), bool))


def test_every_target_is_dealt_once_in_order_with_noise_behind_the_end():
    text = random_text((0, 1, 7, 30, 8, 3))
    for slots, chunk in ((1, 1), (2, 7), (4, 8), (9, 50)):
        found = [stream[:1].tolist() for stream in text.streams]
        for docs, starts in text.deal(dict(enumerate(text.sizes)), slots, chunk):
            inputs, targets, real = text.cut(docs, starts, chunk)
            for slot in np.flatnonzero(docs >= 0):
                assert inputs[slot][real[slot]].tolist() == (found[docs[slot]] + targets[slot].tolist())[starts[slot]:][
                    :real[slot].sum()]
                found[docs[slot]] += targets[slot][real[slot]].tolist()
        assert found == [stream.tolist() for stream in text.streams]
    assert {*text.cut(np.array([-1]), np.array([0]), 999)[0][0]} == {*range(40)}


def test_a_cached_token_sees_what_training_saw_of_its_own_document_only():
    text, predictor = random_text((0, 1, 5, 149, 22, 17, 9, 22) * 3), small(eval_bpb.Sliding)
    found, model, at = score(predictor, text), small(eval_bpb.Sliding).model, np.arange(150)
    mask = torch.from_numpy((at <= at[:, None]) & (at >= at[:, None] // 12 * 12 - 12))

    def attend(q, k, v, seg, visit):
        n, (q, k, v) = len(q), (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask[:n, :n], enable_gqa=True).transpose(0, 1)
    model.attend, model.previous = attend, GPT.previous.__get__(model)
    for doc in range(12, 24):  # in slots that others have used
        tokens = torch.from_numpy(text.streams[doc])
        seg = make_segments(np.array([0]), len(tokens) - 1, 150)
        hidden = model(tokens[:-1], seg)
        p = model.probabilities(hidden, tokens[:-1], seg).gather(1, tokens[1:, None])[:, 0]
        assert found[doc].tolist() == pytest.approx((-p.log()).tolist(), abs=1e-4)


def test_adaptive_learns_from_what_was_scored_and_each_document_for_itself():
    text, graphs = random_text([9] * 17, repeats=12), []
    fixed, learns, whole = (small(eval_bpb.Adaptive) for _ in range(3))
    fixed.lr = 0.0
    fixed, learned = score(fixed, text)[16], score(learns, text)[16]  # in a slot that another has used
    assert learned[:whole.chunk].tolist() == fixed[:whole.chunk].tolist()  # nothing is known before it is scored
    assert learned[-50:].sum() < fixed[-50:].sum() - 5

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    whole.forward = torch.compile(whole.forward, fullgraph=True, backend=backend, dynamic=False)
    alone = score(whole, eval_bpb.Text(text.streams[16:], 40))[0]
    assert alone.tolist() == pytest.approx(learned.tolist(), abs=1e-4) and len(graphs) == 1


def test_no_pair_that_is_thought_impossible_is_ever_written():
    never = eval_bpb.impossible_pairs(Tokenizer(DEMO))
    for text in [*TEXTS, *words(60, 5), (ROOT / "train_gpt.py").read_text()]:
        tokens = Tokenizer(DEMO).encode(text)
        assert not never[tokens[:-1], tokens[1:]].any()
    assert never.mean() > 0.02


def test_a_sample_is_drawn_as_the_seed_says_and_begins_with_its_text(packed_run, capfd):
    written, text = [], "words " * 200  # more than the context
    for flag in ("--seed=1", "--seed=1", "--seed=2", "--temperature=0"):
        flags = [str(packed_run[0] / "artifact.pyz"), f"--sample={text}", "--tokens=60", "--device=cpu", flag]
        assert eval_bpb.main(flags) == 0
        written.append(capfd.readouterr().out)
        assert written[-1].startswith(text) and len(written[-1]) > len(text) + 1
    assert written[0] == written[1] and len({*written}) == 3


@needs_bubblewrap
def test_ranks_the_file_alone_and_the_sandbox_give_the_same_score(packed_run, dataset, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    shutil.copy(packed_run[0] / "artifact.pyz", tmp_path / "one")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    changed = {"eval_bpb.py": (ROOT / "eval_bpb.py").read_bytes() + b"# mine\n"}
    flags = f"--data={dataset}", "--device=cpu"
    ranks = start(ROOT / "eval_bpb.py", "one/artifact.pyz", *flags, "--out=two.json", ranks=2, cwd=tmp_path)
    alone = start("artifact.pyz", *flags, cwd=tmp_path / "one")
    artifact = make_artifact(packed_run, tmp_path / "a.pyz", **changed)
    assert eval_bpb.main([str(artifact), *flags, "--trust", f"--out={tmp_path}/child.json"]) == 0
    assert "2 x cpu" in end(ranks)[0] and "mode: own" in end(alone)[0]
    one, two, child = (json.loads((tmp_path / name).read_text()) for name in ("one/score.json", "two.json", "child.json"))
    assert one["val_bpb"] == child["val_bpb"] == pytest.approx(two["val_bpb"], rel=1e-6)
    assert child["mode"] == "trusted" and not list(tmp_path.glob("nanogolf*"))


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


def prove(make, text, share=1.0):
    """-> the verdict on a predictor, by that share of the text's places."""
    nats, n_all = score(make(), text), sum(text.sizes)
    rounds = proof.plan(text, proof.draw(dict(enumerate(text.sizes)), int(share * n_all)), make().slots, make().chunk)
    return proof.verdict(proof.replay(make(), text, nats, rounds), n_all, text.vocab_size, "cpu")


def flat(change):
    names = {"np": np, "torch": torch}
    exec(FLAT.format(change, name=""), names)
    return names["Flat"]


def test_the_proof_passes_the_honest_and_fails_cheats():
    streams = [np.concatenate([[0], Tokenizer(DEMO).encode(text), [0]]).astype(np.int64) for text in TEXTS]
    text = eval_bpb.Text(streams, 1024)
    assert prove(flat(HONEST), text).startswith(f"pass: {sum(text.sizes)} of")
    for cls in (eval_bpb.Sliding, eval_bpb.Adaptive):
        verdict = prove(lambda: small(cls), random_text((60, 3, 31) * 8), 0.2)
        assert verdict.startswith("pass"), verdict
    for name, change in CHEATS.items():
        assert prove(flat(change), text).startswith("FAIL"), name


def test_the_stated_power_is_true():
    assert "at most 0.004857 nats" in proof.verdict(np.zeros(9200), 10 ** 7, 16384, "cpu")
    assert "at most 0.000001 nats" in proof.verdict(np.zeros(500), 500, 1024, "cpu")  # all places: tolerances are left
    counts = {3: np.zeros(1000), 1: np.zeros(10), 2: np.zeros(1)}
    for _ in range(400):
        places = proof.draw({doc: len(each) for doc, each in counts.items()}, 100)
        assert sum(map(len, places.values())) == 100
        for doc, each in places.items():
            counts[doc][each] += 1
    assert all(each.mean() == pytest.approx(39.6, abs=3 + 24 / len(each)) for each in counts.values())
    assert 10 < counts[3].min() and counts[3].max() < 80


@needs_bubblewrap
def test_audited_strangers_prove_their_score_or_have_none(judge, dataset, tmp_path, monkeypatch):
    code, result, said = judge(HONEST)
    assert code == 0 and "val_bpb" in result and "proved by replay" in said.out, said
    n_bytes, n_targets = sum(len(text.encode()) for text in TEXTS), result["val_tokens"]
    assert n_targets == sum(len(Tokenizer(DEMO).encode(text)) + 1 for text in TEXTS) and result["val_bytes"] == n_bytes
    code, result, said = judge(PEEKS)
    assert code == 2 and "val_bpb" not in result and "NOT A SCORE: the replay failed" in said.out
    assert "proved" not in said.out and "\nval_bpb" not in said.out
    monkeypatch.setattr(proof, "PATIENCE", 1.0)
    sleeps = "self.seen = getattr(self, 'seen', 0) + 1; self.seen > self.rounds + 1 and time.sleep(999)"
    assert "no answer" in judge(sleeps)[1]["audit"]["replay"]
    shutil.copytree(dataset, tmp_path / "demo")
    meta = json.loads((dataset / "meta.json").read_text()) | {"name": "demo"}
    (tmp_path / "demo/meta.json").write_text(json.dumps(meta))
    code, result, said = judge(HONEST, data=tmp_path / "demo")
    assert "NOT A SCORE: these documents are readable everywhere" in said.out and "val_bpb" not in result
    assert "val_bpb" in judge("", "--predictor=sliding", data=tmp_path / "demo")[1]  # one's own code is no stranger


# ---- isolation and trust


# What a child may try: prints the names of what it could do. The last five it may do.
ATTEMPTS = """
import ctypes, os, signal, socket, sys
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
    "attribute": lambda: os.setxattr(target, "user.x", b"1"), "mode": lambda: os.chmod(target, 0o777),
    "time": lambda: os.utime(target), "owner": lambda: os.chown(target, os.getuid(), os.getgid()),
    "write": lambda: open(target, "a"), "beside": lambda: open(target + "x", "w"), "read": lambda: open(secret),
    "evict": lambda: os.posix_fadvise(os.open(target, 0), 0, 0, os.POSIX_FADV_DONTNEED),
    "cached": lambda: os.preadv(os.open(target, 0), [bytearray(1)], 0, os.RWF_NOWAIT),
    "mincore": lambda: call(27 if x86 else 232, ctypes.c_void_p(id(0) & -4096), 4096, ctypes.create_string_buffer(9)),
    "keyring": lambda: call(250 if x86 else 219, 0, -3, 0), "ring": lambda: call(425, 1, bytes(120)),
    "log": lambda: call(103 if x86 else 116, 10, None, 0), "trace": lambda: call(101 if x86 else 117, 16, 1, 0, 0),
    "signal": lambda: os.kill(int(judge), 0), "memory": lambda: open(f"/proc/{judge}/mem"),
    "socket": lambda: socket.create_connection(("127.0.0.1", int(port)), 9), "pair": socket.socketpair,
    "shared": shared_memory, "file": lambda: open("/dev/shm/" + judge), "left": lambda: open("/tmp/left" + judge),
    "kernel": lambda: open("/proc/sys/vm/swappiness", "r+"),
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
    target.parent.mkdir()
    monkeypatch.setattr(confine, "READABLE", [*confine.READABLE, str(target.parent)])
    for path in (target, secret, Path(f"/dev/shm/{pid}")):
        path.write_text("x")
    before, found = target.stat(), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", ATTEMPTS, *map(str, (target, secret, pid, server.getsockname()[1]))]
        for confined in (True, True, False, False):
            child = confine.Child(target, command, {"PYTHONPATH": confine.PYTHON[-1]}, confined)
            found.append(child.process.communicate(timeout=100)[0].decode().split())
            child.close()
            assert not confined or target.stat() == before
    Path(f"/dev/shm/{pid}").unlink()
    Path(f"/tmp/left{pid}").unlink()
    subprocess.run(["ipcrm", "-M", str(pid)])
    assert found[0] == found[1] == ["folder", "fork", "library", "random", "look"], found
    assert {"mode", "time", "write", "read", "evict", "signal", "socket", "pair", "shared", "left"} <= {*found[3]}


# A child that fills its folder, leaves its group, kills it, and lets another go on that holds its stdout.
ESCAPES = """
import ctypes, os, signal, time
for i in range(3000):
    os.makedirs(f"/tmp/{i}/" + 20 * "deep/")
os.chmod("/tmp", 0)
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
if not os.fork():
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
    print("escaped", flush=True)
    time.sleep(999)
time.sleep(0.1)
os.kill(0, signal.SIGKILL)
"""


@needs_bubblewrap
def test_nothing_of_a_child_outlives_its_judge(tmp_path):
    (tmp_path / "a.pyz").write_bytes(b"x")
    child = confine.Child(tmp_path / "a.pyz", [sys.executable, "-c", ESCAPES], {})
    assert child.process.stdout.readline() == b"escaped\n"
    child.close()
    assert child.process.stdout.read() == b"" and len([*tmp_path.iterdir()]) == 1
    judge = subprocess.Popen([sys.executable, "-c", f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from records.confine import *
child = Child(Path({str(tmp_path)!r}) / "a.pyz", [sys.executable, "-c", {ESCAPES!r}], {{}})
child.process.stdout.readline()
print(open(f"/proc/self/fdinfo/{{child.first}}").read().split("Pid:")[1].split()[0], flush=True)
input()"""], stdin=-1, stdout=-1)
    first = os.pidfd_open(int(judge.stdout.readline()))  # of the sandbox's processes: all end with it
    judge.kill()
    judge.communicate()
    assert select.select([first], [], [], 100)[0]


def test_files_that_a_child_could_read_are_dropped_from_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(confine, "READABLE", [str(tmp_path)])
    with open(tmp_path / "file", "rb") as file:
        os.fsync(file.fileno())
        assert os.preadv(file.fileno(), [bytearray(9)], 1 << 19, os.RWF_NOWAIT) == 9
        confine.forget_files()
        with pytest.raises(BlockingIOError):
            os.preadv(file.fileno(), [bytearray(9)], 1 << 19, os.RWF_NOWAIT)


HARM = {
    "raise ValueError('no\x1b\\nval_bpb: 1')": r"its code says b.ValueError: no\\x1b\\nval_bpb: 1",
    "os._exit(3)": "exit code 3",
    "self.hoard = np.ones(1 << 40)": "llocate",
    "while True: os.write(int(max(os.listdir('/proc/self/fd'), key=int)) - 1, b'x' * 4096)": "exit code",
    "logits = logits[0]": "must return logits",
    "logits[0, 0, 5] = -np.inf": "not finite",
    "os.kill(0, 9)": "exit code 137",
}


@needs_bubblewrap
def test_harm_ends_in_one_line_and_what_a_child_says_is_quoted(judge, packed_run, dataset, tmp_path):
    endless = make_artifact(packed_run, tmp_path / "endless/a.pyz", "time.sleep(999)")
    endless = start(ROOT / "eval_bpb.py", endless, f"--data={dataset}", "--trust", "--max_seconds=9", TMPDIR=str(tmp_path))
    for harm, words in HARM.items():
        code, result, _ = judge(harm, "--trust")
        assert re.search(words, str(code)) and str(code).isprintable() and not result, (harm, code)
    code, result, said = judge("print('\x1b[8mno\\nval_bpb: 0.0\\n' + 90 * ' ' + 'val_bpb: 0.1\\n' * 50)", "--trust")
    shown = [line for line in said.err.splitlines() if line.startswith("artifact: b'")]
    assert len(shown) == confine.STDERR_LINES and max(map(len, shown)) < 80 and "\x1b" not in said.err
    assert code == 0 and said.out.count("\nval_bpb: ") == 1 and "NOTHING IS PROVED" in said.out
    assert result["val_loss"] == pytest.approx(math.log(1024), rel=1e-12)
    assert "predictor's name" in judge("pass", "--trust", name="x" + 60 * " " + "val_bpb: 0.1")[0]
    out, err = end(endless, 2)
    assert re.fullmatch("eval_bpb.py: .*a.pyz: ran over 9 s in the phase '.*': no score\n", err) and "---" not in out
    assert not list(tmp_path.glob("nanogolf*"))


def test_a_system_without_a_sandbox_is_no_place_for_strangers(judge, dataset, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "apt-get install bubblewrap" in judge(HONEST)[0]
    code, result, said = judge(HONEST, "--trust", "--limit_docs=3")
    assert code == 0 and "bubblewrap" in result["unconfined"] and "NOT CONFINED" in said.out
    assert result["limit_docs"] == 3 and "val_bpb" not in result and "first 3 of 20" in said.out
    monkeypatch.setattr(confine, "READABLE", [str(dataset.parent)])
    assert "where the artifact's code may read: move it" in judge(HONEST)[0]


def test_nothing_beside_a_strangers_artifact_is_read_or_written(packed_run, dataset, tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name, change in (("own", ""), ("other", HONEST)):
        artifact = make_artifact(packed_run, tmp_path / name / "a.pyz", change)
        os.mkfifo(artifact.parent / "metrics.jsonl")
        for link in ("score.json", f".score.json.{os.getpid()}.tmp", "ledger.tsv"):
            (artifact.parent / link).symlink_to(victim)
        with pytest.raises(BadInput, match="--data"):
            eval_bpb.main([str(artifact), "--device=cpu"])
        flags = [str(artifact), f"--data={dataset}", "--device=cpu", "--predictor=sliding", "--trust"]
        assert eval_bpb.main(flags) == 0 and victim.read_text() == "mine"
        assert (artifact.parent / "score.json").is_symlink() == (name == "other")
    make_artifact(packed_run, tmp_path / "runs/mine/a.pyz")
    (tmp_path / "runs/mine/metrics.jsonl").write_text(
        json.dumps({"kind": "start", "config": {"data": str(dataset)}}) + '\n{"kind": "summary", "finished": true}\n{"ki')
    monkeypatch.chdir(tmp_path)
    assert eval_bpb.main(["runs/mine/a.pyz", "--device=cpu", "--predictor=sliding"]) == 0
    assert json.loads((tmp_path / "runs/mine/score.json").read_text())["finished"] is True


def test_an_artifact_or_a_flag_that_is_not_right_is_refused(dataset, packed_run, tmp_path):
    artifact, crowd = make_artifact(packed_run, tmp_path / "a.pyz"), io.BytesIO()
    whole = artifact.read_bytes()
    crowd.write(whole)
    with zipfile.ZipFile(crowd, "a") as z, pytest.warns(UserWarning):
        z.writestr("tokenizer.json", b"x")
    shadow = make_artifact(packed_run, tmp_path / "b.pyz", **{"eval_bpb/__init__.py": b"x"}).read_bytes()
    for bad in (whole[:-400], flip(whole, 5000), b"", b"PK", crowd.getvalue(), shadow):
        artifact.write_bytes(bad)
        with pytest.raises(BadInput, match="a.pyz: not a whole"):
            eval_bpb.main([str(artifact), f"--data={dataset}"])
    artifact.write_bytes(whole)
    for flag in ("--predictor=best", "--data=nowhere", "--limit_docs=-1", "--device=tpu", "--x=1", "--seed=-1"):
        with pytest.raises(BadInput, match=flag[2:] if "data" not in flag else "nowhere"):
            eval_bpb.main([str(artifact), f"--data={dataset}", flag])


# ----------------------------------------------------------------------------------------------------------------------
# Records


DATASET = {"name": "fineweb", "val_docs_sha256": "d" * 64, "val_docs": 50_000,
           "val_tokens": 40_540_160, "val_bytes": 151_078_222}
NATS = math.log(2) * 151_078_222 / 40_540_160
TRAINER = "import torch\n\n# Model\nLR = 0.02\n"
RUN_FILES = {  # what train_gpt.py and pack.py leave, without weights
    "metrics.jsonl": """{"kind": "start", "config": {"seed": SEED, "run": "NAME", "max_seconds": 600.0},
 "environment": {"device": "8 x NVIDIA H100", "torch": "2.13.0"}, "dataset": DATASET}
{"kind": "cut
{"kind": "summary", "val_bpb": 1.3, "train_seconds": 599.5, "steps": 5000, "tokens": 9999}
{"kind": "end", "reason": "END", "exit_code": 0}
""".replace(",\n", ","),
    "log.txt": "step:5000 val_loss:3.1255 val_bpb:1.2100 train_seconds:599.0\n", "pack.txt": "8 bits"}


def fake_run(folder, seed=1, val_bpb=1.2, end="finished", source=TRAINER, **score):
    """A run folder, trained, packed and scored."""
    words = {"SEED": seed, "NAME": folder.name, "END": end, "DATASET": json.dumps(DATASET)}
    for name, text in RUN_FILES.items():
        for word, value in words.items():
            text = text.replace(word, str(value))
        write(folder / name, text)
    with zipfile.ZipFile(folder / "artifact.pyz", "w") as archive:
        archive.writestr("train_gpt.py", source)
        archive.write(ROOT / "eval_bpb.py", "eval_bpb.py")
        archive.write(ROOT / "data/tokenizer.py", "data/tokenizer.py")
        archive.writestr("model.bin", folder.name)
    artifact = (folder / "artifact.pyz").read_bytes()
    write(folder / "score.json", json.dumps({
        "val_bpb": val_bpb, "val_loss": NATS * val_bpb, "dataset": DATASET, "mode": "own",
        "artifact_bytes": len(artifact), "phases": {"total": 400.0},
        "artifact_sha256": hashlib.sha256(artifact).hexdigest(),
        "audit": {"replay": "pass: 9,200 places"}, **score}))
    return folder


def submit_runs(folder, runs, name="good"):
    args = argparse.Namespace(
        runs=[str(run) for run in runs], name=name, track=None, parent=None, author="Ann",
        github_id=None, date="2026-01-02", idea="faster", commit="HEAD")
    return submit.build(args, folder / "records")


def make_record(folder, name="good", spread=1e-4, source=TRAINER):
    runs = [folder / f"runs/{name}{seed}" for seed in (1, 2, 3)]
    for seed, run in enumerate(runs, 1):
        fake_run(run, seed, 1.2 + seed * spread, source=source)
    record = submit_runs(folder, runs, name)
    replace_in(record / "README.md", "(write this)", "Words.")
    return record


def review(folder):
    found = []
    check.review(folder, found.append)
    return found


def check_command(*args, code):
    return "".join(end(start(ROOT / "records/check.py", *args), code))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new))


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
json: blurb | submission.json | "faster" | ""
folder-name | submission.json | 2026-01-02 | 2020-01-01
log: val_bpb is -1 | train_seed2.log | val_bpb: 1.2002 | val_bpb: -1
log: facts | train_seed2.log | steps: 5000 | steps: ?
log: train_seconds 599.0 | train_seed2.log | train_seconds: 599.5 | train_seconds: 9.5
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
track: documents | train_seed2.log | "val_docs": 50000 | "val_docs": 10000
track: 164594398 | train_seed2.log | 40540160, "val_bytes": 151078222 | 44167075, "val_bytes": 164594398
log: is not val_loss | train_seed2.log | val_bpb: 1.2002 | val_bpb: 1.2
proof: mode trusted | train_seed2.log | "own" | "trusted"
proof: 'replay': 'FAIL | train_seed2.log | pass | FAIL
proof: mode own | train_seed2.log | "replay": "pass: 9,200 places" |
source-hash | train_gpt.py | 02 | 03
source-hash | more.py | | 
judge | data/tokenizer.py | | 
judge | eval_bpb.py | | # another
parent | submission.json | "parent": null | "parent": "nobody"
parent | submission.json | "parent": null | "parent": "2026-01-02_good"
significance | submission.json | "parent": null | "parent": "known"
"""


def test_every_rule_finds_what_breaks_it_and_a_good_record_is_clean(tmp_path, monkeypatch):
    good = make_record(tmp_path)
    monkeypatch.setattr(check, "known_records", lambda: {"known": good})
    monkeypatch.setattr(check, "read_entry", lambda name: {"scores": {"1": 1.2, "2": 1.2}})
    assert review(good) == []
    seen = {"missing-folder", "stray-file", "change-set", "rescore", "copy", "same-source"}

    def broken(what, folder):
        rule, _, words = what.partition(": ")
        seen.add(rule)
        found = review(folder)
        assert any(f["rule"] == rule and words in f["message"] for f in found), (what, found)
    for n, row in enumerate(EDITS.strip("\n").split("\n")):
        what, name, old, new = (cell.strip().replace("\\n", "\n") for cell in row.split("|"))
        folder = tmp_path / str(n) / good.parent.name / good.name
        shutil.copytree(good, folder)
        if old:
            replace_in(folder / name, old, new)
        else:
            write(folder / name, new)
        broken(what, folder)
    (folder / "notes.md").symlink_to("/etc/passwd")
    broken("link", folder)
    write(folder / "big.txt", "x" * (4 << 20) + "x")
    broken("file-size", folder)
    for i in range(400):
        write(folder / f"{i}.txt", "")
    broken("review-limit: 400 files", folder)
    broken("folder-name", folder.rename(folder.parent / "my record"))
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
        assert [*check.hidden_code(hidden.encode())], hidden
    plain = b"# coding: utf-8\ntorch.compile(m.eval()); re.compile(x); load(x, weights_only=True)"
    names = "train_gpt.py", "pack.py", "eval_bpb.py", "data/dataset.py", "data/tokenizer.py"
    for source in (plain, *((ROOT / name).read_bytes() for name in names)):
        assert [*check.hidden_code(source)] == []


def test_the_predictor_may_change_and_the_judge_may_not(tmp_path):
    folder = make_record(tmp_path)
    source = (ROOT / "eval_bpb.py").read_text()
    write(folder / "eval_bpb.py", source.replace(check.JUDGE.decode(), "\nA = 1" + check.JUDGE.decode()))
    assert [f["rule"] for f in review(folder)] == ["source-hash"]
    write(folder / "eval_bpb.py", source + "A = 1\n")
    assert [f["rule"] for f in review(folder)] == ["source-hash", "judge"]


def test_a_record_holds_what_differs_and_says_what_the_runs_said(tmp_path):
    folder = make_record(tmp_path, source=TRAINER + "#\n")
    assert folder == tmp_path / "records/track_10min_16mb/2026-01-02_good"
    assert " ".join(sorted(path.name for path in folder.iterdir())) == (
        "README.md submission.json train_gpt.py train_seed1.log train_seed2.log train_seed3.log")
    said = json.loads((folder / "submission.json").read_text())
    assert [said[key] for key in ("val_bpb", "parent", "blurb", "github_id")] == [
        pytest.approx(1.2002), None, "faster", "Ann"]
    assert "**val_bpb 1.200200** (std 0.000100, n 3) on fin" in (folder / "README.md").read_text()
    with pytest.raises(BadInput, match="exists; nothing is overwritten"):
        submit_runs(tmp_path, (tmp_path / "runs").iterdir())


def test_submit_refuses_runs_that_are_not_one_record(tmp_path):
    good = [fake_run(tmp_path / f"good{seed}", seed) for seed in (1, 2)]
    for n, (words, how) in enumerate({
            "seeds .*: another source_sha256": {"source": ""}, "a seed of its own": {"seed": 1},
            "trained until: a reason": {"end": "a reason"}, "val_bpb is -1": {"val_bpb": -1},
            "proof .*: mode trusted": {"mode": "trusted"}, "not what was": {"artifact_sha256": "x"},
            "same artifact_sha256": {}}.items()):
        run = fake_run(tmp_path / f"bad{n}", **{"seed": 3, **how})
        if not how:
            shutil.copy(good[0] / "artifact.pyz", run)
            shutil.copy(good[0] / "score.json", run)
        with pytest.raises(BadInput, match=words):
            submit_runs(tmp_path, [*good, run])
    assert not [*tmp_path.glob("records/*/*")]


def test_hostile_folders_end_in_bounded_time_and_nothing_of_them_runs(tmp_path, monkeypatch):
    folder = make_record(tmp_path)
    marker = tmp_path / "executed"
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
    line = json.dumps(check.finding("link", "x"))
    write(tmp_path / "dies.py", f"import os; print({line!r}, flush=True); os.abort()")
    monkeypatch.setattr(check, "__file__", str(tmp_path / "dies.py"))
    found, _ = check.review_in_child(folder)   # a reader that dies is no pass; what it said stays
    assert [f["rule"] for f in found] == ["link", "review-limit"]


def test_a_batch_is_reviewed_to_its_end_and_copies_are_named(tmp_path):
    good = make_record(tmp_path)
    copy = tmp_path / "elsewhere" / good.name
    shutil.copytree(good, copy)
    replace_in(copy / "README.md", "1.200200", "1.1")
    write(tmp_path / "stray", "x")
    out = check_command(good, tmp_path / "stray", copy, tmp_path / "none", "--jobs=2",
                        f"--json={tmp_path}/all.json", code=1)
    for words in (f"{good}: clean", f"{copy}: 1 FAIL", f"FAIL  {tmp_path}/none: missing-folder",
                  f"FLAG  {tmp_path}/stray: stray-file", "1 of 5 clean"):
        assert f"{words}\n" in out, words
    found = json.loads((tmp_path / "all.json").read_text())["between the folders"]
    assert [(f["rule"], f["file"]) for f in found] == [("copy", str(good)), ("same-source", str(good))]
    assert all(f["message"].endswith(f" as {copy}") for f in found)
    check_command(tmp_path / "stray", code=4)
    check_command(good, code=0)


def test_rescore_runs_the_judge_on_the_artifact_that_the_record_names(tmp_path, monkeypatch):
    folder = make_record(tmp_path)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    score = json.loads((tmp_path / "runs/good2/score.json").read_text())
    for changes in ({}, {"val_bpb": 1.21}, {"val_bpb": None}, {"artifact_sha256": "x"}):
        text = json.dumps(score | changes)
        write(tmp_path / "eval_bpb.py", f"import sys; open(sys.argv[3][6:], 'w').write({text!r})")
        found = check.rescore(folder, str(tmp_path / "runs/good2/artifact.pyz"), None)
        assert ["the record claims" in f["message"] for f in found] == [True][:len(changes)]


def test_the_p_value_is_students():
    for t, df, p in ((6.313752, 1, 0.05), (2.131847, 4, 0.05), (3.746947, 4, 0.01)):
        assert stats.t_upper(t, df) == pytest.approx(p, abs=1e-6) == 1 - stats.t_upper(-t, df)
    # sqrt(1 + 1) and (1 + 1)^2 / (1/3 + 1/8) by hand
    assert stats.welch(2.0, 4.0, 4, 9.0, 9) == pytest.approx(stats.t_upper(2 ** 0.5, 96 / 11))
    # The same seeds are paired: gains of 0.001, 0.002, 0.003, whatever the seeds' own spread.
    theirs = {1: 1.001, 2: 1.202, 3: 1.403}
    c = stats.comparison({1: 1.0, 2: 1.2, 3: 1.4}, theirs, 1.0)
    assert c["p"] == pytest.approx(stats.t_upper(12 ** 0.5, 2))
    assert c["verdict"] == "run 2 more a side"
    apart = stats.comparison({4: 1.0, 5: 1.2, 6: 1.4}, theirs, 1.0)
    assert apart["p"] > 0.4 and apart["verdict"] == "drop"
    gain = stats.smallest_gain([1.0, 1.2, 1.4])
    assert 0.0097 < stats.welch(gain, 0.04, 3, 0.04, 3) < 0.01


def test_compare_takes_nats_from_the_dataset_and_refuses_what_does_not_compare(tmp_path):
    ours = [fake_run(tmp_path / f"a{s}", s, 1.19 + s / 1e4) for s in (1, 2, 3)]
    theirs = [fake_run(tmp_path / f"b{s}", s, 1.2 + s / 5e3) for s in (1, 2, 3)]
    out = check_command("compare", *ours, "--", *theirs, code=0)
    for words in ("candidate  val_bpb 1.19020  std 0.00010  n 3", "verdict    keep", "True, p 2.44e-05",
                  "+0.02635 nats per token = +0.01020 bits per byte", "paired by seed: one-sided p 1.6e-05"):
        assert words in out
    assert "verdict    drop" in check_command("compare", *theirs, "--", *ours, code=0)
    other = fake_run(tmp_path / "c", 4, dataset={"val_docs_sha256": "f" * 64})
    for args, words in (((*ours, "--", other), "such runs do not compare"),
                        ((ours[0], "--", theirs[0]), "each side needs two"),
                        ((ours[0], ours[0], "--", *theirs), "stands twice on one side"),
                        ((*ours, "--", fake_run(tmp_path / "d", val_bpb=-math.inf)), "python pack.py ")):
        assert words in check_command("compare", *args, code=2)


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


def test_a_picture_holds_every_point_of_every_run_once(tmp_path):
    text = ""
    for at, loss in ((1.0, 9.0), (2.0, 3.0), (3.0, 2.5), (2.5, 2.4), (4.0, "null")):
        text += f'{{"kind": "step", "train_seconds": {at}, "train_loss": {loss}}}\n'
    write(tmp_path / "a<b>/metrics.jsonl", text + '{"kin')
    write(tmp_path / "empty/metrics.jsonl", "")
    points = plot.read_points(tmp_path / "a<b>", "train_loss")
    assert points == [(1.0, 9.0), (2.0, 3.0), (2.5, 2.4)]
    plot.write(tmp_path / "curves.svg", [tmp_path / "a<b>", tmp_path / "empty"])
    picture = minidom.parse(str(tmp_path / "curves.svg"))
    assert len(picture.getElementsByTagName("polyline")) == 6


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
    "pack.py": "",
    "eval_bpb.py": """import json, sys
from pathlib import Path
lines = Path(sys.argv[1]).with_name("metrics.jsonl").read_text().splitlines()
Path(sys.argv[3][6:]).write_text(json.dumps({"val_bpb": json.loads(lines[1])["val_bpb"]}))
""",
    "data/x/meta.json": json.dumps(DATASET)}


def commit(folder):
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder,
                       check=True)


def test_a_turn_compares_an_edit_with_the_last_commit_and_lists_its_verdict(tmp_path):
    def turn(*flags, code=0):
        return "".join(end(start(tmp_path / "records/turn.py", *flags, cwd=tmp_path), code))
    for path in [*ROOT.glob("records/*.py"), *ROOT.glob("data/*.py")]:
        write(tmp_path / path.relative_to(ROOT), path.read_text())
    for name, text in STUBS.items():
        write(tmp_path / name, text)
    commit(tmp_path)
    assert "nothing differs from HEAD" in turn("--idea=none", "--data=x", code=2)
    replace_in(tmp_path / "train_gpt.py", "WIDTH = 1", "WIDTH = 2")
    out = turn("--idea=a wider gate", "--data=x")
    assert out.index("noise ") < out.index("verdict    keep")
    [curves] = tmp_path.glob("runs/turns/a-wider-gate_*/curves.svg")
    rate = "--idea=a rate", "--data=x", f"--parent={curves.parent.name}_s1", "--", "--lr=9"
    turn(*rate, code=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.jsonl")}
    out = turn(*rate, code=2)
    assert "_s1: no score, a nan; see runs/turns/a-rate_" in out and "no whole score" in out
    after = {path: path.stat().st_mtime_ns for path in before}
    assert len(before) == 9 and after == before   # nothing ran again, not what failed either
    wider, rate = turn().split("; n ")[:2]
    assert wider.startswith("keep: +0.009") and "moved model; a-wider" in rate
    assert "drop: {'a nan'}" in rate and "moved lr; a-rate" in turn()


def test_a_change_set_adds_one_record_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    write(tmp_path / "train_gpt.py", "")
    commit(tmp_path)
    readme = "records/track_10min_16mb/2026-01-02_x/README.md"
    write(tmp_path / readme, "")
    write(tmp_path / "records/README.md", "the leaderboard")
    commit(tmp_path)
    write(tmp_path / "train_gpt.py", "changed")   # the next idea, not committed
    record = str((ROOT / readme).parent)
    assert check.change_set("HEAD~1") == ([], [record])
    write(tmp_path / readme, "changed")
    commit(tmp_path)
    assert [f["file"] for f in check.change_set("HEAD~2")[0]] == ["train_gpt.py"]
    assert [f["file"] for f in check.change_set("HEAD~1")[0]] == [readme, "train_gpt.py", "records"]
    with pytest.raises(BadInput, match="git merge-base"):
        check.change_set("--output=x")
