"""Files of the challenge from the Hugging Face hub, resumed and checked. Needs the `huggingface_hub` package."""
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from data.dataset import BadInput, Progress

REPO = "willdepueoai/parameter-golf"
DOCS, SIDECAR = "datasets/docs_selected.jsonl", "datasets/docs_selected.source_manifest.json"
TRIES, WAIT_SECONDS = 5, 2.0


def sha256_file(path, label=None):
    """Path -> hex sha256, with a progress line if it has a label."""
    sha = hashlib.sha256()
    with open(path, "rb") as file, Progress(label, Path(path).stat().st_size, "bytes") as progress:
        while chunk := file.read(1 << 22):
            sha.update(chunk)
            progress.add(len(chunk))
    return sha.hexdigest()


def download(folder):
    """Folder -> path of the challenge's documents in it, their sha256 (the hub's, and the sidecar's docs_sha256).

    A file that is there with the right size is only checked. One that a broken connection cut is resumed, by
    huggingface_hub; one with a wrong hash is fetched again. HF_ENDPOINT names another server of the hub's kind.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise BadInput("fineweb needs: pip install huggingface_hub") from error
    endpoint = os.environ.get("HF_ENDPOINT")
    api = huggingface_hub.HfApi(endpoint=endpoint)

    def fetch(name):
        """-> path, sha256; ValueError with what is wrong."""
        commit = api.repo_info(REPO, repo_type="dataset").sha   # both questions and the download speak of one commit
        info = api.get_paths_info(REPO, [name], repo_type="dataset", revision=commit)
        if not info:
            raise BadInput(f"{REPO}: the hub has no {name}")
        path, size, lfs = folder / name, info[0].size, info[0].lfs
        if not (path.is_file() and path.stat().st_size == size):
            if (free := shutil.disk_usage(folder).free) < size:
                raise BadInput(f"{folder}: {name} has {size:,} bytes, the disk has {free:,} left")
            huggingface_hub.hf_hub_download(REPO, name, repo_type="dataset", revision=commit, local_dir=folder,
                                            endpoint=endpoint)
        found, sha = path.stat().st_size, sha256_file(path, f"checking {path.name}")
        if found != size or lfs and lfs.sha256 != sha:
            path.unlink()
            raise ValueError(f"{found:,} bytes, sha256 {sha}; the hub says {size:,}, {lfs.sha256 if lfs else '-'}")
        return path, sha

    def insist(name):
        for attempt in range(TRIES):
            try:
                return fetch(name)
            except BadInput:
                raise
            except Exception as error:   # whatever huggingface_hub and the HTTP library below it raise in this version
                failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(f"{name}: {failure}", file=sys.stderr)
            time.sleep(WAIT_SECONDS * 2 ** attempt)
        raise BadInput(f"{name}: {failure} ({TRIES} times); run the command again to continue")

    sidecar, _ = insist(SIDECAR)
    try:
        wanted = json.loads(sidecar.read_bytes())["docs_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{sidecar}: no docs_sha256 in it") from error
    path, sha = insist(DOCS)
    if sha != wanted:
        raise BadInput(f"{path}: sha256 {sha}, but the sidecar's docs_sha256 is {wanted}")
    return path, sha
