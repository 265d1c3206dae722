"""Pack a trained model into one file: runs/<run>/checkpoint.pt -> runs/<run>/artifact.pyz.

    python pack.py [RUN]        this run, or the newest one that has ended

The file ends just below --cap_bytes, or where finer steps buy nothing.

How. (1) Steps: for y = W x with H = E[x x^T] and g_i = E[(dL/dy_i)^2], an error e of W raises the
loss by about 1/2 sum_i g_i e_i H e_i^T; steps are such that every weight pays the same share of it.
(2) Rounding: GPTQ's error feedback (arXiv 2210.17323) inside a trellis (Ungerboeck's code, as the
dependent quantisation of ISO/IEC 15938-17). (3) Coding: interleaved rANS (arXiv 1311.2540) with
probabilities that follow from scales, so that no tables are sent. (4) One constant, found by
search, sets the size. All of it comes from the checkpoint: packing reads no data.
"""
import io
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

sys.path.append(str(Path(__file__).absolute().parent))    # where PYTHONSAFEPATH leaves it out
from train_gpt import GPT, Config, block_order, load_checkpoint  # sets what OpenMP reads: before torch
from data.dataset import BadInput, Parser, Progress, atomic_write, command
from data.tokenizer import Tokenizer

import numpy as np
import torch
import zstandard
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# Entropy coder. A value is k + half / 2 steps, kept as the integer 2 k + half; half is the lowest
# bit of the state of a trellis, and the parity of k leads to the next state. Encoder and decoder
# agree bit for bit on every machine.

BITS = 14               # probabilities are multiples of 2^-14
LOW = -24               # contexts: sigma = 2^(index / 4) steps, from 1/64
HIGH = 24               # to 64 steps
GRID = 16               # points of a density in a step
UNIT = 1 << 20          # densities are multiples of 1 / UNIT
NORMAL = 1024           # the density of N(0, sigma) at 0, to
LAPLACE = 96            # that of Laplace's with the same sigma: 95 % of one, 5 % of the other
# The states after an even and an odd k: Ungerboeck's code (13, 4). 32 states take four times as
# long for no less KL.
TRELLIS = np.array([(0, 2), (5, 7), (1, 3), (4, 6), (2, 0), (7, 5), (3, 1), (6, 4)], np.int32)


@lru_cache
def tables():
    """-> radius (contexts,) int32, freq and start (contexts, symbols) uint32,
    symbol (contexts << BITS,) uint16.

    Context 2 * (index - LOW) + half. Its symbols are k + radius for |k| <= radius, and last the
    escape. freq and their running sum start are in units of 2^-BITS, symbol is the inverse of start.
    p(k) ~ 0.95 N(0, sigma) + 0.05 Laplace of the same variance, integrated at eight points a step;
    densities by products, for those are rounded alike on every machine, and exp is not.
    """
    radii = [int(6 * 2 ** (index / 4)) + 2 for index in range(LOW, HIGH + 1)]
    freq = np.zeros((2 * len(radii), 2 * radii[-1] + 2), np.uint32)
    for context, (radius, half) in enumerate(product(radii, (0, 1))):
        sigma = GRID * Decimal(2).sqrt().sqrt() ** (context // 2 + LOW)
        normal = np.full(GRID * (radius + 1), float((-1 / sigma ** 2).exp()))
        normal[0] = math.sqrt(normal[0])                    # so it is squared ratios of neighbours
        laplace = np.full(len(normal), float((-Decimal(2).sqrt() / sigma).exp()))
        mixture = NORMAL * np.cumprod(np.cumprod(normal)) + LAPLACE * np.cumprod(laplace)
        mixture = (np.append(NORMAL + LAPLACE, mixture) * UNIT).astype(np.int64)
        points = np.arange(-GRID * radius, GRID * (radius + 1), 2) + GRID // 2 * half - 7
        running = np.cumsum(mixture[np.abs(points)])[7::8]
        n = len(running)
        share = ((1 << BITS) - n - 1) * running // running[-1]
        freq[context, :n] = np.diff(share, prepend=0)
        freq[context, :n + 1] += 1                          # to each symbol, and the escape
    start = np.cumsum(freq, 1, np.uint32) - freq
    symbol = np.repeat(np.arange(freq.size) % freq.shape[1], freq.ravel())
    return np.repeat(np.int32(radii), 2), freq, start, symbol.astype(np.uint16)


def count_lanes(sigmas):
    """-> rows that are coded side by side, by the number of weights; each costs 4 bytes to start."""
    n_weights = sum(row.size * col.shape[2] for row, col in sigmas)
    return 1 << min(max((n_weights >> 13).bit_length(), 4), 11)


def pieces(sigmas):
    """Yields (bank, which m of its L * R rows, contexts (n, m) int32 for half = 0) of what is coded
    together, column by column. sigmas: of each bank the exponents row (L, R, 1), col (L, 1, n)."""
    lanes = count_lanes(sigmas)
    for bank, (row, col) in enumerate(sigmas):
        for first in range(0, row.size, lanes):
            rows = np.arange(first, min(first + lanes, row.size))
            index = row.ravel()[rows].astype(np.int32) + col[rows // row.shape[1], 0].T
            yield bank, rows, 2 * (np.clip(index, LOW, HIGH) - LOW)


def encode(values, sigmas):
    """values[i] (L, R, n) int32 in half steps, sigmas[i] as scales() gives them
    -> words (uint16) and escapes (int32) for decode(), bytes of each bank by the probabilities.

    Each lane has a rANS state of 32 bits, all share one stream of words: a step codes one column
    of a piece. Works backwards, so that decoding goes forwards.
    """
    radii, freq, begin, _ = tables()
    lanes = np.full(count_lanes(sigmas), 1 << 16, np.uint32)
    words, escapes = [], []
    ideal = np.zeros(len(values))
    for bank, rows, context in reversed(list(pieces(sigmas))):
        value = values[bank].reshape(-1, len(context))[rows].T              # (n, m)
        context += value & 1
        k = value >> 1
        radius = radii[context]
        outside = np.abs(k) > radius
        escapes.append(k[outside])
        symbol = np.where(outside, 2 * radius + 1, k + radius)
        shares = freq[context, symbol]
        ideal[bank] += (BITS - np.log2(shares)).sum() / 8
        lane = lanes[:len(rows)]
        for share, start in zip(shares[::-1], begin[context, symbol][::-1]):
            full = lane >= share << 32 - BITS
            words.append(lane[full].astype(np.uint16))
            lane[full] >>= 16
            lane[:] = (lane // share << BITS) + lane % share + start
    words.append(lanes.view(np.uint16))
    return np.concatenate(words[::-1]), np.concatenate(escapes[::-1]), np.rint(ideal).astype(int)


def decode(words, escapes, sigmas):
    """Inverse of encode() -> values. ValueError on a code that is not one."""
    radii, freq, begin, symbols = tables()
    lanes, words = np.split(words, [2 * count_lanes(sigmas)])
    lanes = lanes.copy().view(np.uint32)
    values = [np.empty(np.broadcast_shapes(row.shape, col.shape), np.int32) for row, col in sigmas]
    for bank, rows, value in pieces(sigmas):
        state = np.zeros(len(rows), np.int32)
        lane = lanes[:len(rows)]
        for context in value:                               # each makes room for the column's values
            half = state & 1
            context += half
            slot = lane & (1 << BITS) - 1
            symbol = symbols[(context << BITS) + slot]
            radius = radii[context]
            k = symbol - radius
            where = context * freq.shape[1] + symbol
            lane[:] = freq.take(where) * (lane >> BITS) + slot - begin.take(where)
            low = (lane < 1 << 16).nonzero()[0]
            lane[low] = lane[low] << 16 | words[:len(low)]
            words = words[len(low):]
            outside = (k > radius).nonzero()[0]
            k[outside] = escapes[:len(outside)]
            escapes = escapes[len(outside):]
            context[:] = 2 * k + half
            state = TRELLIS[state, k & 1]
        values[bank].reshape(-1, len(value))[rows] = value.T
    # Where words or escapes were missing, numpy has refused to fill the places, or this does.
    left = len(words) + len(escapes) + np.count_nonzero(lanes != 1 << 16)
    need(not left, "the code does not end where it should")
    return values


def exponent(x, times=4, limit=127):
    """x -> n int8, within the limit: x ~= 2^(n / times)."""
    n = np.round(times * np.log2(np.maximum(x, 1e-10)))
    return np.clip(n, -limit, limit).astype(np.int8)


def scales(values):
    """values (L, R, n) in half steps
    -> row (L, R, 1), col (L, 1, n), int8: sigma ~ 2^((row + col) / 4) steps."""
    steps = values.astype(np.float32) / 2
    col = exponent((steps * steps).mean(1, keepdims=True), 2, 60)
    steps *= np.exp2(-col / 4, dtype=np.float32)
    return exponent((steps * steps).mean(2, keepdims=True), 2, 60), col


# --------------------------------------------------------------------------------------------------
# Quantiser. The numbers are KL measured on training text: proxy preset after 25 minutes on a CPU,
# 3.4 bits a weight.

ROW_EXPONENT = 0.45     # rows' steps ~ g^-0.45; 0.5 is the theory: 4 % more KL, 0.35: 9 % more
G_LEAST = 1e-3          # g of a row, relative to its matrix, is held between this
G_MOST = 20.0           # and this
DAMP = 0.05             # of the mean of H's diagonal, added; 0.01: 10 % more KL, 0.1: 2 % more
BEST_KL = 1e-4          # nats per token: below it finer steps buy nothing
ROWS_AT_ONCE = 1024     # rows of a matrix that one thread rounds at a time
BLOCK = 128             # columns that are decided at a time
LOOKAHEAD = 16          # columns behind them that the decision looks at


class Bank(NamedTuple):
    """Matrices W of one role and what is known of them. Steps are constant * 2^((row + col) / 4)."""
    W: Tensor               # (L, R, n) float32
    H: Tensor               # (L, n, n) float32, per token
    g: Tensor               # (L, R, 1) float32, per token
    row: np.ndarray         # (L, R, 1) int8
    col: np.ndarray         # (L, 1, n) int8
    feedback: Tensor        # (L, n, n) float32, upper: an error of a step in column i, in steps of j
    cost: Tensor            # (L, n) float32: of a squared error of a step, after later columns' help
    price: float            # 24 times the KL in nats per token, where constant is 1 and errors spread evenly


def quarter(exponent):
    """exponent, array of int8 -> 2^(exponent / 4) float64, by operations that are exact everywhere."""
    exponent = exponent.astype(np.int64)
    fraction = np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])
    return torch.from_numpy(np.ldexp(fraction[exponent & 3], exponent >> 2))


def dequantise(values, row, col, constant):
    """values (L, R, n) int32 in half steps, exponents row (L, R, 1), col (L, 1, n) int8
    -> W float32, the same bits everywhere."""
    row_step = (constant / 2 * quarter(row)).float()
    return torch.from_numpy(values).float() * row_step * quarter(col).float()


def plan(W, H, g):
    """Choose the exponents of the steps -> Bank. W (L, R, n), H (L, n, n) and g (L, R, 1) per token.

    With H^-1 = U^T U, GPTQ's error costs exactly 1/2 sum_ij g_i (step_ij / U_jj)^2 e_ij^2, e in
    steps, and a weight's rate falls by log2 step. So all weights pay alike where step_ij = constant
    * g_i^-1/2 U_jj: reverse water-filling, in which a direction that is not worth a step rounds to
    zero by itself.
    """
    eye = torch.eye(W.size(2), dtype=torch.float64, device=W.device)
    level = H.diagonal(dim1=1, dim2=2).double().mean(1)[:, None, None]
    damped = H.double() + eye * torch.where(level > 0, DAMP * level, 1.0)
    # U is the inverse of H's upper Cholesky factor: flip, factorise, flip back.
    factor = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)
    U = torch.linalg.solve_triangular(factor, eye, upper=True)
    diagonal = U.diagonal(dim1=1, dim2=2)[:, None]
    mean = g.double().mean(1, True).clamp(min=1e-12)
    relative = (g.double() / mean).clamp(G_LEAST, G_MOST)
    share = relative ** -ROW_EXPONENT                       # scaled so that the mean of g share^2 is 1
    share *= ((relative * share.square()).mean(1, True) * mean) ** -0.5
    row = exponent(share.cpu().numpy())
    col = exponent(diagonal.cpu().numpy())
    step = quarter(col).to(W.device)
    weight = step / diagonal
    feedback = (U * weight.mT / step).float()
    cost = weight[:, 0].square().float()
    rows = g.double() * quarter(row).square().to(W.device)
    price = (cost.double().sum(1) * rows.sum((1, 2))).sum().item()
    return Bank(W, H, g, row, col, feedback, cost, price)


def expected_kl(bank, packed):
    """The bank's weights as packed -> KL(full precision || packed) in nats per token:
    1/2 sum_i g_i e_i H e_i^T."""
    E = bank.W - packed.to(bank.W.device)
    return 0.5 * ((E @ bank.H * E).sum(2, True).double() * bank.g.double()).sum().item()


def quantise(bank, layer, top, constant):
    """Rows of a matrix, from top -> values (R, n) int32 in half steps.

    GPTQ in blocks of columns, each of which is a path through the trellis.
    """
    rows = slice(top, top + ROWS_AT_ONCE)
    feedback, cost = bank.feedback[layer], bank.cost[layer]
    row = 1 / (constant * quarter(bank.row[layer, rows])).to(cost.device)
    col = 1 / quarter(bank.col[layer]).to(cost.device)
    X = (bank.W[layer, rows] * row * col).T.float()         # (n, R), in steps
    X = X.clamp(-2 ** 29, 2 ** 29).contiguous()
    values = torch.empty_like(X, dtype=torch.int32)
    before = torch.from_numpy(np.argsort(TRELLIS, 0)).to(X.device)      # (states, parity) -> state
    state = torch.zeros_like(X[0], dtype=torch.int64)
    for first in range(0, len(X), BLOCK):
        block = slice(first, first + BLOCK)
        seen = slice(first, first + BLOCK + LOOKAHEAD)
        later = slice(first + BLOCK, None)
        paths = survivors(X[seen], feedback[seen, seen], cost[seen], state, before)
        values[block], errors, states = (x[:BLOCK] for x in trace_back(*paths))
        X[later] -= feedback[block, later].T @ errors
        state = states[-1]
    return values.T.cpu().numpy()


def survivors(X, feedback, cost, state, before):
    """Viterbi over the columns X (n, R) in steps, from state (R,), where each state keeps its own
    residual: its survivor's errors are fed forward, as GPTQ does
    -> for each column what is known of the survivor that enters a state after it, all (states, R):
    the state that it comes from, its k, its error in steps; metric (states, R): what the survivors
    cost."""
    even_before, odd_before = before.T
    states = torch.arange(len(before), device=X.device)[:, None]
    half = (states & 1) / 2
    metric = torch.where(states == state, 0.0, torch.inf)
    left = X[:, None].repeat(1, len(before), 1)             # of the columns from j on, by each survivor
    columns = []
    for j in range(len(X)):
        y = left[0] - half
        even = y - 2 * (y / 2).round()                      # errors of the nearest even and odd k
        odd = even - torch.ones_like(even).copysign(even)
        even_metric = (metric + cost[j] * even.square())[even_before]
        odd_metric = (metric + cost[j] * odd.square())[odd_before]
        is_odd = odd_metric < even_metric
        metric = torch.minimum(odd_metric, even_metric)
        origin = torch.where(is_odd, odd_before[:, None], even_before[:, None])
        error = torch.where(is_odd, odd[odd_before], even[even_before])
        columns.append((origin, y.gather(0, origin) - error, error))
        left = left[1:].gather(1, origin.expand(len(left) - 1, -1, -1))
        left.addcmul_(feedback[j, j + 1:, None, None], error, value=-1)
    return columns, metric


def trace_back(columns, metric):
    """What survivors() found, from the cheapest end
    -> values int32 in half steps, their errors in steps, states after each column: all (n, R)."""
    state = metric.argmin(0, True)
    path = []
    for origin, k, error in reversed(columns):
        before = origin.gather(0, state)
        value = 2 * k.gather(0, state).int() + (before & 1)
        path.append((value, error.gather(0, state), state))
        state = before
    return [torch.cat(rows[::-1]) for rows in zip(*path)]


# --------------------------------------------------------------------------------------------------
# Model <-> model.bin: the size of the header, 4 bytes; the header, JSON; the words of encode(); the
# sections of the table below, each an array of integers a tensor.

MATRICES = (*GPT.MATRICES, "embed.weight")      # what is quantised; all others are small vectors
SMALL_STEP = 1 / 64     # steps of small vectors, of their spread; KL 6e-6, with 1/32 3e-5
MAX_WEIGHTS = 1 << 27   # of a model
MAX_BLOCKS = 64         # applications of its blocks to a token
MAX_ROW = 1 << 29       # bytes of the activations of a row of tokens


def need(fact, otherwise):
    """ValueError(otherwise) unless fact."""
    if not fact:
        raise ValueError(otherwise)


def split(state):
    """A model's tensors -> matrices {name: (L, R, n)}, a bank each; small vectors {name: (V, m)}."""
    matrices = {name: state[name].view(-1, *state[name].shape[-2:]) for name in MATRICES}
    vectors = {name: x.view(-1, x.shape[-1]) for name, x in state.items() if name not in matrices}
    return matrices, vectors


def table(matrices, vectors, n_escapes):
    """Tensors from split() -> of each section its name, the type and the shapes of its arrays."""
    rows = [W[:, :, :1].shape for W in matrices.values()]
    columns = [W[:, :1].shape for W in matrices.values()]
    heads = [x[:, :1].shape for x in vectors.values()]
    return [
        ("steps of rows", "i1", rows),
        ("steps of columns", "i1", columns),
        ("spreads of rows", "i1", rows),        # of the weights: sigma times the step, which is
        ("spreads of columns", "i1", columns),  # more even than sigma: a fifth fewer bytes
        ("escapes", "i4", [(n_escapes,)]),
        ("small vectors: steps", "i1", heads),
        ("small vectors: means", "i2", heads),
        ("small vectors: rest", "i2", [x.shape for x in vectors.values()]),
    ]


def encode_small(vectors):
    """(V, m) -> integers step (V, 1), mean (V, 1), rest (V, m): (mean + rest) 2^(step / 4)."""
    vectors = vectors.double().numpy()
    mean = vectors.mean(1, keepdims=True)
    spread = np.maximum(vectors.std(1, keepdims=True), np.abs(mean) / 64)
    step = exponent(spread * SMALL_STEP)
    size = quarter(step).numpy()
    mean = np.round(mean / size)
    return step, mean, np.round(vectors / size - mean)


def quantise_all(banks, constant):
    """-> values (L, R, n) int32 in half steps of each bank."""
    values = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                    # matrices side by side: kernels are small
    with (Progress("rounding", sum(bank.W.numel() for bank in banks), "weights") as progress,
          ThreadPoolExecutor(threads if banks[0].W.is_cpu else 1) as pool):
        for bank in banks:
            tops = range(0, bank.W.size(1), ROWS_AT_ONCE)
            chunks = product([bank], range(len(bank.W)), tops, [constant])
            rows = np.concatenate([*pool.map(quantise, *zip(*chunks))])
            values.append(rows.reshape(bank.W.shape))
            progress.add(rows.size)
    torch.set_num_threads(threads)
    return values


def pack_model(checkpoint, banks, constant):
    """Quantise and code a model with one constant for all steps; banks as plan_banks() makes them
    -> {section: bytes} of model.bin, bytes of each bank by the coder's probabilities."""
    values = quantise_all(banks, constant)
    sigmas = [scales(value) for value in values]
    words, escapes, ideal = encode(values, sigmas)
    steps = [(bank.row, bank.col) for bank in banks]
    spreads = [map(np.add, *pair) for pair in zip(steps, sigmas)]
    matrices, vectors = split(checkpoint["weights"])
    small = zip(*map(encode_small, vectors.values()))
    sides = [*zip(*steps), *zip(*spreads), [escapes], *small]
    sections = {"weights": words.tobytes()}
    for (name, dtype, _), arrays in zip(table(matrices, vectors, len(escapes)), sides):
        flat = np.concatenate([x.ravel() for x in arrays]).astype(dtype)
        planes = flat[:, None].view(np.uint8).T             # the low bytes, then the high ones
        sections[name] = zstandard.ZstdCompressor(level=19).compress(planes.tobytes())
    header = {"config": vars(checkpoint["config"]), "constant": constant, "escapes": len(escapes),
              "sections": [*map(len, sections.values())]}
    header = json.dumps(header, separators=(",", ":")).encode()
    return {"header": len(header).to_bytes(4, "little") + header, **sections}, ideal


def check_limits(cfg):
    """ValueError for a config that asks for more than a model under the cap can use."""
    visits = len(block_order(cfg, True))
    need(visits <= MAX_BLOCKS, f"{visits} block applications: at most {MAX_BLOCKS} can be packed")
    row = max(cfg.seq_len * visits * cfg.n_embd, cfg.row_tokens * cfg.n_embd, 8192 * cfg.mlp_dim)
    need(4 * row <= MAX_ROW, f"a row of tokens takes {4 * row:,} bytes: at most {MAX_ROW:,}")


def unpack_model(blob):
    """model.bin -> GPT. Every size is checked before it is used; bad bytes raise many errors."""
    file = io.BytesIO(blob)
    size = int.from_bytes(file.read(4), "little")
    need(size < 1 << 16, "its header is too long")
    header = json.loads(file.read(size))
    n_escapes = header["escapes"]
    cfg = Config(**header["config"])
    check_limits(cfg)
    with torch.device("meta"):
        model = GPT(cfg).eval().requires_grad_(False)
    state = model.state_dict()
    n_weights = sum(x.numel() for x in state.values())
    need(n_weights <= MAX_WEIGHTS, f"its config asks for more than {MAX_WEIGHTS:,} weights")
    need(n_escapes <= n_weights, "it has more escapes than weights")
    matrices, vectors = split(state)
    words, *frames = map(file.read, header["sections"])
    sides = []
    for (name, dtype, shapes), frame in zip(table(matrices, vectors, n_escapes), frames):
        bounds = np.cumsum([math.prod(shape) for shape in shapes])
        itemsize = np.dtype(dtype).itemsize
        size = zstandard.get_frame_parameters(frame).content_size
        need(size == itemsize * bounds[-1], f"its {name} are not as many as the config says")
        planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
        flat = planes.reshape(itemsize, -1).T.copy().view(dtype)
        sides.append([x.reshape(shape) for x, shape in zip(np.split(flat, bounds), shapes)])
    rows, cols, row_spreads, col_spreads, (escapes,), *small = sides
    sigmas = map(np.subtract, row_spreads, rows), map(np.subtract, col_spreads, cols)
    values = decode(np.frombuffer(words, np.uint16), escapes, list(zip(*sigmas)))
    for name, value, row, col in zip(matrices, values, rows, cols):
        state[name] = dequantise(value, row, col, header["constant"]).view(state[name].shape)
    for name, step, mean, rest in zip(vectors, *small):
        vector = torch.from_numpy(np.add(mean, rest, dtype=np.float32)) * quarter(step).float()
        state[name] = vector.view(state[name].shape)
    need(all(x.isfinite().all() for x in state.values()), "its weights are not finite")
    model.load_state_dict(state, assign=True)
    return model


def digest(state):
    """sha256 of all weights: equal for two models of one config only if all their bits are."""
    return sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


# --------------------------------------------------------------------------------------------------
# The artifact: a zip that Python runs, whose archive comment is the sha256 of every byte before it.

SOURCES = ("train_gpt.py", "pack.py", "eval_bpb.py",    # of an artifact: all that scores it
           "data/__init__.py", "data/dataset.py", "data/tokenizer.py")
MAIN = b"""import sys, eval_bpb
from data.dataset import command
sys.exit(command(lambda: eval_bpb.main(sys.argv)))
"""
NAMES = ["__main__.py", *SOURCES, "tokenizer.json", "model.bin"]
MAX_FILE = 1 << 28      # bytes of an artifact, and of all that is in it: more is refused unread


def build_artifact(files, model):
    """files {name: bytes} compressed, model.bin stored -> a zip, the same bytes at any time."""
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", compresslevel=9) as archive:
        for name, data in {**files, "model.bin": model}.items():
            info = ZipInfo(name)                            # of 1980
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, data, ZIP_STORED if name == "model.bin" else ZIP_DEFLATED)
        archive.comment = bytes(32)
    data = buffer.getvalue()[:-32]
    return data + sha256(data).digest()


def read_archive(path):
    """artifact.pyz -> its bytes, {name: bytes} of the files in it, as they went into
    build_artifact(). ValueError, or an error of zipfile's, unless those are the known ones and no
    more."""
    need(Path(path).stat().st_size <= MAX_FILE, "it is too large")
    data = Path(path).read_bytes()
    need(sha256(data[:-32]).digest() == data[-32:], "it is damaged, cut short or no artifact (checksum)")
    with ZipFile(io.BytesIO(data)) as archive:
        parts = archive.infolist()
        names = sorted(part.filename for part in parts)
        need(names == sorted(NAMES), "it has other files than an artifact, or one of them twice")
        kinds = {part.compress_type for part in parts}
        need(kinds == {ZIP_STORED, ZIP_DEFLATED}, "it is compressed in another way")
        need(sum(part.file_size for part in parts) <= MAX_FILE, "its files are too large")
        return data, {part.filename: archive.open(part).read(part.file_size) for part in parts}


def load(path):
    """artifact.pyz -> (GPT in eval mode on the CPU in float32, Tokenizer); the same bits in every
    process.

    BadInput for any file that pack.py did not write whole. One that was made to harm can at most ask
    for what the limits above allow: nothing in it is executed, every length is checked before use.
    """
    try:
        _, files = read_archive(path)
        tokenizer = Tokenizer(files["tokenizer.json"])
        model = unpack_model(files["model.bin"])
        need(tokenizer.vocab_size == model.cfg.vocab_size, "its tokenizer does not fit its model")
        return model, tokenizer
    except Exception as e:  # zip, zstd, JSON and torch each have errors of their own for bad bytes
        raise BadInput(f"{path}: not an artifact that this pack.py can read: {e!r:.300}") from None


def verify(path, wanted):
    """RuntimeError unless the artifact, loaded by its own code in another process, has that digest."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import pack\n"
            "print(pack.digest(pack.load(sys.argv[1])[0].state_dict()))")
    child = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    if child.stdout.split()[-1:] != [wanted]:
        raise RuntimeError(f"the artifact does not load as it was packed: {child.stderr[-2000:] or child.stdout}")


# --------------------------------------------------------------------------------------------------
# Runs

LIVE = "9"              # when a run ends that is still in training: after all others


def lifetime(run):
    """-> when a run ended and when it began, ISO in UTC, by its metrics.jsonl. The end is LIVE for one
    in training, which the trainer's lock tells, and "" for one that was killed."""
    end = begin = ""
    # Suppressed: no file, half a line, a lock that is held.
    with suppress(Exception), open(run / "metrics.jsonl", "rb") as file:
        lines = file.read().splitlines()
        begin = json.loads(lines[0])["time"]
        last = json.loads(lines[-1])
        if last["kind"] == "end":
            return str(last["time"]), begin
        import fcntl                                        # not on Windows
        end = LIVE
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        end = ""
    return end, begin


def find_run(name=""):
    """A run's folder, its name in runs/, or "" for the newest that has ended -> its folder.

    BadInput where there is none, or another was in training beside the newest: either may be meant.
    """
    for folder in (Path(name), Path("runs") / name):
        if name and folder.is_dir():
            return folder
    runs = sorted((*lifetime(run), run) for run in Path("runs").glob("*/"))
    ended = [run for run in runs if "" < run[0] < LIVE]
    if name or not ended:
        raise BadInput(f"{name or 'runs/'}: no such run; train one first, python train_gpt.py")
    end, begin, newest = ended[-1]
    for other_end, other_begin, other in runs:
        if other != newest and other_end > begin and other_begin < end:
            raise BadInput(f"{newest} and {other} were in training at the same time: name one")
    return newest


# --------------------------------------------------------------------------------------------------
# Packing a run


def plan_banks(checkpoint, device="cpu"):
    """Checkpoint -> its banks, planned. ValueError names what is not finite; KeyError, RuntimeError where
    the statistics do not fit the weights.

    A looped layer makes the same error in each pass, so H and g, both sums over the passes, are not
    divided by their number: the KL measured for such layers is 2 to 4 times that of passes that err
    independently. Without statistics H and g make expected_kl() the mean squared error, relative to
    the mean square of the weight's row.
    """
    weights, stats = checkpoint["weights"], checkpoint["stats"]
    for name, x in (weights | stats).items():
        need(isinstance(x, Tensor) and x.isfinite().all(), f"{name} is not a tensor of finite numbers")
    stats = {name: x / stats["tokens"] for name, x in stats.items()}
    matrices, _ = split(weights)
    n_weights = sum(W.numel() for W in matrices.values())
    banks = []
    for name, W in matrices.items():
        L, R, n = W.shape
        key = name.removesuffix(".weight")
        if stats:
            H = stats[f"{key}.H"].view(L, n, n)
            g = stats[f"{key}.g"].view(L, R, 1)
        else:
            H = torch.eye(n).expand(L, n, n)
            g = 2 / n_weights / W.square().mean(2, True).clamp(min=1e-12)
        if f"{key}.S" in stats:                             # tokens are inputs as often as targets
            H = H + stats[f"{key}.S"] / g.sum().clamp(min=1e-12)
        banks.append(plan(W.to(device), H.to(device), g.to(device)))
    return banks


def search(checkpoint, banks, files, cap):
    """-> what pack_model() gives and the artifact: within 0.05 % below cap, or with the finest steps."""
    price = sum(bank.price for bank in banks)
    finest = math.sqrt(24 * BEST_KL / max(price, 1e-30))
    slope = sum(bank.W.numel() for bank in banks) / 8       # bytes an octave of the steps
    octave = low = 0.0                                      # the cap is met between low
    high = math.inf                                         # and high
    best = last = None
    data = build_artifact(files, b"")
    for _ in range(15 if len(data) < cap else 0):
        packed = pack_model(checkpoint, banks, finest * 2 ** octave)
        data = build_artifact(files, b"".join(packed[0].values()))
        excess = len(data) - cap
        if excess <= 0:
            best, high = (*packed, data), octave
        else:
            low = octave
        if high == 0 or -0.0005 * cap <= excess <= 0:
            break
        if last:
            slope = (last[1] - excess) / (octave - last[0])
        last = octave, excess
        octave += min((excess + 0.00025 * cap) / max(slope, 1.0), 4.0)
        if not low < octave < high:
            octave = (low + high) / 2
    if best is None:
        raise BadInput(f"--cap_bytes={cap}: this model does not fit; the last file tried has {len(data):,} bytes")
    return best


def ledger(banks, state, sections, ideal, data, measure):
    """Where the artifact's bytes went, and what each bank of weights costs of `measure`: a table."""
    rows = [f"{'weights':>38}{'bits each':>11}{'cost':>9}{'bytes':>14}"]
    costs = [expected_kl(bank, state[name]) for name, bank in zip(MATRICES, banks)]
    cost = sum(costs)
    for name, bank, share, size in zip(MATRICES, banks, np.divide(costs, max(cost, 1e-30)), ideal):
        n = bank.W.numel()
        rows.append(f"{name:<26}{n:>12,}{8 * size / n:>11.3f}{share:>9.1%}{size:>14,}")
    with ZipFile(io.BytesIO(data)) as archive:
        sizes = {part.filename: part.compress_size for part in archive.infolist()}
    del sizes["model.bin"]
    sizes |= {name: len(section) for name, section in sections.items()}
    sizes["weights"] -= sum(ideal)                          # rounding and the lanes' start-up
    sizes["zip directory, checksum"] = len(data) - sum(ideal) - sum(sizes.values())
    rows += [f"{name:<26}{size:>46,}" for name, size in sizes.items()]
    return "\n".join([*rows, f"{'artifact.pyz':<26}{len(data):>46,}", f"{measure}: {cost:.5f}"])


def sources(run):
    """The artifact's code {name: bytes}: the train_gpt.py of the run, the rest from beside this file."""
    files = {name: (Path(__file__).parent / name).read_bytes() for name in SOURCES}
    path = run / "source" / "train_gpt.py"
    if path.is_file() and path.read_bytes() != files["train_gpt.py"]:
        print(f"note: train_gpt.py is not the one beside this pack.py; the artifact gets {path}")
        files["train_gpt.py"] = path.read_bytes()
    return {"__main__.py": MAIN, **files}


def main(argv=None):
    parser = Parser(prog="pack.py", description=__doc__)
    parser.add_argument("run", nargs="?", default="", metavar="RUN",
                        help="folder, or name in runs/; empty: the newest that has ended")
    parser.add_flags({"cap_bytes": (16_000_000, "bytes of the file, at most")})
    args = parser.parse_args(argv)
    run, cap = find_run(args.run), args.cap_bytes
    path = run / "checkpoint.pt"
    try:
        checkpoint = load_checkpoint(path)
        check_limits(checkpoint["config"])
        banks = plan_banks(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, KeyError, RuntimeError) as e:
        raise BadInput(f"{path}: {str(e).removeprefix(f'{path} ')}") from None
    if not "" < lifetime(run)[0] < LIVE:
        print(f"{run} has not ended: packed as of step {checkpoint['run']['steps']}")
    tokenizer = checkpoint["tokenizer"].encode()
    if not tokenizer:
        raise BadInput(f"{path}: trained on synthetic tokens: no tokenizer, nothing to score")
    Tokenizer(tokenizer)    # BadInput for one of another format
    measure = ("expected KL(full precision || packed), nats per token, "
               "by the checkpoint's statistics")
    if not checkpoint["stats"]:
        measure = "mean squared error of a weight, relative to the mean square of its row"
        print(f"{path} has NO STATISTICS (train with --calib_tokens above 0): "
              "at the same bytes it will lose more")
    files = {**sources(run), "tokenizer.json": tokenizer}
    sections, ideal, data = search(checkpoint, banks, files, cap)
    state = unpack_model(b"".join(sections.values())).state_dict()
    with atomic_write(run / "artifact.pyz") as f:
        f.write(data)
        f.flush()
        verify(f.name, digest(state))                       # before it replaces the one that is there
    text = f"{ledger(banks, state, sections, ideal, data, measure)}\n{len(data) / cap:.2%} of the cap"
    if len(data) < 0.9995 * cap:
        text += ": the best quality setting; finer steps buy nothing"
    with atomic_write(run / "pack.txt", "w") as f:
        f.write(text + "\n")
    print(f"{text}\n---\nartifact_bytes: {len(data)}\nartifact: {run / 'artifact.pyz'}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
