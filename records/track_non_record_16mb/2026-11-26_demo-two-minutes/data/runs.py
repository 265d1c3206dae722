"""The run folder: its sources, its log, its machine, its line in the ledger, its picture.

runs/<run>/     log.txt, metrics.jsonl          what the trainer said, for eyes and for programs
                source/                         the files that trained it
                checkpoint.pt, state.pt         train_gpt.py; the state is gone once the run has ended
                artifact.pyz, score.json        pack.py, eval_bpb.py
                curve.svg, crash.json           records/plot.py; why it ended, where it failed
"""
import json
import math
import os
import platform
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from data.dataset import ROOT, BadInput


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
