"""What surrounds training: the processes and their clock; the run folder, its log, its line in the ledger, its picture.

runs/<run>/     log.txt, metrics.jsonl          what the trainer said, for eyes and for programs
                source/                         the files that trained it
                checkpoint.pt, state.pt         train_gpt.py; the state is gone once the run has ended
                artifact.pyz, score.json        pack.py, eval_bpb.py
                curve.svg, crash.json           records/plot.py; why it ended, where it failed
"""
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.dataset import ROOT, BadInput, atomic_write, find_dataset, read_meta, read_shard
from data.tokenizer import Tokenizer


class World(NamedTuple):
    """The processes that train together, and the place of this one among them."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    control: object = None  # a gloo group for small talk between the CPUs, which no GPU waits for; None when alone

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        if self.size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, self.control)
        return agreed.tolist()

    def gather(self, value) -> list:
        """-> every rank's value, in order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self.control)
        return values

    def sum(self, x: Tensor) -> None:
        """x, on the device, becomes the sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(x)

    def reduce_scatter(self, x: Tensor):
        """x (size * n, ...) on every rank -> (this rank's n rows of the sum, handle to wait on or None)."""
        if self.size == 1:
            return x, None
        share = x.new_empty(x.size(0) // self.size, *x.shape[1:])
        return share, dist.reduce_scatter_tensor(share, x, async_op=True)

    def all_gather(self, x: Tensor):
        """x (n, ...) on each rank -> ((size * n, ...) in rank order, handle to wait on or None)."""
        if self.size == 1:
            return x, None
        whole = x.new_empty(x.size(0) * self.size, *x.shape[1:])
        return whole, dist.all_gather_into_tensor(whole, x.contiguous(), async_op=True)


def join(cfg) -> World:
    """The processes that torchrun started, or this one alone -> World. cfg: the trainer's. Raises BadInput."""
    rank, local_rank, size = (int(os.environ.get(k, v)) for k, v in
                              (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = cfg.device or next(k for k in there if there[k])
    if not there[kind]:
        raise BadInput(f"--device={kind}: " + (no_cuda() if kind == "cuda" else "this machine or torch has none"))
    if (rows := cfg.batch_tokens // cfg.row_tokens) % size:
        raise BadInput(f"--batch_tokens={cfg.batch_tokens} is {rows} rows of --row_tokens={cfg.row_tokens}, which "
                       f"{size} ranks cannot share evenly{'; ' + no_cuda() if no_cuda() else ''}")
    device, control = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind), None
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is not bf16
    if size > 1:
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch 2.13 renames the collectives that 2.11 has
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
        control = dist.new_group(backend="gloo")
    if cfg.data == "demo" and local_rank == 0 and not (ROOT / "data/demo/meta.json").exists():  # on each node
        subprocess.run([sys.executable, str(ROOT / "data/prepare.py"), "demo"])  # should it fail, Dataset() stops us
    if size > 1:
        dist.barrier(control)
    return World(rank, size, device, control)


class Clock:
    """Seconds of training: runs from start() to stop(), as often as need be. sync() makes queued GPU work count."""

    def __init__(self, sync):
        self.sync, self.total, self.since = sync, 0.0, None

    def start(self) -> None:
        self.sync()
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.sync()
        self.total, self.since = self.seconds(), None

    def seconds(self) -> float:
        return self.total + (time.perf_counter() - self.since if self.since is not None else 0.0)


class Stopped(Exception):
    """Training cannot go on: Stopped(reason, exit code)."""


class Dataset:
    """A prepared dataset: meta (dict), tokenizer (None for random tokens), functions that read train shards and val."""

    def __init__(self, cfg, world: World = World()):
        """Checks everything that a run relies on before it starts: files against meta.json, and this rank's part of the
        shards for tokens outside the vocabulary. Raises BadInput."""
        if cfg.data == "synthetic":
            self.tokenizer, vocab = None, cfg.vocab_size or 8192
            self.meta = {"name": "synthetic", "vocab_size": vocab, "val_tokens": 4 * cfg.row_tokens, "val_bytes": 0}
            self.boundary, self.n_train = vocab - 1, 8
            self.train = lambda i: synthetic_tokens(vocab, max(1 << 22, 2 * cfg.row_tokens), seed=i)
            self.val = lambda: synthetic_tokens(vocab, 4 * cfg.row_tokens, seed=self.n_train)
            return
        folder = find_dataset(cfg.data)
        self.meta = read_meta(folder)
        self.tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
        vocab, self.boundary = self.meta["vocab_size"], self.tokenizer.boundary
        if cfg.vocab_size not in (0, vocab):
            raise BadInput(f"--vocab_size={cfg.vocab_size}, but {folder} has {vocab}: leave it 0 to follow the dataset")
        train = sorted(folder.glob("train_*.bin"))
        val = sorted(folder.glob("val_*.bin"))
        if not train or not val:
            raise BadInput(f"{folder} has no {'train' if not train else 'val'} shards: prepare it with data/prepare.py")
        for path in (train + val)[world.rank::world.size]:
            read_shard(path, vocab)
        self.n_train = len(train)
        self.train = lambda i: read_shard(train[i])
        self.val = lambda: np.concatenate([read_shard(path) for path in val])


def synthetic_tokens(vocab: int, n: int, seed: int) -> np.ndarray:
    """-> n random tokens uint16 in documents of web-like lengths (lognormal, median 403 tokens, mean 690)."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab - 1, n, dtype=np.uint16)
    starts = np.cumsum(np.concatenate([[0], rng.lognormal(np.log(403), 1.04, n // 100)])).astype(np.int64)
    tokens[starts[starts < n]] = vocab - 1
    return tokens


def open_run(name: str, sources: tuple[str, ...]) -> Path:
    """Make runs/<name>/ with the sources as run, and point runs/latest at it. Refuses a folder that exists."""
    folder = Path("runs") / name
    try:
        folder.mkdir(parents=True)
        for file in sources:
            (folder / "source" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, folder / "source" / file)
        link = Path("runs") / f".latest{os.getpid()}"
        try:
            link.symlink_to(name, target_is_directory=True)
        except OSError:  # Windows lets few make links: a file with the name
            link.write_text(name)
        os.replace(link, Path("runs") / "latest")
    except FileExistsError:
        raise BadInput(f"--run={name}: {folder} exists; nothing is overwritten, choose another name") from None
    except OSError as e:
        raise BadInput(f"--run={name}: {e.filename}: {e.strerror}") from None
    return folder


def changed_sources(folder: Path, sources: tuple[str, ...]) -> list[str]:
    """-> those of the files that are no longer what they were when the run began."""
    content = lambda root, f: (root / f).read_bytes() if (root / f).is_file() else b""
    return [f for f in sources if content(folder / "source", f) != content(ROOT, f)]


def write_tensors(path: Path, **values) -> None:
    """What read_tensors() reads. The file that stands there is replaced in one step, or stays as it is."""
    buffer = io.BytesIO()  # a full disk must fail in write(), not in torch.save
    torch.save(values, buffer)
    with atomic_write(path) as f:
        f.write(buffer.getbuffer())


@contextmanager
def read_tensors(path: Path):
    """The file's dict for the block that checks it, which may fail in any way: BadInput. The file may come from
    anywhere: checksums first, tensors and plain values only."""
    try:
        with zipfile.ZipFile(path) as z:
            if (bad := z.testzip()) is not None:
                raise ValueError(f"{bad} does not match its checksum")
        yield torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load has no single error for bad bytes
        raise BadInput(f"{path} is not whole: {(str(e).splitlines() or [type(e).__name__])[0]}") from None


class Log:
    """log.txt for eyes and awk, metrics.jsonl for programs, the terminal for whoever waits. Only rank 0 writes."""

    def __init__(self, folder: Path | None):
        self.text = open(folder / "log.txt", "a") if folder else None
        self.json = open(folder / "metrics.jsonl", "a") if folder else None
        self.live = bool(folder) and sys.stderr.isatty()

    def __call__(self, line: str = "", **numbers) -> None:
        """A line of text, or key:value pairs that go to both files; `kind` names the line in metrics.jsonl."""
        if not self.text:
            return
        if numbers:
            self.record(**numbers)
            digits = {"progress": 2, "step_ms": 1, "train_seconds": 1, "eta": 0}
            line = " ".join(f"{k}:{v:.{digits.get(k, 4)}f}" if isinstance(v, float) else f"{k}:{v}"
                            for k, v in numbers.items() if k != "kind")
        self.redraw("")
        print(line, flush=True)
        print(line, file=self.text, flush=True)

    def record(self, **values) -> None:
        """A line of metrics.jsonl; what is not finite becomes null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        print(json.dumps(values), file=self.json, flush=True)

    def redraw(self, line: str) -> None:
        """The one line that moves, on a terminal only."""
        if self.live:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()


def environment(device: torch.device, world_size: int) -> dict:
    """What the numbers were made on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": f"{world_size} x {name}", "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
            "os": platform.system(), "python": platform.python_version(), "torch": str(torch.__version__),
            "cuda": torch.version.cuda or "", "numpy": np.__version__, "threads": torch.get_num_threads()}


def no_cuda() -> str:
    """Why there is no CUDA device here, in words; empty where there is one."""
    if torch.cuda.is_available():
        return ""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    return (f"torch {torch.__version__} is built for CUDA {torch.version.cuda} but finds no GPU that it can use: "
            "is there one, and is its driver new enough? (nvidia-smi)")


@contextmanager
def its_end_noted(folder: Path | None, log: Log):
    """A failed run leaves crash.json and a line in the ledger, every run its curve; rank 0 has the folder."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as e:
        reason, code = e.args if isinstance(e, Stopped) else (f"{type(e).__name__}: {e}", 1)
        if folder:
            with atomic_write(folder / "crash.json", "w") as f:
                json.dump({"reason": reason, "exit_code": code}, f)
            log(f"stopped: {reason} (see {folder}/crash.json)")
            note_in_ledger(folder)
        raise
    finally:
        if folder:
            draw_curve(folder)


def note_in_ledger(folder: Path) -> None:
    """A line for this run in runs/ledger.tsv, where records/ is at hand: not inside an artifact or a record."""
    with suppress(ImportError):
        from records import ledger
        ledger.append(folder)


def draw_curve(folder: Path) -> None:
    """The run as a picture, curve.svg, where records/ is at hand."""
    with suppress(ImportError):
        from records import plot
        plot.write(folder / "curve.svg", [folder])
