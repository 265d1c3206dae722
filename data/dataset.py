"""The dataset folder, and the few things that every command shares: bad input, flags, atomic files,
progress.

data/<name>/    meta.json               what the folder holds; META_KEYS below; the sha256 and size of every other file
                tokenizer.json          data/tokenizer.py
                train_000000.bin ...    256 little-endian int32 (20240520, 1, number of tokens, 0 ...), uint16 tokens
                val_000000.bin ...      the tokens of val_docs.jsonl.zst, in order; each document after a boundary
                val_docs.jsonl.zst      the documents that are judged, one {"text": ...} a line
*_bytes are the UTF-8 bytes of the documents' text after the text rule; *_tokens include a boundary
token a document. The shard format is that of llm.c and modded-nanogpt.
"""
import argparse
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import zstandard

ROOT = Path(__file__).resolve().parent.parent
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
META_KEYS = {"format": int, "name": str, "text_rule": str, "vocab_size": int, "tokenizer_sha256": str,
             "train_docs": int, "train_bytes": int, "train_tokens": int,
             "val_docs": int, "val_bytes": int, "val_tokens": int, "val_docs_sha256": str, "files": dict}


class BadInput(ValueError):
    """The user's flag or file is at fault: one line that names it. `command` prints it; exit 2."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags; a wrong flag raises BadInput instead of printing the
    whole usage."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def error(self, message):
        raise BadInput(message)


def printable(text, encoding="utf-8"):
    """What may hold text of a stranger's -> one line of it: what is not printable, or not in the
    encoding, escaped."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))
    return shown.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def command(main):
    """Runs main() -> its exit code. BadInput -> "PROG: message" on stderr and 2; Ctrl-C -> 130. What
    the terminal cannot show is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main() or 0
    except BadInput as error:
        print(printable(f"{Path(sys.argv[0]).name}: {error}", sys.stderr.encoding), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        return 130


@contextmanager
def atomic_write(path, mode="wb"):
    """A file whose content replaces `path` in one step when the block ends well; otherwise `path`
    stays as it is.

    Writes to a temporary name beside it, fsync, rename; follows no link. OSError (full disk, no
    permission) -> BadInput with the name.
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
    except OSError as error:
        raise BadInput(f"{error.filename or path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


class Progress:
    """One redrawn line on a terminal, `label 12,345/50,000 docs 0:00:41 left`; nothing in a pipe or
    without a label.

    With total 0 it only counts. It is drawn on stderr.
    """

    def __init__(self, label, total, unit=""):
        self.line = f"\r\x1b[K{label} {{:,}}{f'/{total:,}' * bool(total)} {unit} {{}}"
        self.total = total
        self.done = 0
        self.start = time.monotonic()
        self.drawn = self.start if label and sys.stderr.isatty() else math.inf

    def add(self, n=1):
        self.done += n
        now = time.monotonic()
        if now - self.drawn >= 0.2:
            self.drawn = now
            left = (now - self.start) * (self.total / max(self.done, 1) - 1)
            clock = f"{timedelta(seconds=int(left))} left" if left > 0 else ""
            print(self.line.format(self.done, clock), end="", file=sys.stderr, flush=True)

    def each(self, items):
        """Yields the items, counting them."""
        for item in items:
            self.add()
            yield item

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
    if Path(name).is_dir():
        raise BadInput(f"{name}: this folder has no meta.json, so it is not a dataset")
    how = name if name in ("demo", "fineweb") else f"docs PATH --name={name}"
    raise BadInput(f"no dataset {name!r}; prepare it with: python data/prepare.py {how}")


def read_json(path):
    """File -> the JSON object in it, a dict."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path}: not a JSON object")
    return found


def read_meta(folder):
    """Folder -> the dict of meta.json, checked, and every file on disk against it: sizes, shard
    headers, tokenizer.

    Reads headers and tokenizer.json only, so it costs milliseconds; the files' sha256 are for
    whoever copies a dataset.
    """
    folder = Path(folder)
    path = folder / "meta.json"
    meta = read_json(path)
    for key, kind in META_KEYS.items():
        value = meta.get(key)
        if type(value) is not kind or (kind is int and value < 0):
            raise BadInput(f"{path}: {key!r} is missing or not a valid {kind.__name__}")
    if meta["format"] != 1:
        raise BadInput(f"{path}: format {meta['format']}, this code reads format 1")
    if not 2 <= meta["vocab_size"] <= 65536:
        raise BadInput(f"{path}: vocab_size {meta['vocab_size']} does not fit uint16 tokens")
    tokens = Counter()
    for name, entry in meta["files"].items():
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if not re.fullmatch(r"[\w-][\w.-]*", name) or type(size) is not int:
            raise BadInput(f"{path}: bad entry for file {name!r}")
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise BadInput(f"{folder / name}: named in meta.json, but {error.strerror}") from error
        if found != size:
            raise BadInput(f"{folder / name}: {found:,} bytes, but meta.json says {size:,}")
        if name.endswith(".bin"):
            tokens[name.partition("_")[0]] += read_shard(folder / name).size
    for split in ("train", "val"):
        if tokens[split] != meta[f"{split}_tokens"]:
            said = meta[f"{split}_tokens"]
            raise BadInput(f"{path}: {split}_tokens is {said:,}, but the shards hold {tokens[split]:,}")
    for name in ("tokenizer.json", "val_docs.jsonl.zst"):
        if name not in meta["files"]:
            raise BadInput(f"{path}: {name} is not among the files")
    blob = (folder / "tokenizer.json").read_bytes()
    if hashlib.sha256(blob).hexdigest() != meta["tokenizer_sha256"]:
        raise BadInput(f"{folder / 'tokenizer.json'}: sha256 is not the tokenizer_sha256 of meta.json")
    return meta


def read_shard(path, vocab_size=None):
    """Shard file -> uint16 (n_tokens,), memory-mapped. With vocab_size, reads it all: tokens must
    be below it."""
    try:
        words = np.memmap(path, dtype="<u2", mode="r")
        header = words[:HEADER_BYTES // 2].view("<i4")
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or "not a token shard, or cut short"
        raise BadInput(f"{path}: {what}") from error
    if header.size < HEADER_BYTES // 4 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise BadInput(f"{path}: not a token shard (magic {SHARD_MAGIC}, version {SHARD_VERSION})")
    tokens = words[HEADER_BYTES // 2:]
    if tokens.size != header[2]:
        raise BadInput(f"{path}: header says {header[2]:,} tokens, the file holds {tokens.size:,} (cut short?)")
    if vocab_size is not None and tokens.max(initial=0) >= vocab_size:
        raise BadInput(f"{path}: token {tokens.max()} is outside the vocabulary of {vocab_size}")
    return tokens


def write_shard(path, tokens):
    """uint16 tokens (n_tokens,) -> shard file, atomically."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").data)


class DocsHash:
    """sha256 over documents in order: for each, the number of its UTF-8 bytes (8 bytes,
    little-endian), then they."""

    def __init__(self):
        self.sha, self.docs, self.bytes = hashlib.sha256(), 0, 0

    def add(self, data):
        self.sha.update(len(data).to_bytes(8, "little"))
        self.sha.update(data)
        self.docs += 1
        self.bytes += len(data)

    def hexdigest(self):
        return self.sha.hexdigest()


def read_val_docs(folder, meta, limit=None):
    """Streams the text of the validation documents, the first `limit` if given.

    Read whole, their number, bytes and sha256 must be those of meta, or BadInput at the end; with a
    limit, the number.
    """
    path = Path(folder) / "val_docs.jsonl.zst"
    wanted = meta["val_docs"] if limit is None else min(limit, meta["val_docs"])
    seen = DocsHash()
    try:
        with open(path, "rb") as file:
            unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
            stream = unpacker.stream_reader(file, read_across_frames=True)
            lines = io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
            for line in itertools.islice(lines, limit):
                text = json.loads(line)["text"]
                seen.add(text.encode())
                yield text
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except (zstandard.ZstdError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: damaged after {seen.docs:,} documents ({type(error).__name__})") from error
    if seen.docs != wanted:
        raise BadInput(f"{path}: {seen.docs:,} documents, meta.json says {meta['val_docs']:,}")
    if limit is None and (seen.bytes, seen.hexdigest()) != (meta["val_bytes"], meta["val_docs_sha256"]):
        raise BadInput(f"{path}: the documents are not those of meta.json (bytes or sha256 differ)")
