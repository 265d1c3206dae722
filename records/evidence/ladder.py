"""What a technique, a shape or a vocabulary is worth: small models, trained for equal time and packed to equal bytes.

    python records/evidence/ladder.py --data=NAME                        each variant against everything, three seeds
    python records/evidence/ladder.py --data=NAME --only=relu2,loop      some of them
    python records/evidence/ladder.py --data=A,B,C --rung=top --only=    vocabularies against the first; NAME as above

A variant is a patch to the one file or a flag; a patch that no longer applies stops the command. It takes as many steps
as its step on an H100 would leave it in 600 s, is packed at several sizes, and is judged on the same documents at the
same bytes. Prints a table in Markdown; below 0 the variant is better. Runs land in runs/ladder/ and are not repeated.
The datasets are small vocabularies: data/prepare.py docs ... --vocab_size=512.
"""
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(1, str(ROOT))  # after the folder of a run, when it measures itself
import numpy as np  # noqa: E402

from data.dataset import BadInput, Parser, command, find_dataset, read_meta  # noqa: E402
from data.runs import Dataset, World  # noqa: E402
from pack import constant_for, gather, pack_model, unpack_model  # noqa: E402
from train_gpt import SOURCES, Config, Validation, load_checkpoint  # noqa: E402

# The record: 36 M weights, 100 tokens a weight, the embedding 12 % of the weights at vocabulary 8192.
RUNGS = {
    # 62,203 weights and 53 tokens a weight at vocabulary 512, which is 26 % of the weights
    "low": dict(steps=1600, n_layer=4, n_embd=32, n_head=2, n_kv_head=1, mlp_dim=128, loop_first=1, loop_last=1,
                loop_passes=1, two_lane_from=3, rope_dims=8, seq_len=240, ema_decay=0.99),
    # 180,105 weights and 27 tokens a weight at vocabulary 512, which is 14 % of the weights
    "top": dict(steps=2400, n_layer=6, n_embd=48, n_head=4, n_kv_head=2, mlp_dim=192, loop_first=2, loop_last=2,
                loop_passes=1, two_lane_from=5, rope_dims=4, seq_len=240, ema_decay=0.9935),
}
BITS, KL_GOALS = (3.5, 4.0), (0.03, 0.01, 0.003, 0.001)  # a weight of the base: sizes compared; nats: sizes packed
VAL_DOCS = 40  # the first of the validation documents, whatever the vocabulary
VOCABULARY, VOCABULARY_TIME = 512, 0.0685  # tokens that are 8192 of the record's; of a step, for as many tokens again

RELU2 = ("return F.leaky_relu(x, 0.5).square()", "return F.relu(x).square()")
NO_GATE = ('gate = F.linear(n[:, :self.cfg.gate_dims], W["gate"])', 'gate = 30 + 0 * F.linear(n[:, :12], W["gate"])')
NO_XSA = ("GatedXSA.apply(y, v, own, length, gate)", "(y * gate.sigmoid()[:, :, None])")
NO_SMEAR = ("x = x + (cast(self.smear_scale) * open_gate)[:, None] * before",
            "x = x + 0 * cast(self.smear_scale) * open_gate[:, None]")
NO_MIX = ("u = x0_mix[2 * i] * x + x0_mix[2 * i + 1] * x0", "u = x0_mix[2 * i] * x + 0 * x0_mix[2 * i + 1]")
NO_DEPTH = [("[:, None, None] ** -0.5", "[:, None, None] ** -0.0"),
            ('stats[f"{name}.H"] /= depth[:, None, None]', "continue")]
NO_SKIPS = ("x = torch.lerp(skip_scale[j] * skips.pop(), x, skip_gate[j])",
            "x = x + 0 * skip_scale[j] * skip_gate[j] * skips.pop()")
NO_ROW_NORM = ("X = G / G.norm(dim=-1, keepdim=True).clamp(min=1e-7)", "X = G")
STOCK_NS = ("def orthogonalize(", "POLAR_EXPRESS = [(3.4445, -4.775, 2.0315)] * 5\n\n\ndef orthogonalize(")
# XSA in part: tanh of a number per head, which starts at 1 (modded-nanogpt #264).
GATED_XSA = [
    ("self.smear_scale = nn.", "self.xsa = nn.Parameter(torch.ones(L, H))\n        self.smear_scale = nn."),
    ("GatedXSA.apply(y, v, own, length, gate).reshape",
     "torch.lerp(y * gate.sigmoid()[:, :, None], GatedXSA.apply(y, v, own, length, gate), "
     "self.xsa[i].tanh()[:, None]).reshape")]
# After every second block, counted from the last: x + 0.2 / sqrt(L) sum_j w_j s_j over the L states so far, the first
# embedding's among them, with w = W2 gelu(W1 norm(x)) + b of each token; no U-Net skips, no first embedding mixed in
# (#1936's stream R, without its windows; modded-nanogpt #259's scale). In the record 57 and, looped, 186 passes more
# over the residual stream of 0.1 GB than skips and mix: 2.5 % and 5.6 % of a step at 2.5 TB/s; in public 3.3 %.
MUDD = [
    ("        self.x0_mix = nn.Parameter(torch.stack([torch.ones(L, D), torch.zeros(L, D)], 1))", """\
        states = len(block_order(cfg, True)) + 1
        places = states // 2
        self.mudd_in = nn.Parameter(2 ** 0.5 * torch.arange(places * states * D).square().sin().view(places, -1, D))
        self.mudd_out = nn.Parameter(torch.zeros(places, states, states))
        self.mudd_bias = nn.Parameter(torch.zeros(places, states))"""),
    ("""\
        self.skip_scale = nn.Parameter(torch.ones(n_skip, D))
        self.skip_gate = nn.Parameter(torch.zeros(n_skip, D))
""", ""),
    ("""\
        lanes, skip_scale, skip_gate, x0_mix = (cast(x).unbind() for x in (
            self.lanes, self.skip_scale, self.skip_gate.sigmoid(), self.x0_mix.view(-1, cfg.n_embd)))
""", "        lanes = cast(self.lanes).unbind()\n"),
    ("skips, lane = [], None", "skips, lane = [x0], None"),
    ("            if visit >= n_encoder and skips:", "            if False:"),
    ("u = x0_mix[2 * i] * x + x0_mix[2 * i + 1] * x0", "u = x"),
    ("""\
            if visit < n_encoder:
                skips.append(x)
        return norm(x if lane is None else (x + lane) / 2)
""", """\
            skips.append(x if lane is None else (x + lane) / 2)
            left = len(order) - 1 - visit
            if left % 2 == 0:
                h = F.gelu(F.linear(norm(skips[-1]), cast(self.mudd_in[left // 2] * cfg.n_embd ** -0.5)))
                w = F.linear(h, cast(self.mudd_out[left // 2]), cast(self.mudd_bias[left // 2]))
                mixed = sum(w[:, j, None] * s for j, s in enumerate(skips)) * (0.2 * len(skips) ** -0.5)
                x = x + mixed if left else skips[-1] + mixed
        return norm(x)
""")]
# Gradients are taken 0.6 of the averaged movement ahead, from 16 % to 76 % of the run, falling with the learning rate;
# the average is over 3 % of the run (modded-nanogpt #308: 100 of 3,125 steps).
NESTEROV = [
    ("    ema = [p.detach()", "    moved = [torch.zeros_like(p) for p in params]\n    ema = [p.detach()"),
    ("        train_loss = torch.zeros((), device=device)\n", """\
        train_loss = torch.zeros((), device=device)
        before = [p.detach().clone() for p in params]
        if 0.16 <= progress < 0.76:
            with torch.no_grad():
                torch._foreach_add_(params, moved, alpha=0.6 * lr)
"""),
    ("torch._foreach_lerp_(ema, params, 1 - cfg.ema_decay)", """\
torch._foreach_lerp_(ema, params, 1 - cfg.ema_decay)
            torch._foreach_lerp_(moved, torch._foreach_sub(params, before), 1 / (0.03 * cfg.max_steps))""")]
# Of the small vectors; the embedding keeps its own.
BETA2 = [('"peak_lr": cfg.scalar_lr,', '"peak_lr": cfg.scalar_lr, "betas": (cfg.adam_beta1, 0.997),')]
ACROSS = ("np.concatenate([[0], starts, [n_tokens]])", "np.array([0, n_tokens])")

# name: (what, patches and flags, time of the record's step against the base's, public gain of what is taken out or of
# what is put in, in bits per byte; number of seeds in brackets)
VARIANTS = {
    "relu2": ("relu^2 for LeakyReLU^2", [RELU2], 1, "lost 0.002 to 0.003"),
    "lane": ("one lane for two", ["--two_lane_from=LAYERS"], 1, "lost 0.004, with fused kernels"),
    "rope": ("RoPE on all dimensions", ["--rope_dims=HEAD"], 1, "lost 0.0023, with the norm scale"),
    "loop": ("one block three times", ["--loop_passes=3"], 1.26, "won 0.003"),
    "mlp": ("MLP x 1.5", ["--mlp_dim=192"], 1.178, ""),
    "layers": ("layers x 1.5", ["--n_layer=6", "--two_lane_from=5"], 1.43, ""),
    "width": ("width x 1.25", ["--n_embd=40", "--mlp_dim=160"], 1.379, ""),
    "slope": ("slope 0.3 for 0.5", [("F.leaky_relu(x, 0.5)", "F.leaky_relu(x, 0.3)")], 1, "won 0.0007 (1)"),
    "softcap": ("softcap 15 for 30", ["--softcap=15"], 1, "part of 0.0026 (3)"),
    "gain": ("QK gain 5.25 for 5", ["--qk_gain=5.25"], 1, "won 0.0002 (1)"),
    "lr": ("matrix learning rate 0.028 for 0.026", ["--matrix_lr=0.028"], 1, "part of 0.0011 (3)"),
    "xsa": ("no XSA", [NO_XSA], 1, "lost 0.0047, with averaged weights"),
    "gate": ("no attention gate", [NO_GATE], 1, "lost 0.0005, with SmearGate"),
    "smear": ("no SmearGate", [NO_SMEAR], 1, "lost 0.0005, with the gate"),
    "mix": ("first embedding not mixed in", [NO_MIX], 1, ""),
    "depth": ("no norm scale 1/sqrt(layer + 1)", NO_DEPTH, 1, "lost 0.0023, with partial RoPE"),
    "skips": ("no U-Net skips", [NO_SKIPS], 1, ""),
    "across": ("attention across documents", [ACROSS], 1, "lost 0.0004"),
    "rownorm": ("rows as they are before Newton-Schulz", [NO_ROW_NORM], 1, "lost 0.001"),
    "mudd": ("MUDD for U-Net skips and first embedding", MUDD, 1.045, "won 0.0041 (3)"),
    "gxsa": ("gated XSA", GATED_XSA, 1, "30 of 1,440 steps (10)"),
    "nesterov": ("EMA-Nesterov look-ahead 0.6", NESTEROV, 1, "200 of 3,325 steps (20)"),
    "beta2": ("beta2 of the small vectors 0.997 for 0.99", BETA2, 1, "45 of 2,875 steps"),
    "lean": ("no attention gate, norm scale, U-Net skips", [NO_GATE, *NO_DEPTH, NO_SKIPS], 1, ""),
    "polar": ("Jordan's coefficients for Polar Express", [STOCK_NS], 1, "part of 0.0016"),
}


def patched(changes, shape: dict) -> tuple[str, list[str]]:
    """-> (the source of train_gpt.py, patched; the flags). BadInput where a patch does not apply once."""
    source, words = (ROOT / "train_gpt.py").read_text(), {
        "LAYERS": str(shape["n_layer"]), "HEAD": str(shape["n_embd"] // shape["n_head"])}
    for old, new in (change for change in changes if not isinstance(change, str)):
        if source.count(old) != 1:
            raise BadInput(f"train_gpt.py: the patch of {old!r} applies {source.count(old)} times, not once")
        source = source.replace(old, new)
    flags = [change for change in changes if isinstance(change, str)]
    return source, [re.sub("LAYERS|HEAD", lambda m: words[m[0]], flag) for flag in flags]


def first_documents(folder: Path) -> int:
    """-> tokens of the first VAL_DOCS validation documents of a dataset."""
    data = Dataset(Config(data=str(folder)))
    return int(np.flatnonzero(data.val() == data.boundary)[VAL_DOCS])


def run(name: str, seed: int, source: str, flags: list[str]) -> dict:
    """-> {"weights", "val_bpb", "points": [[bytes of the packed model, val_bpb], ...], largest first} of one run."""
    key = hashlib.sha256(repr((source, flags)).encode()).hexdigest()[:8]  # another trainer is another run
    folder = Path("runs/ladder") / f"{name}_s{seed}_{key}"
    if not (folder / "points.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        for file in SOURCES:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, folder / file)
        (folder / "train_gpt.py").write_text(source)
        flags = ["--preset=proxy", "--run=r", f"--seed={seed}", "--val_points=1", "--log_every=500", *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        measure_it = f"import sys; sys.path.append({str(ROOT)!r}); import records.evidence.ladder as l; l.measure()"
        for arguments in (["train_gpt.py", *flags], ["-c", measure_it]):
            done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, text=True, capture_output=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise BadInput(f"{folder}: exit code {done.returncode}: {last}")
    return json.loads((folder / "points.json").read_text())


def measure() -> None:
    """The run in this folder, by the code in this folder, packed and scored -> points.json."""
    path = Path("runs/r/checkpoint.pt")
    checkpoint = load_checkpoint(path)
    cfg, weights, banks = checkpoint["config"], checkpoint["weights"], gather(checkpoint, path)
    val, points = Validation(Dataset(cfg), cfg, World()), []
    for goal in KL_GOALS:
        packed = pack_model(asdict(cfg), weights, banks, constant_for(banks, goal))
        points.append((len(packed.blob), val(unpack_model(packed.blob)[1].losses, True)[1]))
    result = {"weights": sum(w.numel() for w in weights.values()), "val_bpb": checkpoint["run"]["val_bpb"]}
    Path("points.json").write_text(json.dumps({**result, "points": points}))


def between(points: list[tuple[int, float]], sizes: list[float]) -> np.ndarray:
    """val_bpb at each size, on lines between the points, smallest first, over log bytes; NaN outside."""
    size, bpb = np.array(points).T
    return np.interp(np.log(sizes), np.log(size), bpb, math.nan, math.nan)


def main() -> int:
    parser = Parser(prog="ladder.py", description=__doc__, epilog="variants: " + ", ".join(VARIANTS))
    parser.add_argument("--data", default="proxy", help="datasets, by name or folder: the base's, other vocabularies")
    parser.add_argument("--rung", default="low", choices=list(RUNGS), help="size of the models")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, on the first dataset; of the low rung")
    parser.add_argument("--seeds", default="1,2,3", help="seeds, each used for every variant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--steps", type=int, default=0, help="steps of the base; 0: the rung's")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",") if s.strip().isdigit()]
    names, folders = [n for n in args.only.split(",") if n], [find_dataset(d).resolve() for d in args.data.split(",")]
    if unknown := set(names) - set(VARIANTS):
        raise BadInput(f"--only: unknown {', '.join(sorted(unknown))}")
    if len(seeds) < 2 or args.steps < 0 or args.jobs < 1:
        raise BadInput("--seeds: at least two numbers; --steps and --jobs: not below 0 and 1")
    shape = dict(RUNGS[args.rung])
    steps = args.steps or shape["steps"]
    # A shorter base averages over the same share of its run.
    shape["ema_decay"] = max(0.0, 1 - (1 - shape["ema_decay"]) * shape.pop("steps") / steps)
    vocabulary = [read_meta(folder)["vocab_size"] for folder in folders]
    step_time = [1 + VOCABULARY_TIME * (size / VOCABULARY - 1) for size in vocabulary]
    tried = {"base": ("base", [], 1, folders[0])}
    for folder, size, time_ in zip(folders[1:], vocabulary[1:], step_time[1:]):
        tried[f"v{size}"] = (f"vocabulary {size:,} for {vocabulary[0]:,}", [], time_ / step_time[0], folder)
    tried |= {name: (*VARIANTS[name][:3], folders[0]) for name in names}
    sources = {name: patched(changes, shape) for name, (_, changes, _, _) in tried.items()}  # before hours are spent
    n_steps = {name: round(steps / time_) for name, (_, _, time_, _) in tried.items()}
    documents = {folder: first_documents(folder) for folder in folders}

    def trained(task):
        (name, seed), folder = task, tried[task[0]][3]
        source, more = sources[name]
        return run(name, seed, source, [*(f"--{k}={v}" for k, v in shape.items()), f"--data={folder}", *more,
                                        f"--val_tokens={documents[folder]}", f"--max_steps={n_steps[name]}"])

    tasks, results, begin = [(name, seed) for seed in seeds for name in tried], {}, time.time()
    with ThreadPoolExecutor(args.jobs) as pool:
        for i, (task, result) in enumerate(zip(tasks, pool.map(trained, tasks)), 1):
            results[task] = result
            left = (time.time() - begin) / i * (len(tasks) - i)
            print(f"{i}/{len(tasks)} {task[0]} seed {task[1]}: {result['val_bpb']:.4f}, {left / 60:.0f} min left",
                  file=sys.stderr, flush=True)
    sizes = [bits * results["base", seeds[0]]["weights"] / 8 for bits in BITS]
    print(f"The {args.rung} rung, n = {len(seeds)}. Below 0 is better; the spread over seeds in brackets.\n")
    print("| | weights | steps | unpacked |" + "".join(f" {size:,.0f} bytes |" for size in sizes) + " public |")
    print("|---|--:|--:|--:|" + "--:|" * len(sizes) + "---|")
    for name, (what, _, _, _) in tried.items():
        rows = [results[name, s] for s in seeds]
        table = np.array([[r["val_bpb"], *between(sorted(r["points"]), sizes)] for r in rows])
        if name == "base":
            base, change = table, table
        else:
            change = table - base
        cells = [f"{m:{'' if name == 'base' else '+'}.4f} ({d:.4f})" for m, d in zip(
            change.mean(0), change.std(0, ddof=1))]
        public = VARIANTS[name][3] if name in VARIANTS else ""
        print(f"| {what} | {rows[0]['weights']:,} | {n_steps[name]:,} | {' | '.join(cells)} | {public} |")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
