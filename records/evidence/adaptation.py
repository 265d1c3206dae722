"""What learning at test time gains, against the strength of the model.

    python records/evidence/adaptation.py RUN...     scores packed runs of one shape; writes RUN/adaptation.json each
    python records/evidence/adaptation.py --page RUN...      adaptation.md and adaptation.svg, from what was scored
    python records/evidence/adaptation.py --count            a round of the record's shape on paper, and its documents

Each run is scored by the predictors of eval_bpb.py, by Adaptive without either of its halves, and by the public
record's setting (#1855) re-made from its description: rank 80, scale 144 / 80, AdamW (beta1 0, beta2 0.99, weight decay
0.5, learning rate 1e-4, and "at this width" times 512 / width), adapters on K, beside attention's and the MLP's output,
and on the head, chunks of 48, B = 0 at each document's start. Two things differ: keys and values are cached (the record
computes its window again for each chunk; those tokens are counted), and A does not stay from batch to batch.
"""
import json
import math
import sys
import time
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import eval_bpb  # noqa: E402
from data.dataset import (BadInput, Parser, atomic_write, command, find_dataset, find_run, read_meta,  # noqa: E402
                          read_val_docs)
from pack import load  # noqa: E402
from train_gpt import GPT, Config, block_order  # noqa: E402

# Reported on, each below 1,000 targets as most web pages are; what was tuned was tuned on others of the 400.
DOCS = [8, 29, 35, 47, 51, 52, 72, 82, 83, 95, 133, 137, 139, 141, 150, 159, 167, 170, 179, 186, 195, 199, 209, 214,
        217, 226, 234, 243, 250, 267, 280, 285, 313, 342, 348, 351, 353, 359, 380, 388]


class Adapters(eval_bpb.Adaptive):
    """Adaptive without its pointer."""
    w = 0.0, 0.0, 1.0, -1e4, 0.0, 0.0, 0.0, 0.0


class Pointer(eval_bpb.Adaptive):
    """Adaptive without its adapters."""

    def __init__(self, *how):
        super().__init__(*how)
        self.new = {"w": self.new["w"]}


class Record(Adapters):
    rank, targets, step, scale = 80, (), 1e-4, 144 / 80

    def __init__(self, cfg, model, device):
        super().__init__(cfg, model, device)
        random = torch.Generator().manual_seed(0)
        self.kv_dim = model.qkv_sizes[1]
        for visit in range(len(block_order(cfg, True))):
            for name, n_out in (("k", self.kv_dim), ("o", cfg.n_embd), ("down", cfg.n_embd)):
                A = (torch.rand(cfg.n_embd, self.rank, generator=random) * 2 - 1) * cfg.n_embd ** -0.5
                self.new |= {("A", (name, visit)): A, ("B", (name, visit)): torch.zeros(self.rank, n_out)}
        self.new = {key: x * self.scale if key[0] == "A" else x for key, x in self.new.items()}
        self.lr = {key: self.step * (self.scale if key[0] == "A" else 1) for key in self.new}

    def size(self, start):
        return self.chunk

    def linear(self, adapt, x, W, name, layer, visit):
        y = F.linear(x, W)
        if name in ("qkv", "up"):
            self.read = x * (layer + 1) ** -0.5
        if name == "qkv":
            q, k, v = y.split([y.size(1) - 2 * self.kv_dim, self.kv_dim, self.kv_dim], 1)
            return torch.cat([q, adapt(self.read, k, ("k", visit)), v], 1)
        return y if name == "up" else adapt(self.read, y, (name, visit))

    def learn(self, targets):
        super().learn(targets)
        for x in self.adapters.values():
            x.data.mul_(1 - 0.5 * self.step)


class RecordScaled(Record):
    """Its step scaled to the width: the record is 512 wide."""

    def __init__(self, cfg, model, device):
        self.step = Record.step * 512 / cfg.n_embd
        super().__init__(cfg, model, device)


PREDICTORS = {"sliding": eval_bpb.Sliding, "adapters and pointer": eval_bpb.Adaptive,
              "record's setting at this width": RecordScaled, "pointer alone": Pointer,
              "adapters alone": Adapters, "plain": eval_bpb.Plain, "record's setting": Record}


def read(folder, tokenizer):
    """-> streams as the judge makes them, bytes of each document."""
    texts = list(read_val_docs(folder, read_meta(folder), max(DOCS) + 1))
    streams = [np.array([tokenizer.boundary, *tokenizer.encode(texts[i]), tokenizer.boundary]) for i in DOCS]
    return streams, [len(texts[i].encode()) for i in DOCS]


def score(name: str, cfg, model, streams) -> dict:
    """-> nats of each document, CPU seconds."""
    eval_bpb.PREDICTORS[name] = PREDICTORS[name]
    predictor = eval_bpb.PREDICTORS[name](cfg, eval_bpb.move(model, "cpu"), torch.device("cpu"))
    lengths, begin = np.array([len(s) - 1 for s in streams]), time.process_time()
    rounds = eval_bpb.check_plan(predictor.plan(lengths), lengths, cfg.vocab_size)
    nats = eval_bpb.score(predictor, streams, rounds, [*range(len(rounds))], cfg.vocab_size, eval_bpb.Phases())
    of_doc = Counter()
    for i, spans in enumerate(rounds):
        for (doc, a, b), part in zip(spans.tolist(), np.split(nats[i], np.cumsum(spans[:, 2] - spans[:, 1])[:-1])):
            of_doc[doc] += float(part.sum())
    return {"nats": [of_doc[i] for i in range(len(streams))], "cpu_seconds": time.process_time() - begin}


def measure(run: Path, names: list[str]) -> None:
    """Scores with those predictors that the run's adaptation.json does not have yet."""
    path, (cfg, model, tokenizer) = run / "adaptation.json", load(run / "artifact.pyz")
    with open(run / "metrics.jsonl", encoding="utf-8") as f:
        streams, n_bytes = read(find_dataset(json.loads(f.readline())["config"]["data"]), tokenizer)
    found = json.loads(path.read_text()) if path.exists() else {
        "lengths": [len(s) - 1 for s in streams], "bytes": n_bytes, "seq_len": cfg.seq_len, "scores": {}}
    for name in names:
        if name not in found["scores"]:
            found["scores"][name] = score(name, cfg, model, streams)
            print(f"{run.name} {name}: {bpb(found, name):.4f}", flush=True)
            with atomic_write(path, "w") as f:
                json.dump(found, f)


# ---- the page


def gain(found: dict, name: str, over="sliding", docs=slice(None)) -> float:
    nats = np.array(found["scores"][over]["nats"])[docs] - np.array(found["scores"][name]["nats"])[docs]
    return nats.sum() / math.log(2) / np.array(found["bytes"])[docs].sum()


def bpb(found: dict, name: str, docs=slice(None)) -> float:
    return np.array(found["scores"][name]["nats"])[docs].sum() / math.log(2) / np.array(found["bytes"])[docs].sum()


def carried(runs: list[dict], name: str, docs=slice(None), to=1.07) -> float:
    """The gain at `to` bits per byte if its logarithm goes on falling in a line."""
    x, y = ([f(r) for r in runs] for f in (lambda r: bpb(r, "sliding", docs), lambda r: gain(r, name, docs=docs)))
    return math.exp(np.polyval(np.polyfit(x, np.log(np.maximum(y, 1e-6)), 1), to))


def page(runs: dict[str, dict]) -> dict[str, str]:
    """{run: what measure() found} -> {"adaptation.md": tables, "adaptation.svg": gains against strength}."""
    random, found = np.random.default_rng(0), list(runs.values())
    names = [n for n in PREDICTORS if all(n in r["scores"] for r in found)]
    n, tokens = len(found[0]["lengths"]), sum(found[0]["lengths"])
    resampled = [random.integers(0, n, n) for _ in range(1000)]
    windows = sum(min(found[0]["seq_len"], end) for length in found[0]["lengths"]
                  for end in (*range(48, length, 48), length))
    text = [f"Bits per byte on {n} documents of {tokens:,} targets ({min(found[0]['lengths'])} to "
            f"{max(found[0]['lengths'])}, context {found[0]['seq_len']}), in brackets CPU seconds of one thread:", "",
            "| predictor | " + " | ".join(runs) + " |", "|---|" + "--:|" * len(runs)]
    for name in names:
        cells = [f"{bpb(r, name):.4f} ({r['scores'][name]['cpu_seconds']:.0f})" for r in found]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    text += ["", "Gain over sliding windows, in brackets its standard error (documents resampled 1,000 times), and at "
             "1.07 if the logarithm of the gain goes on in a line, with 95 % of the resamplings:", "",
             "| predictor | " + " | ".join(runs) + " | at 1.07 |", "|---|" + "--:|" * (len(runs) + 1)]
    for name in [n for n in names if n not in ("plain", "sliding")]:
        cells = [f"{gain(r, name):.4f} ({np.std([gain(r, name, docs=d) for d in resampled]):.4f})" for r in found]
        if len(found) > 1:
            low, high = np.quantile([carried(found, name, d) for d in resampled], (0.025, 0.975))
            cells.append(f"{carried(found, name):.4f} ({low:.4f} to {high:.4f})")
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    text += ["", f"The record's own way computes {windows:,} tokens for these {tokens:,} targets, "
             f"{windows / tokens:.1f} times as many as with cached keys and values."]
    return {"adaptation.md": "\n".join(text) + "\n", "adaptation.svg": plot(found, names)}


COLOURS = "#888888", "#222222", "#c44e2b", "#1b6ca8", "#6a9a3b", "#888888", "#d99a86"


def plot(found: list[dict], names: list[str]) -> str:
    width, height, left, right, top, bottom = 720, 360, 56, 200, 16, 42
    x = [bpb(r, "sliding") for r in found]
    shown = [n for n in names if n not in ("plain", "sliding")]
    y_max, (x_min, x_max) = 1.05 * max(gain(r, n) for r in found for n in shown), (min(x) - 0.02, max(x) + 0.02)
    at_x = lambda v: left + (x_max - v) / (x_max - x_min) * (width - left - right)
    at_y = lambda v: height - bottom - max(v, 0) / y_max * (height - top - bottom)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
           'font-size="12">', f'<rect width="{width}" height="{height}" fill="white"/>']
    for v in np.arange(0, y_max, 0.02 if y_max < 0.2 else 0.05):
        out.append(f'<path d="M{left} {at_y(v):.1f}H{width - right}" stroke="#dddddd"/>'
                   f'<text x="{left - 6}" y="{at_y(v) + 4:.1f}" text-anchor="end">{v:.2f}</text>')
    for v in x:
        out.append(f'<text x="{at_x(v):.1f}" y="{height - bottom + 18}" text-anchor="middle">{v:.3f}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">bits per byte of sliding '
               'windows; the gain over them</text>')
    label = height  # the last label's place: they must not touch
    for name in sorted(shown, key=lambda n: gain(found[x.index(min(x))], n)):
        colour, points = COLOURS[[*PREDICTORS].index(name)], [(at_x(a), at_y(gain(r, name))) for a, r in zip(x, found)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        label = min(max(points)[1] + 4, label - 14)
        out.append(f'<text x="{max(points)[0] + 8:.1f}" y="{label:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*out, "</svg>\n"])


# ---- the record's shape, on paper


class Meter(TorchDispatchMode):
    """Counts kernels, the bytes that they read and write, and the bytes that are alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.kernels = self.moved = self.live = self.peak = 0
        self.known = set()

    def free(self, key, size):
        self.known.discard(key)
        self.live -= size

    def hold(self, x):
        storage = x.untyped_storage()
        if (key := storage._cdata) not in self.known:
            self.known.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key, storage.nbytes())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flat = lambda tree: [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
        if not func.is_view and "detach" not in str(func):
            self.kernels += 1
            self.moved += sum(x.numel() * x.element_size() for x in flat((args, kwargs, out)))
        for x in flat(out):
            self.hold(x)
        return out


class Attention(torch.autograd.Function):
    """Of a kernel that keeps no scores, the bytes and what it saves."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def count(cfg, B: int, T: int, past: int) -> dict:
    """A round of B documents, T tokens each after `past` cached ones -> kernels, GB moved, GB at most, TFLOP."""
    attend = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: Attention.apply(q, k, v)
    try:
        with Meter() as meter, torch.device("meta"):
            model = GPT(cfg, dtype=torch.bfloat16).requires_grad_(False)
            p = eval_bpb.Adaptive(cfg, model, torch.device("meta"))
            p.adapters, p.n_steps = {k: x.repeat(B, 1, 1).requires_grad_() for k, x in p.new.items()}, 0
            p.squares = {k: torch.zeros_like(x) for k, x in p.adapters.items()}
            heads = {(c, visit): (cfg.n_kv_head, cfg.n_embd // cfg.n_head) for c in "kv"
                     for visit in range(len(block_order(cfg, True)))}
            p.past = {key: torch.empty(B, n, past, d, dtype=torch.bfloat16) for key, (n, d) in heads.items()}
            p.past["text"] = torch.empty(B, 1, past, 1, dtype=torch.long)
            p.past["hidden"] = torch.empty(B, 1, past, cfg.n_embd)
            p.real, p.sizes = torch.ones(B, T, dtype=torch.bool), torch.ones(B, 1)
            meter.kernels = meter.moved = 0
            with FlopCounterMode(display=False) as flops:
                p.logits, p.seen = p.forward(torch.empty(B, T, dtype=torch.long), past, None, p.adapters, p.past)
                p.update(torch.empty(B, T, dtype=torch.long))
        attention = 3 * 4 * len(heads) / 2 * B * T * (past + T / 2) * cfg.n_embd
        return {"kernels": meter.kernels, "GB": meter.moved / 1e9, "peak_GB": meter.peak / 1e9,
                "TFLOP": (flops.get_total_flops() + attention) / 1e12}
    finally:
        F.scaled_dot_product_attention = attend


def on_paper() -> None:
    cfg = replace(Config(), vocab_size=16384)
    random = np.random.default_rng(0)
    with torch.device("meta"):
        predictor = eval_bpb.Adaptive(cfg, GPT(cfg), torch.device("meta"))
    lengths = random.lognormal(math.log(403), math.sqrt(2 * math.log(690 / 403)), 50000).astype(np.int64) + 1
    rounds = predictor.plan(lengths)
    mine = [rounds[i] for i in max(eval_bpb.deal(rounds, 8), key=len)]
    shapes = Counter(map(predictor.shape, mine))
    ends = {T: sorted({p for _, t, p in shapes if t == T}) for T in {t for _, t, _ in shapes}}
    table = {(T, p): count(cfg, 64, T, p) for T, ps in ends.items() for p in {ps[0], ps[-1]}}
    total = Counter()
    for (B, T, past), n in shapes.items():
        first, last = ends[T][0], ends[T][-1]
        share = (past - first) / max(last - first, 1)
        row = {k: B / 64 * ((1 - share) * table[T, first][k] + share * table[T, last][k]) for k in ("GB", "TFLOP")}
        row |= {"kernels": table[T, first]["kernels"], "rounds": 1, "tokens": B * T}
        row["seconds"] = max((row["GB"] / 2.5 + row["TFLOP"] / 0.6) / 1e3, 5e-6 * row["kernels"])
        for k, x in row.items():
            total[k] += n * x
    print(f"{lengths.sum():,} targets; one rank: {total['rounds']:,} rounds of {len(shapes)} shapes, "
          f"{total['tokens']:,} tokens with padding, {total['kernels']:,} kernels, {total['GB'] / 1e3:.1f} TB, "
          f"{total['TFLOP'] / 1e3:.2f} PFLOP, {total['seconds']:.0f} s")
    moved = kernels = 0  # of the pointer alone, with its gradient
    for (B, T, past), n in shapes.items():
        with torch.device("meta"), Meter() as meter:
            h, w = torch.empty(B, past + T, cfg.n_embd), torch.empty(B, 1, 8, requires_grad=True)
            shares, after = eval_bpb.point(h[:, -T:], h, torch.empty(B, past + T, dtype=torch.long), w, 4)
            p = torch.empty(B, T, cfg.vocab_size).scatter_add(2, after.expand(shares.shape), shares)
            torch.autograd.grad(p.sum(), w)
        moved, kernels = moved + n * meter.moved, kernels + n * meter.kernels
    print(f"the pointer: {kernels:,} kernels, {moved / 1e12:.1f} TB, {max(moved / 2.5e12, 5e-6 * kernels):.0f} s")
    for (T, past), row in sorted(table.items()):
        print(T, past, {k: round(x, 2) for k, x in row.items()})


def main() -> int:
    parser = Parser(prog="adaptation.py", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders, or names in runs/")
    parser.add_argument("--only", default="", metavar="NAMES", help="predictors, with commas between them; empty: all")
    parser.add_argument("--page", action="store_true", help="write the page, from what was scored")
    parser.add_argument("--count", action="store_true", help="the record's shape on paper")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = [find_run(run) for run in args.runs]
    if args.count:
        on_paper()
    for folder in folders if not args.page else ():
        measure(folder, args.only.split(",") if args.only else [*PREDICTORS])
    if args.page:
        for folder in folders:
            if not (folder / "adaptation.json").exists():
                raise BadInput(f"{folder}: score it first")
        runs = {folder.name: json.loads((folder / "adaptation.json").read_text()) for folder in folders}
        for name, text in page(runs).items():
            with atomic_write(folders[0] / name, "w") as f:
                f.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
