"""Train the best language model that fits in 16,000,000 bytes, in ten minutes on 8xH100.

    torchrun --standalone --nproc_per_node=8 train_gpt.py   the record (needs data/fineweb)
    python train_gpt.py                                     the same file on whatever is here: on two
                                                            CPU cores a small model in two minutes
    python train_gpt.py --help                              every setting, its unit and its default

This file needs torch, numpy and a dataset folder, nothing else. It writes runs/<run>/: log.txt,
metrics.jsonl, checkpoint.pt (averaged weights and what pack.py needs), source/. Then `python
pack.py` makes the one file that counts and `python eval_bpb.py` scores it."""
import argparse
import copy
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
# Before torch: spinning OpenMP barriers cost 4-20x on busy cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
try:
    import fcntl  # locks a run for its process; Windows has none
except ImportError:
    fcntl = None
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

HERE = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------------------
# Config. The defaults are the record; the comments are what --help prints; #N are pull requests of
# Parameter Golf.


@dataclass
class Config:
    # run
    data: str = "fineweb"       # dataset: a name under data/, a folder, or "synthetic", random tokens
    run: str = ""               # name of the folder under runs/; empty: preset, date and seed
    seed: int = 1337            # initial weights, data order, calibration samples
    device: str = ""            # cuda, mps or cpu; empty: the best there is
    max_seconds: float = 600.0  # s, the training clock: steps and calibration; 0: no limit
    max_steps: int = 0          # steps; progress is then step / max_steps, repeatable; 0: no limit
    # model (11 x 512 with 17 block applications: #1493, #1855)
    vocab_size: int = 0         # tokens; 0: the dataset's
    n_layer: int = 11           # blocks
    n_embd: int = 512           # width of the residual stream
    n_head: int = 8             # query heads
    n_kv_head: int = 4          # key and value heads
    mlp_dim: int = 2048         # hidden width of the MLP
    loop_first: int = 3         # first block that is repeated
    loop_last: int = 5          # last block that is repeated
    loop_passes: int = 3        # how often the repeated blocks run in all; 1: no recurrence
    loop_at: float = 0.35       # progress at which the recurrence is switched on (#1493)
    two_lane_from: int = 8      # first block with attention and MLP side by side; n_layer: none
    rope_dims: int = 16         # rotated dimensions of each head
    rope_base: float = 10000.0  # base of the rotary frequencies
    gate_dims: int = 12         # input dimensions that steer the gates (#1667, #1787)
    qk_gain: float = 5.0        # initial gain of the normalised queries (#1855)
    softcap: float = 30.0       # logits = softcap * tanh(logits / softcap)
    copy_dim: int = 128         # width of the pointer's queries and keys (modded-nanogpt #379)
    # batch
    batch_tokens: int = 786432  # tokens per optimizer step
    row_tokens: int = 98304     # tokens per forward pass: one packed row of documents
    seq_len: int = 3072         # tokens, longest context; shorter ones come first (schedule_at)
    # optimizer (#1855)
    matrix_lr: float = 0.026    # Muon learning rate, in units of spectral norm per update
    embed_lr: float = 0.03      # AdamW learning rate of the embedding
    scalar_lr: float = 0.02     # AdamW learning rate of gains, mixes and gates
    matrix_wd: float = 0.095    # decoupled weight decay of the matrices, times matrix_lr
    embed_wd: float = 0.085     # decoupled weight decay of the embedding
    scalar_wd: float = 0.02     # decoupled weight decay of gains, mixes and gates
    momentum: float = 0.97      # Muon momentum, reached at 24 % of progress from 0.92
    adam_beta1: float = 0.9     # AdamW decay of the first moment
    adam_beta2: float = 0.99    # AdamW decay of the second moment
    grad_clip: float = 0.3      # largest global gradient norm
    cooldown: float = 0.85      # share of the run, at its end, in which the learning rate falls
    lr_floor: float = 0.10      # learning rate at the end, relative to its peak (#1787)
    ema_decay: float = 0.9965   # per step, of the averaged weights
    ema_share: float = 0.8      # of them in the weights that are saved; the rest: the last (modded-nanogpt #325)
    # measuring
    val_points: int = 4         # validations, evenly spaced, the last at the end; the clock stands still
    val_tokens: int = 0         # tokens of validation documents to use, at least; 0: all
    calib_tokens: int = 524288  # tokens for the statistics that pack.py needs, inside the clock
    log_every: int = 25         # steps between log lines
    save_every: float = 60.0    # s of training between states from which --resume goes on; 0: none

    def __post_init__(self):
        """Raise ValueError, naming the flag, for a value or a combination that cannot run."""
        def refuse(problem, message):
            if problem:
                raise ValueError(message)
        positive = """n_layer n_embd n_head n_kv_head mlp_dim gate_dims copy_dim loop_passes rope_dims batch_tokens
            row_tokens val_points log_every softcap rope_base grad_clip cooldown""".split()
        shares = "momentum adam_beta1 adam_beta2 ema_decay cooldown lr_floor ema_share".split()
        for f in fields(self):
            value = getattr(self, f.name)
            flag = f"--{f.name}={value}"
            refuse(type(value) is not f.type, f"{flag} must be of type {f.type.__name__}")
            if f.type is not str:
                refuse(not 0 <= value < 2 ** 63, f"{flag} must be a finite number, 0 or more")
                refuse(f.name in positive and value == 0, f"{flag} must be above 0")
                refuse(f.name in shares and value > 1, f"{flag} must be at most 1")
        refuse(self.device not in ("", "cuda", "mps", "cpu"), f"--device={self.device} must be cuda, mps or cpu")
        refuse(not re.fullmatch(r"[\w.-]*", self.run), f"--run={self.run!r} must be letters, digits, dots and dashes")
        refuse(not (self.max_seconds or self.max_steps), "--max_seconds or --max_steps must be above 0")
        refuse(self.n_embd % self.n_head or self.n_head % self.n_kv_head,
               f"--n_embd={self.n_embd} must be a multiple of --n_head={self.n_head}, and that of "
               f"--n_kv_head={self.n_kv_head}")
        head_dim = self.n_embd // self.n_head
        refuse(self.rope_dims % 2 or self.rope_dims > head_dim,
               f"--rope_dims={self.rope_dims} must be even and at most the head dimension, {head_dim}")
        refuse(self.gate_dims > self.n_embd, f"--gate_dims={self.gate_dims} must be at most --n_embd={self.n_embd}")
        refuse(self.batch_tokens % self.row_tokens,
               f"--batch_tokens={self.batch_tokens} must be a multiple of --row_tokens={self.row_tokens}")
        refuse(self.seq_len < 3, f"--seq_len={self.seq_len} must be at least 3")
        refuse(max(self.n_layer, self.loop_passes) > 64,
               f"--n_layer={self.n_layer} --loop_passes={self.loop_passes}: at most 64")
        refuse(self.loop_passes > 1 and not self.loop_first <= self.loop_last < self.n_layer,
               f"--loop_first={self.loop_first} --loop_last={self.loop_last} must be in order, "
               f"below --n_layer={self.n_layer}")


SMALL = dict(n_head=4, n_kv_head=2, rope_dims=8, copy_dim=32, batch_tokens=2048, seq_len=384, scalar_lr=0.04,
             val_tokens=65536)
PRESETS = {
    "record": {},
    # The record on one GPU: all of its tokens on an H100, if a step takes what is predicted, 682
    # and 997 ms.
    "single": dict(max_seconds=4430.0),
    # A small model for two CPU cores and two minutes.
    "demo": dict(SMALL, data="demo", max_seconds=120.0, n_layer=4, n_embd=128, mlp_dim=512, loop_passes=1,
                 two_lane_from=3, row_tokens=1024, ema_decay=0.985, calib_tokens=8192, log_every=50),
    # The record's architecture made small, for paired experiments on a CPU.
    "proxy": dict(SMALL, data="proxy", max_seconds=300.0, n_layer=6, n_embd=96, mlp_dim=384, loop_first=2,
                  loop_last=3, two_lane_from=4, row_tokens=2048, ema_decay=0.98, calib_tokens=32768,
                  log_every=20),
}


def show(line):
    """Print a line; if the terminal or the pipe has gone, the run goes on."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def no_cuda():
    """Why there is no CUDA device here, in words; empty where there is one."""
    if torch.cuda.is_available():
        return ""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    return (f"torch {torch.__version__} is built for CUDA {torch.version.cuda} but finds no GPU that it can use: "
            "is there one, and is its driver new enough? (nvidia-smi)")


def parse_config(argv):
    """Arguments, or None for those of the command line -> Config, the folder of the run to resume
    or None. --key=value overrides any field of the preset."""
    settings = inspect.getsource(Config).split("\n", 2)[2].split("\n    def ")[0]  # units and defaults stand there
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,  # so that an error is one line
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        epilog=f"settings, as --name=value, with the values of the record:\n{settings}")
    parser.add_argument("--preset", choices=PRESETS, help="record where there are CUDA and its dataset, else demo; "
                        "single: the record on one GPU; proxy: the record made small")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was killed, with its settings")
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=f.type, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        if len(given) > 1:
            raise ValueError(f"--resume={given['resume']} takes the settings of the run: give no other flag")
        folder = find_state(given["resume"])
        return load_checkpoint(folder / "state.pt", STATE)["config"], folder
    why = no_cuda()
    if not why and "data" not in given and not (HERE / "data/fineweb/meta.json").exists():
        why = "no data/fineweb"
    preset = given.pop("preset", "demo" if why else "record")
    if read_launcher()[0] == 0:
        show(f"preset: {preset}; {why or 'CUDA is here'}")
    if given.get("max_steps"):
        given.setdefault("max_seconds", 0.0)
    cfg = Config(**{**PRESETS[preset], **given})
    return replace(cfg, run=cfg.run or f"{time.strftime('%Y%m%d-%H%M%S')}_{preset}_s{cfg.seed}"), None


# --------------------------------------------------------------------------------------------------
# Model. Tokens are one packed row (N,) of documents cut into segments; nothing crosses a segment's
# start.


class Segments(NamedTuple):
    """Where attention may look: token t sees the tokens of its own segment up to itself."""
    cu_seqlens: Tensor  # (S + 1,) int32, segment starts and N; trailing empty segments allowed
    pos: Tensor  # (N,) int32, position in the segment
    max_len: int  # tokens, at least the longest segment


def to_device(array, device):
    x = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return x.to(device)  # not in the background: MPS reads what is freed (pytorch #139550)
    return x.pin_memory().to(device, non_blocking=True)  # else the CPU waits for the GPU


def make_segments(starts, n_tokens, seq_len, device="cpu", longest=0):
    """starts (K,) int, increasing positions of document starts in a row of n_tokens -> Segments, on
    device.

    A document is cut every seq_len tokens from its start. longest: the longest seq_len of the run,
    lest compiled graphs see more than one shape and one max_len: cu_seqlens is filled up with empty
    segments, and where a row has more than fit, neighbouring documents join.
    """
    longest = longest or seq_len
    # Twice the segments that the shortest context makes of a row without documents, in steps of
    # 256.
    slots = 256 * math.ceil(6 * n_tokens / (256 * longest))
    edges = np.unique([0, *starts, n_tokens])
    while np.ceil(np.diff(edges) / seq_len).sum() > slots:
        edges = np.append(edges[:-1:2], n_tokens)
    pos = (np.arange(n_tokens) - np.repeat(edges[:-1], np.diff(edges))) % seq_len
    cuts = np.flatnonzero(pos == 0)
    cu_seqlens = np.append(cuts, np.full(slots + 1 - len(cuts), n_tokens))
    return Segments(to_device(cu_seqlens.astype(np.int32), device),
                    to_device(pos.astype(np.int32), device), longest)


def segment_lengths(seg):
    return [n for n in seg.cu_seqlens.diff().tolist() if n]


def segment_attention(q, k, v, seg):
    """q (N, H, d), k and v (N, K, d) -> (N, H, d), causal in segments: torch's kernel for each of
    them in turn."""
    lengths = segment_lengths(seg)
    q, k, v = (x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v))  # each (1, heads, length, d)
    y = [F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
         for qkv in zip(q, k, v)]
    return torch.cat(y, 2)[0].transpose(0, 1)


FAR = -1e4  # log of the weight of no places, finite for its gradient
COPY_BLOCK = 128  # places in a block of FlexAttention's


def flex_copies(q, k, tokens, targets, seg):
    """q, k (N, c), tokens and targets (N,) -> (2, N) float32: log-sum-exp of each q's scores with
    the places before it in its segment, and with those of them whose token is its target.

    A FlexAttention of a batch of two over the blocks of each segment. With its projections 1.3 to
    1.8 ms of a record step on paper: 0.32 TFLOP and 0.8 GB. Scores in memory would be 0.8 GB for
    each 2,048 places, ten times over."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
    start = torch.arange(len(q), device=q.device) - seg.pos  # of each token's segment
    block = torch.arange(math.ceil(len(q) / COPY_BLOCK), device=q.device)
    first = start[::COPY_BLOCK] // COPY_BLOCK
    looked_at = (first[:, None] + block).clamp(max=len(block) - 1)
    looked_at = [x.int()[None, None] for x in (block - first + 1, looked_at)]  # number, indices

    def counted(batch, head, t, s):
        return (s < t) & (s >= start[t]) & ((batch == 0) | (tokens[s] == targets[t]))

    mask = BlockMask.from_kv_blocks(*looked_at, BLOCK_SIZE=COPY_BLOCK, mask_mod=counted,
                                    seq_lengths=(len(q), len(q)))
    q, k = (x.repeat(2, 1, 1, 1) for x in (q, k))
    zeros, more = flex_attention(q, k, torch.zeros_like(k[..., :16]), block_mask=mask, scale=1.0,
                                 return_aux=AuxRequest(lse=True))
    # The zeros, for torch cannot differentiate a log-sum-exp alone.
    return (more.lse + zeros[..., 0])[:, 0].clamp(min=FAR)


def pick_attention(capability):
    """-> the best kernel(q, k, v, seg) as segment_attention: FlashAttention-3 if there, else torch's varlen or SDPA."""
    if capability < (8, 0):
        return segment_attention
    if capability[0] == 9:
        try:
            from flash_attn_interface import flash_attn_varlen_func  # FA3; the module `flash_attn` is FA2
            torch.ops.flash_attn_3._flash_attn_forward  # there since it can be compiled
        except Exception:  # not there, or not for this torch
            pass
        else:
            def fa3(q, k, v, seg):
                again = seg.cu_seqlens.view(-1)  # torch 2.13 refuses one tensor given twice
                return flash_attn_varlen_func(q, k, v, seg.cu_seqlens, again, max_seqlen_q=seg.max_len,
                                              max_seqlen_k=seg.max_len, causal=True)
            return fa3
    from torch.nn.attention.varlen import varlen_attn
    grouped = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # since torch 2.13
        grouped = {"enable_gqa": True}

    def varlen(q, k, v, seg):
        return varlen_attn(q, k, v, seg.cu_seqlens, seg.cu_seqlens, seg.max_len, seg.max_len,
                           window_size=(-1, 0), **grouped)
    return varlen


def block_order(cfg, looped):
    """The blocks in the order in which they run: 0..10, or with the recurrence 0..5 3..5 3..5 6..10
    (#1204, #1493)."""
    blocks = list(range(cfg.n_layer))
    if not looped or cfg.loop_passes == 1:
        return blocks
    again = blocks[cfg.loop_first:cfg.loop_last + 1] * (cfg.loop_passes - 1)
    return blocks[:cfg.loop_last + 1] + again + blocks[cfg.loop_last + 1:]


EPS = 1.2e-7  # of root mean squares


def norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=EPS)  # no gain: a scale per block does its work


def lrelu2(x):
    """LeakyReLU(x, 0.5)^2: 0.002 to 0.003 bits per byte better than relu^2 in the public
    records."""
    return F.leaky_relu(x, 0.5).square()


class GPT(nn.Module):
    """A decoder whose matrices are stacked in banks (layer, out, in), one per role: Muon works on
    whole banks.

    Embedding, each token with some of the one before -> blocks in block_order(), the second half of
    which takes back what the first half put out, the last ones with two lanes -> norm -> the tied
    head, mixed with a pointer to the tokens before.

    linear(), attend() and previous() may be replaced on an instance: calibration and test-time
    predictors do."""
    MATRICES = ("qkv", "o", "up", "down", "copy")

    def __init__(self, cfg):
        """cfg with vocab_size set. The small parameters have their initial values; init_matrices()
        draws the rest."""
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # of activations and products
        self.kernel = segment_attention
        self.capability = (0, 0)  # CUDA's, of the device
        self.fused = False  # whether the kernel below does the MLP
        L, D, H, K, M = cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.mlp_dim
        self.head_dim = D // H
        self.qkv_sizes = [D, K * self.head_dim, K * self.head_dim]
        n_skip = len(block_order(cfg, True)) // 2
        # Tied: also the output head. Drawn below: nn.Embedding would draw here, which on the device
        # "meta" imports the compiler, 2 s.
        self.embed = nn.Embedding.from_pretrained(torch.empty(cfg.vocab_size, D), freeze=False)
        self.qkv = nn.Parameter(torch.empty(L, sum(self.qkv_sizes), D))
        self.o = nn.Parameter(torch.empty(L, D, D))
        self.up = nn.Parameter(torch.empty(L, M, D))
        self.down = nn.Parameter(torch.empty(L, D, M))
        # The pointer's queries; its keys, from the state and from the one before.
        self.copy = nn.Parameter(torch.empty(1, 3 * cfg.copy_dim, D))
        small = {
            "q_gain": torch.full((L, H), cfg.qk_gain),
            "attn_gate": torch.zeros(L, H, cfg.gate_dims),
            "x_mix": torch.ones(L, D),  # how much of the stream a block reads
            "x0_mix": torch.zeros(L, D),  # and how much of the embedding
            "attn_scale": torch.ones(L, D),
            "mlp_scale": torch.ones(L, D),
            "skip_scale": torch.ones(n_skip, D),
            "skip_gate": torch.zeros(n_skip, D),
            "smear_gate": torch.zeros(cfg.gate_dims),
            "smear_scale": torch.zeros(1),
            "copy_gain": torch.ones(1),
            "copy_sink": torch.zeros(cfg.copy_dim),
            "copy_gate": torch.zeros(D),
            "copy_bias": torch.tensor([-4.0]),
            # Per two-lane block: keep of lane 0 and lane 1; attention into 0 and 1; MLP into 0 and 1.
            "lanes": torch.tensor([1.1, 1.1, 1, 1, 1, 1]).repeat(max(L - cfg.two_lane_from, 0), 1),
        }
        for name, x in small.items():
            self.register_parameter(name, nn.Parameter(x))

    @torch.no_grad()
    def init_matrices(self):
        """Draw the initial matrices from torch's generator."""
        nn.init.normal_(self.embed.weight, std=0.005)
        query, key, key_before = self.copy.chunk(3, 1)
        for bank in (*self.qkv.split(self.qkv_sizes, 1), self.up, query, key):
            for W in bank:
                nn.init.orthogonal_(W)
        self.o.zero_()  # every block starts as the identity
        self.down.zero_()
        key_before.zero_()

    def place(self, device):
        """Move to device and choose what is best there: the dtype, attention's kernel."""
        if device.type == "cuda":
            self.capability = torch.cuda.get_device_capability(device)
        # GPUs before 8.0 emulate bf16; CPUs without AMX are 15-30 times slower in it.
        self.dtype = torch.bfloat16 if self.capability >= (8, 0) else torch.float32
        self.kernel = pick_attention(self.capability)
        return self.to(device)

    def linear(self, x, W, name, visit=0):
        """x (N, in), W (out, in) of the bank `name` -> (N, out); visit counts the block
        applications."""
        return F.linear(x, W)

    def attend(self, q, k, v, seg, visit):
        """q (N, H, d), k and v (N, K, d) -> (N, H, d)."""
        return self.kernel(q, k, v, seg)

    def previous(self, x, name):
        """x (N, .), the tokens' "embed" or "copy" -> (N, .), those of the tokens before."""
        return F.pad(x, (0, 0, 1, 0))[:-1]

    def forward(self, tokens, seg, looped=True):
        """tokens (N,) int -> hidden (N, D) after the last norm, in self.dtype; logits() makes it
        logits."""
        cfg = self.cfg

        def cast(p):
            return p.to(self.dtype)
        lanes = cast(self.lanes).unbind()
        skip_scale = cast(self.skip_scale).unbind()
        skip_gate = cast(self.skip_gate.sigmoid()).unbind()
        # Scales of a product's output are folded into its matrix: a product the size of the weights
        # instead of one of the activations, each way.
        weights = {"qkv": self.qkv, "o": self.o * self.attn_scale[:, :, None], "up": self.up,
                   "down": self.down * self.mlp_scale[:, :, None], "gate": self.attn_gate * 0.5,
                   "x": self.x_mix, "x0": self.x0_mix}
        weights = {name: cast(W).unbind() for name, W in weights.items()}
        weights["gain"] = self.q_gain

        # Rotary angles from the position in the segment, once for all blocks, in fp32.
        freqs = torch.arange(0, cfg.rope_dims, 2, device=tokens.device)
        # Not as a power, which torch 2.13 does not fuse: 6 GB more of a record step forward.
        freqs = torch.exp(freqs * (-math.log(cfg.rope_base) / cfg.rope_dims))
        angle = seg.pos[:, None, None] * freqs  # (N, 1, rope_dims / 2)
        rotary = angle.cos(), angle.sin()

        # SmearGate: each token takes some of the one before it, never across a segment's start
        # (#1667, #1851; -0.0005).
        x = cast(self.embed(tokens))  # (N, D)
        open_gate = (x[:, :cfg.gate_dims] * cast(self.smear_gate)).sum(-1).sigmoid() * (seg.pos > 0)
        x = x + (cast(self.smear_scale) * open_gate)[:, None] * self.previous(x, "embed")
        x = x0 = norm(x)

        order = block_order(cfg, looped)
        n_encoder = len(order) // 2
        skips = []
        lane = None
        for visit, i in enumerate(order):
            if i >= cfg.two_lane_from and lane is None:
                lane = x  # before the skip, which joins lane 0 only
            if visit >= n_encoder and skips:  # U-Net: the decoder takes back the encoder's outputs
                j = visit - n_encoder
                x = torch.lerp(skip_scale[j] * skips.pop(), x, skip_gate[j])
            W = {name: bank[i] for name, bank in weights.items()}
            u = W["x"] * x + W["x0"] * x0
            depth = (i + 1) ** -0.5  # deeper blocks read a smaller norm (public: -0.002 with partial RoPE)
            a = self.attention(norm(u) * depth, W, rotary, seg, visit)
            if i < cfg.two_lane_from:
                x = u + a
                x = x + self.mlp(norm(x) * depth, W, visit)
            else:  # attention and MLP side by side (#1529: -0.004)
                m = self.mlp(norm(lane) * depth, W, visit)
                keep0, keep1, a0, a1, m0, m1 = lanes[i - cfg.two_lane_from].unbind()
                x, lane = keep0 * x + a0 * a + m0 * m, keep1 * lane + a1 * a + m1 * m
            if visit < n_encoder:
                skips.append(x)
        return norm(x if lane is None else (x + lane) / 2)

    def attention(self, x, W, rotary, seg, visit):
        """x (N, D), the block's normed input; W, its matrices and gain; rotary, cos and sin -> (N,
        D)."""
        qkv = self.linear(x, W["qkv"], "qkv", visit).view(len(x), -1, self.head_dim)
        H, K = self.cfg.n_head, self.cfg.n_kv_head
        q, k, v = qkv.split([H, K, K], 1)
        q = RotatedHeads.apply(q, W["gain"], *rotary)
        k = RotatedHeads.apply(k, W["gain"].new_ones(K), *rotary)
        # Before attention: after it, the compiler would keep v in float32 for backward.
        v_unit, v_length = unit(v)
        y = self.attend(q, k, v, seg, visit)  # (N, H, d)
        gate = F.linear(x[:, :self.cfg.gate_dims], W["gate"])  # (N, H)
        heads = y.view(len(x), K, H // K, -1).unbind(2)  # of each value, one by one
        gates = gate.view(len(x), K, H // K, 1).unbind(2)
        y = [GatedXSA.apply(y, v, v_unit, v_length, gate) for y, gate in zip(heads, gates)]
        y = torch.stack(y, 2).view(x.shape)
        return self.linear(y, W["o"], "o", visit)

    def mlp(self, x, W, visit):
        """x (N, D), normed -> (N, D)."""
        if self.fused and len(x) % TILE[0] == 0:
            return FusedMLP.apply(x, W["up"], W["down"])
        h = lrelu2(self.linear(x, W["up"], "up", visit))
        return self.linear(h, W["down"], "down", visit)

    def logits(self, hidden):
        """hidden (N, D) -> logits (N, V) float32, softcapped."""
        z = self.linear(hidden, self.embed.weight.to(hidden.dtype), "embed").float()
        return self.cfg.softcap * torch.tanh(z / self.cfg.softcap)

    def pointer(self, hidden, seg):
        """hidden (N, D) -> queries and keys (N, c), scores of the sink and the gate (N,) float32.

        p(y) = p_lm(y) (1 - a (1 - A_sink)) + a * sum of A_s over the places s before whose token is
        y, where A is the softmax of q . k_s and the sink's score, and a = sigmoid(gate). As a key
        reads the state before its place too, q can find what followed a state like its own.
        (modded-nanogpt #379: 12 % fewer steps for 1.3 % more time, 8 runs against 13. There a is one
        more logit's share of the softmax: no better here.)"""
        q, k, before = self.linear(hidden, self.copy[0].to(hidden.dtype), "copy").chunk(3, 1)
        q = norm(q) * (self.copy_gain * self.cfg.copy_dim ** -0.5).to(q.dtype)
        k = norm(k + self.previous(before, "copy") * (seg.pos > 0)[:, None])
        sink = (q * self.copy_sink.to(q.dtype)).sum(-1).float()
        return q, k, sink, (hidden * self.copy_gate.to(q.dtype)).sum(-1).float() + self.copy_bias

    def mixture(self, logits, q, k, sink, gate, tokens):
        """logits (.., T, V), q (.., T, c), sink and gate (.., T) of the last T places, k (.., S, c)
        and tokens (.., S) of all -> p (.., T, V) float32."""
        scores = (q @ k.mT).float()
        not_before = torch.ones_like(scores, dtype=torch.bool).triu(k.size(-2) - q.size(-2))
        # No finite number: weights could score all places below it, and these may be the target's.
        scores = torch.cat([scores.masked_fill(not_before, -math.inf), sink[..., None]], -1)
        shares = scores.softmax(-1)[..., :-1]
        shares = shares * gate.sigmoid()[..., None]
        p = logits.softmax(-1) * (1 - shares.sum(-1, keepdim=True))
        return p.scatter_add(-1, tokens[..., None, :].expand(shares.shape), shares)

    def probabilities(self, hidden, tokens, seg):
        """hidden (N, D) of tokens (N,) -> p (N, V) float32 of what follows each."""
        parts = (self.logits(hidden), *self.pointer(hidden, seg), tokens)
        parts = zip(*(x.split(segment_lengths(seg)) for x in parts))
        return torch.cat([self.mixture(*part) for part in parts])

    def losses(self, tokens, targets, seg, looped):
        """tokens, targets (N,) int64 -> nats (N,) float32 of each target: -log of pointer()'s p, on
        GPUs without holding p (N, V)."""
        hidden = self(tokens, seg, looped)
        if self.kernel is segment_attention:
            return -self.probabilities(hidden, tokens, seg).gather(1, targets[:, None])[:, 0].log()
        nats = SoftcapCE.apply(F.linear(hidden, self.embed.weight.to(hidden.dtype)), targets, self.cfg.softcap)
        q, k, sink, gate = self.pointer(hidden, seg)
        every, same = flex_copies(q, k, tokens, targets, seg)
        scale = F.logsigmoid(gate) - torch.logaddexp(every, sink)  # log of a over the sum of weights
        kept = torch.logaddexp(F.logsigmoid(-gate), scale + sink)
        return -torch.logaddexp(kept - nats, scale + same)


def rotate(x, cos, sin):
    """x (N, heads, d): the first 2 * r dimensions turned as pairs (i, i + r) by the angles of cos,
    sin (N, ., r)."""
    r = cos.size(-1)
    a, b, rest = x.split([r, r, x.size(-1) - 2 * r], -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)


# What stands between the products of attention, and the loss, as functions with gradients of their
# own: of a record step of 94 ms on paper heads take 2.7 ms less, XSA 2.5, the loss 4 to 6
# (records/evidence/roofline.py, against plain torch). A test compares the model's gradients with
# finite differences.


class RotatedHeads(torch.autograd.Function):
    """x (N, H, d), gain (H,), cos and sin (N, 1, r) float32 -> y (N, H, d), of unit mean square,
    rotated, times the gains.

    With x^ = x / rms(x), y = gain R x^, y^ = y / gain, g = dy: dx = gain R^T (g - y^ mean(y^ g)) /
    rms(x)."""

    @staticmethod
    def forward(ctx, x, gain, cos, sin):
        gain = gain[:, None] + 1e-12  # backward divides by it
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
        y = (rotate(x.float(), cos, sin) * (scale * gain)).to(x.dtype)
        ctx.save_for_backward(y, gain, cos, sin, scale)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, gain, cos, sin, scale = ctx.saved_tensors
        y, g = y.float(), dy.float()
        dot = (y * g).sum(-1, keepdim=True) / gain  # x^ R^T g: their sum is the gain's gradient
        dx = rotate(g, cos, -sin) * gain - rotate(y, cos, -sin) * (dot / y.size(-1))
        return (dx * scale).to(dy.dtype), dot.sum((0, 2)), None, None


def unit(v):
    """v (N, K, d) -> v / |v| float32, |v| (N, K, 1)."""
    v = v.detach().float()
    length = v.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return v / length, length


class GatedXSA(torch.autograd.Function):
    """y (N, K, d), heads that share no values, v (N, K, d), unit(v), gate (N, K, 1) -> (N, K, d):
    each head less what lies along its token's own value (XSA, #265), times sigmoid(gate) (sparse
    attention gate, #1787).

    With v^ = v / |v|, p = y v^: z = s (y - p v^). Then dy = e - q v^ where e = s dz and q = e v^,
    and dv = (2 p q v^ - p e - q y) / |v|."""

    @staticmethod
    def forward(ctx, y, v, v_unit, v_length, gate):
        ctx.save_for_backward(y, v_unit, v_length, gate)
        p = (y.float() * v_unit).sum(-1, keepdim=True)
        return ((y.float() - p * v_unit) * gate.float().sigmoid()).to(y.dtype)

    @staticmethod
    def backward(ctx, dz):
        y, v_unit, v_length, gate = ctx.saved_tensors
        y, g, s = y.float(), dz.float(), gate.float().sigmoid()
        e = g * s
        p = (y * v_unit).sum(-1, keepdim=True)
        q = (e * v_unit).sum(-1, keepdim=True)
        dgate = (g * (y - p * v_unit)).sum(-1, keepdim=True) * s * (1 - s)
        dv = (2 * p * q * v_unit - p * e - q * y) / v_length
        return (e - q * v_unit).to(dz.dtype), dv.to(dz.dtype), None, None, dgate.to(gate.dtype)


class SoftcapCE(torch.autograd.Function):
    """x (N, V) raw logits, targets (N,) int64, cap -> nats (N,) float32 of cap * tanh(x / cap).

    cap * tanh(x / cap) = 2 cap s - cap where s = sigmoid(2 x / cap): the constant drops out of the
    softmax, 2 cap serves as its maximum, and the compiler reads x once forward, and reads and writes
    once backward. d(2 cap s) / dx = 4 s (1 - s)."""

    @staticmethod
    def forward(ctx, x, targets, cap):
        s = (x.float() * (2 / cap)).sigmoid()
        lse = 2 * cap + (2 * cap * (s - 1)).exp().sum(1).log()
        ctx.save_for_backward(x, targets, lse)
        ctx.cap = cap
        return lse - 2 * cap * s.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, grad):
        x, targets, lse = ctx.saved_tensors
        s = (x.float() * (2 / ctx.cap)).sigmoid()
        p = (2 * ctx.cap * s - lse[:, None]).exp()
        is_target = torch.arange(x.size(1), device=x.device) == targets[:, None]
        dx = grad[:, None] * (p - is_target.float()) * 4 * s * (1 - s)
        return dx.to(x.dtype), None, None


# --------------------------------------------------------------------------------------------------
# A kernel for an H100 (GPT.fused), where memory traffic is spent that the compiler does not save.
# The torch reference stands in GPT.mlp; a test compares them. Sizes are constants to Triton: a
# model has few.

if triton:
    @triton.jit
    def up_kernel(a_ptr, b_ptr, pre_ptr, out_ptr, N, stride_bn, stride_bk, K: tl.constexpr,
                  BACKWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        # acc = A (M, K) @ B (N, K)^T, all multiples of the tile. Forward: pre = acc, out =
        # lrelu2(acc). Backward: out = acc * lrelu2'(pre). Neighbours share rows of A; all of B
        # stays in L2.
        m = tl.program_id(1) * BM + tl.arange(0, BM)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        a = a_ptr + m[:, None].to(tl.int64) * K + k[None, :]
        b = b_ptr + n[None, :] * stride_bn + k[:, None] * stride_bk
        acc = tl.zeros((BM, BN), tl.float32)
        for _ in range(0, K, BK):
            acc = tl.dot(tl.load(a), tl.load(b), acc, input_precision="ieee")
            a += BK
            b += BK * stride_bk
        at = m[:, None].to(tl.int64) * N + n[None, :]
        if BACKWARD:
            pre = tl.load(pre_ptr + at).to(tl.float32)
            tl.store(out_ptr + at, acc * tl.where(pre > 0, 2 * pre, 0.5 * pre))
        else:
            tl.store(pre_ptr + at, acc)
            tl.store(out_ptr + at, acc * tl.where(acc > 0, acc, 0.25 * acc))


TILE = (128, 256, 64)  # rows, columns and depth of the product that one program computes


def up_product(a, b, pre=None):
    """a (M, K) contiguous, b (N, K) of any strides -> pre = a @ b^T and lrelu2(pre), both (M, N).
    With the pre of the forward pass: (a @ b^T) * lrelu2'(pre)."""
    M, N = len(a), len(b)
    BM, BN, BK = TILE
    backward = pre is not None
    out = a.new_empty(M, N)
    pre = pre if backward else torch.empty_like(out)
    up_kernel[N // BN, M // BM](a, b, pre, out, N, *b.stride(), K=a.size(1), BACKWARD=backward,
                                BM=BM, BN=BN, BK=BK, num_warps=8, num_stages=3)
    return out if backward else (pre, out)


class FusedMLP(torch.autograd.Function):
    """x (N, D), up (M, D), down (D, M) -> lrelu2(x @ up^T) @ down^T: the activation rides on the
    matrix products. 8.9 of 94 ms of a record step on paper."""

    @staticmethod
    def forward(ctx, x, up, down):
        pre, h = up_product(x.contiguous(), up)
        ctx.save_for_backward(x, up, down, pre, h)
        return h @ down.t()

    @staticmethod
    def backward(ctx, dy):
        x, up, down, pre, h = ctx.saved_tensors
        dpre = up_product(dy.contiguous(), down.t(), pre)
        return dpre @ up, dpre.t() @ x, dy.t() @ h


# --------------------------------------------------------------------------------------------------
# Optimizer: Muon for the banks of matrices, torch's AdamW for the embedding and the small
# parameters.

# Polar Express: the best five quintic steps towards the orthogonal factor in bf16 (arXiv
# 2505.16932; scaled by 1.02).
POLAR_EXPRESS = [(8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]


def orthogonalize(G):
    """G (n, rows, cols) -> the nearest semi-orthogonal matrices times sqrt(max(1, rows / cols));
    singular values above 1e-3 of the norm land within 0.86 .. 1.14. Rows are first scaled to one
    length (MuonEq-R, arXiv 2603.28254)."""
    X = F.normalize(G, dim=-1, eps=1e-7)
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X  # the products are on the short side
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    X = X.mT if tall else X
    return X * max(1.0, G.size(-2) / G.size(-1)) ** 0.5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then the nearest orthogonal matrix (Keller Jordan). For banks (layer,
    rows, cols) of hidden matrices only; lr in units of spectral norm per update.

    Every rank keeps all momenta and orthogonalises every world_size-th layer of each bank: on paper
    0.2 ms of a record step instead of 1 to 2.5; their sum over the ranks, most of it zeros, is the
    whole. A group is one bank; its `rows` are those of the matrices stacked in a layer, such as q,
    k and v.
    train_step() sets lr and momentum."""
    orthogonalize = staticmethod(orthogonalize)

    @torch.no_grad()
    def step(self):
        rank, _, world_size = read_launcher()
        updates = []
        for group in self.param_groups:
            (p,) = group["params"]
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            m = state["momentum_buffer"]
            m.mul_(group["momentum"]).add_(p.grad)
            update = p.grad + group["momentum"] * m
            update = update.bfloat16() if p.is_cuda else update
            updates.append(torch.zeros_like(update))
            if rank < len(p):
                parts = update[rank::world_size].split(group["rows"], 1)
                updates[-1][rank::world_size] = torch.cat([self.orthogonalize(part) for part in parts], 1)
        sum_over_ranks(updates)
        for group, update in zip(self.param_groups, updates):
            (p,) = group["params"]
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def make_optimizers(model, cfg, compiled=False):
    """-> Muon, AdamW. Each group holds its peak_lr; no parameter is left out."""
    banks = {name: getattr(model, name) for name in model.MATRICES}
    rows = {"qkv": model.qkv_sizes, "copy": cfg.copy_dim}
    muon = Muon([{"params": [bank], "rows": rows.get(name, bank.size(1)), "peak_lr": cfg.matrix_lr,
                  "weight_decay": cfg.matrix_wd} for name, bank in banks.items()], {})
    if compiled:
        muon.orthogonalize = torch.compile(orthogonalize, dynamic=False, fullgraph=True)
    small = [p for name, p in model.named_parameters() if name not in (*banks, "embed.weight")]
    adamw = torch.optim.AdamW([
        {"params": [model.embed.weight], "peak_lr": cfg.embed_lr, "weight_decay": cfg.embed_wd},
        {"params": small, "peak_lr": cfg.scalar_lr, "weight_decay": cfg.scalar_wd},
    ], betas=(cfg.adam_beta1, cfg.adam_beta2), fused=True)
    return [muon, adamw]


# --------------------------------------------------------------------------------------------------
# Processes: those that torchrun started, or this one alone. CPU tensors travel by gloo, a GPU's by
# NCCL.


def read_launcher():
    """RANK, LOCAL_RANK and WORLD_SIZE of the environment; 0, 0, 1 without torchrun. Raises
    ValueError."""
    given = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    if not any(given):
        return 0, 0, 1
    if all(re.fullmatch(r"\d{1,6}", value) for value in given):
        rank, local_rank, world_size = map(int, given)
        if max(rank, local_rank) < world_size:
            return rank, local_rank, world_size
    raise ValueError(f"the environment has RANK, LOCAL_RANK, WORLD_SIZE = {given}: torchrun sets all three, the "
                     "first two below the third")


def join_ranks(cfg):
    """Start the process group, if there are others -> the device of this rank. Raises
    ValueError."""
    rank, local_rank, world_size = read_launcher()
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()),
             "cpu": world_size}
    kind = cfg.device or next(kind for kind in count if count[kind])
    if local_rank >= count[kind]:
        raise ValueError(f"--device={kind}: {kind == 'cuda' and no_cuda() or 'this machine has none, or fewer than ranks'}")
    n_rows = cfg.batch_tokens // cfg.row_tokens
    if n_rows % world_size:
        raise ValueError(f"--batch_tokens={cfg.batch_tokens} is {n_rows} rows of --row_tokens="
                         f"{cfg.row_tokens}, which {world_size} ranks cannot share evenly")
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    if kind != "cuda":
        return torch.device(kind)
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("high")  # TF32 for what is not bf16
    return torch.device(kind, local_rank)


def sum_over_ranks(tensors):
    """Each tensor becomes its sum over all ranks, all in flight at once."""
    if dist.is_initialized():
        for handle in [dist.all_reduce(x, async_op=True) for x in tensors]:
            handle.wait()


def largest(*values):
    """The largest of each value over all ranks; also where they wait for each other."""
    agreed = torch.tensor(values, dtype=torch.float64)  # on the CPU: no GPU waits for it
    if dist.is_initialized():
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed.tolist()


# --------------------------------------------------------------------------------------------------
# Data. A dataset is a folder: meta.json, tokenizer.json, shards train_NNNNNN.bin and val_NNNNNN.bin
# (data/README.md).

BOUNDARY = 0  # the token that starts each document


def read_shard(path):
    """Shard file: 256 little-endian int32 (20240520, 1, number of tokens, 0 ...), uint16 tokens ->
    (n,) mapped."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 3).tolist()
    if size < 1026 or header[:2] != [20240520, 1] or size != 1024 + 2 * header[2]:
        raise ValueError(f"{path}: not a token shard, empty or cut short")
    return np.memmap(path, "<u2", mode="r", offset=1024)


def find_dataset(name):
    """Name under data/, or path of a folder with a meta.json. Raises ValueError with the command
    that prepares it."""
    for folder in (Path(name), HERE / "data" / name, Path("data") / name):
        if (folder / "meta.json").is_file():
            return folder
    how = name if name in ("demo", "fineweb") else f"docs PATH --name={name}"
    raise ValueError(f"--data={name}: no such dataset; prepare it with: python data/prepare.py {how}")


class Dataset:
    """A dataset as training reads it: vocab_size, meta (dict), tokenizer (the text of
    tokenizer.json, for pack.py), train [a shard's tokens (n,) uint16, mapped], val (n,) uint16 in
    whole documents and the bytes of their text, val_bytes."""

    def __init__(self, cfg):
        """Checks what a run relies on: the files against meta.json, the shards for tokens outside
        the vocabulary. Raises ValueError."""
        self.tokenizer = ""
        if cfg.data == "synthetic":
            self.vocab_size = cfg.vocab_size or 8192
            self.meta = {"name": "synthetic"}
            n = max(1 << 22, 2 * cfg.row_tokens)
            self.train = [synthetic_tokens(self.vocab_size, n, seed) for seed in range(8)]
            self.val = synthetic_tokens(self.vocab_size, 4 * cfg.row_tokens, 8)
            self.val_bytes = math.nan
            return
        folder = find_dataset(cfg.data)
        try:
            self.meta = json.loads((folder / "meta.json").read_bytes())
            files = self.meta.pop("files")
            self.vocab_size, self.val_bytes = int(self.meta["vocab_size"]), int(self.meta["val_bytes"])
            self.tokenizer = (folder / "tokenizer.json").read_text("utf-8")
            if hashlib.sha256(self.tokenizer.encode()).hexdigest() != self.meta["tokenizer_sha256"]:
                raise ValueError("tokenizer.json is not the one that meta.json names")
            shards = {"train": [], "val": []}
            for name in sorted(files):
                if split := re.fullmatch(r"(train|val)_\d+\.bin", name):
                    tokens = read_shard(folder / name)
                    if tokens.nbytes + 1024 != files[name]["bytes"]:
                        raise ValueError(f"{name} is not as long as meta.json says")
                    if tokens.max() >= self.vocab_size:
                        raise ValueError(f"{name} has tokens outside the vocabulary of {self.vocab_size}")
                    shards[split[1]].append(tokens)
            self.train = shards["train"]
            longest = max(map(len, self.train))
            val = np.concatenate(shards["val"])
        except Exception as e:  # whatever its bytes are
            raise ValueError(f"dataset {folder}: damaged: {type(e).__name__}: {e}") from None
        if cfg.vocab_size not in (0, self.vocab_size):
            raise ValueError(f"--vocab_size={cfg.vocab_size}, but {folder} has {self.vocab_size}: leave it 0")
        if longest <= cfg.row_tokens:
            raise ValueError(f"--row_tokens={cfg.row_tokens}: no train shard of {folder} is that long")
        ends = np.append(np.flatnonzero(val == BOUNDARY), len(val))  # of the documents, and 0
        self.val = val[:ends[np.searchsorted(ends[:-1], cfg.val_tokens or len(val))]]
        self.val_bytes *= len(self.val) / len(val)  # of a part: what its tokens have on average


def synthetic_tokens(vocab_size, n, seed):
    """-> n random tokens uint16 in documents of web-like lengths (lognormal, median 403 tokens,
    mean 690)."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocab_size, n, dtype=np.uint16)
    starts = rng.lognormal(np.log(403), 1.04, n // 690).cumsum().astype(int)
    tokens[starts % n] = BOUNDARY
    return tokens


def make_batch(row, seq_len, device, longest=0):
    """row (N + 1,) of tokens -> tokens (N,), targets (N,) int64 on the device, Segments of at most
    seq_len tokens. A document's last target is the boundary that starts the next."""
    starts = np.flatnonzero(row[:-1] == BOUNDARY)
    x = to_device(row.astype(np.int64), device)
    return x[:-1], x[1:], make_segments(starts, len(row) - 1, seq_len, device, longest)


def read_rows(data, cfg, first_row=0):
    """Yields rows (row_tokens + 1,) uint16 for ever, the last token only a target: shards in a
    seeded order, the documents of each in a seeded order, cut into rows.

    The stream is the same whatever the number of ranks and starts at first_row, counted over all of
    them; rank r of n gets rows r, r + n, ... (The public loaders that mix documents gained 0.002
    bits per byte over sequential ones.)"""
    rank, _, world_size = read_launcher()
    n = cfg.row_tokens
    index = 0
    for epoch in itertools.count():
        rng = np.random.default_rng((cfg.seed, epoch))
        for shard in rng.permutation(len(data.train)):
            tokens = data.train[shard]
            documents = np.split(np.asarray(tokens), np.flatnonzero(tokens == BOUNDARY)[1:])
            parts = []
            size = 0
            for document in rng.permutation(len(documents)):
                parts.append(documents[document])
                size += len(parts[-1])
                while size > n:  # the tail of a shard that fills no row is left out
                    whole = np.concatenate(parts)
                    if index >= first_row and index % world_size == rank:
                        yield whole[:n + 1]
                    parts = [whole[n:]]
                    size -= n
                    index += 1


def read_ahead(stream):
    """Yields what the stream does, which a thread reads 16 rows ahead."""
    reader = ThreadPoolExecutor(1)
    ahead = deque(reader.submit(next, stream) for _ in range(16))
    while True:
        ahead.append(reader.submit(next, stream))
        yield ahead.popleft().result()


def validate(losses, data, cfg, batch, looped):
    """Score whole validation documents in order, each target once, with a context of up to seq_len.
    losses as GPT.losses, batch(row, seq_len) as make_batch -> {"val_loss": nats per token,
    "val_bpb": bits per byte}. With gradients on, for other graphs would take minutes to compile."""
    rank, _, world_size = read_launcher()
    n = cfg.row_tokens
    n_targets = len(data.val)
    # The boundary that closes the last document, then what does not count.
    tokens = np.pad(np.append(data.val, BOUNDARY), (0, -n_targets % n), constant_values=1)
    nats = torch.zeros((), dtype=torch.float64)
    for start in range(rank * n, n_targets, world_size * n):
        row = batch(tokens[start:start + n + 1], cfg.seq_len)
        nats += losses(*row, looped).detach()[:n_targets - start].cpu().double().sum()
    sum_over_ranks([nats])
    return {"val_loss": nats.item() / n_targets, "val_bpb": nats.item() / math.log(2) / data.val_bytes}


# --------------------------------------------------------------------------------------------------
# Schedules: pure functions of progress in [0, 1].


class Schedule(NamedTuple):
    lr: float  # relative to each group's peak
    momentum: float  # Muon's
    seq_len: int  # tokens
    looped: bool


def schedule_at(cfg, progress):
    """The learning rate is 1, then a line to 0 over the cooldown, never below lr_floor (#1787).
    Short contexts come first: a third of seq_len, two thirds, all (#2014: 1k, 2k, 3k; -0.001)."""
    lr = min(1.0, max(cfg.lr_floor, (1 - progress) / cfg.cooldown))
    momentum = 0.92 + (cfg.momentum - 0.92) * min(progress / 0.24, 1.0)
    thirds = 1 if progress < 0.1 else 2 if progress < 0.7 else 3
    return Schedule(lr, momentum, cfg.seq_len * thirds // 3, progress >= cfg.loop_at)


# --------------------------------------------------------------------------------------------------
# Calibration and checkpoint

CALIB_ROW = 16384  # tokens at a time, at most: float32 copies of their activations must fit


def calibrate(model, next_batch, n_rows, seed, late=lambda: False):
    """Sums over n_rows of next_batch(), as make_batch(), with labels sampled from the model (the
    true Fisher):

    bank.H (L, in, in) of x x^T and bank.g (L, out) of (dL/dy)^2 for each y = W x, over all visits
    of a looped block; for the tied embedding embed.H and embed.g as the head, embed.S (D, D) of
    (dL/dx)(dL/dx)^T as the input; tokens (1,). embed.g is p (1 - p) times the softcap's slope
    squared: the pointer left out, about a third too much. Ends after a row once late() is true."""
    device = model.embed.weight.device
    cap = model.cfg.softcap
    order = block_order(model.cfg, looped=True)
    generator = torch.Generator(device).manual_seed(seed)
    stats = {"tokens": torch.zeros(1, device=device)}
    banks = {"embed": model.embed.weight[None], **{name: getattr(model, name) for name in model.MATRICES}}
    for name, bank in banks.items():
        L, n_out, n_in = bank.shape
        stats[f"{name}.H"] = torch.zeros(L, n_in, n_in, device=device)
        stats[f"{name}.g"] = torch.zeros(L, n_out, device=device)
    stats["embed.S"] = torch.zeros_like(stats["embed.H"][0])

    def add_outer(H, x):
        x = x.detach().float()
        H += x.mT @ x

    def add_squares(g, dy):
        g += dy.float().square().sum(0)

    def tap(x, W, name, visit=0):
        layer = order[visit]  # the first, 0, for embed and copy
        add_outer(stats[f"{name}.H"][layer], x)
        y = F.linear(x, W)
        g = stats[f"{name}.g"][layer]
        if name == "embed":  # labels are too few for rare tokens: packed to 1.5 bits, twice the loss
            capped = (y.detach().float() / cap).tanh()
            p = (cap * capped).softmax(-1)
            g += (p * (1 - p) * (1 - capped.square()).square()).sum(0)
        else:
            y.register_hook(partial(add_squares, g))
        return y

    def tap_embedding(module, inputs, x):
        x.requires_grad_().register_hook(partial(add_outer, stats["embed.S"]))

    model = copy.deepcopy(model).requires_grad_(False)  # only activations need gradients here
    model.fused, model.linear = False, tap
    model.embed.register_forward_hook(tap_embedding)
    for i in range(n_rows):
        if i and late():
            break
        tokens, _, seg = next_batch()
        p = model.probabilities(model(tokens, seg), tokens, seg)
        labels = torch.multinomial(p.detach(), 1, generator=generator)
        p.gather(1, labels).log().sum().neg().backward()
        stats["tokens"] += len(tokens)
    # These products had scales folded into their matrices; the statistics are of those without.
    stats["o.g"] *= model.attn_scale.square()
    stats["down.g"] *= model.mlp_scale.square()
    return stats


def write_checkpoint(path, **values):
    """What load_checkpoint() reads. The file that stands there is replaced in one step, or stays as
    it is."""
    buffer = io.BytesIO()  # a full disk must fail in write(), not in torch.save
    torch.save(values, buffer)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: {e.strerror}") from None


CHECKPOINT = {"weights": dict, "stats": dict, "run": dict, "tokenizer": str}
STATE = {"weights": dict, "ema": dict, "optimizers": list, "step": int,
         "seconds": float, "dataset": dict}


def load_checkpoint(path, kinds=CHECKPOINT):
    """checkpoint.pt, or state.pt with kinds=STATE -> {"config": Config, each of kinds, ...}. The
    file may come from anywhere: checksums first, which torch does not look at, then tensors and
    plain values only, the weights of the shapes that the config describes. Raises ValueError."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: train first, python train_gpt.py")
    try:
        with zipfile.ZipFile(path) as z:
            if (bad := z.testzip()) is not None:
                raise ValueError(f"{bad} does not match its checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["config"] = Config(**saved["config"])
        for key, kind in kinds.items():
            if not isinstance(saved[key], kind):
                raise ValueError(f"{key} is no {kind.__name__}")
        with torch.device("meta"):
            model = GPT(saved["config"])
        for key in kinds.keys() & {"weights", "ema"}:
            # Raises unless names and shapes are the same. A dict, for torch marks its own for ever.
            model.load_state_dict(dict(saved[key]), assign=True)
        return saved
    except Exception as e:  # torch.load has no single error for bad bytes
        raise ValueError(f"{path} is not whole: {(str(e).splitlines() or [type(e).__name__])[0]}") from None


# --------------------------------------------------------------------------------------------------
# The run: its folder, its log, its clock


def open_run(name):
    """Make runs/<name>/ with this file as source/. A folder that exists is refused: ValueError."""
    folder = Path("runs") / name
    try:
        folder.mkdir(parents=True)
        (folder / "source").mkdir()
        shutil.copyfile(__file__, folder / "source/train_gpt.py")
    except FileExistsError:
        raise ValueError(f"--run={name}: {folder} exists; nothing is overwritten") from None
    except OSError as e:
        raise ValueError(f"--run={name}: {e.filename}: {e.strerror}") from None
    return folder


def find_state(run):
    """A run's folder or its name -> the folder, which holds a state.pt of this file's. Raises
    ValueError."""
    folder = Path(run) if Path(run).is_dir() else Path("runs") / run
    if not (folder / "state.pt").is_file():
        raise ValueError(f"--resume={run}: nothing to go on from: no such run, or it has ended, or "
                         "saved no state yet")
    source = folder / "source/train_gpt.py"
    if not source.is_file() or source.read_bytes() != Path(__file__).read_bytes():
        raise ValueError(f"--resume={run}: train_gpt.py changed since the run began")
    return folder


class Log:
    """log.txt for eyes and awk, metrics.jsonl for programs, the terminal for whoever waits. Only
    rank 0 has a folder and writes. Holds the run for this process; its last line says how the run
    ended: finished, or why not."""

    def __init__(self, folder):
        self.folder = folder
        self.reason = "finished"
        if not folder:
            return
        self.text = open(folder / "log.txt", "a", encoding="utf-8")
        self.json = open(folder / "metrics.jsonl", "a", encoding="utf-8")
        if fcntl:
            try:
                fcntl.flock(self.json, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{folder} is being trained by another process") from None

    def __call__(self, line="", **numbers):
        """A line of text, or key:value pairs that go to both files; `kind` names the line in
        metrics.jsonl."""
        if not self.folder:
            return
        if numbers:
            self.record(**numbers)
            line = " ".join(f"{k}:{v:.6g}" if isinstance(v, float) else f"{k}:{v}"
                            for k, v in numbers.items() if k != "kind")
        print(line, file=self.text, flush=True)
        show(line)

    def record(self, **values):
        """A line of metrics.jsonl; what is not finite becomes null."""
        if self.folder:
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                      for k, v in values.items()}
            print(json.dumps(values), file=self.json, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error and kind is not SystemExit:  # whoever raises that has said why
            self.reason = f"{kind.__name__}: {error}"
        self.record(kind="end", reason=self.reason, time=utc())


def utc():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Clock:
    """Seconds of training: runs from start() to stop(), as often as need be. Queued GPU work
    counts."""

    total = 0.0  # until the last stop()

    def sync(self):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def start(self):
        largest(0)  # no clock runs while one rank still writes
        self.sync()
        self.zero = time.perf_counter() - self.total

    def stop(self):
        self.sync()
        self.total = self.seconds()

    def seconds(self):
        """So far; the clock must run."""
        return time.perf_counter() - self.zero


def environment(device):
    """What the numbers were made on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": f"{read_launcher()[2]} x {name}",
            "machine": f"{platform.platform()}, {os.cpu_count()} cores",
            "python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "threads": torch.get_num_threads()}


# --------------------------------------------------------------------------------------------------
# Training

@torch.no_grad()
def lerp(model, other, share):
    """The weights of model become share * other's + (1 - share) * its own."""
    torch._foreach_lerp_([*model.parameters()], [*other.parameters()], share)


def train_step(losses, batches, model, optimizers, schedule, cfg):
    """One update from this rank's batches (tokens, targets, seg) -> (2,) float32 on the device: the
    loss of all ranks' tokens, the gradient norm before clipping."""
    train_loss = torch.zeros((), device=model.embed.weight.device)
    for tokens, targets, seg in batches:
        loss = losses(tokens, targets, seg, schedule.looped).sum() / cfg.batch_tokens
        loss.backward()
        train_loss += loss.detach()
    sum_over_ranks([train_loss, *(p.grad for p in model.parameters() if p.numel())])
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * group["peak_lr"]
            group["momentum"] = schedule.momentum  # of which AdamW takes no notice
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([train_loss, grad_norm])


def warm_up(cfg, model, initial, losses, optimizers, batch):
    """Compile every graph and time calibration, on random tokens and untimed; leaves the initial
    weights. A row that does not fit into memory is halved. -> (Config with the row_tokens that fit,
    seconds of calibration per row)."""
    def random_batch(n):
        return batch(synthetic_tokens(cfg.vocab_size, n + 1, 0), cfg.seq_len)

    def out_of_memory():
        try:
            for looped in (False, True):
                losses(*random_batch(cfg.row_tokens), looped).sum().backward()
        except RuntimeError as e:
            if "out of memory" not in str(e):
                raise
            return True
        return False
    while largest(out_of_memory())[0]:
        if cfg.row_tokens % 2 or cfg.row_tokens <= 32:
            raise ValueError(f"--row_tokens={cfg.row_tokens}: not even such a row of this model fits into memory")
        model.zero_grad()
        torch.compiler.reset()
        cfg = replace(cfg, row_tokens=cfg.row_tokens // 2)
    train_step(losses, [random_batch(cfg.row_tokens)], model, optimizers, schedule_at(cfg, 1.0), cfg)
    lerp(model, initial, 1.0)
    for optimizer in optimizers:
        optimizer.state.clear()
    clock = Clock()
    for _ in range(2 if cfg.calib_tokens else 0):  # the second is the one that counts
        clock.total = 0.0
        clock.start()
        calibrate(model, partial(random_batch, min(cfg.row_tokens, CALIB_ROW)), 1, cfg.seed)
        clock.stop()
    return cfg, clock.total


def main(argv=None):
    # ---- settings, processes, dataset, run folder
    begin = time.perf_counter()
    if sys.stdout:
        # A terminal that cannot show a name ends no run.
        sys.stdout.reconfigure(errors="backslashreplace")
    cfg, folder = parse_config(argv)
    resume = folder  # None: a new run
    device = join_ranks(cfg)
    rank, local_rank, world_size = read_launcher()
    if cfg.data == "demo" and not (HERE / "data/demo/meta.json").exists() and local_rank == 0:
        # Should it fail, Dataset() stops us.
        subprocess.run([sys.executable, HERE / "data/prepare.py", "demo"])
    largest(0)
    data = Dataset(cfg)
    cfg = replace(cfg, vocab_size=data.vocab_size)
    if rank == 0 and not resume:
        folder = open_run(cfg.run)
    log = Log(folder if rank == 0 else None)
    largest(0)  # now rank 0 holds the run; whoever held it until then may have gone on or ended
    with log:
        about = {"dataset": data.meta, "environment": environment(device)}
        start = {**about, "config": asdict(cfg), "time": utc()}
        log.record(kind="resume" if resume else "start", **start)
        log("\n".join(f"{key}: {json.dumps(value)}" for key, value in start.items()))
        if resume:
            state = load_checkpoint(folder / "state.pt", STATE)
            if state["dataset"] != data.meta:
                raise ValueError(f"--resume={cfg.run}: its dataset, {cfg.data}, changed since the run began")

        # ---- model, optimizers, warm-up
        torch.manual_seed(cfg.seed)
        model = GPT(cfg)
        model.init_matrices()  # on the CPU: the same weights on any device
        model.place(device)
        cuda = device.type == "cuda"
        hopper = model.capability == (9, 0)
        model.fused = hopper and triton is not None and cfg.mlp_dim % TILE[1] == cfg.n_embd % TILE[2] == 0
        compiled = model.kernel is not segment_attention  # whose shapes change from row to row
        batch = partial(make_batch, device=device, longest=cfg.seq_len)
        n_params = sum(p.numel() for p in model.parameters())
        if rank == 0 and shutil.disk_usage(folder).free < 40 * n_params:
            raise ValueError(f"{folder}: the disk has no room for {40 * n_params:,} bytes of states")
        optimizers = make_optimizers(model, cfg, compiled)
        losses = model.losses
        if compiled:
            losses = torch.compile(losses, dynamic=False, fullgraph=True)
            log("compiling, before the clock starts: minutes, but for what is in torch's cache folder")
        row_tokens = cfg.row_tokens
        # Averaged weights start where training starts; made here, they count in what fits into memory.
        ema = copy.deepcopy(model)
        cfg, calib_seconds = warm_up(cfg, model, ema, losses, optimizers, batch)
        if cfg.row_tokens < row_tokens:
            log(f"--row_tokens={row_tokens} does not fit into memory: {cfg.row_tokens}, the same "
                "batch in more passes")
        n_rows = cfg.batch_tokens // cfg.row_tokens
        calib_rows = math.ceil(cfg.calib_tokens / (min(cfg.row_tokens, CALIB_ROW) * world_size))
        # Calibration is part of the budget: what it will take is set aside, by the slowest rank's
        # estimate.
        (reserve,) = largest(1.2 * calib_seconds * calib_rows)
        max_steps = cfg.max_steps or math.inf
        max_seconds = cfg.max_seconds or math.inf
        limit = max_seconds - reserve
        if limit <= 0:
            raise ValueError(f"--max_seconds={cfg.max_seconds}: calibration alone takes {reserve:.0f} s")
        clock = Clock()
        step = 0
        if resume:
            step, clock.total = state["step"], state["seconds"]
            model.load_state_dict(state["weights"])
            ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            log(f"resumed at step {step}, after {clock.total:.1f} s of training")
        rows = read_ahead(read_rows(data, cfg, first_row=step * n_rows))
        log(f"attention:{model.kernel.__name__} dtype:{str(model.dtype)[6:]} compiled:{compiled} "
            f"fused:{model.fused} parameters:{n_params} rows_per_step:{n_rows} "
            f"rows_per_rank:{n_rows // world_size} val_tokens:{len(data.val)} "
            f"warmup_seconds:{time.perf_counter() - begin:.1f} calibration_reserve_seconds:{reserve:.1f}")
        if hopper and model.kernel.__name__ != "fa3":
            log("WARNING: FlashAttention-3 is not installed: FlashAttention-2 takes 7 to 14 ms more of a "
                "record step; build the package in the folder hopper of github.com/Dao-AILab/flash-attention")

        # ---- the loop: queue a step, then read the numbers of the one before
        stop_asked = False

        def ask_to_stop(number, frame):  # once: finish early and save; twice: leave at once
            nonlocal stop_asked
            if stop_asked:
                log.reason = f"ended by signal {number}"
                sys.exit(128 + number)
            stop_asked = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask_to_stop)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a run outlives its terminal
        saved_at = clock.total
        queued = None  # the last step, while a GPU does it: number, Schedule, (loss, gradient norm)
        done = torch.cuda.Event() if cuda else None  # its end; then its numbers can be read
        last = {"step": step, "train_seconds": clock.total, "train_loss": math.nan, "step_ms": 0.0}
        run = {"seed": cfg.seed, **about, "finished": False}

        def settle():
            """Wait for the queued step: log one in log_every; what is not finite ends the run."""
            nonlocal queued, last
            if not queued:
                return
            number, schedule, numbers = queued
            queued = None
            if cuda:
                done.synchronize()
            train_loss, grad_norm = numbers.tolist()
            if not math.isfinite(train_loss + grad_norm):
                log.reason = (f"the loss is {train_loss}, the gradient norm {grad_norm} at step {number}; "
                              f"last good: {last['train_loss']:.4f} at step {last['step']}")
                log(f"stopped: {log.reason}")
                sys.exit(3)
            if number % cfg.log_every and number > 5:
                return
            seconds = clock.seconds()
            step_ms = 1000 * (seconds - last["train_seconds"]) / (number - last["step"])
            eta = min(limit - seconds, (max_steps - number) * step_ms / 1000)
            last = {"step": number, "train_loss": train_loss, "lr": schedule.lr,
                    "grad_norm": grad_norm, "step_ms": step_ms, "train_seconds": seconds,
                    "tokens_per_second": int(1000 * cfg.batch_tokens / step_ms)}
            log(kind="step", **last, eta=max(int(eta), 0))

        def measure(looped):
            """Validates the weights as they are, the clock stopped, for the log and the checkpoint.
            eval_bpb.py's score is another: of the packed weights, which adapt to each document."""
            scores = validate(losses, data, cfg, batch, looped)
            log(kind="val", step=step, progress=min(progress, 1.0), **scores, train_seconds=clock.total)
            run.update(scores)

        def save_checkpoint(stats):
            run.update(steps=step, tokens=step * cfg.batch_tokens, train_seconds=clock.total,
                       peak_memory_mb=torch.cuda.max_memory_allocated(device) / 1e6 if cuda else 0.0)
            if rank == 0:
                write_checkpoint(folder / "checkpoint.pt", config=asdict(cfg), run=run, stats=stats,
                                 weights=model.state_dict(), tokenizer=data.tokenizer)

        def save_state():
            """All from which --resume goes on: rows and random numbers follow from the step."""
            if rank == 0:
                write_checkpoint(folder / "state.pt", config=asdict(cfg), dataset=data.meta,
                                 step=step, seconds=clock.total,
                                 weights=model.state_dict(), ema=ema.state_dict(),
                                 optimizers=[optimizer.state_dict() for optimizer in optimizers])

        val_done = cfg.val_points  # none is due at the first step, nor at that of a resumed run
        clock.start()
        while True:
            seconds = clock.seconds()
            ahead = bool(queued) * last["step_ms"] / 1000
            progress = max((seconds + ahead) / limit, step / max_steps)
            save_due = 0 < cfg.save_every <= seconds - saved_at
            # The clock of one decides for all; a signal that any of them got stops all.
            progress, save_due, stop = largest(progress, save_due, stop_asked)
            if stop or progress >= 1:
                break
            schedule = schedule_at(cfg, progress)
            val_due = int(progress * cfg.val_points)
            if save_due or val_due > val_done:
                settle()  # what is not finite is not saved
                clock.stop()
                if val_due > val_done:
                    last_weights = copy.deepcopy(model.state_dict())
                    lerp(model, ema, cfg.ema_share)
                    measure(schedule.looped)
                    save_checkpoint({})
                    model.load_state_dict(last_weights)
                if save_due:
                    save_state()
                    saved_at = clock.total
                clock.start()
            val_done = val_due
            batches = (batch(next(rows), schedule.seq_len)
                       for micro_step in range(n_rows // world_size))
            numbers = train_step(losses, batches, model, optimizers, schedule, cfg)
            lerp(ema, model, 1 - cfg.ema_decay)
            step += 1
            settle()  # the step before: the GPU's queue is never empty, never long
            queued = step, schedule, numbers.to("cpu", non_blocking=cuda)
            if cuda:
                done.record()
            else:
                settle()

        # ---- calibration of the averaged weights, the last thing inside the clock
        settle()
        lerp(model, ema, cfg.ema_share)

        def next_batch():
            return batch(next(rows)[:CALIB_ROW + 1], cfg.seq_len)
        stats = {}
        if calib_rows:
            stats = calibrate(model, next_batch, calib_rows, cfg.seed + rank,
                              late=lambda: clock.seconds() >= max_seconds)  # then fewer tokens do
            sum_over_ranks(stats.values())
        clock.stop()

        # ---- from here on nothing changes the weights: save, validate, sum up
        run["finished"] = not stop
        save_checkpoint(stats)  # at once, for torchrun kills 30 s after it was asked to stop
        measure(looped=True)
        save_checkpoint(stats)
        if rank == 0:
            (folder / "state.pt").unlink(missing_ok=True)
        if stop:
            log.reason = "stopped early as asked"
            log("stopped early as asked; the checkpoint holds the averaged weights so far")
        summary = {key: run[key] for key in ("val_bpb", "val_loss", "train_seconds", "steps", "tokens", "seed",
                                             "peak_memory_mb")}
        log.record(kind="summary", **summary, finished=not stop)
        log("---")
        for key, value in summary.items():
            log(f"{key}: {value:.6f}" if isinstance(value, float) else f"{key}: {value}")
        log(f"run: {folder}")
    if world_size > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        print(f"train_gpt.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
