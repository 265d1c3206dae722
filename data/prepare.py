"""Documents -> data/<name>/: tokenizer, token shards, and the validation documents that are judged (see dataset.py).

    python data/prepare.py demo                         the standard library's own source and documentation, in seconds
    python data/prepare.py docs PATH... --name=NAME     your .jsonl, .jsonl.zst and .txt files, or folders of them
    python data/prepare.py fineweb                      the challenge's FineWeb documents, from the Hugging Face hub
    python data/prepare.py verify NAME                  every hash of a dataset, and all counts but train_bytes

A .jsonl file holds a document a line, {"text": ...}; a .txt file is one document. Validation documents are chosen by
document hash (docs, demo) or are the first 50,000 (fineweb). A stopped `fineweb` continues where it was; the others
write a new folder at once or not at all.
"""
import hashlib
import heapq
import inspect
import io
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import zstandard

sys.path[:0] = [path for path in [str(Path(__file__).resolve().parent.parent)] if path not in sys.path]
from data import hub  # noqa: E402
from data.dataset import (BadInput, DocsHash, Parser, Progress, ROOT, atomic_write, command, find_dataset,  # noqa: E402
                          read_meta, read_shard, read_val_docs, write_shard)
from data.text_rules import TEXT_RULES  # noqa: E402
from data.tokenizer import MAX_PHRASES, Tokenizer  # noqa: E402
from data.train_bpe import train_tokenizer  # noqa: E402

SHARD_TOKENS = 100_000_000
BATCH_BYTES = 1_000_000            # raw bytes that a worker gets at a time
ONE_PROCESS_BYTES = 20_000_000     # smaller inputs are done before a pool of processes has started
DEMO_TOKENIZER = Path(__file__).resolve().parent / "demo_tokenizer.json"
DEMO_VAL_BYTES, DEMO_TRAIN_BYTES, DEMO_PIECE_BYTES = 450_000, 10_000_000, 6144
FINEWEB_VAL_DOCS = 50_000
FINEWEB_VAL_BYTES = 151_078_222    # of those documents after nmt_nfkc, as the public scorer counts them


# ----------------------------------------------------------------------------------------------------------------------
# Sources: functions () -> iterator of (where, raw bytes, is_json), which can be read again

def demo_documents():
    """The standard library -> val texts, train texts: the language reference that pydoc carries, the modules' source.

    A document is a topic, or a file cut before top-level definitions into pieces of about 6 kB. Files go to a split
    whole, so that no validation file is seen in training: the first by sha256 of their text are validation. Tests,
    tables of encodings, and what the build of Python wrote (it names paths of the machine) are left out.
    """
    from pydoc_data.topics import topics
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = re.compile(r"(^|/)(site-packages|dist-packages|__pycache__|tests?|idle_test|pydoc_data|config-[^/]*)/|"
                      r"(^|/)(_sysconfigdata|test_)[^/]*$|^encodings/[^/]*[0-9]")
    texts = set(topics.values())
    for path in root.rglob("*.py"):
        if not skip.search(path.relative_to(root).as_posix()):
            try:
                texts.add(path.read_bytes().decode().replace("\r\n", "\n"))
            except (UnicodeDecodeError, OSError):
                continue
    val, train, sizes = [], [], Counter()
    texts = [text for text in texts if len(text) >= 200]
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        split = val if sizes["val"] < DEMO_VAL_BYTES else train
        sizes["val" if split is val else "train"] += len(text.encode())
        document = ""
        for part in re.split(r"(?<=\n)(?=(?:@|class |def |async def )\S)", text):
            if document and len(document) + len(part) > DEMO_PIECE_BYTES:
                split.append(document)
                document = ""
            document += part
        split.append(document)
        if sizes["train"] >= DEMO_TRAIN_BYTES:
            break
    return val, train


def texts_source(texts, label):
    return lambda: ((f"{label}:{number}", text.encode(), False) for number, text in enumerate(texts, 1))


def paths_source(paths):
    """Files and folders -> source, bytes on disk. A folder's .jsonl, .jsonl.zst and .txt files come sorted by path."""
    files = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        found = [file for file in found if file.name.endswith((".jsonl", ".jsonl.zst", ".txt"))]
        if not found:
            raise BadInput(f"{path}: no .jsonl, .jsonl.zst or .txt file" if path.exists() else f"{path}: not there")
        files += found

    def read():
        for path in files:
            try:
                with open(path, "rb") as file:
                    if path.suffix == ".txt":
                        yield str(path), file.read(), False
                        continue
                    if path.suffix == ".zst":
                        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                        file = io.BufferedReader(stream, 1 << 20)
                    for number, line in enumerate(file, 1):
                        yield f"{path}:{number}", line, True
            except OSError as error:
                raise BadInput(f"{path}: {error.strerror or error}") from error
            except zstandard.ZstdError as error:
                raise BadInput(f"{path}: damaged zstd ({error})") from error
    return read, sum(file.stat().st_size for file in files)


# ----------------------------------------------------------------------------------------------------------------------
# Workers: raw documents -> text, hash, tokens

_worker = {}


def _start_worker(blob, text_rule, in_child):
    if in_child:   # Ctrl-C is for the parent, which ends its workers
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(tokenizer=Tokenizer(blob) if blob else None, rule=TEXT_RULES[text_rule])


def _work(batch):
    """[(where, raw, is_json)] -> problems [(where, what)], documents [(where, 16-byte digest, UTF-8 text, tokens)]."""
    problems, docs, texts = [], [], []
    for where, raw, is_json in batch:
        try:
            text = raw.decode()
            if is_json:
                text = json.loads(text) if text.strip() else {"text": ""}
                text = text.get("text") if isinstance(text, dict) else None
            if not isinstance(text, str):
                problems.append((where, "no text"))
                continue
            data = (text := _worker["rule"](text)).encode()
        except UnicodeDecodeError:
            problems.append((where, "not UTF-8"))
        except UnicodeEncodeError:
            problems.append((where, "lone surrogate"))
        except (ValueError, RecursionError):
            problems.append((where, "bad JSON"))
        else:
            docs.append((where, hashlib.sha256(data).digest()[:16], data))
            texts.append(text)
    tokens = _worker["tokenizer"].encode_batch(texts) if _worker["tokenizer"] else [None] * len(docs)
    return problems, [(*doc, part) for doc, part in zip(docs, tokens, strict=True)]


def process(source, blob, text_rule, workers):
    """Streams _work over the batches of a source, in order, 3 batches a worker in memory. One worker: no pool."""
    def batches():
        batch, size = [], 0
        for item in source:
            batch.append(item)
            size += len(item[1]) + 100
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    if workers == 1:
        _start_worker(blob, text_rule, False)
        yield from map(_work, batches())
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (blob, text_rule, True))
    pending = deque()
    try:
        for batch in batches():
            pending.append(pool.submit(_work, batch))
            if len(pending) >= 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Writing a dataset

class Shards:
    """Collects documents into <split>_NNNNNN.bin files of SHARD_TOKENS or a little more, each ending with a document.

    .files: [{"name", "sha256", "end": where of its last document, "docs", "bytes", "tokens"}]; saved() follows each.
    """

    def __init__(self, folder, split, files=None, saved=lambda: None):
        self.folder, self.split, self.saved = folder, split, saved
        self.files = [] if files is None else files
        self.parts, self.count = [], Counter()

    def add(self, where, n_bytes, tokens):
        self.parts.append(tokens)
        self.count.update(docs=1, bytes=n_bytes, tokens=len(tokens))
        self.end = where
        if self.count["tokens"] >= SHARD_TOKENS:
            self.flush()

    def flush(self):
        if self.parts:
            path = self.folder / f"{self.split}_{len(self.files):06d}.bin"
            write_shard(path, np.concatenate(self.parts))
            self.files.append({"name": path.name, "sha256": hub.sha256_file(path), "end": self.end, **self.count})
            self.parts, self.count = [], Counter()
            self.saved()

    def total(self, key):
        return sum(file[key] for file in self.files) + self.count[key]


def write_val(folder, results, keep, shards):
    """Results of process(), where keep(digest) -> val_docs.jsonl.zst and the validation shards; returns a DocsHash."""
    docs_hash, compressor = DocsHash(), zstandard.ZstdCompressor(12)
    with atomic_write(folder / "val_docs.jsonl.zst") as file, compressor.stream_writer(file, closefd=False) as out:
        for where, data, tokens in kept(results, keep):
            docs_hash.add(data)
            out.write(json.dumps({"text": data.decode()}, ensure_ascii=False).encode() + b"\n")
            shards.add(where, len(data), tokens)
    shards.flush()
    return docs_hash


def write_meta(folder, name, text_rule, docs_sha256, val, train):
    """Writes meta.json, which makes the folder a dataset, and prints what is in it."""
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
    meta = {"format": 1, "name": name, "text_rule": text_rule, "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256, "val_docs_sha256": docs_sha256}
    for split, shards in (("train", train), ("val", val)):
        docs, size, tokens = (shards.total(key) for key in ("docs", "bytes", "tokens"))
        meta |= {f"{split}_docs": docs, f"{split}_bytes": size, f"{split}_tokens": tokens}
        print(f"{split:5} {docs:>11,} documents {size:>15,} bytes {tokens:>14,} tokens {size / tokens:.3f} bytes/token")
    hashes = {file["name"]: file["sha256"] for file in val.files + train.files}
    for extra in ("tokenizer.json", "val_docs.jsonl.zst", "skipped.txt"):
        if (folder / extra).exists():
            hashes[extra] = hub.sha256_file(folder / extra)
    meta["files"] = {file: {"bytes": (folder / file).stat().st_size, "sha256": hashes[file]} for file in sorted(hashes)}
    with atomic_write(folder / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    read_meta(folder)


def kept(results, keep):
    """Yields (where, UTF-8 text, tokens) of those documents in results of process() for which keep(digest)."""
    for _, docs in results:
        for where, digest, data, tokens in docs:
            if keep(digest):
                yield where, data, tokens


def once(allowed):
    """-> keep(digest): True the first time that a digest comes for which allowed(digest)."""
    seen = set()

    def keep(digest):
        if digest in seen or not allowed(digest):
            return False
        seen.add(digest)
        return True
    return keep


def write_new(name, blob, text_rule, val, train, problems=(), progress=Progress("", 0)):
    """(results of process(), keep) of validation and of training -> data/<name>/, written beside it and put in its
    place when all went well."""
    target = ROOT / "data" / name
    folder, old = (target.with_name(f".{name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_bytes(blob)
        val_shards, train_shards = Shards(folder, "val"), Shards(folder, "train")
        docs_hash = write_val(folder, *val, val_shards)
        for where, data, tokens in kept(*train):
            train_shards.add(where, len(data), tokens)
            progress.add()
        train_shards.flush()
        if problems:
            (folder / "skipped.txt").write_text("".join(f"{where}: {what}\n" for where, what in problems), "utf-8")
        write_meta(folder, name, text_rule, docs_hash.hexdigest(), val_shards, train_shards)
        if target.exists():
            os.replace(target, old)
        os.replace(folder, target)
    except OSError as error:
        raise BadInput(f"{error.filename or target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# The commands

def demo(args):
    """Writes data/demo/ with the committed tokenizer, in place of an older one."""
    blob, keep = DEMO_TOKENIZER.read_bytes(), once(lambda digest: True)
    val, train = ((process(texts_source(texts, "demo")(), blob, "raw", 1), keep) for texts in demo_documents())
    write_new("demo", blob, "raw", val, train)


def docs(args):
    """Writes data/<name>/ from the user's files: a pass finds what is good, one trains a tokenizer, two write."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name):
        raise BadInput("--name: give the dataset a name of letters, digits, _ . -")
    if (ROOT / "data" / args.name).exists():
        raise BadInput(f"--name={args.name}: data/{args.name} is there already; remove it or choose another name")
    if args.val_docs is not None and (args.val_docs < 1 or args.val_path):
        raise BadInput("--val_docs is at least 1, and not with --val_path")
    source, size = paths_source(args.paths)
    val_source, val_size = paths_source([args.val_path]) if args.val_path else (source, 0)
    blob, problems = read_tokenizer(args), []
    workers = args.workers if size + val_size > ONE_PROCESS_BYTES else 1

    def run(source, blob=None):
        return process(source(), blob, args.text_rule, workers)

    def scan(source):
        """-> the digests of a source's good documents; what is wrong with the others goes to `problems`."""
        good = set()
        for bad, docs in run(source):
            for where, digest, data, _ in docs:
                if not data.strip() or digest in good:
                    bad.append((where, "duplicate" if data.strip() else "empty"))
                else:
                    good.add(digest)
            problems.extend(bad)
            if problems and args.on_bad == "refuse":
                raise BadInput("{}: {} (--on_bad=skip leaves such documents out)".format(*problems[0]))
            progress.add(len(bad) + len(docs))
        return good

    with Progress("reading", 0, "documents") as progress:
        good = scan(source)
        if args.val_path:
            val = scan(val_source)
            problems += [(args.val_path, "in the training files too, kept for validation only")] * len(good & val)
        else:
            n_val = args.val_docs or max(1, min(1000, len(good) // 10))
            val = set(heapq.nsmallest(n_val, good))
    train = good - val
    if not val or not train or len(val) < (args.val_docs or 0):
        raise BadInput(f"{' '.join(args.paths)}: only {len(good):,} good documents, {len(val):,} for validation")
    blob = blob or train_tokenizer(
        lambda: (data.decode() for _, data, _ in kept(run(source), train.__contains__)),
        args.vocab_size, args.phrases, args.name)
    with Progress("tokenizing", len(train), "documents") as progress:
        write_new(args.name, blob, args.text_rule, (run(val_source, blob), once(val.__contains__)),
                  (run(source, blob), once(train.__contains__)), problems, progress)
    if problems:
        counts = ", ".join(f"{n:,} {what}" for what, n in Counter(what for _, what in problems).most_common())
        print(f"skipped {len(problems):,}: {counts}; each is named in data/{args.name}/skipped.txt")


def fineweb(args):
    """Writes data/fineweb/: validation is the first 50,000 documents as they are, training is of those after them.

    state.json holds the finished shards and the byte of the documents at which each ends, so that a stopped run
    continues, and a finished dataset can be given more --train_tokens. Training documents that equal a validation
    document (by hash) are left out, so the two are disjoint.
    """
    folder = ROOT / "data" / args.name
    folder.mkdir(parents=True, exist_ok=True)
    path, docs_sha256 = hub.download(folder)
    tokenizer_path, state_path = folder / "tokenizer.json", folder / "state.json"

    def lines(start, n_docs=None):   # where: the byte at which the line ends
        with open(path, "rb") as file:
            file.seek(start)
            for number, line in enumerate(file):
                if number == n_docs:
                    return
                start += len(line)
                yield start, line, True

    def run(source):
        for bad, docs in process(source, blob, args.text_rule, args.workers):
            if bad:
                raise BadInput(f"{path}: the document that ends at byte {bad[0][0]:,}: {bad[0][1]}")
            yield bad, docs

    end_of_val = 0
    for end_of_val, _, _ in lines(0, FINEWEB_VAL_DOCS):
        pass
    blob = read_tokenizer(args) or (tokenizer_path.read_bytes() if tokenizer_path.exists() else None)
    if not blob:
        print("training a tokenizer")
        blob = train_tokenizer(lambda: (data.decode() for _, docs in run(lines(end_of_val)) for _, _, data, _ in docs),
                               args.vocab_size, args.phrases, folder.name)
    settings = {"docs_sha256": docs_sha256, "text_rule": args.text_rule, "tokenizer_sha256": Tokenizer(blob).sha256}
    state = {"settings": settings, "val": [], "train": []}
    try:
        state = json.loads(state_path.read_bytes()) if state_path.exists() else state
    except ValueError as error:
        raise BadInput(f"{state_path}: damaged ({error}); remove {folder} and begin again") from error
    if state["settings"] != settings:
        raise BadInput(f"{folder}: begun with another tokenizer, text rule or documents; remove it or change --name")
    for file in state["val"] + state["train"]:
        read_shard(folder / file["name"])   # still there, and whole
    with atomic_write(tokenizer_path) as file:
        file.write(blob)

    def save():
        with atomic_write(state_path, "w") as file:
            json.dump(state, file)

    val_shards, train_shards = Shards(folder, "val", state["val"]), Shards(folder, "train", state["train"], save)
    if "val_docs_sha256" not in state:
        docs_hash = write_val(folder, run(lines(0, FINEWEB_VAL_DOCS)), lambda digest: True, val_shards)
        if args.text_rule == "nmt_nfkc" and abs(docs_hash.bytes / FINEWEB_VAL_BYTES - 1) > 1e-4:
            raise BadInput(f"{path}: the validation documents have {docs_hash.bytes:,} bytes after nmt_nfkc, "
                           f"the challenge's have {FINEWEB_VAL_BYTES:,}: scores would not compare")
        state["val_docs_sha256"] = docs_hash.hexdigest()
        save()
    val_meta = {"val_docs": val_shards.total("docs"), "val_bytes": val_shards.total("bytes"),
                "val_docs_sha256": state["val_docs_sha256"]}
    val_digests = {hashlib.sha256(text.encode()).digest()[:16] for text in read_val_docs(folder, val_meta)}
    start, overlap = state["train"][-1]["end"] if state["train"] else end_of_val, 0
    with Progress("tokenizing", int(args.train_tokens), "tokens") as progress:
        progress.add(train_shards.total("tokens"))
        results = run(lines(start)) if train_shards.total("tokens") < args.train_tokens else ()
        for _, docs in results:
            for where, digest, data, tokens in docs:
                if digest in val_digests:
                    overlap += 1
                elif train_shards.total("tokens") < args.train_tokens:
                    train_shards.add(where, len(data), tokens)
                    progress.add(len(tokens))
            if train_shards.total("tokens") >= args.train_tokens:
                break
        train_shards.flush()
    write_meta(folder, folder.name, args.text_rule, state["val_docs_sha256"], val_shards, train_shards)
    print(f"train and validation are disjoint by document hash; {overlap:,} documents left out of train for that")


def verify(args):
    """All of a dataset against its meta.json, of which readers leave most out: sha256 of every file, every token below
    the vocabulary, documents by their boundaries, the validation documents' own hash."""
    for name in args.paths:
        folder = find_dataset(name)
        meta = read_meta(folder)
        for file, entry in meta["files"].items():
            if hub.sha256_file(folder / file, f"reading {file}") != entry.get("sha256"):
                raise BadInput(f"{folder / file}: its sha256 is not the one in meta.json")
        for split in ("train", "val"):
            shards = (read_shard(path, meta["vocab_size"]) for path in sorted(folder.glob(f"{split}_*.bin")))
            docs = sum(int(np.count_nonzero(tokens == Tokenizer.boundary)) for tokens in shards)
            if docs != meta[f"{split}_docs"]:
                said = meta[f"{split}_docs"]
                raise BadInput(f"{folder}/meta.json: {split}_docs is {said:,}, but the shards hold {docs:,}")
        for _ in read_val_docs(folder, meta):
            pass  # at its end it has compared number, bytes and sha256
        print(f"{folder}: whole: {len(meta['files'])} files, {meta['train_docs']:,} training and {meta['val_docs']:,} "
              "validation documents, every hash and all counts but train_bytes as in meta.json")


def read_tokenizer(args):
    """--tokenizer -> its bytes, checked, or None."""
    try:
        blob = Path(args.tokenizer).read_bytes() if args.tokenizer else None
    except OSError as error:
        raise BadInput(f"--tokenizer={args.tokenizer}: {error.strerror}") from error
    if blob is not None:
        Tokenizer(blob)
    return blob


def main():
    parser = Parser(prog="prepare.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run in (demo, docs, fineweb, verify):
        add = commands.add_parser(run.__name__, description=inspect.cleandoc(run.__doc__))
        add.set_defaults(run=run)
        if run in (docs, verify):
            add.add_argument("paths", nargs="+", metavar="PATH" if run is docs else "NAME")
        if run in (docs, fineweb):
            add.add_argument("--name", default="fineweb" if run is fineweb else "", help="writes data/NAME")
            add.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json; without it one is trained")
            add.add_argument("--vocab_size", type=int, default=16384 if run is fineweb else 8192,
                             help="of a trained tokenizer: tokens in all")
            add.add_argument("--phrases", type=int, help="of a trained tokenizer: phrases (None: a 16th)")
            add.add_argument("--text_rule", choices=sorted(TEXT_RULES), default="nmt_nfkc" if run is fineweb else "raw")
            add.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
        if run is docs:
            add.add_argument("--val_docs", type=int, metavar="N", help="of validation (None: 10 %%, at most 1000)")
            add.add_argument("--val_path", metavar="PATH", help="validation documents are these instead")
            add.add_argument("--on_bad", choices=["skip", "refuse"], default="skip", help="bad or duplicate documents")
        if run is fineweb:
            add.add_argument("--train_tokens", type=float, default=8e9, help="training tokens to write")
    args = parser.parse_args()
    if args.run in (docs, fineweb):
        if args.workers < 1 or not 1 <= getattr(args, "train_tokens", 1) < 1e15:
            raise BadInput("--workers and --train_tokens are at least 1")
        if not (0 <= (args.phrases or 0) <= MAX_PHRASES and 2 <= args.vocab_size <= 65535):
            raise BadInput(f"--phrases is 0 to {MAX_PHRASES}, --vocab_size 2 to 65535")
        args.phrases = min(args.vocab_size // 16, MAX_PHRASES) if args.phrases is None else args.phrases
    args.run(args)


if __name__ == "__main__":
    sys.exit(command(main))
