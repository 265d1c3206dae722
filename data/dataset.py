"""The dataset folder, and the few things that every command shares: bad input, flags, atomic files,
progress.

data/<name>/    meta.json               what the folder holds; files: the size and sha256 of every other file
                tokenizer.json          data/tokenizer.py
                train_000000.bin ...    256 little-endian int32 (20240520, 1, number of tokens, 0 ...), uint16 tokens
                val_000000.bin ...      the tokens of val_docs.jsonl.zst, in order; each document after a boundary
                val_docs.jsonl.zst      the documents that are judged, one {"text": ...} a line
meta.json has format (1), name, text_rule, vocab_size, tokenizer_sha256, val_docs_sha256 (count_docs),
and of train and val *_docs, *_bytes, *_tokens: *_bytes are the UTF-8 bytes of the documents' text
after the text rule; *_tokens include a boundary token a document. The shard format is that of llm.c
and modded-nanogpt.
"""
import argparse
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import zstandard

ROOT = Path(__file__).resolve().parent.parent
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
META_KEYS = {"format": int, "name": str, "val_docs": int, "val_bytes": int, "val_docs_sha256": str,
             "files": dict}   # which the judge needs


class BadInput(ValueError):
    """The user's flag or file is at fault: one line that names it. `command` prints it; exit 2."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags, which come as a table; a wrong flag raises BadInput
    instead of printing the whole usage."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def error(self, message):
        raise BadInput(message)

    def add_flags(self, table):
        """table {name: (default, help)}. A default gives the type; False is a switch, a tuple the
        choices, its first the default."""
        for name, (default, text) in table.items():
            how = {"default": default, "type": type(default)}
            if isinstance(default, tuple):
                how = {"default": default[0], "choices": default}
            if default is False:
                how = {"action": "store_true"}
            self.add_argument(f"--{name}", help=text, **how)


@contextmanager
def package(purpose):
    """`with package("what needs it"): import x`; BadInput says what to install."""
    try:
        yield
    except ImportError as error:
        raise BadInput(f"{purpose} needs: pip install {error.name}") from error


def printable(text, encoding="utf-8"):
    """What may hold text of a stranger's -> one line of it: what is not printable, or not in the
    encoding, escaped."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))
    return shown.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def command(main):
    """Runs main() -> its exit code. BadInput, or a file that cannot be read or written -> "PROG:
    message" on stderr and 2; Ctrl-C -> 130, SIGTERM 143, after cleaning up. What the terminal
    cannot show is escaped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main() or 0
    except (BadInput, OSError) as error:
        print(printable(f"{Path(sys.argv[0]).name}: {error}", getattr(sys.stderr, "encoding", "")),
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        return 130


@contextmanager
def atomic_write(path, mode="wb"):
    """A file whose content replaces `path` in one step when the block ends well; otherwise `path`
    stays as it is.

    Writes to a temporary name beside it, fsync, rename; follows no link.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Progress:
    """One redrawn line on a terminal, `label 12,345/50,000 docs 41 s left`; nothing in a pipe. With
    total 0 it only counts. It is drawn on stderr."""

    def __init__(self, label, total, unit=""):
        self.line = f"\r\x1b[K{label} {{:,}}{f'/{total:,}' * bool(total)} {unit} {{}}"
        self.total = total
        self.done = 0
        self.start = time.monotonic()
        self.drawn = self.start if sys.stderr and sys.stderr.isatty() else math.inf

    def add(self, n=1):
        self.done += n
        now = time.monotonic()
        if now - self.drawn >= 0.2:
            self.drawn = now
            left = (now - self.start) * (self.total / max(self.done, 1) - 1)
            clock = f"{left:.0f} s left" if left > 0 else ""
            print(self.line.format(self.done, clock), end="", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.drawn < math.inf:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def find_dataset(name_or_path):
    """Name under data/, or path of a folder with a meta.json -> Path. BadInput names the command
    that prepares it."""
    name = str(name_or_path)
    # Inside artifact.pyz ROOT is a zip file, so the data folder is looked for where the command
    # runs too.
    for folder in (Path(name), ROOT / "data" / name, Path("data") / name):
        if (folder / "meta.json").is_file():
            return folder
    how = name if name in ("demo", "fineweb") else f"docs PATH --name={name}"
    raise BadInput(f"no dataset {name!r}, a folder with a meta.json; prepare it with: "
                   f"python data/prepare.py {how}")


def read_meta(folder):
    """Folder -> the dict of meta.json, with META_KEYS. The files beside it are for whoever reads
    them to check, all of them for `prepare.py verify`."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        wrong = [key for key, kind in META_KEYS.items() if type(meta.get(key)) is not kind]
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: not a JSON object ({error})") from error
    if wrong or meta["format"] != 1:
        raise BadInput(f"{path}: not of format 1, or of wrong type: {', '.join(wrong)}")
    return meta


def read_shard(path, vocab_size):
    """Shard file -> uint16 (n_tokens,), memory-mapped, all below vocab_size."""
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4).tolist()
    if 4 * len(header) < HEADER_BYTES or header[:2] != [SHARD_MAGIC, SHARD_VERSION]:
        raise BadInput(f"{path}: not a token shard (magic {SHARD_MAGIC}, version {SHARD_VERSION})")
    n_tokens = (os.path.getsize(path) - HEADER_BYTES) / 2
    if n_tokens != header[2]:
        raise BadInput(f"{path}: header says {header[2]} tokens, the file holds {n_tokens} (cut short?)")
    tokens = np.memmap(path, "<u2", "r", HEADER_BYTES)
    if tokens.max(initial=0) >= vocab_size:
        raise BadInput(f"{path}: token {tokens.max()} is outside the vocabulary of {vocab_size}")
    return tokens


def write_shard(path, tokens):
    """uint16 tokens (n_tokens,) -> shard file, atomically."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").data)


def count_docs(texts, found):
    """Yields the texts; at their end found, a dict, has their "val_docs", "val_bytes" and
    "val_docs_sha256": sha256 over them in order, for each the number of its UTF-8 bytes (8 bytes,
    little-endian), then they."""
    sha256 = hashlib.sha256()
    n_docs = n_bytes = 0
    for text in texts:
        data = text.encode()
        sha256.update(len(data).to_bytes(8, "little") + data)
        n_docs += 1
        n_bytes += len(data)
        yield text
    found |= {"val_docs": n_docs, "val_bytes": n_bytes, "val_docs_sha256": sha256.hexdigest()}


def read_val_docs(folder, meta, limit=None):
    """Streams the text of the validation documents, the first `limit` if given.

    Where that is all, their number, bytes and sha256 must be those of meta, or BadInput at the end.
    """
    path = Path(folder) / "val_docs.jsonl.zst"
    found = {}
    with open(path, "rb") as file:
        unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        stream = unpacker.stream_reader(file, read_across_frames=True)
        lines = io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
        texts = (json.loads(line)["text"] for line in itertools.islice(lines, limit))
        try:
            yield from count_docs(texts, found)
        except (zstandard.ZstdError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{path}: damaged ({type(error).__name__})") from error
    if (limit is None or limit >= meta["val_docs"]) and found != {key: meta[key] for key in found}:
        raise BadInput(f"{path}: the documents are not those of meta.json (number, bytes or sha256 differ)")
