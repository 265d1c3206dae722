"""What other packers make of a run's checkpoint, beside pack.py.

    python records/evidence/packers.py RUN      a run folder, or a name in runs/; empty: the newest

Writes RUN/packing.md (tables) and RUN/packing.svg (curves): bytes of the matrices against KL(full precision || packed)
and against validation loss, both measured on the run's validation documents. Small vectors stay as they are, uncounted.
"""
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import zstandard  # noqa: E402

from data.dataset import (BadInput, Parser, Progress, atomic_write, command, find_dataset, find_run,  # noqa: E402
                          read_meta, read_shard)
from data.runs import environment  # noqa: E402
from pack import (TRELLIS, Bank, constant_for, encode, entropies, expected_kl, gather, pack_model,  # noqa: E402
                  quantise, quarter, scales, split)
from train_gpt import GPT, load_checkpoint, make_segments  # noqa: E402

SCALAR = np.zeros((1, 2), np.int32)         # a trellis of one state: plain rounding
VAL_TOKENS = 32768
KL_GOALS = 0.05, 0.02, 0.008, 0.003, 0.0012, 0.0005    # of the tuned, scalar and trellis curves: roughly
CLIP_FACTORS = 0.5, 0.7, 1.0, 1.4, 2.0      # of the clips of the other three packers
PUBLISHED = {"embed.weight": (15, 63), "qkv": (13, 31), "o": (13, 31), "up": (12, 31), "down": (12, 31)}    # k, qmax
GROUPS = ("embed.weight",), ("qkv", "o"), ("up", "down")


class Meter:
    """Nats per token by which a packed model differs from the full one, on the first validation tokens."""

    def __init__(self, checkpoint: dict):
        self.cfg, self.model = checkpoint["config"], GPT(checkpoint["config"]).eval().requires_grad_(False)
        folder = find_dataset(self.cfg.data)
        if read_meta(folder)["tokenizer_sha256"] != checkpoint["run"]["dataset"]["tokenizer_sha256"]:
            raise BadInput(f"{folder}: its tokenizer is not the one that the run was trained with")
        tokens = np.concatenate([read_shard(p, self.cfg.vocab_size) for p in sorted(folder.glob("val_*.bin"))])
        tokens = torch.from_numpy(tokens[:VAL_TOKENS + 1].astype(np.int64))
        self.rows = [tokens[a:a + 4097] for a in range(0, len(tokens) - 1, 4096)]
        self.n = sum(len(x) - 1 for x in self.rows)
        self.full = checkpoint["weights"]
        self.reference = self.log_probabilities(self.full)
        self.loss = self.loss_of(self.reference)

    @torch.no_grad()
    def log_probabilities(self, weights: dict) -> list[torch.Tensor]:
        self.model.load_state_dict(weights)
        out = []
        for x in self.rows:
            seg = make_segments(np.flatnonzero(x[:-1].numpy() == 0), len(x) - 1, self.cfg.seq_len)     # 0: the boundary
            out.append(F.log_softmax(self.model.logits(self.model(x[:-1], seg)), -1))
        return out

    def loss_of(self, logp) -> float:
        return -sum(p.gather(1, x[1:, None]).double().sum().item() for p, x in zip(logp, self.rows)) / self.n

    def __call__(self, matrices: dict) -> tuple[float, float]:
        """{name: packed matrices} -> (KL(full || packed), rise of the loss)."""
        logp = self.log_probabilities({**self.full, **matrices})
        kl = sum((p.exp() * (p - q)).double().sum().item() for p, q in zip(self.reference, logp)) / self.n
        return kl, self.loss_of(logp) - self.loss


def row_std_bank(bank: Bank, layer: int, qmax: float, feedback: bool) -> tuple[Bank, torch.Tensor, np.ndarray]:
    """-> a layer in steps of std(row) / qmax, its columns in GPTQ's order; the order; the rows' std float16."""
    W, H, n = bank.W[layer], bank.H[layer], bank.W.size(2)
    order = H.diagonal().argsort(descending=True)
    std = W.std(1).clamp(min=1e-8).half()
    A = torch.eye(n)
    if feedback:
        H = H.double()[order][:, order]
        H = H + torch.eye(n) * 0.01 * H.diagonal().mean().clamp(min=1e-12)
        U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        A = (U / U.diagonal()[:, None]).float()
    W = (W / std.float()[:, None])[:, order] * qmax
    zeros = np.zeros((1, max(W.shape)), np.int8)
    return Bank(W[None], None, None, zeros[:, :len(W)], zeros[:, :n], A[None], torch.ones(1, n)), order, std


def pack_row_std(banks: dict, clips: dict, feedback: bool) -> dict:
    """Steps k * std(row) / qmax (#1394, #1855), clips {group: (k, qmax)} -> dict: weights, zstd (bytes with zstd -22),
    contexts (bytes with pack.py's coder), groups {name: (bytes in contexts, expected KL)}."""
    compressor = zstandard.ZstdCompressor(level=22)
    weights, kls, stored, values = {}, {}, 0, []
    for name, bank in banks.items():
        k, qmax = clips[name]
        v, back, scale = np.empty(bank.W.shape, np.int32), torch.empty_like(bank.W), []
        for layer in range(len(v)):
            scaled, order, std = row_std_bank(bank, layer, qmax / k, feedback)
            v[layer][:, order.numpy()] = quantise(scaled, 0, slice(None), 1.0, SCALAR)
            scale.append(std.numpy())
            back[layer] = torch.from_numpy(v[layer] / 2 * (std.float().numpy() * k / qmax)[:, None])
        width = np.int8 if np.abs(v).max() < 256 else np.int16
        stored += len(compressor.compress((v // 2).transpose(0, 2, 1).astype(width).tobytes()))  # transposed
        side = len(compressor.compress(np.concatenate(scale).view(np.uint8).reshape(-1, 2).T.tobytes()))
        stored, values = stored + side, values + [(v, side)]
        weights[name], kls[name] = back.squeeze(0), expected_kl(bank, back)
    rows, cols = zip(*[scales(v) for v, _ in values])
    _, _, histogram = encode([v for v, _ in values], rows, cols)
    coded = entropies(histogram)[0] + [side for _, side in values]         # contexts' own exponents granted for free
    return {"weights": weights, "zstd": stored, "contexts": float(coded.sum()),
            "groups": {name: (size, kls[name]) for name, size in zip(banks, coded)}}


def tuned_clips(banks: dict) -> list[dict]:
    """Clips of embedding, attention and MLP, tuned on the checkpoint's statistics to equal slopes of expected KL."""
    grid = [2 ** (i / 2) for i in range(-6, 7)]
    tries = [pack_row_std(banks, {n: (k * f, q) for n, (k, q) in PUBLISHED.items()}, True) for f in grid]
    best, n_weights = [], sum(bank.W.numel() for bank in banks.values())
    for goal in KL_GOALS:
        price = 16 * math.log(2) * goal / n_weights                        # nats per byte where 6.02 dB are worth a bit
        factors = {}
        for group in GROUPS:
            cost = [sum(t["groups"][n][1] + price * t["groups"][n][0] for n in group) for t in tries]
            factors.update({n: grid[int(np.argmin(cost))] for n in group})
        if factors not in best:
            best.append(factors)
    return [{n: (PUBLISHED[n][0] * f, PUBLISHED[n][1]) for n, f in factors.items()} for factors in best]


def spectrum(banks: dict) -> list[tuple]:
    """How uneven the sensitivities are: 10 log10 of their arithmetic over their geometric mean, which is what steps
    that follow them gain at high rate. Per group: the layers' mean g, the columns' 1 / U_jj^2, the rows' g."""
    db = lambda x: 10 * np.log10(np.mean(x) / np.exp(np.mean(np.log(x))))
    rows = []
    for name, bank in banks.items():
        g = bank.g.double().numpy()
        g = np.maximum(g, 1e-3 * g.mean(1, keepdims=True) + 1e-30)
        columns = bank.cost.double().numpy() / quarter(bank.col) ** 2
        rows.append((name, db(g.mean(1)), np.mean([*map(db, columns)]), np.mean([*map(db, g)])))
    return rows


def at(curve, x: float, of: int, by: int) -> float:
    """Column `of` of a curve [(bytes, KL, loss)] where column `by` is x, on lines between logarithms; NaN outside."""
    points = sorted((math.log(p[by]), math.log(max(p[of], 1e-12))) for p in curve)
    xs, ys = zip(*points)
    return math.exp(np.interp(math.log(x), xs, ys)) if xs[0] <= math.log(x) <= xs[-1] else math.nan


def main() -> int:
    parser = Parser(prog="packers.py", description=__doc__)
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="folder, or name in runs/; empty: newest")
    run, begin = find_run(parser.parse_args().run), time.perf_counter()
    checkpoint = load_checkpoint(run / "checkpoint.pt")
    if not checkpoint["stats"]:
        raise BadInput(f"{run}/checkpoint.pt has no statistics, so there is nothing to compare")
    config, weights, meter = asdict(checkpoint["config"]), checkpoint["weights"], Meter(checkpoint)
    banks = dict(zip(split(weights)[0], gather(checkpoint, run / "checkpoint.pt")))
    n_weights, flat = sum(bank.W.numel() for bank in banks.values()), list(banks.values())
    rtn, published, tuned, granted, scalar, trellis = [], [], [], [], [], []
    curves = {"round to nearest, published clips, zstd -22": rtn, "GPTQ, published clips, zstd -22": published,
              "GPTQ, clips tuned per group, zstd -22": tuned,
              "GPTQ, clips tuned per group, brotli's rate granted": granted,
              "equal slopes, scalar": scalar, "equal slopes, trellis": trellis}
    best = tuned_clips(banks)
    with Progress("comparing", 2 * len(CLIP_FACTORS) + len(best) + 2 * len(KL_GOALS), "packings") as progress:
        for feedback, factor in [(f, x) for f in (False, True) for x in CLIP_FACTORS]:
            x = pack_row_std(banks, {n: (k * factor, q) for n, (k, q) in PUBLISHED.items()}, feedback)
            (published if feedback else rtn).append((x["zstd"], *meter(x["weights"])))
            progress.add()
        for clips in best:
            x = pack_row_std(banks, clips, True)
            measured = meter(x["weights"])
            tuned.append((x["zstd"], *measured))
            granted.append((x["contexts"] * 1.011, *measured))             # brotli was measured at 1.1 % above contexts
            progress.add()
        for code, curve in ((SCALAR, scalar), (TRELLIS, trellis)):
            for goal in KL_GOALS:
                packed = pack_model(config, weights, flat, constant_for(flat, goal), code)
                back = {name: packed.state[name] for name in banks}
                expected = sum(expected_kl(bank, back[name]) for name, bank in banks.items())
                size = sum(n for k, n in packed.sizes.items() if k != "header" and "small" not in k)
                curve.append((size, *meter(back), expected))
                progress.add()

    trained, seconds = checkpoint["run"], time.perf_counter() - begin
    cpu = environment(torch.device("cpu"), 1)["cpu"]
    lines = [f"`python records/evidence/packers.py {run.name}`, {seconds:.0f} s on {cpu}: "
             f"{n_weights:,} weights in matrices, trained for {trained['train_seconds']:.0f} s "
             f"({trained['tokens']:,} tokens); validation loss {meter.loss:.4f} nats per token on {meter.n:,} tokens.",
             "", "![KL against bytes](packing.svg)", "",
             "| packer | bytes | bits per weight | KL | loss rise | expected KL |", "|---|--:|--:|--:|--:|--:|"]
    for name, curve in curves.items():
        for size, kl, rise, *expected in sorted(curve):
            shown = f"{expected[0]:.5f}" if expected else ""
            lines.append(f"| {name} | {size:,.0f} | {8 * size / n_weights:.3f} | {kl:.5f} | {rise:+.5f} | {shown} |")
    lines += ["", "Between the points; tuned is GPTQ with tuned clips at brotli's rate:", "",
              "| KL | bytes tuned | scalar | trellis | trellis saves |", "|--:|--:|--:|--:|--:|"]
    for kl in (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016):
        a, b, c = (at(curve, kl, 0, 1) for curve in (granted, scalar, trellis))
        if math.isfinite(a + b + c):
            lines.append(f"| {kl} | {a:,.0f} | {b:,.0f} | {c:,.0f} | {1 - c / a:.1%} |")
    lines += ["", "| bits per weight | KL tuned | scalar | trellis | trellis / tuned | trellis against scalar |",
              "|--:|--:|--:|--:|--:|--:|"]
    for bits in (1.5, 2.0, 2.5, 3.0, 3.4, 4.0):
        a, b, c = (at(curve, bits * n_weights / 8, 1, 0) for curve in (granted, scalar, trellis))
        if math.isfinite(a + b + c):
            lines.append(f"| {bits} | {a:.5f} | {b:.5f} | {c:.5f} | {c / a:.2f} | {10 * math.log10(b / c):.2f} dB |")
    lines += ["", "How uneven the sensitivities are (dB; 6 dB are worth a bit per weight):", "",
              "| group | layers' g | columns' 1 / U^2 | rows' g |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | {a:.1f} | {b:.1f} | {c:.1f} |" for name, a, b, c in spectrum(banks)]
    for name, text in (("packing.md", "\n".join(lines) + "\n"), ("packing.svg", plot(curves))):
        with atomic_write(run / name, "w") as f:
            f.write(text)
    print("\n".join(lines), f"written: {run / 'packing.md'}, {run / 'packing.svg'}", sep="\n")
    return 0


def plot(curves: dict) -> str:
    """{name: [(bytes, KL, ...)]} -> SVG, both axes logarithmic, readable on white and on black."""
    width, height, left, top, right, bottom = 760, 480, 64, 20, 20, 48
    colours = "#8a8a8a", "#c08a2e", "#4f8fd6", "#4f8fd6", "#d0609a", "#3aa66a"
    points = [(math.log(p[0]), math.log(max(p[1], 1e-7))) for curve in curves.values() for p in curve]
    (x0, x1), (y0, y1) = ((min(a), max(a)) for a in zip(*points))
    x = lambda v: left + (math.log(v) - x0) / (x1 - x0) * (width - left - right)
    y = lambda v: height - bottom - (math.log(max(v, 1e-7)) - y0) / (y1 - y0) * (height - top - bottom)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
           'font-family="sans-serif" font-size="12" fill="#808080">']
    for v, m in [(m * 10.0 ** e, m) for e in range(-7, 10) for m in range(1, 10)]:
        if x0 <= math.log(v) <= x1:
            out.append(f'<path d="M{x(v):.1f} {top}V{height - bottom}" stroke="#808080" stroke-opacity=".25"/>'
                       f'<text x="{x(v):.1f}" y="{height - 30}" text-anchor="middle">{v / 1000:,.0f} kB</text>')
        if y0 <= math.log(v) <= y1 and m in (1, 2, 5):
            out.append(f'<path d="M{left} {y(v):.1f}H{width - right}" stroke="#808080" stroke-opacity=".25"/>'
                       f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">bytes</text>'
               f'<text transform="translate(14 {height / 2}) rotate(-90)" text-anchor="middle">KL, nats</text>')
    for i, ((name, curve), colour) in enumerate(zip(curves.items(), colours)):
        path = "L".join(f"{x(p[0]):.1f} {y(p[1]):.1f}" for p in sorted(curve))
        dash = ' stroke-dasharray="6 4"' if "granted" in name else ""
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        out += [f'<circle cx="{x(p[0]):.1f}" cy="{y(p[1]):.1f}" r="3" fill="{colour}"/>' for p in curve]
        line = height - bottom - 8 - 18 * (len(curves) - 1 - i)
        out.append(f'<path d="M{left + 10} {line - 4}h24" stroke="{colour}" stroke-width="2"{dash}/>'
                   f'<text x="{left + 40}" y="{line}">{name}</text>')
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(command(main))
