"""Documents -> data/<name>/: a tokenizer, token shards, and the validation documents that are judged (formats: data/dataset.py).

    python data/prepare.py demo                             the standard library's own source and documentation, in seconds
    python data/prepare.py docs PATH... --name=NAME         your .jsonl, .jsonl.zst and .txt files, or folders of them
    python data/prepare.py fineweb                          the challenge's frozen FineWeb documents, from the Hugging Face hub

.jsonl holds a document a line, {"text": ...}; a .txt file is one document. Validation documents are chosen by document hash (docs, demo)
or are the first 50,000 (fineweb). An interrupted `fineweb` continues where it stopped; the others write a new folder at once or not at all.
"""
import functools
import hashlib
import heapq
import io
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import unicodedata
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import zstandard

sys.path[:0] = [path for path in [str(Path(__file__).resolve().parent.parent)] if path not in sys.path]
from data.dataset import (BadInput, DocsHash, Parser, Progress, ROOT, atomic_write, command, read_meta, read_val_docs,  # noqa: E402
                          write_shard)
from data.tokenizer import NO_TOKEN, PATTERN, Tokenizer, lower_case  # noqa: E402

SHARD_TOKENS = 100_000_000
BATCH_BYTES = 2_000_000           # raw bytes that a worker gets at a time
SAMPLE_BYTES = 1_000_000_000      # of text that a tokenizer's pieces are trained on, at most
PHRASE_BYTES = 60_000_000         # of text that its phrases are counted on, at most
DEMO_TOKENIZER = Path(__file__).resolve().parent / "demo_tokenizer.json"
DEMO_VAL_BYTES, DEMO_TRAIN_BYTES = 450_000, 10_000_000
HUB_REPO, HUB_DOCS, HUB_SIDECAR = "willdepueoai/parameter-golf", "docs_selected.jsonl", "docs_selected.source_manifest.json"
FINEWEB_VAL_DOCS, FINEWEB_VAL_BYTES = 50_000, 151_078_222   # the bytes are those after nmt_nfkc
HUB_TRIES, HUB_WAIT_SECONDS = 5, 2.0


# ----------------------------------------------------------------------------------------------------------------------
# Text rules: text -> text, before anything is counted

@functools.cache
def _nmt_tables():
    """What sentencepiece's nmt_nfkc map holds -> {char: text}, {char: its one-char NFKD}, {NFKD of 2 to 4 chars: composed}, regexes.

    The map is built as sentencepiece builds it: NFKC of every character, and every sequence whose NFKD is that of a composed character.
    On top of NFKC: some characters are spaces, controls vanish, and U+FF5E stays. Checked key by key against the map of sentencepiece
    0.2.3 (225,276 keys; 0.2.0 holds 551 fewer, all of characters that Unicode added since 2020). Python 3.11 knows Unicode 14, the map
    knows 17, so `newer` lists what came between.
    """
    single = dict.fromkeys("\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\u2581\ufeff\ufffd", " ")
    single |= dict.fromkeys(map(chr, [*range(1, 9), 11, *range(14, 32), 0x7F, 0x8F, 0x9F]), "")
    newer = dict(zip(map(chr, [0xA7F1, *range(0x1CCD6, 0x1CCFA), *range(0x1E030, 0x1E06E)]),
                     "SABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789абвгдежзиклмопрстуфхцчшыэюꚉәіјөүӏабвгдежзиклопсуфхцчшъыґіѕџҫꙑұ"))
    single, nfkd, composed = single | newer, dict(newer), {}
    for code in [*range(0x80, 0x3400), *range(0xA000, 0xD800), *range(0xF900, 0x20000), *range(0x2F800, 0x2FA20)]:
        parts = unicodedata.normalize("NFKD", char := chr(code))
        if parts == char or char == "\uff5e":
            continue
        if (whole := unicodedata.normalize("NFKC", char)) != char:
            single[char] = whole
        if len(parts) == 1:
            nfkd[char] = parts
        elif len(parts) <= 4 and (whole := unicodedata.normalize("NFC", parts)) != parts:
            composed[parts] = whole
    for line in ("105D2+307=105C9 105DA+307=105E4 11382+113C9=11383 11384+113BB=11385 1138B+113C2=1138E 11390+113C9=11391 113C2+113B8=113C7 "
                 "113C2+113C2=113C5 113C2+113C9=113C8 1611E+1611E=16121 1611E+16129=16122 1611E+1611F=16123 16129+1611F=16124 1611E+16120=16125 "
                 "1611E+1611E+1611F=16126 1611E+16129+1611F=16127 1611E+1611E+16120=16128 16D67+16D67=16D68 16D63+16D67=16D69 "
                 "16D63+16D67+16D67=16D6A").split():
        *parts, whole = (chr(int(code, 16)) for code in re.split("[+=]", line))
        composed["".join(parts)] = whole
    tails = {char for parts in composed for char in parts[1:]}
    tails |= {char for char, part in nfkd.items() if part in tails}

    def one_of(chars):   # re tests a character above U+FFFF against a class one member at a time, so those go in as one range
        return "[" + re.escape("".join(sorted(char for char in chars if char < "\U00010000"))) + "\U00010000-\U0010ffff]"
    return single, nfkd, composed, re.compile(one_of(single)), re.compile(one_of(tails)), re.compile(f".{one_of(tails)}+", re.S)


def nmt_nfkc(text):
    """sentencepiece's nmt_nfkc with extra white space removed and no dummy prefix: the text of the public leaderboard."""
    single, nfkd, composed, single_re, tail_re, run_re = _nmt_tables()

    def compose(match):   # longest match first, left to right; no composition of an earlier result
        out, at, run = [], 0, match[0]
        while at < len(run):
            for size in range(min(4, len(run) - at), 1, -1):
                whole = composed.get("".join([nfkd.get(char, char) for char in run[at:at + size]]))
                if whole is not None:
                    break
            else:
                whole, size = run[at], 1
            out.append(whole)
            at += size
        return "".join(out)

    if not text.isascii() and tail_re.search(text):
        text = run_re.sub(compose, text)
    text = single_re.sub(lambda match: single.get(match[0], match[0]), text)
    return re.sub("  +", " ", text).strip(" ")


TEXT_RULES = {"raw": lambda text: text, "nmt_nfkc": nmt_nfkc}


# ----------------------------------------------------------------------------------------------------------------------
# Sources: functions () -> iterator of (where, raw bytes, is_json), which can be read again

def demo_documents():
    """The standard library -> val texts, train texts: the language reference that pydoc carries, and the modules' source.

    A document is a topic, or a file cut before top-level definitions into pieces of about 6 kB. Files go to a split whole, so that no
    validation file is seen in training: in order of the sha256 of their text the first are validation. Tests, tables of encodings, and
    what the build of Python wrote (paths of the machine) are left out.
    """
    from pydoc_data.topics import topics
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = re.compile(r"(^|/)(site-packages|dist-packages|__pycache__|tests?|idle_test|pydoc_data|config-[^/]*)/|"
                      r"(^|/)(_sysconfigdata|test_)[^/]*$|^encodings/[^/]*[0-9]")
    texts = set(topics.values())
    for path in root.rglob("*.py"):
        if not skip.search(path.relative_to(root).as_posix()):
            try:
                texts.add(path.read_bytes().decode())
            except (UnicodeDecodeError, OSError):
                continue
    texts = [text.replace("\r\n", "\n") for text in texts if len(text) >= 200]
    pieces = {"val": [], "train": []}
    sizes = dict.fromkeys(pieces, 0)
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        split = "val" if sizes["val"] < DEMO_VAL_BYTES else "train"
        if sizes["train"] >= DEMO_TRAIN_BYTES:
            break
        sizes[split] += len(text.encode())
        document = ""
        for part in re.split(r"(?<=\n)(?=(?:@|class |def |async def )\S)", text):
            if document and len(document) + len(part) > 6144:
                pieces[split].append(document)
                document = ""
            document += part
        pieces[split].append(document)
    return pieces["val"], pieces["train"]


def texts_source(texts, label):
    return lambda: ((f"{label}:{number}", text.encode(), False) for number, text in enumerate(texts, 1))


def paths_source(paths):
    """Files and folders -> source, total bytes on disk. A folder's .jsonl, .jsonl.zst and .txt files are read in the order of their paths."""
    kinds = (".jsonl", ".jsonl.zst", ".txt")
    files = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        found = [file for file in found if file.name.endswith(kinds)]
        if not found:
            raise BadInput(f"{path}: " + ("not there" if not path.exists() else "no .jsonl, .jsonl.zst or .txt file"))
        files += found

    def read():
        for path in files:
            try:
                with open(path, "rb") as file:
                    if path.suffix == ".txt":
                        yield str(path), file.read(), False
                        continue
                    if path.suffix == ".zst":
                        file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True), 1 << 20)
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
    """[(where, raw, is_json)] -> problems [(where, what)], documents [(where, 16-byte digest, UTF-8 bytes, tokens or None)], raw bytes."""
    problems, docs, texts = [], [], []
    for where, raw, is_json in batch:
        problem = None
        try:
            text = raw.decode()
            if is_json:
                text = json.loads(text)
                text = text.get("text") if isinstance(text, dict) else None
            if not isinstance(text, str):
                problem = "no text"
            elif text.strip():
                text = _worker["rule"](text)
                docs.append([where, hashlib.sha256(data := text.encode()).digest()[:16], data, None])
                texts.append(text)
            else:
                problem = "empty"
        except UnicodeDecodeError:
            problem = "not UTF-8"
        except UnicodeEncodeError:
            problem = "lone surrogate"
        except (ValueError, RecursionError):
            problem = "empty" if not raw.strip() else "bad JSON"
        if problem:
            problems.append((where, problem))
    if _worker["tokenizer"]:
        for doc, tokens in zip(docs, _worker["tokenizer"].encode_batch(texts)):
            doc[3] = tokens
    return problems, docs, sum(len(raw) for _, raw, _ in batch)


def process(source, blob, text_rule, workers):
    """Streams _work over the batches of a source, in order, with at most 3 batches a worker in memory; one worker is this process."""
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
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (blob, text_rule, True)) as pool:
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
# Training a tokenizer

def train_tokenizer(texts, vocab_size, n_phrases, name):
    """Function () -> iterator of texts (after the text rule) -> bytes of tokenizer.json; the same texts give the same bytes.

    The pieces come from a BPE within chunks (`tokenizers` package), then the phrases from counting neighbours in the result.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise BadInput("training a tokenizer needs another package: pip install tokenizers   (or give --tokenizer=FILE)") from error
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    byte_of = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}   # how ByteLevel writes bytes as characters
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    n_pieces = vocab_size - 1 - n_phrases - (256 - len(NO_TOKEN))
    if n_pieces < 1:
        raise BadInput(f"--vocab_size={vocab_size}: too small for {256 - len(NO_TOKEN)} bytes and {n_phrases} phrases")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256 + n_pieces, show_progress=False, initial_alphabet=list(byte_of))
    bpe.train_from_iterator(_at_most(SAMPLE_BYTES, map(lower_case, texts())), trainer)
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    pieces = [bytes(byte_of[char] for char in piece).decode("latin-1") for piece, _ in vocab if len(piece) > 1]
    if len(pieces) != n_pieces:
        raise BadInput(f"--vocab_size={vocab_size}: the text gives only {len(pieces):,} pieces, {n_pieces:,} are wanted")

    spec = {"format": 1, "name": name, "pattern": PATTERN, "pieces": pieces, "phrases": []}
    encode = lambda: json.dumps(spec, ensure_ascii=False, separators=(",", ":")).encode()   # noqa: E731
    tokenizer = Tokenizer(encode())
    # A token that begins a chunk: not the rest of a word. Neighbours that begin chunks, before a third, are whole chunks.
    begins = [not piece or not (piece[:1].islower() or piece[:1].isdigit() or piece[0] >= 128 or piece[:1] == b"'") for piece in tokenizer.pieces]
    begins = np.array(begins + [True] * n_phrases)
    tokens = np.concatenate([*tokenizer.encode_batch(_at_most(PHRASE_BYTES, texts())), [0]]).astype(np.int64)
    while len(spec["phrases"]) < n_phrases:
        left, right = tokens[:-2], tokens[1:-1]
        whole = begins[left] & begins[right] & begins[tokens[2:]] & (left != 0) & (right != 0) & (left != right)
        pairs, counts = np.unique(left[whole] * 65536 + right[whole], return_counts=True)
        used = set()   # within a round, pairs that share no token, so that their counts stay true
        for index in np.lexsort((pairs, -counts))[:64]:
            pair = [int(pairs[index]) >> 16, int(pairs[index]) & 65535]
            if used & {*pair} or len(spec["phrases"]) == n_phrases:
                break
            used |= {*pair}
            at = np.flatnonzero((tokens[:-1] == pair[0]) & (tokens[1:] == pair[1]))
            tokens[at] = tokenizer.first_phrase + len(spec["phrases"])
            tokens = np.delete(tokens, at + 1)
            spec["phrases"].append(pair)
        if not used:
            raise BadInput(f"--vocab_size={vocab_size}: the text gives only {len(spec['phrases'])} phrases, {n_phrases} are wanted")
    return encode()


def _at_most(n_bytes, texts):
    for text in texts:
        yield text
        n_bytes -= len(text.encode())
        if n_bytes <= 0:
            return


# ----------------------------------------------------------------------------------------------------------------------
# Writing a dataset

class Shards:
    """Collects documents into shards <split>_NNNNNN.bin of SHARD_TOKENS or a little more, each ending with a document.

    .files is a list of {"name", "sha256", "docs", "bytes", "tokens", "end": where of the last document}; `saved` is called after each.
    """

    def __init__(self, folder, split, files, saved=lambda: None):
        self.folder, self.split, self.files, self.saved, self.parts = folder, split, files, saved, []
        self.entry = Counter()

    def add(self, where, n_bytes, tokens):
        self.parts.append(tokens)
        self.entry += Counter(docs=1, bytes=n_bytes, tokens=len(tokens))
        self.end = where
        if self.entry["tokens"] >= SHARD_TOKENS:
            self.flush()

    def flush(self):
        if self.parts:
            path = self.folder / f"{self.split}_{len(self.files):06d}.bin"
            write_shard(path, np.concatenate(self.parts))
            self.files.append({"name": path.name, "sha256": sha256_file(path), "end": self.end, **self.entry})
            self.parts, self.entry = [], Counter()
            self.saved()

    def total(self, key):
        return sum(file[key] for file in self.files) + self.entry[key]


def sha256_file(path, label=None):
    with open(path, "rb") as file, Progress(label, path.stat().st_size, "bytes") if label else nullcontext() as progress:
        sha = hashlib.sha256()
        while chunk := file.read(1 << 22):
            sha.update(chunk)
            if progress:
                progress.add(len(chunk))
    return sha.hexdigest()


def write_val(folder, results, keep, shards):
    """Results of process() -> val_docs.jsonl.zst and the validation shards. Returns the DocsHash."""
    docs_hash = DocsHash()
    with atomic_write(folder / "val_docs.jsonl.zst") as file, zstandard.ZstdCompressor(12).stream_writer(file, closefd=False) as out:
        for _, docs, _ in results:
            for where, digest, data, tokens in docs:
                if keep(digest):
                    docs_hash.add(data)
                    out.write(json.dumps({"text": data.decode()}, ensure_ascii=False).encode() + b"\n")
                    shards.add(where, len(data), tokens)
        shards.flush()
    return docs_hash


def write_meta(folder, name, text_rule, docs_sha256, shards):
    """Writes meta.json, which makes the folder a dataset, prints what it holds, and returns it."""
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
    meta = {"format": 1, "name": name, "text_rule": text_rule, "vocab_size": tokenizer.vocab_size, "tokenizer_sha256": tokenizer.sha256}
    meta |= {f"{split}_{key}": shards[split].total(key) for split in ("train", "val") for key in ("docs", "bytes", "tokens")}
    meta["val_docs_sha256"] = docs_sha256
    hashes = {file["name"]: file["sha256"] for split in shards.values() for file in split.files}
    for extra in ("tokenizer.json", "val_docs.jsonl.zst", "skipped.txt"):
        if (folder / extra).exists():
            hashes[extra] = sha256_file(folder / extra)
    meta["files"] = {file: {"bytes": (folder / file).stat().st_size, "sha256": sha} for file, sha in sorted(hashes.items())}
    with atomic_write(folder / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    for split in ("train", "val"):
        docs, size, tokens = (meta[f"{split}_{key}"] for key in ("docs", "bytes", "tokens"))
        print(f"{split:5} {docs:>11,} documents {size:>15,} bytes {tokens:>14,} tokens {size / max(tokens, 1):7.3f} bytes/token")
    return read_meta(folder)


@contextmanager
def new_folder(name):
    """A temporary folder that becomes data/<name>/ when the block ends well, in place of one that is there, and vanishes otherwise."""
    target = ROOT / "data" / name
    temporary, old = (target.with_name(f".{name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except OSError as error:
        raise BadInput(f"{error.filename or target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class Once:
    """keep(digest): True the first time that an allowed digest comes. Its memory is about 100 bytes a document."""

    def __init__(self, allowed):
        self.allowed, self.seen = allowed, set()

    def __call__(self, digest):
        if digest in self.seen or not self.allowed(digest):
            return False
        self.seen.add(digest)
        return True


# ----------------------------------------------------------------------------------------------------------------------
# The three commands

def demo():
    """Writes data/demo/ with the committed tokenizer, in place of an older one. Returns its folder."""
    val, train = demo_documents()
    blob = DEMO_TOKENIZER.read_bytes()
    with new_folder("demo") as folder:
        (folder / "tokenizer.json").write_bytes(blob)
        shards = {split: Shards(folder, split, []) for split in ("val", "train")}
        keep = Once(lambda digest: True)
        docs_hash = write_val(folder, process(texts_source(val, "val")(), blob, "raw", 1), keep, shards["val"])
        for _, docs, _ in process(texts_source(train, "train")(), blob, "raw", 1):
            for where, digest, data, tokens in docs:
                if keep(digest):
                    shards["train"].add(where, len(data), tokens)
        shards["train"].flush()
        write_meta(folder, "demo", "raw", docs_hash.hexdigest(), shards)
    return ROOT / "data" / "demo"


def docs(args):
    """Writes data/<name>/ from the user's files: one pass to find what is good, one to train a tokenizer, one each for the two splits."""
    if not args.name or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name):
        raise BadInput("--name: give the dataset a name of letters, digits, _ . -")
    if (ROOT / "data" / args.name).exists():
        raise BadInput(f"--name={args.name}: data/{args.name} is there already; remove it or choose another name")
    if not args.paths:
        raise BadInput("docs: give files or folders")
    source, size = paths_source(args.paths)
    val_source, val_size = paths_source([args.val_path]) if args.val_path else (source, 0)
    blob = read_tokenizer(args)
    workers = 1 if size + val_size < 20_000_000 else args.workers   # a pool takes longer to start than small inputs to finish
    first, problems = {}, []

    def scan(source):
        """Good digests of a source -> set; problems, duplicates within it among them, go to the list."""
        good = set()
        for found, docs, n_bytes in process(source(), None, args.text_rule, workers):
            problems.extend(found)
            for where, digest, data, _ in docs:
                if digest in good:
                    problems.append((where, "duplicate"))
                good.add(digest)
            progress.add(n_bytes)
            if problems and args.on_bad == "refuse":
                raise BadInput("{}: {} (--on_bad=skip leaves such documents out)".format(*problems[0]))
        return good

    with Progress("reading", size + val_size, "bytes") as progress:
        every = scan(source)
        if args.val_path:
            val = scan(val_source)
            problems += [(args.val_path, "document is in the training files too; kept for validation only")] * len(every & val)
        else:
            n_val = max(1, min(1000, len(every) // 10)) if args.val_docs is None else args.val_docs
            val = set(heapq.nsmallest(n_val, every))
            if len(val) < n_val:
                raise BadInput(f"--val_docs={n_val}: only {len(every):,} good documents")
    train = every - val
    if not train or not val:
        raise BadInput(f"{', '.join(args.paths)}: {len(train)} training and {len(val)} validation documents; both must be at least 1")
    texts = lambda: (data.decode() for _, docs, _ in process(source(), None, args.text_rule, workers)   # noqa: E731
                     for _, digest, data, _ in docs if digest in train)
    blob = blob or train_tokenizer(texts, args.vocab_size, n_phrases(args), args.name)
    with new_folder(args.name) as folder, Progress("tokenizing", len(train), "documents") as progress:
        (folder / "tokenizer.json").write_bytes(blob)
        shards = {split: Shards(folder, split, []) for split in ("val", "train")}
        docs_hash = write_val(folder, process(val_source(), blob, args.text_rule, workers), Once(val.__contains__), shards["val"])
        keep = Once(train.__contains__)
        for _, docs, _ in process(source(), blob, args.text_rule, workers):
            for where, digest, data, tokens in docs:
                if keep(digest):
                    shards["train"].add(where, len(data), tokens)
                    progress.add()
        shards["train"].flush()
        if problems:
            (folder / "skipped.txt").write_text("".join(f"{where}: {what}\n" for where, what in problems), "utf-8")
        write_meta(folder, args.name, args.text_rule, docs_hash.hexdigest(), shards)
    if problems:
        counts = ", ".join(f"{count:,} {what}" for what, count in Counter(what for _, what in problems).most_common())
        print(f"skipped {len(problems):,}: {counts}; each is named in data/{args.name}/skipped.txt")


def download(folder):
    """Hub files -> folder/datasets/..., each checked against the hub's size and sha256 and the sidecar's docs_sha256.

    Returns path and sha256 of the documents. huggingface_hub resumes a file that a broken connection cut; a wrong hash is fetched again.
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise BadInput("fineweb needs another package: pip install huggingface_hub") from error
    endpoint = os.environ.get("HF_ENDPOINT")
    names = [f"datasets/{HUB_SIDECAR}", f"datasets/{HUB_DOCS}"]
    commit, paths = None, []
    for name in names:
        failure = None
        for attempt in range(HUB_TRIES):
            if attempt:
                print(f"{name}: {failure}; trying again", file=sys.stderr)
                time.sleep(HUB_WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                api = hub.HfApi(endpoint=endpoint)
                commit = commit or api.repo_info(HUB_REPO, repo_type="dataset").sha
                info = api.get_paths_info(HUB_REPO, [name], repo_type="dataset", revision=commit)
                if not info:
                    raise BadInput(f"{HUB_REPO}: the hub has no {name}")
                here, free = folder / name, shutil.disk_usage(folder).free
                if not (here.is_file() and here.stat().st_size == info[0].size):
                    if free < info[0].size:
                        raise BadInput(f"{folder}: {name} has {info[0].size:,} bytes, the disk has {free:,} left")
                    hub.hf_hub_download(HUB_REPO, name, repo_type="dataset", revision=commit, local_dir=folder, endpoint=endpoint)
                if here.stat().st_size != info[0].size:
                    failure = f"{here.stat().st_size:,} bytes, the hub says {info[0].size:,}"
                elif info[0].lfs and (sha := sha256_file(here, f"checking {here.name}")) != info[0].lfs.sha256:
                    failure = f"sha256 {sha[:16]}..., the hub says {info[0].lfs.sha256[:16]}..."
                else:
                    break
                here.unlink()
            except BadInput:
                raise
            except Exception as error:   # whatever the hub library and its HTTP library of this year raise
                failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            raise BadInput(f"{name}: {failure}, {HUB_TRIES} times; run the command again to continue")
        paths.append(here)
    try:
        wanted = json.loads(paths[0].read_bytes())["docs_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{paths[0]}: no docs_sha256 in it") from error
    sha = info[0].lfs.sha256 if info[0].lfs else sha256_file(paths[1])
    if sha != wanted:
        raise BadInput(f"{paths[1]}: sha256 {sha[:16]}..., but {HUB_SIDECAR} says {wanted[:16]}...")
    return paths[1], sha


def fineweb(args):
    """Writes data/fineweb/: validation is the first 50,000 documents as they are, training the documents after them.

    state.json remembers the finished shards and where in the documents each ended, so that a stopped run continues, and a finished
    one can be given more --train_tokens. Training documents equal to a validation document (by hash) are left out.
    """
    folder = ROOT / "data" / (args.name or "fineweb")
    folder.mkdir(parents=True, exist_ok=True)
    path, docs_sha = download(folder)
    tokenizer_path, state_path = folder / "tokenizer.json", folder / "state.json"

    def lines(start=0, n_docs=None):   # `where` is the byte at which the document's line ends
        with open(path, "rb") as file:
            file.seek(start)
            for number, line in enumerate(file):
                if number == n_docs:
                    return
                start += len(line)
                yield start, line, True

    def checked(results, label):
        for problems, docs, _ in results:
            if problems:
                raise BadInput(f"{path}: the {label} document before byte {problems[0][0]:,} is bad: {problems[0][1]}")
            yield problems, docs, _

    end_of_val = 0
    for end_of_val, _, _ in lines(0, FINEWEB_VAL_DOCS):
        pass
    blob = read_tokenizer(args) or (tokenizer_path.read_bytes() if tokenizer_path.exists() else None)
    if not blob:
        print(f"training a tokenizer of {args.vocab_size:,} on up to {SAMPLE_BYTES / 1e9:.1f} GB of training text")
        blob = train_tokenizer(lambda: (data.decode() for _, docs, _ in process(lines(end_of_val), None, args.text_rule, args.workers)
                                        for _, _, data, _ in docs), args.vocab_size, n_phrases(args), folder.name)
    settings = {"docs_sha256": docs_sha, "text_rule": args.text_rule, "tokenizer_sha256": Tokenizer(blob).sha256}
    state = json.loads(state_path.read_bytes()) if state_path.exists() else {"settings": settings, "val": [], "train": []}
    if state["settings"] != settings:
        raise BadInput(f"{folder}: was begun with another tokenizer, text rule or document list; remove it or give another --name")
    with atomic_write(tokenizer_path) as file:
        file.write(blob)

    def save():
        with atomic_write(state_path, "w") as file:
            json.dump(state, file)

    if "val_docs_sha256" not in state:
        state["val"] = []
        shards = Shards(folder, "val", state["val"])
        docs_hash = write_val(folder, checked(process(lines(0, FINEWEB_VAL_DOCS), blob, args.text_rule, args.workers), "validation"),
                              lambda digest: True, shards)
        if args.text_rule == "nmt_nfkc" and abs(docs_hash.bytes / FINEWEB_VAL_BYTES - 1) > 1e-4:
            raise BadInput(f"{path}: the first {docs_hash.docs:,} documents have {docs_hash.bytes:,} bytes after nmt_nfkc, the challenge's "
                           f"{FINEWEB_VAL_DOCS:,} have {FINEWEB_VAL_BYTES:,}: scores on them would not compare")
        state["val_docs_sha256"] = docs_hash.hexdigest()
        save()
    val_shards = Shards(folder, "val", state["val"])
    sizes = {"val_docs": val_shards.total("docs"), "val_bytes": val_shards.total("bytes"), "val_docs_sha256": state["val_docs_sha256"]}
    val_digests = {hashlib.sha256(text.encode()).digest()[:16] for text in read_val_docs(folder, sizes)}
    shards = Shards(folder, "train", state["train"], save)
    start = state["train"][-1]["end"] if state["train"] else end_of_val
    overlap = 0
    with Progress("tokenizing", int(args.train_tokens), "tokens") as progress:
        progress.add(shards.total("tokens"))
        for problems, docs, _ in process(lines(start), blob, args.text_rule, args.workers):
            for where, digest, data, tokens in docs:
                if digest in val_digests:
                    overlap += 1
                elif shards.total("tokens") < args.train_tokens:
                    shards.add(where, len(data), tokens)
                    progress.add(len(tokens))
            if shards.total("tokens") >= args.train_tokens:
                break
        shards.flush()
    write_meta(folder, folder.name, args.text_rule, state["val_docs_sha256"], {"val": val_shards, "train": shards})
    print(f"train and validation are disjoint by document hash; {overlap:,} training documents equal to a validation document were left out")


def read_tokenizer(args):
    if not args.tokenizer:
        return None
    try:
        blob = Path(args.tokenizer).read_bytes()
    except OSError as error:
        raise BadInput(f"--tokenizer={args.tokenizer}: {error.strerror}") from error
    Tokenizer(blob)
    return blob


def n_phrases(args):
    return args.vocab_size // 16 if args.phrases is None else args.phrases


def main():
    parser = Parser(prog="prepare.py", description=__doc__)
    parser.add_argument("command", choices=["demo", "docs", "fineweb"])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="docs: files or folders")
    parser.add_argument("--name", help="the dataset is written to data/NAME")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json; without it one is trained on the training documents")
    parser.add_argument("--vocab_size", type=int, default=8192, help="tokens of a trained tokenizer, the boundary token included")
    parser.add_argument("--phrases", type=int, help="how many of them are phrases (default: a 16th)")
    parser.add_argument("--val_docs", type=int, metavar="N", help="docs: validation documents, chosen by hash (default: a 10th, at most 1,000)")
    parser.add_argument("--val_path", metavar="PATH", help="docs: take the validation documents from here instead")
    parser.add_argument("--text_rule", choices=sorted(TEXT_RULES), help="(default: nmt_nfkc for fineweb, raw for docs)")
    parser.add_argument("--on_bad", choices=["skip", "refuse"], default="skip", help="docs: leave bad and duplicate documents out, or stop")
    parser.add_argument("--train_tokens", type=float, default=8e9, help="fineweb: how many training tokens to write")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    if args.workers < 1 or args.train_tokens < 1 or not 2 <= args.vocab_size <= 65535 or (args.phrases or 0) < 0:
        raise BadInput("--workers and --train_tokens must be at least 1, --phrases at least 0, --vocab_size between 2 and 65535")
    if args.val_docs is not None and (args.val_docs < 1 or args.val_path):
        raise BadInput("--val_docs must be at least 1, and excludes --val_path")
    if args.command != "docs" and (args.paths or args.val_docs or args.val_path):
        raise BadInput(f"{args.command}: PATH, --val_docs and --val_path are for docs")
    args.text_rule = args.text_rule or ("nmt_nfkc" if args.command == "fineweb" else "raw")
    {"demo": lambda args: demo(), "docs": docs, "fineweb": fineweb}[args.command](args)


if __name__ == "__main__":
    sys.exit(command(main))
