"""What each technique of train_gpt.py is worth: the same run with and without it, paired by seed.

    python records/evidence/ablate.py --data=proxy --max_steps=300            every technique at equal tokens, three seeds
    python records/evidence/ablate.py --data=proxy --max_seconds=120          the same at equal training time
    python records/evidence/ablate.py --only=relu2,baseline --seeds=1,2,3,4   some of them

A technique is taken out by a patch to the one file, or by a flag; a patch that no longer applies stops the command.
Prints a table in Markdown: val_bpb without the technique minus val_bpb with it (above 0: it helps), mean and spread
over the seeds, and what the public records measured at scale. Runs land in runs/ablate/ and are not repeated.
"""
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
from data.dataset import BadInput, Parser, command, find_dataset  # noqa: E402

RELU2 = ("return F.leaky_relu(x, 0.5).square()", "return F.relu(x).square()")
NO_GATE = ('gate = F.linear(n[:, :self.cfg.gate_dims], W["gate"])', 'gate = 30 + 0 * F.linear(n[:, :12], W["gate"])')
NO_XSA = ("gated_xsa(y, v, gate).reshape(n.shape)", "(y * gate.sigmoid()[:, :, None]).reshape(n.shape)")
NO_SMEAR = ("x = x + (cast(self.smear_scale) * open_gate)[:, None] * before",
            "x = x + 0 * cast(self.smear_scale) * open_gate[:, None]")
NO_MIX = ("u = x0_mix[2 * i] * x + x0_mix[2 * i + 1] * x0", "u = x0_mix[2 * i] * x + 0 * x0_mix[2 * i + 1]")
NO_DEPTH = ("[:, None, None] ** -0.5", "[:, None, None] ** -0.0")
NO_SKIPS = ("x = torch.lerp(skip_scale[j] * skips.pop(), x, skip_gate[j])",
            "x = x + 0 * skip_scale[j] * skip_gate[j] * skips.pop()")
NO_ROW_NORM = ("X = G / G.norm(dim=-1, keepdim=True).clamp(min=1e-7)", "X = G")
STOCK_NS = ("def orthogonalize(", "POLAR_EXPRESS = [(3.4445, -4.775, 2.0315)] * 5\n\n\ndef orthogonalize(")
LONG_ONLY = ("return cfg.seq_len * (1 if progress < 0.1 else 2 if progress < 0.7 else 3) // 3", "return cfg.seq_len")
ACROSS = ("np.concatenate([[0], starts, [n_tokens]])", "np.array([0, n_tokens])")
FULL_ROPE, NO_LOOP, ONE_LANE = "--rope_dims=HEAD", "--loop_passes=1", "--two_lane_from=LAYERS"
NO_EMA = ("--ema_decay=0", "--lr_floor=0")

# name: (what is taken out, patches and flags, gain in the public challenge or None where never isolated)
VARIANTS = {
    "relu2": ("LeakyReLU^2 (relu^2 instead)", [RELU2], "0.002 to 0.003"),
    "xsa": ("XSA", [NO_XSA], "0.0047 with averaged weights"),
    "gate": ("attention gate", [NO_GATE], "0.0005 with SmearGate"),
    "smear": ("SmearGate", [NO_SMEAR], "0.0005 with the gate"),
    "mix": ("first embedding mixed in", [NO_MIX], None),
    "depth": ("norm scale 1/sqrt(layer + 1)", [NO_DEPTH], "0.0023 with partial RoPE"),
    "rope": ("partial RoPE (all dimensions instead)", [FULL_ROPE], "0.0023 with the norm scale"),
    "skips": ("U-Net skips", [NO_SKIPS], None),
    "lanes": ("two lanes (one instead)", [ONE_LANE], "0.004 with fused kernels"),
    "loop": ("depth recurrence", [NO_LOOP], "0.003, at equal time"),
    "context": ("short contexts first", [LONG_ONLY], "0.001 with a longer context in scoring"),
    "isolation": ("attention within documents", [ACROSS], "0.0004"),
    "rownorm": ("rows of one length before Newton-Schulz", [NO_ROW_NORM], "0.001"),
    "polar": ("Polar Express (Jordan's coefficients instead)", [STOCK_NS], "part of 0.0016"),
    "ema": ("averaged weights (cooldown to 0 instead)", [*NO_EMA], "0.001 to 0.011"),
    "baseline": ("all of them: the plain baseline", [
        RELU2, NO_GATE, NO_XSA, NO_SMEAR, NO_MIX, NO_DEPTH, NO_SKIPS, NO_ROW_NORM, STOCK_NS,
        LONG_ONLY, ACROSS, FULL_ROPE, NO_LOOP, ONE_LANE, *NO_EMA], None),
}


def patched(changes) -> tuple[str, list[str]]:
    """-> (the source of train_gpt.py, patched; the flags). BadInput where a patch does not apply once."""
    source, flags = (ROOT / "train_gpt.py").read_text(), []
    layers, head = shape()
    for change in changes:
        if isinstance(change, str):
            flags.append(change.replace("HEAD", str(head)).replace("LAYERS", str(layers)))
        elif source.count(change[0]) != 1:
            n = source.count(change[0])
            raise BadInput(f"train_gpt.py: the patch of {change[0]!r} applies {n} times, not once")
        else:
            source = source.replace(*change)
    return source, flags


def shape() -> tuple[int, int]:
    """-> layers and head dimension of the proxy preset."""
    from train_gpt import PRESETS
    preset = PRESETS["proxy"]
    return preset["n_layer"], preset["n_embd"] // preset["n_head"]


def run(name: str, seed: int, changes, flags: list[str]) -> Path:
    """-> the folder of one run on one thread, trained or remembered."""
    source, more = patched(changes)
    key = hashlib.sha256(repr((source, flags, more)).encode()).hexdigest()[:8]  # another trainer is another run
    folder = Path("runs/ablate") / f"{name}_s{seed}_{key}"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "train_gpt.py").write_text(source)
        for file in ("pack.py", "eval_bpb.py"):
            (folder / file).write_text("")  # copied with the run's sources, never used
        (folder / "data").mkdir()
        for file in ("__init__.py", "dataset.py", "tokenizer.py"):
            shutil.copyfile(ROOT / "data" / file, folder / "data" / file)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
        flags = ["--preset=proxy", "--run=r", f"--seed={seed}", "--val_points=1", *flags, *more]
        done = subprocess.run([sys.executable, "train_gpt.py", *flags], cwd=folder, env=env, text=True,
                              capture_output=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BadInput(f"{folder}: exit code {done.returncode}: {last}")
        (folder / "done").touch()
    return folder / "runs/r"


def val_bpb(folder: Path) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["val_bpb"]


def main() -> int:
    parser = Parser(prog="ablate.py", description=__doc__)
    parser.add_argument("--data", default="proxy", help="dataset: a name under data/ or a folder")
    parser.add_argument("--seeds", default="1,2,3", help="seeds, each used with and without every technique")
    parser.add_argument("--only", default=",".join(VARIANTS), help="techniques")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--max_steps", type=int, default=0, help="steps of each run: equal tokens")
    parser.add_argument("--max_seconds", type=float, default=0, help="training seconds of each run: equal time")
    args = parser.parse_args()
    seeds, names = [int(s) for s in args.seeds.split(",") if s.strip().isdigit()], args.only.split(",")
    unknown = set(names) - set(VARIANTS)
    if unknown or len(seeds) < 2 or bool(args.max_steps) == bool(args.max_seconds):
        raise BadInput(f"--only: unknown {', '.join(sorted(unknown))}" if unknown else "--seeds: at least two numbers"
                       if len(seeds) < 2 else "one of --max_steps and --max_seconds is needed")
    budget = f"--max_steps={args.max_steps}" if args.max_steps else f"--max_seconds={args.max_seconds}"
    flags = [f"--data={find_dataset(args.data).resolve()}", budget, "--calib_tokens=0"]
    for name in names:
        patched(VARIANTS[name][1])  # all patches apply, before hours are spent
    tasks = [(name, seed) for seed in seeds for name in ("all", *names)]
    begin, results = time.time(), {}
    with ThreadPoolExecutor(args.jobs) as pool:
        changes = {"all": [], **{name: VARIANTS[name][1] for name in names}}
        futures = [(task, pool.submit(run, *task, changes[task[0]], flags)) for task in tasks]
        for i, (task, future) in enumerate(futures, 1):
            results[task] = val_bpb(future.result())
            left = (time.time() - begin) / i * (len(tasks) - i)
            print(f"{i}/{len(tasks)} {task[0]} seed {task[1]}: {results[task]:.4f}, {left / 60:.0f} min left",
                  file=sys.stderr, flush=True)
    whole = [results["all", s] for s in seeds]
    print(f"With everything: val_bpb {statistics.mean(whole):.4f} +- {statistics.stdev(whole):.4f}, n = {len(seeds)}, "
          f"{budget[2:]} each.\n\n| without | val_bpb worse by | spread | public gain at scale |\n|---|--:|--:|---|")
    for name in names:
        gains = [results[name, s] - results["all", s] for s in seeds]
        what, _, public = VARIANTS[name]
        change = f"{statistics.mean(gains):+.4f} | {statistics.stdev(gains):.4f}"
        print(f"| {what} | {change} | {public or 'not isolated'} |")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
