"""Pack a trained model into one file: runs/<run>/checkpoint.pt -> runs/<run>/artifact.pyz, at most --cap_bytes on disk.

    python pack.py [RUN]        the newest run, or this one; ends just below the cap, or where finer steps buy nothing

How. (1) Steps: for y = W x with H = E[x x^T] and g_i = E[(dL/dy_i)^2], an error e of W raises the loss by about
1/2 sum_i g_i e_i H e_i^T; steps are such that every weight pays the same share of it. (2) Rounding: GPTQ's error
feedback (arXiv 2210.17323) inside a trellis (Ungerboeck's code, as the dependent quantisation of ISO/IEC 15938-17).
(3) Coding: interleaved rANS (arXiv 1311.2540) with probabilities that follow from scales, so that no tables are sent.
(4) One constant, found by search, sets the size. All of it comes from the checkpoint: packing reads no data.
"""
import hashlib
import io
import json
import math
import os
import struct
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import numpy as np
import torch
import zstandard
from torch import Tensor

from data.dataset import BadInput, Parser, Progress, atomic_write, command, find_run
from data.tokenizer import Tokenizer
from train_gpt import GPT, Config, load_checkpoint

ROOT = Path(__file__).resolve().parent
SOURCES = ("train_gpt.py", "pack.py", "eval_bpb.py", "data/__init__.py", "data/dataset.py",
           "data/tokenizer.py")       # of the artifact
MAIN = """import sys, eval_bpb
from data.dataset import command
sys.exit(command(lambda: eval_bpb.main(sys.argv)))
"""
MAX_FILE, MAX_WEIGHTS = 1 << 28, 1 << 27    # bytes of a file, weights of a model: more is refused unread

# ----------------------------------------------------------------------------------------------------------------------
# Entropy coder. A value is k + half / 2 steps, kept as the integer 2 k + half; half is the lowest bit of the state of a
# trellis, and the parity of k leads to the next state. Encoder and decoder agree bit for bit on every machine.

BITS = 14                                   # probabilities are multiples of 2^-14
LOW, HIGH = -24, 24                         # contexts: sigma = 2^(index / 4) steps, from 1/64 to 64 steps
GRID, UNIT = 16, 1 << 20                    # points of a density a step; densities are multiples of 1 / UNIT
NORMAL, LAPLACE = 1024, 96                  # densities at 0, one to the other: 95 % of N(0, sigma), 5 % of Laplace's
# The states after an even and an odd k: Ungerboeck's code (13, 4). 32 states take four times as long for no less KL.
TRELLIS = np.array([(0, 2), (5, 7), (1, 3), (4, 6), (2, 0), (7, 5), (3, 1), (6, 4)], np.int32)


@lru_cache
def tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """-> radius (contexts,) int32, freq and start (contexts, symbols) uint32, symbol (contexts << BITS,) uint16.

    Context 2 * (index - LOW) + half. Its symbols are k + radius for |k| <= radius, and last the escape. freq and their
    running sum start are in units of 2^-BITS, and symbol is the inverse of start.
    p(k) ~ 0.95 N(0, sigma) + 0.05 Laplace of the same variance, integrated over the step at eight points.
    """
    radii, rows = [], []
    for index in range(LOW, HIGH + 1):
        # Densities at each point of the grid by products: those are rounded alike everywhere, exp is not.
        radius, sigma = int(6 * 2 ** (index / 4)) + 2, GRID * Decimal(2).sqrt().sqrt() ** index
        normal, laplace = (np.full(GRID * (radius + 1), float(x.exp()))
                           for x in (-1 / sigma ** 2, -Decimal(2).sqrt() / sigma))
        normal[0] = float((-1 / sigma ** 2 / 2).exp())
        density = NORMAL * np.cumprod(np.cumprod(normal)) + LAPLACE * np.cumprod(laplace)
        density = (np.append(NORMAL + LAPLACE, density) * UNIT).astype(np.int64)
        k = np.arange(-radius, radius + 1)
        for half in (0, 1):
            points = GRID // 2 * (2 * k + half)[:, None] + np.arange(-7, 8, 2)
            running = np.cumsum(density[np.abs(points)].sum(1))
            share = ((1 << BITS) - len(k) - 1) * running // running[-1]    # beyond one for each symbol and the escape
            radii.append(radius)
            rows.append(np.append(1 + np.diff(share, prepend=0), 1))
    freq = np.array([np.pad(row, (0, max(map(len, rows)) - len(row))) for row in rows])
    start = np.cumsum(freq, 1) - freq
    symbol = np.concatenate([np.repeat(np.arange(row.size), row) for row in freq])
    return np.array(radii, np.int32), freq.astype(np.uint32), start.astype(np.uint32), symbol.astype(np.uint16)


def count_lanes(shapes: list[tuple[int, int, int]]) -> int:
    """Shapes (L, R, n) of the banks -> rows that are coded side by side; each costs 4 bytes to start."""
    return 1 << min(max((sum(map(math.prod, shapes)) >> 13).bit_length(), 4), 11)


def pieces(shapes: list[tuple[int, int, int]]):
    """Yields (bank, rows of its L * R rows as a slice, their layers) of what is coded together, column by column."""
    lanes = count_lanes(shapes)
    for bank, (L, R, n) in enumerate(shapes):
        for start in range(0, L * R, lanes):
            rows = slice(start, min(start + lanes, L * R))
            yield bank, rows, np.arange(rows.start, rows.stop) // R


def contexts(row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Exponents row (rows,), col (rows, n) of sigma -> contexts (n, rows) int32, for half = 0."""
    return 2 * (np.clip(row.astype(np.int32) + col.T, LOW, HIGH) - LOW)


def encode(values: list, rows: list, cols: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values[i] (L, R, n) int32 in half steps, exponents rows[i] (L * R,) and cols[i] (L, n) of their sigma
    -> words (uint16) that decode() reads, escapes (int32), histogram (banks, contexts, symbols) int64.

    Each lane has a rANS state of 32 bits, all share one stream of words: a step codes one column of a piece. Works
    backwards, so that decoding goes forwards.
    """
    (radii, freq, begin, _), shapes = tables(), [v.shape for v in values]
    coder, words, escapes = np.full(count_lanes(shapes), 1 << 16, np.uint32), [], []
    histogram = np.zeros((len(values), freq.size), np.int64)
    for bank, piece, layer in reversed(list(pieces(shapes))):
        value = values[bank].reshape(-1, shapes[bank][2])[piece].T         # (n, rows)
        context = contexts(rows[bank][piece], cols[bank][layer]) + (value & 1)
        k, radius = value >> 1, radii[context]
        outside = np.abs(k) > radius
        escapes.append(k[outside])
        symbol = np.where(outside, 2 * radius + 1, k + radius) + context * freq.shape[1]
        histogram[bank] += np.bincount(symbol.ravel(), minlength=freq.size)
        head = coder[:len(layer)]
        for share, start in zip(freq.ravel()[symbol][::-1], begin.ravel()[symbol][::-1]):
            full = head >= share << 32 - BITS
            words.append(head[full].astype(np.uint16))
            head[full] >>= 16
            head[:] = (head // share << BITS) + head % share + start
    words.append(coder.view(np.uint16))
    escapes = np.concatenate([np.empty(0, np.int32), *escapes[::-1]])
    return np.concatenate(words[::-1]), escapes, histogram.reshape(-1, *freq.shape)


def decode(words: np.ndarray, escapes: np.ndarray, shapes, rows, cols, trellis=TRELLIS):
    """Inverse of encode(): yields (bank, rows, layers, values (n, rows) int32) by pieces. ValueError on a bad code."""
    (radii, freq, begin, symbols), at, escape = tables(), 2 * count_lanes(shapes), 0
    coder, width, freq, begin = words[:at].copy().view(np.uint32), freq.shape[1], freq.ravel(), begin.ravel()
    for bank, piece, layer in pieces(shapes):
        base = contexts(rows[bank][piece], cols[bank][layer])
        values, state, head = np.empty_like(base), np.zeros(len(layer), np.int32), coder[:len(layer)]
        for j, context in enumerate(base):
            half = state & 1
            context += half
            slot = head & (1 << BITS) - 1
            symbol = symbols[(context << BITS) + slot]
            radius = radii[context]
            k = symbol - radius
            where = context * width + symbol
            head[:] = freq[where] * (head >> BITS) + slot - begin[where]
            low = (head < 1 << 16).nonzero()[0]
            head[low] = head[low] << 16 | words[at:at + len(low)]
            at += len(low)
            outside = k > radius
            if outside.any():
                number = np.count_nonzero(outside)
                k[outside] = escapes[escape:escape + number]
                escape += number
            values[j] = 2 * k + half
            state = trellis[state, k & 1]
        yield bank, piece, layer, values
    # Where words or escapes were missing, numpy has refused to fill the places, or this does.
    if at != len(words) or escape != len(escapes) or (coder != 1 << 16).any():
        raise ValueError("the code does not end where it should")


def scales(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values (L, R, n) in half steps -> row (L * R,), col (L, n) int8, exponents: sigma ~ 2^((row + col) / 4) steps."""
    def exponent(square):
        return np.clip(np.round(2 * np.log2(np.maximum(square, 1e-9))), -60, 60)
    steps = values.astype(np.float32) / 2
    col = exponent((steps * steps).mean(1))
    steps *= np.exp2(-col / 4, dtype=np.float32)[:, None]
    return exponent((steps * steps).mean(2)).reshape(-1).astype(np.int8), col.astype(np.int8)


# ----------------------------------------------------------------------------------------------------------------------
# Quantiser. The numbers are KL measured on training text: proxy preset after 25 minutes on a CPU, 3.4 bits a weight.

ROW_EXPONENT = 0.45                         # rows' steps ~ g^-0.45; 0.5 is the theory: 4 % more KL, 0.35: 9 % more
G_RANGE = 1e-3, 20.0                        # g of a row, relative to its matrix, is held in this range
DAMP = 0.05                                 # of the mean of H's diagonal, added; 0.01: 10 % more KL, 0.1: 2 % more
BEST_KL = 1e-4                              # nats per token: below it finer steps buy nothing
ROWS_AT_ONCE, BLOCK, LOOKAHEAD = 1024, 128, 16      # rows, columns in the trellis at a time; columns until it decides


@dataclass
class Bank:
    """Matrices W of one role and what is known about them. Their steps are constant * 2^((row_i + col_j) / 4)."""
    W: Tensor               # (L, R, n) float32
    H: Tensor               # (L, n, n) float32, per token
    g: Tensor               # (L, R) float32, per token
    row: np.ndarray         # (L, R) int8
    col: np.ndarray         # (L, n) int8
    feedback: Tensor        # (L, n, n) float32, upper triangle: an error of one step in column i, in steps of column j
    cost: Tensor            # (L, n) float32: of a squared error of one step, after what later columns make up for


def quarter(exponent: np.ndarray) -> np.ndarray:
    """2^(exponent / 4) float64, by operations that are exact everywhere."""
    exponent = np.asarray(exponent, np.int64)
    fraction = np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])
    return np.ldexp(fraction[exponent & 3], exponent >> 2)


def dequantise(values: np.ndarray, row: np.ndarray, col: np.ndarray, constant: float) -> np.ndarray:
    """values (..., n) int32 in half steps, exponents row (...), col (..., n) -> W (..., n) float32, exactly."""
    row_step, col_step = (constant / 2 * quarter(row)).astype(np.float32), quarter(col).astype(np.float32)
    return values.astype(np.float32) * row_step[..., None] * col_step


def plan(W: Tensor, H: Tensor, g: Tensor) -> Bank:
    """Choose the exponents of the steps. W (L, R, n), H (L, n, n) and g (L, R) per token.

    With H^-1 = U^T U, GPTQ's error costs exactly 1/2 sum_ij g_i (step_ij / U_jj)^2 e_ij^2, e in steps, and a weight's
    rate falls by log2 step. So all weights pay alike where step_ij = constant * g_i^-1/2 U_jj: reverse water-filling,
    in which a direction that is not worth a step rounds to zero by itself.
    """
    def exponent(step):
        return np.clip(np.round(4 * np.log2(step.cpu().numpy())), -127, 127).astype(np.int8)
    eye = torch.eye(W.size(2), dtype=torch.float64, device=W.device)
    level = H.diagonal(dim1=1, dim2=2).double().mean(1)[:, None, None]
    damped = H.double() + eye * torch.where(level > 0, DAMP * level, 1.0)
    # U is the inverse of H's upper Cholesky factor: flip, factorise, flip back.
    U = torch.linalg.solve_triangular(torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2), eye, upper=True)
    mean = g.double().mean(1, keepdim=True).clamp(min=1e-12)
    relative = (g.double() / mean).clamp(*G_RANGE)
    share = relative ** -ROW_EXPONENT                                      # scaled so that the mean of g share^2 is 1
    share = share * ((relative * share.square()).mean(1, keepdim=True) * mean) ** -0.5
    diagonal = U.diagonal(dim1=1, dim2=2)
    row, col = exponent(share), exponent(diagonal)
    step = torch.from_numpy(quarter(col)).to(W.device)
    weight = step / diagonal
    return Bank(W, H, g, row, col, (U * weight[..., None] / step[:, None]).float(), weight.square().float())


def constant_for(banks: list[Bank], kl: float) -> float:
    """-> the constant at which errors spread evenly over the steps cost this KL in all, nats per token."""
    g_steps = [bank.g.cpu().double() * torch.from_numpy(quarter(bank.row) ** 2) for bank in banks]
    price = sum((bank.cost.cpu().double().sum(1) * x.sum(1)).sum().item() for bank, x in zip(banks, g_steps))
    return math.sqrt(24 * kl / max(price, 1e-30))


def expected_kl(bank: Bank, packed: Tensor) -> float:
    """The bank's weights as packed -> KL(full precision || packed), nats per token: 1/2 sum_i g_i e_i H e_i^T."""
    E = bank.W - packed.view(bank.W.shape).to(bank.W.device)
    return 0.5 * float(((E @ bank.H * E).sum(2).double() * bank.g.double()).sum())


def quantise(bank: Bank, layer: int, rows: slice, constant: float, trellis=TRELLIS) -> np.ndarray:
    """-> values (R, n) int32 in half steps: GPTQ in blocks of columns, each rounded to a path through the trellis."""
    feedback, cost, device = bank.feedback[layer], bank.cost[layer], bank.W.device
    row = torch.from_numpy(1 / (constant * quarter(bank.row[layer, rows]))).to(device)
    col = torch.from_numpy(1 / quarter(bank.col[layer])).to(device)
    X = (bank.W[layer, rows] * row[:, None] * col).T.float().clamp(-2 ** 29, 2 ** 29).contiguous()   # (n, R), in steps
    values, state = torch.empty_like(X, dtype=torch.int32), torch.zeros_like(row, dtype=torch.int64)
    for start in range(0, len(X), BLOCK):
        block = slice(start, start + BLOCK)
        ahead, later = slice(start, start + BLOCK + LOOKAHEAD), slice(start + BLOCK, None)
        path = best_path(X[ahead], feedback[ahead, ahead], cost[ahead], state, trellis)
        values[block], errors, after = (x[:BLOCK] for x in path)
        X[later] -= feedback[block, later].T @ errors
        state = after[-1]
    return values.T.cpu().numpy()


def best_path(X: Tensor, feedback: Tensor, cost: Tensor, state: Tensor, trellis) -> tuple[Tensor, Tensor, Tensor]:
    """The cheapest path of each row through the trellis, over the columns X (n, R) in steps, from state (R,)
    -> values int32 in half steps, their errors in steps, states after each column: all (n, R).

    Viterbi, where each of the states keeps its own residual: its survivor's errors are fed forward, as GPTQ does.
    """
    (n, R), states = X.shape, len(trellis)
    before = [[trellis[:, odd].tolist().index(after) for after in range(states)] for odd in (0, 1)]
    from_even, from_odd = (torch.tensor(state, device=X.device) for state in before)
    half = (torch.arange(states, device=X.device) & 1)[:, None] / 2
    metric = torch.full((states, R), torch.inf, device=X.device).scatter_(0, state[None], 0.0)
    # Residuals (n, states, R). Step j reads one buffer and writes what is after column j to the other, by turns: so
    # column j stays in buffer j % 2 as each state saw it.
    buffers = X[:, None].repeat(1, states, 1), torch.empty(n, states, R, device=X.device)
    choices = torch.empty(n, states, R, dtype=torch.bool, device=X.device)
    for j in range(n):
        now, then = buffers[j % 2][j + 1:], buffers[1 - j % 2][j + 1:]
        y = buffers[j % 2][j] - half
        even = y - 2 * (y / 2).round()                                     # errors of the nearest even and odd k
        odd = even - torch.ones_like(even).copysign(even)
        to_even = (metric + cost[j] * even.square()).index_select(0, from_even)
        to_odd = (metric + cost[j] * odd.square()).index_select(0, from_odd)
        take = torch.lt(to_odd, to_even, out=choices[j])
        metric = torch.minimum(to_odd, to_even)
        error = torch.where(take, odd.index_select(0, from_odd), even.index_select(0, from_even))
        for i, even_before, odd_before in zip(range(states), *before):
            torch.where(take[i], now[:, odd_before], now[:, even_before], out=then[:, i])
        then.addcmul_(feedback[j, j + 1:, None, None], error, value=-1)
    path, y = torch.empty(n + 1, R, dtype=torch.int64, device=X.device), torch.empty_like(X)
    parity = torch.empty(n, R, dtype=torch.bool, device=X.device)
    path[n] = metric.argmin(0)
    for j in reversed(range(n)):
        parity[j] = choices[j].gather(0, path[j + 1][None])[0]
        path[j] = torch.where(parity[j], from_odd[path[j + 1]], from_even[path[j + 1]])
        y[j] = buffers[j % 2][j].gather(0, path[j][None])[0]
    half = path[:-1] & 1
    y -= half / 2
    even = 2 * (y / 2).round()
    up = torch.ones_like(y).copysign(y - even) * parity                    # from there to the odd neighbour, or 0
    return (2 * (even.int() + up.int()) + half).int(), y - even - up, path[1:]


# ----------------------------------------------------------------------------------------------------------------------
# Model <-> bytes

SMALL_BITS = 6                              # steps of small vectors: 2^-6 of their spread; KL 6e-6, with 5 bits 3e-5
SECTIONS = ("header", "weights", "steps of rows", "steps of columns", "spreads of rows", "spreads of columns",
            "escapes", "small vectors: steps", "small vectors: means", "small vectors: rest")


def split(state: dict[str, Tensor]) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """A model's tensors -> matrices {name: (L, R, n)}, a bank each, and small vectors {name: (rows, n)}."""
    matrices = {name: (1, *x.shape)[-3:] for name, x in state.items() if name in (*GPT.MATRICES, "embed.weight")}
    return matrices, {k: (math.prod(x.shape[:-1]), x.shape[-1]) for k, x in state.items() if k not in matrices}


def encode_small(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, n) -> exponent (rows,) int8, offset (rows,) int16, q (rows, n) int16: (offset + q) 2^(exponent / 4)."""
    vectors = vectors.astype(np.float64)
    mean = vectors.mean(1)
    spread = np.maximum(vectors.std(1), np.maximum(np.abs(mean) / 64, 1e-9))
    exponent = np.clip(np.round(4 * (np.log2(spread) - SMALL_BITS)), -127, 127).astype(np.int8)
    step = quarter(exponent)
    offset = np.round(mean / step).astype(np.int16)
    return exponent, offset, np.round(vectors / step[:, None] - offset[:, None]).astype(np.int16)


def decode_small(exponent: np.ndarray, offset: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Inverse of encode_small() -> (rows, n) float32."""
    return (offset.astype(np.float32)[:, None] + q.astype(np.float32)) * quarter(exponent).astype(np.float32)[:, None]


def squeeze(arrays) -> bytes:
    """Integer arrays of one dtype -> zstd of their bytes, the low ones first."""
    flat = np.concatenate([x.ravel() for x in arrays])
    planes = flat.view(np.uint8).reshape(len(flat), flat.itemsize).T
    return zstandard.ZstdCompressor(level=19).compress(planes.tobytes())


def unsqueeze(blob: bytes, dtype: str, shapes: list[tuple]) -> list[np.ndarray]:
    """Inverse of squeeze(). ValueError unless the bytes are exactly those of arrays of these shapes."""
    size, counts = np.dtype(dtype).itemsize, [math.prod(shape) for shape in shapes]
    if zstandard.get_frame_parameters(blob).content_size != size * sum(counts):
        raise ValueError("a section has another size than the config says")
    planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(blob), np.uint8).reshape(size, sum(counts))
    flat = np.ascontiguousarray(planes.T).view(dtype).ravel()
    return [x.reshape(shape) for x, shape in zip(np.split(flat, np.cumsum(counts)[:-1]), shapes)]


@dataclass
class Packed:
    """model.bin and what is told about it."""
    blob: bytes
    sizes: dict[str, int]           # bytes of its sections
    state: dict[str, Tensor]        # the weights as they will load
    histogram: np.ndarray           # (banks, contexts, symbols): how often each was coded


def pack_model(config: dict, weights: dict, banks: list[Bank], constant: float, trellis=TRELLIS, label="") -> Packed:
    """Quantise and code a model with one constant for all steps. banks: as gather() plans them."""
    values, threads = [np.empty(bank.W.shape, np.int32) for bank in banks], torch.get_num_threads()
    with Progress(label, sum(v.size for v in values), "weights") as progress:
        def run(job):
            bank, value, layer, rows = job
            value[layer, rows] = quantise(bank, layer, rows, constant, trellis)
            progress.add(value[layer, rows].size)
        jobs = [(bank, value, layer, slice(top, top + ROWS_AT_ONCE)) for bank, value in zip(banks, values)
                for layer in range(len(value)) for top in range(0, value.shape[1], ROWS_AT_ONCE)]
        torch.set_num_threads(1)                                           # jobs side by side: kernels are small
        try:
            with ThreadPoolExecutor(threads if banks[0].W.device.type == "cpu" else 1) as pool:
                list(pool.map(run, jobs))
        finally:
            torch.set_num_threads(threads)
    matrices, vectors = split(weights)
    small = [encode_small(weights[name].view(shape).numpy()) for name, shape in vectors.items()]
    back = [dequantise(value, bank.row, bank.col[:, None], constant) for bank, value in zip(banks, values)]
    state = dict(zip((*matrices, *vectors), (*back, *(decode_small(*x) for x in small))))
    rows, cols = [bank.row.ravel() for bank in banks], [bank.col for bank in banks]
    sigma_rows, sigma_cols = zip(*map(scales, values))
    words, escapes, histogram = encode(values, sigma_rows, sigma_cols)
    # A sigma times its step is the spread of the weights themselves, which is more even: a fifth fewer bytes.
    sides = [rows, cols, [*map(np.add, sigma_rows, rows)], [*map(np.add, sigma_cols, cols)], [escapes], *zip(*small)]
    sections = [words.tobytes(), *map(squeeze, sides)]
    header = {"config": config, "constant": constant, "escapes": len(escapes), "sections": [*map(len, sections)]}
    header = json.dumps(header, separators=(",", ":")).encode()
    sections = [struct.pack("<I", len(header)) + header, *sections]
    state = {name: torch.from_numpy(x).view(weights[name].shape) for name, x in state.items()}
    return Packed(b"".join(sections), dict(zip(SECTIONS, map(len, sections))), state, histogram)


def unpack_model(blob: bytes):
    """model.bin -> (Config, GPT). Every size is checked before it is used. Exceptions of many kinds for bad bytes."""
    (size,) = struct.unpack_from("<I", blob)
    header = json.loads(blob[4:4 + min(size, 1 << 16)])
    config, constant, n_escapes, sizes = (header[key] for key in ("config", "constant", "escapes", "sections"))
    if (any(type(x) is not int or not 0 <= x <= MAX_WEIGHTS for x in (n_escapes, *sizes))
            or len(sizes) != len(SECTIONS) - 1 or sum(sizes) != len(blob) - 4 - size
            or type(constant) is not float or not 0 < constant < 1e30
            or config["n_layer"] * config["loop_passes"] > 4096 or config["vocab_size"] > 1 << 16):
        raise ValueError("the header does not fit the file")
    cfg = Config(**config)
    with torch.device("meta"):
        model = GPT(cfg).eval().requires_grad_(False)
    meta = model.state_dict()
    if not n_escapes <= sum(x.numel() for x in meta.values()) <= MAX_WEIGHTS:
        raise ValueError(f"the config asks for more than {MAX_WEIGHTS:,} weights, or fewer than there are escapes")
    ends = np.cumsum([4 + size, *sizes])
    words, *sides = (blob[a:b] for a, b in zip(ends, ends[1:]))
    matrices, vectors = split(meta)
    shapes, rests = list(matrices.values()), list(vectors.values())
    by_row, by_col, by_vector = [(L * R,) for L, R, n in shapes], [(L, n) for L, R, n in shapes], [x[:1] for x in rests]
    layout = [("i1", by_row), ("i1", by_col), ("i1", by_row), ("i1", by_col), ("i4", [(n_escapes,)]),
              ("i1", by_vector), ("i2", by_vector), ("i2", rests)]
    rows, cols, *spreads, (escapes,), exponents, means, qs = [unsqueeze(x, *of) for x, of in zip(sides, layout)]
    sigmas = [list(map(np.subtract, spread, step)) for spread, step in zip(spreads, (rows, cols))]
    words, out = np.frombuffer(words, np.uint16), [np.empty((L * R, n), np.float32) for L, R, n in shapes]
    for bank, piece, layer, values in decode(words, escapes, shapes, *sigmas):
        out[bank][piece] = dequantise(values.T, rows[bank][piece], cols[bank][layer], constant)
    state = dict(zip((*matrices, *vectors), (*out, *map(decode_small, exponents, means, qs))))
    if not all(np.isfinite(x).all() for x in state.values()):
        raise ValueError("weights are not finite")
    model.load_state_dict({name: torch.from_numpy(x).view(meta[name].shape) for name, x in state.items()}, assign=True)
    return cfg, model


def digest(state: dict[str, Tensor]) -> str:
    """sha256 over all weights: equal for two models of one config only if they are the same bit for bit."""
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The artifact: a zip that Python runs, whose archive comment is the sha256 of every byte before it.


def build_artifact(files: dict[str, bytes], model: bytes) -> bytes:
    """files {name: bytes} compressed, model.bin stored. The same input gives the same bytes at any time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compresslevel=9) as archive:
        for name, data in [*files.items(), ("model.bin", model)]:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data, zipfile.ZIP_STORED if name == "model.bin" else zipfile.ZIP_DEFLATED)
        archive.comment = bytes(32)
    data = buffer.getvalue()
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def load(path):
    """artifact.pyz -> (Config, GPT in eval mode on the CPU in float32, Tokenizer); the same bits in every process.

    BadInput for any file that pack.py did not write whole. One that was made to harm can at most ask for MAX_WEIGHTS
    weights: nothing in it is executed, and every length is checked before it is used.
    """
    try:
        data = Path(path).read_bytes() if Path(path).stat().st_size <= MAX_FILE else b""
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}: pack a run first, python pack.py") from None
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise BadInput(f"{path}: damaged, cut short or not an artifact (the checksum at its end does not match)")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if max(archive.getinfo(name).file_size for name in ("tokenizer.json", "model.bin")) > len(data) + (1 << 24):
                raise ValueError("its parts are larger than they can be")
            tokenizer = Tokenizer(archive.read("tokenizer.json"))
            cfg, model = unpack_model(archive.read("model.bin"))
    except Exception as e:  # zip, zstd, JSON and torch each have errors of their own for bad bytes
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise BadInput(f"{path}: not an artifact that this pack.py can read: {reason}") from None
    if tokenizer.vocab_size != cfg.vocab_size:
        raise BadInput(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {cfg.vocab_size}")
    return cfg, model, tokenizer


def sources(run: Path) -> dict[str, bytes]:
    """The artifact's code: as the run started with, but for pack.py, which must be able to read what it writes."""
    files = {"__main__.py": MAIN.encode()}
    for name in SOURCES:
        path = run / "source" / name
        path = ROOT / name if name == "pack.py" or not path.is_file() else path
        files[name] = path.read_bytes()
        if files[name] != (ROOT / name).read_bytes():
            print(f"note: {name} is not the one beside this pack.py; the artifact gets {path}")
    return files


def verify(path: Path, wanted: str) -> None:
    """The artifact, loaded by its own code in another process, must be the packed model bit for bit: RuntimeError."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import pack\n"
            "print(pack.digest(pack.load(sys.argv[1])[1].state_dict()))")
    child = subprocess.run([sys.executable, "-c", code, str(path.resolve())], capture_output=True, text=True)
    if child.stdout.split()[-1:] != [wanted]:
        raise RuntimeError(f"the artifact does not load as it was packed: {child.stderr[-2000:] or child.stdout}")


# ----------------------------------------------------------------------------------------------------------------------
# Packing a checkpoint


def gather(checkpoint: dict, path: Path, device: str = "cpu") -> list[Bank]:
    """Checkpoint -> its banks, planned. BadInput names what is not finite.

    A looped layer makes the same error in each pass, so H and g, both sums over the passes, are not divided by their
    number: the KL measured for such layers is 2 to 4 times that of passes that err independently. Without statistics
    H and g make expected_kl() the mean squared error, relative to the mean square of the weight's row.
    """
    weights, stats = checkpoint["weights"], checkpoint["stats"]
    for name, x in (weights | stats).items():
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.isfinite().all()):
            raise BadInput(f"{path}: {name} is not a tensor of finite numbers")
    banks, matrices = [], split(weights)[0]
    n_weights = sum(map(math.prod, matrices.values()))
    for name, (L, R, n) in matrices.items():
        W, key = weights[name].float().view(L, R, n), name.removesuffix(".weight")
        H, g = torch.eye(n).expand(L, n, n), 2 / n_weights / W.square().mean(2).clamp(min=1e-12)
        try:
            if stats:
                tokens = float(stats["tokens"].sum())
                H, g = stats[f"{key}.H"].view(L, n, n) / tokens, stats[f"{key}.g"].view(L, R) / tokens
                if key == "embed":                                         # tokens are inputs as often as targets
                    H = H + stats["embed.S"] / tokens / g.sum().clamp(min=1e-12)
            banks.append(plan(W.to(device), H.to(device), g.to(device)))
        except (KeyError, RuntimeError, ZeroDivisionError) as e:
            raise BadInput(f"{path}: the statistics of {name} do not fit it: {str(e).splitlines()[0]}") from None
    return banks


def search(pack_at, cap: int, slope: float) -> tuple[Packed, bytes]:
    """-> what pack_at gives where its file ends within 0.05 % below cap, or at octave 0 where that fits.

    pack_at(octave, number of the try) -> Packed with steps 2^octave times the finest, its file; slope: bytes an octave.
    """
    octave, tries, best = 0.0, [], None                                    # tries: (octave, bytes)
    while len(tries) < 15:
        packed, data = pack_at(octave, len(tries) + 1)
        size = len(data)
        if size <= cap:
            best = packed, data                                            # the tries close in on the cap
            if octave == 0 or size >= 0.9995 * cap:
                break
        if tries:
            slope = (tries[-1][1] - size) / (octave - tries[-1][0])
        tries.append((octave, size))
        low = max(tried for tried, size in tries if size > cap)
        high = min((tried for tried, size in tries if size <= cap), default=math.inf)
        octave += min((size - 0.99975 * cap) / max(slope, 1.0), 4.0)
        if not low < octave < high:
            octave = (low + high) / 2
    if best is None:
        raise BadInput(f"--cap_bytes={cap}: this model does not fit; the smallest file tried has {size:,} bytes")
    return best


def entropies(histogram: np.ndarray) -> tuple[np.ndarray, float]:
    """(banks, contexts, symbols) -> bytes of each bank by the coder's probabilities, of all by the symbols' own."""
    ideal = (histogram * np.log2((1 << BITS) / np.maximum(tables()[1], 1))).sum((1, 2)) / 8
    count = histogram.sum(0)
    return ideal, -(count * np.log2(np.maximum(count, 1) / np.maximum(count.sum(1, keepdims=True), 1))).sum() / 8


def ledger(banks: list[Bank], packed: Packed, data: bytes, measure: str) -> str:
    """Where the artifact's bytes went, and what each bank of weights costs of `measure`: a table."""
    (ideal, entropy), matrices, code = entropies(packed.histogram), split(packed.state)[0], packed.sizes["weights"]
    costs = [expected_kl(bank, packed.state[name]) for name, bank in zip(matrices, banks)]
    n_weights, sizes, total = sum(map(math.prod, matrices.values())), np.rint(ideal).astype(int), sum(costs)
    line = "{:<26}{:>12}{:>11}{:>9}{:>14}".format
    table = [line("", "weights", "bits each", "cost", "bytes")]
    for name, bank, cost, size in zip(matrices, banks, costs, sizes):
        bits, share = 8 * size / bank.W.numel(), cost / max(total, 1e-30)
        table.append(line(name, f"{bank.W.numel():,}", f"{bits:.3f}", f"{share:.1%}", f"{size:,}"))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {part.filename: part.compress_size for part in archive.infolist() if part.filename != "model.bin"}
    rest = {**packed.sizes, "weights": code - sizes.sum(), **files}        # of the weights: rounding and start-up
    rest["zip directory, checksum"] = len(data) - len(packed.blob) - sum(files.values())
    table += [line(name, "", "", "", f"{size:,}") for name, size in rest.items()]
    bits = 8 * len(packed.blob) / n_weights
    table += [line("artifact.pyz", f"{n_weights:,}", f"{bits:.3f}", "", f"{len(data):,}"),
              f"the weights' code above the entropy of its symbols: {code / max(entropy, 1) - 1:.2%}",
              f"{measure}: {total:.5f}"]
    return "\n".join(table)


def main(argv: list[str] | None = None) -> int:
    parser, begin = Parser(prog="pack.py", description=__doc__), time.perf_counter()
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="folder, or name in runs/; empty: newest")
    parser.add_argument("--cap_bytes", type=int, default=16_000_000, metavar="N", help="bytes of the file, at most")
    args = parser.parse_args(argv)
    run = find_run(args.run)
    path = run / "checkpoint.pt"
    try:
        checkpoint = load_checkpoint(path)
    except ValueError as e:
        raise BadInput(str(e)) from None
    if not checkpoint["tokenizer"]:
        raise BadInput(f"{path}: trained on synthetic tokens, so there is no tokenizer and nothing to score")
    measure = "expected KL(full precision || packed), nats per token, by the checkpoint's statistics"
    if not checkpoint["stats"]:
        measure = "mean squared error of a weight, relative to the mean square of its row"
        print(f"{path} has NO STATISTICS (train with --calib_tokens above 0): at the same bytes it will lose more")
    files = sources(run) | {"tokenizer.json": checkpoint["tokenizer"].encode()}
    if (fixed := len(build_artifact(files, b""))) > args.cap_bytes:
        raise BadInput(f"--cap_bytes={args.cap_bytes}: the code and the tokenizer alone take {fixed:,} bytes")
    banks = gather(checkpoint, path, "cuda" if torch.cuda.is_available() else "cpu")
    config, weights, finest = asdict(checkpoint["config"]), checkpoint["weights"], constant_for(banks, BEST_KL)

    def pack_at(octave, number):
        packed = pack_model(config, weights, banks, finest * 2 ** octave, label=f"pass {number}:")
        return packed, build_artifact(files, packed.blob)
    packed, data = search(pack_at, args.cap_bytes, sum(bank.W.numel() for bank in banks) / 8)
    with atomic_write(run / "artifact.pyz") as f:
        f.write(data)
        f.flush()
        verify(Path(f.name), digest(packed.state))                         # before it replaces the one that is there
    quality = ": the best quality setting; finer steps buy nothing" if len(data) < 0.9995 * args.cap_bytes else ""
    text = f"{ledger(banks, packed, data, measure)}\n{len(data) / args.cap_bytes:.2%} of the cap{quality}"
    with atomic_write(run / "pack.txt", "w") as f:
        f.write(text + "\n")
    print(text, "---", f"artifact_bytes: {len(data)}", f"pack_seconds: {time.perf_counter() - begin:.1f}",
          f"artifact: {run / 'artifact.pyz'}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
