"""The first minutes on a GPU: what of this project holds there, in ten minutes of one H100.

    python records/evidence/first_gpu_minutes.py FOLDER            FOLDER gets results.jsonl
    python records/evidence/first_gpu_minutes.py FOLDER --only=looped --only=packing
    python records/evidence/first_gpu_minutes.py FOLDER --tiny     on a CPU too: does this tool run

Sections come in the order of their worth, each a process of its own with a limit of seconds. Each
number is printed and written as soon as it is known. A section that fails or is late says why, its
traceback is in the file, and the next one runs (exit code 1). The record's two graphs compile from
the start, beside the first section; each waits for its turn to measure.

On a machine that is rented by the minute, without a network, that has torch, triton, numpy and
tiktoken: bring this repository, data/demo (python data/prepare.py demo) and the wheel of what is
missing (at home: pip download --no-deps --only-binary=:all: --python-version 3.12 --platform
manylinux_2_17_x86_64 -d wheels zstandard). Then ask once:

    pip install -q --no-index --no-deps --target /tmp/site wheels/*.whl; export PYTHONPATH=/tmp/site
    timeout -k 5 580 python -u records/evidence/first_gpu_minutes.py FOLDER

The limits together are longer than that: --only= what was cut off, while the machine is held and
what was compiled is in torch's cache folder.
"""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "records/evidence")]
import numpy as np
import roofline
import torch
import torch.nn.functional as F

import eval_bpb
import train_gpt as t
from data.dataset import Parser, command
from records import confine

OWN_GB = {False: 53.1, True: 79.0}  # of inductor's own kernels for a row of the record, by roofline.py
PARTS = {"pointer": ("triton_tem", "flex"), "own": ("triton_",),  # by the names of kernels
         "attention": ("flash", "fmha", "attention"),
         "products": ("up_kernel", "gemm", "nvjet", "cutlass"),
         "rest": ("",)}
TINY = dict(n_layer=2, n_embd=64, n_head=2, n_kv_head=1, mlp_dim=256, loop_first=0, loop_last=0,
            two_lane_from=1, batch_tokens=512, row_tokens=256, seq_len=64, calib_tokens=256)


class Lab:
    """What a section gets: the record's Config, the device, tell(), ms()."""

    def __init__(self, folder, section, tiny, turn):
        self.turn = turn  # an Event
        self.path = folder / "results.jsonl"
        self.section = section
        self.tiny = tiny
        self.cfg = replace(t.Config(), vocab_size=16384)
        if tiny:
            self.cfg = replace(t.Config(), vocab_size=1024, **TINY)
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")

    def tell(self, what, **numbers):
        line = json.dumps({"section": self.section, "what": what, **numbers})
        with open(self.path, "a") as f:
            print(line, file=f)
        print(line[:400], flush=True)

    def ms(self, f, repeat=10):
        """Median over 5 rounds of the ms of one f(), of which a round has `repeat`."""
        repeat = 1 if self.tiny else repeat
        rounds = []
        for _ in range(2 if self.tiny else 6):  # the first does not count
            begin = time.perf_counter()
            for _ in range(repeat):
                f()
            if self.cuda:
                torch.cuda.synchronize()
            rounds.append((time.perf_counter() - begin) * 1000 / repeat)
        return float(np.median(rounds[1:]))

    def random(self, *shape):
        x = torch.randn(*shape, device=self.device, dtype=torch.bfloat16 if self.cuda else None)
        return x.requires_grad_()

    def model(self):
        """The record's, of random weights: products of zeros are faster."""
        model = t.GPT(self.cfg)
        for W in (model.embed.weight, *map(model.get_parameter, model.MATRICES)):
            torch.nn.init.normal_(W, std=0.05)
        model.fused = self.cuda
        return model.place(self.device)

    def batch(self):
        row = t.synthetic_tokens(self.cfg.vocab_size, self.cfg.row_tokens + 1, 0)
        return t.make_batch(row, self.cfg.seq_len, self.device, self.cfg.seq_len)

    def compile(self, f):
        return torch.compile(f, dynamic=False, fullgraph=True) if self.cuda else f


def python(folder, *arguments, **environment):
    """Runs a file of the project in a folder -> the lines that it printed. Raises with their end."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, text=True,
                          env={**os.environ, **environment}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    return done.stdout.splitlines()


def whole(lab):
    """The whole path with a tiny model on the demo's documents: does the loss fall, is it scored?"""
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    folder = tempfile.mkdtemp(dir=lab.path.parent)  # its log stays
    lab.tell("trained", log=python(folder, ROOT / "train_gpt.py", *flags, "--data=demo", "--run=it",
                                   f"--max_steps={6 if lab.tiny else 200}", "--val_points=1")[-20:])
    lab.tell("packed", log=python(folder, ROOT / "pack.py", "it")[-4:])
    artifact = "runs/it/artifact.pyz"
    lab.tell("scored", log=python(folder, ROOT / "eval_bpb.py", artifact, f"--limit_docs={2 * lab.tiny}")[-7:])


def machine(lab):
    """The two ceilings: memory, and products of random numbers."""
    n = 256 if lab.tiny else 8192
    x = lab.random(n, n).detach()
    lab.tell("ceilings", tflop_per_ms=2 * n ** 3 / 1e12 / lab.ms(lambda: x @ x),
             gb_per_ms=2 * x.nbytes / 1e9 / lab.ms(x.clone), **t.environment(lab.device))


def record(lab, looped):
    """A row of the record forward and backward, a step of one GPU, the row's kernels by part."""
    cfg = lab.cfg
    model = lab.model()
    batch = lab.batch()
    losses = lab.compile(model.losses)

    def row():
        loss = losses(*batch, looped).mean()
        loss.backward()
        return loss
    begin = time.perf_counter()
    loss = row().item()
    lab.tell("compiled", seconds=time.perf_counter() - begin, attention=model.kernel.__name__, loss=loss)
    if lab.cuda:
        torch.cuda.empty_cache()
    lab.turn.wait()
    flop = roofline.count_flops(t, model, looped) * cfg.row_tokens
    predicted = {"own": OWN_GB[looped] / roofline.GB_PER_MS,
                 "attention": len(t.block_order(cfg, looped)) * roofline.ATTENTION_MS,
                 "products": flop / 1e12 / roofline.TFLOP_PER_MS,
                 "pointer": roofline.POINTER_MS}
    ms = lab.ms(row)
    lab.tell("row", ms=ms, predicted_ms=sum(predicted.values()), mfu=flop / ms / 989e9,
             peak_gb=lab.cuda and torch.cuda.max_memory_allocated() / 1e9)
    n_rows = cfg.batch_tokens // cfg.row_tokens
    step = partial(t.train_step, losses, [batch] * n_rows, model, t.make_optimizers(model, cfg, lab.cuda),
                   t.schedule_at(cfg, float(looped)), cfg)
    lab.tell("step of one GPU", ms=lab.ms(step, 1), rows=n_rows)
    with torch.profiler.profile() as traced:
        row().item()
    spent = defaultdict(float)
    kernels = []
    for event in traced.key_averages():
        # What launches a kernel has its time as well.
        if lab.cuda and (event.is_user_annotation or event.device_type != torch.autograd.DeviceType.CUDA):
            continue
        ms = (event.self_device_time_total if lab.cuda else event.self_cpu_time_total) / 1000
        part = next(part for part, words in PARTS.items() if any(word in event.key for word in words))
        spent[part] += ms
        kernels.append((ms, event.count, event.key[:100]))
    lab.tell("parts", ms=spent, predicted_ms=predicted, kernels=sorted(kernels, reverse=True)[:50])


def prices(lab):
    """What each kernel and hand-written gradient saves: 3 blocks with it, and with plain torch for it."""
    lab.cfg = replace(lab.cfg, n_layer=3, loop_passes=1, two_lane_from=3)
    model = lab.model()
    batch = lab.batch()
    context = SimpleNamespace(save_for_backward=lambda *tensors: None)

    def xsa(y, v, v_unit, v_length, gate, forward=t.GatedXSA.forward):
        v_unit = F.normalize(v.float(), dim=-1)
        return forward(context, y, v, v_unit, v_length, gate)

    def mlp(x, up, down):
        return F.linear(t.lrelu2(F.linear(x, up)), down)

    def loss(z, targets, cap):
        return F.cross_entropy(cap * torch.tanh(z.float() / cap), targets, reduction="none")
    plain = {"RotatedHeads": partial(t.RotatedHeads.forward, context), "GatedXSA": xsa,
             "FusedMLP": mlp, "SoftcapCE": loss}
    ours = None
    for name in ("ours", *plain):
        torch.compiler.reset()
        # The compiler does not see another `apply` in the class.
        with mock.patch.object(t, name, SimpleNamespace(apply=plain.get(name)), create=True):
            losses = lab.compile(model.losses)

            def row():
                model.zero_grad()
                losses(*batch, False).sum().backward()
            ms = lab.ms(row)
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.numel()])
        ours = ours or (ms, grads)
        lab.tell(name, ms=ms, dearer_a_block=(ms - ours[0]) / 3,
                 difference=((grads - ours[1]).norm() / ours[1].norm()).item())


def attention(lab):
    """ms of a visit, forward and backward, over a row of documents (SDPA: without)."""
    cfg = lab.cfg
    N, H, K, d = cfg.row_tokens, cfg.n_head, cfg.n_kv_head, cfg.n_embd // cfg.n_head
    inputs = [lab.random(N, n, d) for n in (H, K, K)]
    seg = lab.batch()[2]
    kernel = lab.model().kernel

    def dense(*qkv):
        qkv = (x.view(-1, cfg.seq_len, x.size(1), d).transpose(1, 2) for x in qkv)
        return F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)

    def measure(name, f):
        lab.tell(name, ms=lab.ms(lambda: torch.autograd.grad(f(*inputs).sum(), inputs)),
                 forward_ms=lab.ms(lambda: f(*inputs)), predicted_ms=roofline.ATTENTION_MS)
    measure(kernel.__name__, lambda *qkv: kernel(*qkv, seg))
    measure("SDPA", dense)
    if lab.cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        start = torch.arange(N, device=lab.device) - seg.pos
        mask = torch.compile(create_block_mask)(lambda b, h, i, j: (start[i] == start[j]) & (i >= j),
                                                None, None, N, N, lab.device)
        flex = torch.compile(partial(flex_attention, block_mask=mask, enable_gqa=True))
        measure("flex", lambda *qkv: flex(*(x.transpose(0, 1)[None] for x in qkv)))


def adaptive(lab):
    """A round of the predictor in the record's shape."""
    V = lab.cfg.vocab_size
    model = lab.model().requires_grad_(False)
    model.fused = False  # adapters sit between the products
    with mock.patch.object(eval_bpb, "impossible_pairs", lambda tokenizer: np.zeros((V, V), bool)):
        predictor = eval_bpb.Adaptive(model, None, lab.device)
    shape = predictor.slots, predictor.chunk
    tokens = np.random.default_rng(0).integers(1, V, shape)

    def one_round():
        answer = predictor.predict(np.zeros(len(tokens), bool), tokens)
        predictor.learn(tokens, tokens > 0)
        return answer
    ms = lab.ms(one_round)
    n_rounds = 151_078_222 / 4.5 / tokens.size  # 50,000 documents, at 4.5 bytes a token
    lab.tell("round", ms=ms, shape=shape, seconds_of_50000_documents_on_8=n_rounds * ms / 8000,
             peak_gb=lab.cuda and torch.cuda.max_memory_allocated() / 1e9,
             finite=one_round().isfinite().all().item())


STRANGER = """
import torch
class Predictor:
    slots, chunk = {slots}, {chunk}
    logits = torch.zeros({slots}, {chunk}, {vocab_size}, device="{device}")
    def predict(self, fresh, inputs):
        return self.logits
    def learn(self, targets, real):
        pass
def build(path, name, device):
    return Predictor(), "stranger"
"""


def stranger(lab):
    """A round of the record's shape that another process predicts, in no time: its way to the judge,
    and the counting there."""
    shape = dict(slots=2, chunk=4) if lab.tiny else dict(slots=64, chunk=48)
    shape = dict(shape, vocab_size=lab.cfg.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact.pyz"
        with zipfile.ZipFile(artifact, "w") as archive:
            archive.writestr("eval_bpb.py", STRANGER.format(**shape, device=lab.device))
        remote = confine.Remote(artifact, str(lab.device), shape["vocab_size"], confined=False)
        remote.open("")
        text = eval_bpb.Text([], shape["vocab_size"])
        tokens = np.ones((remote.slots, remote.chunk), np.int64)

        def predict():
            return remote.predict(tokens[:, 0] > 0, tokens)
        lab.tell("round", way_ms=lab.ms(predict, 3), shape=shape,
                 way_and_count_ms=lab.ms(lambda: text.count(predict(), tokens, tokens > 0), 3))
        remote.close()


def packing(lab):
    """40 million weights into 16 MB: on the GPU some two million small kernels a pass; are this
    machine's cores faster?"""
    n_layer = lab.cfg.n_layer + 3
    cfg = replace(lab.cfg, vocab_size=1024, n_layer=n_layer, two_lane_from=n_layer)
    weights = {name: 0.05 * torch.randn_like(W) for name, W in t.GPT(cfg).state_dict().items()}
    tokenizer = (ROOT / "data/demo_tokenizer.json").read_text()
    with tempfile.TemporaryDirectory() as folder:
        t.write_checkpoint(Path(folder) / "checkpoint.pt", config=asdict(cfg), weights=weights, stats={},
                           run={"steps": 0}, tokenizer=tokenizer)
        for place, environment in ("GPU", {}), ("CPU", {"CUDA_VISIBLE_DEVICES": ""}):
            begin = time.perf_counter()
            log = python(folder, ROOT / "pack.py", folder, **environment)
            lab.tell(f"packed on a {place}", seconds=time.perf_counter() - begin, log=log[-4:])


def ideas(lab):
    """FP8 and sampled softmax, as bare products and kernels: what they could save of a row."""
    N, D, M, V = lab.cfg.row_tokens, lab.cfg.n_embd, lab.cfg.mlp_dim, lab.cfg.vocab_size
    if lab.cuda:
        a = lab.random(N, M).detach()
        b = lab.random(D, M).detach()
        a8, b8 = (x.to(torch.float8_e4m3fn) for x in (a, b))
        one = torch.ones((), device=lab.device)
        fp8 = partial(torch._scaled_mm, a8, b8.t(), one, one, out_dtype=a.dtype, use_fast_accum=True)
        lab.tell("MLP's second product", fp8_ms=lab.ms(fp8), bf16_ms=lab.ms(lambda: a @ b.t()),
                 cast_ms=lab.ms(lambda: a.to(a8.dtype)))
    for words, n in ((V, N), (V // 4, N // 8)):  # all, and the candidates of a chunk of 12k tokens
        x = lab.random(n, D)
        E = lab.random(words, D)
        targets = torch.randint(words, (n,), device=lab.device)

        loss = lab.compile(lambda z: t.SoftcapCE.apply(z, targets, 30.0).sum())

        def run():
            torch.autograd.grad(loss(x @ E.t()), (x, E))
        lab.tell(f"loss of {words} words", ms_a_row=lab.ms(run) * N / n)


SECTIONS = {  # with limits in s
    "whole": (whole, 200), "unlooped": (partial(record, looped=False), 120),
    "looped": (partial(record, looped=True), 120), "machine": (machine, 20),
    "adaptive": (adaptive, 60), "stranger": (stranger, 40), "attention": (attention, 60),
    "packing": (packing, 180), "prices": (prices, 250), "ideas": (ideas, 40)}


def run(name, folder, tiny, turn):
    os.setsid()  # what it starts ends with it
    lab = Lab(folder, name, tiny, turn)
    begin = time.perf_counter()
    try:
        SECTIONS[name][0](lab)
        lab.tell("done", seconds=time.perf_counter() - begin)
    except Exception as e:
        lab.tell("FAILED", why=f"{type(e).__name__}: {str(e)[-300:]}", traceback=traceback.format_exc())
        sys.exit(1)


def main():
    parser = Parser(prog="first_gpu_minutes.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="gets results.jsonl")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a section; several times: those")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that the tool runs")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(exist_ok=True)
    fork = multiprocessing.get_context("fork")  # shares the imports; nothing has touched CUDA yet
    running = {}

    def start(name):
        turn = fork.Event()
        process = fork.Process(target=run, args=(name, folder, args.tiny, turn), daemon=True)
        process.start()
        running[name] = process, turn
    names = args.only or [*SECTIONS]
    for name in {"unlooped", "looped"} & {*names}:
        start(name)
    failed = []
    for name in names:
        if name not in running:
            start(name)
        process, turn = running[name]
        turn.set()
        process.join(SECTIONS[name][1] * (10 if args.tiny else 1))
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()  # its memory is free
        if process.exitcode:
            failed.append(name)
    print(f"failed or late: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(command(main))
