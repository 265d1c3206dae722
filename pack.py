"""Pack a trained model into one file: runs/<run>/checkpoint.pt -> runs/<run>/artifact.pyz, at most --cap_bytes on disk.

    python pack.py                       the newest run; ends just below the cap, or where finer steps buy nothing
    python pack.py runs/mine --compare   also measures what other packers make of this checkpoint, on validation data

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
from train_gpt import GPT, SOURCES, config_from, environment, load_checkpoint

ROOT = Path(__file__).resolve().parent
MAIN = """import sys
import eval_bpb
from data.dataset import command
sys.exit(command(lambda: eval_bpb.main(sys.argv)))
"""
MAX_FILE, MAX_WEIGHTS = 1 << 28, 1 << 27    # bytes of a file, weights of a model: more is refused unread

# ----------------------------------------------------------------------------------------------------------------------
# Entropy coder. Integers only, so that encoder and decoder agree bit for bit on every machine.

BITS = 14                                   # probabilities are multiples of 2^-14
LOW, HIGH = -24, 24                         # contexts: sigma = 2^(index / 4) steps, from 1/64 to 64 steps
CODES = {1: (0, 0), 4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10)}     # Ungerboeck; 1: no trellis


@lru_cache
def tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """-> radius (contexts,) int32, freq and start (contexts, symbols) uint32, symbol (contexts << BITS,) uint16.

    Context 2 * (index - LOW) + b is that of the value k + b / 2 in steps. Its symbols are k + radius for |k| <= radius,
    and last the escape. freq and their running sum start are in units of 2^-BITS, and symbol is the inverse of start.
    p(k) ~ 0.95 N(0, sigma) + 0.05 Laplace of the same variance, integrated over the step at eight points.
    """
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
        inverse = powers[256 * (-index % 4)] << 8 >> 8 - (-index // 4)     # 1 / sigma, 128 fractional bits
        gauss = 2 * log2e * inverse * inverse >> 276                       # exponents of 2, in 2^-42, of x in 1/16:
        laplace = 64 * math.isqrt(2 * log2e * log2e) * inverse >> 148      # x^2 / (2 sigma^2) and sqrt(2) x / sigma
        r = 6 * (one * one // inverse) // one + 2
        k = np.arange(-r, r + 1)
        for b in (0, 1):
            x = np.abs(8 * (2 * k + b)[:, None] + np.arange(-7, 8, 2))     # eight points of the step
            p = (1024 * exp2(x * x * gauss >> 32) + 96 * exp2(x * laplace >> 32)).sum(1) >> 10
            share = ((1 << BITS) - len(k) - 1) * np.cumsum(p) // p.sum()   # beyond one for each symbol and the escape
            radius.append(r)
            rows.append(np.append(1 + np.diff(share, prepend=0), 1))
    freq = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, f in zip(freq, rows):
        row[:len(f)] = f
    start = np.cumsum(freq, 1) - freq
    symbol = np.concatenate([np.repeat(np.arange(f.size), f) for f in freq])
    return np.array(radius, np.int32), freq.astype(np.uint32), start.astype(np.uint32), symbol.astype(np.uint16)


def next_states(states: int) -> np.ndarray:
    """(states, 2) int32: the state after a k of parity 0 and 1. A state's lowest bit is the b of the next k + b / 2."""
    h0, h1 = CODES[states]
    s = np.arange(states, dtype=np.int32)[:, None]
    return (s >> 1) ^ (h0 >> 1) * (s & 1) ^ (h1 >> 1) * np.arange(2, dtype=np.int32)


def chunks(shapes: list[tuple[int, int, int]], lanes: int):
    """Shapes (L, R, n) of the banks -> (bank, first row, last row + 1) of the pieces, each coded column by column."""
    for bank, (L, R, n) in enumerate(shapes):
        for start in range(0, L * R if n else 0, lanes):
            yield bank, start, min(start + lanes, L * R)


def contexts(row: np.ndarray, col: np.ndarray, R: int, start: int, stop: int) -> np.ndarray:
    """Exponents row (L * R,), col (L, n) of sigma -> contexts (n, stop - start) int32 of these rows, for b = 0."""
    layer = np.arange(start, stop) // R
    return 2 * (np.clip(row[start:stop].astype(np.int32) + col.T[:, layer], LOW, HIGH) - LOW)


def encode(values: list, rows: list, cols: list, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values[i] (L, R, n) int32 in half steps, exponents rows[i] (L * R,) and cols[i] (L, n) of their sigma
    -> words (uint16) that decode() reads, escapes (int32), histogram (banks, contexts, symbols) int64.

    The parity of a value is the trellis' b. Each lane has a rANS state of 32 bits, all share one stream of words: a
    step codes one column of up to `lanes` rows. Works backwards, so that decoding goes forwards.
    """
    (radii, freq, begin, _), x = tables(), np.full(lanes, 1 << 16, np.uint32)
    words, escapes, histogram = [], [], np.zeros((len(values), freq.size), np.int64)
    for bank, start, stop in reversed(list(chunks([v.shape for v in values], lanes))):
        L, R, n = values[bank].shape
        v = values[bank].reshape(L * R, n)[start:stop].T                   # (n, m)
        context = contexts(rows[bank], cols[bank], R, start, stop) + (v & 1)
        k, radius = v >> 1, radii[context]
        outside = np.abs(k) > radius
        escapes.append(k[outside])
        symbol = np.where(outside, 2 * radius + 1, k + radius) + context * freq.shape[1]
        histogram[bank] += np.bincount(symbol.ravel(), minlength=freq.size)
        head = x[:stop - start]
        for f, c in zip(freq.ravel()[symbol][::-1], begin.ravel()[symbol][::-1]):
            full = head >= f << np.uint32(32 - BITS)
            words.append(head[full].astype(np.uint16))
            head[full] >>= np.uint32(16)
            head[:] = (head // f << np.uint32(BITS)) + head % f + c
    words.append(np.stack([x & 0xffff, x >> 16], 1).ravel().astype(np.uint16))
    escapes = np.concatenate([np.empty(0, np.int32), *escapes[::-1]])
    return np.concatenate(words[::-1]), escapes, histogram.reshape(-1, *freq.shape)


def decode(words: np.ndarray, escapes: np.ndarray, shapes, rows, cols, lanes: int, states: int):
    """Inverse of encode(): yields (bank, first row, last row + 1, values (n, rows) int32). ValueError on a bad code."""
    (radii, freq, begin, symbols), following = tables(), next_states(states).ravel()
    if len(words) < 2 * lanes:
        raise ValueError("the code is cut short")
    x = words[:2 * lanes].reshape(lanes, 2).astype(np.uint32)
    x = x[:, 0] | x[:, 1] << np.uint32(16)
    at, escape, mask = 2 * lanes, 0, np.uint32((1 << BITS) - 1)
    width, freq, begin = freq.shape[1], freq.ravel(), begin.ravel()
    for bank, start, stop in chunks(shapes, lanes):
        base = contexts(rows[bank], cols[bank], shapes[bank][1], start, stop)
        values, state, head = np.empty_like(base), np.zeros(stop - start, np.int32), x[:stop - start]
        for j, context in enumerate(base):
            b = state & 1
            context += b
            slot = head & mask
            symbol = symbols[(context << BITS) + slot]
            radius = radii[context]
            k = symbol - radius
            where = context * width + symbol
            head[:] = freq[where] * (head >> np.uint32(BITS)) + slot - begin[where]
            low = (head < 1 << 16).nonzero()[0]
            if at + len(low) > len(words):
                raise ValueError("the code is cut short")
            head[low] = head[low] << np.uint32(16) | words[at:at + len(low)]
            at += len(low)
            outside = k > radius
            if outside.any():
                number = np.count_nonzero(outside)
                if escape + number > len(escapes):
                    raise ValueError("escapes are missing")
                k[outside] = escapes[escape:escape + number]
                escape += number
            values[j] = 2 * k + b
            state = following[2 * state + (k & 1)]
        yield bank, start, stop, values
    if at != len(words) or escape != len(escapes) or (x != 1 << 16).any():
        raise ValueError("the code does not end where it should")


def scales(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values (L, R, n) in half steps -> row (L * R,), col (L, n) int8, exponents: sigma ~ 2^((row + col) / 4) steps."""
    v = values.astype(np.float32) / 2
    exponent = lambda square: np.clip(np.round(2 * np.log2(np.maximum(square, 1e-9))), -60, 60)
    col = exponent((v * v).mean(1))
    v *= np.exp2(-col / 4, dtype=np.float32)[:, None]
    return exponent((v * v).mean(2)).reshape(-1).astype(np.int8), col.astype(np.int8)


# ----------------------------------------------------------------------------------------------------------------------
# Quantiser. The numbers are KL measured on training text: proxy preset after 25 minutes on a CPU, 3.4 bits a weight.

TRELLIS = 8                                 # states; 32 take four times as long for no less KL
ROW_EXPONENT = 0.45                         # rows' steps ~ g^-0.45; 0.5 is the theory: 4 % more KL, 0.35: 9 % more
G_RANGE = 1e-3, 20.0                        # g of a row, relative to its matrix, is held in this range
DAMP = 0.05                                 # of the mean of H's diagonal, added; 0.01: 10 % more KL, 0.1: 2 % more
ROWS_AT_ONCE, BLOCK, LOOKAHEAD = 1024, 128, 16      # rows, columns in the trellis at a time; columns until it decides


@dataclass
class Matrix:
    """One matrix W (R, n) of a bank and what is known about it. Its steps are constant * 2^((row_i + col_j) / 4)."""
    W: Tensor               # (R, n) float32
    row: np.ndarray         # (R,) int8
    col: np.ndarray         # (n,) int8
    feedback: Tensor        # (n, n) float32, upper triangle: an error of one step in column i, in steps of column j
    cost: Tensor            # (n,) float32: of a squared error of one step, after what later columns make up for
    H: Tensor | None        # (n, n) float32, per token
    g: Tensor | None        # (R,) float32, per token


def quarter(exponent: np.ndarray) -> np.ndarray:
    """2^(exponent / 4) float64, by operations that are exact everywhere."""
    exponent = np.asarray(exponent, np.int64)
    fraction = np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])
    return np.ldexp(fraction[exponent & 3], exponent >> 2)


def dequantise(values: np.ndarray, row: np.ndarray, col: np.ndarray, constant: float) -> np.ndarray:
    """values (R, n) int32 in half steps, exponents row (R,), col (n,) or (R, n) -> W (R, n) float32, exactly."""
    row_step, col_step = (constant / 2 * quarter(row)).astype(np.float32), quarter(col).astype(np.float32)
    return values.astype(np.float32) * row_step[:, None] * col_step


def plan(W: Tensor, H: Tensor | None, g: Tensor | None) -> Matrix:
    """Choose the exponents of the steps. W (R, n); H (n, n) and g (R,) per token, or None: then each row's RMS decides.

    With H^-1 = U^T U, GPTQ's error costs exactly 1/2 sum_ij g_i (step_ij / U_jj)^2 e_ij^2, e in steps, and a weight's
    rate falls by log2 step. So all weights pay alike where step_ij = constant * g_i^-1/2 U_jj: reverse water-filling,
    in which a direction that is not worth a step rounds to zero by itself.
    """
    grid = lambda x: np.clip(np.round(4 * np.log2(x)), -127, 127).astype(np.int8)
    n, device = W.size(1), W.device
    eye = torch.eye(n, dtype=torch.float64, device=device)
    if H is None:
        rms = W.double().square().mean(1).sqrt().clamp(min=1e-6).cpu().numpy()
        return Matrix(W, grid(rms), np.zeros(n, np.int8), eye.float(), torch.ones(n, device=device), None, None)
    level = H.diagonal().double().mean()
    damped = H.double() + eye * (DAMP * level if level > 0 else 1.0)
    # U is the inverse of H's upper Cholesky factor: flip, factorise, flip back.
    U = torch.linalg.solve_triangular(torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1), eye, upper=True)
    mean = g.double().mean().clamp(min=1e-12)
    relative = (g.double() / mean).clamp(*G_RANGE)
    share = relative ** -ROW_EXPONENT
    share = share * ((relative * share.square()).mean() * mean) ** -0.5    # so that the mean of g share^2 is 1
    row, col = grid(share.cpu().numpy()), grid(U.diagonal().cpu().numpy())
    step = torch.from_numpy(quarter(col)).to(device)
    weight = step / U.diagonal()
    feedback, cost = U * weight[:, None] / step, weight.square()
    return Matrix(W, row, col, feedback.float(), cost.float(), H.float(), g.float())


def quantise(m: Matrix, constant: float, states: int) -> np.ndarray:
    """-> values (R, n) int32 in half steps: GPTQ with plain rounding (states 1: even values), or in a trellis."""
    device = m.W.device
    row, col = (torch.from_numpy(x).to(device) for x in (1 / (constant * quarter(m.row)), 1 / quarter(m.col)))
    out = np.empty(m.W.shape, np.int32)
    for start in range(0, len(m.W), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        X = (m.W[rows] * row[rows, None] * col).T.float().clamp(-2 ** 29, 2 ** 29).contiguous()    # (n, rows), in steps
        values, state = torch.empty_like(X, dtype=torch.int32), torch.zeros(X.size(1), dtype=torch.int64, device=device)
        for a in range(0, len(X), BLOCK):
            b = min(a + BLOCK, len(X))
            block, A, ahead = X[a:b], m.feedback[a:b, a:b], slice(a, b + LOOKAHEAD)
            visited, odd = survivor(X[ahead], m.feedback[ahead, ahead], m.cost[ahead], state, states)
            state = visited[b - a]
            E = torch.empty_like(block)
            for j in range(b - a):
                half = visited[j] & 1
                y = block[j] - half / 2
                even = 2 * (y / 2).round() if states > 1 else y.round()
                k = torch.where(odd[j], even + (y - even).sign() + (y == even), even)   # of the path's parity
                E[j] = y - k
                values[a + j] = (2 * k + half).int()
                block[j + 1:] -= A[j, j + 1:, None] * E[j]
            X[b:] -= m.feedback[a:b, b:].T @ E
        out[rows] = values.T.cpu().numpy()
    return out


def survivor(X: Tensor, A: Tensor, cost: Tensor, state: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """The cheapest path of each row through the trellis, over the columns X (n, R) in steps, from state (R,)
    -> states visited (n + 1, R), the last after the path's end, and parities of k (n, R) bool on the way.

    Viterbi, where each of the states keeps its own residual: the survivor's errors are fed forward by A as GPTQ does.
    """
    n, R = X.shape
    visited = torch.zeros(n + 1, R, dtype=torch.int64, device=X.device)
    parity = torch.zeros(n, R, dtype=torch.bool, device=X.device)
    if states == 1:
        return visited, parity
    following = next_states(states)
    before = [[int(np.flatnonzero(following[:, z] == t)[0]) for t in range(states)] for z in (0, 1)]   # by k's parity z
    from_even, from_odd = (torch.tensor(b, device=X.device) for b in before)
    half = (torch.arange(states, device=X.device) & 1)[:, None] / 2
    metric = torch.full((states, R), torch.inf, device=X.device).scatter_(0, state[None], 0.0)
    residual = X[:, None].repeat(1, states, 1)                             # (n, states, R)
    spare, choices = torch.empty_like(residual), torch.empty(n, states, R, dtype=torch.bool, device=X.device)
    for j in range(n):
        y = residual[j] - half
        even = y - 2 * (y / 2).round()                                     # errors of the nearest even and odd k
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
    visited[n] = metric.argmin(0)
    for j in reversed(range(n)):
        parity[j] = choices[j].gather(0, visited[j + 1][None])[0]
        visited[j] = torch.where(parity[j], from_odd[visited[j + 1]], from_even[visited[j + 1]])
    return visited, parity


def expected_kl(m: Matrix, values: np.ndarray, constant: float) -> float:
    """KL(full precision || packed), nats per token, by this matrix' error: 1/2 sum_i g_i e_i H e_i^T; 0 without H."""
    if m.H is None:
        return 0.0
    E = m.W - torch.from_numpy(dequantise(values, m.row, m.col, constant)).to(m.W.device)
    return 0.5 * float(((E @ m.H) * E).sum(1).double() @ m.g.double())


# ----------------------------------------------------------------------------------------------------------------------
# Model <-> bytes

SMALL_BITS = 6                              # steps of small vectors: 2^-6 of their spread; KL 6e-6, with 5 bits 3e-5


def split(state: dict) -> tuple[list[str], list[str]]:
    """A model's tensors -> names of the matrices, which banks of the quantiser they are, and of the small vectors."""
    matrices = [name for name in state if name in (*GPT.MATRICES, "embed.weight")]
    return matrices, [name for name in state if name not in matrices]


def bank_shape(shape) -> tuple[int, int, int]:
    """(R, n) or (L, R, n) -> (L, R, n)."""
    return (1, *shape) if len(shape) == 2 else tuple(shape)


def encode_small(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (..., n) -> exponent (rows,) int8, offset (rows,) int16, q (rows, n) int16: (offset + q) 2^(exponent / 4)."""
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    mean = x.mean(1)
    spread = np.maximum(x.std(1), np.maximum(np.abs(mean) / 64, 1e-9))
    exponent = np.clip(np.round(4 * (np.log2(spread) - SMALL_BITS)), -127, 127).astype(np.int8)
    step = quarter(exponent)
    offset = np.round(mean / step).astype(np.int16)
    return exponent, offset, np.round(x / step[:, None] - offset[:, None]).astype(np.int16)


def decode_small(exponent: np.ndarray, offset: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Inverse of encode_small() -> (rows, n) float32."""
    return (offset.astype(np.float32)[:, None] + q.astype(np.float32)) * quarter(exponent).astype(np.float32)[:, None]


def squeeze(*arrays: np.ndarray) -> bytes:
    """Integers -> zstd of their bytes, of each array the low ones first."""
    little = [(a.astype(a.dtype.newbyteorder("<")).tobytes(), a.itemsize) for a in arrays]
    planes = [np.frombuffer(data, np.uint8).reshape(-1, size).T for data, size in little]
    return zstandard.ZstdCompressor(level=19).compress(b"".join(plane.tobytes() for plane in planes))


def unsqueeze(blob: bytes, *wanted: tuple[int, str]) -> list[np.ndarray]:
    """Inverse of squeeze(); wanted: (count, dtype) of each array. ValueError unless the sizes are exactly these."""
    sizes = [count * np.dtype(dtype).itemsize for count, dtype in wanted]
    if zstandard.get_frame_parameters(blob).content_size != sum(sizes):
        raise ValueError("a section has another size than the config says")
    data, out, at = zstandard.ZstdDecompressor().decompress(blob), [], 0
    for (count, dtype), size in zip(wanted, sizes):
        planes = np.frombuffer(data[at:at + size], np.uint8).reshape(np.dtype(dtype).itemsize, count)
        out.append(np.frombuffer(planes.T.tobytes(), np.dtype(dtype).newbyteorder("<")).astype(dtype))
        at += size
    return out


@dataclass
class Packed:
    """model.bin and what the ledger tells about it."""
    blob: bytes
    sections: dict[str, int]        # bytes
    values: list[np.ndarray]        # per bank (L, R, n) int32 in half steps
    constant: float
    histogram: np.ndarray           # (banks, contexts, symbols): how often each was coded
    states: int


def pack_model(config: dict, weights: dict, matrices: list[list[Matrix]], constant: float, states: int, label=""):
    """Quantise and code a model with one constant for all steps -> Packed. matrices: per bank, its layers."""
    jobs, threads = [m for bank in matrices for m in bank], torch.get_num_threads()
    with Progress(label, sum(m.W.numel() for m in jobs), "weights") as progress:
        def run(m):
            values = quantise(m, constant, states)
            progress.add(m.W.numel())
            return values
        torch.set_num_threads(1)                                           # matrices side by side: kernels are small
        try:
            with ThreadPoolExecutor(threads if jobs[0].W.device.type == "cpu" else 1) as pool:
                done = iter(list(pool.map(run, jobs)))
        finally:
            torch.set_num_threads(threads)
    values = [np.stack([next(done) for _ in bank]) for bank in matrices]
    small = [encode_small(weights[name].numpy()) for name in split(weights)[1]]
    lanes = 1 << min(max((sum(v.size for v in values) >> 13).bit_length(), 4), 11)           # 4 bytes of start-up each
    rows, cols = zip(*[scales(v) for v in values])
    words, escapes, histogram = encode(values, rows, cols, lanes)
    sections = {
        "weights": words.astype("<u2").tobytes(),
        "scales": squeeze(np.concatenate([m.row for m in jobs]), np.concatenate([m.col for m in jobs]),
                          np.concatenate(rows), np.concatenate([c.ravel() for c in cols])),
        "escapes": squeeze(escapes),
        "small": squeeze(*[np.concatenate([x[i].ravel() for x in small]) for i in range(3)])}
    header = {"config": config, "constant": constant, "states": states, "lanes": lanes, "escapes": len(escapes)}
    header = json.dumps({**header, "sections": [len(x) for x in sections.values()]}, separators=(",", ":")).encode()
    head = struct.pack("<I", len(header)) + header
    sizes = {"header": len(head), **{k: len(v) for k, v in sections.items()}}
    return Packed(b"".join([head, *sections.values()]), sizes, values, constant, histogram, states)


def unpack_model(blob: bytes):
    """model.bin -> (Config, GPT). Every size is checked before it is used: ValueError or BadInput."""
    if len(blob) < 4 or (size := struct.unpack_from("<I", blob)[0]) > min(len(blob) - 4, 1 << 16):
        raise ValueError("the header is cut short")
    header = json.loads(blob[4:4 + size])
    config, constant, states, lanes, n_escapes, sizes = (
        header[k] for k in ("config", "constant", "states", "lanes", "escapes", "sections"))
    if (any(type(v) is not int or not 0 <= v < 1 << 31 for v in (states, lanes, n_escapes, *sizes))
            or states not in CODES or not 1 <= lanes <= 1 << 16 or len(sizes) != 4
            or sum(sizes) != len(blob) - 4 - size or type(constant) is not float or not 0 < constant < 1e30
            or config["n_layer"] * config["loop_passes"] > 4096 or config["vocab_size"] > 1 << 16):
        raise ValueError("the header does not fit the file")
    cfg = config_from(config)
    with torch.device("meta"):
        model = GPT(cfg).eval().requires_grad_(False)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    if sum(s.numel() for s in shapes.values()) > MAX_WEIGHTS:
        raise ValueError(f"the config asks for more than {MAX_WEIGHTS:,} weights")
    matrices, small = split(shapes)
    banks = [bank_shape(shapes[name]) for name in matrices]
    ends = np.cumsum([4 + size, *sizes])
    words, scale, escape, rest = (blob[a:b] for a, b in zip(ends, ends[1:]))

    def cut(arrays, sizes):
        """Arrays of one layout -> for each, its pieces of these sizes."""
        return [np.split(x, np.cumsum(n)[:-1]) for x, n in zip(arrays, sizes)]

    sides = [[L * R for L, R, n in banks], [L * n for L, R, n in banks]] * 2
    row, col, sigma_row, sigma_col = cut(unsqueeze(scale, *[(sum(n), "i1") for n in sides]), sides)
    col, sigma_col = ([c.reshape(L, n) for c, (L, R, n) in zip(x, banks)] for x in (col, sigma_col))
    (escapes,) = unsqueeze(escape, (n_escapes, "i4"))
    words = np.frombuffer(words, "<u2").astype(np.uint16)
    state = {name: np.empty((L * R, n), np.float32) for name, (L, R, n) in zip(matrices, banks)}
    for bank, start, stop, values in decode(words, escapes, banks, sigma_row, sigma_col, lanes, states):
        layer = np.arange(start, stop) // banks[bank][1]
        state[matrices[bank]][start:stop] = dequantise(values.T, row[bank][start:stop], col[bank][layer], constant)

    n_values = [shapes[name].numel() for name in small]
    n_rows = [n // max(shapes[name][-1], 1) for name, n in zip(small, n_values)]
    parts = unsqueeze(rest, (sum(n_rows), "i1"), (sum(n_rows), "i2"), (sum(n_values), "i2"))
    for name, exponent, offset, q in zip(small, *cut(parts, (n_rows, n_rows, n_values))):
        state[name] = decode_small(exponent, offset, q.reshape(len(offset), -1)) if q.size else q.astype(np.float32)
    if not all(np.isfinite(x).all() for x in state.values()):
        raise ValueError("weights are not finite")
    model.load_state_dict({k: torch.from_numpy(x).reshape(shapes[k]) for k, x in state.items()}, assign=True)
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
    """files {name: bytes} compressed, model.bin stored. The same input gives the same bytes at any time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z:
        for name, data in [*files.items(), ("model.bin", model)]:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            z.writestr(info, data, zipfile.ZIP_STORED if name == "model.bin" else zipfile.ZIP_DEFLATED)
        z.comment = bytes(32)
    data = buffer.getvalue()
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


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
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            if max(z.getinfo(name).file_size for name in ("tokenizer.json", "model.bin")) > len(data) + (1 << 24):
                raise ValueError("its parts are larger than they can be")
            tokenizer = Tokenizer(z.read("tokenizer.json"))
            cfg, model = unpack_model(z.read("model.bin"))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError, EOFError, struct.error,
            zipfile.BadZipFile, zlib.error, zstandard.ZstdError) as e:
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
    """Checkpoint -> per bank, the plans of its layers; plain: without statistics. BadInput names what is not finite.

    A looped layer makes the same error in each pass, so H and g, both sums over the passes, are not divided by their
    number: the KL measured for such layers is 2 to 4 times that of passes that err independently.
    """
    weights, stats = checkpoint["weights"], checkpoint["stats"]
    for kind, tensors in (("weights", weights), ("statistics", stats)):
        for name, x in tensors.items():
            if not (isinstance(x, Tensor) and x.is_floating_point() and x.isfinite().all()):
                raise BadInput(f"{path}: {kind} {name} are not all finite numbers")
    banks = []
    for name in split(weights)[0]:
        L, R, n = bank_shape(weights[name].shape)
        W, key = weights[name].float().view(L, R, n).to(device), name.removesuffix(".weight")
        if plain:
            banks.append([plan(W[i], None, None) for i in range(L)])
            continue
        try:
            tokens = float(stats["tokens"].sum())
            H, g = (stats[f"{key}.{s}"].view(shape) / tokens for s, shape in (("H", (L, n, n)), ("g", (L, R))))
            if key == "embed":                                            # a token is input as often as it is predicted
                H = H + stats["embed.S"] / tokens / g.sum().clamp(min=1e-12)
            banks.append([plan(W[i], H[i].to(device), g[i].to(device)) for i in range(L)])
        except (KeyError, RuntimeError, ZeroDivisionError) as e:
            raise BadInput(f"{path}: the statistics of {name} do not fit it: {str(e).splitlines()[0]}") from None
    return banks


def search(pack_at, size_of, finest: float, cap: int, slope: float) -> Packed:
    """-> the model whose file ends within 0.05 % below cap, or the one at the finest constant where that fits.

    pack_at(log2 constant, number of the try) -> Packed; size_of(Packed) -> bytes of the file; slope: bytes per octave.
    """
    x, fits, bursts, last = finest, None, None, None          # (log2 constant, bytes)
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
        x = max(x + min((size - 0.99975 * cap) / max(slope, 1.0), 4.0), finest)
        if fits and bursts and not bursts[0] < x < fits[0]:
            x = (fits[0] + bursts[0]) / 2
    if fits is None:
        raise BadInput(f"--cap_bytes={cap}: this model does not fit; the smallest file tried has {last[1]:,} bytes")
    return fits[2]


# ----------------------------------------------------------------------------------------------------------------------
# Ledger


def entropies(histogram: np.ndarray) -> tuple[np.ndarray, float]:
    """(banks, contexts, symbols) -> bytes of each bank by the coder's probabilities, of all by the symbols' own."""
    ideal = (histogram * np.log2((1 << BITS) / np.maximum(tables()[1], 1))).sum((1, 2)) / 8
    n = histogram.sum(0)
    return ideal, -(n * np.log2(np.maximum(n, 1) / np.maximum(n.sum(1, keepdims=True), 1))).sum() / 8


def make_ledger(args, run: Path, weights: dict, matrices, packed: Packed, data: bytes, seconds: float) -> dict:
    """Where the bytes went, and what each group of weights costs in quality: the dict of pack.json."""
    sections, (ideal, bound) = packed.sections, entropies(packed.histogram)
    groups, compressor = [], zstandard.ZstdCompressor(level=22, threads=-1)
    with Progress("comparing with zstd -22:", sum(v.size for v in packed.values), "weights") as progress:
        for name, bank, values, size in zip(split(weights)[0], matrices, packed.values, ideal):
            symbols = values >> 1
            width = next(t for t in (np.int8, np.int16, np.int32) if np.abs(symbols).max() <= np.iinfo(t).max)
            steps = np.concatenate([packed.constant * quarter(m.row) * np.median(quarter(m.col)) for m in bank])
            groups.append({
                "group": name, "weights": values.size, "bits_per_weight": 8 * size / values.size, "bytes": size,
                "step": float(np.median(steps)),
                "kl": sum(expected_kl(m, v, packed.constant) for m, v in zip(bank, values)),
                "zstd_bytes": len(compressor.compress(symbols.astype(width).tobytes()))})
            progress.add(values.size)
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        files = {i.filename: i.compress_size for i in z.infolist() if i.filename != "model.bin"}
    total = lambda key: sum(g[key] for g in groups)
    coded = sections["weights"] + sections["scales"] + sections["escapes"]
    return {"run": run.name, "method": args.method, "states": packed.states, "constant": packed.constant,
            "cap_bytes": args.cap_bytes, "artifact_bytes": len(data),
            "artifact_sha256": hashlib.sha256(data).hexdigest(),
            "weights": total("weights"), "bits_per_weight": 8 * coded / total("weights"), "expected_kl": total("kl"),
            "groups": groups, "sections": sections, "files": files,
            "zip_bytes": len(data) - len(packed.blob) - sum(files.values()), "zstd_bytes": total("zstd_bytes"),
            "entropy_bytes": bound, "above_entropy": sections["weights"] / max(bound, 1) - 1, "pack_seconds": seconds,
            "environment": environment(torch.device(args.device), 1)}


def show_ledger(x: dict) -> str:
    """The ledger as text."""
    kl, sections = x["expected_kl"], x["sections"]
    lines = [("", "weights", "bits each", "step", "KL share", "bytes", "zstd -22")]
    for g in x["groups"]:
        lines.append((g["group"], f"{g['weights']:,}", f"{g['bits_per_weight']:.3f}", f"{g['step']:.2e}",
                      f"{g['kl'] / kl:.1%}" if kl > 0 else "-", f"{g['bytes']:,.0f}", f"{g['zstd_bytes']:,}"))
    rest = {"coder: rounding, start-up": sections["weights"] - sum(g["bytes"] for g in x["groups"]),
            "steps, scales, escapes": sections["scales"] + sections["escapes"], "small vectors": sections["small"],
            "header": sections["header"], **x["files"], "zip directory, checksum": x["zip_bytes"]}
    lines += [(name, "", "", "", "", f"{size:,.0f}", "") for name, size in rest.items()]
    size = x["artifact_bytes"]
    lines.append(("artifact.pyz", f"{x['weights']:,}", f"{x['bits_per_weight']:.3f}", "", "", f"{size:,}",
                  f"{size / x['cap_bytes']:.1%} of cap"))
    widths = -26, 12, 11, 11, 10, 12, 14
    lines = ["".join(f"{cell:{'<' if w < 0 else '>'}{abs(w)}}" for cell, w in zip(line, widths)) for line in lines]
    lines.append(f"the weights' code is {x['above_entropy']:.2%} above the entropy of its symbols in their contexts; "
                 f"zstd -22 needs {x['zstd_bytes'] / sections['weights'] - 1:+.1%} for the same symbols")
    if kl > 0:
        lines.append(f"expected KL(full precision || packed): {kl:.5f} nats per token, by the checkpoint's statistics")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def find_run(name: str) -> Path:
    """RUN of the command line: a folder, a name under runs/, or empty for the newest run."""
    run = Path(name or "runs/latest")
    if not run.is_dir() and not (run := Path("runs") / (name or "latest")).is_dir():
        raise BadInput(f"{name or run}: no such run; train one first, python train_gpt.py")
    return run.resolve() if run.is_symlink() else run


def verify(path: Path, wanted: str) -> None:
    """The artifact, loaded by its own code in another process, must be the packed model bit for bit: RuntimeError."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import pack; print(pack.digest(pack.load(sys.argv[1])[1]))"
    child = subprocess.run([sys.executable, "-c", code, str(path.resolve())], capture_output=True, text=True)
    if child.stdout.split()[-1:] != [wanted]:
        raise RuntimeError(f"the artifact does not load as it was packed: {child.stderr[-2000:] or child.stdout}")


def parse(argv):
    parser = Parser(prog="pack.py", description=__doc__)
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="folder, or name in runs/; empty: newest")
    parser.add_argument("--cap_bytes", type=int, default=16_000_000, metavar="N", help="bytes of the file, at most")
    parser.add_argument("--method", default="trellis", choices=["trellis", "scalar", "rtn"],
                        help="trellis: error feedback in a trellis; scalar: error feedback; rtn: round to nearest")
    parser.add_argument("--kl", type=float, default=1e-4, metavar="X",
                        help="expected KL, nats per token, below which finer steps buy nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME",
                        help="cuda or cpu: where to quantise")
    parser.add_argument("--compare", action="store_true", help="also measure other packers, on validation data")
    args = parser.parse_args(argv)
    if args.cap_bytes <= 0 or not 0 < args.kl < math.inf:
        raise BadInput(f"--cap_bytes={args.cap_bytes} and --kl={args.kl} must be above 0")
    if args.device not in ("cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device={args.device} must be cpu, or cuda where there is one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    run, begin = find_run(args.run), time.perf_counter()
    path = run / "checkpoint.pt"
    checkpoint = load_checkpoint(path)
    if not checkpoint["tokenizer"]:
        raise BadInput(f"{path}: trained on synthetic tokens, so there is no tokenizer and nothing to score")
    if plain := args.method == "rtn" or not checkpoint["stats"]:
        why = "as asked" if checkpoint["stats"] else f"{path} has no statistics (train with --calib_tokens above 0)"
        print(f"ROUNDING TO NEAREST, which costs several times the quality: {why}")
        args.method = "rtn"
    files = sources(run) | {"tokenizer.json": checkpoint["tokenizer"].encode()}
    config, weights = asdict(checkpoint["config"]), checkpoint["weights"]
    matrices = gather(checkpoint, path, args.device, plain)
    all_matrices = [m for bank in matrices for m in bank]
    states = TRELLIS if args.method == "trellis" else 1

    if (fixed := len(build_artifact(files, b""))) > args.cap_bytes:
        raise BadInput(f"--cap_bytes={args.cap_bytes}: the code and the tokenizer alone take {fixed:,} bytes")
    finest = -5.0                                                          # without H: 1/32 of a row's RMS, 7 bits
    if not plain:
        price = sum(m.cost.sum().item() * float(m.g.double().cpu().numpy() @ quarter(m.row) ** 2) for m in all_matrices)
        finest = 0.5 * math.log2(24 * args.kl / max(price, 1e-30))
    pack_at = lambda x, n: pack_model(config, weights, matrices, float(np.float32(2.0 ** x)), states, f"pass {n}:")
    size_of = lambda packed: len(build_artifact(files, packed.blob))
    packed = search(pack_at, size_of, finest, args.cap_bytes, sum(m.W.numel() for m in all_matrices) / 8)

    data = build_artifact(files, packed.blob)
    with atomic_write(run / "artifact.pyz") as f:
        f.write(data)
        f.flush()
        verify(Path(f.name), digest(unpack_model(packed.blob)[1]))         # before it replaces the one that is there
    ledger = make_ledger(args, run, weights, matrices, packed, data, time.perf_counter() - begin)
    text = show_ledger(ledger)
    if packed.constant <= float(np.float32(2.0 ** finest)):
        quality = "1/32 of a row" if plain else f"an expected KL of at most {args.kl:g}"
        text += f"\nsmaller than the cap: packed at the best quality setting, {quality}; finer steps buy nothing"
    for name, content in (("pack.txt", text + "\n"), ("pack.json", json.dumps(ledger, indent=1) + "\n")):
        with atomic_write(run / name, "w") as f:
            f.write(content)
    print(text, "---", f"artifact_bytes: {len(data)}", f"pack_seconds: {ledger['pack_seconds']:.1f}",
          f"artifact: {run / 'artifact.pyz'}", sep="\n")
    if args.compare:
        try:
            from records.evidence.packers import compare                    # evidence only: no part of the artifact
        except ImportError:
            raise BadInput("--compare: records.evidence.packers.py is not beside this pack.py") from None
        compare(run, checkpoint, matrices)
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
