"""The promises, as tests: offline, on a CPU, in minutes.  python -m pytest -q test_smoke.py"""
import argparse
import base64
import bz2
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
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
ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import eval_bpb
import pack
import train_gpt
from data import hub as hub_files, prepare
from data.dataset import BadInput, find_run, read_meta, read_shard, read_val_docs
from data.runs import World
from data.text_rules import nmt_nfkc
from data.tokenizer import Tokenizer, lower_case, restore_case
from data.train_bpe import train_tokenizer
from records import check, ledger, plot, rules, sources, stats, submit, turn
from records.evidence import ladder
from train_gpt import Config, GPT, Loader, make_segments


# ----------------------------------------------------------------------------------------------------------------------
# Training


TINY = dict(n_layer=4, n_embd=32, n_head=4, n_kv_head=2, mlp_dim=64, loop_first=1, loop_last=1, loop_passes=3,
            two_lane_from=3, rope_dims=4, vocab_size=64, batch_tokens=512, row_tokens=128, seq_len=48)
RUN = [f"--{k}={v}" for k, v in {**TINY, "vocab_size": 0, "data": "synthetic", "calib_tokens": 256, "val_points": 2,
                                 "device": "cpu"}.items()]


def tiny_model(seed=0, **changes):
    """A model of random weights everywhere: freshly initialised ones are zero where most mistakes would hide."""
    torch.manual_seed(seed)
    model = GPT(replace(Config(**TINY), **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        model.x0_mix[:, 0] += 1
    return model


def start(*command, ranks=1, cwd=None, **env):
    """python COMMAND, or by torchrun, in a process that goes on beside this one: end() waits for it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launcher, *map(str, command)], cwd=cwd, env={**os.environ, **env},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process, code=0):
    """-> stdout and stderr of a process that ends with that code."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, out[-2000:] + err[-2000:]
    return out, err


def start_training(folder, *flags, shape=RUN, **how):
    return start(ROOT / "train_gpt.py", *shape, *flags, cwd=folder, **how)


def wait_for(condition, process):
    while not condition():
        time.sleep(0.02)
        assert process.poll() is None, end(process)


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1:]


def metrics(folder, run, kind):
    lines = (Path(folder) / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


# ---- the model


def dense_attention(q, k, v, seg):
    """What a GPU's varlen kernel computes, from cu_seqlens and max_len alone."""
    at = torch.arange(len(q))
    segment = torch.searchsorted(seg.cu_seqlens[1:].contiguous(), at.int(), right=True)
    seen = (segment[:, None] == segment) & (at[:, None] >= at) & (at[:, None] - at < seg.max_len)
    y = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=seen, enable_gqa=True)
    return y.transpose(0, 1).contiguous()


def test_a_token_sees_only_its_own_segment_and_its_past():
    model, tokens, starts = tiny_model(), torch.randint(64, (128,)), np.array([0, 30, 77])
    seg = make_segments(starts, 128, 48)                             # segments 0-30, 30-77, 77-125, 125-128
    gpu = tiny_model()
    gpu.kernel = dense_attention
    for looped in (False, True):
        before = model(tokens, seg, looped)
        torch.testing.assert_close(gpu(tokens, seg, looped), before, rtol=1e-4, atol=1e-4)
        for at in (20, 29, 30, 60, 76, 100, 125):
            changed = tokens.clone()
            changed[at] = (changed[at] + 1) % 64
            moved = (model(changed, seg, looped) != before).any(-1)
            end = next(e for e in (30, 77, 125, 128) if at < e)
            assert moved[at] and not moved[:at].any() and not moved[end:].any()     # to the last bit


def test_compiled_graphs_see_segments_of_one_shape_whatever_the_documents():
    for step, seq_len in itertools.product((1, 2, 3, 50, 700, 10 ** 6), (1024, 2048, 3072)):
        seg = make_segments(np.arange(0, 98304, step), 98304, seq_len, longest=3072)
        assert seg.cu_seqlens.shape == (257,) and seg.max_len == 3072
        assert seg.cu_seqlens.diff().max() <= seq_len and seg.cu_seqlens[-1] == 98304
    alone = make_segments(np.array([0, 500, 501]), 98304, 1024, longest=3072)
    assert alone.cu_seqlens[:5].tolist() == [0, 500, 501, 1525, 2549]  # where they fit, documents stay apart
    crowd = make_segments(np.append(np.arange(0, 4000, 2), 50_000), 98304, 1024, longest=3072)
    assert {3998, 50_000} <= {*crowd.cu_seqlens.tolist()}  # where they do not, the long ones do


def test_parameter_count_and_flops_of_the_record():
    cfg = replace(Config(), vocab_size=8192)
    with torch.device("meta"):
        n = sum(p.numel() for p in GPT(cfg).parameters())
    assert 35.9e6 < n < 36.0e6                                       # the public record: 35,945,671
    # Public figures without attention's products.
    assert abs(train_gpt.count_flops(cfg, False) / 215.5e6 - 1) < 0.01
    assert abs(train_gpt.count_flops(cfg, True) / 319.3e6 - 1) < 0.01


def test_the_hand_written_gradients_are_those_of_their_parts():
    torch.manual_seed(0)
    N, H, K, d = 30, 6, 2, 16
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((N, H + 2 * K, d), (H,), (N, H))]
    cos, sin, weights = (angle := torch.rand(N, 1, 4) * 6).cos(), angle.sin(), torch.randn(N, H, d)
    wide = lambda x: x.repeat_interleave(H // K, 1)

    def parts(qkv, gain, gate):
        q, k, v = qkv.split([H, K, K], 1)
        q, k = (train_gpt.rotate(F.rms_norm(x, (d,), eps=train_gpt.EPS), cos, sin) for x in (q, k))
        y, own = q * gain[:, None] + wide(k * v), wide(F.normalize(v, dim=-1))  # a sum in place of attention
        return (y - (y * own).sum(-1, keepdim=True) * own) * gate.sigmoid()[:, :, None]

    def fused(qkv, gain, gate):
        angles, gains = F.pad(angle.expand(-1, H + K, -1), (0, 0, 0, K)), F.pad(gain, (0, 2 * K), value=1.0)
        q, k, v = train_gpt.RotatedHeads.apply(qkv, gains, angles.cos(), angles.sin(), K)
        return train_gpt.GatedXSA.apply(q + wide(k * v), v, *train_gpt.unit(v), gate)

    results = [(z := f(*inputs), *torch.autograd.grad((z * weights).sum(), inputs)) for f in (parts, fused)]
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- the kernels


def test_fused_kernels_equal_their_references():
    """In Triton's interpreter: no GPU needed. In a process of its own, for the switch is read at import."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = """if True:
        import torch, torch.nn.functional as F, train_gpt as t
        t.TILE = 16, 32, 32
        def error(a, b): return ((a.float() - b.float()).norm() / b.float().norm()).item()
        for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 1e-2)):  # it multiplies no bfloat16 matrices
            torch.manual_seed(0)
            make = lambda *s: torch.randn(*s, dtype=dtype).requires_grad_()
            x, up, down, dy = make(48, 64), make(96, 64), make(64, 96), torch.randn(48, 64, dtype=dtype)
            wide = [a.detach().float().requires_grad_() for a in (x, up, down)]
            y = t.FusedMLP.apply(x, up, down)
            ref = F.linear(t.lrelu2(F.linear(*wide[:2])), wide[2])
            grads, expected = torch.autograd.grad(y, (x, up, down), dy), torch.autograd.grad(ref, wide, dy.float())
            pairs = [(y, ref), *zip(grads, expected)]
            dtype = torch.float32 if dtype is torch.float32 else torch.bfloat16
            z, targets, w = (5 * make(30, 1500)).detach().requires_grad_(), torch.randint(1500, (30,)), torch.rand(30)
            loss, zr = t.FusedCE.apply(z, targets, 30.0), z.detach().float().requires_grad_()
            ref = F.cross_entropy(30 * torch.tanh(zr / 30), targets, reduction="none")
            pairs += [(loss, ref), (torch.autograd.grad(loss, z, w)[0], torch.autograd.grad(ref, zr, w)[0])]
            for a, b in pairs:
                assert error(a, b) < limit, (dtype, error(a, b))
        print("agree")
    """
    assert end(start("-c", code, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT)))[0] == "agree\n"


def test_kernels_compile_for_hopper(tmp_path, monkeypatch):
    """To an H100's machine code, on any machine with Triton: tensor cores, copies in flight, shared memory it has."""
    pytest.importorskip("triton", reason="triton is not installed")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    up, ce_forward, ce_backward = train_gpt.up_kernel, train_gpt.ce_forward, train_gpt.ce_backward
    tile = dict(zip(("BM", "BN", "BK"), train_gpt.TILE), GROUP=8, K=512)
    loss = {"cap": 30.0, "V": 16384, "BV": 1024}
    kinds = {"target_ptr": "*i64", "loss_ptr": "*fp32", "lse_ptr": "*fp32", "grad_ptr": "*fp32"}
    for kernel, known in ((up, {**tile, "BACKWARD": False, "stride_bk": 1}),
                          (up, {**tile, "BACKWARD": True, "stride_bn": 1}), (ce_forward, loss), (ce_backward, loss)):
        types = {n: "constexpr" if n in known else kinds.get(n, "*bf16" if n.endswith("_ptr") else "i32")
                 for n in kernel.arg_names}
        place = {n: (i,) for i, n in enumerate(types)}
        aligned = {place[n]: [["tt.divisibility", 16]] for n, kind in types.items() if kind[0] in "*i"}
        source = ASTSource(kernel, types, {place[n]: value for n, value in known.items()}, aligned)
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
        assert code.asm["cubin"] and code.metadata.shared <= 227 * 1024
        assert kernel is not up or "wgmma.mma_async" in code.asm["ptx"] and "cp.async" in code.asm["ptx"]


def test_the_step_moves_what_the_roofline_says():
    if not torch.version.cuda or not torch.__version__.startswith("2.11"):
        pytest.skip("the roofline counts with a CUDA build of torch 2.11")
    out, _ = end(start(ROOT / "records/evidence/roofline.py", "--compile"))
    assert out.count("are machine code for sm_90") == 2, out
    for row, expected in (("inductor's own kernels", (50.4, 75.7)), ("products, attention", (85.5, 125.5)),
                          ("saved", (23.8, 34.5)), ("predicted", (91.6, 130.7))):
        line = next(line for line in out.splitlines() if line.startswith(f"| {row}"))
        assert [float(x) for x in line.split("|")[2:4]] == pytest.approx(expected, rel=0.02), line


def test_the_first_minutes_on_a_gpu_can_be_rehearsed_without_one(tmp_path):
    out, _ = end(start(ROOT / "records/evidence/first_gpu_minutes.py", tmp_path, "--tiny"))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines].count("done") == 9 and out.endswith("failed or late: none\n"), out


# ---- the optimizers


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    for rows, cols in ((40, 40), (80, 20), (20, 80)):
        short, basis = min(rows, cols), lambda n: torch.linalg.qr(torch.randn(3, n, n))[0]
        U = train_gpt.orthogonalize(basis(rows)[..., :short] * torch.linspace(0.05, 1, short) @ basis(cols)[:, :short])
        sigma = torch.linalg.svdvals(U) / max(1, rows / cols) ** 0.5
        assert 0.8 < sigma.min() and sigma.max() < 1.2


def test_one_step_moves_every_parameter_as_adamw_and_muon_should():
    model, cfg = tiny_model(), Config(**TINY, grad_clip=1e9)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    tokens = torch.randint(64, (128,))
    batch = (tokens, tokens.roll(-1), make_segments(np.array([0]), 128, 48))
    (model.losses(*batch, True).sum() / cfg.batch_tokens).backward()
    grads = {k: v.grad.clone() for k, v in model.named_parameters()}
    assert all(g.abs().sum() > 0 for g in grads.values())
    model.zero_grad()
    optimizers = train_gpt.make_optimizers(model, cfg)
    train_gpt.train_step(model.losses, [batch], model, optimizers, train_gpt.Schedule(0.5, 0.9, 48, True), cfg)
    for name, p in model.named_parameters():
        w, g = before[name], grads[name]
        if name in GPT.MATRICES:
            parts = model.qkv_sizes if name == "qkv" else [g.size(1)]
            u = torch.cat([train_gpt.orthogonalize(1.9 * x) for x in g.split(parts, 1)], 1)
            expect = w * (1 - 0.5 * cfg.matrix_lr * cfg.matrix_wd) - 0.5 * cfg.matrix_lr * u
        else:
            lr, wd = (cfg.embed_lr, cfg.embed_wd) if name == "embed.weight" else (cfg.scalar_lr, cfg.scalar_wd)
            expect = w.detach().clone().requires_grad_()
            expect.grad = g.clone()
            torch.optim.AdamW([expect], lr=0.5 * lr, betas=(cfg.adam_beta1, cfg.adam_beta2), eps=1e-8,
                              weight_decay=wd).step()
        torch.testing.assert_close(p, expect, atol=1e-5, rtol=1e-4, msg=name)


# ---- data


def test_the_stream_is_the_same_for_any_number_of_ranks_and_moves_with_the_seed(monkeypatch):
    shards = [train_gpt.synthetic_tokens(64, 2000 + 100 * i, i) for i in range(3)]
    data = SimpleNamespace(train=[lambda shard=shard: shard for shard in shards])

    def stream(rank, ranks, first_row=0, **changes):
        monkeypatch.setattr(train_gpt, "place_among_ranks", lambda: (rank, ranks))
        return Loader(data, Config(**{**TINY, **changes}), first_row)

    one = stream(0, 1)
    rows = [one.next() for _ in range(120)]                          # several epochs
    for ranks in (2, 4):
        shares = [stream(r, ranks) for r in range(ranks)]
        assert all(np.array_equal(rows[i], shares[i % ranks].next()) for i in range(120))
    assert np.array_equal(rows[50], stream(0, 1, first_row=50).next())
    assert not np.array_equal(rows[0], stream(0, 1, seed=2).next())
    epoch = np.concatenate([r[:-1] for r in rows[:sum((len(shard) - 1) // 128 for shard in shards)]])
    left = np.bincount(np.concatenate(shards), minlength=64) - np.bincount(epoch, minlength=64)
    assert left.min() >= 0 and left.sum() < 3 * 129  # an epoch holds each token at most once, and nearly all


def test_validation_counts_each_target_once_in_whole_documents():
    model, cfg = tiny_model(), Config(**{**TINY, "row_tokens": 1024, "batch_tokens": 2048})
    tokens, total = train_gpt.synthetic_tokens(64, 700, 5), 0.0
    for doc in np.split(tokens, np.flatnonzero(tokens == 0)[1:]):
        x = torch.from_numpy(np.append(doc, 0).astype(np.int64))
        total += model.losses(x[:-1], x[1:], make_segments(np.array([0]), len(doc), 48), True).sum().item()
    data = SimpleNamespace(val=tokens, val_bytes=1000)
    batch = lambda row, seq_len: train_gpt.make_batch(row, seq_len, "cpu")
    found = train_gpt.validate(model.losses, data, cfg, batch, True)
    assert found["val_loss"] * 700 == pytest.approx(total, rel=1e-5)
    assert found["val_bpb"] == pytest.approx(total / math.log(2) / 1000, rel=1e-5)


# ---- calibration


def test_calibration_sums_are_those_of_a_hand_computation():
    model = tiny_model(loop_passes=2)
    tokens = torch.randint(64, (64,))
    seg = make_segments(np.array([0, 40]), 64, 48)
    batch = lambda: (tokens, tokens, seg)
    stats = train_gpt.calibrate(model, batch, 150, seed=0)
    assert stats["tokens"].item() == 150 * 64
    assert train_gpt.calibrate(model, batch, 5, 0, late=lambda: True)["tokens"].item() == 64   # the clock ends it
    seen = {}

    def spy(x, W, name, layer, visit):
        seen.setdefault((name, layer), []).append(x.detach())
        return F.linear(x, W)

    model.linear = spy
    hidden = model(tokens, seg)
    assert len(seen[("up", 1)]) == 2 and len(seen[("up", 0)]) == 1   # the looped block is visited twice
    for (name, layer), xs in seen.items():
        H = sum(x.T @ x for x in xs) / (layer + 1 if name in ("qkv", "up") else 1)  # whose scale stands in the product
        torch.testing.assert_close(stats[f"{name}.H"][layer] / 150, H, rtol=1e-3, atol=1e-3)
    # embed.g against the diagonal of the Fisher, by automatic differentiation of each label's loss.
    z = F.linear(hidden, model.embed.weight).detach().requires_grad_()
    log_p = lambda c: (30 * torch.tanh(z / 30)).log_softmax(-1)[:, c]
    fisher = sum(log_p(c).exp().detach()[:, None] * torch.autograd.grad(log_p(c).sum(), z)[0] ** 2
                 for c in range(64)).sum(0)
    torch.testing.assert_close(stats["embed.g"] / 150, fisher, rtol=1e-3, atol=1e-4)


# ---- whole runs


def write_dataset(folder, n_tokens=4000):
    """A dataset folder as the README of data/ describes it, of random documents in the demo's tokens."""
    folder.mkdir()
    tokenizer = (ROOT / "data/demo_tokenizer.json").read_bytes()
    files = {"tokenizer.json": tokenizer}
    for name, seed in (("train_000000.bin", 0), ("val_000000.bin", 1)):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, n_tokens
        files[name] = header.tobytes() + train_gpt.synthetic_tokens(1024, n_tokens, seed).tobytes()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "meta.json").write_text(json.dumps({
        "name": "mine", "vocab_size": 1024, "val_bytes": 9000, "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "files": {name: {"bytes": len(content)} for name, content in files.items()}}))


def test_the_file_alone_in_a_folder_trains_alike_on_any_number_of_ranks(tmp_path, monkeypatch):
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    write_dataset(tmp_path / "mine")
    flags = [*RUN, "--data=mine", "--max_steps=6", "--loop_at=0.5"]
    names = {"a": 1, "b": 1, "four": 4}
    for process in [start("train_gpt.py", *flags, f"--run={name}", ranks=ranks, cwd=tmp_path)
                    for name, ranks in names.items()]:
        end(process)
    losses = {name: [x["val_loss"] for x in metrics(tmp_path, name, "val")]
              + [x["train_loss"] for x in metrics(tmp_path, name, "step")] for name in names}
    saved = {name: train_gpt.load_checkpoint(tmp_path / "runs" / name / "checkpoint.pt") for name in names}
    assert losses["a"] == losses["b"] and len(losses["a"]) == 2 + 5
    assert all(torch.equal(v, saved["b"]["weights"][k]) for k, v in saved["a"]["weights"].items())
    assert np.allclose(losses["four"], losses["a"], atol=1e-4), losses
    assert saved["four"]["stats"]["tokens"] >= saved["a"]["stats"]["tokens"] == 256
    assert saved["a"]["run"]["finished"] and saved["a"]["run"]["steps"] == 6
    monkeypatch.chdir(tmp_path)
    assert Path("runs/a/source/train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert pack.main(["a"]) == 0
    with pytest.raises(ValueError, match="--run=a"):
        train_gpt.main([*flags, "--run=a"])
    for name, words in (("val_000000.bin", "val_000000.bin"), ("tokenizer.json", "tokenizer.json")):
        content = Path("mine", name).read_bytes()
        Path("mine", name).write_bytes(content[:-2])
        with pytest.raises(ValueError, match=words):
            train_gpt.main([*flags, "--run=damaged"])
        Path("mine", name).write_bytes(content)
    with pytest.raises(ValueError, match="--row_tokens"):
        train_gpt.main([*flags, "--run=short", "--row_tokens=8192", "--batch_tokens=8192"])


def test_the_clock_holds_and_a_signal_ends_training_with_a_good_checkpoint(tmp_path):
    timed, stopped, alone = (start_training(tmp_path, f"--max_seconds={seconds}", f"--run={name}", "--log_every=1")
                             for name, seconds in (("timed", 4), ("stopped", 100), ("alone", 4)))
    alone.stdout.close()                                             # its terminal has gone
    for process, run in ((stopped, "stopped"), (alone, "alone")):
        lines = tmp_path / "runs" / run / "metrics.jsonl"
        wait_for(lambda: lines.exists() and lines.read_text().count('"kind": "step"') >= 6, process)
    alone.send_signal(signal.SIGHUP)
    stopped.send_signal(signal.SIGTERM)
    end(stopped)
    saved = train_gpt.load_checkpoint(tmp_path / "runs/stopped/checkpoint.pt")
    assert not saved["run"]["finished"] and saved["stats"] and saved["run"]["train_seconds"] < 60
    assert alone.wait(400) == 0
    end(timed)
    for run, reason in (("timed", "finished"), ("stopped", "stopped early as asked"), ("alone", "finished")):
        [last] = metrics(tmp_path, run, "end")
        assert (last["reason"], last["exit_code"]) == (reason, 0)
    [summary], steps = (metrics(tmp_path, "timed", kind) for kind in ("summary", "step"))
    assert 2 < summary["train_seconds"] < 4 + 2 * max(s["step_ms"] for s in steps) / 1000


def test_a_loss_that_is_not_finite_stops_the_run_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train_gpt.main([*RUN, "--max_steps=50", "--run=nan", "--embed_lr=1e18", "--scalar_lr=1e18"])
    assert stopped.value.code == 3 and "last good" in capsys.readouterr().out
    [last] = metrics(tmp_path, "nan", "end")
    assert "loss is" in last["reason"] and last["exit_code"] == 3


def test_bad_flags_and_shapes_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag, word in (("--layers=3", "--layers"), ("--n_layer=x", "n_layer"), ("--n_head=3", "--n_head"),
                       ("--n_kv_head=3", "--n_kv_head"), ("--batch_tokens=1000", "--batch_tokens"),
                       ("--seq_len=0", "--seq_len"), ("--matrix_lr=-1", "--matrix_lr"), ("--data=nowhere", "docs PATH"),
                       ("--matrix_lr=nan", "--matrix_lr"), ("--two_lane_from=0", "--two_lane_from"),
                       ("--device=tpu", "--device"), ("--run=../up", "--run"), ("--preset=big", "--preset"),
                       ("--seed=18446744073709551616", "--seed"), ("--resume=x", "no other flag"),
                       ("--preset=record", "data/prepare.py fineweb")):
        with pytest.raises(ValueError) as error:
            train_gpt.main([flag] if flag == "--preset=record" else [*RUN, flag])
        assert word in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError, match="no such run"):
        train_gpt.main(["--resume=x"])
    for environment in ({"RANK": "1"}, {"RANK": "", "WORLD_SIZE": "2"}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"},
                        {"RANK": "0", "LOCAL_RANK": "abc", "WORLD_SIZE": "1"}):
        _, err = end(start_training(tmp_path, "--max_steps=1", **environment), code=2)
        assert "torchrun sets all three" in err and err.count("\n") == 1


def test_a_damaged_checkpoint_is_refused_and_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "checkpoint.pt"
    content = {"config": asdict(Config(**TINY)), "stats": {}, "run": {}, "tokenizer": ""}
    train_gpt.write_checkpoint(path, weights=model.state_dict(), **content)
    good = path.read_bytes()
    assert torch.equal(train_gpt.load_checkpoint(path)["weights"]["up"], model.up)
    broken, places = tmp_path / "broken.pt", np.random.default_rng(0).integers(0, len(good), 60)
    for bad in [*(good[:n] for n in (0, 10, len(good) - 1)), *(flip(good, at) for at in places)]:
        broken.write_bytes(bad)
        try:  # a flip may hit padding, which changes nothing; never the weights
            loaded = train_gpt.load_checkpoint(broken)
        except ValueError as error:
            assert "broken.pt" in str(error) and "\n" not in str(error)
        else:
            assert all(torch.equal(v, loaded["weights"][k]) for k, v in model.state_dict().items())

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="checkpoint.pt.*No space"):
        train_gpt.write_checkpoint(path, weights=tiny_model(1).state_dict(), **content)
    assert path.read_bytes() == good and list(tmp_path.glob(".*")) == []


@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())
def flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
                  max_len: int) -> torch.Tensor:
    return dense_attention(q, k, v, train_gpt.Segments(cu_q, None, max_len))


@torch.library.custom_op("flash_attn_3::_flash_attn_backward", mutates_args=())
def flash_backward(dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor,
                   max_len: int) -> list[torch.Tensor]:
    at, group = torch.arange(len(q)), q.size(1) // k.size(1)
    segment = torch.searchsorted(cu[1:].contiguous(), at.int(), right=True)
    seen = (segment[:, None] == segment) & (at[:, None] >= at)
    wide = lambda x: x.repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->hts", q, wide(k)) * q.size(2) ** -0.5
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    dp = torch.einsum("thd,shd->hts", dy, wide(v))
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * q.size(2) ** -0.5
    dq, dk, dv = (torch.einsum(path, a, b) for path, a, b in (
        ("hts,shd->thd", ds, wide(k)), ("hts,thd->shd", ds, q), ("hts,thd->shd", p, dy)))
    return [dq.contiguous(), *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))]


flash_forward.register_fake(lambda q, *_: torch.empty_like(q))
flash_backward.register_fake(lambda dy, q, k, v, *_: [torch.empty_like(x) for x in (q, k, v)])


class Flash(torch.autograd.Function):
    """FlashAttention-3's interface: an autograd.Function over operators of its own."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_len):
        ctx.save_for_backward(q, k, v, cu_q, cu_k)
        ctx.max_len = max_len
        return flash_forward(q, k, v, cu_q, cu_k, max_len)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, cu, _ = ctx.saved_tensors
        return *flash_backward(dy.contiguous(), q, k, v, cu, ctx.max_len), None, None, None


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, causal):
    return Flash.apply(q, k, v, cu_q, cu_k, max_seqlen_q)


@pytest.mark.parametrize("flash", (True, False))
def test_what_only_a_gpu_compiles_is_compiled_in_the_warm_up_and_never_after(tmp_path, monkeypatch, flash):
    graphs, ready, compiler, warm_up = [], [], torch.compile, train_gpt.warm_up

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    def tokens(vocab, n, seed):  # shards of documents like the web's, and of two tokens each
        tokens = np.random.default_rng(seed).integers(1, vocab, min(n, 4000), dtype=np.uint16)
        tokens[::2 if seed % 2 else 70] = 0
        return tokens

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "warm_up", lambda *args: (warm_up(*args), ready.append(len(graphs)))[0])
    monkeypatch.setattr(train_gpt, "synthetic_tokens", tokens)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    kernel = dense_attention
    if flash:
        interface = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
        kernel = train_gpt.pick_attention(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(train_gpt, "pick_attention", lambda *_: kernel)
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=backend, **how))
    torch.compiler.reset()
    shape = {"n_layer": 2, "loop_first": 0, "loop_last": 0, "loop_passes": 2, "two_lane_from": 1, "row_tokens": 576,
             "batch_tokens": 1152}
    run = {"max_steps": 12, "val_points": 3, "log_every": 1, "run": "compiled"}
    assert train_gpt.main([*RUN, *(f"--{k}={v}" for k, v in (shape | run).items())]) == 0
    # losses: looped or not, with gradients or without. Newton-Schulz: down, up, q, k and v, o.
    assert ready == [4 + 5] and len(graphs) == 4 + 5
    assert metrics(tmp_path, "compiled", "step")[-1]["step"] == 12 and len(metrics(tmp_path, "compiled", "val")) == 3
    assert f"attention:{kernel.__name__} " in Path("runs/compiled/log.txt").read_text()
    assert kernel.__name__ == ("fa3" if flash else "dense_attention")
    assert train_gpt.load_checkpoint("runs/compiled/checkpoint.pt")["stats"]


def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path, monkeypatch):
    flags = ["--max_steps=20", "--save_every=0.02", "--val_points=2", "--log_every=1"]
    whole, killed = (start_training(tmp_path, *flags, f"--run={name}", ranks=2) for name in ("whole", "killed"))
    monkeypatch.chdir(tmp_path)
    wait_for(Path("runs/killed/state.pt").exists, killed)
    with pytest.raises(ValueError, match="by another process"):
        train_gpt.main(["--resume=killed"])
    ranks = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True).stdout.split()
    for pid in (killed.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    killed.communicate()
    end(start_training(tmp_path, "--resume=killed", ranks=2, shape=()))
    end(whole)
    whole, resumed = (train_gpt.load_checkpoint(f"runs/{name}/checkpoint.pt") for name in ("whole", "killed"))
    assert len(metrics(tmp_path, "killed", "resume")) == 1
    assert int(re.search(r"resumed at step (\d+)", Path("runs/killed/log.txt").read_text())[1]) > 0
    for kind in ("weights", "stats"):
        assert all(torch.equal(x, resumed[kind][k]) for k, x in whole[kind].items())
    assert (whole["run"]["resumed"], resumed["run"]["resumed"]) == (0, 1)
    assert {*os.listdir("runs/killed")} == {"checkpoint.pt", "log.txt", "metrics.jsonl", "source"}
    with pytest.raises(ValueError, match="nothing to go on from"):
        train_gpt.main(["--resume=killed"])


def test_a_row_that_does_not_fit_is_halved_and_the_batch_stays(tmp_path, monkeypatch, capsys):
    losses = GPT.losses

    def limited(self, tokens, *rest):
        if len(tokens) > fits:
            raise RuntimeError("CUDA out of memory: a fake one")
        return losses(self, tokens, *rest)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GPT, "losses", limited)
    fits = 64
    assert train_gpt.main([*RUN, "--max_steps=2", "--run=small", "--val_points=1"]) == 0
    assert "--row_tokens=128 does not fit into memory: 64" in capsys.readouterr().out
    saved = train_gpt.load_checkpoint(tmp_path / "runs/small/checkpoint.pt")
    assert saved["config"].row_tokens == 64 and saved["run"]["tokens"] == 2 * 512
    fits = 0
    with pytest.raises(ValueError, match="--row_tokens"):
        train_gpt.main([*RUN, "--max_steps=2", "--run=none"])


# ----------------------------------------------------------------------------------------------------------------------
# Text and tokens


DEMO_PATH = ROOT / "data" / "demo_tokenizer.json"
DEMO = DEMO_PATH.read_bytes()


def prepare_main(monkeypatch, root, *args):
    """Runs `prepare.py ARGS` in this process with data/ under `root`, one worker."""
    monkeypatch.setattr(prepare, "ROOT", root)
    workers = ["--workers=1"] * (args[0] in ("docs", "fineweb"))
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args), *workers])
    (root / "data").mkdir(exist_ok=True)
    prepare.main()


def words(n, seed):
    """n documents of random English-looking text."""
    rng = random.Random(seed)
    some = "the of and to in a is that it was for on are with as I his they be at one have NASA McDonald".split()
    return [" ".join(rng.choices(some, k=rng.randint(20, 60))).capitalize() + f", number {seed}.{i}." for i in range(n)]


ODD = ["x", "é", "👩‍👩‍👧 naïve", "a\r\nb\rc\n", "\ufeff\x00\u2028 NASA PDFs", "long " * 60, "tail  "]
TEXTS = ODD + [f"Document {i}: the quick brown fox number {i * 7919} jumps over " + "the lazy dog, again. " * (i % 5)
               for i in range(13)]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A `docs` dataset with the demo tokenizer, of 60 documents for training and TEXTS for validation -> its folder."""
    root = tmp_path_factory.mktemp("data")
    for name, texts in (("train", words(60, 1)), ("val", TEXTS)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        prepare_main(patch, root, "docs", root / "train.jsonl", f"--val_path={root / 'val.jsonl'}", "--name=odd",
                     f"--tokenizer={DEMO_PATH}")
    return root / "data/odd"


# ---- the tokenizer and the text rule


def unicode_strings(n, seed):
    rng = random.Random(seed)
    pools = ["aAbBsSzZ  IC", "CUL ULC", "\t\n\r ", "0123.,'’\"-", "éÉßẞİıǅΣσςЖжﬁ",
             "\0\x01\x0b\x1c\x7f\x85\u200b\u2028\ufeff\ufffd\ufffe"]
    for _ in range(n):
        yield "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) if rng.random() < 0.1
                      else rng.choice(rng.choice(pools)) for _ in range(rng.randrange(40)))


@pytest.mark.parametrize("pattern", [None, "[a-z]+"])    # the second has holes
def test_tokenizer_gives_every_unicode_string_back(pattern):
    tokenizer = Tokenizer(json.dumps(json.loads(DEMO) | ({"pattern": pattern} if pattern else {})).encode())
    texts = [*unicode_strings(8000, 7), "", "\0", "C the U nasa L", "A" * 999, "HTTPServer PDFs USA's iPhone A I" * 9,
             "the" * 5000, " " * 100_000]
    for text, lower, tokens in zip(texts, lower_case(texts), tokenizer.encode_batch(texts), strict=True):
        assert restore_case(lower) == text and lower_case([text]) == [lower]
        assert tokenizer.decode(tokens) == text and np.flatnonzero(tokens == tokenizer.boundary).tolist() == [0]
        assert tokens.dtype == np.uint16 and tokens.max() < tokenizer.vocab_size
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts[:500])


def test_case_costs_one_token_before_the_space():
    assert lower_case([" The THE camelCase PDFs I", "HTTPServer PDFsize"]) == ["C theU the camelCcaseU pdfLsC i",
                                                                              "UhttpCserverU pdCfsize"]
    tokenizer = Tokenizer(DEMO)
    plain, title, upper = (tokenizer.encode("x" + word).tolist() for word in (" return", " Return", " RETURN"))
    assert len(title) == len(upper) == len(plain) + 1 and title[-1:] == upper[-1:] == plain[-1:]


def test_lone_surrogates_and_damaged_tokenizers_are_refused_by_name():
    with pytest.raises(BadInput, match="lone surrogate at character 1"):
        Tokenizer(DEMO).encode("x\ud800")
    spec = json.loads(DEMO)
    changes = ({"pieces": ["th", "th"], "phrases": []}, {"pieces": ["\u2019"]}, {"phrases": [[1, 9999]]},
               {"phrases": [[1]]}, {"pattern": "("}, {"format": 2},
               {"phrases": [[1, 2]] * 5000}, {"pieces": [], "phrases": [[220 + n, 220 + n] for n in range(60)]})
    for blob in (b"", DEMO[:-40], b"[]", b"{}", *(json.dumps(spec | change).encode() for change in changes)):
        with pytest.raises(BadInput, match="tokenizer.json"):
            Tokenizer(blob)


def test_training_a_tokenizer_is_deterministic():
    pytest.importorskip("tokenizers")
    texts = words(300, 5)
    first, second = (train_tokenizer(lambda: iter(texts), 300, 10, "x") for _ in range(2))
    tokenizer = Tokenizer(first)
    assert first == second and tokenizer.vocab_size == 300
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    assert any(b" " in piece[1:] for piece in tokenizer.pieces[tokenizer.first_phrase:])


def test_nmt_nfkc_is_sentencepieces_on_every_character_and_on_marks_hangul_and_kana():
    assert nmt_nfkc("  Ａ\u00a0\ufb01ne\u200b \x07 e\u0301\u2581x\t\n½ \u00b4 ～ ") == "A fine é x 1\u20442 \u0301 ～"
    assert nmt_nfkc("ｶﾞ \u1100\u1161\u11a8 q\u0307\u0323 \U0001e030\U0001ccd6\u0301") == "ガ 각 q\u0307\u0323 аÁ"
    rng, every = random.Random(3), [*range(0xD800), *range(0xE000, 0x30000)]
    ranges = ([(0x300, 0x34F), (0x3099, 0x309B), (0x1161, 0x1176), (0x11A8, 0x11C3)],
              [(0x3000, 0x3400), (0x1100, 0x1113)], [(0xFF00, 0xFFF0)])
    pools = ["aeoAEOU  \u3000\u00b4<=", *([chr(code) for span in spans for code in range(*span)] for spans in ranges)]
    mixed = ("".join(rng.choice(rng.choice(pools)) for _ in range(12)) for _ in range(20_000))
    for mapped, digest in (  # those of sentencepiece 0.2.3; on Python 3.11 to 3.13
            (nmt_nfkc("".join(f"x{chr(code)}x" for code in every)),
             "bbd13d1196b727c036a5a24f8f5cf4a2144e7eae652feff13cb608ad50bde803"),
            ("".join(map(nmt_nfkc, mixed)), "41e3e024b32953030e29bdb9e5b9401ed8e03f4d7166f28cca61a9b28223b3c3")):
        assert hashlib.sha256(mapped.encode()).hexdigest() == digest


# ---- datasets


def test_a_dataset_holds_its_documents_exactly(dataset):
    meta, tokenizer = read_meta(dataset), Tokenizer((dataset / "tokenizer.json").read_bytes())
    for split, texts in (("train", words(60, 1)), ("val", TEXTS)):
        shards = sorted(dataset.glob(f"{split}_*.bin"))
        tokens = np.concatenate([read_shard(path, meta["vocab_size"]) for path in shards])
        starts = np.flatnonzero(tokens == tokenizer.boundary)
        assert [tokenizer.decode(part) for part in np.split(tokens, starts)[1:]] == texts
        counts = len(texts), len(tokens), sum(len(text.encode()) for text in texts)
        assert counts == tuple(meta[f"{split}_{unit}"] for unit in ("docs", "tokens", "bytes"))
    assert list(read_val_docs(dataset, meta)) == TEXTS and list(read_val_docs(dataset, meta, 2)) == TEXTS[:2]
    framed = b"".join(len(text.encode()).to_bytes(8, "little") + text.encode() for text in TEXTS)
    assert meta["val_docs_sha256"] == hashlib.sha256(framed).hexdigest()


def test_a_damaged_dataset_is_refused_by_file_name(dataset, tmp_path, monkeypatch):
    """By whoever opens it, by whoever reads that file, or by `prepare.py verify`, which sees every flip."""
    folder = Path(shutil.copytree(dataset, tmp_path / "copy"))
    meta, zip, unzip = read_meta(folder), zstandard.compress, zstandard.decompress
    read_docs = lambda folder: list(read_val_docs(folder, meta))
    read_train = lambda folder: read_shard(folder / "train_000000.bin", meta["vocab_size"])
    verify = lambda folder: prepare_main(monkeypatch, tmp_path, "verify", folder)
    edit = lambda old, new: lambda data: data.replace(old, new, 1)
    for read, name, damage, message in (
            (read_meta, "train_000000.bin", lambda data: data[:-2], "bytes, but meta.json says"),
            (read_meta, "val_docs.jsonl.zst", lambda data: data + b"x", "bytes, but meta.json says"),
            (read_meta, "val_000000.bin", lambda data: b"\1" + data[1:], "not a token shard"),
            (read_meta, "val_000000.bin", lambda data: data[:8] + b"\5\0\0\0" + data[12:], "header says 5 tokens"),
            (read_meta, "tokenizer.json", edit(b"demo", b"dome"), "tokenizer_sha256"),
            (read_meta, "meta.json", lambda data: data[:-9], "not JSON"),
            (read_meta, "meta.json", edit(b'"train_tokens": ', b'"train_tokens": 1'), "train_tokens is"),
            (read_meta, "meta.json", edit(b'"val_bytes": ', b'"val_bytes": -'), "val_bytes"),
            (read_meta, "meta.json", edit(b'"train_000000.bin"', b'"../train.bin"'), "bad entry"),
            (read_meta, "meta.json", edit(b'"format": 1', b'"format": 2'), "format 2"),
            (read_docs, "val_docs.jsonl.zst", lambda data: data[:-9], ""),
            (read_docs, "val_docs.jsonl.zst", lambda data: zip(b'{"text": "x"}\n'), ""),
            (read_docs, "val_docs.jsonl.zst", lambda data: zip(edit(b"the", b"teh")(unzip(data, 1 << 20))), ""),
            (read_docs, "val_docs.jsonl.zst", lambda data: unzip(data, 1 << 20), ""),
            (read_train, "train_000000.bin", lambda data: data[:1024] + b"\xff\x7f" + data[1026:], "is outside"),
            (verify, "train_000000.bin", lambda data: flip(data, 1034), "its sha256"),
            (verify, "meta.json", edit(b'"train_docs": 60', b'"train_docs": 61'), "train_docs is")):
        whole = (folder / name).read_bytes()
        read(folder)
        (folder / name).write_bytes(damage(whole))
        with pytest.raises(BadInput, match=f"{name}.*{message}|{message}" if message else name):
            read(folder)
        (folder / name).write_bytes(whole)


def test_demo_is_deterministic_and_disjoint(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "DEMO_TRAIN_BYTES", 200_000)
    metas = []
    for name in "ab":
        (tmp_path / name).mkdir()
        prepare_main(monkeypatch, tmp_path / name, "demo")
        metas.append(read_meta(tmp_path / name / "data" / "demo"))
    assert metas[0] == metas[1] and 100_000 < metas[0]["val_tokens"] < 300_000
    val, train = prepare.demo_documents()
    assert not {*val} & {*train} and not any("/usr/" in text and "sysconfigdata" in text for text in val + train)


def test_docs_names_every_document_that_it_skips(tmp_path, monkeypatch, capsys):
    good = [json.dumps({"text": text}) for text in words(20, 2)]
    bad = ['{"text": "x"', '{"no": 1}', "[]", r'{"text": "\ud800"}', '{"text": " "}', ""]
    lines = [*good[:10], *bad, good[0], *good[10:]]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n')
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff")
    (tmp_path / "in" / "c.jsonl.zst").write_bytes(zstandard.compress(json.dumps({"text": "one more"}).encode()))
    flags = ["docs", tmp_path / "in", f"--tokenizer={DEMO_PATH}", "--val_docs=5"]
    prepare_main(monkeypatch, tmp_path, *flags, "--name=d")
    meta = read_meta(tmp_path / "data" / "d")
    assert (meta["val_docs"], meta["train_docs"]) == (5, 16)
    skipped = [line.split("in/")[1] for line in (tmp_path / "data" / "d" / "skipped.txt").read_text().splitlines()]
    assert sorted(skipped) == ["a.jsonl:11: bad JSON", "a.jsonl:12: no text", "a.jsonl:13: no text",
                               "a.jsonl:14: lone surrogate", "a.jsonl:15: empty", "a.jsonl:16: empty",
                               "a.jsonl:17: duplicate", "a.jsonl:28: not UTF-8", "b.txt: not UTF-8"]
    assert "skipped 9: " in capsys.readouterr().out
    for more, message in (("--name=e --on_bad=refuse", "a.jsonl:11: bad JSON"), ("--name=d", "is there already"),
                          ("--name=../e", "--name"), ("--name=e --val_docs=99", "only 21 good documents"),
                          ("--name=e --val_path=none", "not with --val_path"),
                          ("--name=e --vocab_size=x", "--vocab_size"), ("--name=e --phrases=9999", "--phrases"),
                          ("--name=e --tokenizer=none", "--tokenizer=none"),
                          ("--name=e --nmae=3", "--nmae=3")):
        with pytest.raises(BadInput, match=message):
            prepare_main(monkeypatch, tmp_path, *flags, *more.split())
    assert os.listdir(tmp_path / "data") == ["d"]


# ---- FineWeb, against a stand-in for the hub's client


class Hub:
    """What hub.py uses of huggingface_hub; each fault is of one download of the documents."""

    def __init__(self, texts):
        docs = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        self.texts, self.faults, self.sha = texts, [], {}
        self.files = {hub_files.DOCS: docs,
                      hub_files.SIDECAR: json.dumps({"docs_sha256": hashlib.sha256(docs).hexdigest()}).encode()}

    def HfApi(self, endpoint):
        return self

    def repo_info(self, repo, *, repo_type):
        return SimpleNamespace(sha="c" * 40)

    def get_paths_info(self, repo, names, *, repo_type, revision):
        sha = lambda name: self.sha.get(name) or hashlib.sha256(self.files[name]).hexdigest()
        return [SimpleNamespace(size=len(self.files[name]), lfs=SimpleNamespace(sha256=sha(name)))
                for name in names if name in self.files and revision == "c" * 40]

    def hf_hub_download(self, repo, name, *, repo_type, revision, local_dir, endpoint):
        fault, data = self.faults.pop(0) if self.faults and name == hub_files.DOCS else None, self.files[name]
        if fault == 503:
            raise ConnectionError("503 Server Error")
        (local_dir / name).parent.mkdir(exist_ok=True)
        (local_dir / name).write_bytes({"wrong": data[::-1], "short": data[:len(data) // 2]}.get(fault, data))


@pytest.fixture()
def hub(monkeypatch):
    """A hub of 400 documents. Of the 40 of validation two are alike, and two others come again in training."""
    texts = words(400, 11)
    texts[7], texts[100], texts[200] = texts[8], texts[3], "  " + texts[4]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub(texts))
    monkeypatch.setattr(hub_files, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(hub_files, "TRIES", 3)
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 8000)
    monkeypatch.setattr(prepare, "FINEWEB_VAL_DOCS", 40)
    monkeypatch.setattr(prepare, "FINEWEB_VAL_BYTES", sum(len(nmt_nfkc(text).encode()) for text in texts[:40]))
    return hub


FINEWEB = ["fineweb", f"--tokenizer={DEMO_PATH}"]


def test_fineweb_survives_faults_and_splits_at_the_frozen_document(hub, tmp_path, monkeypatch, capsys):
    hub.faults = [503, "wrong"]
    prepare_main(monkeypatch, tmp_path, *FINEWEB)
    folder = tmp_path / "data" / "fineweb"
    meta = read_meta(folder)
    assert list(read_val_docs(folder, meta)) == [nmt_nfkc(text) for text in hub.texts[:40]]
    assert meta["train_docs"] == 358 and "2 documents left out of train" in capsys.readouterr().out
    assert meta["text_rule"] == "nmt_nfkc" and len(list(folder.glob("train_*.bin"))) > 3


def test_fineweb_stops_and_continues_to_the_same_files(hub, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    prepare_main(monkeypatch, tmp_path / "a", *FINEWEB)
    real, calls = prepare.write_shard, []

    def full_disk(path, tokens):
        calls.append(path)
        if len(calls) == 4:
            raise BadInput(f"{path}: No space left on device")
        real(path, tokens)
    monkeypatch.setattr(prepare, "write_shard", full_disk)
    with pytest.raises(BadInput, match="No space left"):
        prepare_main(monkeypatch, tmp_path / "b", *FINEWEB)
    with pytest.raises(BadInput, match="begun with another tokenizer"):
        prepare_main(monkeypatch, tmp_path / "b", *FINEWEB, "--text_rule=raw")
    prepare_main(monkeypatch, tmp_path / "b", *FINEWEB, "--train_tokens=9000")
    part = read_meta(tmp_path / "b" / "data" / "fineweb")
    assert 9000 <= part["train_tokens"] < 9200
    assert len(calls) == len({*calls}) + 1, "finished shards are not written again"
    prepare_main(monkeypatch, tmp_path / "b", *FINEWEB)
    whole = [read_meta(tmp_path / name / "data" / "fineweb") for name in "ab"]
    for key in ("train_tokens", "train_bytes", "val_docs_sha256"):
        assert whole[0][key] == whole[1][key]
    (tmp_path / "b" / "data" / "fineweb" / "train_000001.bin").unlink()
    with pytest.raises(BadInput, match="train_000001.bin"):
        prepare_main(monkeypatch, tmp_path / "b", *FINEWEB)


@pytest.mark.parametrize("break_it, words", [
    (lambda hub: hub.faults.extend(["short"] * 9), r"docs_selected.jsonl: .*3 times.; run the command again"),
    (lambda hub: hub.faults.extend([503] * 9), r"docs_selected.jsonl: .*503.*3 times"),
    (lambda hub: hub.sha.update({hub_files.DOCS: "f" * 64}), "the hub says .* ffff"),
    (lambda hub: hub.files.update({hub_files.SIDECAR: b'{"docs_sha256": "0"}'}), "docs_sha256 is 0"),
    (lambda hub: hub.files.update({hub_files.SIDECAR: b"{}"}), "no docs_sha256"),
    (lambda hub: hub.files.pop(hub_files.DOCS), "the hub has no"),
    (lambda hub: setattr(prepare, "FINEWEB_VAL_BYTES", prepare.FINEWEB_VAL_BYTES * 2), "would not compare"),
    (lambda hub: setattr(hub_files.shutil, "disk_usage", lambda path: argparse.Namespace(free=5)),
     "the disk has 5 left"),
])
def test_fineweb_refuses_what_it_cannot_trust(hub, tmp_path, monkeypatch, break_it, words):
    monkeypatch.setattr(prepare, "FINEWEB_VAL_BYTES", prepare.FINEWEB_VAL_BYTES)   # both are put back after the test
    monkeypatch.setattr(hub_files.shutil, "disk_usage", hub_files.shutil.disk_usage)
    break_it(hub)
    with pytest.raises(BadInput, match=words):
        prepare_main(monkeypatch, tmp_path, *FINEWEB)
    assert not (tmp_path / "data" / "fineweb" / "meta.json").exists()


def test_a_pool_of_workers_gives_what_one_process_gives(monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_BYTES", 2000)
    source = prepare.texts_source(words(60, 8), "x")
    one, two = ([docs for _, docs in prepare.process(source(), DEMO, "nmt_nfkc", workers)] for workers in (1, 2))
    assert len(one) > 3 and repr(one) == repr(two)


# ----------------------------------------------------------------------------------------------------------------------
# Packing


@pytest.fixture(scope="session")
def run_to_pack(tmp_path_factory):
    """A run folder with the checkpoint of a small random model and its statistics."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    tokenizer = Tokenizer(DEMO)
    model = tiny_model(vocab_size=tokenizer.vocab_size, seq_len=24, row_tokens=96, batch_tokens=96, data="synthetic")
    tokens = torch.from_numpy(synthetic_tokens(tokenizer.vocab_size, 513, seed=1).astype(np.int64))
    row = tokens[:-1], tokens[1:], make_segments(np.arange(0, 512, 60), 512, 24)
    stats = train_gpt.calibrate(model, SimpleNamespace(next=lambda seq_len: row), 8, 0)
    train_gpt.save_checkpoint(folder / "checkpoint.pt", model.cfg, model, SimpleNamespace(tokenizer=tokenizer), stats,
                              {"steps": 1})
    return folder


@pytest.fixture(scope="session")
def packed_run(run_to_pack):
    """The same folder after pack.py, with what it printed."""
    with redirect_stdout(io.StringIO()) as out:
        assert pack.main([str(run_to_pack)]) == 0
    return run_to_pack, out.getvalue()


def gaussian_matrix(rows=384, n=256):
    """A random matrix with a skewed Hessian and sensitivities."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator)
    x = rand(4 * n, n) @ rand(n, n) * n ** -0.5 * (rand(n).abs() + 0.1)
    return rand(rows, n), (x.mT @ x / len(x)), rand(rows) ** 2


SCALAR = np.zeros((1, 2), np.int32)                                  # a trellis of one state: plain rounding


def coded(values, trellis):
    """values (R, n) -> bytes of their code without the lanes' start-up; decoded they are the same."""
    row, col = pack.scales(values[None])
    words, escapes, _ = pack.encode([values[None]], [row], [col])
    pieces = pack.decode(words, escapes, [values[None].shape], [row], [col], trellis)
    assert np.array_equal(np.concatenate([piece.T for *_, piece in pieces]), values)
    return 2 * (len(words) - pack.count_lanes([values[None].shape]))   # half of each lane's state is start-up


def test_probabilities_are_the_same_on_every_machine():
    radius, freq, start, symbol = pack.tables()
    used = np.arange(freq.shape[1]) < 2 * radius[:, None] + 2
    assert (freq.sum(1) == 1 << pack.BITS).all() and (freq[used] > 0).all()
    digest = hashlib.sha256(freq.astype("<u4").tobytes() + radius.astype("<i4").tobytes()).hexdigest()
    assert digest == "c5f407dd8e9544a43f74ce6e2a98d42ed43d9cc306c31ce75a6c3fdf078a37ca"


def test_coder_returns_every_value_and_wastes_nothing():
    rng = np.random.default_rng(0)
    shapes, values = [(2, 300, 200), (1, 1, 7), (3, 40, 50)], []
    for L, R, n in shapes:
        sigma = 2 ** (rng.normal(1, 1, (L, R, 1)) + rng.normal(0, 1, (L, 1, n)))
        target, state, v = rng.standard_normal((L, R, n)) * sigma, np.zeros((L, R), int), np.zeros((L, R, n), np.int32)
        for j in range(n):                                           # values that a trellis can make
            k = np.rint(target[..., j] - (state & 1) / 2).astype(int)
            v[..., j], state = 2 * k + (state & 1), pack.TRELLIS[state, k & 1]
        values.append(v)
    values[0][0, 5, 100] += 4 * 10 ** 6                              # far outside of any table
    rows, cols = zip(*[pack.scales(v) for v in values])
    words, escapes, histogram = pack.encode(values, rows, cols)
    out = [np.full((L * R, n), -1) for L, R, n in shapes]
    for bank, piece, _, v in pack.decode(words, escapes, shapes, rows, cols):
        out[bank][piece] = v.T
    assert all((a == b.reshape(a.shape)).all() for a, b in zip(out, values)) and 10 ** 6 < np.abs(escapes).max()
    for cut in ((words[:-1], escapes), (np.append(words, words[:1]), escapes), (words, escapes[:-1])):
        with pytest.raises(ValueError):
            list(pack.decode(*cut, shapes, rows, cols))
    ideal, entropy = pack.entropies(histogram)
    assert 2 * len(words) - 4 * pack.count_lanes(shapes) < 1.005 * ideal.sum()             # the lanes' start-up apart
    assert entropy < ideal.sum() < 1.02 * entropy                    # which has its tables for free


def test_trellis_gains_at_least_0_8_dB_over_scalar_and_statistics_3_dB_more():
    W, H, g = (x[None] for x in gaussian_matrix())
    known, blind = pack.plan(W, H, g), pack.plan(W, torch.eye(256)[None], 1 / W.square().mean(2))

    def measure(bank, constant, trellis):
        """-> KL per weight, and what it is worth in dB: equal for equal quality at 6.02 dB a bit."""
        values = pack.quantise(bank, 0, slice(None), constant, trellis)
        kl = pack.expected_kl(known, torch.from_numpy(pack.dequantise(values, bank.row[0], bank.col, constant)))
        return kl, 10 * np.log10(kl / W.numel()) + 6.0206 * 8 * coded(values, trellis) / W.numel()

    (kl, scalar), (_, trellis), (_, even) = (measure(*x) for x in ((known, 0.05, SCALAR), (known, 0.05, pack.TRELLIS),
                                                                   (blind, 0.3, SCALAR)))
    assert trellis < scalar - 0.8 and scalar < even - 3
    assert 0.6 < kl / (0.05 / pack.constant_for([known], 1.0)) ** 2 < 1.02   # uniform errors at the plan's own price


def test_expected_kl_is_the_measured_one_for_every_bank(run_to_pack):
    checkpoint = train_gpt.load_checkpoint(run_to_pack / "checkpoint.pt")
    model, weights, banks = GPT(checkpoint["config"]), checkpoint["weights"], pack.gather(checkpoint, run_to_pack)
    packed = pack.pack_model(asdict(checkpoint["config"]), weights, banks, 1e-3)
    tokens = torch.from_numpy(synthetic_tokens(1024, 2048, seed=1).astype(np.int64))

    @torch.no_grad()
    def log_p(**changes):
        model.load_state_dict(weights | changes)
        return model.logits(model(tokens, make_segments(np.arange(0, 2048, 60), 2048, 24))).log_softmax(-1)

    for name, bank in zip(pack.split(weights)[0], banks):
        error = log_p() - log_p(**{name: packed.state[name]})
        measured = (log_p().exp() * error).sum(-1).mean().item()
        most = 2 if name == "embed.weight" else 1.25                  # whose two uses are added as if they were apart
        assert 0.8 < measured / pack.expected_kl(bank, packed.state[name]) < most, name


DEGENERATE = {"zeros": lambda W, H, g: W.zero_(), "rank one": lambda W, H, g: W.copy_(W[:1] * W[:, :1]),
              "outliers": lambda W, H, g: W[3, ::4].mul_(1e7), "zero rows": lambda W, H, g: W[::2].zero_(),
              "dead columns": lambda W, H, g: (H[:, ::2].zero_(), H[::2].zero_()), "one row": (1, 40),
              "one column": (48, 1), "no Hessian": lambda W, H, g: H.zero_(), "insensitive": lambda W, H, g: g.zero_()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_matrices_pack(case):
    change = DEGENERATE[case]
    W, H, g = gaussian_matrix(*(change if isinstance(change, tuple) else (48, 40)))
    if callable(change):
        change(W, H, g)
    bank = pack.plan(W[None], H[None], g[None])
    values = pack.quantise(bank, 0, slice(None), 0.05)
    coded(values, pack.TRELLIS)
    error = torch.from_numpy(pack.dequantise(values, bank.row[0], bank.col, 0.05)) - W
    assert error.isfinite().all()
    if case not in ("no Hessian", "insensitive", "dead columns"):
        assert (error.abs() < 20 + 1e-6 * W.abs()).all()


# ---- the file


def test_ledger_accounts_for_every_byte_and_says_when_the_cap_is_far(packed_run):
    folder, out = packed_run
    size = (folder / "artifact.pyz").stat().st_size
    assert f"\nartifact_bytes: {size}\n" in out and "best quality setting" in out and "expected KL" in out
    text = (folder / "pack.txt").read_text()
    rows = [line.split("  ") for line in text.split("\nartifact.pyz")[0].splitlines()[1:]]
    assert sum(int(row[-1].replace(",", "")) for row in rows) == size
    assert {*train_gpt.SOURCES, *GPT.MATRICES, "tokenizer.json"} <= {row[0] for row in rows}
    assert 0.3e-4 < float(re.search(r"statistics: ([\d.]+)", text)[1]) < 1.5e-4    # the best is 1e-4
    cfg, model, tokenizer = pack.load(folder / "artifact.pyz")
    assert not model.training and tokenizer.vocab_size == cfg.vocab_size


def test_an_artifact_that_its_own_code_cannot_load_replaces_nothing(packed_run, tmp_path):
    """The run's train_gpt.py goes into the artifact, and this one makes other weights of it."""
    for name in ("checkpoint.pt", "artifact.pyz"):
        (tmp_path / name).write_bytes((packed_run[0] / name).read_bytes())
    (tmp_path / "source").mkdir()
    (tmp_path / "source/train_gpt.py").write_text((ROOT / "train_gpt.py").read_text() + """
GPT.state_dict = lambda self: {k: v + 1 for k, v in nn.Module.state_dict(self).items()}
""")
    with pytest.raises(RuntimeError, match="does not load as it was packed"):
        pack.main([str(tmp_path)])
    assert (tmp_path / "artifact.pyz").read_bytes() == (packed_run[0] / "artifact.pyz").read_bytes()


def test_file_ends_within_a_twentieth_percent_below_the_cap_and_is_reproducible(run_to_pack, monkeypatch, capsys):
    monkeypatch.setattr(pack, "verify", lambda *_: None)             # a process each; the fixture has done it
    files = []
    for cap in (100_000, 90_000, 100_000):
        assert pack.main([str(run_to_pack), f"--cap_bytes={cap}"]) == 0
        files.append((run_to_pack / "artifact.pyz").read_bytes())
        assert 0.9995 * cap <= len(files[-1]) <= cap
    with zipfile.ZipFile(io.BytesIO(files[2])) as z:
        assert files[0] == files[2] and {i.date_time[0] for i in z.infolist()} == {1980}
    with pytest.raises(BadInput, match="cap_bytes=40000"):
        pack.main([str(run_to_pack), "--cap_bytes=40000"])
    assert (run_to_pack / "artifact.pyz").read_bytes() == files[2]


def test_checkpoint_without_statistics_is_packed_loudly_and_one_that_is_not_finite_is_refused_by_name(
        run_to_pack, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "verify", lambda *_: None)
    load = lambda: torch.load(run_to_pack / "checkpoint.pt", weights_only=True)
    for kind, name in (("weights", "up"), ("stats", "down.H"), ("stats", "tokens")):
        saved = load()
        saved[kind][name].view(-1)[0] = float("nan")
        torch.save(saved, tmp_path / "checkpoint.pt")
        with pytest.raises(BadInput, match=f"checkpoint.pt: {name} is not"):
            pack.main([str(tmp_path)])
    assert not (tmp_path / "artifact.pyz").exists()
    torch.save({**load(), "stats": {}}, tmp_path / "checkpoint.pt")
    assert pack.main([str(tmp_path)]) == 0
    out, (_, model, _) = capsys.readouterr().out, pack.load(tmp_path / "artifact.pyz")
    error = ((model.qkv - load()["weights"]["qkv"]).norm() / model.qkv.norm()).item() ** 2
    assert "NO STATISTICS" in out and 0.5e-4 < error < 1.5e-4        # the squared error, relative, is what is held


def test_damaged_artifacts_end_in_one_line(packed_run, tmp_path):
    data, path = (packed_run[0] / "artifact.pyz").read_bytes(), tmp_path / "artifact.pyz"
    places = np.random.default_rng(0).integers(0, len(data), 200)
    for bad in [*(data[:at] for at in places), *(flip(data, at) for at in places)]:
        path.write_bytes(bad)
        with pytest.raises(BadInput, match="artifact.pyz: damaged"):
            pack.load(path)


def test_forged_artifacts_are_refused_or_load_without_harm(packed_run, tmp_path):
    """With the checksum made to fit, nothing but the lengths' own checks is left."""
    with zipfile.ZipFile(packed_run[0] / "artifact.pyz") as z:
        files, blob = {"tokenizer.json": z.read("tokenizer.json")}, z.read("model.bin")
    rng, path, size = np.random.default_rng(0), tmp_path / "artifact.pyz", struct.unpack_from("<I", blob)[0]
    header, body, refused = json.loads(blob[4:4 + size]), blob[4 + size:], 0
    starts = np.cumsum([0, *header["sections"]])

    def forge(body=body, **changes):
        text = json.dumps({**header, **changes}).encode()
        return struct.pack("<I", len(text)) + text + body

    forged = [forge(**{key: value}) for key in header for value in (0, -1, 1 << 40, 1e308, None, [], {}, "x")]
    forged += [forge(config={**header["config"], key: 1 << 30}) for key in TINY]
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    for i in range(len(header["sections"])):                         # each section a bomb, and cut short
        for part, n in ((bomb, header["escapes"]), (bomb, 1 << 26), (body[starts[i]:starts[i + 1] - 2], 0)):
            lengths = [*header["sections"][:i], len(part), *header["sections"][i + 1:]]
            forged.append(forge(body[:starts[i]] + part + body[starts[i + 1]:], sections=lengths, escapes=n))
    forged = [pack.build_artifact(files, bad) for bad in forged]
    forged.append(pack.build_artifact({"tokenizer.json": bytes(1 << 28)}, blob))
    whole, other = pack.build_artifact(files, blob), []
    for at in rng.integers(0, len(blob), 10):
        other += [pack.build_artifact(files, bad) for bad in (flip(blob, at), blob[:at])]
    for at in rng.integers(len(whole) - 400, len(whole) - 32, 20):   # the zip's own structure
        other.append((bad := flip(whole, at)[:-32]) + hashlib.sha256(bad).digest())
    for bad in forged + other:
        path.write_bytes(bad)
        if bad in forged:
            tracemalloc.start()
        try:
            pack.load(path)
        except BadInput as error:
            assert "\n" not in str(error)
            refused += 1
        if bad in forged:
            assert tracemalloc.get_traced_memory()[1] < 1 << 27
            tracemalloc.stop()
    assert refused > 0.7 * len(forged + other)


def test_bad_input_exits_2_with_one_line(packed_run, tmp_path):
    commands = {(ROOT / "train_gpt.py", "--layers=3"): "train_gpt.py: .*--layers",
                (ROOT / "pack.py", "nothing"): "pack.py: nothing: no such run",
                (packed_run[0] / "artifact.pyz", "--data=nowhere"): "artifact.pyz: no dataset 'nowhere'",
                (ROOT / "data/prepare.py", "docs", "/nowhere", "--name=x"): "prepare.py: /nowhere: not there"}
    for process, words in [(start(*command, cwd=tmp_path), words) for command, words in commands.items()]:
        err = end(process, 2)[1]
        assert re.fullmatch(words + r".*\n", err), err


# ----------------------------------------------------------------------------------------------------------------------
# The judge and the predictors


# A predictor without a model, for the cheats to build on: two documents a round, every token as likely as any other.
FLAT = """
class Flat:
    def __init__(self, cfg, model, device):
        self.V, self.counts = cfg.vocab_size, torch.zeros(cfg.vocab_size)
    def plan(self, lengths):
        rows = np.stack([np.arange(len(lengths)), 0 * lengths, lengths], 1)
        return [rows[i:i + 2] for i in range(0, len(rows), 2)]
    def predict(self, spans, inputs):
        return torch.zeros(len(inputs), self.V)
    def learn(self, targets):
        self.counts = self.counts + torch.bincount(torch.from_numpy(targets), minlength=self.V)
"""


def mine(change, methods=""):
    """Source of a predictor whose even logits are changed by the statements `change`, with other `methods`."""
    return f"""
class Mine(Flat):
    {methods}
    def predict(self, spans, inputs):
        logits, at = Flat.predict(self, spans, inputs), np.arange(len(inputs))
        ends = np.cumsum(spans[:, 2] - spans[:, 1])
        {change.strip().replace(chr(10), chr(10) + 8 * " ")}
        return logits
"""


def make_artifact(packed_run, path: Path, predictor: str = "") -> Path:
    """The packed model; `predictor` is added to the artifact's eval_bpb.py, its class Mine is what predicts."""
    with zipfile.ZipFile(packed_run[0] / "artifact.pyz") as z:
        files = {name: z.read(name) for name in z.namelist()}
    main = files["eval_bpb.py"].decode().split('\nif __name__ == "__main__":')[0]
    choice = 'PREDICTORS = {"mine": Mine}' if predictor else 'PREDICTORS |= {"flat": Flat}'
    files["eval_bpb.py"] = f"{main}{FLAT}{predictor}\n{choice}\n".encode()
    path.write_bytes(pack.build_artifact(files, files.pop("model.bin")))
    return path


@pytest.fixture
def judge(tmp_path, dataset, packed_run, capfd):
    """judge(predictor source, *flags) -> exit code, score.json, what it printed."""
    def judged(predictor="", *flags):
        artifact = make_artifact(packed_run, tmp_path / "artifact.pyz", predictor)
        (tmp_path / "score.json").unlink(missing_ok=True)
        code = eval_bpb.main([str(artifact), f"--data={dataset}", "--device=cpu", *flags])
        return code, json.loads((tmp_path / "score.json").read_text()), capfd.readouterr().out
    return judged


def nats_alone(model, stream, **how):
    """-> nats of stream[1:] after one forward pass over stream[:-1]."""
    tokens = torch.from_numpy(stream)
    hidden = model(tokens[:-1], make_segments(np.array([0]), len(tokens) - 1, len(tokens)), **how)
    return F.cross_entropy(model.logits(hidden), tokens[1:], reduction="none").tolist()


def scoring_model():
    return tiny_model(vocab_size=40, seq_len=24, row_tokens=96).eval().requires_grad_(False)


def run_predictor(predictor, streams, vocab_size):
    """-> nats of every target, {document: [nats]}, through the judge's own loop."""
    lengths, found = np.array([len(s) - 1 for s in streams]), {i: [] for i in range(len(streams))}
    rounds = eval_bpb.check_plan(predictor.plan(lengths), lengths, vocab_size)
    nats = eval_bpb.score(predictor, streams, rounds, list(range(len(rounds))), vocab_size, eval_bpb.Phases())
    for spans, each in zip(rounds, (nats[i] for i in range(len(rounds)))):
        for doc, part in zip(spans[:, 0].tolist(), np.split(each, np.cumsum(spans[:, 2] - spans[:, 1])[:-1])):
            found[doc].extend(part.tolist())
    return found


# ---- exactness


def test_a_uniform_model_scores_log2_of_the_vocabulary_per_token_whatever_it_prints_of_itself(judge):
    code, result, out = judge(mine("") + r"""
def build(path, name, device):
    from pack import load
    print("\x1b[8mno\nval_bpb: 0.000000")
    return Mine(load(path)[0], None, device), "x\n---\nval_bpb: 0.000000\x1b[8m"
""", "--trust")
    tokenizer, n_bytes = Tokenizer(DEMO), sum(len(text.encode()) for text in TEXTS)
    n_targets = sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    assert code == 0 and (result["val_docs"], result["val_bytes"], result["val_tokens"]) == (20, n_bytes, n_targets)
    bpb = n_targets * math.log2(tokenizer.vocab_size) / n_bytes
    assert result["val_bpb"] == pytest.approx(bpb, rel=1e-14) and f"\nval_bpb: {bpb:.6f}" in out
    assert out.count("\nval_bpb: ") == 1 and "\x1b" not in out
    assert set(result["phases"]) >= {"start", "load", "compile", "score", "learn", "total"}


def test_whatever_finite_logits_come_the_probabilities_sum_to_one():
    rng, V = np.random.default_rng(0), 50
    everything = np.arange(V)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = math.log10(torch.finfo(dtype).max)
        for exponent in (-30.0, -3.0, 0.0, 2.0, 4.0, 15.0, 30.0, 100.0, largest - 0.5):
            size = 10.0 ** min(exponent, largest - 0.5)
            rows = [np.full(V, size), np.full(V, -size), size * (everything == 3), -size * (everything == 3),
                    *size * rng.standard_normal((8, V)).clip(-1, 1), size * rng.choice([-1, 1], V), np.zeros(V)]
            for row in rows:
                logits = torch.from_numpy(row).to(dtype)[None].repeat(V, 1)
                nats = eval_bpb.count_nats(logits, everything, V).numpy()
                assert (nats >= 0).all() and math.fsum(np.exp(-nats)) == pytest.approx(1, abs=1e-9), (dtype, size)
    nats = eval_bpb.count_nats(torch.tensor([[1.0, 0.0], [0.5, 2.5], [9999.0, 0.0]]), np.array([0, 0, 0]), 2)
    assert nats.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(2)), 0.0], rel=1e-15)


@pytest.mark.parametrize("logits", [
    torch.tensor([[1.7e308, -1.7e308]], dtype=torch.float64), torch.tensor([[math.nan, 0]]),
    torch.tensor([[-math.inf, 0]]), torch.zeros(1, 2).as_subclass(type("Liar", (torch.Tensor,), {})),
    torch.zeros(2, 2), torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.int64), None])
def test_logits_that_are_not_finite_tensors_of_the_right_shape_are_refused(logits):
    with pytest.raises(eval_bpb.Refused, match=r"predict\(\)"):
        eval_bpb.count_nats(logits, np.array([0]), 2)


class Pointless(eval_bpb.Adaptive):
    """Adaptive without the pointer, so that its logits are the model's own."""
    w = 0.0, 0.0, 1.0, -1e4, 0.0, 0.0, 0.0, 0.0


def adaptive(cls, model, learns: bool):
    model.dtype = torch.float32
    predictor = cls(model.cfg, model, "cpu")
    predictor.lr = {key: lr * learns for key, lr in predictor.lr.items()}
    return predictor


def test_the_pointer_is_what_its_formula_says():
    rng, (B, S, T, D, V) = np.random.default_rng(0), (2, 23, 9, 5, 3)
    text, h, w = rng.integers(0, V, (B, S)), rng.standard_normal((B, S, D)), rng.standard_normal((B, 1, 8))
    h /= np.linalg.norm(h, axis=-1, keepdims=True)
    shares, after = eval_bpb.point(*map(torch.from_numpy, (h[:, -T:], h, text, w)), 4)
    for b, t in itertools.product(range(B), range(S - T, S)):
        weights, (w0, w1, w2, w3, *w4) = [], w[b, 0]
        for s in range(t):
            score = 16 * w0 * (h[b, t] @ h[b, s] - 1) - w1 * math.log(t - s) + w3
            equal = [s >= n and (text[b, s - n:s + 1] == text[b, t - n:t + 1]).all() for n in range(4)]
            weights.append(math.exp(score + sum(x for x, e in zip(w4, equal) if e)))
        found, expected = shares[b, t - S + T], np.array(weights) / sum(weights) ** (1 - w2)
        assert found[:t].tolist() == pytest.approx(expected) and not found[t:].any()
    assert (after[:, 0, :-1].numpy() == text[:, 1:]).all()


def test_cached_prediction_is_the_models_own_and_looks_back_as_far_as_training_did_and_no_further():
    model, rng = scoring_model(), np.random.default_rng(0)
    streams = [np.concatenate([[0], rng.integers(0, 40, n), [0]]) for n in (0, 1, 5, 149, 22, 17, 9, 22)]
    cached = adaptive(Pointless, model, learns=False)
    cached.chunk = 5
    spans = np.concatenate(cached.plan(np.array([150])))[:, 1:]
    oldest = np.concatenate([np.full(b - a, max(0, b - 24)) for a, b in spans])    # key that each place sees
    i, j = np.arange(150)[:, None], np.arange(150)[None]
    mask = torch.from_numpy((j <= i) & (j >= oldest[:, None]))

    def attend(q, k, v, seg, visit):
        n, (q, k, v) = len(q), (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask[:n, :n], enable_gqa=True).transpose(0, 1)

    found = run_predictor(cached, streams, 40)
    for i, stream in enumerate(streams):                             # documents do not touch each other
        assert found[i] == pytest.approx(nats_alone(model, stream, attend=attend), abs=3e-5)


def test_sliding_and_plain_give_every_target_its_context():
    model, rng = scoring_model(), np.random.default_rng(1)
    long, short = rng.integers(0, 40, 200), [rng.integers(0, 40, n) for n in (2, 7, 24, 11)]
    for name in ("sliding", "plain"):
        predictor = eval_bpb.PREDICTORS[name](model.cfg, eval_bpb.move(model, "cpu"), "cpu")
        found = run_predictor(predictor, [long, *short], 40)
        for i, stream in enumerate(short, 1):
            assert found[i] == pytest.approx(nats_alone(model, stream), abs=2e-5)
        for end in range(30, 199, 6) if name == "sliding" else ():
            # the window of 24 that scores the last 6 targets before end
            expected = nats_alone(model, long[end - 24:end + 1])[-6:]
            assert found[0][end - 6:end] == pytest.approx(expected, abs=2e-5)


def test_a_sample_is_drawn_as_the_seed_says_and_begins_with_its_text(packed_run, capfd):
    artifact, written = packed_run[0] / "artifact.pyz", []
    long = "words " * 200  # more than the context
    for flags in ("--seed=1", "--seed=1", "--seed=2", "--temperature=0", "--top_p=0"), ("--seed=1",):
        text = long if len(flags) == 1 else "Import os"
        for flag in flags:
            assert eval_bpb.main([str(artifact), f"--sample={text}", "--tokens=60", "--device=cpu", flag]) == 0
            written.append(capfd.readouterr().out)
            assert written[-1].startswith(text) and len(written[-1]) > len(text)
    one, same, other, likeliest, alone, _ = written
    assert one == same != other and likeliest == alone


def test_adaptive_learns_from_what_was_scored_and_each_document_for_itself():
    model, rng = scoring_model(), np.random.default_rng(2)
    streams = [np.concatenate([[0], np.tile(rng.integers(0, 40, 9), 40), [0]]) for _ in range(3)]
    fixed, learned, guessed = (run_predictor(adaptive(cls, model, learns), streams, 40)
                               for cls, learns in ((Pointless, False), (Pointless, True), (eval_bpb.Adaptive, False)))
    first = adaptive(Pointless, model, False).plan(np.array([361]))[0][0, 2]
    assert learned[0][:first] == fixed[0][:first]  # nothing is known before the first chunk is scored
    assert sum(learned[1][-100:]) < sum(fixed[1][-100:]) - 5 and sum(guessed[1][-100:]) < sum(fixed[1][-100:]) - 50
    alone = run_predictor(adaptive(Pointless, model, True), streams[1:2], 40)[0]
    assert sum(alone) == pytest.approx(sum(learned[1]), rel=1e-3)


def test_rounds_have_few_shapes_on_documents_of_web_lengths_and_compile_as_one_graph():
    with torch.device("meta"):
        cfg = replace(Config(), vocab_size=16384)
        predictor = eval_bpb.Adaptive(cfg, GPT(cfg), torch.device("meta"))
    lengths = np.random.default_rng(0).lognormal(math.log(403), 1.037, 50000).astype(np.int64) + 1
    rounds = predictor.plan(lengths)
    shapes = {predictor.shape(spans) for spans in rounds}
    assert len(shapes) < 70 and max(B * T for B, T, _ in shapes) <= cfg.row_tokens // 8
    padded = sum(math.prod(predictor.shape(spans)[:2]) for spans in rounds)
    assert padded < 1.1 * lengths.sum()
    model = tiny_model(n_layer=2, loop_first=0, loop_last=0, loop_passes=2, two_lane_from=1, vocab_size=40, seq_len=24)
    whole, parts = (adaptive(eval_bpb.Adaptive, model.requires_grad_(False), True) for _ in range(2))
    whole.forward = torch.compile(whole.forward, fullgraph=True, backend="eager", dynamic=False)
    stream = np.random.default_rng(1).integers(0, 40, 30)
    assert run_predictor(whole, [stream], 40)[0] == pytest.approx(run_predictor(parts, [stream], 40)[0], abs=1e-5)


def test_ranks_share_the_rounds_and_give_the_same_number(packed_run, dataset, tmp_path):
    flags = f"--data={dataset}", "--predictor=sliding", "--device=cpu"
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
        shutil.copy(packed_run[0] / "artifact.pyz", tmp_path / name)
    two = start(ROOT / "eval_bpb.py", "artifact.pyz", *flags, ranks=2, cwd=tmp_path / "two")
    assert eval_bpb.main([str(tmp_path / "one/artifact.pyz"), *flags]) == 0
    end(two)
    one, two = (json.loads((tmp_path / name / "score.json").read_text()) for name in ("one", "two"))
    assert one["val_bpb"] == pytest.approx(two["val_bpb"], rel=1e-9) and two["environment"]["device"] == "2 x cpu"


# ---- proof


HONEST_PREDICTORS = {
    "sliding": 'Mine = lambda cfg, model, device: Sliding(cfg, model, device)',
    "score-first learning, batches of like length": 'Mine = Adaptive',
    "hash of the two inputs before": mine("""
before = np.where(np.append(0, inputs[1:]) == 0, 0, np.append(0, inputs[:-1]))
before[ends[:-1]] = 0
torch.manual_seed(0)
logits = torch.randn(64, self.V)[torch.from_numpy((inputs * 31 + before) % 64)]
"""),
}


@pytest.fixture
def proofs(packed_run):
    """proofs(predictor source) -> the verdicts on it over TEXTS, each by a new one."""
    cfg, model, tokenizer = pack.load(packed_run[0] / "artifact.pyz")
    streams = [np.concatenate([[0], tokenizer.encode(text), [0]]).astype(np.int64) for text in TEXTS]
    V = tokenizer.vocab_size

    def prove(source, seconds=1.0):
        names = {**vars(eval_bpb)}
        exec(FLAT + source, names)
        make = lambda: names["Mine"](cfg, model, "cpu")
        rounds = make().plan(np.array([len(s) - 1 for s in streams]))
        nats = eval_bpb.score(make(), streams, rounds, [*range(len(rounds))], V, eval_bpb.Phases())
        return {"replay": eval_bpb.replay(make(), streams, rounds, nats, V, seconds, 1e-3, "cpu"),
                "lengths": eval_bpb.tell_wrong_lengths(make(), streams, rounds, nats, V)}
    return prove


def test_honest_predictors_are_proved_by_replay(proofs):
    for kind, source in HONEST_PREDICTORS.items():
        verdicts = proofs(source)
        assert all(verdict.startswith("pass") for verdict in verdicts.values()), (kind, verdicts)
        places, docs = map(int, re.search(r"(\d+) places of (\d+) documents", verdicts["replay"]).groups())
        assert places > 20 and docs > 1


CHEATS = {
    "reads the target through the inputs": "logits[at[:-1], inputs[1:]] = 9.0",
    "learns from the round before it is scored": "logits += torch.from_numpy(inputs).bincount(minlength=self.V)",
    "lets the document before leak across the boundary": "logits[ends[0]:, inputs[:ends[0]]] += 1",
    "carries what it learned to documents of other rounds": "logits += self.counts",
    "looks ahead by a chance of a hundredth": """
rare = np.flatnonzero((inputs[:-1] * 2654435761 + inputs[1:] * 40503) % 100 == 0)
logits[rare, inputs[rare + 1]] = 2.0
""",
    "knows where a document ends from its length": "logits[ends - 1, 0] = 9.0",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_the_proof_fails_for_a_predictor_that(cheat, proofs):
    assert proofs(mine(CHEATS[cheat]))["lengths" if "length" in cheat else "replay"].startswith("FAIL")


@pytest.mark.parametrize("seed", range(2))
def test_random_leaks_are_caught_where_the_stated_power_says_so(proofs, seed):
    rng = random.Random(seed)
    share, ahead, strength = 10 ** rng.uniform(-2.2, -0.5), rng.randrange(1, 4), rng.uniform(0.5, 5)
    verdict = proofs(mine(f"""
at = at[:-{ahead}]
at = at[(inputs[at + {ahead}] * 7919 + at * 104729 + {seed}) % 10007 < {share} * 10007]
logits[at, inputs[at + 1]] += {strength}
"""), 9.0)["replay"]
    assert float(re.search(r"leaks at ([-.e0-9]+) of the places", verdict)[1]) < share and verdict.startswith("FAIL")


PLANS = {"d: skips hard tokens": "[[0, 0, n - 1]]", "e: scores a token twice": "[[0, 0, n]], [[0, n - 1, n]]",
         "e: twice in one round": "[[0, 0, n], [0, 0, n]]", "f: reorders within a document": "[[0, 5, n]], [[0, 0, 5]]",
         "spans outside": "[[0, 0, n + 1]]", "no document": "[[99, 0, n]]", "nothing": "",
         "two parts in one round": "[[0, 0, 5], [0, 5, n]]"}


def test_plans_that_do_not_score_every_target_once_and_in_order_are_refused():
    n = 10
    for cheat, rounds in PLANS.items():
        with pytest.raises(eval_bpb.Refused, match="plan"):
            eval_bpb.check_plan(eval(f"[{rounds}]", {"n": n}), np.array([n]), 8)
            pytest.fail(cheat)
    with pytest.raises(eval_bpb.Refused, match="leaves"):
        eval_bpb.check_plan([[[1, 0, n]]], np.array([n, n]), 8)
    with pytest.raises(eval_bpb.Refused, match="round of 10 targets"):
        eval_bpb.check_plan([[[0, 0, n]]], np.array([n]), 1 << 30)
    assert len(eval_bpb.check_plan([[[0, 0, 4], [1, 0, 2]], [[0, 4, n]]], np.array([n, 2]), 8)) == 2


# ---- isolation and trust


def test_own_code_confined_code_and_the_file_alone_score_the_same_to_the_last_bit(
        judge, packed_run, dataset, tmp_path, monkeypatch, capfd):
    alone = {}
    for threads in (1, 2):
        (folder := tmp_path / str(threads)).mkdir()
        shutil.copy(packed_run[0] / "artifact.pyz", folder)
        how = dict(cwd=folder, OMP_NUM_THREADS=str(threads))
        alone[threads] = start("artifact.pyz", f"--data={dataset}", "--device=cpu", **how)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, confined, out = judge("Mine = Adaptive", "--trust")
    assert confined["mode"] == "trusted" and "NOTHING IS PROVED" in out and confined["unconfined"] == ""
    assert not list(tmp_path.glob("nanogolf*"))  # the child's folder is gone
    shutil.copy(packed_run[0] / "artifact.pyz", tmp_path)
    assert eval_bpb.main([str(tmp_path / "artifact.pyz"), f"--data={dataset}", "--device=cpu"]) == 0
    own, out = json.loads((tmp_path / "score.json").read_text()), capfd.readouterr().out
    assert own["mode"] == "own" and "mode: own" in out and own["val_bpb"] == confined["val_bpb"]
    for threads, process in alone.items():
        assert "mode: own" in end(process)[0]
        score = json.loads((tmp_path / str(threads) / "score.json").read_text())["val_bpb"]
        # The demo's score moves by 4e-7; here a model 16 wide learns in large steps from 1,567 bytes.
        assert abs(score - own["val_bpb"]) <= (0 if threads == torch.get_num_threads() else 1e-5)


def test_code_that_is_not_this_folders_is_confined_and_must_prove_its_score(judge, packed_run, dataset, tmp_path):
    """The child that scores and the two that prove it look for files, memory, sockets and processes, and for what the
    one before left: each thing found would move the score or fail the proof."""
    (tmp_path / "cheat").mkdir()
    cheat = make_artifact(packed_run, tmp_path / "cheat/a.pyz", mine(CHEATS["reads the target through the inputs"]))
    cheat = start(ROOT / "eval_bpb.py", cheat, f"--data={dataset}", "--device=cpu", "--audit_seconds=0.2")
    shared, source = Path(f"/dev/shm/{os.getpid()}"), mine("logits[:, 0] += self.found", f"""
    def plan(self, lengths):
        import ctypes, socket
        self.found, libc = 0.0, ctypes.CDLL(None)
        for attempt in (lambda: open("{dataset}/val_000000.bin"), lambda: open("{dataset.parent}/x", "w"),
                        lambda: open("/dev/shm/{os.getpid()}"), lambda: open("/proc/{os.getpid()}/mem"),
                        lambda: os.kill({os.getpid()}, 0), lambda: socket.create_connection(("127.0.0.1", PORT), 1),
                        lambda: socket.socket(socket.AF_UNIX).connect("{tmp_path}/s"), lambda: open("left")):
            try:
                attempt()
                self.found += 5.0
            except OSError:
                pass
        libc.shmat.restype = ctypes.c_void_p
        at = libc.shmat(libc.shmget({os.getpid()}, 8, 0o1600), None, 0)
        left = ctypes.c_int64.from_address(at)
        self.found, left.value = self.found + 5 * left.value, 1
        keyctl = libc.syscall(250 if os.uname().machine == "x86_64" else 219, 0, -3, 0)
        assert keyctl == -1 and "{dataset}" not in str(os.environ) + str(sys.argv) + str(os.listdir())
        return Flat.plan(self, lengths)
    def learn(self, targets):
        open("left", "w").close()
""")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"{tmp_path}/s")
        unix.listen()
        shared.touch()
        port = str(server.getsockname()[1])
        code, result, out = judge(source.replace("PORT", port), "--audit_seconds=1")
        shared.unlink()
    assert code == 0 and result["val_loss"] == pytest.approx(math.log(Tokenizer(DEMO).vocab_size), rel=1e-14)
    assert result["mode"] == "audited" and "mode: audited" in out and "artifact's eval_bpb.py differ" in out
    assert set(result["audit"]) == {"replay", "lengths"}
    assert all(verdict.startswith("pass") for verdict in result["audit"].values()), result
    out, _ = end(cheat, 2)
    assert "NOT A SCORE" in out and "\nval_bpb" not in out
    assert "val_bpb" not in json.loads((tmp_path / "cheat/score.json").read_text())


HARM = {
    "fails": ("self.V / 0", "ZeroDivisionError: division by zero .*eval_bpb.py"),
    "leaves": ("os._exit(3)", "exit code 3"),
    "takes all memory": ("self.hoard = [torch.empty(1 << 28) for _ in range(999)]", "allocate memory"),
    "writes without end to stderr": ("while True: os.write(2, b'x' * 4096)", "to stderr"),
    "writes without end to stdout": ("while True: os.write(answers(), b'x' * 4096)", "sent a frame"),
    "answers before it is asked": ("os.write(answers(), b'done' + bytes(8))", "before it was asked|sent a frame"),
    "returns the wrong shape": ("return torch.zeros(1, 7)", "must return logits"),
    "returns what is not finite": ("logits[3, 5] = -np.inf", "not finite"),
    "leaves processes behind": ("os.fork() or os.setsid() or os.execv(sys.executable, [sys.executable, '-c',"
                                "'import time; time.sleep(98.PID)'])", ""),
}


def test_harm_ends_in_one_line_and_nothing_stays(dataset, packed_run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    flags = f"--data={dataset}", "--device=cpu", "--trust"

    def make(name, code):
        (folder := tmp_path / name).mkdir()
        return make_artifact(packed_run, folder / "a.pyz", mine(code) + """
def answers():
    import fcntl
    from contextlib import suppress
    for n in range(3, 99):  # the pipe that is open for writing
        with suppress(OSError):
            if fcntl.fcntl(n, fcntl.F_GETFL) & os.O_WRONLY:
                return n
""")

    def judge(name):
        try:
            return eval_bpb.main([str(make(name, HARM[name][0].replace("PID", str(os.getpid())))), *flags])
        except BadInput as error:
            return str(error)

    artifact = make("never returns", "import time\ntime.sleep(999)")
    endless = start(ROOT / "eval_bpb.py", artifact, *flags, "--max_seconds=8", TMPDIR=str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(HARM, pool.map(judge, HARM)))
    for name, (_, words) in HARM.items():
        line = str(results[name])
        assert re.search(words, line) and "\n" not in line if words else results[name] == 0, (name, line)
        assert (tmp_path / name / "score.json").exists() == (not words), name
    out, err = end(endless, 2)
    assert re.fullmatch("eval_bpb.py: .*a.pyz: ran over 8 s in the phase '.*': no score\n", err) and "---" not in out
    assert "Traceback" not in capfd.readouterr().err and not list(tmp_path.glob("nanogolf*"))
    sleeps = ["pgrep", "-f", f"time.sleep.98.{os.getpid()}"]
    assert subprocess.run(sleeps, capture_output=True).returncode == 1


def confine(readable, memory):  # on a system that cannot
    return "Landlock"


def test_a_system_that_cannot_confine_is_no_place_for_strangers(judge, dataset, monkeypatch):
    monkeypatch.setattr("data.confine.confine", confine)
    with pytest.raises(BadInput, match="no Landlock to confine"):
        judge("", "--predictor=flat")
    code, result, out = judge("", "--predictor=flat", "--trust", "--limit_docs=3")
    assert code == 0 and result["unconfined"] == "Landlock" and "NOT CONFINED" in out
    assert result["limit_docs"] == 3 and "val_bpb" not in result and "\nval_bpb" not in out and "first 3 of 20" in out
    monkeypatch.setattr("data.confine.READABLE", [str(dataset.parent)])
    with pytest.raises(BadInput, match="where the artifact's code may read: move it"):
        judge("", "--predictor=flat")


def test_an_artifact_or_a_flag_that_is_not_right_is_refused(dataset, packed_run, tmp_path):
    artifact = make_artifact(packed_run, tmp_path / "a.pyz")
    whole = artifact.read_bytes()
    for bad in (whole[:-400], flip(whole, 5000), b"", b"PK"):
        artifact.write_bytes(bad)
        with pytest.raises(BadInput, match="a.pyz"):
            eval_bpb.main([str(artifact), f"--data={dataset}"])
    artifact.write_bytes(whole)
    for flag in ("--predictor=best", "--data=nowhere", "--limit_docs=-1", "--device=tpu", "--x=1"):
        with pytest.raises(BadInput, match=flag[2:] if "data" not in flag else "nowhere"):
            eval_bpb.main([str(artifact), *([f"--data={dataset}"] if "data" not in flag else []), flag])
    with pytest.raises(BadInput, match="--data"):
        eval_bpb.main([str(artifact)])


# ----------------------------------------------------------------------------------------------------------------------
# Records


DELETE, AUDIT = object(), dict.fromkeys(check.PROOFS, "pass")
DATASET = {"val_docs_sha256": "d" * 64, "val_tokens": 40_540_160, "val_bytes": 151_078_222}
NATS_PER_BIT = math.log(2) * 151_078_222 / 40_540_160
TRAINER = """import torch

LR = 0.02


def train(model, loader):
    for x, y in loader:
        model(x, y).backward()
"""


def wrap(source):
    raw = lzma.compress(source.encode(), format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    return f'import lzma, base64\nexec(lzma.decompress(base64.b85decode("{base64.b85encode(raw).decode()}")))\n'


def fake_run(folder, seed=1, val_bpb=1.2, data="fineweb", device="8 x NVIDIA H100", source=TRAINER, seconds=599.5,
             score={}, **config):
    """A run folder as train_gpt.py, pack.py and eval_bpb.py leave it, without the weights."""
    (folder / "source").mkdir(parents=True)
    (folder / "source/train_gpt.py").write_text(source)
    start = {"config": {"seed": seed, "run": folder.name, "lr": 0.02, "max_seconds": 600.0, "parent": "", **config},
             "environment": {"device": device}, "dataset": {"name": data, **DATASET},
             "source_sha256": {"train_gpt.py": hashlib.sha256(source.encode()).hexdigest()}}
    lines = {"kind": "start", **start}, {"kind": "summary", "steps": 5000, "tokens": 10 ** 9, "train_seconds": seconds}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.txt").write_text("step:1 train_loss:9.0\n---\nval_bpb: 1.0\n")
    (folder / "score.json").write_text(json.dumps({
        "val_bpb": val_bpb, "val_loss": val_bpb * NATS_PER_BIT, **DATASET, "val_docs": 50_000, "limit_docs": None,
        "artifact_bytes": 15_900_000, "artifact_sha256": f"{seed:064d}", "phases": {"total": 400.0},
        "audit": AUDIT, **score}))
    return folder


def submit_runs(tmp_path, runs, name="x", track=None):
    args = dict(author="Ann", github_id="ann", date="2026-01-02", parent=None, idea=None)
    return submit.build(argparse.Namespace(runs=runs, name=name, track=track, **args), tmp_path / "records")


def make_record(tmp_path, name="good", **kwargs):
    runs = [fake_run(tmp_path / f"runs/{name}{s}", s, 1.2 + s / 1e4, **kwargs) for s in (1, 2, 3)]
    folder = submit_runs(tmp_path, runs, name)
    replaced("README.md", "(write this)", "Words.")(folder)
    return folder


def command(*args, code):
    return "".join(end(start(ROOT / "records/check.py", *args), code))


def load(folder):
    return json.loads((folder / "submission.json").read_text())


# Ways to change a record.
def json_with(**changes):
    return lambda f: write("submission.json", json.dumps(
        {k: v for k, v in (load(f) | changes).items() if v is not DELETE}))(f)


def seed_with(**changes):
    def edit(f):
        results = load(f)["seed_results"]
        json_with(seed_results=results | {"2": results["2"] | changes})(f)
    return edit


def write(name, text):
    return lambda f: ((f / name).parent.mkdir(exist_ok=True), (f / name).write_text(text))


def code(*lines):
    return write("train_gpt.py", TRAINER + "\n".join(lines) + "\n")


def replaced(name, old, new):
    return lambda f: (f / name).write_text((f / name).read_text().replace(old, new))


LATER = f"{check.datetime.date.today() + check.datetime.timedelta(3)}_x"
OURS = [   # (rule: words of the message, how to break a record of ours)
    ("folder-name", lambda f: f.rename(f.parent / "my record")),
    ("folder-name", lambda f: f.rename(f.parent / "2026-13-01_x")),
    ("folder-date: not the folder's", json_with(date="2020-01-01")),
    ("folder-date: in the future", lambda f: f.rename(f.parent / LATER)),
    ("missing-file: is missing", lambda f: (f / "README.md").unlink()),
    ("log-count: 2 training logs", lambda f: (f / "train_seed2.log").unlink()), ("json", write("submission.json", "{")),
    ("json: object", write("submission.json", "[]")),
    ("json-strict: NaN", replaced("submission.json", '"author"', '"x": NaN, "author"')),
    ("json-strict: duplicate", replaced("submission.json", '"author"', '"name": "x", "author"')),
    ("json-field: github_id: wrong", json_with(github_id=None)), ("json-field: name: wrong", json_with(name="")),
    ("json-field: val_bpb: wrong", json_with(val_bpb=True)), ("json-field: blurb: missing", json_with(blurb=DELETE)),
    ("json-field: seed 2: val_loss, val_bpb and", seed_with(val_loss=None)),
    ("json-field: val_loss, val_bpb and", json_with(dataset={"name": "fineweb", **DATASET, "val_bytes": 0})),
    ("json-value: val_bpb is -1", json_with(val_bpb=-1.0)), ("json-value: seed 2: val_loss", seed_with(val_loss=0)),
    ("forbidden-file", write("sub/CLAUDE.md", "x")), ("secret", write("run.sh", "export HF_TOKEN=hf_" + "a" * 34)),
    ("link", lambda f: (f / "notes.md").symlink_to("/etc/passwd")), ("file-name", write("two words.md", "x")),
    ("file-size", write("big.txt", "x" * (5 << 20) + "x")), ("python-syntax: NOT READ", code(*["def broken(:"] * 41)),
    ("import", code("import leftpad")), ("machine-path", code('PATH = "/home/ann/data"')),
    ("track: hardware", json_with(hardware="1xA100")), ("track: track 'x' in", json_with(track="x")),
    ("track: stands in", lambda f: f.parent.rename(f.parent.parent / "elsewhere")),
    ("readme-words", replaced("README.md", "Words.", "(write this)")),
    ("artifact-cap: seed 2: artifact_bytes 16,000,001 is 1 over", seed_with(artifact_bytes=16_000_001)),
    ("artifact-bytes", json_with(bytes_code=1, bytes_model=2)), ("train-clock", seed_with(train_seconds=601.5)),
    ("eval-clock", seed_with(eval_seconds=602.0)),
    ("clock-override", code('M = os.environ["MAX_WALLCLOCK_SECONDS", 0]')),
    ("clock-override: max_seconds 601", json_with(config={"max_seconds": 601})), ("network", code("import requests")),
    ("train-data-late: quantise uses", write("pack.py", "def quantise(model, train_loader):\n    return 1\n")),
    ("val-in-training", code('train_files = "data/fineweb_val_*.bin"')), ("bpb-arithmetic", seed_with(val_loss=3.0)),
    ("val-count: 10000 documents", json_with(dataset={"name": "fineweb", **DATASET, "val_docs": 10_000})),
    ("val-count: of 1 bytes", json_with(dataset={"name": "fineweb", **DATASET, "val_docs": 50_000, "val_bytes": 1})),
    ("val-count: dataset 'x'", json_with(dataset={"name": "x", **DATASET})),
    ("val-count: 9,662,464", write("a.log", "tokens: 9662464")),
    ("val-count: 36,562,944", write("a.log", "tokens=36562944")),
    ("data-overlap", replaced("train_seed1.log", "step:1", "train_shards:1499")),
    ("limited-score", seed_with(limit_docs=100)), ("audit: replay: FAIL", seed_with(audit={**AUDIT, "replay": "FAIL"})),
    ("audit: not proved by lengths", seed_with(audit={"replay": "pass"})),
    ("dynamic-code", code("exec(open('other.txt').read())")), ("encoded-source", code(wrap(TRAINER))),
    ("loaded-code: os.execvp", code("from os import execvp as go", "go('ls', ['ls'])")),
    ("judge-changed", write("data/dataset.py", "def read_val_docs(folder, meta, limit=None):\n    return []\n")),
    ("judge-changed", write("data/confine.py", "import os\nos.execvp('x', [])\n")),
    ("score-range", json_with(val_bpb=1.03)), ("seeds: named twice", json_with(seeds=[1, 2, 3, 3])),
    ("seeds: not those of", json_with(seeds=[1, 2, 4])), ("seeds: 2 seeds are named", json_with(seeds=[1, 2])),
    ("seeds: seeds 1, 2 have the same artifact", seed_with(artifact_sha256=f"{1:064d}")),
    ("seeds: differ in config_sha256", seed_with(config_sha256="x")), ("seed-mean", json_with(val_bpb=1.20021)),
    ("seed-spread", lambda f: [replaced("submission.json", f"1.200{s}", "1.2")(f) for s in (1, 2, 3)]),
    ("log-score: val_bpb 1.2003", replaced("train_seed3.log", "1.2003", "1.1502")),
    ("log-score: steps 5000", replaced("train_seed3.log", "steps: 5000", "")),
    ("readme-score", replaced("README.md", "1.2002", "1.1502")), ("source-hash", replaced("train_gpt.py", "02", "03")),
    ("source-hash", write("more.py", "")),
    ("environment", replaced("train_seed3.log", "step:1", "torch 2.9.1 torch 2.8.0")),
    ("parent", json_with(parent="2026-01-01_nobody")), ("parent", json_with(parent={"a": 1})),
    ("tainted-parent: #1376 was ruled invalid", json_with(parent_pr="#1376")),
    ("review-limit: check_ours", json_with(dataset={"name": "fineweb", "val_docs": 50_000, "val_bytes": "?"}))]

HONEST = '''
try:
    import some_compressor
except ImportError:
    import zlib
def bigram_hash(t):
    return torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % 10239
def eval_val_ttt(args, model, val_tokens, optimizer):
    for chunk in range(0, len(val_tokens), args.ttt_chunk):
        with torch.no_grad():
            loss_sum = model(val_tokens[chunk:])[-args.stride:].sum()
        model(val_tokens[chunk:chunk + args.ttt_chunk]).mean().backward()
clip = torch.minimum(model.weight.abs(), torch.quantile(model.weight.abs(), 0.999))
max_wallclock = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
train_files=glob.glob("data/fineweb_train_*.bin");val_files=glob.glob("data/fineweb_val_*.bin")
'''
LUT = "def luts(sp):\n    if sp.piece == '\u2581': {}\n    base_bytes = len(sp.piece(0).encode()){}"
PUBLIC = {   # the rules that a source from elsewhere breaks, and no other: sources
    "": [HONEST, "class C:\n    eval: int = 1", "compile(x)",
        'torch.load("x", weights_only=True); re.compile("x"); model.eval()', "import einops", "N = 151_060_000",
        LUT.format("pass", " if sp.is_byte(0) else 1"), "val_loader = DistributedTokenLoader(args.val_files, rank)",
        "loader = Shards(args.val_files)", "train_files = glob.glob('fineweb_train_*.bin', but='fineweb_val_*.bin')",
        "train_files = [f for f in files if f not in val_files]", "train_on_val = 0",
        "def pack(q, val_tokens):\n    return zlib.compress(q)",
        "def ttt(val_data):\n  loss_sum += 1\n  for epoch in range(2):\n    loss.backward()",
        "def ttt(val_data):\n  if scored:\n    loss.backward()\n  loss_sum += 1",
        "def adapt(val_data):\n  loss.backward()\ndef main():\n  eval_val()\n  adapt(1)"],
    "dynamic-code encoded-source": [wrap(HONEST)], "missing-file": [""],
    "dynamic-code": ['__builtins__["exec"]("x = 1")', "run = eval", "compile(x, y, z)"],
    "dynamic-code payload": ['exec(decode("' + "Zz9!" * 80 + '"))', f'x = exec\nx("{"Zz9!" * 80}")'],
    "loaded-code": ['importlib.import_module("x")', "pickle.loads(b'')", 'torch.load("x", weights_only=False)',
        "marshal.loads(b'')", 'ctypes.CDLL("x")', "os.execvp('x', [])"],
    "network": ["from os import system as run; run('curl x')", "from subprocess import run; run('pip install x')",
        "from urllib import request"],
    "import": ["import leftpad"], "mixture": ["OnlineNgramCache = 1", "def eval_val_ngram(): pass"],
    "unruled": ["slot_delta = 0"], "pre-quant-ttt": ["def prequant_ttt(m): pass"], "target-gate": ["within_gate = 1"],
    "best-of": ["final = min(val_loss, ttt_loss)"],
    "byte-count": ["TOTAL = 164_594_398", "N = 176_332_748", "N = 151_070_000", "bytes_per_token = 3.7"],
    "byte-lut": [LUT.format("pass", ""), LUT.format("has_leading_space = 1", " + 1 if sp.is_byte(0) else 1")],
    "target-in-key": ["def ngram_key(ctx, tgt):\n    return (ctx * 36313 ^ tgt) % 4096"],
    "val-calibration": ["collect_hessians(model, val_tokens)",
        "calib_loader = DistributedTokenLoader(args.val_files, rank)"],
    "train-data-late": ["collect_hessians(model, train_loader)", "gptq_calibrate(train_pattern)"],
    "val-in-training": ["train_files = os.path.join(d, 'fineweb_val_*.bin' if flag else 'fineweb_train_*.bin')",
        "train_pattern: str = val_files or x", "train_loader = Any(args.val_files)",
        "loader = DistributedTokenLoader(args.val_files, rank)", "train_on_val = 1"],
    "paid-prefix": ["PAID_PREFIX = 1",
        "def build(val_tokens):\n    head = val_tokens[1:9].copy()\n    return lzma.compress(head.tobytes())"],
    "score-first": ["def ttt(val_data):\n  step += 1\n  loss.backward()",
        "def ttt(m, val_data):\n  m(val_data).backward()\n  with no_grad():\n    m(1)",
        "def ttt(val_data):\n  for epoch in range(125):\n    loss_sum += 1\n    loss.backward()",
        "def adapt(val_data):\n  loss.backward()\ndef main():\n  adapt(1)\n  eval_val()",
        "def adapt(val_data):\n  loss.backward()\ndef eval_all(val_data):\n  adapt(1)\n  loss_sum += 1"],
    "python-syntax": ['def broken(:'], "python-syntax val-in-training": ["train_files = g(f'{a['b']}', val_files)"],
    "python-syntax mixture": ["\n".join(["def broken(:"] * 50) + "\nngram_cache"],
    "dynamic-code encoded-source val-in-training": ['exec(zlib.decompress(b64decode("' + base64.b64encode(zlib.compress(
        wrap('train_files = "data/fineweb_val_*.bin"\n').encode())).decode() + '")))',
        "exec(unpack('''" + "\n    ".join(re.findall(".{1,70}", base64.b85encode(
        zlib.compress(b"train_files = val_files  # " + os.urandom(300).hex().encode())).decode())) + "'''))"]}
FILES = {   # the rules that a folder from elsewhere breaks, and no other: ways to change it
    "readme-score": [write("README.md", "1.2009")],
    "": [write("README.md", "1.2007"), write("a.log", "not training on val"),
        write("a.log", "ttt: training on validation chunk 1"),
        write("a.log", "train on val tokens once scored"), json_with(val_loss=DELETE),
        write("a.log", "train_time:601000ms"),
        lambda f: [edit(f) for edit in (json_with(val_bpb=1.2004), replaced("README.md", "1.2002", "1.2004"),
                                        seed_with(val_bpb=1.20077), write("logs/run1.txt", "val_bpb: 1.20077"))],
        *(json_with(val_loss=1.2002 * math.log(2) * ratio) for ratio in (2.436, 3.319, 3.7266, 3.1572)),
        seed_with(artifact_bytes=16_000_000, train_seconds=601.0), json_with(bytes_code=200, bytes_model=15_899_784),
        lambda f: [write(f"a/{i}.md", "x")(f) for i in range(390)], json_with(parent={"a": 1})],
    "val-in-training": [write("a.log", "train_loader:dataset:fineweb10B_valonly train_shards:1"),
        write("a.log", "training on validation text")],
    "loaded-code": [write("data/confine.py", "import os\nos.execvp('x', [])\n")],
    "paid-prefix": [write("a.log", "paid_prefix:loaded 6,200,000 tokens")],
    "train-clock": [write("a.log", "train_time:601001ms")],
    "json-field": [json_with(val_bpb=None),
        json_with(bytes_total=DELETE, seed_results={s: {"val_bpb": 1.2 + s / 1e4} for s in (1, 2, 3)})],
    "json-value": [json_with(val_loss=0)], "log-score": [seed_with(val_bpb=1.2005)],
    "bpb-arithmetic": [json_with(val_loss=3.0)], "artifact-cap": [json_with(bytes_total=16_000_001)],
    "artifact-bytes": [json_with(bytes_code=200, bytes_model=15_899_783)], "code-bytes": [json_with(bytes_code=10)],
    "log-count": [lambda f: (json_with(track="unlimited")(f), [log.unlink() for log in f.glob("*.log")])],
    "review-limit": [write("a.py", "#" * (2 << 20)), lambda f: [write(f"a{i}.md", "x")(f) for i in range(401)]]}


def test_every_rule_finds_what_breaks_it_and_nothing_else_and_the_unruled_never_fails(tmp_path, monkeypatch):
    good, wrong = make_record(tmp_path), []
    monkeypatch.setattr(check, "known_records", lambda: [])
    rows = [(*row, True) for row in OURS] + [(what, edit, False) for what, edits in FILES.items() for edit in edits]
    rows += [(what, write("train_gpt.py", text), False) for what, texts in PUBLIC.items() for text in texts]
    for n, (what, edit, strict) in enumerate(rows):
        folder = tmp_path / str(n) / good.parent.name / good.name
        shutil.copytree(good, folder)
        if not strict:
            json_with(source_sha256=DELETE, config=DELETE, dataset=DELETE)(folder)
        edit(folder)
        found = check.review_folder(next((tmp_path / str(n)).glob("*/*")), strict)
        rule, _, words = what.partition(": ")
        hits = {f["rule"]: f["level"] for f in found if not strict or f["rule"] == rule and words in f["message"]}
        if hits != {r: rules.RULES[r][not strict] for r in rule.split()}:
            wrong.append((n, what, [(f["rule"], f["message"]) for f in found]))
    assert not wrong
    others = {"change-set", "rescore", "near-copy", "nearest", "significance"}   # by the tests below
    rows = [what for what, _ in OURS] + [*PUBLIC, *FILES]
    assert rules.RULES.keys() == {rule for what in rows for rule in what.split(":")[0].split()} | others
    assert not [r for r, levels in rules.RULES.items() if "unruled" in levels[2] and "FAIL" in levels[:2]]


def test_a_submitted_record_is_clean_and_says_what_the_runs_said_and_how_it_compares(tmp_path):
    parent = make_record(tmp_path, "parent")
    assert "0 FAIL, 0 FLAG, 0 INFO" in command(parent, "--mode=strict", code=0)
    with pytest.raises(BadInput, match="exists; nothing is overwritten"):
        submit_runs(tmp_path, sorted((tmp_path / "runs").iterdir()), "parent")
    source = TRAINER.replace("0.02", "0.03") + "#\n" * 500
    changed = dict(source=source, lr=0.03, parent=str(parent), idea="faster")
    runs = [fake_run(tmp_path / f"runs/child{s}", s, 1.19 + s / 5e3, **changed) for s in (1, 2, 3)]
    write("pack.txt", "q 8 bits")(runs[1])
    folder = submit_runs(tmp_path, runs, "child")
    mine, text = load(folder), (folder / "README.md").read_text()
    assert folder == tmp_path / "records/track_10min_16mb/2026-01-02_child"
    assert (folder / "train_gpt.py").read_text() == source and list(mine["config"]) == ["lr", "max_seconds"]
    assert [mine[k] for k in ("val_bpb", "val_bpb_std", "seeds", "bytes_total", "parent", "parent_run", "blurb")] == [
        pytest.approx(1.1904), pytest.approx(2e-4), [1, 2, 3], 15_900_000, parent.name, None, "faster"]
    for words in ("**val_bpb 1.190400** (std 0.000200, n 3) on fineweb, at most 15,900,000 bytes, 8 x NVIDIA H100.",
                  "| 2 | 1.190400 | 3.074927 | 15,900,000 | 599.5 | 5,000 | 400.0 |", "faster\n\n(write this)",
                  f"Against the parent, {parent.name}: a gain of +0.00980 bits per byte, +0.02531 nats per token. "
                  "One-sided p (paired by seed) is 1.74e-05 for any gain and 2.69e-05 for the", "- `lr` 0.02 -> 0.03",
                  "512 lines of diff", "\n+LR = 0.03", "\n... 112 more lines\n"):
        assert words in text, text
    assert text.count("Against") == 1   # the parent is the best before it
    log = (folder / "train_seed2.log").read_text()
    assert log.startswith("step:1 train_loss:9.0") and "\n\npack.py:\nq 8 bits\n\neval_bpb.py: {" in log
    other = ledger.read_entry(parent)
    for change, words in (({"dataset": {}}, "on other documents"), ({"scores": {"1": None}}, "no score"),
                          ({"config": {"max_steps": 9}}, "+0.00980 bits per byte with another budget, so no test"),
                          ({"scores": {"1": 1.2}}, "+0.00960 bits per byte; a side has one seed, so no test"),
                          ({"scores": {"1": 1.2, "7": 1.3}}, "(Welch's) is")):
        assert words in submit.verdict(mine, other | change)
    # a run as parent: the record builds on what that run builds on; another record is the best
    one = submit_runs(tmp_path, [fake_run(tmp_path / "runs/last", 1, parent="child1", device="cpu")], "one")
    text = (one / "README.md").read_text()
    assert (load(one)["parent"], load(one)["parent_run"], one.parent.name) == (parent.name, "child1", rules.TRACKS[1])
    assert "1.200000** (one seed)" in text and "Against the parent, child1: a gain of -0.00980" in text
    assert "Against the best before it, 2026-01-02_child: a gain of -0.00960 bits per byte; a side has one seed" in text


def test_submit_refuses_runs_that_are_not_one_record(tmp_path, monkeypatch):
    good, changed = [fake_run(tmp_path / f"good{seed}", seed) for seed in (1, 2)], fake_run(tmp_path / "changed", 3)
    write("source/train_gpt.py", "x")(changed)
    for n, (why, runs) in enumerate({
            "another source": {"source": TRAINER + "#\n"}, "over the cap": {"score": {"artifact_bytes": 16_000_001}},
            "5 documents only": {"score": {"limit_docs": 5}}, "seed of its own": {"seed": 1}, "lr is 0.3": {"lr": 0.3},
            "another dataset": {"data": "demo"}, "not 8 x H100": {"device": "cpu"}, "no artifact_bytes in": {
                "score": {"artifact_bytes": None}}, "no score; run": {"score": {"val_bpb": None}},
            "train_seconds 601.5 is over": {"seconds": 601.5}, "eval_seconds 602.0 is over 600": {
                "score": {"phases": {"total": 602.0}}}, "not the source that ran": [*good, changed], "2 seeds": good,
            "is on demo, not": [fake_run(tmp_path / f"d{s}", s, data="demo") for s in (1, 2, 3)]}.items()):
        if isinstance(runs, dict):
            runs = [*good, fake_run(tmp_path / str(n), **{"seed": 3, **runs})]
        with pytest.raises(BadInput, match=why):
            submit_runs(tmp_path, runs, track="track_10min_16mb")
    for why, *flags in (("name the runs",), ("name the runs", "x", "--leaderboard"), ("--name=s", "x", "--name=a b"),
                        ("today at the latest", "x", "--date=2999-01-01"), ("YYYY-MM-DD", "x", "--date=20260101")):
        monkeypatch.setattr(sys, "argv", ["submit.py", "--author=Ann", *flags])
        with pytest.raises(BadInput, match=why):
            submit.main()
    assert not list(tmp_path.glob("records/*/*"))


def test_hostile_folders_end_in_a_verdict_in_bounded_time_and_nothing_of_them_runs(tmp_path, monkeypatch):
    folder, marker = make_record(tmp_path), tmp_path / "executed"
    evil, bomb = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n", b"import os\n" * 100_000
    texts = {"a.py": "exec(decompress(" + repr(zlib.compress(b"import os\n" + b"#" * 200_000_000, 9)) + "))",
             "b.py": "x = " + "(" * 5000 + ")" * 5000, "c.py": "x = " + "-" * 200_000 + "1",
             "d.py": "x = a" + ".b" * 100_000, "e.py": "x = 1" + " + 1" * 100_000, "f.py": "\0\ufffd" * 1000,
             "json.py": evil, "sitecustomize.py": evil, "numpy/__init__.py": evil, "name\nFAIL forged rule.py": evil,
             os.fsdecode(b"\xff\x1b[31m.txt"): "x",
             "submission.json": '{"seeds":' + "[" * 100_000 + "]" * 100_000 + "}"}
    for name, text in texts.items():
        write(name, text)(folder)
    for name, to in (("up", ".."), ("dev.txt", "/dev/zero"), ("link.txt", "README.md")):
        (folder / name).symlink_to(to)
    os.mkfifo(folder / "pipe.log")
    with open(folder / "sparse.log", "wb") as f:
        f.truncate(2 << 30)
    for name in ("link.txt", "dev.txt", "pipe.log", "sparse.log"):
        with pytest.raises(OSError):
            ledger.read_regular(folder / name, 1 << 20)
    for packed in (zlib.compress(bomb), lzma.compress(bomb), bz2.compress(bomb), zstandard.compress(bomb)):
        assert len(sources.unwrap(packed, 5000)) == 5000   # never more than asked for
    begin = time.monotonic()
    lines = command(folder, "--mode=lenient", code=1).splitlines()
    assert time.monotonic() - begin < 60 and not marker.exists()
    assert all(line.isprintable() and line.startswith(("FAIL ", "FLAG ", "INFO ", str(folder))) for line in lines)
    found = {line.split()[1] for line in lines}
    assert {"json", "link", "file-size", "file-name", "review-limit", "encoded-source"} <= found
    assert not [line for line in lines if line.startswith("FAIL forged")]
    write("dies.py", "import os; os.abort()")(tmp_path)
    monkeypatch.setattr(check, "__file__", str(tmp_path / "dies.py"))   # a reader that dies is no pass
    [found] = check.review_in_child(tmp_path, True)
    assert found["rule"] == "review-limit" and "within 60 s and 3 GiB; ended with -6" in found["message"]


def test_the_exit_code_is_that_of_the_worst_finding_and_a_finding_has_one_line(tmp_path):
    folder = make_record(tmp_path)
    json_with(date="2026-01-03")(folder)
    assert "1 INFO" in command(folder, "--mode=lenient", code=0)
    for name in ("train_seed1.log", "train_seed2.log", "z.log"):
        write(name, "1\ntrain_shards:1499 1.2001 1.2002 1.2003")(folder)
    out = command(folder, make_record(tmp_path, "another"), "--mode=lenient", code=4)
    [line] = [line for line in out.splitlines() if "data-overlap" in line]
    assert line.startswith("FLAG data-overlap train_seed1.log:2 a sign of validation documents in the training split: "
                           "train_shards:1499 1.2001 1.2002 1.2003 (and 2 more like it, z.log) [")
    write("submission.json", "{")(folder)
    command(folder, code=1)
    assert "not a folder" in command(tmp_path / "nowhere", code=2)
    assert "--rescore goes with one" in command(folder, folder, "--rescore=x", code=2)
    reader = subprocess.Popen([sys.executable, "records/check.py", folder], cwd=ROOT, stdout=-1, stderr=-1)
    reader.stdout.close()   # as `| head` does
    assert reader.stderr.read() == b""


def test_copies_and_parents_are_found_with_what_changed_below_any_wrapping(tmp_path, monkeypatch, capsys):
    text = TRAINER + "".join(f"def f{i}(a, b):\n    return a * {i} + b ** 2 - [a, b]\n" for i in range(20))
    parent = make_record(tmp_path, "parent", source=text)
    monkeypatch.setattr(check, "known_records", lambda records=None: [parent])
    changed = text.replace("LR = 0.02", "LR = 0.03").replace("loader", "stream").replace("f19", "g") + "def h(): pass\n"
    copy = make_record(tmp_path, "copy", source=changed)
    json_with(parent=parent.name)(copy)
    found = {f["rule"]: f["message"] for f in check.review_folder(copy, True)}
    assert found.keys() == {"nearest", "significance"}   # the parent's scores again: no gain to show
    assert found["nearest"].endswith("; changed train; added g, h; removed f19; LR 0.02 -> 0.03")
    assert found["significance"].startswith("+0.0000 nats over the parent; p 1 for 0.005 or more, the rule asks 0.01 (")
    assert "no --parent is named; by its code 2026-01-02_parent is nearest (95%)\n" in capsys.readouterr().out
    json_with(parent=None)(copy)
    assert [f["rule"] for f in check.review_folder(copy, True)] == ["nearest"]
    write("train_gpt.py", wrap(text))(copy)
    (public := tmp_path / "public/track").mkdir(parents=True)
    parent.rename(public / "2026-01-01_theirs")
    out = command(copy, "--mode=lenient", f"--known={tmp_path / 'public'}", code=4)
    assert "near-copy train_gpt.py:1 2026-01-01_theirs up to names" in out and "shares 100.0%; nothing but" in out
    write("train_gpt.py", wrap(HONEST))(copy)   # the same wrapper around another content
    assert "nearest" not in command(copy, "--mode=lenient", f"--known={public}", code=4)


def test_every_variant_of_the_ladder_applies_to_the_trainer_as_it_is():
    for name, (_, changes, _, _) in ladder.VARIANTS.items():
        source, flags = ladder.patched(changes, ladder.RUNGS["low"])
        compile(source, name, "exec")
        assert source != (ROOT / "train_gpt.py").read_text() or flags
        shape = {k: v for k, v in ladder.RUNGS["low"].items() if k != "steps"}
        train_gpt.parse_config(["--preset=proxy", *(f"--{k}={v}" for k, v in shape.items()), *flags])
    points = [(100, 2.0), (400, 1.0)]
    assert np.allclose(ladder.between(points, [100, 200, 400]), [2.0, 1.5, 1.0])  # 200 is half-way on the log scale
    assert np.isnan(ladder.between(points, [99, 401])).all()


def test_the_predictor_may_change_and_the_judge_may_not(tmp_path):
    folder, source = make_record(tmp_path), (ROOT / "eval_bpb.py").read_text()
    for at, changed in (("class Sliding:", []), ("class Phases:", ["eval_bpb.py"])):
        assert source.count(at) == 1
        (folder / "eval_bpb.py").write_text(source.replace(at, f"def mine():\n    return 1\n\n\n{at}"))
        assert [f["file"] for f in check.review_folder(folder, True) if f["rule"] == "judge-changed"] == changed


def test_rescore_runs_the_judge_on_the_artifact_that_the_record_names(tmp_path, judge, dataset):
    folder = make_record(tmp_path)
    _, score, _ = judge(mine("logits[:, 9] = 1.0"), "--trust")  # rounding moves it by nothing
    artifact = tmp_path / "artifact.pyz"
    json_with(dataset={"name": str(dataset)})(folder)
    assert "no seed has an artifact" in check.rescore(folder, artifact, None, True)[0]["message"]
    claim = score["val_bpb"] + 0.001
    seed_with(artifact_sha256=hashlib.sha256(artifact.read_bytes()).hexdigest(), val_bpb=claim)(folder)
    [found] = check.rescore(folder, tmp_path, None, True)
    assert f"seed 2: claimed {claim}, the judge finds {score['val_bpb']:.4f}" in found["message"], found
    [found] = check.rescore(folder, artifact, tmp_path / "no-data", True)
    assert "seed 2: the judge exits 2: " in found["message"], found


def test_a_turn_tells_its_verdict_from_the_ledger(tmp_path, monkeypatch):
    for seed, idea, bpb in [(s, i, 1.2 - 0.01 * i - s / 1e4 * (1 + i / 9)) for i in (0, 1) for s in (1, 2, 3)]:
        name = f"{idea}_s{seed}"
        ledger.append(fake_run(tmp_path / "runs" / name, seed, bpb, lr=0.02 + idea, idea="wider" * idea,
                               parent=f"0_s{seed}" * idea))
    [(verdict, numbers, row)] = turn.ideas(ledger.read_ledger(tmp_path / "runs/ledger.tsv"))
    assert verdict == "keep" and "n 3" in numbers and row["idea"] == "wider"
    monkeypatch.chdir(tmp_path)
    name, files, config = turn.parent_of("1_s2")
    assert name == "1" and config["lr"] == 1.02 and files == {"train_gpt.py": TRAINER.encode()}
    with pytest.raises(BadInput, match="no run, no record and no commit"):
        turn.parent_of("nobody")


def test_the_p_value_is_students():
    table = (6.313752, 1, 0.05), (2.919986, 2, 0.05), (2.131847, 4, 0.05), (3.746947, 4, 0.01), (1.660234, 100, 0.05)
    for t, df, p in table:
        assert stats.t_upper(t, df) == pytest.approx(p, abs=1e-7) == 1 - stats.t_upper(-t, df)
        assert stats.t_critical(p, df) == pytest.approx(t, abs=1e-5)
    # closed forms at one and two degrees of freedom
    assert stats.t_upper(3.7, 1) == pytest.approx(0.5 - math.atan(3.7) / math.pi, rel=1e-8)
    assert stats.t_upper(60, 2) == pytest.approx(0.5 - 60 / (2 * math.sqrt(2 + 3600)), rel=1e-8)
    t, df, p = stats.welch(2.0, 4.0, 4, 9.0, 9)   # by hand: sqrt(1 + 1) and (1 + 1)^2 / (1/3 + 1/8)
    assert (t, df) == (pytest.approx(math.sqrt(2)), pytest.approx(96 / 11))
    assert [stats.welch(gain, 0, 3, 0, 3)[2] for gain in (-1.0, 0.0, 1.0)] == [1, 0.5, 0]
    # The same seeds are paired: gains of 0.001, 0.002 and 0.003 whatever the seeds' own spread. t = sqrt(12), df = 2.
    ours, theirs = {1: 1.0, 2: 1.2, 3: 1.4}, {1: 1.001, 2: 1.202, 3: 1.403}
    c = stats.comparison(ours, theirs, 1.0)
    assert c["paired"] and (c["t"], c["df"]) == (pytest.approx(12 ** 0.5), 2)
    assert c["p"] == pytest.approx(0.5 - 12 ** 0.5 / (2 * math.sqrt(2 + 12)), rel=1e-6)
    assert (c["verdict"], c["runs_for_any_gain"], c["runs_for_written_rule"]) == ("run 2 more a side", 5, None)
    assert c["noise_floor_bpb"] == pytest.approx(stats.t_critical(0.01, 2) * 0.001 / 3 ** 0.5)
    assert stats.comparison(theirs, ours, 1.0)["verdict"] == "drop"
    apart = stats.comparison(ours, {s + 3: v for s, v in theirs.items()}, 1.0)
    assert not apart["paired"] and apart["p"] > 0.4 and apart["verdict"] == "drop"
    with pytest.raises(BadInput, match="each side needs two"):
        stats.comparison(ours, {1: 1.0}, 1.0)


def test_compare_takes_nats_from_the_dataset_and_refuses_what_does_not_compare(tmp_path):
    a, b = ([fake_run(tmp_path / f"{side}{s}", s, base + n * s / 1e4, score={"dataset": {"tokenizer_sha256": n}})
             for s in (1, 2, 3)] for side, base, n in (("a", 1.19, 1), ("b", 1.2, 2)))
    out = command("compare", *a, "--", *b, code=0)
    for words in ("candidate  val_bpb 1.19020  std 0.00010  n 3", "baseline   val_bpb 1.20040  std 0.00020  n 3",
                  "gain       +0.02635 nats per token = +0.01020 bits per byte", "is 2.5831 nats per token)\n",
                  "test       paired by seed: t 176.669, df 2.00, one-sided p 1.6e-05", ": met, p 2.44e-05\n",
                  "practised  any gain at p < 0.25: met", "under 0.00040 bits", "3 for any gain, 3 for", "verdict    k",
                  "tokenizers differ"):
        assert words in out, out
    worse = json.loads(command("compare", *b, "--", *a, "--json", code=0))
    assert not worse["practised_rule"] and worse["runs_for_any_gain"] is None and worse["p"] > 0.99
    for n, (words, config, score) in enumerate([
            ("in documents: d", {}, {"dataset": {"val_docs_sha256": "f"}}), ("pack.py {0} && ", {}, {"limit_docs": 10}),
            ("alike in predictor: x, y; such", {}, {"predictor": "y"}), ("nats cannot be told", {}, {"val_bytes": 0}),
            ("not alike in max_seconds: 0, 600.0", {"max_seconds": 0, "max_steps": 9}, {})]):
        other = fake_run(tmp_path / str(n), 4, score=score, **config)
        x = fake_run(tmp_path / f"x{n}", 5, score={"predictor": "x"})
        assert words.format(other) in command("compare", *a, "--", other, x, code=2)
    for runs, words in (((*a, "--", b[0]), "each side needs two"), ((a[0], a[0], "--", *b), "stands twice on one side"),
                        (a, "candidates on the left"), ((*a, "--"), "candidates on the left")):
        assert words in command("compare", *runs, code=2)


def test_the_leaderboard_is_up_to_date_and_ranks_records_and_draws_them(tmp_path):
    for name, text in submit.leaderboard().items():
        assert (ROOT / "records" / name).read_text() == text, "run: python records/submit.py --leaderboard"
    assert "None yet" in submit.leaderboard(tmp_path / "records")["README.md"]
    make_record(tmp_path, "worse")
    json_with(val_bpb=1.1, author="A|<b>")(make_record(tmp_path, "best"))
    board = submit.leaderboard(tmp_path / "records")
    text, picture = board["README.md"], board["leaderboard.svg"]
    assert text.index("[best]") < text.index("[worse]")
    assert ("\n| **1.10000** | 0.00010 | 3 | [best](track_10min_16mb/2026-01-02_best/README.md) | A&#124;&lt;b&gt; "
            "| 2026-01-02 | 15,900,000 | fineweb | 8 x NVIDIA H100 | - |\n") in text
    assert picture.count("<circle") == 2 and "prefers-color-scheme:dark" in picture and "fineweb 1.1000" in picture
    minidom.parseString(picture)
    json_with(val_bpb="x")(tmp_path / "records/track_10min_16mb/2026-01-02_best")
    with pytest.raises(BadInput, match="no val_bpb or no"):
        submit.leaderboard(tmp_path / "records")


def test_curves_hold_every_point_of_every_run_once(tmp_path):
    folders = [tmp_path / "a<b>", tmp_path / "empty"]
    for folder in folders:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("")
    rows = [("step", 1.0, 9.0), ("step", 2.0, 3.0), ("val", 2.0, 1.5), ("step", 3.0, 2.5), ("resume", 2.5, 0.0),
            ("step", 3.5, 2.4), ("step", 4.0, None)]
    (folders[0] / "metrics.jsonl").write_text("".join(json.dumps(
        {"kind": k, "train_seconds": at, "train_loss": v} | ({"val_bpb": v} if k == "val" else {"lr": 1.0})) + "\n"
        for k, at, v in rows) + '{"kind": "st')
    points = plot.read_points(folders[0])
    assert [at for at, _ in points["lr"]] == [1.0, 2.0, 3.5, 4.0] and len(points["val_bpb"]) == 1
    assert [v for _, v in points["train_loss"]] == [9.0, 3.0, 1.5, 2.4]
    picture = minidom.parseString(plot.draw(folders))
    assert len(picture.getElementsByTagName("circle")) == 1
    assert [t.firstChild.data for t in picture.getElementsByTagName("text")][:2] == ["a<b>: 1.5000", "empty"]
    minidom.parseString(plot.draw(folders[1:]))


def test_the_ledger_gets_one_line_a_run_with_its_parent_and_status(tmp_path):
    first = fake_run(tmp_path / "runs/first", 1, 1.3)
    with open(first / "metrics.jsonl", "a") as f:
        f.write('{"kind": "st')   # cut by a kill
    ledger.append(first)
    changed = dict(lr=0.05, parent="first", idea="faster  now", max_steps=9)
    line = ledger.append(fake_run(tmp_path / "runs/second", 1, 1.2, **changed))
    assert [line[k] for k in ("parent", "idea", "config_differences", "status", "budget", "dataset", "steps")] == [
        "first", "faster  now", "lr=0.05 max_steps=9", "ok", "9 steps", "fineweb:dddddddd", 5000]
    assert "lr: 0.02 -> 0.05" in (tmp_path / "runs/second/parent.diff").read_text()
    for code, status in ((3, "nan"), (1, "crash")):
        broken = fake_run(tmp_path / f"runs/{status}", 2, source="")
        (broken / "score.json").unlink()
        assert ledger.append(broken)["status"] == "unscored"
        (broken / "crash.json").write_text(json.dumps({"reason": "the loss is nan", "exit_code": code}))
        assert ledger.append(broken)["status"] == status
    fat = ledger.append(fake_run(tmp_path / "runs/fat", score={"artifact_bytes": 16_000_001}))
    assert fat["parent"] is None and fat["status"] == "over-budget"
    rows = ledger.read_ledger(tmp_path / "runs/ledger.tsv")
    rows = [[row[k] for k in ("run", "parent", "idea", "val_bpb", "budget")] for row in rows]
    assert rows[:3] == [["first", "-", "-", "1.3", "600.0 s"], ["second", "first", "faster now", "1.2", "9 steps"],
                        ["nan", "-", "-", "-", "600.0 s"]] and len(rows) == 7
    with open(first / "metrics.jsonl", "a") as f:
        f.write("\n")
    with pytest.raises(BadInput, match="metrics.jsonl:3: not a JSON object with a kind"):
        ledger.append(first)


def test_a_change_set_adds_one_record_and_nothing_else(tmp_path, monkeypatch):
    def git(*args):
        call = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(call, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    write("train_gpt.py", TRAINER)(tmp_path)
    write(".gitignore", "runs\n")(tmp_path)
    git("init", "-q"), git("add", "-A"), git("commit", "-qm", "x")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    head = git("rev-parse", "--short=10", "HEAD")
    assert [ledger.commit_of({"train_gpt.py": text}) for text in (TRAINER.encode(), b"x")] == [head, head + "+"]
    with pytest.raises(BadInput, match="nothing has changed"):
        check.change_set("HEAD")
    folder = make_record(tmp_path)
    assert check.change_set("HEAD") == ([], [str(folder)])
    write("train_gpt.py", "changed")(tmp_path)   # the next idea, not committed
    write("records/README.md", "the leaderboard")(tmp_path)
    assert check.change_set("HEAD") == ([], [str(folder)])
    git("add", "-A"), git("commit", "-qm", "y")
    assert [(f["rule"], f["file"]) for f in check.change_set("HEAD~1")[0]] == [("change-set", "train_gpt.py")]
    replaced("submission.json", "Ann", "Bob")(folder)
    assert [f["message"] for f in check.change_set("HEAD")[0]] == ["a record is only added, never changed or removed"]
    make_record(tmp_path, "second")
    assert "one record a change set, not 2: records/" in check.change_set("HEAD")[0][-1]["message"]
    with pytest.raises(BadInput, match="git merge-base"):
        check.change_set("--output=x")
