"""Documents -> data/<name>/: tokenizer, token shards, and the validation documents that are judged
(see dataset.py).

    python data/prepare.py demo                         the standard library's own source and documentation, in seconds
    python data/prepare.py docs PATH... --name=NAME     your .jsonl, .txt and .md files, or folders of them
    python data/prepare.py fineweb                      the challenge's FineWeb documents, from the Hugging Face hub
    python data/prepare.py verify NAME                  every hash and every count of a dataset

A .jsonl file holds a document a line, {"text": ...}; a .txt or .md file is one document, but a
single one is cut into many. Each may be packed as .gz or .zst. Validation documents are chosen by
document hash (docs, demo) or are the first 50,000 (fineweb). A stopped `fineweb` continues where it
was; the others write a new folder at once or not at all.
"""
import hashlib
import heapq
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import hub  # noqa: E402
from data.dataset import (  # noqa: E402
    BadInput, Parser, Progress, atomic_write, command, count_docs, find_dataset, printable,
    read_meta, read_shard, read_val_docs, write_shard)
from data.text_rules import TEXT_RULES  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from data.train_bpe import at_most, train_tokenizer  # noqa: E402

RANGE_BYTES = 1 << 27              # of documents, as JSON lines, that become one shard: some 27 M tokens
BATCH_CHARACTERS = 1_000_000       # of text that is encoded at a time
PIECE_BYTES = 8192                 # of the documents that a single text is cut into
DEMO_TOKENIZER = ROOT / "data/demo_tokenizer.json"
DEMO_VAL_BYTES = 450_000
DEMO_TRAIN_BYTES = 10_000_000
DEMO_PIECE_CHARACTERS = 6144
FINEWEB_VAL_DOCS = 50_000
FINEWEB_VAL_BYTES = 151_078_222    # of those documents after nmt_nfkc, as the public scorer counts them


# --------------------------------------------------------------------------------------------------
# Documents

READABLE = re.compile(r"\.(jsonl|txt|md)(\.gz|\.zst)?$", re.IGNORECASE)
ZSTD = b"\x28\xb5"
UNPACKERS = {b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
             ZSTD: lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()}
NO_TEXT = "no text (it is read from the key that --text_key=NAME names)"
WRONG = {UnicodeDecodeError: "not UTF-8 (iconv -f LATIN1 -t UTF-8 may help, or -f UTF-16)",
         UnicodeEncodeError: "lone surrogate"}


def find_files(paths):
    """Files and folders -> files to read, a folder's sorted by path; [(path, why)] of those that
    are not read."""
    files, unread = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        inside = [path]
        if path.is_dir():
            walk = os.walk(path, onerror=lambda e: unread.append((e.filename, e.strerror)))
            inside = sorted(Path(folder, name) for folder, _, names in walk for name in names)
        for file in inside:
            if READABLE.search(file.name) and file.is_file():
                files.append(file)
            else:
                unread.append((file, f"{file.suffix or 'other'} files, not read"))
    return files, unread


def unpacked(path):
    """Yields a file's bytes, those inside where it is gzip or zstd. BadInput where they are damaged
    or cut short."""
    frame = None
    try:
        with open(path, "rb") as file:
            unpacker = UNPACKERS.get(ZSTD if path.suffix.lower() == ".zst" else file.peek()[:2])
            for block in iter(lambda: file.read(1 << 14), b""):
                while unpacker and block:
                    frame = frame or unpacker()
                    yield frame.decompress(block)
                    block = frame.unused_data
                    frame = None if frame.eof else frame
                yield block
    except (zlib.error, zstandard.ZstdError) as error:
        raise BadInput(f"{path}: damaged ({error})") from error
    if frame:
        raise BadInput(f"{path}: cut short, what is packed in it does not end")


def cut(parts, size):
    """Parts of a text -> documents of parts that follow each other, at most `size` long unless one
    part is longer."""
    documents = [parts[0]]
    for part in parts[1:]:
        if len(documents[-1]) + len(part) > size:
            documents.append(part)
        else:
            documents[-1] += part
    return documents


def raw_documents(files):
    """Yields (where, bytes, is it JSON) of every document in the files."""
    for path in files:
        is_json = READABLE.search(path.name)[1].lower() == "jsonl"
        if is_json:
            documents = hub.split_lines(unpacked(path))
        else:
            documents = [b"".join(unpacked(path))]
        if not is_json and len(files) == 1:
            parts = re.split(rb"(?<=\n)(?=\r?\n)", documents[0])
            if len(parts) == 1:
                parts = re.split(rb"(?<=\n)", documents[0])
            documents = cut(parts, PIECE_BYTES)
            say(f"{path}: a single text, cut at blank lines into {len(documents):,} documents")
        for number, raw in enumerate(documents, 1):
            yield f"{path}:{number}", raw.removeprefix(b"\xef\xbb\xbf"), is_json   # a byte order mark


def read_text(raw, is_json=True, key="text"):
    """The bytes of a document -> its text. BadInput says what is wrong with it, without where."""
    try:
        text = raw.decode()
        if is_json and text.strip():
            found = json.loads(text)
            text = found.get(key) if isinstance(found, dict) else None
        if isinstance(text, str):
            text.encode()
            return text
    except (ValueError, RecursionError) as error:
        raise BadInput(WRONG.get(type(error), "bad JSON")) from error
    raise BadInput(NO_TEXT)


def digest(text):
    return hashlib.sha256(text.encode()).digest()[:16]


def good_documents(files, args, seen, problems):
    """Yields the texts in the files, after the text rule, each once; their digests go to `seen`,
    (where, what is wrong) of the others to `problems`."""
    with Progress("reading", 0, "documents") as progress:
        for where, raw, is_json in raw_documents(files):
            progress.add()
            try:
                text = TEXT_RULES[args.text_rule](read_text(raw, is_json, args.text_key))
                if not text.strip() or digest(text) in seen:
                    raise BadInput("duplicate" if text.strip() else "empty")
            except BadInput as error:
                if args.on_bad == "refuse":
                    raise BadInput(f"{where}: {error} (--on_bad=skip leaves it out)") from error
                problems.append((where, str(error)))
            else:
                seen.add(digest(text))
                yield text


def reasons(problems):
    """[(where, what)] -> ": 5 not UTF-8, first in.txt; ..."; empty where there are none."""
    first = {what: where for where, what in reversed(problems)}
    counts = Counter(what for _, what in problems).most_common()
    parts = [f"{n:,} {what}, first {first[what]}" for what, n in counts]
    return ": " * bool(parts) + "; ".join(parts)


def say(line):
    print(printable(line, sys.stdout.encoding))


# --------------------------------------------------------------------------------------------------
# Ranges of the documents, files of JSON lines, become shards

def batches(items, size):
    """Items -> lists of items that follow each other, their lengths `size` or a little more in
    all."""
    batch, room = [], size
    for item in items:
        batch.append(item)
        room -= len(item)
        if room <= 0:
            yield batch
            batch, room = [], size
    if batch:
        yield batch


def to_line(text):
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def encode(texts, tokenizer):
    """Texts -> uint16 tokens, each document after a boundary."""
    parts = [np.zeros(0, dtype=np.uint16)]
    for batch in batches(texts, BATCH_CHARACTERS):
        parts += tokenizer.encode_batch(batch)
    return np.concatenate(parts)


class Range(NamedTuple):
    """Documents that become a shard, or those of validation."""
    path: Path               # JSON lines
    source: tuple | None     # from which hub.fetch gets them where they are not there
    text_rule: str
    left_out: frozenset = frozenset()   # digests of texts, those of validation

    def texts(self):
        """Yields the texts after the text rule; all are good, or BadInput."""
        if self.source:
            hub.fetch(self.path, *self.source)
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = TEXT_RULES[self.text_rule](read_text(line))
                except BadInput as error:
                    raise BadInput(f"{self.path}:{number}: {error}") from error
                if digest(text) not in self.left_out:
                    yield text


def texts_in(ranges):
    for part in ranges:
        yield from part.texts()


def make_shard(documents, path, blob):
    """Range, tokenizer.json -> its shard at path, unless it is there and whole. Of the documents a
    copy in the shard's own folder is not needed any more."""
    tokenizer = Tokenizer(blob)
    try:
        read_shard(path, tokenizer.vocab_size)
    except (BadInput, FileNotFoundError):
        write_shard(path, encode(documents.texts(), tokenizer))
    if path.parent in documents.path.parents:
        documents.path.unlink(missing_ok=True)


def write_ranges(texts, folder):
    """Texts -> Ranges, of RANGE_BYTES or a little more each, in a new folder."""
    folder.mkdir()
    ranges = []
    for batch in batches(map(to_line, texts), RANGE_BYTES):
        ranges.append(Range(folder / f"{len(ranges)}.jsonl", None, "raw"))
        ranges[-1].path.write_bytes(b"".join(batch))
    return ranges


def run_job(*job):
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # of Ctrl-C the parent speaks
    sys.exit(command(lambda: make_shard(*job)))


def make_shards(jobs, workers):
    """make_shard(*job) of each; yields when one is done, in order. A process makes one shard and
    ends, also where its parent was killed; so there is no queue, and nothing that could wait for
    ever."""
    if min(workers, len(jobs)) < 2:
        yield from itertools.starmap(make_shard, jobs)
        return
    process = multiprocessing.get_context("spawn").Process
    processes = [process(target=run_job, args=job, name=str(job[1]), daemon=True) for job in jobs]
    for first in processes[:workers]:
        first.start()
    for first, following in itertools.zip_longest(processes, processes[workers:]):
        first.join()
        if first.exitcode:
            raise BadInput(f"{first.name}: not written (exit code {first.exitcode})")
        if following:
            following.start()
        yield


# --------------------------------------------------------------------------------------------------
# Writing a dataset

def write_val_docs(folder, texts):
    """Texts -> val_docs.jsonl.zst, and what meta.json says of it."""
    found = {}
    with atomic_write(folder / "val_docs.jsonl.zst") as file:
        with zstandard.ZstdCompressor(12).stream_writer(file, closefd=False) as packed:
            for text in count_docs(texts, found):
                packed.write(to_line(text))
    return found


def build(folder, args, val, ranges, wanted=None):
    """What write_val_docs returned, ranges of documents -> all else of a dataset: those that are
    not of validation are for training, some `wanted` tokens of them. What is there is kept, shards
    too of which so many are not wanted."""
    left_out = frozenset(map(digest, read_val_docs(folder, val)))
    ranges = [part._replace(left_out=left_out) for part in ranges]
    path = folder / "tokenizer.json"
    if not path.exists():
        if not args.blob:
            print("training a tokenizer", flush=True)
        blob = args.blob or train_tokenizer(lambda: texts_in(ranges), args.vocab_size, args.name)
        with atomic_write(path) as file:
            file.write(blob)
    blob = path.read_bytes()
    if args.blob and args.blob != blob:
        raise BadInput(f"{path}: begun with another tokenizer; remove {folder} or change --name")
    tokens = encode(read_val_docs(folder, val), Tokenizer(blob))
    write_shard(folder / "val_000000.bin", tokens)
    if wanted:   # of bytes as many as those of validation tell, and 2 % for what they may err
        n_bytes = 1.02 * wanted * val["train_start"] / tokens.size
        ranges = ranges[:math.ceil(n_bytes / RANGE_BYTES)]
    jobs = [(part, folder / f"train_{number:06d}.bin", blob) for number, part in enumerate(ranges)]
    with Progress("tokenizing", len(jobs), "shards") as progress:
        for _ in make_shards(jobs, args.workers):
            progress.add()
    shutil.rmtree(folder / "documents", ignore_errors=True)
    meta = describe(folder, name=args.name, text_rule=args.text_rule,
                    val_docs_sha256=val["val_docs_sha256"])
    with atomic_write(folder / "meta.json", "w") as file:   # which makes the folder a dataset
        json.dump(meta, file, indent=1)
    for split in ("train", "val"):
        docs, size, tokens = (meta[f"{split}_{unit}"] for unit in ("docs", "bytes", "tokens"))
        print(f"{split:5} {docs:>11,} documents {size:>15,} bytes {tokens:>14,} tokens "
              f"{size / tokens:.3f} bytes/token")


def describe(folder, /, **known):
    """A dataset's folder, its name, text_rule and val_docs_sha256 -> its meta.json, counted in its
    files."""
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
    meta = {"format": 1, **known, "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256, "files": {}}
    for split in ("train", "val"):
        count = np.zeros(tokenizer.vocab_size, dtype=np.int64)   # of each token
        for path in folder.glob(f"{split}_*.bin"):
            count += np.bincount(read_shard(path, count.size), minlength=count.size)
        meta[f"{split}_docs"] = int(count[tokenizer.boundary])
        meta[f"{split}_bytes"] = int(count @ tokenizer.text_bytes)
        meta[f"{split}_tokens"] = int(count.sum())
    for path in sorted(folder.glob("[a-z]*.*")):
        if path.name != "meta.json":
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            meta["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256}
    return meta


@contextmanager
def new_dataset(name):
    """-> an empty folder, which becomes data/<name>/ when the block ends well, if there is none by
    then, and otherwise leaves nothing."""
    target = ROOT / "data" / name
    folder = target.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# The commands

def demo_documents():
    """The standard library -> val texts, train texts: the language reference that pydoc carries,
    the modules' source.

    A document is a topic, or a file cut before top-level definitions into pieces of about 6 kB.
    Files go to a split whole, so that no validation file is seen in training: the first by sha256
    of their text are validation. Tests, tables of encodings, and what the build of Python wrote (it
    names paths of the machine) are left out.
    """
    from pydoc_data.topics import topics
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = re.compile(r"(^|/)(site-packages|dist-packages|__pycache__|tests?|idle_test|pydoc_data|config-[^/]*)/|"
                      r"(^|/)(_sysconfigdata|test_)[^/]*$|^encodings/[^/]*[0-9]")
    texts = set(topics.values())
    for path in root.rglob("*.py"):
        if not skip.search(path.relative_to(root).as_posix()):
            with suppress(UnicodeDecodeError, OSError):
                texts.add(path.read_text("utf-8"))
    texts = iter(sorted((text for text in texts if len(text) >= 200), key=digest))

    def documents(size):
        for text in at_most(size, texts):
            parts = re.split(r"(?<=\n)(?=(?:@|class |def |async def )\S)", text)
            yield from cut(parts, DEMO_PIECE_CHARACTERS)

    return [*documents(DEMO_VAL_BYTES)], [*documents(DEMO_TRAIN_BYTES)]


def demo(args):
    """Writes data/demo/ with the committed tokenizer, in place of an older one."""
    args.name, args.text_rule, args.workers = "demo", "raw", 1
    args.blob = DEMO_TOKENIZER.read_bytes()
    val, train = map(dict.fromkeys, demo_documents())   # each text once
    with new_dataset("demo") as folder:
        ranges = write_ranges(train, folder / "documents")
        build(folder, args, write_val_docs(folder, val), ranges)
        shutil.rmtree(ROOT / "data/demo", ignore_errors=True)


def docs(args):
    """Writes data/<name>/ from your files: the good documents are collected, some of them chosen
    for validation, a tokenizer is trained on the others, all are tokenized."""
    if (ROOT / "data" / args.name).exists():
        raise BadInput(f"--name={args.name}: data/{args.name} is there already; remove it, or another name")
    if args.val_docs and args.val_path:
        raise BadInput("--val_docs: not with --val_path")
    files, problems = find_files(args.paths)
    val_files, unread = find_files([args.val_path] if args.val_path else [])
    problems += unread
    with new_dataset(args.name) as folder:
        good, val = set(), set()
        texts = good_documents(files, args, good, problems)
        ranges = write_ranges(texts, folder / "documents")
        texts = good_documents(val_files, args, val, problems)
        val_ranges = write_ranges(texts, folder / "documents/val")
        if args.val_path:
            problems += [(args.val_path, "also for training, now for validation only")] * len(good & val)
        else:
            val_ranges = ranges
            val = {*heapq.nsmallest(args.val_docs or max(1, min(1000, len(good) // 10)), good)}
        if not val or not good - val or len(val) < args.val_docs:
            raise BadInput(f"{' '.join(args.paths)}: only {len(good):,} good documents, {len(val):,} "
                           f"for validation{reasons(problems)}")
        if problems:
            lines = [printable(f"{where}: {what}") + "\n" for where, what in problems]
            (folder / "skipped.txt").write_text("".join(lines), encoding="utf-8")
        texts = (text for text in texts_in(val_ranges) if digest(text) in val)
        build(folder, args, write_val_docs(folder, texts), ranges)
    if problems:
        say(f"skipped {len(problems):,}{reasons(problems)}; all are in data/{args.name}/skipped.txt")


def fineweb_source(folder, documents, text_rule):
    """-> what source.json holds; it and val_docs.jsonl.zst are written if they are not there. That
    is what find_documents() says, the text rule, what write_val_docs() says, the byte "train_start"
    where validation ends."""
    path = folder / "source.json"
    if path.exists():
        return json.loads(path.read_bytes())
    source = hub.find_documents() | {"text_rule": text_rule}
    where = source, 0, source["bytes"], FINEWEB_VAL_DOCS
    val = Range(documents / f"{source['etag']}_val.jsonl", where, text_rule)
    source |= write_val_docs(folder, val.texts())
    source["train_start"] = val.path.stat().st_size
    size = source["val_bytes"]
    if text_rule == "nmt_nfkc" and abs(size / FINEWEB_VAL_BYTES - 1) > 1e-4:
        raise BadInput(f"{val.path}: the validation documents have {size:,} bytes after nmt_nfkc, "
                       f"the challenge's {FINEWEB_VAL_BYTES:,}: scores would not compare")
    with atomic_write(path, "w") as file:
        json.dump(source, file, indent=1)
    return source


def fineweb(args):
    """Writes data/fineweb/: validation is the first 50,000 documents as they are, training is of
    those after them.

    The documents are cut at every 128 MiB, and a range becomes a shard, into which nothing goes but
    its bytes, the tokenizer, the text rule, and the validation documents, which are left out. So a
    stopped run goes on with the shards that are missing, a finished dataset can be given more
    --train_tokens, and no other ranges are fetched.
    """
    folder = ROOT / "data" / args.name
    documents = ROOT / "data/documents" if args.keep_documents else folder / "documents"
    for path in (folder, documents):
        path.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.rglob(".*.tmp"):
        unfinished.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 2 * args.train_tokens and not (folder / "source.json").exists():
        raise BadInput(f"{folder}: some {2 * args.train_tokens:,.0f} bytes are needed, the disk has {free:,} left")
    source = fineweb_source(folder, documents, args.text_rule)
    if source["text_rule"] != args.text_rule:
        raise BadInput(f"{folder}: begun with another text rule; remove it or change --name")
    ends = [*range(source["train_start"], source["bytes"], RANGE_BYTES), source["bytes"]]
    ranges = []
    for start, end in itertools.pairwise(ends):
        path = documents / f"{source['etag']}_{start}_{end}.jsonl"
        ranges.append(Range(path, (source, start, end), args.text_rule))
    build(folder, args, source, ranges, int(args.train_tokens))


def verify(args):
    """All of a dataset against its meta.json, of which readers leave most out: sha256 of every
    file, every token below the vocabulary, documents and bytes of the shards, the validation
    documents' own hash."""
    for name in args.paths:
        folder = find_dataset(name)
        meta = read_meta(folder)
        found = describe(folder, **meta)
        meta = meta.pop("files") | meta
        found = found.pop("files") | found
        for key in meta | found:
            if meta.get(key) != found.get(key):
                raise BadInput(f"{folder}: {key} is {meta.get(key)} in meta.json, and not {found.get(key)}")
        for _ in read_val_docs(folder, meta):
            pass  # at its end it has compared number, bytes and sha256
        say(f"{folder}: whole: {meta['train_docs']:,} training and {meta['val_docs']:,} validation "
            "documents, every hash and every count as in meta.json")


TRAINED = {"tokenizer": ("", "a tokenizer.json; without it one is trained"),
           "workers": (os.cpu_count(), "processes")}
FLAGS = {demo: {}, verify: {}, docs: TRAINED | {
    "name": ("", "writes data/NAME"),
    "vocab_size": (8192, "of a trained tokenizer: tokens in all"),
    "text_rule": (("raw", "nmt_nfkc"), "what is done to the text before anything is counted"),
    "text_key": ("text", "the key of a line of JSON that holds its text"),
    "val_docs": (0, "of validation; 0: 10 %%, at most 1000"),
    "val_path": ("", "validation documents are these instead"),
    "on_bad": (("skip", "refuse"), "bad or duplicate documents"),
}, fineweb: TRAINED | {
    "name": ("fineweb", "writes data/NAME"),
    "vocab_size": (16384, "of a trained tokenizer: tokens in all"),
    "text_rule": (("nmt_nfkc", "raw"), "what is done to the text before anything is counted"),
    "train_tokens": (8e9, "training tokens to write, or a little more"),
    "keep_documents": (False, "the text stays in data/documents, for another --name and tokenizer"),
}}


def main():
    parser = Parser(prog="prepare.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, flags in FLAGS.items():
        add = commands.add_parser(run.__name__, description=inspect.cleandoc(run.__doc__ or ""))
        add.set_defaults(run=run)
        if run in (docs, verify):
            add.add_argument("paths", nargs="+", metavar="PATH" if run is docs else "NAME")
        add.add_flags(flags)
    args = parser.parse_args()
    if args.run in (docs, fineweb):
        taken = args.name in {"demo", "documents", "fineweb", "synthetic"} - {args.run.__name__}
        if taken or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name):
            raise BadInput(f"--name={args.name}: a name of letters, digits, _ . - is expected, "
                           "and not demo, documents, fineweb or synthetic")
        enough = args.workers > 0 and 0 < getattr(args, "train_tokens", 1) < 1e15
        if not (enough and args.vocab_size < 65536):
            raise BadInput("--workers, --train_tokens: at least 1; --vocab_size: at most 65535")
        args.blob = args.tokenizer and Path(args.tokenizer).read_bytes()
        if args.tokenizer:
            Tokenizer(args.blob)   # is it one?
        TEXT_RULES[args.text_rule]("")   # is its package there?
    args.run(args)


if __name__ == "__main__":
    sys.exit(command(main))
