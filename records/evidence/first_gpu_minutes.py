"""The first minutes on a GPU: what of this project holds there, section by section, in under ten minutes of one H100.

    python records/evidence/first_gpu_minutes.py            the record's Config
    python records/evidence/first_gpu_minutes.py --tiny     a tiny one, on a CPU too: does this tool run

Each section prints what it measures as it does; one that fails says why in a line, and the others go on (exit code 1).
"""
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "records/evidence")]
import numpy as np  # noqa: E402
import roofline  # noqa: E402
import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import train_gpt as t  # noqa: E402
from data.dataset import Parser, command  # noqa: E402

# GB that the compiler's own kernels move for one row of the record (vocabulary 8192), as roofline.py counts them.
OWN_GB = {False: 50.3, True: 75.5}
# Parts of a row by the names of its kernels: the first row that matches names it.
PARTS = [("inductor's own kernels", ("triton_",)), ("attention", ("flash", "fmha", "attention")),
         ("products and loss", ("up_kernel", "ce_forward", "ce_backward", "gemm", "nvjet", "cutlass", "xmma", "mm")),
         ("copies and the rest", ("",))]
TINY = dict(n_layer=3, n_embd=16, n_head=2, n_kv_head=1, mlp_dim=16, loop_first=1, loop_last=1, two_lane_from=2,
            rope_dims=4, batch_tokens=128, row_tokens=128, seq_len=48, val_tokens=256, calib_tokens=128, val_points=1)


def python(folder: Path, *arguments) -> str:
    """Runs a file of the project in a folder -> what it printed. Raises with its last line where it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1])
    return done.stdout


def found(text: str, key: str) -> str:
    """The rest of the last line that starts with key."""
    return [line for line in text.splitlines() if line.startswith(key)][-1][len(key):].strip()


def kernels(cfg, device, folder):
    """Are the fused kernels their references within rounding? pick_kernels() names those that are not."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"{t.environment(device, 1)}\nattention: {t.pick_attention(device, dtype)[0]}")
    print(f"as their references: {list(t.pick_kernels(cfg, device, dtype, print)) or 'none: torch has its own'}")


def record(cfg, device, folder):
    """A whole short run on random tokens: all graphs, both states of the recurrence, calibration, checkpoint."""
    flags = [f"--{k}={v}" for k, v in asdict(cfg).items() if k not in ("vocab_size", "data", "run")]
    python(folder, ROOT / "train_gpt.py", *flags, "--data=synthetic", "--run=record", "--max_steps=40", "--log_every=2",
           "--max_seconds=0")
    log = (folder / "runs/record/log.txt").read_text()
    print(f"warm-up: {found(log, 'warmup_seconds:').split()[0]} s; peak memory: {found(log, 'peak_memory_mb:')} MB")
    print(*(line for line in log.splitlines() if "WARNING" in line), sep="\n")
    lines = [json.loads(x) for x in (folder / "runs/record/metrics.jsonl").read_text().splitlines()]
    for name, steps in (("un-looped", range(10, 15)), ("looped", range(30, 41))):  # on from 0.35 of 40 steps
        some = [x for x in lines if x["kind"] == "step" and x["step"] in steps]
        print(f"{name}: {np.median([x['step_ms'] for x in some]):.1f} ms a step of {cfg.batch_tokens:,} tokens, "
              f"{cfg.batch_tokens // cfg.row_tokens} rows; MFU {np.median([x.get('mfu', np.nan) for x in some]):.1%}")


def parts(cfg, device, folder):
    """Forward and backward of one row: the time of its kernels by part, beside the roofline's prediction."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    name, attend = t.pick_attention(device, dtype)
    compiled, sync = name != "sdpa", partial(torch.cuda.synchronize, device) if cuda else lambda: None
    model = t.GPT(cfg, attend, dtype, **t.pick_kernels(cfg, device, dtype, print))
    model.init_matrices()
    model.to(device)
    losses = torch.compile(model.losses, dynamic=False, fullgraph=True) if compiled else model.losses
    row = torch.randint(cfg.vocab_size - 1, (cfg.row_tokens + 1,), device=device)
    longest = cfg.seq_len if compiled else 0
    seg = t.make_segments(np.arange(0, cfg.row_tokens, 700), cfg.row_tokens, cfg.seq_len, device, longest)
    for looped in (False, True):
        step = lambda: losses(row[:-1], row[1:], seg, looped).sum().backward()
        for _ in range(3):
            step()
        sync()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as traced:
            step()
            sync()
        begin = time.perf_counter()
        for _ in range(5 if cuda else 1):
            step()
        sync()
        ms = (time.perf_counter() - begin) * 1000 / (5 if cuda else 1)
        flop = t.count_flops(cfg, looped) * cfg.row_tokens
        spent, largest = defaultdict(float), []
        for event in traced.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[next(part for part, keys in PARTS if any(k in event.key.lower() for k in keys))] += us / 1000
            largest.append((us / 1000, event.count, event.key[:90]))
        predicted = {"inductor's own kernels": OWN_GB[looped] / roofline.GB_PER_MS,
                     "products and loss": flop / 1e12 / roofline.TFLOP_PER_MS,
                     "attention": roofline.ATTENTION_MS * len(t.block_order(cfg, looped))}
        print(f"{'looped' if looped else 'un-looped'}: {ms:.1f} ms a row, {flop / ms / 1e9:.0f} TFLOP/s")
        rows = [[part, f"{predicted.get(part, 0):.1f}", f"{spent[part]:.1f}"] for part, _ in PARTS]
        print(roofline.table([["ms", "predicted for an H100's record", "measured here"], *rows]))
        print("\n".join(f"{us:9.2f} ms {n:5} x {key}" for us, n, key in sorted(largest, reverse=True)[:12]))


def whole(cfg, device, folder):
    """Train, pack and score a short run on the demo's documents, with the adaptive predictor."""
    if not (ROOT / "data/demo/meta.json").exists():
        python(ROOT, ROOT / "data/prepare.py", "demo")
    flags = [f"--{k}={v}" for k, v in asdict(cfg).items() if k not in ("vocab_size", "data", "run")]
    python(folder, ROOT / "train_gpt.py", *flags, "--data=demo", "--run=demo", "--max_steps=40", "--max_seconds=0",
           "--val_points=1")
    packed = python(folder, ROOT / "pack.py", "demo")
    print(f"packed: {found(packed, 'artifact_bytes:')} bytes in {found(packed, 'pack_seconds:')} s")
    subprocess.run([sys.executable, str(ROOT / "eval_bpb.py"), "runs/demo/artifact.pyz", f"--device={device.type}",
                    f"--limit_docs={2 if cfg.n_embd == TINY['n_embd'] else 0}"], cwd=folder, capture_output=True)
    score = json.loads((folder / "runs/demo/score.json").read_text())
    seconds, n = score["phases"]["score"], score["val_docs"]
    print(f"{score['predictor']}: {score.get('val_bpb', score.get('untrusted_bpb')):.4f} bits per byte, {n} documents "
          f"({score['val_tokens'] / n:.0f} targets each) in {seconds:.1f} s: 50,000 such documents on eight: "
          f"{seconds / n * 50_000 / 8:.0f} s")


def main() -> int:
    parser = Parser(prog="first_gpu_minutes.py", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that the tool runs, no more")
    cfg = replace(t.Config(), vocab_size=8192, **(TINY if parser.parse_args().tiny else {}))
    device, failed, begin = torch.device("cuda" if torch.cuda.is_available() else "cpu"), 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for section in (kernels, record, parts, whole):
            print(f"\n## {section.__name__}: {section.__doc__}", flush=True)
            try:
                section(cfg, device, Path(folder))
            except Exception as e:
                failed += 1
                print(f"FAILED: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
            print(f"({time.perf_counter() - begin:.0f} s so far)", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(command(main))
