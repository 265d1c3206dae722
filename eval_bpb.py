"""Score an artifact: bits per byte on the validation documents.

    python eval_bpb.py                    the newest run's artifact
    python eval_bpb.py ARTIFACT           another; code that is not this folder's is confined and
                                          must prove its score
    torchrun --standalone --nproc_per_node=8 eval_bpb.py      the documents shared among 8 GPUs
    python artifact.pyz --data=NAME       the same score from the file alone
    python artifact.pyz --sample="import os"        what the model writes after these words; no score

bits per byte = nats of all targets / ln 2 / UTF-8 bytes of all documents. A document of n tokens
has n + 1 targets: its tokens, then the boundary that closes it, which carries 0 bytes but is
charged, as the public scorer charges it. Its inputs are the boundary that opens it and its tokens.
The bytes are counted on the documents, never through a table of token lengths.

Two halves. A predictor belongs to the submission and may be forked: the artifact's own copy of this
file is what predicts. The judge does not: the official score is the root's judge driving the
artifact's predictor. Writes score.json beside an artifact of this folder's own code, for any other
where --out says.
"""
import time
BEGIN = time.perf_counter() - time.process_time()  # of the process: so far all its time was CPU time
import os
import sys
from collections import defaultdict

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: see train_gpt.py
import numpy as np
import torch
import torch.nn.functional as F

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # where PYTHONSAFEPATH leaves it out
from data.dataset import BadInput
from pack import load
from train_gpt import Segments, block_order, make_segments

# --------------------------------------------------------------------------------------------------
# Predictors: the half that belongs to the submission. The judge deals documents to `slots` (B),
# each of which holds one at a time, a `chunk` of tokens (T) after the other, and calls
#   predict(fresh (B,) bool, inputs (B, T) int64) -> logits (B, T, V) over the whole vocabulary. A
#       slot that is fresh begins a document. Logits may depend on the inputs of the slot's document
#       up to their place and on what learn() has shown of it: on no other document, whatever its
#       slot held before. The judge may ask for a round several times with different inputs; the last
#       time before learn() counts. Behind a document's end, which nothing tells, comes noise;
#   learn(targets (B, T) int64, real (B, T) bool): the round's targets, once it is scored, and which
#       of them are a document's.
# What it calls is what build(path, name, device) returns.


def impossible_pairs(tokenizer):
    """-> bool (V, V): the second token never stands after the first in what encode() writes.

    Both are of one word where a letter ends the first and a letter begins the second. There BPE
    merges by rank: what ends the first for a while and what begins the second for a while make a
    piece before either is taken in by its own token. And no phrase is left in two. (modded-nanogpt
    #350, arXiv 2506.07956: 0.0003 to 0.0006 at 1.0, 20 runs of 20.)
    """
    pieces = tokenizer.pieces[:tokenizer.first_phrase]
    rank = {piece: token for token, piece in enumerate(pieces)}
    ends, begins = defaultdict(list), defaultdict(list)  # piece -> tokens, ranks of what takes it in
    for token, piece in enumerate(pieces[1:], 1):
        parts = [piece[i:i + 1] for i in range(len(piece))]
        while len(parts) > 1:
            merges = [rank.get(a + b, len(pieces)) for a, b in zip(parts, parts[1:])]
            i = merges.index(min(merges))
            if i == 0:
                begins[parts[0]].append((token, merges[0]))
            if i == len(merges) - 1:
                ends[parts[-1]].append((token, merges[-1]))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        begins[piece].append((token, len(pieces)))
        ends[piece].append((token, len(pieces)))
    never = np.zeros((len(pieces), len(pieces)), dtype=bool)
    for piece, r in rank.items():
        for cut in range(1, len(piece)):
            if piece[cut - 1:cut].islower() and piece[cut:cut + 1].islower():
                first = [token for token, taken in ends[piece[:cut]] if taken > r]
                second = [token for token, taken in begins[piece[cut:]] if taken >= r]
                never[np.ix_(first, second)] = True
    head = list(range(len(pieces)))  # the piece that a token begins with
    tail = list(range(len(pieces)))  # and the one that it ends with
    for left, right in tokenizer.pairs:
        head.append(head[left])
        tail.append(tail[right])
    never = never[np.ix_(tail, head)]
    never[tuple(tokenizer.pairs.T)] = True
    return never


POINTER_REACH = 8192  # tokens that the pointer looks back; attention looks back as far as in training


class Sliding:
    """Each slot's keys and values are kept: a token is computed once, and looks back as far as
    training did, no further."""

    def __init__(self, model, tokenizer, device):
        cfg = model.cfg
        self.model, self.device = model, device
        self.slots = max(16, cfg.row_tokens // 1536)  # 64 of the record, which takes 20 GB on paper
        self.chunk = min(48, cfg.seq_len // 2)
        self.starts = np.zeros(self.slots, int)  # of the chunks, in their documents
        self.never = torch.from_numpy(impossible_pairs(tokenizer)).to(device)
        back = cfg.seq_len - self.chunk
        self.past = {"embed": self.nothing(1, cfg.n_embd, model.dtype),
                     "copy": self.nothing(1, cfg.copy_dim, model.dtype),
                     "keys": self.nothing(1024, cfg.copy_dim, model.dtype),
                     "text": self.nothing(1024, 1, torch.long)}
        for visit in range(len(block_order(cfg, True))):
            for name in "kv":
                head_dim = cfg.n_embd // cfg.n_head
                self.past[name, visit] = self.nothing(back, head_dim, model.dtype, cfg.n_kv_head)
        model.attend = self.attend
        model.previous = self.previous

    def nothing(self, back, dim, dtype, *heads):
        """-> (B, *heads, back, dim) of zeros."""
        return torch.zeros(self.slots, *heads, back, dim, dtype=dtype, device=self.device)

    def predict(self, fresh, inputs):
        self.starts[fresh] = 0
        self.start = torch.tensor(self.starts, device=self.device)[:, None]
        reach = 1024  # of few lengths, for a GPU's allocator keeps memory by size
        while reach < min(self.starts.max() + self.chunk, POINTER_REACH):
            reach *= 2
        for name in ("keys", "text"):
            missing = reach - self.past[name].size(1)
            self.past[name] = F.pad(self.past[name], (0, 0, self.chunk + missing, 0))[:, self.chunk:]
        return self.forward(torch.from_numpy(inputs).to(self.device))

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V). self.seen is then what self.past is for the next
        chunk."""
        here = torch.arange(self.chunk, device=self.device)
        self.seen = {}
        seg = Segments(None, (self.start + here).flatten().int(), 0)
        hidden = self.model(tokens.flatten(), seg)
        q, k, sink, gate = (x.view(*tokens.shape, -1) for x in self.model.pointer(hidden, seg))
        k = self.recall("keys", k)
        text = self.recall("text", tokens[..., None])[..., 0]
        # A place that is not of the document is far from all queries, by a dimension of its own:
        # weights can make any finite score.
        far = torch.where(self.known(k.size(1)), 0.0, -torch.inf)[..., None].to(k.dtype)
        q, k = F.pad(q, (0, 1), value=1.0), torch.cat([k, far], -1)
        logits = self.model.logits(hidden).view(*tokens.shape, -1)
        p = self.model.mixture(logits, q, k, sink[..., 0], gate[..., 0], text)
        return p.clamp(min=1e-37).log() - 30 * self.never[tokens]  # finite, as count() demands

    def known(self, n):
        """-> (B, n) bool: which of the last n places, the chunk's at their end, are of the
        document."""
        return torch.arange(self.chunk - n, self.chunk, device=self.device) >= -self.start

    def recall(self, key, x):
        """x (..., T, d) of the chunk -> (..., S, d), with what came before it."""
        x = torch.cat([self.past[key], x], -2)
        self.seen[key] = x[..., self.chunk:, :].detach()
        return x

    def attend(self, q, k, v, seg, visit):
        q, k, v = (x.view(self.slots, self.chunk, -1, x.size(-1)).transpose(1, 2) for x in (q, k, v))
        k = self.recall(("k", visit), k)
        v = self.recall(("v", visit), v)
        T, S = self.chunk, k.size(2)
        causal = torch.ones(T, S, dtype=torch.bool, device=self.device).tril(S - T)
        mask = self.known(S)[:, None, None] & causal  # (B, 1, T, S)
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1)

    def previous(self, x, name):
        return self.recall(name, x.view(self.slots, self.chunk, -1))[:, :-1].flatten(0, 1)

    def learn(self, targets, real):
        self.past = self.seen
        self.starts += self.chunk


class Adaptive(Sliding):
    """Each slot also learns, from what was scored of its document.

    LoRA: y = x W^T + x A B with A (in, rank), B (rank, out), B = 0 at the document's start, one
    pair for each visit of a looped block and one for the logits. One RMSprop step a chunk on its
    mean loss, through the graph that scored it. The public records (#1855) compute a window of 2048
    tokens for each 48; here each token is computed once.
    """
    rank = 8
    adapted = ("qkv", "up")  # the matrices that have adapters
    lr = 2.0  # over the model's width
    decay = 0.99  # of mean squared gradients, a chunk
    floor = 1e-3  # added to their root, lest rounding moves the score (1e-10: 0.0008 to 0.012 worse)

    def __init__(self, model, tokenizer, device):
        super().__init__(model, tokenizer, device)
        self.new = {}  # adapters at a document's start
        random = torch.Generator().manual_seed(0)
        places = [(name, visit) for visit in range(len(block_order(model.cfg, True))) for name in self.adapted]
        for name, visit in (*places, ("embed", 0)):
            W = model.embed.weight if name == "embed" else getattr(model, name)[0]
            n_out, n_in = W.shape
            A = torch.rand(n_in, self.rank, generator=random) * 2 - 1
            self.new["A", name, visit] = (A * n_in ** -0.5).to(device)
            self.new["B", name, visit] = torch.zeros(self.rank, n_out, device=device)
        self.learned = {key: x.repeat(self.slots, 1, 1) for key, x in self.new.items()}
        self.squares = [torch.zeros_like(x) for x in self.learned.values()]  # mean, of gradients
        model.linear = self.linear

    def predict(self, fresh, inputs):
        again = torch.from_numpy(fresh).to(self.device)[:, None, None]
        self.learned = {key: torch.where(again, self.new[key], x.detach()).requires_grad_()
                        for key, x in self.learned.items()}
        self.squares = [x.masked_fill(again, 0) for x in self.squares]
        self.answer = super().predict(fresh, inputs)
        return self.answer.detach()

    def linear(self, x, W, name, visit=0):
        """x (N, in), W (out, in) -> x W^T + x A B (N, out), where there are A and B: each slot's own."""
        y = F.linear(x, W)
        if ("A", name, visit) not in self.learned:
            return y
        A = self.learned["A", name, visit].to(x.dtype)
        B = self.learned["B", name, visit].to(x.dtype)
        x = x.view(self.slots, self.chunk, -1)
        return y + (x @ A @ B).view(y.shape)

    def learn(self, targets, real):
        targets = torch.from_numpy(targets).to(self.device)[..., None]
        real = torch.from_numpy(real).to(self.device)
        nats = self.answer.logsumexp(-1) - self.answer.gather(2, targets)[..., 0]
        loss = nats * real / real.sum(1, keepdim=True).clamp(min=1)  # their sum: a mean of each slot
        self.step(torch.autograd.grad(loss.sum(), list(self.learned.values())))
        super().learn(targets, real)

    @torch.no_grad()
    def step(self, grads):
        """One step of RMSprop."""
        n_steps = self.start[:, None] / self.chunk + 1
        unbiased = (1 - self.decay ** n_steps) ** -0.5
        torch._foreach_mul_(self.squares, self.decay)
        torch._foreach_addcmul_(self.squares, grads, grads, 1 - self.decay)
        rms = torch._foreach_sqrt(self.squares)
        torch._foreach_mul_(rms, [unbiased] * len(rms))
        torch._foreach_add_(rms, self.floor)
        rate = self.lr / self.model.cfg.n_embd
        torch._foreach_addcdiv_(list(self.learned.values()), grads, rms, -rate)


PREDICTORS = {"adaptive": Adaptive, "sliding": Sliding}  # the first is the default


def build(path, name, device):
    """The artifact at path -> its predictor on the device (a str), the predictor's name. name "":
    the artifact's choice. Raises BadInput."""
    name = name or next(iter(PREDICTORS))
    if name not in PREDICTORS:
        raise BadInput(f"--predictor={name}: this artifact has {', '.join(PREDICTORS)}")
    return PREDICTORS[name](*load_on(path, device), torch.device(device)), name


def load_on(path, device):
    """The artifact at path -> its model on the device, without gradients; its Tokenizer."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model, tokenizer = load(path)
    return model.place(device).requires_grad_(False), tokenizer


# --------------------------------------------------------------------------------------------------
# A look at what the model has learned. Nothing here is scored.


@torch.inference_mode()
def sample(path, device, text, n_tokens, temperature, seed):
    """Prints text and, token by token, what follows: up to n_tokens, or to where the document ends.

    A token is drawn from p ^ (1 / temperature), divided by its sum.
    """
    model, tokenizer = load_on(path, device)
    random = torch.Generator().manual_seed(seed)
    tokens = [tokenizer.boundary, *tokenizer.encode(text).tolist()]
    print(text, end="", flush=True)
    shown = len(text)
    for _ in range(n_tokens):
        seen = torch.tensor(tokens[-model.cfg.seq_len:], device=device)
        seg = make_segments(np.array([0]), len(seen), model.cfg.seq_len, device)
        p = model.probabilities(model(seen, seg), seen, seg)[-1].cpu()
        p = (p.log() / max(temperature, 1e-6)).softmax(-1)
        tokens.append(torch.multinomial(p, 1, generator=random).item())
        if tokens[-1] == tokenizer.boundary:
            break
        so_far = tokenizer.decode(tokens).rstrip("\ufffd")  # of the last character more may come
        print(so_far[shown:], end="", flush=True)
        shown = len(so_far)
    print()


# ==================================================================================================
# ==================================================================================================
# The judge. Below this line nothing may be changed: records/check.py compares it with the root's.
# Of all that stands above it uses modules, BEGIN, BadInput, build(path, name, device), sample(), and
# what the comment over the predictors promises. Nothing above uses anything from here.

import hashlib
import json
import math
import re
import secrets
import shutil
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from data.dataset import (Parser, Progress, atomic_write, command, find_dataset, read_meta,
                          read_val_docs)
from data.tokenizer import Tokenizer
from pack import SOURCES, find_run, read_archive
from train_gpt import environment, read_launcher

MOST_LOGITS = 1 << 31  # numbers in an answer: 8 GB


def open_artifact(path):
    """-> the file's bytes, the Tokenizer of its tokenizer.json, the names of those SOURCES in it
    that are not the judge's own, byte for byte. Raises BadInput unless it has the known parts, each
    once."""
    if not path.is_file():
        raise BadInput("no such file; pack a run first, python pack.py")
    try:
        blob, files = read_archive(path)
        foreign = [name for name in SOURCES if files[name] != own_source(name)]
        return blob, Tokenizer(files["tokenizer.json"]), foreign
    except Exception as e:  # zipfile has many errors for bad bytes
        raise BadInput(f"not a whole artifact: {e}") from None


def own_source(name):
    return __loader__.get_data(os.path.join(os.path.dirname(__file__), name))  # or from a zip


def read_run(folder):
    """runs/NAME -> {kind: the last line of that kind in metrics.jsonl}. Of any other folder nothing
    is read: {}."""
    lines = {}
    if folder.resolve().parent == Path("runs").resolve() and (folder / "metrics.jsonl").is_file():
        for line in (folder / "metrics.jsonl").read_text("utf-8", "replace").splitlines():
            with suppress(ValueError, TypeError, KeyError):  # cut short by a kill
                found = json.loads(line)
                lines[found["kind"]] = found
    return lines


def gather(value=None):
    """-> every rank's value, in order."""
    values = [value] * read_launcher()[2]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def read_documents(folder, meta, limit, tokenizer):
    """-> streams [int64 (n + 2,): boundary, tokens, boundary], UTF-8 bytes of all documents. Ranks
    share the encoding.

    The judge's own Tokenizer encodes: the artifact's tokenizer.json is data, and none of its code
    sees a document. Raises BadInput unless the tokens of every document decode to exactly the
    document.
    """
    encoded, n_bytes = [], 0
    rank, _, n_ranks = read_launcher()
    for i, text in enumerate(read_val_docs(folder, meta, limit)):
        n_bytes += len(text.encode())
        if i % n_ranks == rank:
            tokens = tokenizer.encode(text)
            if tokenizer.decode(tokens) != text:
                raise BadInput(f"its tokenizer does not give document {i} back")
            stream = np.concatenate([[tokenizer.boundary], tokens, [tokenizer.boundary]])
            encoded.append(stream.astype(np.int64))
    shares = gather(encoded)
    n_docs = sum(map(len, shares))
    return [shares[i % n_ranks][i // n_ranks] for i in range(n_docs)], n_bytes


class Text:
    """What the judge holds: the documents' tokens, noise, and the counting."""

    def __init__(self, streams, vocab_size):
        self.streams, self.vocab_size = streams, vocab_size
        self.sizes = [len(stream) - 1 for stream in streams]  # targets of each
        self.random = np.random.default_rng(secrets.randbits(128))

    def deal(self, sizes, slots, chunk):
        """sizes {document: targets}, in the order of the deal -> for each round the document of
        each slot (B,), -1 for none, and where its chunk starts (B,). Where one has ended comes the
        next."""
        waiting = list(sizes)[::-1]
        docs, starts = np.full(slots, -1), np.zeros(slots, np.int64)
        while True:
            for slot in range(slots):
                if docs[slot] < 0 or starts[slot] >= sizes[docs[slot]]:
                    docs[slot] = waiting.pop() if waiting else -1
                    starts[slot] = 0
            if docs.max() < 0:
                return
            yield docs.copy(), starts.copy()
            starts += chunk

    def noise(self, shape):
        return self.random.integers(self.vocab_size, size=shape)

    def cut(self, docs, starts, chunk):
        """A round -> inputs, targets (B, T) int64, real (B, T) bool. Behind a document's end is
        noise."""
        inputs = self.noise((len(docs), chunk))
        targets, real = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        for slot, doc in enumerate(docs):
            if doc >= 0:
                tokens = self.streams[doc][starts[slot]:starts[slot] + chunk + 1]
                n = len(tokens) - 1
                inputs[slot, :n], targets[slot, :n], real[slot, :n] = tokens[:-1], tokens[1:], True
        return inputs, targets, real

    def count(self, logits, targets, asked):
        """logits (B, T, V), targets (B, T) int64, asked (B, T) bool -> nats float64 of the asked.

        The judge's own log-softmax, in float64 and below each row's maximum: whatever the predictor
        returns, the probabilities sum to one. Raises BadInput for another shape, and for rows that
        are not finite or whose spread is not.
        """
        shape = (*targets.shape, self.vocab_size)
        found = tuple(logits.shape) if type(logits) is torch.Tensor else type(logits).__name__
        if found != shape or not logits.is_floating_point():
            raise BadInput(f"predict() must return floating-point logits {shape}, not {found}")
        device = logits.device if logits.device.type != "mps" else "cpu"  # MPS has no float64
        index = torch.from_numpy(asked).to(device)
        logits = logits.detach().to(device)[index]
        targets = torch.from_numpy(targets).to(device)[index][:, None]
        rows = (1 << (19 if logits.device.type == "cpu" else 26)) // self.vocab_size + 1  # fit a cache
        nats = []
        for z, t in zip(logits.split(rows), targets.split(rows)):
            z = z.double()
            z = z - z.amax(-1, keepdim=True)
            if not torch.isfinite(z).all():
                raise BadInput("predict() returned logits that are not finite, or whose spread is not")
            at_target = z.gather(1, t)[:, 0]
            nats.append(z.exp_().sum(-1).log_() - at_target)
        return torch.cat(nats).cpu().numpy()


class Phases:
    """Seconds since the process started, by phase: phases("score") ends one and begins another."""

    def __init__(self):
        self.name = "start"
        self.since = BEGIN
        self.seconds = defaultdict(float)

    def __call__(self, name):
        since, self.since = self.since, time.perf_counter()
        self.seconds[self.name] += self.since - since
        self.name = name


def score(predictor, text, order, phases):
    """Score first, then reveal, round after round, the documents of `order`, a list of their numbers
    -> {document: nats float64 (n,) of its targets}."""
    nats = {doc: [] for doc in order}
    sizes = {doc: text.sizes[doc] for doc in order}
    with Progress("scoring", sum(sizes.values()), "tokens") as progress:
        for docs, starts in text.deal(sizes, predictor.slots, predictor.chunk):
            inputs, targets, real = text.cut(docs, starts, predictor.chunk)
            phases("score")
            found = text.count(predictor.predict(starts == 0, inputs), targets, real)
            phases("learn")
            predictor.learn(targets, real)
            progress.add(len(found))
            ends = real.sum(1).cumsum()
            for doc, part in zip(docs, np.split(found, ends[:-1])):
                if doc >= 0:
                    nats[doc].append(part)
    phases("sum")
    return {doc: np.concatenate(parts) for doc, parts in nats.items()}


# ---- the command


FLAGS = {
    "data": ("", "dataset: a name under data/ or a folder; empty: that of the run, for ARTIFACT in runs/RUN/"),
    "out": ("", "file for the score; empty: score.json beside an artifact of this folder's code, else none"),
    "limit_docs": (0, "documents: only so many of the first, no score; 0: all"),
    "predictor": ("", "one of the artifact's predictors; empty: its own choice"),
    "device": ("", "cuda, mps or cpu; empty: the best there is"),
    "audit": (False, "confine and prove even what runs this folder's own code"),
    "audit_seconds": (300.0, "s of replay, on each rank; some 9,200 places are asked in any case"),
    "trust": (False, "other code than this folder's is yours: no proof (but with --audit), and go on where "
              "this system cannot confine it"),
    "tokens": (256, "of a sample, at most"),
    "temperature": (0.8, "of a sample; 0: the likeliest token, always"),
    "seed": (0, "of a sample"),
}


def parse(argv):
    parser = Parser(prog="eval_bpb.py", description=__doc__)
    parser.add_argument("artifact", nargs="?", default="", metavar="ARTIFACT",
                        help="file made by pack.py; empty: the newest run's")
    parser.add_flags(FLAGS)
    parser.add_argument("--max_seconds", type=float, help="s from the start of the process to the score, 0: "
                        "no limit; unset: none for a run of yours on other documents than fineweb, else 600")
    parser.add_argument("--sample", metavar="TEXT", help="no score: print what the model writes after TEXT")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not 0 <= value < 1e9:
            raise BadInput(f"--{name}={value} must be a number from 0 to 1e9")
    out = Path(args.out)
    if args.out and (out.is_dir() or not out.parent.is_dir()):
        raise BadInput(f"--out={out}: a folder, or in none")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = args.device or next(device for device, there in available.items() if there)
    if not available.get(args.device):
        raise BadInput(f"--device={args.device}: this machine or this build of torch has none")
    return args


class Judge:
    """One judging: its clock, its copy of the artifact, its children, what it found."""

    def __init__(self, args):
        self.args = args
        self.path = Path(args.artifact or find_run() / "artifact.pyz")
        self.device = f"cuda:{read_launcher()[1]}" if args.device == "cuda" else args.device
        self.phases = Phases()
        self.children = []
        self.lacking = self.verdict = ""
        self.folder = Path(tempfile.mkdtemp(prefix="nanogolf"))
        self.ending = threading.Lock()  # who removes the folder holds it for good
        self.max_seconds = 600.0 if args.max_seconds is None else args.max_seconds
        self.timer = threading.Timer(max(BEGIN + self.max_seconds - time.perf_counter(), 0), self.overrun)
        self.timer.daemon = True
        if self.max_seconds:
            self.timer.start()

    def overrun(self):
        self.ending.acquire()
        try:
            print(f"eval_bpb.py: {self.path}: ran over {self.max_seconds:.0f} s in the phase "
                  f"'{self.phases.name}': no score", file=sys.stderr, flush=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            for child in self.children if self.lacking else ():  # a sandbox ends with this process
                child.kill()
        finally:
            os._exit(2)

    def close(self):
        self.ending.acquire()  # not after overrun(), which speaks the last word
        self.timer.cancel()
        for child in self.children:
            child.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def open(self):
        """Reads the artifact, once: what follows works on a copy. Then finds the documents."""
        args = self.args
        self.blob, self.tokenizer, self.foreign = open_artifact(self.path)
        self.copy = self.folder / "artifact.pyz"
        with self.ending:
            self.copy.write_bytes(self.blob)
        if args.sample is not None:
            return
        self.mode = "trusted" if self.foreign else "own"
        if args.audit or self.foreign and not args.trust:
            self.mode = "audited"
        self.run = {} if self.foreign else read_run(self.path.parent)
        name = args.data or self.run.get("start", {}).get("config", {}).get("data")
        if not name:
            raise BadInput("--data=NAME is needed for what is no run of this folder's own code")
        self.data = find_dataset(name)
        self.meta = read_meta(self.data)
        if args.max_seconds is None and self.meta["name"] != "fineweb" and self.run:
            self.timer.cancel()
            self.max_seconds = 0.0
        if self.mode != "own":
            self.open_sandbox()

    def open_sandbox(self):
        try:
            from records import confine
        except ImportError:
            raise BadInput("other code is judged by the project's folder, not by an artifact") from None
        if above := confine.reachable(self.data):
            raise BadInput(f"{self.data} is in {above}, where the artifact's code may read: move it")
        self.lacking, self.confine = confine.lacking(self.mode == "audited"), confine
        if self.lacking and not self.args.trust:
            raise BadInput(f"the code of others is not run here: it takes {self.lacking}; --trust if it "
                           "is yours")

    def predictor(self, seconds=0):
        """A predictor of the artifact that knows of nothing. A child ends after `seconds`; 0:
        never."""
        vocab_size = self.tokenizer.vocab_size
        if self.mode == "own":
            predictor, name = build(str(self.copy), self.args.predictor, self.device)
        else:
            predictor = self.confine.Remote(self.copy, self.device, vocab_size, not self.lacking)
            self.children.append(predictor)
            name = predictor.open(self.args.predictor, seconds)
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", name):
            raise BadInput("its predictor's name is not 1 to 32 of A-Z, a-z, 0-9, _, . and -")
        slots, chunk = predictor.slots, predictor.chunk
        if min(slots, chunk) < 1 or slots * chunk * vocab_size > MOST_LOGITS:
            raise BadInput(f"{slots} slots of {chunk} x {vocab_size} logits: at most {MOST_LOGITS} in all")
        self.name = name
        return predictor

    def judge(self):
        """Scores, and proves where it must."""
        phases = self.phases
        rank, _, n_ranks = read_launcher()
        phases("load")
        predictor = self.predictor()
        phases("text")
        limit = self.args.limit_docs or None
        streams, self.n_bytes = read_documents(self.data, self.meta, limit, self.tokenizer)
        text = Text(streams, self.tokenizer.vocab_size)
        self.sizes = text.sizes
        order = sorted(range(len(streams)), key=text.sizes.__getitem__, reverse=True)[rank::n_ranks]
        if self.mode == "audited":
            if len(streams) < n_ranks:
                raise BadInput("fewer documents than ranks")
            secrets.SystemRandom().shuffle(order)  # it may tell nothing of their lengths
        nats = score(predictor, text, order, phases)
        sums = {doc: math.fsum(each) for doc, each in nats.items()}
        shares = gather((sums, time.perf_counter() - BEGIN))
        self.timer.cancel()
        self.nats = math.fsum(nats for sums, _ in shares for nats in sums.values())
        self.seconds = max(seconds for _, seconds in shares)
        if self.mode == "audited":
            from records import proof
            predictor.close()
            phases("audit")
            self.verdict = proof.prove(self, predictor, text, nats, gather)
            phases("sum")

    def doubts(self):
        """Why the number is no score."""
        doubts = ["the replay failed"] * self.verdict.startswith("FAIL")
        if self.lacking and self.verdict:
            doubts.append("it was not confined")
        if len(self.sizes) < self.meta["val_docs"]:
            doubts.append(f"only the first {len(self.sizes)} of {self.meta['val_docs']} documents")
        if not self.n_bytes:
            doubts.append("the documents have no bytes")
        if self.mode == "audited" and self.meta["name"] == "demo":
            doubts.append("these documents are readable everywhere")
        return doubts

    def result(self):
        """What score.json holds. A number that cannot be trusted is never called val_bpb."""
        doubts = "; ".join(self.doubts())
        bpb = self.nats / math.log(2) / max(self.n_bytes, 1)
        n_docs, n_targets = len(self.sizes), sum(self.sizes)
        seconds = {name: round(seconds, 3) for name, seconds in self.phases.seconds.items()}
        result = {"untrusted": doubts, "untrusted_bpb": bpb} if doubts else {"val_bpb": bpb}
        return result | {
            "val_loss": self.nats / n_targets, "val_tokens": n_targets, "val_bytes": self.n_bytes,
            "val_docs": n_docs, "limit_docs": n_docs if n_docs < self.meta["val_docs"] else 0,
            "artifact_bytes": len(self.blob), "artifact_sha256": hashlib.sha256(self.blob).hexdigest(),
            "dataset": {key: value for key, value in self.meta.items() if key != "files"},
            "mode": self.mode, "unconfined": self.lacking, "predictor": self.name,
            "audit": {"replay": self.verdict} if self.verdict else {},
            "finished": self.run.get("summary", {}).get("finished"), "max_seconds": self.max_seconds,
            "phases": seconds | {"total": round(time.perf_counter() - BEGIN, 3),
                                 "to_score": round(self.seconds, 3)},
            "environment": environment(torch.device(self.device)),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


MODES = {"own": "the artifact's code is this judge's own folder's, byte for byte, and that is what ran",
         "trusted": "the artifact's code is not this folder's; it ran in a child and NOTHING IS PROVED",
         "audited": "the artifact's code ran confined"}


def report(judge, result):
    """Prints the summary; writes the file, also where nobody reads on."""
    try:
        print(f"artifact: {judge.path}\ndataset: {judge.meta['name']} in {judge.data}: {result['val_docs']} "
              f"documents, {result['val_bytes']} bytes, {result['val_tokens']} targets")
        print(f"predictor: {judge.name} on {result['environment']['device']}")
        proved = judge.verdict.startswith("pass")
        print(f"mode: {judge.mode}: {MODES[judge.mode]}{', and its score is proved by replay' * proved}")
        if judge.lacking:
            print(f"NOT CONFINED: that takes {judge.lacking}")
        if judge.verdict:
            print(f"audit replay: {judge.verdict}")
        print("phases: " + " ".join(f"{name}:{s:.1f}" for name, s in result["phases"].items()) + "\n---")
        if "val_bpb" in result:
            print(f"val_bpb: {result['val_bpb']:.6f}")
        else:
            print(f"NOT A SCORE: {result['untrusted']}\nuntrusted_bpb: {result['untrusted_bpb']:.6f}")
        print(f"val_loss: {result['val_loss']:.6f}\nartifact_bytes: {result['artifact_bytes']}")
        print(f"eval_seconds: {result['phases']['to_score']}")
    finally:
        if judge.args.out or not judge.foreign:
            with atomic_write(judge.args.out or judge.path.parent / "score.json", "w") as f:
                json.dump(result, f, indent=1)


def main(argv=None):
    """Command line -> exit code: 0, or 2 for a failed proof. Raises BadInput."""
    args = parse(argv)
    try:
        rank, _, n_ranks = read_launcher()
        if n_ranks > 1:
            dist.init_process_group("gloo")  # the judge's small talk, between the CPUs
    except ValueError as e:  # of the environment
        raise BadInput(e) from None
    judge = Judge(args)
    try:
        judge.open()
        if args.sample is not None:
            if judge.foreign:
                raise BadInput("it has other code than this folder: python ARTIFACT --sample=TEXT")
            sample(str(judge.copy), judge.device, args.sample, args.tokens, args.temperature, args.seed)
            return 0
        if judge.foreign and rank == 0:
            print(f"note: the artifact's {', '.join(judge.foreign)} differ from this folder's", flush=True)
        judge.judge()
        if rank == 0:
            report(judge, judge.result())
    except Exception as e:
        said = str(e) if isinstance(e, BadInput) else f"{type(e).__name__}: {e}"
        raise BadInput(f"{judge.path}: {said}") from None
    finally:
        judge.close()
        if n_ranks > 1:
            dist.destroy_process_group()
    return 2 if judge.verdict.startswith("FAIL") else 0


if __name__ == "__main__":
    sys.exit(command(main))
