"""The challenge's documents on the Hugging Face hub, read by ranges of bytes. Needs the
`huggingface_hub` package, which takes another server of the hub's kind from HF_ENDPOINT.

Their file has some 48 GB, and only what is asked for is fetched. Its sha256 is the hub's (its
etag), compared with the sidecar's; what was read is checked by its length, and by the bytes and the
sha256 of the validation documents.
"""
import json
import sys
import time

from data.dataset import BadInput, atomic_write, package, printable

REPO = "willdepueoai/parameter-golf"
DOCS = "datasets/docs_selected.jsonl"
SIDECAR = "datasets/docs_selected.source_manifest.json"
TRIES = 5
WAIT_SECONDS = 2.0           # before the second try, then twice as long each time
BLOCK_BYTES = 16_000_000     # in one request: a broken connection loses no more
TAIL_BYTES = 16_000          # in one request, to complete the last document of a range


def hub():
    with package("fineweb"):
        import huggingface_hub
    return huggingface_hub


def insist(ask, name):
    """ask() -> its answer; asked again when it fails, TRIES times in all."""
    for attempt in range(TRIES):
        try:
            return ask()
        except Exception as error:   # whatever huggingface_hub and the HTTP library below it raise in this version
            failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(printable(f"{name}: {failure}", sys.stderr.encoding), file=sys.stderr)
        time.sleep(WAIT_SECONDS * 2 ** attempt)
    raise BadInput(f"{name}: {failure} ({TRIES} times); run the command again to continue")


def find_documents():
    """-> {"commit", "file", "bytes", "etag"} of the documents, once the hub and the sidecar agree
    on them."""
    api = hub().HfApi()
    files = hub().HfFileSystem()

    def ask():
        commit = api.repo_info(REPO, repo_type="dataset").sha   # all that follows is of this commit
        folder = f"datasets/{REPO}@{commit}"
        found = files.info(f"{folder}/{DOCS}")
        with files.open(f"{folder}/{SIDECAR}", "rb") as file:
            wanted = json.load(file).get("docs_sha256")
        source = {"commit": commit, "file": f"{folder}/{DOCS}", "bytes": found["size"], "etag": found["lfs"]["sha256"]}
        return source, wanted

    source, wanted = insist(ask, DOCS)
    if source["etag"] != wanted:
        raise BadInput(f"{DOCS}: its sha256 is {source['etag']}, but the sidecar's docs_sha256 is {wanted}")
    return source


def read_blocks(source, start, end):
    """Yields the bytes of the documents from start to end, then, in small blocks, to the end of the
    file."""
    files = hub().HfFileSystem()
    at = start

    def read():
        with files.open(source["file"], "rb", block_size=BLOCK_BYTES, cache_type="none") as file:   # a read, a request
            file.seek(at)
            block = file.read(size)
        if len(block) != size:
            raise EOFError(f"{len(block):,} bytes at {at:,}, not {size:,}")
        return block

    while at < source["bytes"]:
        size = min(BLOCK_BYTES, end - at) if at < end else TAIL_BYTES
        size = min(size, source["bytes"] - at)
        yield insist(read, source["file"])
        at += size


def split_lines(blocks):
    """Blocks of bytes, large ones -> the lines in them, without their b"\\n"."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def fetch(path, source, start, end, limit=sys.maxsize):
    """The documents that begin in bytes [start, end), `limit` of them at most -> a file of theirs
    alone, unless it is there."""
    if path.exists():
        return
    at = max(start - 1, 0)   # a line begins at start if the byte before is the end of one
    with atomic_write(path) as file:
        for line in split_lines(read_blocks(source, at, end)):
            if at >= start:
                file.write(line + b"\n")
                limit -= 1
            at += len(line) + 1
            if at >= end or not limit:
                break
