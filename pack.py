"""Pack a trained model into one file: runs/<run>/checkpoint.pt -> runs/<run>/artifact.pyz, at most --cap_bytes bytes on disk.

    python pack.py                       the newest run; the file ends just below the cap, or where finer steps buy nothing
    python pack.py runs/mine --compare   also measures what other packers make of this checkpoint, on validation data

How. (1) Steps: for y = W x with H = E[x x^T] and g_i = E[(dL/dy_i)^2], an error e of W raises the loss by about
1/2 sum_i g_i e_i H e_i^T; steps are such that every weight pays the same share of it. (2) Rounding: GPTQ's error feedback
(arXiv 2210.17323) inside a trellis (Ungerboeck's code, as the dependent quantisation of ISO/IEC 15938-17). (3) Coding:
interleaved rANS (arXiv 1311.2540) with probabilities that follow from scales, so that no tables are sent. (4) One constant,
found by search, sets the size. All of it comes from the checkpoint: packing reads no data; only --compare does.
"""
import hashlib
import io
import json
import math
import os
import platform
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import numpy as np
import torch
import zstandard
from torch import Tensor

from data.dataset import BadInput, Parser, Progress, atomic_write, command
from data.tokenizer import Tokenizer
from train_gpt import GPT, SOURCES, config_from, load_checkpoint

ROOT = Path(__file__).resolve().parent
MAIN = """import sys
import eval_bpb
from data.dataset import command
sys.exit(command(lambda: eval_bpb.main(sys.argv)))
"""
MAX_FILE, MAX_WEIGHTS = 1 << 28, 1 << 27    # bytes of an artifact, weights of a model: more is refused before it is allocated

# ----------------------------------------------------------------------------------------------------------------------
# Entropy coder. Integers only, so that encoder and decoder agree bit for bit on every machine.

BITS = 14                                   # probabilities are multiples of 2^-14
LOW, HIGH = -24, 24                         # contexts: sigma = 2^(index / 4) steps, from 1/64 to 64 steps


@dataclass
class Tables:
    """Probabilities of k in every context. Context 2 * (index - LOW) + b codes k of the value k + b / 2, in steps.

    Symbol k + radius[context] for |k| <= radius, and last the escape. freq, start (contexts, symbols) uint32, in units of 2^-BITS;
    symbol (contexts << BITS,) uint16 is the inverse.
    """
    radius: np.ndarray
    freq: np.ndarray
    start: np.ndarray
    symbol: np.ndarray


@lru_cache
def tables() -> Tables:
    """p(k) ~ 0.95 N(0, sigma) + 0.05 Laplace of the same variance, integrated over the step at eight points."""
    one, root = 1 << 128, 2 << 128
    for _ in range(10):
        root = math.isqrt(root << 128)                                     # 2^(1 / 1024), by ten exact square roots
    powers = [one]
    for _ in range(1023):
        powers.append(powers[-1] * root >> 128)
    down = np.array([one * one // p >> 98 for p in powers])                # 2^(-i / 1024), 30 fractional bits
    exp2 = lambda x: down[x & 1023] >> np.minimum(x >> 10, 62)             # x >= 0 in 1/1024 -> 2^-x
    log2e = int(1.4426950408889634 * 2 ** 52)
    radius, rows = [], []
    for index in range(LOW, HIGH + 1):
        inverse = powers[-256 * index % 1024] << 24 >> (24 + -(-256 * index // 1024))   # 2^(-index / 4), 128 fractional bits
        gauss = 2 * log2e * inverse * inverse >> 276                       # x^2 / (2 sigma^2) log2(e) = x^2 gauss, for x in 1/16
        laplace = 64 * math.isqrt(2 * log2e * log2e) * inverse >> 148      # sqrt(2) x / sigma log2(e) = x laplace; both in 2^-32 / 1024
        r = 6 * (one * one // inverse) // one + 2
        k = np.arange(-r, r + 1)
        for b in (0, 1):
            x = np.abs(8 * (2 * k + b)[:, None] + np.arange(-7, 8, 2))     # eight points of the step, in 1/16 step
            p = (1024 * exp2(x * x * gauss >> 32) + 96 * exp2(x * laplace >> 32)).sum(1) >> 10
            share = ((1 << BITS) - len(k) - 1) * np.cumsum(p) // p.sum()   # every symbol has at least 2^-BITS, the escape no more
            radius.append(r)
            rows.append(np.append(1 + np.diff(share, prepend=0), 1))
    freq = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, f in zip(freq, rows):
        row[:len(f)] = f
    start = np.cumsum(freq, 1) - freq
    symbol = np.concatenate([np.repeat(np.arange(f.size), f) for f in freq])
    return Tables(np.array(radius, np.int32), freq.astype(np.uint32), start.astype(np.uint32), symbol.astype(np.uint16))


CODES = {1: (0, 0), 4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10)}       # Ungerboeck 1982; 1: no trellis


def next_states(states: int) -> np.ndarray:
    """(states, 2) int32: the state after k with parity 0 and 1. A state's lowest bit is the b of the next value k + b / 2."""
    h0, h1 = CODES[states]
    s = np.arange(states, dtype=np.int32)[:, None]
    return (s >> 1) ^ (h0 >> 1) * (s & 1) ^ (h1 >> 1) * np.arange(2, dtype=np.int32)


def chunks(shapes: list[tuple[int, int, int]], lanes: int):
    """Shapes (L, R, n) of the banks, in order -> (bank, first row, last row + 1) of each chunk of rows, coded column by column."""
    for bank, (L, R, n) in enumerate(shapes):
        for start in range(0, L * R if n else 0, lanes):
            yield bank, start, min(start + lanes, L * R)


def contexts(row: np.ndarray, col: np.ndarray, R: int, start: int, stop: int) -> np.ndarray:
    """Scale exponents row (L * R,), col (L, n) -> (n, stop - start) the context of each weight of these rows, for b = 0."""
    layer = np.arange(start, stop) // R
    return 2 * (np.clip(row[start:stop].astype(np.int32) + col.T[:, layer], LOW, HIGH) - LOW)


def encode(values: list[np.ndarray], rows: list[np.ndarray], cols: list[np.ndarray], lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values[i] (L, R, n) int32 in half steps, whose parity is the trellis' b; scale exponents rows[i] (L * R,), cols[i] (L, n)
    -> words (uint16) that decode() reads, escapes (int32), histogram (banks, contexts, symbols) int64.

    One rANS state of 32 bits for each lane, one word stream for all: each step codes one column of up to `lanes` rows.
    """
    t = tables()
    x = np.full(lanes, 1 << 16, np.uint32)
    words, escapes, histogram = [], [], np.zeros((len(values), t.freq.size), np.int64)
    for bank, start, stop in reversed(list(chunks([v.shape for v in values], lanes))):
        L, R, n = values[bank].shape
        v = values[bank].reshape(L * R, n)[start:stop].T                   # (n, m)
        context = contexts(rows[bank], cols[bank], R, start, stop) + (v & 1)
        k, radius = v >> 1, t.radius[context]
        outside = np.abs(k) > radius
        escapes.append(k[outside])
        symbol = np.where(outside, 2 * radius + 1, k + radius) + context * t.freq.shape[1]
        histogram[bank] += np.bincount(symbol.ravel(), minlength=t.freq.size)
        freq, begin = t.freq.ravel()[symbol], t.start.ravel()[symbol]
        head = x[:stop - start]
        for f, c in zip(freq[::-1], begin[::-1]):
            full = head >= f << np.uint32(32 - BITS)
            words.append(head[full].astype(np.uint16))
            head[full] >>= np.uint32(16)
            head[:] = (head // f << np.uint32(BITS)) + head % f + c
    words.append(x.view(np.uint16) if sys.byteorder == "little" else x.byteswap().view(np.uint16).byteswap())
    return np.concatenate(words[::-1]), np.concatenate(escapes[::-1]).astype(np.int32), histogram.reshape(-1, *t.freq.shape)


def decode(words: np.ndarray, escapes: np.ndarray, shapes, rows, cols, lanes: int, states: int):
    """Inverse of encode(): yields (bank, first row, last row + 1, values (n, rows) int32). ValueError where the words do not fit."""
    t, following = tables(), next_states(states).ravel()
    if len(words) < 2 * lanes:
        raise ValueError("the code is cut short")
    x = words[:2 * lanes].reshape(lanes, 2).astype(np.uint32)
    x = x[:, 0] | x[:, 1] << np.uint32(16)
    at, escape, mask = 2 * lanes, 0, np.uint32((1 << BITS) - 1)
    width, freq, begin = t.freq.shape[1], t.freq.ravel(), t.start.ravel()
    for bank, start, stop in chunks(shapes, lanes):
        base = contexts(rows[bank], cols[bank], shapes[bank][1], start, stop)
        values, state, head = np.empty_like(base), np.zeros(stop - start, np.int32), x[:stop - start]
        for j, context in enumerate(base):
            b = state & 1
            context += b
            slot = head & mask
            symbol = t.symbol[(context << BITS) + slot]
            radius = t.radius[context]
            k = symbol - radius
            where = context * width + symbol
            head[:] = freq[where] * (head >> np.uint32(BITS)) + slot - begin[where]
            low = (head < 1 << 16).nonzero()[0]
            if at + len(low) > len(words):
                raise ValueError("the code is cut short")
            head[low] = head[low] << np.uint32(16) | words[at:at + len(low)]
            at += len(low)
            if (k > radius).any():
                outside = (k > radius).nonzero()[0]
                if escape + len(outside) > len(escapes):
                    raise ValueError("escapes are missing")
                k[outside] = escapes[escape:escape + len(outside)]
                escape += len(outside)
            values[j] = 2 * k + b
            state = following[2 * state + (k & 1)]
        yield bank, start, stop, values
    if at != len(words) or escape != len(escapes) or (x != 1 << 16).any():
        raise ValueError("the code does not end where it should")


def scales(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values (L, R, n) in half steps -> row (L * R,), col (L, n) int8: sigma of value (l, i, j) is about 2^((row + col) / 4) steps."""
    v = values.astype(np.float32) / 2
    exponent = lambda square: np.clip(np.round(2 * np.log2(np.maximum(square, 1e-9))), -60, 60)
    col = exponent((v * v).mean(1)) if v.size else np.zeros(v[:, 0].shape)
    v *= np.exp2(-col / 4, dtype=np.float32)[:, None]
    return exponent((v * v).mean(2)).reshape(-1).astype(np.int8), col.astype(np.int8)


# ----------------------------------------------------------------------------------------------------------------------
# Quantiser

ROW_EXPONENT = 0.45                         # rows' steps ~ g^-0.45: 0.5 is the theory, but g of a single row is noisy
TRELLIS = 8                                 # states
G_RANGE = 1e-3, 20.0                        # g of a row, relative to its matrix, is held in this range
DAMP = 0.05                                 # of the mean of H's diagonal, added to it; 0.01: 7 % more KL, 0.2: 9 % more
ROWS_AT_ONCE, BLOCK = 1024, 128               # rows and columns of the trellis' survivors that are in the cache together


@dataclass
class Matrix:
    """One matrix W (R, n) of a bank and all that is known about it. Steps are constant * 2^((row_i + col_j) / 4)."""
    bank: int
    layer: int
    W: Tensor               # (R, n) float32
    row: np.ndarray         # (R,) int8
    col: np.ndarray         # (n,) int8
    feedback: Tensor        # (n, n) float32, upper triangle: an error of one step in column i, in steps of column j
    cost: Tensor            # (n,) float32: of a squared error of one step, once later columns have made up for what they can
    H: Tensor | None        # (n, n) float32, per token
    g: Tensor | None        # (R,) float32, per token


def quarter(exponent: np.ndarray) -> np.ndarray:
    """2^(exponent / 4) float64, by operations that are exact everywhere."""
    exponent = np.asarray(exponent, np.int64)
    return np.ldexp(np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])[exponent & 3], exponent >> 2)


def dequantise(values: np.ndarray, row: np.ndarray, col: np.ndarray, constant: float) -> np.ndarray:
    """values (R, n) int32 in half steps, row (R,), col (n,) or (R, n) exponents -> W (R, n) float32, the same on every machine."""
    return values.astype(np.float32) * (constant / 2 * quarter(row)).astype(np.float32)[:, None] * quarter(col).astype(np.float32)


def plan(bank: int, layer: int, W: Tensor, H: Tensor | None, g: Tensor | None) -> Matrix:
    """Choose the exponents of the steps. W (R, n); H (n, n) and g (R,) per token, or None: the row's RMS alone decides.

    With H^-1 = U^T U, GPTQ's error costs 1/2 sum_ij g_i (step_ij / U_jj)^2 e_ij^2 exactly, e in steps, and a weight's rate falls
    by log2 step; so all weights pay the same where step_ij = constant * g_i^-1/2 U_jj (the reverse water-filling of the
    rate-distortion function; a direction that is not worth a step rounds to zero by itself).
    """
    grid = lambda x: np.clip(np.round(4 * np.log2(x)), -127, 127).astype(np.int8)
    n, device = W.size(1), W.device
    if H is None:
        rms = W.square().mean(1).sqrt().cpu().numpy().astype(np.float64)
        return Matrix(bank, layer, W, grid(np.maximum(rms, 1e-6)), np.zeros(n, np.int8), torch.eye(n, device=device), torch.ones(n, device=device), None, None)
    damped = H.double()
    level = damped.diagonal().mean()
    damped = damped + torch.eye(n, dtype=torch.float64, device=device) * (DAMP * level if level > 0 else 1.0)
    # U is the inverse of H's upper Cholesky factor: flip, factorise, flip back.
    factor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    U = torch.linalg.solve_triangular(factor, torch.eye(n, dtype=torch.float64, device=device), upper=True)
    mean = g.double().mean().clamp(min=1e-12)
    relative = (g.double() / mean).clamp(*G_RANGE)
    share = relative ** -ROW_EXPONENT
    share = share * ((relative * share.square()).mean() ** -0.5 * mean ** -0.5)              # mean of g share^2 is 1
    row, col = grid(share.cpu().numpy()), grid(U.diagonal().cpu().numpy())
    step = torch.from_numpy(quarter(col)).to(device)
    feedback = (U * (step / U.diagonal())[:, None] / step).float()
    return Matrix(bank, layer, W, row, col, feedback, (step / U.diagonal()).square().float(), H.float(), g.float())


def quantise(m: Matrix, constant: float, states: int) -> np.ndarray:
    """-> values (R, n) int32 in half steps: GPTQ with plain rounding (states 1: even values) or in the trellis (states 8)."""
    device = m.W.device
    row, col = (torch.from_numpy(x).to(device) for x in (1 / (constant * quarter(m.row)), 1 / quarter(m.col)))
    out = np.empty(m.W.shape, np.int32)
    for start in range(0, len(m.W), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        X = (m.W[rows] * row[rows, None] * col).float().T.contiguous()     # (n, rows), in steps
        values, state = torch.empty_like(X, dtype=torch.int32), torch.zeros(X.size(1), dtype=torch.int64, device=device)
        for a in range(0, len(X), BLOCK):
            b = min(a + BLOCK, len(X))
            block, A = X[a:b], m.feedback[a:b, a:b]
            visited, odd, state = survivor(block, A, m.cost[a:b], state, states)
            E = torch.empty_like(block)
            for j in range(b - a):
                half = visited[j] & 1
                y = block[j] - half / 2
                even = 2 * (y / 2).round() if states > 1 else y.round()
                k = torch.where(odd[j], even + (y - even).sign() + (y == even), even)         # the nearest k of the path's parity
                E[j] = y - k
                values[a + j] = (2 * k + half).int()
                block[j + 1:] -= A[j, j + 1:, None] * E[j]
            X[b:] -= m.feedback[a:b, b:].T @ E
        out[rows] = values.T.cpu().numpy()
    return out


def survivor(X: Tensor, A: Tensor, cost: Tensor, state: Tensor, states: int) -> tuple[Tensor, Tensor, Tensor]:
    """The cheapest path of each row through the trellis, over the columns X (n, R) in steps, from state (R,)
    -> states visited (n, R) and parities of k (n, R) bool on the way, the state after it (R,).

    Viterbi, where each of the states keeps its own residual: the survivor's errors are fed forward by A as GPTQ does.
    """
    n, R = X.shape
    if states == 1:
        return torch.zeros_like(X, dtype=torch.int64), torch.zeros_like(X, dtype=torch.bool), state
    following = next_states(states)
    before = [[int(np.flatnonzero(following[:, z] == t)[0]) for t in range(states)] for z in (0, 1)]   # by parity z into state t
    from_even, from_odd = (torch.tensor(b, device=X.device) for b in before)
    half = (torch.arange(states, device=X.device) & 1)[:, None] / 2
    metric = torch.full((states, R), torch.inf, device=X.device).scatter_(0, state[None], 0.0)
    residual = X[:, None].repeat(1, states, 1)                             # (n, states, R)
    spare, choices = torch.empty_like(residual), torch.empty(n, states, R, dtype=torch.bool, device=X.device)
    for j in range(n):
        y = residual[j] - half
        even = y - 2 * (y / 2).round()                                     # error of the nearest even k, of the nearest odd one
        odd = even - torch.ones_like(even).copysign(even)
        to_even = (metric + cost[j] * even.square()).index_select(0, from_even)
        to_odd = (metric + cost[j] * odd.square()).index_select(0, from_odd)
        take = torch.lt(to_odd, to_even, out=choices[j])
        metric = torch.minimum(to_odd, to_even)
        error = torch.where(take, odd.index_select(0, from_odd), even.index_select(0, from_even))
        for t in range(states):
            torch.where(take[t], residual[j + 1:, before[1][t]], residual[j + 1:, before[0][t]], out=spare[j + 1:, t])
        spare[j + 1:].addcmul_(A[j, j + 1:, None, None], error, value=-1)
        residual, spare = spare, residual
    end = state = metric.argmin(0)
    visited, parity = torch.empty_like(X, dtype=torch.int64), torch.empty_like(X, dtype=torch.bool)
    for j in reversed(range(n)):
        parity[j] = choices[j].gather(0, state[None])[0]
        visited[j] = state = torch.where(parity[j], from_odd[state], from_even[state])
    return visited, parity, end


# ----------------------------------------------------------------------------------------------------------------------
# Model <-> bytes

SMALL_BITS = 5                              # a small vector's step is 2^-5 of its spread: 7 bits a value, and no measurable loss


def split(state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """A model's tensors -> names of the matrices (quantised by the banks), names of the small ones. From names and shapes alone."""
    matrices = [name for name, x in state.items() if name in (*GPT.MATRICES, "embed.weight")]
    return matrices, [name for name in state if name not in matrices]


def as_bank(x):
    """(R, n) or (L, R, n) -> (L, R, n)."""
    return x[None] if x.ndim == 2 else x


def encode_small(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (..., n) float32 -> exponents (rows,) int8, offsets (rows,) int16, q (rows, n) int16; x ~ (offset + q) 2^(exponent / 4)."""
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    mean = x.mean(1)
    spread = np.maximum(np.sqrt(((x - mean[:, None]) ** 2).mean(1)), np.maximum(np.abs(mean) / 64, 1e-9))
    exponent = np.round(4 * (np.log2(spread) - SMALL_BITS)).astype(np.int8)
    step = quarter(exponent)
    offset = np.round(mean / step).astype(np.int16)
    return exponent, offset, np.round(x / step[:, None] - offset[:, None]).astype(np.int16)


def decode_small(exponent: np.ndarray, offset: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Inverse of encode_small() -> (rows, n) float32."""
    return (offset.astype(np.float64)[:, None] + q) .astype(np.float32) * quarter(exponent).astype(np.float32)[:, None]


def squeeze(*arrays: np.ndarray) -> bytes:
    """Integers -> zstd of their bytes, the low ones of all first."""
    planes = [np.ascontiguousarray(a.astype(a.dtype.newbyteorder("<"))).view(np.uint8).reshape(-1, a.itemsize).T for a in arrays]
    return zstandard.ZstdCompressor(level=19, write_content_size=True).compress(b"".join(p.tobytes() for p in planes))


def unsqueeze(blob: bytes, *wanted: tuple[int, str]) -> list[np.ndarray]:
    """Inverse of squeeze(); wanted: (count, dtype) of each array. ValueError unless the sizes are exactly these."""
    total = sum(count * np.dtype(dtype).itemsize for count, dtype in wanted)
    if zstandard.get_frame_parameters(blob).content_size != total:
        raise ValueError("a section has another size than the config says")
    data, out, at = zstandard.ZstdDecompressor().decompress(blob), [], 0
    for count, dtype in wanted:
        size = np.dtype(dtype).itemsize
        plane = np.frombuffer(data, np.uint8, count * size, at).reshape(size, count)
        out.append(np.ascontiguousarray(plane.T).view(np.dtype(dtype).newbyteorder("<")).reshape(count).astype(dtype))
        at += count * size
    return out


@dataclass
class Packed:
    """model.bin and what the ledger tells about it."""
    blob: bytes
    sections: dict[str, int]        # bytes
    values: list[np.ndarray]        # per bank (L, R, n) int32 half steps
    constant: float
    histogram: np.ndarray           # (banks, contexts, symbols): how often each was coded
    states: int


def pack_model(config: dict, weights: dict[str, Tensor], matrices: list[list[Matrix]], constant: float, states: int, label: str) -> Packed:
    """Quantise and code a model with one constant for all steps. matrices: per bank, its layers."""
    jobs = [m for bank in matrices for m in bank]
    with Progress(label, sum(m.W.numel() for m in jobs), "weights") as progress:
        def run(m):
            values = quantise(m, constant, states)
            progress.add(m.W.numel())
            return values
        threads = torch.get_num_threads()
        torch.set_num_threads(1)                                           # matrices side by side beat threads inside small kernels
        with ThreadPoolExecutor(threads if jobs[0].W.device.type == "cpu" else 1) as pool:
            done = list(pool.map(run, jobs))
        torch.set_num_threads(threads)
    values = [np.stack([v for v, m in zip(done, jobs) if m.bank == bank]) for bank in range(len(matrices))]
    return code_model(config, weights, matrices, values, constant, states)


def code_model(config, weights, matrices, values, constant, states) -> Packed:
    """Values -> model.bin: length and JSON header, then the sections that the header gives the sizes of."""
    _, small = split(weights)
    n_weights = sum(v.size for v in values)
    lanes = 1 << min(max(n_weights >> 13, 1).bit_length(), 11)             # 4 bytes a lane: at most 0.4 % of a bit per weight
    rows, cols = zip(*[scales(v) for v in values])
    words, escapes, histogram = encode(values, rows, cols, lanes)
    steps = [np.concatenate([x for bank in matrices for m in bank for x in (getattr(m, side),)]) for side in ("row", "col")]
    smalls = [encode_small(weights[name].numpy()) for name in small]
    sections = {
        "weights": words.astype("<u2").tobytes(),
        "scales": squeeze(*steps, np.concatenate(rows), np.concatenate([c.ravel() for c in cols])),
        "escapes": squeeze(escapes),
        "small": squeeze(*[np.concatenate([x[i].ravel() for x in smalls]) for i in range(3)])}
    header = json.dumps({"config": config, "constant": constant, "states": states, "lanes": lanes, "escapes": len(escapes),
                         "sections": [len(x) for x in sections.values()]}, separators=(",", ":")).encode()
    head = struct.pack("<I", len(header)) + header
    sizes = {"header": len(head), **{k: len(v) for k, v in sections.items()}}
    return Packed(b"".join([head, *sections.values()]), sizes, values, constant, histogram, states)


def unpack_model(blob: bytes):
    """model.bin -> (Config, GPT on the CPU, float32, in eval mode). Every size is checked before it is used: ValueError or BadInput."""
    if len(blob) < 4 or (size := struct.unpack_from("<I", blob)[0]) > min(len(blob) - 4, 1 << 16):
        raise ValueError("the header is cut short")
    header = json.loads(blob[4:4 + size])
    config, constant, states, lanes, n_escapes, sizes = (header[k] for k in ("config", "constant", "states", "lanes", "escapes", "sections"))
    integers = [states, lanes, n_escapes, *sizes, *(v for v in config.values() if type(v) is int)]
    if (any(type(v) is not int or not 0 <= v < 1 << 31 for v in integers) or states not in CODES or not 1 <= lanes <= 1 << 16
            or len(sizes) != 4 or sum(sizes) != len(blob) - 4 - size or type(constant) is not float or not 0 < constant < 1e30
            or config.get("n_layer", 0) * config.get("loop_passes", 0) > 4096 or config.get("vocab_size", 0) > 1 << 16):
        raise ValueError("the header does not fit the file")
    cfg = config_from(config)
    with torch.device("meta"):
        model = GPT(cfg).eval().requires_grad_(False)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    if sum(s.numel() for s in shapes.values()) > MAX_WEIGHTS:
        raise ValueError(f"the config asks for more than {MAX_WEIGHTS:,} weights")
    matrices, small = split({k: v for k, v in model.state_dict().items()})
    ends = np.cumsum([4 + size, *sizes])
    words, scale, escape, rest = (blob[a:b] for a, b in zip(ends, ends[1:]))

    banks = [as_bank(np.empty(shapes[name], np.void)).shape for name in matrices]
    n_rows, n_cols = [L * R for L, R, n in banks], [L * n for L, R, n in banks]
    row, col, sigma_row, sigma_col = (np.split(x, np.cumsum(n)[:-1]) for x, n in zip(
        unsqueeze(scale, *[(sum(n), "i1") for n in (n_rows, n_cols) * 2]), (n_rows, n_cols) * 2))
    col, sigma_col = ([c.reshape(L, n) for c, (L, R, n) in zip(x, banks)] for x in (col, sigma_col))
    (escapes,) = unsqueeze(escape, (n_escapes, "i4"))
    if len(words) % 2:
        raise ValueError("half a word of code")
    state = {name: np.empty((L * R, n), np.float32) for name, (L, R, n) in zip(matrices, banks)}
    for bank, start, stop, values in decode(np.frombuffer(words, "<u2").astype(np.uint16), escapes, banks, sigma_row, sigma_col, lanes, states):
        layer = np.arange(start, stop) // banks[bank][1]
        state[matrices[bank]][start:stop] = dequantise(values.T, row[bank][start:stop], col[bank][layer], constant)

    n_values = [shapes[name].numel() for name in small]
    n_rows = [n // max(shapes[name][-1], 1) for name, n in zip(small, n_values)]
    parts = unsqueeze(rest, (sum(n_rows), "i1"), (sum(n_rows), "i2"), (sum(n_values), "i2"))
    for name, *part in zip(small, *(np.split(x, np.cumsum(n)[:-1]) for x, n in zip(parts, (n_rows, n_rows, n_values)))):
        state[name] = decode_small(*part[:2], part[2].reshape(len(part[0]), -1))
    model.load_state_dict({k: torch.from_numpy(v).reshape(shapes[k]) for k, v in state.items()}, assign=True)
    return cfg, model


def digest(model: GPT) -> str:
    """sha256 over all names and weights: equal for two models only if they are the same bit for bit."""
    sha = hashlib.sha256()
    for name, x in model.state_dict().items():
        sha.update(name.encode() + x.contiguous().numpy().tobytes())
    return sha.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The artifact: a zip that Python runs, whose archive comment is the sha256 of every byte before it.


def build_artifact(files: dict[str, bytes], model: bytes) -> bytes:
    """files: {name: bytes}, compressed; model.bin stored. The same input gives the same bytes at any time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z:
        for name, data in [*files.items(), ("model.bin", model)]:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            z.writestr(info, data, zipfile.ZIP_STORED if name == "model.bin" else zipfile.ZIP_DEFLATED)
        z.comment = bytes(32)
    data = buffer.getvalue()
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def read_artifact(data: bytes, name: str, limit: int) -> bytes:
    """One file of the zip, at most limit bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as z, z.open(name) as file:
        out = file.read(limit + 1)
    if len(out) > limit:
        raise ValueError(f"{name} is larger than {limit:,} bytes")
    return out


def load(path):
    """artifact.pyz -> (Config, GPT in eval mode on the CPU in float32, Tokenizer); the same bits in every process.

    BadInput in one line for any file that pack.py did not write whole. A file that was made to harm can at most ask for
    MAX_WEIGHTS weights: nothing in it is executed, and every length is checked before it is used.
    """
    try:
        if (size := Path(path).stat().st_size) > MAX_FILE:
            raise BadInput(f"{path}: {size:,} bytes are no artifact")
        data = Path(path).read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}: pack a run first, python pack.py") from None
    if len(data) < 32 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise BadInput(f"{path}: damaged, cut short or not an artifact (the checksum at its end does not match)")
    try:
        tokenizer = Tokenizer(read_artifact(data, "tokenizer.json", 1 << 24))
        cfg, model = unpack_model(read_artifact(data, "model.bin", len(data)))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError, EOFError, struct.error,
            zipfile.BadZipFile, zlib.error, zstandard.ZstdError) as e:
        raise BadInput(f"{path}: not an artifact that this pack.py can read: {(str(e).splitlines() or [type(e).__name__])[0]}") from None
    if tokenizer.vocab_size != cfg.vocab_size:
        raise BadInput(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {cfg.vocab_size}")
    return cfg, model, tokenizer


def sources(run: Path) -> dict[str, bytes]:
    """The code that goes into the artifact: as it was when the run started, but for pack.py, which must be able to read what it writes."""
    files = {"__main__.py": MAIN.encode()}
    for name in SOURCES:
        path = run / "source" / name
        path = ROOT / name if name == "pack.py" or not path.is_file() else path
        try:
            files[name] = path.read_bytes()
        except OSError as e:
            raise BadInput(f"{path}: {e.strerror}") from None
        if (ROOT / name).is_file() and files[name] != (ROOT / name).read_bytes():
            print(f"note: {name} is not the one beside this pack.py; the artifact gets {path}")
    return files


# ----------------------------------------------------------------------------------------------------------------------
# Packing a checkpoint


def gather(checkpoint: dict, path: Path, device: str, plain: bool) -> list[list[Matrix]]:
    """Checkpoint -> per bank, the plans of its layers. plain: without statistics. BadInput names what is not finite or misshapen."""
    weights, stats = checkpoint["weights"], checkpoint["stats"]
    for kind, tensors in (("weights", weights), ("statistics", stats)):
        for name, x in tensors.items():
            if not (isinstance(x, Tensor) and x.is_floating_point() and x.isfinite().all()):
                raise BadInput(f"{path}: {kind} {name} are not all finite numbers")
    banks = []
    for bank, name in enumerate(split(weights)[0]):
        W, key = as_bank(weights[name].float()), name.removesuffix(".weight")
        L, R, n = W.shape
        if plain:
            banks.append([plan(bank, i, W[i].to(device), None, None) for i in range(L)])
            continue
        try:
            tokens = float(stats["tokens"].sum())
            H, g = (stats[f"{key}.{s}"].double().reshape(shape) / tokens for s, shape in (("H", (L, n, n)), ("g", (L, R))))
            if key == "embed":                                             # both uses: rows as the head, and as the input about as often
                H = H + stats["embed.S"].double() / tokens / g.sum().clamp(min=1e-12)
        except (KeyError, RuntimeError, ZeroDivisionError) as e:
            raise BadInput(f"{path}: the statistics of {name} do not fit it: {str(e).splitlines()[0]}") from None
        banks.append([plan(bank, i, W[i].to(device), H[i].to(device), g[i].to(device)) for i in range(L)])
    return banks


def rate_model(matrices: list[list[Matrix]]):
    """-> rate(log2 constant), bits of all weights, roughly: Gaussian weights whose variance is that of row times column."""
    sigma = []
    for m in (m for bank in matrices for m in bank):
        x = m.W.cpu().double().square() / torch.from_numpy(quarter(2 * m.row.astype(int))[:, None] * quarter(2 * m.col.astype(int)))
        row, col = x.mean(1, keepdim=True), x.mean(0, keepdim=True)
        sigma.append((0.5 * (row * col / x.mean().clamp(min=1e-300)).clamp(min=1e-60).log2()).flatten())
    count, edges = np.histogram(torch.cat(sigma).numpy(), 2000)
    return lambda log2c: float((0.5 * np.log2(1 + 4 ** np.minimum((edges[1:] + edges[:-1]) / 2 - log2c + 2.05, 100)) * count).sum())


def expected_kl(m: Matrix, values: np.ndarray, constant: float) -> float:
    """KL(full precision || packed) that this matrix' error causes, in nats per token, by the quadratic model: 1/2 sum_i g_i e_i H e_i."""
    E = m.W - torch.from_numpy(dequantise(values, m.row, m.col, constant)).to(m.W.device)
    return 0.5 * float(((E @ m.H) * E).sum(1).double() @ m.g.double()) if m.H is not None else math.nan


def search(pack_at, size_of, guess: float, finest: float, cap: int, slope: float):
    """-> the Packed whose file ends within 0.05 % below cap, or the one at the finest constant where that fits.

    pack_at(log2 constant, number of the try) -> Packed; size_of(Packed) -> bytes of the whole file; slope: bytes per octave.
    """
    x, fits, bursts, last = max(guess, finest), None, None, None           # (log2 constant, bytes) that fit best and burst least
    for number in range(1, 16):
        packed = pack_at(x, number)
        size = size_of(packed)
        if size <= cap:
            fits = (x, size, packed) if fits is None or size >= fits[1] else fits
            if x <= finest or size >= 0.9995 * cap:
                break
        else:
            bursts = (x, size) if bursts is None or x > bursts[0] else bursts
        if last is not None and last[0] != x and last[1] != size:
            slope = (last[1] - size) / (x - last[0])
        last = x, size
        x = max(x + (size - 0.99975 * cap) / max(slope, 1.0), finest)
        x = min(x, last[0] + 4)
        if fits and bursts and not bursts[0] < x < fits[0]:
            x = (fits[0] + bursts[0]) / 2
    if fits is None:
        raise BadInput(f"--cap_bytes={cap}: too small, this model does not fit; {last[1]:,} bytes were the last try")
    return fits[2]


# ----------------------------------------------------------------------------------------------------------------------
# Ledger


def make_ledger(args, run: Path, checkpoint: dict, matrices, packed: Packed, files: dict[str, bytes], data: bytes, seconds: float) -> dict:
    """Where the bytes went, and what each group of weights costs in quality: the dict of pack.json."""
    freq, histogram = tables().freq, packed.histogram
    ideal = (histogram * np.log2((1 << BITS) / np.maximum(freq, 1))).sum((1, 2))              # bits of each bank under the coder's model
    groups, compressor = [], zstandard.ZstdCompressor(level=22, threads=-1)
    for name, bank, values, bits in zip(split(checkpoint["weights"])[0], matrices, packed.values, ideal):
        symbols = values >> 1
        narrow = np.int8 if np.abs(symbols).max(initial=0) < 128 else np.int16 if np.abs(symbols).max() < 1 << 15 else np.int32
        rows = np.concatenate([packed.constant * quarter(m.row) * np.median(quarter(m.col)) for m in bank])
        groups.append({"group": name, "weights": values.size, "bits_per_weight": bits / max(values.size, 1), "step": float(np.median(rows)),
                       "kl": sum(expected_kl(m, v, packed.constant) for m, v in zip(bank, values)), "bytes": bits / 8,
                       "zstd_bytes": len(compressor.compress(symbols.astype(narrow).tobytes()))})
    counts = histogram.sum(0)
    bound = -(counts * np.log2(np.maximum(counts, 1) / np.maximum(counts.sum(1, keepdims=True), 1))).sum() / 8
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        sizes = {i.filename: i.compress_size for i in z.infolist() if i.filename != "model.bin"}
    n, coded = sum(g["weights"] for g in groups), packed.sections["weights"]
    return {"run": run.name, "method": args.method, "states": packed.states, "constant": packed.constant, "cap_bytes": args.cap_bytes,
            "artifact_bytes": len(data), "artifact_sha256": hashlib.sha256(data).hexdigest(), "weights": n,
            "bits_per_weight": 8 * (coded + packed.sections["scales"] + packed.sections["escapes"]) / max(n, 1),
            "expected_kl": sum(g["kl"] for g in groups), "groups": groups, "sections": packed.sections, "files": sizes,
            "zip_bytes": len(data) - len(packed.blob) - sum(sizes.values()), "entropy_bytes": bound,
            "above_entropy": coded / bound - 1 if bound else 0.0, "zstd_bytes": sum(g["zstd_bytes"] for g in groups),
            "pack_seconds": seconds, "environment": {"cpu": f"{os.cpu_count()} cores, {platform.machine()}", "device": args.device,
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def show_ledger(x: dict) -> str:
    total, kl = x["artifact_bytes"], x["expected_kl"]
    lines = [f"{'':24}{'weights':>12}{'bits each':>11}{'step':>11}{'KL share':>10}{'bytes':>12}{'zstd -22':>12}"]
    for g in x["groups"]:
        share = f"{g['kl'] / kl:.1%}" if kl and math.isfinite(kl) else "-"
        lines.append(f"{g['group']:24}{g['weights']:12,}{g['bits_per_weight']:11.3f}{g['step']:11.2e}{share:>10}{g['bytes']:12,.0f}{g['zstd_bytes']:12,}")
    over = x["sections"]["weights"] - sum(g["bytes"] for g in x["groups"])
    rest = {"coder's rounding, states": over, "steps and scales": x["sections"]["scales"] + x["sections"]["escapes"],
            "small vectors": x["sections"]["small"], "header": x["sections"]["header"], **x["files"], "zip directory, checksum": x["zip_bytes"]}
    lines += [f"{name:24}{'':44}{size:12,.0f}" for name, size in rest.items()]
    lines.append(f"{'artifact.pyz':24}{x['weights']:12,}{x['bits_per_weight']:11.3f}{'':21}{total:12,}   {total / x['cap_bytes']:.2%} of the cap")
    lines.append(f"code of the weights: {x['above_entropy']:.2%} above the entropy of its symbols in their contexts; zstd -22 needs "
                 f"{x['zstd_bytes'] / max(x['sections']['weights'], 1) - 1:+.1%} for the same symbols")
    if math.isfinite(kl):
        lines.append(f"expected KL(full precision || packed): {kl:.5f} nats per token, from the statistics in the checkpoint")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def find_run(name: str) -> Path:
    """RUN of the command line: a folder, a name under runs/, or empty for the newest."""
    run = Path(name or "runs/latest")
    if not name and run.is_file():
        run = run.parent / run.read_text().strip()                         # where links are not to be had
    run = run if run.is_dir() or not (Path("runs") / name).is_dir() else Path("runs") / name
    if not run.is_dir():
        raise BadInput(f"{run}: no such run; train one first: python train_gpt.py")
    return run.resolve() if run.is_symlink() else run


def verify(path: Path, wanted: str) -> None:
    """The artifact, loaded by its own code in another process, must be the packed model bit for bit. RuntimeError if not."""
    code = f"import sys; sys.path.insert(0, {str(path.resolve())!r}); import pack; print(pack.digest(pack.load(sys.path[0])[1]))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if child.stdout.split()[-1:] != [wanted]:
        raise RuntimeError(f"the artifact does not load as it was packed: {child.stderr.strip()[-2000:] or child.stdout}")


def parse(argv):
    parser = Parser(prog="pack.py", description=__doc__)
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="folder with a checkpoint.pt, or its name under runs/; empty: the newest")
    parser.add_argument("--cap_bytes", type=int, default=16_000_000, metavar="N", help="bytes of the whole file, at most")
    parser.add_argument("--method", default="trellis", choices=["trellis", "scalar", "rtn"],
                        help="trellis: error feedback in a trellis; scalar: error feedback; rtn: round to nearest")
    parser.add_argument("--kl", type=float, default=1e-4, metavar="X", help="nats per token of expected KL below which finer steps buy nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME", help="cuda or cpu: where to quantise")
    parser.add_argument("--compare", action="store_true", help="also measure what other packers make of this checkpoint, on validation data")
    args = parser.parse_args(argv)
    if args.cap_bytes <= 0 or not 0 < args.kl < math.inf:
        raise BadInput(f"--cap_bytes={args.cap_bytes} and --kl={args.kl} must be above 0")
    if args.device not in ("cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device={args.device} must be cpu, or cuda where there is one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    run, start = find_run(args.run), time.perf_counter()
    path = run / "checkpoint.pt"
    checkpoint = load_checkpoint(path)
    if not checkpoint["tokenizer"]:
        raise BadInput(f"{path}: trained on synthetic tokens, so there is no tokenizer and nothing to score")
    if plain := args.method == "rtn" or not checkpoint["stats"]:
        args.method = "rtn"
        print(f"ROUNDING TO NEAREST, which costs several times the quality: "
              f"{'as asked' if checkpoint['stats'] else f'{path} has no statistics (train with --calib_tokens above 0)'}")
    files = sources(run) | {"tokenizer.json": checkpoint["tokenizer"].encode()}
    config, weights = asdict(checkpoint["config"]), checkpoint["weights"]
    matrices = gather(checkpoint, path, args.device, plain)
    states = TRELLIS if args.method == "trellis" else 1

    def pack_at(log2c: float, number: int) -> Packed:
        return pack_model(config, weights, matrices, float(np.float32(2.0 ** log2c)), states, f"pass {number}: quantised")

    size_of = lambda packed: len(build_artifact(files, packed.blob))
    fixed = size_of(Packed(b"", {}, [], 0.0, None, states)) + 1500 + sum(x.numel() for k, x in weights.items() if k in split(weights)[1])
    all_m = [m for bank in matrices for m in bank]
    if plain:
        finest = -5.0                                                      # 1/32 of a row's RMS: 7 bits
    else:
        unit = sum(float(m.cost.double().sum() * (m.g.cpu().double() * torch.from_numpy(quarter(2 * m.row.astype(int)))).sum()) / 24 for m in all_m)
        finest = 0.5 * math.log2(args.kl / max(unit, 1e-30))
    rate, low, high = rate_model(matrices), finest, finest + 40.0
    for _ in range(40):                                                    # where the rough model has the file at the cap
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) / 8 + fixed > args.cap_bytes else (low, middle)
    slope = max((rate(low - 0.1) - rate(low + 0.1)) / 0.2 / 8, 1.0)
    packed = search(pack_at, size_of, low, finest, args.cap_bytes, slope)

    data = build_artifact(files, packed.blob)
    with atomic_write(run / "artifact.pyz") as f:
        f.write(data)
    verify(run / "artifact.pyz", digest(load(run / "artifact.pyz")[1]))
    ledger = make_ledger(args, run, checkpoint, matrices, packed, files, data, time.perf_counter() - start)
    text = show_ledger(ledger)
    if len(data) < 0.9995 * args.cap_bytes:
        text += (f"\nsmaller than the cap of {args.cap_bytes:,} bytes: packed at the best quality setting "
                 f"({'1/32 of a row' if plain else f'expected KL {args.kl:g}'}); finer steps buy nothing measurable")
    for name, content in (("pack.txt", text + "\n"), ("pack.json", json.dumps(ledger, indent=1) + "\n")):
        with atomic_write(run / name, "w") as f:
            f.write(content)
    print(f"{text}\n---\nartifact_bytes: {len(data)}\npack_seconds: {ledger['pack_seconds']:.1f}\nartifact: {run / 'artifact.pyz'}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
