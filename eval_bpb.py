"""Score an artifact: bits per byte on the validation documents.

    python eval_bpb.py                    the newest run's artifact, runs/latest/artifact.pyz
    python eval_bpb.py ARTIFACT           another: code that is not this folder's is confined and proves its score
    torchrun --standalone --nproc_per_node=8 eval_bpb.py      the documents shared among 8 GPUs
    python artifact.pyz --data=NAME       the same score from the file alone
    python artifact.pyz --sample="import os"                  what the model writes after these words; no score

bits per byte = nats of all targets / ln 2 / UTF-8 bytes of all documents. A document of n tokens has n + 1 targets: its
tokens, then the boundary that closes it, which carries 0 bytes but is charged, as the public scorer charges it. Its
inputs are the boundary that opens it and its tokens. The bytes are counted on the documents, never through a table of
token lengths.

Two halves. A predictor belongs to the submission and may be forked: the artifact's own copy of this file is what
predicts. The judge does not: the official score is the root's judge driving the artifact's predictor. Writes
score.json beside the artifact.
"""
import time
BEGIN = time.perf_counter() - time.process_time()  # of the process: up to here all its time was CPU time
import json
import os
from collections import defaultdict
from functools import partial

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: see train_gpt.py
import numpy as np
import torch
import torch.nn.functional as F

from data.dataset import BadInput
from train_gpt import Segments, block_order, make_segments

# ----------------------------------------------------------------------------------------------------------------------
# Predictors: the half that belongs to the submission. The judge calls
#   plan(lengths (n_docs,) int64) -> [spans (S, 3) int: document, start, stop], one array a round, from the numbers of
#       targets alone;
#   predict(spans, inputs (N,) int64) -> logits (N, V) over the whole vocabulary, for the spans of the next round one
#       after the other. They may depend on the inputs up to their place in their own document and on what learn() has
#       shown. The judge may ask for a round several times with different inputs: the last time before learn() counts;
#   learn(targets (N,) int64): the round's targets, once it is scored.
# Documents may learn from each other where rounds hold them together, and nowhere else: another predictor, on another
# rank or in a replay, sees such a group after other groups or after none, and must find the same. What the judge calls
# is what build(path, name, device) returns.


class Sliding:
    """Windows of seq_len tokens every `stride`: each target has seq_len - stride to seq_len tokens to its left."""

    def __init__(self, cfg, model, device, stride=None):
        self.seq_len, self.row_tokens, self.model, self.device = cfg.seq_len, cfg.row_tokens, model, device
        self.stride = stride or max(1, cfg.seq_len // 4)
        self.past = {}  # document -> the inputs before its next span

    def windows(self, start: int, stop: int):
        """Yields (begin, first, end) of each window: it reads begin..end and scores first..end. start ends a window."""
        while start < stop:
            end = min(start + (self.stride if start else self.seq_len), stop)
            yield max(0, start + self.stride - self.seq_len), start, end
            start = end

    def plan(self, lengths):
        rounds, size = [], self.row_tokens
        for doc, length in enumerate(lengths.tolist()):
            windows = list(self.windows(0, length))
            if size + sum(end - begin for begin, _, end in windows) > self.row_tokens:
                size = self.row_tokens  # a new round: documents that are no longer than one share one only
            for begin, first, end in windows:
                if size + end - begin > self.row_tokens:
                    rounds.append([])
                    size = 0
                size += end - begin
                if rounds[-1] and rounds[-1][-1][0] == doc:
                    rounds[-1][-1][2] = end
                else:
                    rounds[-1].append([doc, first, end])
        return [np.array(spans) for spans in rounds]

    @torch.inference_mode()
    def predict(self, spans, inputs):
        self.known, row, starts, scored, at, size = {}, [], [], [], 0, 0
        for doc, start, stop in spans.tolist():
            known = np.concatenate([self.past.get(doc, inputs[:0]), inputs[at:at + stop - start]])
            self.known[doc], at = known[-self.seq_len:], at + stop - start
            for begin, first, end in self.windows(start, stop):
                row.append(known[len(known) - stop + begin:len(known) - stop + end])
                starts.append(size)
                scored.append(np.arange(size + first - begin, size + end - begin))
                size += end - begin
        seg = make_segments(np.array(starts), size, self.seq_len, self.device)
        tokens = torch.from_numpy(np.concatenate(row)).to(self.device)
        p = self.model.probabilities(self.model(tokens, seg), tokens, seg)
        return p[torch.from_numpy(np.concatenate(scored)).to(self.device)].log()

    def learn(self, targets):
        self.past |= self.known


class Plain(Sliding):
    """Chunks of seq_len tokens, each without what came before it."""

    def __init__(self, cfg, model, device):
        super().__init__(cfg, model, device, stride=cfg.seq_len)


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
    head = list(range(len(pieces)))
    tail = list(range(len(pieces)))
    phrases = json.loads(tokenizer.blob)["phrases"]
    for left, right in phrases:
        head.append(head[left])
        tail.append(tail[right])
    never = never[np.ix_(tail, head)]
    for left, right in phrases:
        never[left, right] = True
    return never


POINTER_REACH = 8192  # places that a document's pointer may look back; attention's reach is seq_len


class Adaptive:
    """Batches of documents of like length, a chunk a round, keys and values of the past cached, the pointer's of all of
    it. Each document learns from what was scored of it, documents never from each other:

    LoRA: y = x W^T + x A B with A (in, rank), B (rank, out), B = 0 at the document's start, one pair for each visit of
    a looped block and one for the logits. One RMSprop step a chunk on its mean loss, through the graph that scored it.
    The public records (#1855) compute a window of 2048 tokens for each 48; here each token is computed once.
    """
    rank, decay, chunk, targets = 8, 0.99, 48, ("qkv", "up")
    never = None  # (V, V) bool, impossible_pairs(): 30 less for what cannot follow, lest it be altered input
    floor = 1e-3  # under the root mean square, lest rounding moves the score (1e-10: 0.0008 to 0.012 worse)

    def __init__(self, cfg, model, device):
        self.seq_len, self.model, self.device = cfg.seq_len, model, device
        self.batch_docs = max(16, cfg.row_tokens // 1536)
        shapes = {(name, visit): getattr(model, name).shape[1:]
                  for visit in range(len(block_order(cfg, True))) for name in self.targets}
        shapes["head", 0] = model.embed.weight.shape
        random = torch.Generator().manual_seed(0)
        self.new = {}
        for key, (n_out, n_in) in shapes.items():
            A = (torch.rand(n_in, self.rank, generator=random) * 2 - 1) * n_in ** -0.5
            self.new |= {("A", key): A.to(device), ("B", key): torch.zeros(self.rank, n_out, device=device)}
        self.lr = 16 / cfg.n_embd / self.rank

    def size(self, start: int) -> int:
        """Tokens of the chunk at start: of few sizes, growing with the document up to a 16th of the context."""
        size = min(self.chunk, self.seq_len // 2)
        while 16 * size <= min(start, self.seq_len // 2):
            size *= 2
        return size

    def shape(self, spans) -> tuple[int, int, int]:
        """-> B, T, tokens cached, of a round. They are few, so that rounds can be compiled or captured: documents are
        padded to a power of two, chunks to their size; a start has one size and one past, and a full context one."""
        start, T = int(spans[0, 1]), self.size(int(spans[0, 1]))
        return 1 << (len(spans) - 1).bit_length(), T, min(start, self.seq_len - T)

    def plan(self, lengths):
        """The longest documents first."""
        rounds, order = [], np.argsort(-lengths, kind="stable")
        for docs in np.split(order, range(self.batch_docs, len(order), self.batch_docs)):
            start = 0
            while len(docs):
                stop = start + self.size(start)
                rounds.append(np.stack([docs, np.full(len(docs), start), np.minimum(lengths[docs], stop)], 1))
                start, docs = stop, docs[lengths[docs] > stop]
        return rounds

    def predict(self, spans, inputs):
        from torch.nn.attention.bias import causal_lower_right  # here, for it takes a second
        start, (B, T, past) = int(spans[0, 1]), self.shape(spans)
        sizes = torch.from_numpy(spans[:, 2] - spans[:, 1]).to(self.device)
        if start == 0:
            self.adapters, self.past, self.n_steps = {k: x.repeat(B, 1, 1) for k, x in self.new.items()}, {}, 0
            self.squares = {k: torch.zeros_like(x) for k, x in self.adapters.items()}  # mean squared gradients
        elif B < len(self.adapters["B", ("head", 0)]):  # the others, the shortest, have ended
            self.adapters, self.squares, self.past = (
                {k: x[:B] for k, x in state.items()} for state in (self.adapters, self.squares, self.past))
        self.sizes = F.pad(sizes, (0, B - len(sizes)))[:, None]
        self.real = torch.arange(T, device=self.device) < self.sizes  # (B, T), the rest is padding at the end
        tokens = torch.zeros(B, T, dtype=torch.long, device=self.device)
        tokens[self.real] = torch.from_numpy(inputs).to(self.device)
        self.adapters = {k: x.detach().requires_grad_() for k, x in self.adapters.items()}
        causal = causal_lower_right(T, past + T)  # made here, for the compiler cannot
        self.logits, self.seen = self.forward(tokens, start, causal, self.adapters, self.past)
        return self.logits.detach()[self.real]

    def forward(self, tokens, start: int, causal, adapters: dict, past: dict):
        """tokens (B, T) from start on; past {key: (B, heads, S, d)} -> logits (B, T, V), the past of the next round."""
        (B, T), model, seen = tokens.shape, self.model, {}

        def recall(key, x, n):
            """x (B, heads, T, d) -> with what came before it, n places at most."""
            if key in past:
                x = torch.cat([past[key][:, :, T - n:], x], 2)
            seen[key] = x.detach()
            return x

        def adapt(x, y, key):
            if ("A", key) not in adapters:
                return y
            A, B_ = (adapters[part, key].to(x.dtype) for part in "AB")
            return y + (x.view(B, T, -1) @ A @ B_).view(y.shape)

        def attend(q, k, v, seg, visit):
            q, k, v = (x.view(B, T, -1, x.size(-1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, T, d)
            # No further back than the model was trained to look.
            k, v = recall(("k", visit), k, self.seq_len), recall(("v", visit), v, self.seq_len)
            y = F.scaled_dot_product_attention(q, k, v, causal, enable_gqa=True)
            return y.transpose(1, 2).reshape(B * T, -1, q.size(-1))

        def previous(x, name):
            x = recall(name, x.view(B, 1, T, -1), T + 1)
            return F.pad(x, (0, 0, 1, 0))[:, 0, -T - 1:-1].reshape(B * T, -1)

        pos = (start + torch.arange(T, dtype=torch.int32, device=self.device)).repeat(B)
        seg = Segments(None, pos, 0)
        model.linear, model.attend, model.previous = partial(self.linear, adapt), attend, previous
        hidden = model(tokens.view(-1), seg)
        z = adapt(hidden, F.linear(hidden, model.embed.weight.to(hidden.dtype)), ("head", 0)).float().view(B, T, -1)
        q, k, sink, gate = model.pointer(hidden, seg)
        k = recall("keys", k.view(B, 1, T, -1), POINTER_REACH)[:, 0]
        text = recall("text", tokens[:, None, :, None], POINTER_REACH)[:, 0, :, 0]
        p = model.mixture(model.cfg.softcap * torch.tanh(z / model.cfg.softcap), q.view(B, T, -1), k,
                          sink.view(B, T), gate.view(B, T), text)
        logits = p.clamp(min=1e-37).log()
        return logits if self.never is None else logits - 30 * self.never[tokens], seen

    def linear(self, adapt, x, W, name, layer, visit):
        if name not in self.targets:
            return F.linear(x, W)
        return adapt(x * (layer + 1) ** -0.5, F.linear(x, W), (name, visit))  # W has the norm's scale folded in

    def learn(self, targets):
        goal = torch.zeros_like(self.real, dtype=torch.long)
        goal[self.real] = torch.from_numpy(targets).to(self.device)
        self.update(goal)
        self.past, self.logits = self.seen, None

    def update(self, goal):
        """goal (B, T): the tokens that logits were for -> one step of all that learns."""
        nats = self.logits.logsumexp(-1) - self.logits.gather(2, goal[..., None])[..., 0]
        loss = (nats * self.real / self.sizes.clamp(min=1)).sum()  # each document's mean, summed
        grads = torch.autograd.grad(loss, list(self.adapters.values()))
        with torch.no_grad():
            self.n_steps += 1
            params, squares = list(self.adapters.values()), list(self.squares.values())
            torch._foreach_mul_(squares, self.decay)
            torch._foreach_addcmul_(squares, grads, grads, 1 - self.decay)
            rms = torch._foreach_sqrt(torch._foreach_div(squares, 1 - self.decay ** self.n_steps))
            torch._foreach_add_(rms, self.floor)
            torch._foreach_addcdiv_(params, grads, rms, -self.lr)


PREDICTORS = {"adaptive": Adaptive, "sliding": Sliding, "plain": Plain}  # the first is the default


def build(path: str, name: str, device: str):
    """The artifact at path -> its predictor, the predictor's name. name "": the artifact's choice. Raises BadInput."""
    from pack import load  # here, for the judge needs nothing of pack.py
    name = name or next(iter(PREDICTORS))
    if name not in PREDICTORS:
        raise BadInput(f"--predictor={name}: this artifact has {', '.join(PREDICTORS)}")
    cfg, model, tokenizer = load(path)
    predictor = PREDICTORS[name](cfg, move(model, device), torch.device(device))
    predictor.never = torch.from_numpy(impossible_pairs(tokenizer)).to(device)
    return predictor, name


def move(model, device: str):
    """Model in float32 on the CPU -> on the device, without gradients, in bf16 on a GPU that has it."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return model.place(device).requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# A look at what the model has learned. Nothing here is scored.


@torch.inference_mode()
def sample(path: str, device: str, text: str, n_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Prints text and, token by token, what follows: up to n_tokens, or to where the document ends.

    A token is drawn from softmax(logits / temperature), among the fewest that together have probability top_p.
    """
    from pack import load
    cfg, model, tokenizer = load(path)
    model, random = move(model, device), torch.Generator().manual_seed(seed)
    tokens, shown = [tokenizer.boundary, *tokenizer.encode(text).tolist()], 0
    for left in range(n_tokens, -1, -1):
        so_far = tokenizer.decode(tokens).rstrip("\ufffd")  # of the last character more bytes may come
        print(so_far[shown:], end="", flush=True)
        shown = len(so_far)
        if not left or len(tokens) > 1 and tokens[-1] == tokenizer.boundary:
            break
        seen = torch.tensor(tokens[-cfg.seq_len:], device=device)
        seg = make_segments(np.array([0]), len(seen), cfg.seq_len, device)
        hidden = model(seen, seg)
        q, k, *rest = model.pointer(hidden, seg)
        p = model.mixture(model.logits(hidden[-1:]), q[-1:], k, *(x[-1:] for x in rest), seen)
        logits = p[0].log().cpu()
        p, order = (logits / max(temperature, 1e-6)).softmax(-1).sort(descending=True)
        p[p.cumsum(0) - p > top_p] = 0
        tokens.append(order[torch.multinomial(p, 1, generator=random)].item())
    print()


# ======================================================================================================================
# ======================================================================================================================
# The judge. Below this line nothing may be changed: records/check.py compares it with the root's. Of all that stands
# above it uses BEGIN, build(path, name, device), sample(), and what the comment over the predictors promises. Nothing
# above uses anything from here; even the imports are its own.

import hashlib
import io
import json
import math
import secrets
import sys
import threading
import zipfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from data.confine import Refused, Remote, failure, reachable
from data.dataset import Parser, Progress, atomic_write, command, find_dataset, read_meta, read_val_docs
from data.runs import World, environment, note_in_ledger
from data.tokenizer import Tokenizer
from pack import SOURCES, find_run

PLACE_TOLERANCE = {"cpu": 1e-4, "cuda": 0.05, "mps": 0.05}  # nats that one place may move in a replay: rounding
MEAN_TOLERANCE = {"cpu": 1e-6, "cuda": 1e-4, "mps": 1e-4}  # nats a place by which a replay may cost more, on average
CLOSING_TOLERANCE = 0.25  # nats that a wrong length may move the end of a document: what was learned elsewhere
ROUND_LOGITS = 1 << 31  # numbers that one round may return: 8 GB


def open_artifact(path: Path) -> tuple[bytes, Tokenizer, list[str]]:
    """-> the file's bytes, the Tokenizer of its tokenizer.json, the names of the SOURCES in it that are not the judge's
    own, byte for byte. Raises BadInput unless all parts match their checksums."""
    try:
        blob = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(blob)) as z:
            missing = {*SOURCES, "tokenizer.json"} - set(z.namelist())
            if missing or max(part.file_size for part in z.infolist()) > 1 << 28:
                raise ValueError(f"it has no {', '.join(missing)}" if missing else "it claims more than 2^28 bytes")
            if (bad := z.testzip()) is not None:
                raise ValueError(f"{bad} does not match its checksum")
            own = lambda name: __loader__.get_data(os.path.join(os.path.dirname(__file__), name))  # or from a zip
            return blob, Tokenizer(z.read("tokenizer.json")), [f for f in SOURCES if z.read(f) != own(f)]
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror or e}: pack a run first, python pack.py") from None
    except Exception as e:  # zipfile has many errors for bad bytes
        raise BadInput(f"{path} is not a whole artifact: {e}") from None


def find_data(artifact: Path, data: str) -> Path:
    """--data, or the dataset of the run beside the artifact -> its folder."""
    try:
        with open(artifact.parent / "metrics.jsonl", encoding="utf-8") as f:
            data = data or str(json.loads(f.readline())["config"]["data"])
    except (OSError, ValueError, KeyError, TypeError):
        if not data:
            raise BadInput(f"--data=NAME is needed: no metrics.jsonl beside {artifact} names one") from None
    return find_dataset(data)


def read_documents(folder: Path, meta: dict, limit, tokenizer: Tokenizer, world: World):
    """-> streams [int64 (n + 2,): boundary, tokens, boundary], UTF-8 bytes of all documents. Ranks share the encoding.

    The judge's own Tokenizer encodes: the artifact's tokenizer.json is data, and none of its code sees a document.
    Raises Refused unless the tokens of every document decode to exactly the document.
    """
    mine, n_bytes = [], 0
    for i, text in enumerate(read_val_docs(folder, meta, limit)):
        n_bytes += len(text.encode())
        if i % world.size == world.rank:
            tokens = tokenizer.encode(text)
            if tokenizer.decode(tokens) != text:
                raise Refused(f"the tokenizer does not give document {i} back: its bits are not bits of this text")
            mine.append(np.concatenate([[tokenizer.boundary], tokens, [tokenizer.boundary]]).astype(np.int64))
    shares = world.gather(mine)
    return [shares[i % world.size][i // world.size] for i in range(sum(map(len, shares)))], n_bytes


def check_plan(rounds, lengths: np.ndarray, vocab_size: int) -> list[np.ndarray]:
    """-> the rounds as int64 (S, 3). Raises Refused unless every target is scored once, left to right."""
    try:
        rounds = [np.array(spans, dtype=np.int64).reshape(-1, 3) for spans in rounds]
    except (TypeError, ValueError, OverflowError) as e:
        raise Refused(f"the plan is not a list of (document, start, stop) arrays: {e}") from None
    if not rounds or min(map(len, rounds)) == 0:
        raise Refused("the plan has no rounds, or a round without spans")
    doc, start, stop = np.concatenate(rounds).T
    if doc.min() < 0 or doc.max() >= len(lengths) or ((start < 0) | (stop <= start) | (stop > lengths[doc])).any():
        raise Refused("the plan has empty spans or spans outside the documents")
    index = np.repeat(np.arange(len(rounds)), [len(spans) for spans in rounds])
    order = np.lexsort((index, doc))  # by document, then in the order of the rounds
    doc, start, stop, index = doc[order], start[order], stop[order], index[order]
    same = doc[1:] == doc[:-1]
    first, last = np.append(True, ~same), np.append(~same, True)
    if (same & (index[1:] == index[:-1])).any():
        raise Refused("the plan has two spans of one document in one round")
    if start[first].any() or (start[1:] != stop[:-1])[same].any():
        raise Refused("the plan skips, repeats or reorders targets of a document")
    if first.sum() != len(lengths) or (stop != lengths[doc])[last].any():
        raise Refused("the plan leaves targets out")
    if (largest := max(map(count_targets, rounds))) * vocab_size > ROUND_LOGITS:
        raise Refused(f"the plan has a round of {largest} targets: its logits are more than {ROUND_LOGITS} numbers")
    return rounds


def count_targets(spans: np.ndarray) -> int:
    return int((spans[:, 2] - spans[:, 1]).sum())


def find_groups(rounds: list[np.ndarray]) -> list[list[int]]:
    """-> the rounds in groups that share no document with each other, in order of the first round."""
    parent, seen, groups = list(range(len(rounds))), {}, defaultdict(list)

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, spans in enumerate(rounds):
        for doc in spans[:, 0].tolist():
            parent[root(i)] = root(seen.setdefault(doc, i))
    for i in range(len(rounds)):
        groups[root(i)].append(i)
    return list(groups.values())


def deal(rounds: list[np.ndarray], world_size: int) -> list[list[int]]:
    """-> the rounds of each rank, in order: group by group, the largest first, to the rank with the least so far."""
    sizes, hands, load = [count_targets(spans) for spans in rounds], [[] for _ in range(world_size)], [0] * world_size
    for size, group in sorted(((sum(sizes[i] for i in g), g) for g in find_groups(rounds)), key=lambda x: -x[0]):
        rank = load.index(min(load))
        hands[rank] += group
        load[rank] += size
    return [sorted(hand) for hand in hands]


def count_nats(logits, targets: np.ndarray, vocab_size: int) -> Tensor:
    """logits (N, V), targets (N,) -> nats of each target, float64 (N,) on the CPU.

    The judge's own log-softmax, in float64 and below each row's maximum: whatever the predictor returns, the
    probabilities sum to one. Raises Refused for another shape, and for rows that are not finite or whose spread is not.
    """
    shape = (len(targets), vocab_size)
    if type(logits) is not Tensor or tuple(logits.shape) != shape or not logits.is_floating_point():
        found = tuple(logits.shape) if type(logits) is Tensor else type(logits).__name__
        raise Refused(f"predict() must return floating-point logits {shape}, not {found}")
    logits = logits.detach().cpu() if logits.device.type == "mps" else logits.detach()  # MPS has no float64
    targets, nats = torch.from_numpy(targets).to(logits.device)[:, None], []
    rows = max(1, (1 << (19 if logits.device.type == "cpu" else 26)) // vocab_size)  # blocks that stay in the cache
    for z, t in zip(logits.split(rows), targets.split(rows)):
        z = z.double()
        z = z - z.amax(-1, keepdim=True)
        if not torch.isfinite(z).all():
            raise Refused("predict() returned logits that are not finite, or whose spread is not")
        at_target = z.gather(1, t)[:, 0]
        nats.append(z.exp_().sum(-1).log_() - at_target)
    return torch.cat(nats).cpu()


class Phases:
    """Seconds since the process started, by phase: `with phases("score"):` adds to one."""

    def __init__(self):
        self.seconds, self.name = {"start": time.perf_counter() - BEGIN}, "start"

    @contextmanager
    def __call__(self, name: str):
        outer, self.name, since = self.name, name, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since
            self.name = outer

    def report(self) -> dict:
        return {k: round(v, 3) for k, v in self.seconds.items()} | {"total": round(time.perf_counter() - BEGIN, 3)}


def cut(spans: np.ndarray, streams) -> tuple[np.ndarray, np.ndarray]:
    """The spans of a round -> inputs and targets (N,), span after span."""
    return tuple(np.concatenate([streams[doc][a + k:b + k] for doc, a, b in spans.tolist()]) for k in (0, 1))


def score(predictor, streams, rounds, mine: list[int], vocab_size: int, phases: Phases) -> dict[int, np.ndarray]:
    """Score first, then reveal, round after round. -> {round: nats float64 (N,)}."""
    nats = {}
    with Progress("scoring", sum(count_targets(rounds[i]) for i in mine), "tokens") as progress:
        for i in mine:
            inputs, targets = cut(rounds[i], streams)
            with phases("score"):
                logits = predictor.predict(rounds[i].copy(), inputs.copy())
                nats[i] = count_nats(logits, targets, vocab_size).numpy()
            with phases("learn"):
                predictor.learn(targets.copy())
            progress.add(len(targets))
    return nats


# ---- proof, once the score is known, by a child that has only lengths


def replay(predictor, streams, rounds, nats: dict, vocab_size: int, seconds: float, scored: float, device: str) -> str:
    """Asks a new predictor again, at every place of rounds drawn at random, with all inputs behind that place hidden
    -> verdict. What it then pays must be what was scored: such a number could have been coded and decoded.

    Place k of all spans of a round is asked in one call, in rising order: what an earlier call showed is known. As many
    rounds are drawn as fit into `seconds`, for it took `scored` seconds to ask for each round once; one that takes much
    of that is asked from a random place on. Rounds before them that hold the same documents are asked once.
    """
    lengths = np.array([len(s) - 1 for s in streams])
    again = check_plan(predictor.plan(lengths.copy()), lengths, vocab_size)
    if len(again) != len(rounds) or not all(map(np.array_equal, again, rounds)):
        return "FAIL: a new predictor plans other rounds from the same lengths"
    random, end, total = secrets.SystemRandom(), time.perf_counter() + seconds, sum(map(len, nats.values()))
    order = random.sample(sorted(nats), len(nats))
    cost = {i: scored * len(nats[i]) / total * (rounds[i][:, 2] - rounds[i][:, 1]).max() for i in order}
    drawn = set(order[:1 + int(np.searchsorted(np.cumsum([*cost.values()]), seconds))])
    groups = [group for group in find_groups(rounds) if drawn & {*group}]
    random.shuffle(groups)
    moves, docs = [np.zeros(0)], set()
    with Progress("replaying", 0, "places") as progress:
        for i in (i for group in groups for i in group[:1 + max(at for at, i in enumerate(group) if i in drawn)]):
            inputs, targets = cut(rounds[i], streams)
            sizes = rounds[i][:, 2] - rounds[i][:, 1]
            place = np.arange(len(inputs)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # in its span
            n = int(sizes.max())
            first = n if i not in drawn else random.randrange(n) if cost[i] > seconds / 8 else 0
            for k in range(first, n):
                if time.perf_counter() > end:
                    break
                noise = np.frombuffer(secrets.token_bytes(8 * len(inputs)), np.uint64) % np.uint64(vocab_size)
                asked = np.flatnonzero(place == k)
                logits = predictor.predict(rounds[i].copy(), np.where(place <= k, inputs, noise.astype(np.int64)))
                moves.append(count_nats(logits[asked], targets[asked], vocab_size).numpy() - nats[i][asked])
                progress.add(len(asked))
                docs |= set(rounds[i][sizes > k, 0].tolist())
            else:
                predictor.predict(rounds[i].copy(), inputs.copy())
                predictor.learn(targets.copy())
                continue
            break
    moves, kind = np.concatenate(moves), device.split(":")[0]
    if not len(moves):
        return "FAIL: the time was too short for one place"
    worst, mean = np.abs(moves).max(), moves.mean()
    passed = worst <= PLACE_TOLERANCE[kind] and mean <= MEAN_TOLERANCE[kind]
    return (f"{'pass' if passed else 'FAIL'}: {len(moves)} places of {len(docs)} documents asked again with what "
            f"follows hidden: moved {worst:.1e} nats at most (allowed {PLACE_TOLERANCE[kind]}), {mean:+.1e} on average "
            f"(allowed {MEAN_TOLERANCE[kind]}); leaks at {1 - 0.01 ** (1 / len(moves)):.1e} of the places, or in "
            f"{1 - 0.01 ** (1 / len(docs)):.1%} of the documents, would have been seen with 99 %")


def tell_wrong_lengths(predictor, streams, rounds, nats: dict, vocab_size: int) -> str:
    """Tells a new predictor that some documents go on (and they do, with noise) -> verdict. What it pays for the
    boundary that closes them must stay, for only the plan can have told it."""
    random = secrets.SystemRandom()
    closing = {doc: nats[i][at - 1] for i in nats for (doc, _, b), at in zip(
        rounds[i].tolist(), np.cumsum(rounds[i][:, 2] - rounds[i][:, 1])) if b == len(streams[doc]) - 1}
    longer = set(random.sample(range(len(streams)), -(-len(streams) // 2)))
    altered = [np.append(s, random.choices(range(vocab_size), k=random.randrange(1, 33))) if i in longer else s
               for i, s in enumerate(streams)]
    lengths = np.array([len(s) - 1 for s in altered])
    plan = check_plan(predictor.plan(lengths.copy()), lengths, vocab_size)
    groups, few, told = find_groups(plan), [], set()
    random.shuffle(groups)
    while groups and len(told) < 8:
        few += groups.pop()
        told |= {doc for i in few for doc in plan[i][:, 0].tolist()} & longer & set(closing)
    moves = []
    for i, each in score(predictor, altered, plan, sorted(few), vocab_size, Phases()).items():
        for (doc, a, b), at in zip(plan[i].tolist(), np.cumsum(plan[i][:, 2] - plan[i][:, 1])):
            end = len(streams[doc]) - 2  # the true closing boundary among the document's targets
            if doc in told and a <= end < b:
                moves.append(each[at - b + end] - closing[doc])
    move = abs(sum(moves)) / max(len(moves), 1)
    return (f"{'pass' if move <= CLOSING_TOLERANCE else 'FAIL'}: moved {move:.1e} nats, allowed {CLOSING_TOLERANCE}, "
            f"over the ends of {len(moves)} documents, on average")


# ---- the command


def parse(argv):
    parser = Parser(prog="eval_bpb.py", description=__doc__)
    add = parser.add_argument
    add("artifact", nargs="?", default="", metavar="ARTIFACT", help="file made by pack.py; empty: the newest run's")
    add("--data", default="", metavar="NAME", help="dataset: a name under data/ or a folder; empty: that of the run")
    add("--limit_docs", type=int, default=0, metavar="N", help="documents: only the first N, no score; 0: all")
    add("--predictor", default="", metavar="NAME", help="one of the artifact's predictors; empty: its own choice")
    add("--device", default="", metavar="NAME", help="cuda, mps or cpu; empty: the best there is")
    add("--audit", action="store_true", help="confine and prove even what runs this folder's own code")
    add("--audit_seconds", type=float, default=300.0, metavar="S", help="s of replay, on each rank")
    add("--trust", action="store_true", help="other code than this folder's is yours: no proof (but with --audit), and "
        "go on where this system cannot confine it")
    add("--max_seconds", type=float, default=None, metavar="S",
        help="s from the start of the process to the score, 0: no limit; unset: 600 on fineweb, else 0")
    add("--sample", metavar="TEXT", help="no score: print what the model writes after TEXT")
    add("--tokens", type=int, default=256, metavar="N", help="of a sample, at most")
    add("--temperature", type=float, default=0.8, metavar="T", help="of a sample; 0: the likeliest token, always")
    add("--top_p", type=float, default=0.95, metavar="P", help="of a sample: tokens that together are so likely")
    add("--seed", type=int, default=0, metavar="N", help="of a sample")
    args = parser.parse_args(argv)
    for name in ("limit_docs", "audit_seconds", "max_seconds", "tokens", "temperature", "top_p", "seed"):
        if not 0 <= (getattr(args, name) or 0) < math.inf:
            raise BadInput(f"--{name}={getattr(args, name)} must be a number, 0 or more")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = args.device or next(device for device, there in available.items() if there)
    if not available.get(args.device):
        raise BadInput(f"--device={args.device}: this machine or this build of torch has none")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code: 0, or 2 for a failed proof. Raises BadInput."""
    phases, args = Phases(), parse(argv)
    world = World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    artifact = Path(args.artifact or find_run() / "artifact.pyz")
    blob, tokenizer, foreign = open_artifact(artifact)
    if args.sample is not None:
        if foreign:
            raise BadInput(f"--sample: {artifact} has other code than this folder: python {artifact} --sample=TEXT")
        sample(str(artifact), device, args.sample, args.tokens, args.temperature, args.top_p, args.seed)
        return 0
    audit = args.audit or bool(foreign) and not args.trust
    about = {"mode": "audited" if audit else "trusted" if foreign else "own", "unconfined": ""}
    folder = find_data(artifact, args.data)
    meta, vocab_size, remotes = read_meta(folder), tokenizer.vocab_size, []
    if foreign and world.rank == 0:
        print(f"note: the artifact's {', '.join(foreign)} differ from this folder's: its code runs confined"
              + (" and must prove its score (--trust if it is yours)" if audit else ""), flush=True)

    def make():
        """A predictor of the artifact that knows of nothing yet."""
        if about["mode"] == "own":
            predictor, about["predictor"] = build(str(artifact), args.predictor, device)
            return predictor
        if above := reachable(folder):
            raise BadInput(f"{folder} is in {above}, where the artifact's code may read: move it")
        Remote(remotes, blob, args.predictor, device, vocab_size)
        about["unconfined"], about["predictor"] = remotes[-1].open()
        if about["unconfined"] and not args.trust:
            raise BadInput(f"this system has no {about['unconfined']} to confine the artifact's code with; --trust if "
                           "you know whose it is")
        return remotes[-1]

    def watch(seconds: float) -> threading.Timer:
        """Ends this process, and all that belongs to it, after so many seconds."""
        def end():
            for remote in remotes:
                remote.close()
            print(f"eval_bpb.py: {artifact}: ran over {seconds:.0f} s in the phase '{phases.name}': no score",
                  file=sys.stderr, flush=True)
            os._exit(2)
        timer = threading.Timer(max(BEGIN + seconds - time.perf_counter(), 0.0), end)
        timer.daemon = True
        if seconds:
            timer.start()
        return timer

    limit = (600.0 if meta["name"] == "fineweb" else 0.0) if args.max_seconds is None else args.max_seconds
    timer = watch(limit)
    if world.size > 1:
        dist.init_process_group("gloo")  # the judge's small talk, between the CPUs
    try:
        with phases("load"):
            predictor = make()
        with phases("text"):
            streams, n_bytes = read_documents(folder, meta, args.limit_docs or None, tokenizer, world)
            lengths = np.array([len(s) - 1 for s in streams])
        with phases("compile"):  # a predictor may compile in plan()
            rounds = check_plan(predictor.plan(lengths.copy()), lengths, vocab_size)
            mine = deal(rounds, world.size)[world.rank]
        nats, verdicts = score(predictor, streams, rounds, mine, vocab_size, phases), {}
        timer.cancel()
        seconds = time.perf_counter() - BEGIN
        if audit and mine:
            predictor.close()
            timer = watch(seconds + 3 * args.audit_seconds + 600)  # should a call in the proof never return
            with phases("audit"):
                verdicts["replay"] = replay(make(), streams, rounds, nats, vocab_size, args.audit_seconds,
                                            phases.seconds["score"], device)
                verdicts["lengths"] = tell_wrong_lengths(make(), streams, rounds, nats, vocab_size)
        shares = world.gather(({i: math.fsum(each) for i, each in nats.items()}, verdicts, seconds))
    except BadInput as e:
        raise type(e)(f"{artifact}: {e}") from None
    except Exception as e:
        raise Refused(f"{artifact}: {failure(e)}") from None
    finally:
        timer.cancel()
        for remote in remotes:
            remote.close()
        if world.size > 1:
            dist.destroy_process_group()
    nats, seconds = math.fsum(x for share, *_ in shares for _, x in sorted(share.items())), max(s for *_, s in shares)
    for _, others, _ in shares:  # what failed on any rank has failed
        verdicts |= {k: v for k, v in others.items() if v.startswith("FAIL")}
    if world.rank == 0:
        about |= {"audit": verdicts, "max_seconds": limit, "phases": phases.report() | {"to_score": round(seconds, 3)}}
        about["environment"] = environment(torch.device(device), world.size)
        report(artifact, blob, folder, meta, streams, n_bytes, nats, about)
    return 2 if any(v.startswith("FAIL") for v in verdicts.values()) else 0


MODES = {"own": "own: the artifact's code is this judge's own folder's, byte for byte, and that is what ran",
         "trusted": "trusted: the artifact's code is not this folder's; it ran in a child and NOTHING IS PROVED",
         "audited": "audited: the artifact's code ran confined, and its score is proved by replay"}


def report(artifact: Path, blob: bytes, folder: Path, meta: dict, streams, n_bytes: int, nats: float, about: dict):
    """Prints the summary and writes score.json. A number that cannot be trusted is never called val_bpb."""
    n_tokens, n_docs = sum(len(s) - 1 for s in streams), len(streams)
    doubts = [f"the {k} failed" for k, v in about["audit"].items() if v.startswith("FAIL")]
    doubts += [f"only the first {n_docs} of {meta['val_docs']} documents"] if n_docs < meta["val_docs"] else []
    doubts += ["the documents have no bytes"] if not n_bytes else []
    bpb = nats / math.log(2) / n_bytes if n_bytes else 0.0
    result = {"untrusted": "; ".join(doubts), "untrusted_bpb": bpb} if doubts else {"val_bpb": bpb}
    result |= {"val_loss": nats / n_tokens, "val_tokens": n_tokens, "val_bytes": n_bytes, "val_docs": n_docs,
               "limit_docs": n_docs if n_docs < meta["val_docs"] else 0, "artifact_bytes": len(blob),
               "artifact_sha256": hashlib.sha256(blob).hexdigest(),
               "dataset": {k: v for k, v in meta.items() if k != "files"}, **about,
               "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    print(f"artifact: {artifact}\ndataset: {meta['name']} in {folder}: {n_docs} documents, {n_bytes} bytes, "
          f"{n_tokens} targets")
    print(f"predictor: {about['predictor']} on {about['environment']['device']}\nmode: {MODES[about['mode']]}")
    if about["unconfined"]:
        print(f"NOT CONFINED: this system has no {about['unconfined']}")
    for name, text in about["audit"].items():
        print(f"audit {name}: {text}")
    print("phases: " + " ".join(f"{k}:{v:.1f}" for k, v in about["phases"].items()) + "\n---")
    print(f"NOT A SCORE: {result['untrusted']}\nuntrusted_bpb: {bpb:.6f}" if doubts else f"val_bpb: {bpb:.6f}")
    print(f"val_loss: {result['val_loss']:.6f}\nartifact_bytes: {len(blob)}")
    print(f"eval_seconds: {about['phases']['to_score']}")
    with atomic_write(artifact.parent / "score.json", "w") as f:
        json.dump(result, f, indent=1)
    if doubts:
        print(f"eval_bpb.py: {artifact}: not a score: {result['untrusted']}", file=sys.stderr)
    elif (artifact.parent / "metrics.jsonl").exists():
        note_in_ledger(artifact.parent)


if __name__ == "__main__":
    sys.exit(command(main))
