"""Read run and record folders as data, and keep runs/ledger.tsv: one line for every run that was scored or stopped.

    from records.ledger import append
    append("runs/mine")        # once score.json or crash.json is written

People edit these files and crashes cut them, so each is read with a size limit and every number is checked.
A run that ended early left crash.json, {"reason": one line, "type": exception, "exit_code": int}. The status of a
ledger line is "ok", "nan" (exit code 3), "behind" (ended by --compare_to), "over-budget" (artifact over the cap) or
"crash" (the rest).
"""
import hashlib
import itertools
import json
import math
import os
import stat
import time
from pathlib import Path

from data.dataset import BadInput

CAP_BYTES = 16_000_000  # decimal; the whole artifact
COLUMNS = ("time", "run", "source", "parent", "config_differences", "seed", "val_bpb", "artifact_bytes",
           "train_seconds", "steps", "status")
PER_RUN = {"seed", "run", "compare_to"}  # config keys in which two runs of one experiment may differ


def parse_json(data):
    """JSON bytes or text -> value. Duplicate keys, NaN, Infinity and runaway nesting are ValueError too."""
    def pairs(items):
        out = dict(items)
        if len(out) != len(items):
            raise ValueError("a duplicate key")
        return out

    def constant(name):
        raise ValueError(f"{name} is not a number in JSON")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_number(x):
    """A finite int or float; bool is neither."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and -1e300 < x < 1e300


def read_regular(path, limit):
    """The bytes of a regular file of at most `limit` bytes, through no link, never waiting on a pipe; else OSError."""
    fd = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")))
    with open(fd, "rb") as f:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise OSError(0, f"not a regular file of at most {limit:,} bytes", str(path))
        return f.read(limit)


def read_json(path, limit=64 << 20):
    """A JSON object in a file -> dict. BadInput names the file."""
    try:
        value = parse_json(read_regular(path, limit))
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise BadInput(f"{path}: {e}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: a JSON object is expected")
    return value


def load_submission(folder):
    """A record folder's submission.json -> dict. BadInput where it is missing or damaged."""
    return read_json(Path(folder) / "submission.json", 1 << 20)


def seed_results(submission):
    """[(seed as text, {...})] of any shape in use: a dict by seed, a list of dicts, plain scores. At most 100."""
    results = submission.get("seed_results") or {}
    if isinstance(results, list):
        results = {str(x.get("seed")): x for x in results if isinstance(x, dict)}
    pairs = itertools.islice(results.items() if isinstance(results, dict) else (), 100)
    return [(k.removeprefix("seed").strip("_ "), v if isinstance(v, dict) else {"val_bpb": v}) for k, v in pairs]


def read_run(folder):
    """A run folder -> dict: folder, name, config, environment, dataset, source_sha256, seed, steps, tokens,
    train_seconds, artifact_bytes, score and crash (the dicts of score.json and crash.json, or None), val_bpb, val_loss,
    eval_seconds.

    Numbers are what the run's own files say, None where a file is not there yet; val_bpb and val_loss are None unless
    the score is whole. BadInput where a file is damaged; a last line of metrics.jsonl that a kill cut is left out.
    """
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise BadInput(f"{folder}: not a run folder (no metrics.jsonl)")
    start, last = {}, {}
    with open(folder / "metrics.jsonl", "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                row = parse_json(line)
                kind = row["kind"]
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n"):
                    raise BadInput(f"{folder}/metrics.jsonl:{n}: not a JSON object with a kind") from None
                break
            if kind == "start":
                start = row
            last |= row if kind in ("step", "summary") else {}
    if not isinstance(start.get("config"), dict):
        raise BadInput(f"{folder}/metrics.jsonl: no start line with a config")
    score, crash = (read_json(folder / n) if (folder / n).is_file() else None for n in ("score.json", "crash.json"))
    whole = score if score and is_number(score.get("val_bpb")) and not score.get("limit_docs") else {}
    phases, judged = (x if isinstance(x, dict) else {} for x in (whole.get("phases"), whole.get("dataset")))
    parts = {k: start[k] if isinstance(start.get(k), dict) else {} for k in ("environment", "dataset", "source_sha256")}
    counts = {k: whole[k] for k in ("val_docs", "val_tokens", "val_bytes") if k in whole}
    parts["dataset"] |= judged | counts   # as scored
    return {"folder": folder, "name": folder.resolve().name, "config": start["config"], **parts,
            "seed": start["config"].get("seed"), "steps": last.get("steps", last.get("step")),
            "tokens": last.get("tokens"), "train_seconds": last.get("train_seconds"), "score": score, "crash": crash,
            "val_bpb": whole.get("val_bpb"), "val_loss": whole.get("val_loss"), "eval_seconds": phases.get("total"),
            "artifact_bytes": (score or {}).get("artifact_bytes")}


def digest(value):
    """sha256 (hex) of a JSON value, the same for equal dicts whatever their order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def config_differences(config, parent):
    """Two configs -> {key: (parent's value, this one's)}, without what two runs of one experiment may differ in."""
    keys = sorted({*config, *parent} - PER_RUN)
    return {k: (parent.get(k), config.get(k)) for k in keys if config.get(k) != parent.get(k)}


def read_ledger(path):
    """runs/ledger.tsv -> list of dicts by column; a line with another number of columns is left out."""
    if not Path(path).is_file():
        return []
    rows = [line.split("\t") for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[1:]]
    return [dict(zip(COLUMNS, row)) for row in rows if len(row) == len(COLUMNS)]


def append(folder):
    """Add this run's line to ledger.tsv in the folder that holds it (runs/). Returns the line as a dict.

    The parent is the run that `--compare_to` names, else the best scored run so far on the same documents: what the
    next idea has to beat. One write in append mode, so that runs that end together do not mix their lines.
    """
    run = read_run(folder)
    path = run["folder"].resolve().parent / "ledger.tsv"
    if run["crash"]:
        reason = str(run["crash"].get("reason"))
        status = "nan" if run["crash"].get("exit_code") == 3 else "behind" if reason.startswith("behind") else "crash"
    else:
        status = "over-budget" if is_number(run["artifact_bytes"]) and run["artifact_bytes"] > CAP_BYTES else "ok"

    def score(row):
        try:
            return float(row["val_bpb"])
        except ValueError:
            return math.inf
    ok = sorted((row for row in read_ledger(path) if row["status"] == "ok" and row["run"] != run["name"]), key=score)
    parent = None
    for candidate in [run["config"].get("compare_to") or "", *(path.parent / row["run"] for row in ok)]:
        if candidate and (Path(candidate) / "metrics.jsonl").is_file():
            other = read_run(candidate)
            if other["dataset"].get("val_docs_sha256") == run["dataset"].get("val_docs_sha256"):
                parent = other
                break
    changes = config_differences(run["config"], parent["config"]) if parent else {}
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "run": run["name"],
            "source": digest(run["source_sha256"])[:12], "parent": parent["name"] if parent else None,
            "config_differences": " ".join(f"{k}={new}" for k, (_, new) in changes.items()) or None,
            **{k: run[k] for k in ("seed", "val_bpb", "artifact_bytes", "train_seconds", "steps")}, "status": status}
    text = "\t".join("-" if line[c] is None else " ".join(str(line[c]).split()) for c in COLUMNS) + "\n"
    with open(path, "ab") as f:
        f.write((("\t".join(COLUMNS) + "\n" if f.tell() == 0 else "") + text).encode())
    return line
