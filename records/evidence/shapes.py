"""What bytes buy: models of other shapes, trained for the same time and packed at several sizes.

    python records/evidence/shapes.py --data=NAME      a dataset of a small vocabulary: data/prepare.py docs ... --vocab_size=512

More weights in the same bytes have coarser steps, and in the same time see less text: a shape takes as many steps as
the record's step on an H100 would leave it. Prints a table in Markdown: bits per byte of each shape at each number of
bytes, as the difference from the base, mean and spread over paired seeds. The shapes are small, so that in minutes the
base sees nearly as many tokens a weight as the record, which sees a hundred: 79 at 2,400 steps.
"""
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import numpy as np  # noqa: E402
import torch  # noqa: E402

from data.dataset import BadInput, Parser, command, find_dataset, read_meta  # noqa: E402
from pack import constant_for, gather, pack_model, unpack_model  # noqa: E402
from records.evidence.ablate import run  # noqa: E402
from train_gpt import GPT, PRESETS, Config, Dataset, Validation, load_checkpoint  # noqa: E402

BASE = dict(n_layer=4, n_embd=32, n_head=2, n_kv_head=1, mlp_dim=128, loop_passes=1, two_lane_from=3, ema_decay=0.995,
            log_every=500, val_tokens=65536)
# name: (ms of the record's step when its shape changes like this, settings). The public record's 96 ms are 11 passes of
# 7.5 ms and 13.5 ms of head, loss and the rest; a pass is 3.6 ms of matrix products at 47 % of peak, 1.5 of attention
# and 2.4 of memory traffic. A half more MLP costs a pass 1.3 ms of products and 0.25 of traffic.
SHAPES = {
    "base": (96.0, {}),
    "MLP x 1.5": (113.1, dict(mlp_dim=192)),
    "MLP x 2": (130.1, dict(mlp_dim=256)),
    "layers x 1.5": (137.3, dict(n_layer=6, two_lane_from=5)),
    "width x 1.25": (132.4, dict(n_embd=40, mlp_dim=160)),
    "width x 1.5": (173.7, dict(n_embd=48, n_head=3, mlp_dim=192)),
}
BITS = 2.8, 3.4, 4.0, 5.0, 6.0  # per weight of the base, overhead included: the sizes that are compared
KL_GOALS = 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003  # nats per token, roughly: the sizes that are packed


def config(shape: dict, vocab_size: int) -> Config:
    return Config(**{**PRESETS["proxy"], **BASE, **shape, "vocab_size": vocab_size})


def curve(folder: Path) -> tuple[float, list[tuple[int, float]]]:
    """A run's folder -> val_bpb in full precision, and [(bytes of the packed model, val_bpb)], smallest first."""
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    cfg, weights = checkpoint["config"], checkpoint["weights"]
    matrices = gather(checkpoint, folder / "checkpoint.pt")
    val, points = Validation(Dataset(cfg), cfg, 0, 1, torch.device("cpu"), True), []
    for goal in KL_GOALS:
        packed = pack_model(asdict(cfg), weights, matrices, constant_for(matrices, goal))
        points.append((len(packed.blob), val(unpack_model(packed.blob)[1].losses, True)[1]))
    return checkpoint["run"]["val_bpb"], points


def between(points: list[tuple[int, float]], sizes: list[float]) -> np.ndarray:
    """val_bpb at each size, on lines between the points over log bytes; NaN outside."""
    size, bpb = np.array(points).T
    return np.interp(np.log(sizes), np.log(size), bpb, math.nan, math.nan)


def main() -> int:
    parser = Parser(prog="shapes.py", description=__doc__)
    parser.add_argument("--data", default="proxy", help="dataset: a name under data/ or a folder")
    parser.add_argument("--steps", type=int, default=2400, help="steps of the base; other shapes by their time")
    parser.add_argument("--seeds", default="1,2,3", help="seeds, each used for every shape")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",") if s.strip().isdigit()]
    if len(seeds) < 2 or args.steps < 1:
        raise BadInput("--seeds: at least two numbers" if len(seeds) < 2 else f"--steps={args.steps} must be above 0")
    folder = find_dataset(args.data).resolve()
    vocab_size = read_meta(folder)["vocab_size"]
    steps = {name: round(args.steps * SHAPES["base"][0] / ms) for name, (ms, _) in SHAPES.items()}
    tasks = [(name, seed) for seed in seeds for name in SHAPES]
    results, begin = {}, time.time()
    torch.set_num_threads(1)

    def trained(name, seed):
        flags = [f"--{k}={v}" for k, v in {**BASE, **SHAPES[name][1]}.items()]
        return curve(run(name.replace(" ", "_"), seed, flags, [f"--data={folder}", f"--max_steps={steps[name]}"]))

    with ThreadPoolExecutor(args.jobs) as pool:
        for i, (task, result) in enumerate(zip(tasks, pool.map(lambda task: trained(*task), tasks)), 1):
            results[task] = result
            left = (time.time() - begin) / i * (len(tasks) - i)
            print(f"{i}/{len(tasks)} {task[0]} seed {task[1]}: {results[task][0]:.4f}, {left / 60:.0f} min left",
                  file=sys.stderr, flush=True)
    n = {name: sum(p.numel() for p in GPT(config(shape, vocab_size)).parameters())
         for name, (_, shape) in SHAPES.items()}
    sizes = [bits * n["base"] / 8 for bits in BITS]
    print(f"n = {len(seeds)} seeds; the base has {n['base']:,} weights and trains for {args.steps:,} steps of "
          f"{config({}, vocab_size).batch_tokens:,} tokens.\n")
    print("| shape | weights | steps | unpacked |" + "".join(f" {size:,.0f} bytes |" for size in sizes))
    print("|---|--:|--:|--:|" + "--:|" * len(sizes))
    for name in SHAPES:
        table = np.array([[full, *between(points, sizes)] for full, points in (results[name, s] for s in seeds)])
        if name == "base":
            base, cells = table, [f"{x:.4f}" for x in table.mean(0)]
        else:
            cells = [f"{x:+.4f} ({y:.4f})" for x, y in zip((table - base).mean(0), (table - base).std(0, ddof=1))]
        print(f"| {name} | {n[name]:,} | {steps[name]:,} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
