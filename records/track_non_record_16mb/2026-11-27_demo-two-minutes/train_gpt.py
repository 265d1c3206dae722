"""Train the best language model that fits in 16,000,000 bytes, in ten minutes on 8xH100, scored in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py     the record run (needs data/fineweb, see data/README.md)
    python train_gpt.py                                       the same file on whatever this machine has; without a GPU
                                                              and a dataset: a small model in two minutes on two cores
    python train_gpt.py --help                                every setting, its unit and its default

Writes runs/<run>/: log.txt, metrics.jsonl, curve.svg, checkpoint.pt (averaged weights, what pack.py needs), source/.
Then `python pack.py` makes the one file that counts and `python eval_bpb.py` scores it.
"""
import hashlib
import inspect
import json
import math
import os
import platform
import queue
import re
import signal
import sys
import threading
import time
from argparse import SUPPRESS
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: spinning OpenMP barriers cost 4-20x on busy cores
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.dataset import BadInput, Parser, command, find_run
from data.runs import (Clock, Dataset, Log, Stopped, World, changed_sources, environment, its_end_noted, join, no_cuda,
                       open_run, read_tensors, write_tensors)

ROOT = Path(__file__).resolve().parent
SOURCES = ("train_gpt.py", "pack.py", "eval_bpb.py", "data/__init__.py", "data/confine.py", "data/dataset.py",
           "data/runs.py", "data/tokenizer.py")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}              # dense bf16, by name of the GPU, for MFU

# ----------------------------------------------------------------------------------------------------------------------
# Config. The defaults are the record run; the comments are what --help prints; #N are pull requests of Parameter Golf.


@dataclass
class Config:
    # run
    data: str = "fineweb"           # dataset: a name under data/, a folder, or "synthetic": random tokens, for speed
    run: str = ""                   # name of the folder under runs/; empty: preset, date and seed
    seed: int = 1337                # initial weights, data order, calibration samples
    device: str = ""                # cuda, mps or cpu; empty: the best there is
    max_seconds: float = 600.0      # s, the training clock: steps, averaging and calibration; 0: no limit
    max_steps: int = 0              # steps; progress is then step / max_steps and the run is deterministic; 0: no limit
    parent: str = ""                # the run or record that this one has to beat, for the ledger
    idea: str = ""                  # what differs from the parent, in one sentence
    # model (11 x 512 with 17 block applications: #1493, #1855)
    vocab_size: int = 0             # tokens; 0: the dataset's
    n_layer: int = 11               # blocks
    n_embd: int = 512               # width of the residual stream
    n_head: int = 8                 # query heads
    n_kv_head: int = 4              # key and value heads
    mlp_dim: int = 2048             # hidden width of the MLP
    loop_first: int = 3             # first block that is repeated
    loop_last: int = 5              # last block that is repeated
    loop_passes: int = 3            # how often the repeated blocks run in all; 1: no recurrence
    loop_at: float = 0.35           # progress at which the recurrence is switched on (#1493)
    two_lane_from: int = 8          # first block with parallel attention and MLP lanes; n_layer: none (#1529)
    rope_dims: int = 16             # rotated dimensions of each head
    rope_base: float = 10000.0      # base of the rotary frequencies
    gate_dims: int = 12             # input dimensions that steer the attention gate and the smear gate (#1667, #1787)
    qk_gain: float = 5.0            # initial gain of the normalised queries (#1855)
    softcap: float = 30.0           # logits = softcap * tanh(logits / softcap)
    # batch
    batch_tokens: int = 786432      # tokens per optimizer step
    row_tokens: int = 98304         # tokens per forward pass: one packed row of documents
    seq_len: int = 3072             # tokens, longest context; a third of it up to 10 %, two thirds up to 70 % (#2014)
    # optimizer (#1855)
    matrix_lr: float = 0.026        # Muon learning rate, in units of spectral norm per update
    embed_lr: float = 0.03          # AdamW learning rate of the embedding
    scalar_lr: float = 0.02         # AdamW learning rate of gains, mixes and gates
    matrix_wd: float = 0.095        # decoupled weight decay of the matrices, times the learning rate
    embed_wd: float = 0.085         # decoupled weight decay of the embedding
    scalar_wd: float = 0.02         # decoupled weight decay of gains, mixes and gates
    momentum: float = 0.97          # Muon momentum, reached at 24 % of progress from 0.92
    adam_beta1: float = 0.9         # AdamW decay of the first moment
    adam_beta2: float = 0.99        # AdamW decay of the second moment
    grad_clip: float = 0.3          # largest global gradient norm
    cooldown: float = 0.85          # share of the run at its end in which the learning rate falls linearly
    lr_floor: float = 0.10          # learning rate at the end, relative to its peak (#1787)
    ema_decay: float = 0.9965       # per step, of the averaged weights
    ema_share: float = 0.8          # of them in what is saved; the rest: the last weights (modded-nanogpt #325)
    # measuring
    val_points: int = 4             # validations, evenly spaced in progress, the last at the end; the clock is stopped
    val_tokens: int = 0             # tokens of the validation documents used in training runs; 0: all
    calib_tokens: int = 524288      # tokens for the statistics that pack.py needs, inside the clock, over all ranks
    log_every: int = 25             # steps between log lines
    save_every: float = 60.0        # s of training between saved states, from which --resume goes on; 0: none


PRESETS = {
    "record": {},
    # The record on one GPU: all of its tokens on an H100, if a step takes what is predicted, 663 and 976 ms.
    "single": dict(max_seconds=4400.0),
    # A small model for two CPU cores and two minutes.
    "demo": dict(data="demo", max_seconds=120.0, n_layer=4, n_embd=128, n_head=4, n_kv_head=2, mlp_dim=512,
                 loop_passes=1, two_lane_from=3, rope_dims=8, batch_tokens=2048, row_tokens=1024, seq_len=384,
                 scalar_lr=0.04, ema_decay=0.985, val_tokens=65536, calib_tokens=8192, log_every=50),
    # The record's architecture made small, for paired experiments on a CPU.
    "proxy": dict(data="proxy", max_seconds=300.0, n_layer=6, n_embd=96, n_head=4, n_kv_head=2, mlp_dim=384,
                  loop_first=2, loop_last=3, two_lane_from=4, rope_dims=8, batch_tokens=2048, row_tokens=2048,
                  seq_len=384, scalar_lr=0.04, ema_decay=0.98, val_tokens=65536, calib_tokens=32768, log_every=20),
}


POSITIVE = ("n_layer", "n_embd", "n_head", "n_kv_head", "mlp_dim", "gate_dims", "loop_passes", "batch_tokens",
            "row_tokens", "val_points", "log_every", "softcap", "rope_base", "grad_clip", "cooldown")
BELOW_ONE = ("ema_decay", "momentum", "adam_beta1", "adam_beta2")


def check_config(cfg: Config) -> None:
    """Raise BadInput, naming the flag, for a combination of values that cannot run."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.type in (int, float) and not 0 <= value < math.inf:
            raise BadInput(f"--{f.name}={value} must be a finite number, 0 or more")
        if f.name in POSITIVE and value == 0:
            raise BadInput(f"--{f.name}=0 must be above 0")
        if f.name in BELOW_ONE and value >= 1 or f.name in ("lr_floor", "cooldown", "ema_share") and value > 1:
            raise BadInput(f"--{f.name}={value} is too large: it is a share")
    if cfg.n_layer * cfg.loop_passes > 4096:
        raise BadInput(f"--n_layer={cfg.n_layer} --loop_passes={cfg.loop_passes}: more than 4096 block applications")
    head_dim, looped = cfg.n_embd // cfg.n_head, block_order(cfg, True)
    encoder = looped[:len(looped) // 2] + list(range(cfg.n_layer // 2))
    for ok, message in [
        (cfg.n_embd % cfg.n_head == 0, f"--n_embd={cfg.n_embd} must be a multiple of --n_head={cfg.n_head}"),
        (cfg.n_head % cfg.n_kv_head == 0, f"--n_head={cfg.n_head} must be a multiple of --n_kv_head={cfg.n_kv_head}"),
        (cfg.rope_dims % 2 == 0 and cfg.rope_dims <= head_dim,
         f"--rope_dims={cfg.rope_dims} must be even and at most the head dimension, {head_dim}"),
        (cfg.gate_dims <= cfg.n_embd, f"--gate_dims={cfg.gate_dims} must be at most --n_embd={cfg.n_embd}"),
        (cfg.batch_tokens % cfg.row_tokens == 0,
         f"--batch_tokens={cfg.batch_tokens} must be a multiple of --row_tokens={cfg.row_tokens}"),
        (cfg.seq_len >= 3, f"--seq_len={cfg.seq_len} must be at least 3"),
        (cfg.loop_passes == 1 or cfg.loop_first <= cfg.loop_last < cfg.n_layer,
         f"--loop_first={cfg.loop_first} --loop_last={cfg.loop_last} must be in order, below --n_layer={cfg.n_layer}"),
        (max(encoder, default=-1) < cfg.two_lane_from,
         f"--two_lane_from={cfg.two_lane_from} must lie in the second half of the block applications"),
        (cfg.device in ("", "cuda", "mps", "cpu"), f"--device={cfg.device} must be cuda, mps or cpu"),
        (cfg.max_seconds or cfg.max_steps, "--max_seconds or --max_steps must be above 0"),
        (re.fullmatch(r"[\w.-]*", cfg.run), f"--run={cfg.run!r} must be letters, digits, dots and dashes"),
    ]:
        if not ok:
            raise BadInput(message)


def parse_config(argv: list[str]) -> tuple[str, Config, dict | None]:
    """Command line -> (preset, Config, state of the run to resume or None). A preset is a dict of overrides;
    --key=value overrides any field, typed."""
    settings = inspect.getsource(Config).split("\n", 2)[2]  # the class is where units and defaults are written
    parser = Parser(prog="train_gpt.py", usage="%(prog)s [--preset=NAME] [--SETTING=VALUE ...]", description=__doc__,
                    epilog=f"settings, as --name=value, with the values of the record:\n{settings}")
    parser.add_argument("--preset", choices=list(PRESETS), default=SUPPRESS,
                        help="record where CUDA and data/fineweb are, else demo; single: on one GPU; proxy: made small")
    parser.add_argument("--resume", metavar="RUN", default=SUPPRESS,
                        help="go on with a run that was killed, from its last saved state, with its settings")
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=f.type, default=SUPPRESS, help=SUPPRESS)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        if len(given) > 1:
            raise BadInput(f"--resume={given['resume']} takes the settings of the run: give no other flag")
        state = read_state(given["resume"])
        return state["preset"], state["config"], state
    preset = given.pop("preset", None)
    if preset is None:
        why = no_cuda() or ("" if (ROOT / "data/fineweb/meta.json").exists() else "no data/fineweb")
        preset = "demo" if why and "data" not in given else "record"
        if preset == "demo" and int(os.environ.get("RANK", 0)) == 0:
            print(f"{why}: the demo preset, not the record. For the record: python data/prepare.py fineweb, then "
                  "torchrun --standalone --nproc_per_node=8 train_gpt.py on 8xH100", flush=True)
    if "max_steps" in given and "max_seconds" not in given:
        given["max_seconds"] = 0.0
    cfg = replace(Config(), **{**PRESETS[preset], **given})
    check_config(cfg)
    return preset, cfg, None


# ----------------------------------------------------------------------------------------------------------------------
# Model. Tokens are one packed row (N,) of documents cut into segments; nothing crosses a segment's start.


class Segments(NamedTuple):
    """Where attention may look: token t sees the tokens of its own segment up to itself."""
    cu_seqlens: Tensor  # (S + 1,) int32, segment starts and N; trailing empty segments allowed
    pos: Tensor  # (N,) int32, position in the segment
    max_len: int  # tokens, at least the longest segment
    lengths: list[int] | None  # of the segments; None for compiled graphs, to which a list of numbers is a constant


def make_segments(starts: np.ndarray, n_tokens: int, seq_len: int, device="cpu", longest=0) -> Segments:
    """starts (K,) int, increasing positions of document starts in a row of n_tokens -> Segments, on device.

    A document is cut every seq_len tokens from its start. With longest, the longest seq_len of the run, compiled graphs
    see one shape and one max_len whatever the documents: cu_seqlens is filled up with empty segments, and where a row
    has more than fit, its shortest documents join the one before them.
    """
    edges = np.unique(np.concatenate([[0], starts, [n_tokens]])).astype(np.int64)
    # Twice the segments that the shortest context of the run makes of a row without documents, in steps of 256.
    slots = -(-6 * n_tokens // (256 * longest)) * 256 if longest else n_tokens
    if (-(-np.diff(edges) // seq_len)).sum() > slots:
        kept = np.argsort(-np.diff(edges), kind="stable")[:slots - n_tokens // seq_len - 1]
        edges = np.unique(np.concatenate([[0], edges[kept], [n_tokens]]))
    cuts = np.concatenate([np.arange(begin, end, seq_len) for begin, end in zip(edges, edges[1:])])
    lengths = np.diff(cuts, append=n_tokens)
    pos = np.arange(n_tokens) - np.repeat(cuts, lengths)
    cu_seqlens = np.append(cuts, np.full(slots + 1 - len(cuts) if longest else 1, n_tokens))

    def to_device(a):  # pinned, for a copy from pageable memory makes the CPU wait for the GPU
        a = torch.from_numpy(a.astype(np.int32))
        return (a.pin_memory() if torch.device(device).type == "cuda" else a).to(device, non_blocking=True)

    return Segments(to_device(cu_seqlens), to_device(pos), longest or seq_len, None if longest else lengths.tolist())


def segment_attention(q, k, v, seg: Segments):
    """q (N, H, d), k and v (N, K, d) -> (N, H, d), causal in segments: torch's kernel for each of them in turn."""
    q, k, v = (x.transpose(0, 1)[None].split(seg.lengths, 2) for x in (q, k, v))  # each (1, heads, length, d)
    y = [F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True) for qkv in zip(q, k, v)]
    return torch.cat(y, 2)[0].transpose(0, 1)


def pick_attention(device: torch.device, dtype: torch.dtype):
    """-> (name, attend(q, k, v, Segments) -> (N, H, d)): FlashAttention-3 if there, else torch's varlen or SDPA."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < (8, 0) or dtype != torch.bfloat16:
        return "sdpa", segment_attention
    if capability[0] == 9:
        try:
            from flash_attn_interface import flash_attn_varlen_func  # this is FA3; the module `flash_attn` is FA2
            torch.ops.flash_attn_3._flash_attn_forward  # there since it can be compiled

            def fa3(q, k, v, s):
                y = flash_attn_varlen_func(q, k, v, s.cu_seqlens, s.cu_seqlens, max_seqlen_q=s.max_len,
                                           max_seqlen_k=s.max_len, causal=True)
                return y[0] if isinstance(y, tuple) else y  # older releases return the log-sum-exp too
            return "fa3", fa3
        except (ImportError, OSError, AttributeError, RuntimeError):
            pass
    from torch.nn.attention.varlen import varlen_attn
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # torch 2.13
    return "varlen_attn", lambda q, k, v, s: varlen_attn(
        q, k, v, s.cu_seqlens, s.cu_seqlens, s.max_len, s.max_len, window_size=(-1, 0), **gqa)


def block_order(cfg: Config, looped: bool) -> list[int]:
    """The blocks in the order in which they run: 0..10, or with the recurrence 0..5 3..5 3..5 6..10 (#1204, #1493)."""
    blocks = list(range(cfg.n_layer))
    again = blocks[cfg.loop_first:cfg.loop_last + 1] * (cfg.loop_passes - 1)
    return blocks[:cfg.loop_last + 1] + again + blocks[cfg.loop_last + 1:] if looped and cfg.loop_passes > 1 else blocks


EPS = 1.2e-7  # of root mean squares


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)  # no gain: a scale per block does its work


def lrelu2(x: Tensor) -> Tensor:
    """LeakyReLU(x, 0.5)^2: 0.002 to 0.003 bits per byte better than relu^2 in the public records."""
    return F.leaky_relu(x, 0.5).square()


def plain_linear(x: Tensor, W: Tensor, name: str, layer: int, visit: int) -> Tensor:
    """x (N, in), W (out, in) -> (N, out). forward() takes any such function: calibration, test-time adapters."""
    return F.linear(x, W)


class GPT(nn.Module):
    """A decoder whose matrices are stacked in banks (layer, out, in), one per role: Muon works on whole banks."""
    MATRICES = ("qkv", "o", "up", "down")

    def __init__(self, cfg: Config, attend=segment_attention, dtype=torch.float32, fused_mlp=None, fused_ce=None):
        """cfg with vocab_size set; attend, fused_mlp, fused_ce: kernels chosen at start-up, None for torch's own."""
        super().__init__()
        self.cfg, self.attend, self.dtype, self.fused_mlp, self.fused_ce = cfg, attend, dtype, fused_mlp, fused_ce
        L, D, H, K, M = cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.mlp_dim
        self.head_dim = D // H
        self.qkv_sizes = [D, K * self.head_dim, K * self.head_dim]
        n_skip = len(block_order(cfg, True)) // 2
        matrix = lambda *shape: nn.Parameter(torch.empty(*shape))
        self.embed = nn.Embedding(cfg.vocab_size, D)  # tied: also the output head
        self.qkv = matrix(L, sum(self.qkv_sizes), D)
        self.o = matrix(L, D, D)
        self.up = matrix(L, M, D)
        self.down = matrix(L, D, M)
        self.q_gain = nn.Parameter(torch.full((L, H), cfg.qk_gain))
        self.attn_gate = nn.Parameter(torch.zeros(L, H, cfg.gate_dims))
        self.x0_mix = nn.Parameter(torch.stack([torch.ones(L, D), torch.zeros(L, D)], 1))  # of the stream, of x0
        self.attn_scale = nn.Parameter(torch.ones(L, D))
        self.mlp_scale = nn.Parameter(torch.ones(L, D))
        self.skip_scale = nn.Parameter(torch.ones(n_skip, D))
        self.skip_gate = nn.Parameter(torch.zeros(n_skip, D))
        self.smear_gate = nn.Parameter(torch.zeros(cfg.gate_dims))
        self.smear_scale = nn.Parameter(torch.zeros(1))
        # Per two-lane block: keep of lane 0 and lane 1; attention into 0 and 1; MLP into 0 and 1.
        self.lanes = nn.Parameter(torch.tensor([1.1, 1.1, 1, 1, 1, 1]).repeat(max(L - cfg.two_lane_from, 0), 1))

    @torch.no_grad()
    def init_matrices(self) -> None:
        """Draw the initial matrices from torch's generator; the small parameters have their initial values already."""
        nn.init.normal_(self.embed.weight, std=0.005)
        for W in (part for bank in (*self.qkv.split(self.qkv_sizes, 1), self.up) for part in bank):
            nn.init.orthogonal_(W)
        self.o.zero_()  # every block starts as the identity
        self.down.zero_()

    def forward(self, tokens, seg: Segments, looped=True, linear=plain_linear, attend=None, prev=None) -> Tensor:
        """tokens (N,) int -> hidden (N, D) after the last norm, in self.dtype; logits() makes it logits.

        linear(x, W, name, layer, visit) computes every matrix product. For callers that cache keys and values,
        attend(q, k, v, seg, visit) replaces attention and prev (N,) int names the token before each one; then only
        seg.pos is read.
        """
        cfg, dtype = self.cfg, self.dtype
        attend = attend or (lambda q, k, v, seg, visit: self.attend(q, k, v, seg))
        cast = lambda p: p.to(dtype)
        lanes, skip_scale, skip_gate, x0_mix = (cast(x).unbind() for x in (
            self.lanes, self.skip_scale, self.skip_gate.sigmoid(), self.x0_mix.view(-1, cfg.n_embd)))
        # Scales of a product's input or output are folded into its matrix: a product the size of the weights instead of
        # one of the activations, each way. Deeper blocks read a smaller norm (public: -0.002 with partial RoPE).
        depth = torch.arange(1, cfg.n_layer + 1, device=tokens.device)[:, None, None] ** -0.5
        weights = {"qkv": self.qkv * depth, "o": self.o * self.attn_scale[:, :, None], "up": self.up * depth,
                   "down": self.down * self.mlp_scale[:, :, None], "gate": self.attn_gate * (0.5 * depth)}
        weights = {name: cast(W).unbind() for name, W in weights.items()}

        # Rotary angles from the position in the segment, once for all blocks, in fp32.
        freqs = cfg.rope_base ** -(torch.arange(0, cfg.rope_dims, 2, device=tokens.device) / cfg.rope_dims)
        angle = seg.pos[:, None, None] * freqs  # (N, 1, rope_dims / 2)
        angle = F.pad(angle.expand(-1, cfg.n_head + cfg.n_kv_head, -1), (0, 0, 0, cfg.n_kv_head))  # none for values
        cos, sin, gains = angle.cos(), angle.sin(), F.pad(self.q_gain, (0, 2 * cfg.n_kv_head), value=1.0)

        # SmearGate: each token takes some of the one before it, never across a segment's start (#1667, #1851; -0.0005).
        x = cast(self.embed(tokens))  # (N, D)
        before = cast(self.embed(prev)) if prev is not None else F.pad(x, (0, 0, 1, 0))[:-1]
        open_gate = (x[:, :cfg.gate_dims] * cast(self.smear_gate)).sum(-1).sigmoid() * (seg.pos > 0)
        x = x + (cast(self.smear_scale) * open_gate)[:, None] * before
        x = x0 = norm(x)

        order = block_order(cfg, looped)
        n_encoder = len(order) // 2
        skips, lane = [], None
        for visit, i in enumerate(order):
            if i >= cfg.two_lane_from and lane is None:
                lane = x  # before the skip, which joins lane 0 only
            if visit >= n_encoder and skips:  # U-Net: the decoder takes back the encoder's outputs
                j = visit - n_encoder
                x = torch.lerp(skip_scale[j] * skips.pop(), x, skip_gate[j])
            W = {name: bank[i] for name, bank in weights.items()}
            u = x0_mix[2 * i] * x + x0_mix[2 * i + 1] * x0
            a = self.attention(norm(u), W, gains[i], i, visit, cos, sin, seg, linear, attend)
            if i < cfg.two_lane_from:
                x = u + a
                x = x + self.mlp(norm(x), W, i, visit, linear)
            else:  # attention and MLP side by side (#1529: -0.004)
                m = self.mlp(norm(lane), W, i, visit, linear)
                keep0, keep1, a0, a1, m0, m1 = lanes[i - cfg.two_lane_from].unbind()
                x, lane = keep0 * x + a0 * a + m0 * m, keep1 * lane + a1 * a + m1 * m
            if visit < n_encoder:
                skips.append(x)
        return norm(x if lane is None else (x + lane) / 2)

    def attention(self, n, W, gain, i, visit, cos, sin, seg, linear, attend):
        """n (N, D), the block's normed input -> (N, D)."""
        qkv = linear(n, W["qkv"], "qkv", i, visit).view(len(n), -1, self.head_dim)
        q, k, v = RotatedHeads.apply(qkv, gain, cos, sin, self.cfg.n_kv_head)
        own, length = unit(v)  # before attention: after it, the compiler would keep v in float32 for backward
        y = attend(q, k, v, seg, visit)  # (N, H, d)
        gate = F.linear(n[:, :self.cfg.gate_dims], W["gate"])  # (N, H)
        return linear(GatedXSA.apply(y, v, own, length, gate).reshape(n.shape), W["o"], "o", i, visit)

    def mlp(self, n, W, i, visit, linear):
        """n (N, D) -> (N, D)."""
        if self.fused_mlp is not None and linear is plain_linear:
            return self.fused_mlp(n, W["up"], W["down"])
        return linear(lrelu2(linear(n, W["up"], "up", i, visit)), W["down"], "down", i, visit)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> logits (N, V) float32, softcapped."""
        z = F.linear(hidden, (self.embed.weight / self.cfg.softcap).to(hidden.dtype)).float()
        return self.cfg.softcap * torch.tanh(z)

    def losses(self, tokens: Tensor, targets: Tensor, seg: Segments, looped: bool) -> Tensor:
        """tokens, targets (N,) int64 -> nats (N,) float32 of each target."""
        hidden = self(tokens, seg, looped)
        if self.fused_ce is not None:
            return self.fused_ce(F.linear(hidden, self.embed.weight.to(hidden.dtype)), targets, self.cfg.softcap)
        return F.cross_entropy(self.logits(hidden), targets, reduction="none")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, d): the first 2 * r dimensions turned as pairs (i, i + r) by the angles of cos, sin (N, ., r)."""
    r = cos.size(-1)
    a, b, rest = x[..., :r], x[..., r:2 * r], x[..., 2 * r:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)


# What stands between the products of attention, as two functions with gradients of their own: with the folded scales
# they take three tenths of the bytes from the compiler's own kernels, counted by records/evidence/roofline.py.


class RotatedHeads(torch.autograd.Function):
    """qkv (N, H + 2 K, d), gain (H + 2 K,), cos and sin (N, H + 2 K, r) float32 -> q (N, H, d), k and v (N, K, d),
    views of one tensor: q and k of unit mean square, all rotated and times their gains (v: by no angle, times 1).

    With x^ = x / rms(x), y = gain R x^, y^ = y / gain, g = dy: dx = gain R^T (g - y^ mean(y^ g)) / rms(x).
    """

    @staticmethod
    def forward(ctx, qkv, gain, cos, sin, n_kv):
        x, sizes = qkv.float(), [len(gain) - 2 * n_kv, n_kv, n_kv]
        gain = gain[:, None] + 1e-12  # backward divides by it
        normed = torch.arange(len(gain), device=x.device)[:, None] < len(gain) - n_kv
        scale = torch.where(normed, torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS), 1.0)
        q, k, v = (rotate(x * scale, cos, sin) * gain).to(qkv.dtype).split(sizes, 1)
        ctx.save_for_backward(q, k, gain, cos, sin, scale)
        return q, k, v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        q, k, gain, cos, sin, scale = ctx.saved_tensors
        sizes, cos, sin = [q.size(1), k.size(1), k.size(1)], cos[:, :1], -sin[:, :1]

        def undo(y, g, gain, scale):
            """-> dx, and the sums x^ R^T g (N, heads) that add up to the gradient of the gain."""
            dot = (y.float() * g.float()).sum(-1, keepdim=True) / gain
            dx = rotate(g.float(), cos, sin) * gain - rotate(y.float(), cos, sin) * (dot / y.size(-1))
            return (dx * scale).to(g.dtype), dot[..., 0]

        (dq, dgain), (dk, _) = map(undo, (q, k), (dq, dk), gain.split(sizes), scale.split(sizes, 1))
        return torch.cat([dq, dk, dv], 1), F.pad(dgain.sum(0), (0, len(gain) - q.size(1))), None, None, None


def unit(v: Tensor):
    """v (N, K, d) -> v / |v| float32, |v| (N, K, 1)."""
    v = v.detach().float()
    length = v.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    return v / length, length


class GatedXSA(torch.autograd.Function):
    """y (N, G K, d), v (N, K, d), unit(v), gate (N, G K) -> (N, G K, d): each head less what lies along its token's own
    value (XSA, #265), times sigmoid(gate) (sparse attention gate, #1787).

    With v^ = v / |v|, p = y v^: z = s (y - p v^). Then dy = e - q v^ where e = s dz and q = e v^, and of each head
    dv = (2 p q v^ - p e - q y) / |v|.
    """

    @staticmethod
    def forward(ctx, y, v, own, length, gate):
        ctx.save_for_backward(y, own, length, gate)
        zs = [((x - (x * own).sum(-1, keepdim=True) * own) * s).to(y.dtype)
              for x, s in GatedXSA.heads(v.size(1), y, gate.float().sigmoid())]
        return torch.stack(zs, 2).view(y.shape)

    @staticmethod
    def heads(K, *xs):
        """Tensors (N, G K, ...) -> G tuples of them as (N, K, .) float32."""
        xs = [x.view(len(x), K, -1, *x.shape[2:]) if x.ndim == 3 else x.view(len(x), K, -1, 1) for x in xs]
        return [[x[:, :, g].float() for x in xs] for g in range(xs[0].size(2))]

    @staticmethod
    def backward(ctx, dz):
        y, own, length, gate = ctx.saved_tensors
        dv, dys, dgates = 0.0, [], []
        for x, s, g in GatedXSA.heads(own.size(1), y, gate.float().sigmoid(), dz):
            e = g * s
            p, q = ((a * own).sum(-1, keepdim=True) for a in (x, e))
            dgates.append(((g * (x - p * own)).sum(-1, keepdim=True) * s * (1 - s)).to(gate.dtype))
            dys.append((e - q * own).to(dz.dtype))
            dv = dv + ((2 * p * q * own - p * e - q * x) / length).to(dz.dtype)
        return torch.stack(dys, 2).view(dz.shape), dv, None, None, torch.stack(dgates, 2).view(gate.shape)


def count_flops(cfg: Config, looped: bool) -> float:
    """Model FLOPs per trained token: 6 per weight of each matrix product, forward and backward; attention left out."""
    kv = cfg.n_kv_head * cfg.n_embd // cfg.n_head
    per_block = (2 * cfg.n_embd + 2 * kv + 2 * cfg.mlp_dim) * cfg.n_embd
    return 6 * (len(block_order(cfg, looped)) * per_block + cfg.vocab_size * cfg.n_embd)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels. Two places where a GPU spends memory traffic that the compiler does not save. Each has its torch reference in
# the model above, and pick_kernels() compares them before the clock starts.


@lru_cache
def triton_kernels():
    """-> (up_kernel, ce_forward, ce_backward), compiled by Triton on first use. Raises ImportError without Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def up_kernel(a_ptr, b_ptr, pre_ptr, out_ptr, M, N, K, stride_bn, stride_bk, BACKWARD: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
        # acc = A (M, K) @ B (N, K)^T. Forward: pre = acc, out = lrelu2(acc). Backward: out = acc * lrelu2'(pre).
        pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
        group = pid // (GROUP * tiles_n)  # tiles in groups of rows, so that B stays in L2
        rows = min(tiles_m - group * GROUP, GROUP)
        tile_m, tile_n = group * GROUP + pid % (GROUP * tiles_n) % rows, pid % (GROUP * tiles_n) // rows
        m, n, k = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
        a = a_ptr + (m % M)[:, None].to(tl.int64) * K + k[None, :]
        b = b_ptr + (n % N)[None, :] * stride_bn + k[:, None] * stride_bk
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            acc = tl.dot(tl.load(a, mask=k[None, :] < K - start, other=0.0),
                         tl.load(b, mask=k[:, None] < K - start, other=0.0), acc, input_precision="ieee")
            a += BK
            b += BK * stride_bk
        at, inside = m[:, None].to(tl.int64) * N + n[None, :], (m[:, None] < M) & (n[None, :] < N)
        if BACKWARD:
            pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, acc * tl.where(pre > 0, 2 * pre, 0.5 * pre), mask=inside)
        else:
            tl.store(pre_ptr + at, acc, mask=inside)
            tl.store(out_ptr + at, acc * tl.where(acc > 0, acc, 0.25 * acc), mask=inside)

    # Softcap by a sigmoid: cap * tanh(x / cap) = 2 cap * sigmoid(2 x / cap) - cap; the constant drops out of softmax.
    # The capped logit lies in [0, 2 cap], so 2 cap serves as the maximum and one pass suffices.
    @triton.jit
    def ce_forward(x_ptr, target_ptr, loss_ptr, lse_ptr, V, cap, BV: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        total = tl.zeros((BV,), tl.float32)
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            x = tl.load(x_ptr + row * V + v, mask=v < V, other=0.0).to(tl.float32)
            z = 2 * cap * tl.sigmoid(2 * x / cap)
            total += tl.where(v < V, tl.exp(z - 2 * cap), 0.0)
        lse = 2 * cap + tl.log(tl.sum(total, 0))
        x = tl.load(x_ptr + row * V + tl.load(target_ptr + row)).to(tl.float32)
        tl.store(lse_ptr + row, lse)
        tl.store(loss_ptr + row, lse - 2 * cap * tl.sigmoid(2 * x / cap))

    @triton.jit
    def ce_backward(x_ptr, target_ptr, lse_ptr, grad_ptr, dx_ptr, V, cap, BV: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        target, lse, grad = tl.load(target_ptr + row), tl.load(lse_ptr + row), tl.load(grad_ptr + row)
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            x = tl.load(x_ptr + row * V + v, mask=v < V, other=0.0).to(tl.float32)
            s = tl.sigmoid(2 * x / cap)
            p = tl.exp(2 * cap * s - lse)
            dx = grad * (p - tl.where(v == target, 1.0, 0.0)) * 4 * s * (1 - s)
            tl.store(dx_ptr + row * V + v, dx, mask=v < V)

    return up_kernel, ce_forward, ce_backward


TILE = (128, 256, 64)  # rows, columns and depth of the product that one program computes


def up_matmul(a: Tensor, b: Tensor, pre: Tensor, out: Tensor, backward: bool) -> None:
    """a (M, K), b (N, K) of any strides -> writes out (M, N) and, when forward, pre. a, pre, out contiguous."""
    (M, K), N = a.shape, b.size(0)
    BM, BN, BK = TILE if a.is_cuda else (16, 32, 32)  # the small tile serves the interpreter in tests
    grid = (-(-M // BM) * -(-N // BN),)
    triton_kernels()[0][grid](a, b, pre, out, M, N, K, *b.stride(), BACKWARD=backward, BM=BM, BN=BN, BK=BK, GROUP=8,
                              num_warps=8, num_stages=3)


@torch.library.custom_op("nanogolf::mlp_up", mutates_args=())
def mlp_up(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, D), up (M, D) -> pre = x @ up^T and lrelu2(pre), both (N, M)."""
    pre = x.new_empty(x.size(0), up.size(0))
    out = torch.empty_like(pre)
    up_matmul(x.contiguous(), up, pre, out, backward=False)
    return pre, out


@torch.library.custom_op("nanogolf::mlp_dpre", mutates_args=())
def mlp_dpre(dy: Tensor, down: Tensor, pre: Tensor) -> Tensor:
    """dy (N, D), down (D, M), pre (N, M) -> (dy @ down) * lrelu2'(pre), (N, M)."""
    out = torch.empty_like(pre)
    up_matmul(dy.contiguous(), down.t(), pre, out, backward=True)
    return out


mlp_up.register_fake(lambda x, up: (x.new_empty(x.size(0), up.size(0)), x.new_empty(x.size(0), up.size(0))))
mlp_dpre.register_fake(lambda dy, down, pre: torch.empty_like(pre))


class FusedMLP(torch.autograd.Function):
    """x (N, D), up (M, D), down (D, M) -> lrelu2(x @ up^T) @ down^T. The activation rides on the matrix products."""

    @staticmethod
    def forward(ctx, x, up, down):
        pre, h = mlp_up(x, up)
        ctx.save_for_backward(x, up, down, pre, h)
        return h @ down.t()

    @staticmethod
    def backward(ctx, dy):
        x, up, down, pre, h = ctx.saved_tensors
        dpre = mlp_dpre(dy, down, pre)
        return dpre @ up, dpre.t() @ x, dy.t() @ h


@torch.library.custom_op("nanogolf::softcap_ce", mutates_args=())
def softcap_ce(x: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """x (N, V) raw logits, targets (N,) int64 -> nats (N,) and log-sum-exp (N,), float32, of cap * tanh(x / cap)."""
    loss, lse = (torch.empty(x.size(0), dtype=torch.float32, device=x.device) for _ in range(2))
    triton_kernels()[1][(x.size(0),)](x, targets, loss, lse, x.size(1), cap, BV=1024)
    return loss, lse


@torch.library.custom_op("nanogolf::softcap_ce_backward", mutates_args=())
def softcap_ce_backward(x: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, cap: float) -> Tensor:
    dx = torch.empty_like(x)
    triton_kernels()[2][(x.size(0),)](x, targets, lse, grad.contiguous(), dx, x.size(1), cap, BV=1024)
    return dx


softcap_ce.register_fake(lambda x, targets, cap: (x.new_empty(x.size(0), dtype=torch.float32),
                                                  x.new_empty(x.size(0), dtype=torch.float32)))
softcap_ce_backward.register_fake(lambda x, targets, lse, grad, cap: torch.empty_like(x))


class FusedCE(torch.autograd.Function):
    """x (N, V) raw logits, targets (N,), cap -> nats (N,) float32: one read forward, a read and a write backward."""

    @staticmethod
    def forward(ctx, x, targets, cap):
        loss, lse = softcap_ce(x, targets, cap)
        ctx.save_for_backward(x, targets, lse)
        ctx.cap = cap
        return loss

    @staticmethod
    def backward(ctx, grad):
        return softcap_ce_backward(*ctx.saved_tensors, grad, ctx.cap), None, None


def fused_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return FusedMLP.apply(x, up, down)  # a function of its own: torch 2.11 cannot capture the attribute `apply`


def fused_ce(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    return FusedCE.apply(logits, targets, cap)


def pick_kernels(cfg: Config, device: torch.device, dtype: torch.dtype, log) -> dict:
    """-> {"fused_mlp": f, "fused_ce": f} for GPT on a GPU in bf16. A kernel that does not compile there, or that is not
    its torch reference within rounding, is left out and the log says why."""
    chosen = {}
    if device.type != "cuda" or dtype != torch.bfloat16:
        return chosen
    N, D, M, V, cap = 1024, cfg.n_embd, cfg.mlp_dim, cfg.vocab_size, cfg.softcap
    targets = torch.randint(V, (N,), device=device)

    def results(fn, args):
        out = fn(*args)
        return out.detach(), *torch.autograd.grad(out.float().sum(), args)

    for name, kernel, fused, reference, shapes in (
        ("fused_mlp", fused_mlp, fused_mlp, lambda x, up, down: F.linear(lrelu2(F.linear(x, up)), down),
         [(N, D), (M, D), (D, M)]),
        ("fused_ce", fused_ce, lambda z: fused_ce(z, targets, cap),
         lambda z: F.cross_entropy(cap * torch.tanh(z.float() / cap), targets, reduction="none"), [(N, V)]),
    ):
        try:
            args = [torch.randn(*shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
            pairs = zip(results(fused, args), results(reference, args))
            error = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
            if not error < 1e-2:
                raise ArithmeticError(f"{error:.1e} away from its reference")
            chosen[name] = kernel
        except Exception as e:  # no Triton, or a GPU with too little shared memory: torch's own kernels do
            log(f"WARNING: {name} is not used: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
    return chosen


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer. Every rank holds all weights; gradients are reduce-scattered, each rank updates its share, and all-gather
# brings the shares together.

# Polar Express: the best five quintic steps towards the orthogonal factor in bf16 (arXiv 2505.16932; scaled by 1.02).
POLAR_EXPRESS = [(8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]


def orthogonalize(G: Tensor) -> Tensor:
    """G (n, rows, cols) -> the nearest semi-orthogonal matrices times sqrt(max(1, rows / cols)); singular values above
    1e-3 of the norm land within 0.86 .. 1.14. Rows are first scaled to one length (MuonEq-R, arXiv 2603.28254)."""
    X = G / G.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X  # the products are on the short side
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    X = X.mT if tall else X
    return X * max(1.0, G.size(-2) / G.size(-1)) ** 0.5


class Optimizer:
    """Muon (Keller Jordan) for the banks of matrices, shared among the ranks; torch's AdamW for the embedding and the
    small parameters, on every rank alike: by its bytes all of that takes 0.1 ms on an H100."""

    def __init__(self, model: GPT, cfg: Config, world: World, compiled=False):
        self.cfg, self.world = cfg, world
        self.orthogonalize = torch.compile(orthogonalize, dynamic=False, fullgraph=True) if compiled else orthogonalize
        named = {name: p for name, p in model.named_parameters() if p.numel()}
        self.params = list(named.values())
        # Largest first. The stacked q, k, v are orthogonalised one by one: these are their rows.
        self.banks = [(named.pop(name), model.qkv_sizes if name == "qkv" else None)
                      for name in ("down", "up", "qkv", "o")]
        device, embed = self.params[0].device, named.pop("embed.weight")
        self.small = [embed, *named.values()]  # whatever is no bank: no parameter is left out
        assert all(p.ndim == 3 for p, _ in self.banks) and len(self.banks) + len(self.small) == len(self.params)
        self.comm_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.momenta = [torch.zeros(-(-p.size(0) // world.size), *p.shape[1:], device=device) for p, _ in self.banks]
        self.adamw = torch.optim.AdamW([
            {"params": [embed], "peak_lr": cfg.embed_lr, "weight_decay": cfg.embed_wd},
            {"params": self.small[1:], "peak_lr": cfg.scalar_lr, "weight_decay": cfg.scalar_wd},
        ], betas=(cfg.adam_beta1, cfg.adam_beta2), fused=True)

    def reset(self) -> None:
        """Forget everything, as before the first step."""
        torch._foreach_zero_(self.momenta)
        self.adamw.state.clear()

    def state_dict(self) -> dict:
        """-> everything it remembers, of all ranks. Every rank must call it."""
        whole = [self.world.all_gather(m) for m in self.momenta]
        for _, handle in whole:
            if handle:
                handle.wait()
        return {"momenta": [m for m, _ in whole], "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on with what state_dict() gave. ValueError on another number of ranks or other shapes."""
        if [len(m) for m in state["momenta"]] != [len(m) * self.world.size for m in self.momenta]:
            raise ValueError("it is of another number of ranks")
        for share, whole in zip(self.momenta, state["momenta"]):
            share.copy_(whole[self.world.rank * len(share):][:len(share)])
        self.adamw.load_state_dict(state["adamw"])
        if any(self.adamw.state[p][key].shape != p.shape for p in self.small for key in ("exp_avg", "exp_avg_sq")):
            raise ValueError("AdamW's moments have other shapes")

    @torch.no_grad()
    def step(self, loss: Tensor, lr: float, momentum: float) -> Tensor:
        """One update from the gradients of this rank's part of the loss, which sum to those of the whole batch.

        lr: of the schedule, in [0, 1]; momentum: Muon's. -> (2,) float32 on the device: batch loss, gradient norm.
        """
        cfg, world = self.cfg, self.world
        reduced = []  # (share of the gradient, handle): all in flight at once
        for p, _ in self.banks:
            g = F.pad(p.grad, (0, 0, 0, 0, 0, -p.size(0) % world.size)).to(self.comm_dtype)
            reduced.append(world.reduce_scatter(g))
        small = torch.cat([p.grad.flatten() for p in self.small])
        world.sum(small)
        grads = []
        for share, handle in reduced:
            if handle:
                handle.wait()
            grads.append(share.float())
        square = sum(g.square().sum() for g in grads) + small.square().sum() / world.size  # which all ranks have
        totals = torch.stack([loss.detach().float(), square])
        world.sum(totals)
        grad_norm = totals[1].sqrt()
        clip = (cfg.grad_clip / (grad_norm + 1e-6)).clamp(max=1)

        # Muon, largest bank first: the all-gather of one bank travels while the next is orthogonalised.
        gathered = []
        for (p, parts), m, g in zip(self.banks, self.momenta, grads):
            m.mul_(momentum).add_(g * clip)
            nesterov = (g * clip + momentum * m).to(self.comm_dtype)
            update = torch.cat([self.orthogonalize(u) for u in nesterov.split(parts or nesterov.size(1), 1)], 1)
            gathered.append(world.all_gather(update))
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["peak_lr"]
        for p, g in zip(self.small, (small * clip).split([p.numel() for p in self.small])):
            p.grad = g.view_as(p)
        self.adamw.step()
        for (p, _), (update, handle) in zip(self.banks, gathered):
            if handle:
                handle.wait()
            p.mul_(1 - lr * cfg.matrix_lr * cfg.matrix_wd).add_(update[:p.size(0)], alpha=-lr * cfg.matrix_lr)
        for p in self.params:
            p.grad = None
        return torch.stack([totals[0], grad_norm])


# ----------------------------------------------------------------------------------------------------------------------
# Data


class Loader:
    """An endless stream of rows: shards in a seeded order, the documents of each in a seeded order, cut into rows.

    The stream is the same whatever the number of ranks; rank r of n takes rows r, r + n, ... A thread reads ahead.
    (The public loaders that mix documents gained 0.002 bits per byte over sequential ones.)
    """

    def __init__(self, data: Dataset, cfg: Config, world: World, compiled: bool = False, first_row: int = 0):
        self.data, self.cfg, self.world, self.first_row = data, cfg, world, first_row
        self.longest = cfg.seq_len if compiled else 0
        self.ready = queue.Queue(maxsize=16)
        threading.Thread(target=self.read_ahead, daemon=True).start()

    def rows(self):
        """Yields this rank's rows, (row_tokens + 1,) uint16; the last token is only a target."""
        n, index, epoch = self.cfg.row_tokens, 0, 0
        while True:
            before, rng = index, np.random.default_rng((self.cfg.seed, epoch))
            for shard in rng.permutation(self.data.n_train):
                tokens = self.data.train(shard)
                starts = np.flatnonzero(tokens == self.data.boundary)
                if not len(starts) or starts[0] != 0:
                    starts = np.concatenate([[0], starts])
                ends = np.append(starts[1:], len(tokens))
                order = rng.permutation(len(starts))
                starts, ends = starts[order], ends[order]
                stop = np.cumsum(ends - starts)  # where each document ends in the shuffled shard
                for a in range(0, int(stop[-1]) - n, n):  # the tail that fills no row is left out
                    if index >= self.first_row and index % self.world.size == self.world.rank:
                        i, j = np.searchsorted(stop, [a, a + n], side="right")
                        row = np.concatenate([tokens[starts[d]:ends[d]] for d in range(i, j + 1)])
                        skip = a - (int(stop[i - 1]) if i else 0)
                        yield row[skip:skip + n + 1]
                    index += 1
            if index == before:
                raise BadInput(f"--row_tokens={n}: no train shard of {self.cfg.data} is that long")
            epoch += 1

    def read_ahead(self):
        try:
            for row in self.rows():
                self.ready.put((torch.from_numpy(row.astype(np.int32)), np.flatnonzero(row[:-1] == self.data.boundary)))
        except BaseException as e:  # handed to the training loop
            self.ready.put(e)

    def next(self, seq_len: int):
        """-> tokens (N,), targets (N,) int64 on the device, Segments of at most seq_len tokens."""
        item = self.ready.get()
        if isinstance(item, BaseException):
            raise item
        row, starts = item
        if self.world.device.type == "cuda":
            row = row.pin_memory()
        row = row.to(self.world.device, non_blocking=True).long()
        seg = make_segments(starts, len(row) - 1, seq_len, self.world.device, self.longest)
        return row[:-1], row[1:], seg


class Validation:
    """Bits per byte over whole validation documents in order, each target once, with a context of up to seq_len."""

    def __init__(self, data: Dataset, cfg: Config, world: World, compiled: bool = False):
        self.cfg, self.world, self.boundary, tokens = cfg, world, data.boundary, data.val()
        self.longest = cfg.seq_len if compiled else 0
        edges = np.append(np.flatnonzero(tokens == data.boundary), len(tokens))
        if cfg.val_tokens:
            edges = edges[:max(2, int(np.searchsorted(edges, cfg.val_tokens, side="right")))]
        self.n_docs, self.n_tokens, self.n_bytes = len(edges) - 1, int(edges[-1]), data.meta["val_bytes"]
        if data.tokenizer and self.n_tokens < len(tokens):
            docs = np.split(tokens[:self.n_tokens], edges[1:-1])
            self.n_bytes = sum(len(data.tokenizer.decode(doc[1:]).encode()) for doc in docs)
        # The last target of a document is the boundary of the next one; what fills up the last row does not count.
        row = cfg.row_tokens
        filled = np.concatenate([tokens[:self.n_tokens], np.full(row + 1, data.boundary, tokens.dtype)])
        self.rows = [(filled[a:a + row + 1], min(row, self.n_tokens - a))
                     for a in range(world.rank * row, self.n_tokens, world.size * row)]

    @torch.no_grad()
    def __call__(self, losses, looped: bool) -> tuple[float, float]:
        """losses(tokens, targets, seg, looped) as GPT.losses -> (nats per token, bits per byte)."""
        nats = torch.zeros((), dtype=torch.float64)
        for row, n in self.rows:
            x = torch.from_numpy(row.astype(np.int64)).to(self.world.device)
            starts = np.flatnonzero(row[:min(n + 1, len(row) - 1)] == self.boundary)  # the filling is one document
            seg = make_segments(starts, len(row) - 1, self.cfg.seq_len, x.device, self.longest)
            nats += losses(x[:-1], x[1:], seg, looped)[:n].cpu().double().sum()
        nats = math.fsum(self.world.gather(nats.item()))
        return nats / self.n_tokens, nats / math.log(2) / self.n_bytes if self.n_bytes else float("nan")


# ----------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of progress in [0, 1].


def lr_at(cfg: Config, progress: float) -> float:
    """1, then a line to 0 over the cooldown, never below lr_floor (#1787)."""
    return min(1.0, max(cfg.lr_floor, (1 - progress) / cfg.cooldown))


def momentum_at(cfg: Config, progress: float) -> float:
    return cfg.momentum - max(cfg.momentum - 0.92, 0) * max(1 - progress / 0.24, 0)


def seq_len_at(cfg: Config, progress: float) -> int:
    """Short contexts first: a third of seq_len, two thirds, all (#2014: 1k, 2k, 3k; -0.001).

    #2014 also warms the learning rate up again over 32 steps after each change; its worth was never isolated.
    """
    return cfg.seq_len * (1 if progress < 0.1 else 2 if progress < 0.7 else 3) // 3


def looped_at(cfg: Config, progress: float) -> bool:
    return bool(progress >= cfg.loop_at)  # numpy's own bool would be a tensor to the compiler


# ----------------------------------------------------------------------------------------------------------------------
# Calibration and checkpoint

CALIB_ROW = 16384  # tokens that calibration takes at a time, at most: float32 copies of their activations must fit


def calibrate(model: GPT, loader: Loader, n_rows: int, seed: int, late=lambda: False) -> dict:
    """Sums over n_rows rows of training tokens, with labels sampled from the model (the true Fisher) ->

    bank.H (L, in, in) of x x^T and bank.g (L, out) of (dL/dy)^2 for each y = W x, over all visits of a looped block;
    for the tied embedding embed.H (D, D) and embed.g (V,) as the head, embed.S (D, D) of (dL/dx)(dL/dx)^T as the input;
    tokens (1,). embed.g is exact: p (1 - p) times the softcap's slope squared. Ends after a row once late() is true.
    """
    device, cap = model.embed.weight.device, model.cfg.softcap
    V, D = model.embed.weight.shape
    shapes = {"embed.H": (D, D), "embed.S": (D, D), "embed.g": (V,), "tokens": (1,)}
    for name in model.MATRICES:
        layers, rows, cols = getattr(model, name).shape
        shapes |= {f"{name}.H": (layers, cols, cols), f"{name}.g": (layers, rows)}
    stats = {key: torch.zeros(shape, device=device) for key, shape in shapes.items()}
    generator = torch.Generator(device).manual_seed(seed)

    def outer(key, x, index=...):
        x = x.detach().float()
        stats[key][index] += x.mT @ x

    def squares(key, layer, g):
        stats[key][layer] += g.float().square().sum(0)

    def tap(x, W, name, layer, visit):
        outer(f"{name}.H", x, layer)
        y = plain_linear(x, W, name, layer, visit)
        y.register_hook(partial(squares, f"{name}.g", layer))
        return y

    def tap_embedding(module, inputs, x):
        x.requires_grad_().register_hook(lambda g: outer("embed.S", g))

    model.requires_grad_(False)  # only activations need gradients here
    hook = model.embed.register_forward_hook(tap_embedding)
    for i in range(n_rows):
        if i and late():
            break
        tokens, _, seg = loader.next(model.cfg.seq_len)
        hidden = model(tokens, seg, True, tap)
        outer("embed.H", hidden)
        logits = model.logits(hidden)
        with torch.no_grad():
            p = logits.softmax(-1)
            stats["embed.g"] += (p * (1 - p) * (1 - (logits / cap).square()).square()).sum(0)
            labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        F.cross_entropy(logits, labels, reduction="sum").backward()
        stats["tokens"] += len(tokens)
    hook.remove()
    model.requires_grad_(True)
    # The products had scales folded into their matrices; the statistics are those of the matrices without.
    depth = torch.arange(1, model.cfg.n_layer + 1, device=device)
    for name, scale in (("o", model.attn_scale), ("down", model.mlp_scale)):
        stats[f"{name}.g"] *= scale.detach().square()
    for name in ("qkv", "up"):
        stats[f"{name}.H"] /= depth[:, None, None]
    return stats


def save_checkpoint(path: Path, cfg: Config, model: GPT, data: Dataset, stats: dict, run: dict) -> None:
    tokenizer = data.tokenizer.blob.decode() if data.tokenizer else ""
    cfg = replace(cfg, parent="", idea="")  # of the run; its artifact does not pay for them
    write_tensors(path, config=asdict(cfg), weights=model.state_dict(), stats=stats, run=run, tokenizer=tokenizer)


def read_saved(path: Path, *keys: str) -> dict:
    """A checkpoint or a saved state -> {"config": Config, "weights" {name: tensor}, and keys}; shapes as configured."""
    with read_tensors(path) as saved:
        cfg = config_from(saved["config"])
        with torch.device("meta"):
            expected = {k: v.shape for k, v in GPT(cfg).state_dict().items()}
        if any({k: v.shape for k, v in saved[x].items()} != expected for x in ("weights", "ema") if x in saved):
            raise ValueError("the weights are not those that the config describes")
        return {**{k: saved[k] for k in ("weights", *keys)}, "config": cfg}


def load_checkpoint(path: Path) -> dict:
    """checkpoint.pt -> {"config", "weights", "stats" {name: float32} or {}, "run", "tokenizer"}. Raises BadInput."""
    if not Path(path).is_file():
        raise BadInput(f"{path} does not exist: train first, python train_gpt.py")
    return read_saved(path, "stats", "run", "tokenizer")


def read_state(run: str) -> dict:
    """A run's folder or name -> the state from which it can go on, with its "folder". Raises BadInput."""
    folder = find_run(run)
    kinds = {"preset": str, "step": int, "next_val": int, "seconds": float, "resumed": int}
    state = read_saved(folder / "state.pt", "ema", "optimizer", *kinds)
    if any(type(state[key]) is not kind for key, kind in kinds.items()):
        raise BadInput(f"{folder}/state.pt is not whole")
    if changed := changed_sources(folder, SOURCES):
        raise BadInput(f"--resume={run}: {', '.join(changed)} changed since the run began")
    return state | {"folder": folder}


def config_from(values: dict) -> Config:
    """A dict from a file -> Config, every field present, typed and possible. Raises BadInput."""
    kinds = {f.name: f.type for f in fields(Config)}
    if not isinstance(values, dict) or {k: type(v) for k, v in values.items()} != kinds:
        raise BadInput("the config has other fields or types than this train_gpt.py")
    cfg = Config(**values)
    check_config(cfg)
    return cfg


# ----------------------------------------------------------------------------------------------------------------------
# Training


def main(argv: list[str] | None = None) -> int:
    preset, cfg, state = parse_config(sys.argv[1:] if argv is None else argv)
    world = join(cfg)
    try:
        data, problem = Dataset(cfg, world), ""
    except BadInput as e:
        problem = f"{platform.node()}: {e}" if world.size > 1 else str(e)
    if problems := [*filter(None, world.gather(problem))]:  # what one node lacks, all of them say
        raise BadInput(problems[0])
    cfg = replace(cfg, vocab_size=data.meta["vocab_size"])
    name = cfg.run or f"{time.strftime('%Y%m%d-%H%M%S')}_{preset}_s{cfg.seed}"
    folder = None if world.rank else state["folder"] if state else open_run(name, SOURCES)
    log = Log(folder)
    try:
        with its_end_noted(folder, log):
            return train(cfg, preset, data, state, folder, log, world)
    except Stopped as e:
        return e.args[1]
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def warm_up(cfg: Config, model: GPT, losses, optimizer: Optimizer, world: World, compiled: bool):
    """Compile every graph and time calibration, on random tokens and untimed; leaves no trace. A row that does not fit
    into memory is halved. -> (Config with the row_tokens that fit, seconds of calibration per row)."""
    params, states = list(model.parameters()), dict.fromkeys((looped_at(cfg, 0.0), True))
    initial = [p.detach().clone() for p in params]

    def batch(n):
        row = torch.from_numpy(np.random.default_rng(world.rank).integers(0, cfg.vocab_size, n + 1)).to(world.device)
        starts = np.arange(0, n, 700)  # of documents of 700 tokens
        return row[:-1], row[1:], make_segments(starts, n, cfg.seq_len, world.device, cfg.seq_len if compiled else 0)

    while True:
        out_of_memory = False
        try:
            for looped in states:
                loss = losses(*batch(cfg.row_tokens), looped).sum() / cfg.batch_tokens
                loss.backward()
        except RuntimeError as e:
            if "out of memory" not in str(e):
                raise
            out_of_memory = True
        if not world.largest(out_of_memory)[0]:
            break
        if cfg.row_tokens % 2 or cfg.row_tokens <= 32:
            raise BadInput(f"--row_tokens={cfg.row_tokens}: not even such a row of this model fits into {world.device}")
        for p in params:
            p.grad = None
        torch.compiler.reset()
        cfg = replace(cfg, row_tokens=cfg.row_tokens // 2)
    optimizer.step(loss, 1.0, cfg.momentum)
    with torch.no_grad():
        for looped in states:
            losses(*batch(cfg.row_tokens), looped)  # validation's graphs
        torch._foreach_copy_(params, initial)
    optimizer.reset()
    rows, seconds = SimpleNamespace(next=lambda seq_len: batch(min(cfg.row_tokens, CALIB_ROW))), 0.0
    for _ in range(2 if cfg.calib_tokens else 0):  # the second is the one that counts
        since = time.perf_counter()
        calibrate(model, rows, 1, cfg.seed)["tokens"].item()
        seconds = time.perf_counter() - since
    return cfg, seconds


def train(cfg: Config, preset: str, data: Dataset, state, folder: Path | None, log: Log, world: World) -> int:
    """One run, from initial weights or a saved state to the saved checkpoint -> exit code 0, or raises Stopped."""
    # ---- setup
    begin, device, cuda = time.perf_counter(), world.device, world.device.type == "cuda"
    sync = partial(torch.cuda.synchronize, device) if cuda else lambda: None
    torch.manual_seed(cfg.seed)
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bf16 else torch.float32  # CPUs are 15-30 times slower in bf16
    env = environment(device, world.size)
    peak_flops = next((v for k, v in PEAK_FLOPS.items() if k in env["device"]), 0.0) * world.size
    dataset = {k: v for k, v in data.meta.items() if k != "files"}
    if folder:
        start = {"preset": preset, "config": asdict(cfg), "environment": env, "dataset": dataset, "source_sha256": {
            f: hashlib.sha256((ROOT / f).read_bytes()).hexdigest() for f in SOURCES}}
        log.record(kind="start", **start)
        print("\n".join(f"{k}: {json.dumps(v)}" for k, v in start.items()), file=log.text)

    # ---- build and warm up
    attention, attend = pick_attention(device, dtype)
    compiled = attention != "sdpa"  # whose segments change their shapes from row to row
    model = GPT(cfg, attend, dtype, **pick_kernels(cfg, device, dtype, log))
    model.init_matrices()  # on the CPU: the same weights on any device
    model.to(device)
    params = list(model.parameters())
    if world.size > 1:
        for p in params:
            dist.broadcast(p.data, 0)
    optimizer = Optimizer(model, cfg, world, compiled=compiled)
    losses = torch.compile(model.losses, dynamic=False, fullgraph=True) if compiled else model.losses
    wanted, (cfg, calib_seconds) = cfg.row_tokens, warm_up(cfg, model, losses, optimizer, world, compiled)
    if cfg.row_tokens < wanted:
        log(f"--row_tokens={wanted} does not fit into this GPU: {cfg.row_tokens}, the same batch in more passes")
    n_rows = cfg.batch_tokens // cfg.row_tokens
    calib_cfg = replace(cfg, row_tokens=min(cfg.row_tokens, CALIB_ROW), seed=cfg.seed + 1)
    calib_rows = -(-cfg.calib_tokens // (calib_cfg.row_tokens * world.size))
    # Calibration is part of the budget: what it will take is set aside, by the slowest rank's estimate.
    (reserve,) = world.largest(1.2 * calib_seconds * calib_rows)
    limit = cfg.max_seconds - reserve if cfg.max_seconds else math.inf
    if limit <= 0:
        raise Stopped(f"--max_seconds={cfg.max_seconds} leaves no time to train: calibration takes {reserve:.0f} s", 2)
    ema = [p.detach().clone() for p in params]  # the averaged weights start where training starts
    clock, in_flight, step, next_val, resumed = Clock(sync), [], 0, 1, 0
    if state:
        step, next_val, clock.total, resumed = state["step"], state["next_val"], state["seconds"], state["resumed"] + 1
        model.load_state_dict(state["weights"])
        torch._foreach_copy_(ema, [state["ema"][name].to(device) for name, _ in model.named_parameters()])
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise Stopped(f"--resume: the state of the optimizer does not fit: {e}", 2) from None
        log(kind="resume", step=step, train_seconds=clock.total, resumed=resumed)
    loader = Loader(data, cfg, world, compiled, first_row=step * n_rows)
    calib_loader = Loader(data, calib_cfg, world)
    val = Validation(data, cfg, world, compiled)
    log(f"attention:{attention} dtype:{str(dtype).split('.')[1]} compile:{'on' if compiled else 'off'} "
        f"parameters:{sum(p.numel() for p in params)} rows_per_step:{n_rows} rows_per_rank:{n_rows // world.size} "
        f"train_tokens:{data.meta.get('train_tokens', 0)} val_tokens:{val.n_tokens} val_docs:{val.n_docs}")
    if attention == "varlen_attn" and torch.cuda.get_device_capability(device)[0] == 9:
        log("WARNING: FlashAttention-3 is not installed: FlashAttention-2 takes 7 to 14 ms more of a record step; "
            "build the package in the folder hopper of github.com/Dao-AILab/flash-attention")
    log(f"warmup_seconds:{time.perf_counter() - begin:.1f} calibration_reserve_seconds:{reserve:.1f}")

    # ---- the loop
    stop_asked = []
    for number in (signal.SIGINT, signal.SIGTERM):  # once: finish early and save; twice: leave at once
        signal.signal(number, lambda n, frame: sys.exit(128 + n) if stop_asked else stop_asked.append(n))
    run = {"seed": cfg.seed, "preset": preset, "dataset": dataset, "environment": env, "finished": False,
           "resumed": resumed}
    last = {"step": step, "train_seconds": clock.total, "train_loss": math.nan}  # the newest log line
    saved = clock.total
    clock.start()
    while True:
        # Look at the steps that have ended. On a GPU the newest may still run: the queue is never empty, never long.
        while len(in_flight) > (1 if cuda else 0):
            last = report(*in_flight.pop(0), last, clock, cfg, limit, peak_flops, log)
        seconds = clock.seconds()
        ahead = len(in_flight) * last.get("step_ms", 0.0) / 1000  # s, queued work
        progress = max((seconds + ahead) / limit, step / cfg.max_steps if cfg.max_steps else 0.0)
        save = bool(cfg.save_every) and seconds - saved >= cfg.save_every
        progress, save, stop = world.largest(*((progress, save) if folder else (0, 0)), bool(stop_asked))
        if stop or progress >= 1:
            break
        log.redraw(f"step {step}  {progress:.0%}  loss {last['train_loss']:.4f}  {seconds:.0f} s, "
                   f"{seconds / progress - seconds if progress else 0:.0f} s left")

        lr, seq_len, looped = lr_at(cfg, progress), seq_len_at(cfg, progress), looped_at(cfg, progress)
        if step and progress * cfg.val_points >= next_val:
            clock.stop()
            next_val = int(progress * cfg.val_points) + 1
            with torch.no_grad():
                raw = [p.clone() for p in params]
                torch._foreach_lerp_(params, ema, cfg.ema_share)
            scores = validate(val, losses, step, progress, looped, clock, log)
            if folder:
                save_checkpoint(folder / "checkpoint.pt", cfg, model, data, {}, {**run, **scores})
            with torch.no_grad():
                torch._foreach_copy_(params, raw)
            world.largest(0)  # no clock runs while one rank writes
            clock.start()
        if save:
            clock.stop()
            memory, weights = optimizer.state_dict(), model.state_dict()
            if folder:  # rows and random numbers follow from the step
                write_tensors(folder / "state.pt", config=asdict(cfg), preset=preset, step=step, next_val=next_val,
                              seconds=clock.total, resumed=resumed, optimizer=memory, weights=weights,
                              ema=dict(zip(weights, ema)))
            saved = clock.total
            world.largest(0)
            clock.start()

        train_loss = torch.zeros((), device=device)
        for micro_step in range(n_rows // world.size):
            loss = losses(*loader.next(seq_len), looped).sum() / cfg.batch_tokens
            loss.backward()
            train_loss += loss.detach()
        numbers = optimizer.step(train_loss, lr, momentum_at(cfg, progress))
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - cfg.ema_decay)
        step += 1
        numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory; readable once `done` has passed
        done = torch.cuda.Event() if cuda else None
        if done:
            done.record()
        in_flight.append(({"step": step, "lr": lr, "looped": looped}, numbers, done))

    # ---- calibration of the averaged weights, the last thing inside the clock
    while in_flight:
        last = report(*in_flight.pop(0), last, clock, cfg, limit, peak_flops, log)
    with torch.no_grad():
        torch._foreach_lerp_(params, ema, cfg.ema_share)
    late = lambda: cfg.max_seconds and clock.seconds() >= cfg.max_seconds  # the estimate was too low: fewer tokens do
    stats = calibrate(model, calib_loader, calib_rows, cfg.seed + world.rank, late) if calib_rows else {}
    for x in stats.values():
        world.sum(x)
    clock.stop()

    # ---- save, validate, sum up
    run |= {"finished": not stop, "steps": step, "tokens": step * cfg.batch_tokens, "train_seconds": clock.total}
    if folder:  # at once, for torchrun kills 30 s after it was asked to stop; again with the score
        save_checkpoint(folder / "checkpoint.pt", cfg, model, data, stats, run)
    run |= validate(val, losses, step, min(progress, 1.0), True, clock, log)
    run["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 1e6 if cuda else 0.0
    if folder:
        save_checkpoint(folder / "checkpoint.pt", cfg, model, data, stats, run)
        for path in (folder / "state.pt", folder / "crash.json", *folder.glob(".*.tmp")):  # of lives that were ended
            path.unlink(missing_ok=True)
        if stop:
            log("stopped early as asked; the checkpoint holds the averaged weights so far")
        keys = ("val_bpb", "val_loss", "train_seconds", "steps", "tokens", "seed", "peak_memory_mb")
        summary = {k: run[k] for k in keys}
        log.record(kind="summary", **summary, finished=not stop)
        log("---")
        for k, v in summary.items():
            log(f"{k}: {v:.6f}" if isinstance(v, float) else f"{k}: {v}")
        log(f"run: {folder}")
    return 0


def validate(val: Validation, losses, step: int, progress: float, looped: bool, clock: Clock, log: Log) -> dict:
    """Score the weights as they are -> what a checkpoint says of its run; the same goes to the log."""
    val_loss, val_bpb = val(losses, looped)
    log(kind="val", step=step, progress=progress, val_loss=val_loss, val_bpb=val_bpb, train_seconds=clock.total)
    return {"steps": step, "tokens": step * val.cfg.batch_tokens, "train_seconds": clock.total, "val_loss": val_loss,
            "val_bpb": val_bpb}


def report(at: dict, numbers: Tensor, done, last: dict, clock, cfg, limit: float, peak_flops: float, log):
    """A step that has ended -> dict, the newest log line. Waits for it, checks its loss, logs it in its turn."""
    if done:
        done.synchronize()
    step, (train_loss, grad_norm) = at["step"], numbers.tolist()
    if not math.isfinite(train_loss):
        good = f"{last['train_loss']:.4f} at step {last['step']}"
        raise Stopped(f"the loss is {train_loss} at step {step}; last good: {good}", 3)
    if step % cfg.log_every and step > 5:
        return last
    seconds = clock.seconds()
    step_ms = 1000 * (seconds - last["train_seconds"]) / (step - last["step"])
    rate = 1000 * cfg.batch_tokens / step_ms
    eta = limit - seconds if cfg.max_seconds else (cfg.max_steps - step) * step_ms / 1000
    line = {"step": step, "train_loss": train_loss, "lr": at["lr"], "grad_norm": grad_norm, "step_ms": step_ms,
            "train_seconds": seconds, "tokens": step * cfg.batch_tokens, "tokens_per_second": int(rate)}
    if peak_flops:
        line["mfu"] = rate * count_flops(cfg, at["looped"]) / peak_flops
    log(kind="step", **line, eta=max(eta, 0.0))
    return line


if __name__ == "__main__":
    sys.exit(command(main))
