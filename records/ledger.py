"""Read run and record folders as data, and keep runs/ledger.tsv: one line for every run that was scored or stopped.

    from records.ledger import append
    append("runs/mine")        # once score.json or crash.json is written

People edit these files and crashes cut them, so each is read with a size limit and every number is checked.
A run that ended early left crash.json, {"reason": one line, "exit_code": int}. The status of a ledger line is "ok",
"nan" (exit code 3), "over-budget" (artifact over the cap), "unscored" or "crash" (the rest). Runs of one experiment
share sources and config but for the seed. `python records/turn.py` reads the lines back.
"""
import difflib
import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

from data.dataset import BadInput
from records.rules import TRACKS

ROOT = Path(__file__).resolve().parents[1]
CAP_BYTES = 16_000_000  # decimal; the whole artifact
COLUMNS = ("time", "run", "idea", "parent", "config_differences", "commit", "experiment", "dataset", "budget",
           "predictor", "seed", "val_bpb", "artifact_bytes", "train_seconds", "steps", "status")
PER_RUN = {"seed", "run", "parent", "idea"}  # in which two runs of one experiment may differ


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
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


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


def part(value, key):
    """The object under a key of a JSON object, {} where there is none."""
    return value[key] if isinstance(value.get(key), dict) else {}


def load_submission(folder):
    """A record folder's submission.json -> dict. BadInput where it is missing or damaged."""
    return read_json(Path(folder) / "submission.json", 1 << 20)


def seed_results(submission):
    """[(seed as text, {...})] of any shape in use: a dict by seed, a list of dicts, plain scores."""
    results = submission.get("seed_results") or {}
    if isinstance(results, list):
        results = {str(x.get("seed")): x for x in results if isinstance(x, dict)}
    pairs = results.items() if isinstance(results, dict) else ()
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
    parts = {k: part(start, k) for k in ("environment", "dataset", "source_sha256")}
    counts = {k: whole[k] for k in ("val_docs", "val_tokens", "val_bytes") if k in whole}
    parts["dataset"] |= part(whole, "dataset") | counts   # as scored
    return {"folder": folder, "name": folder.resolve().name, "config": start["config"], **parts,
            "seed": start["config"].get("seed"), "steps": last.get("steps", last.get("step")),
            "tokens": last.get("tokens"), "train_seconds": last.get("train_seconds"), "score": score, "crash": crash,
            "val_bpb": whole.get("val_bpb"), "val_loss": whole.get("val_loss"),
            "eval_seconds": part(whole, "phases").get("total"), "artifact_bytes": (score or {}).get("artifact_bytes")}


def digest(value):
    """sha256 (hex) of a JSON value, the same for equal dicts whatever their order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def config_differences(config, parent):
    """Two configs -> {key: (parent's value, this one's)}, without what two runs of one experiment may differ in."""
    keys = sorted({*config, *parent} - PER_RUN)
    return {k: (parent.get(k), config.get(k)) for k in keys if config.get(k) != parent.get(k)}


def find_baseline(name, runs="runs"):
    """What --parent names, a run or a record by its folder or its name -> its folder. BadInput where there is none."""
    for folder in (Path(name), Path(runs) / name, *(ROOT / "records" / track / name for track in TRACKS)):
        if name and ((folder / "metrics.jsonl").is_file() or (folder / "submission.json").is_file()):
            return folder
    raise BadInput(f"--parent={name}: no such run and no such record")


def read_entry(folder):
    """A run or a record -> dict: name, record (a bool), source (the folder of its sources), source_sha256, config,
    dataset, scores {seed: val_bpb}, and of a run predictor and steps."""
    folder = Path(folder)
    if (folder / "submission.json").is_file():
        s = load_submission(folder)
        parts = {k: part(s, k) for k in ("config", "dataset", "source_sha256")}
        return {"name": folder.resolve().name, "record": True, "source": folder, **parts, "predictor": None,
                "steps": None, "scores": {seed: row.get("val_bpb") for seed, row in seed_results(s)}}
    run = read_run(folder)
    return {k: run[k] for k in ("name", "config", "dataset", "source_sha256", "steps")} | {
        "record": False, "source": folder / "source", "predictor": (run["score"] or {}).get("predictor"),
        "scores": {str(run["seed"]): run["val_bpb"]}}


def read_sources(entry):
    """{name: bytes} of the sources that a run or a record lists, as far as they are there."""
    names = [n for n in entry["source_sha256"] if not Path(n).is_absolute() and ".." not in Path(n).parts]
    return {n: read_regular(entry["source"] / n, 2 << 20) for n in names if (entry["source"] / n).is_file()}


def source_diff(new, old):
    """Two {name: bytes} -> lines of the unified diff from old to new."""
    lines = []
    for name in sorted({*new, *old}):
        texts = [x.get(name, b"").decode("utf-8", "replace").splitlines() for x in (old, new)]
        lines += difflib.unified_diff(*texts, f"a/{name}", f"b/{name}", n=2, lineterm="")
    return lines


def commit_of(sources):
    """{name: bytes} -> the commit at HEAD, with "+" where these are not its sources; None without git."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True).stdout
    try:
        head = git("rev-parse", "--short=10", "HEAD").decode().strip()
        return head + "+" * any(git("show", f"HEAD:{n}") != b for n, b in sources.items()) if head else None
    except OSError:
        return None


def read_ledger(path):
    """runs/ledger.tsv -> list of dicts by column; a line with another number of columns is left out."""
    if not Path(path).is_file():
        return []
    rows = [line.split("\t") for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[1:]]
    return [dict(zip(COLUMNS, row)) for row in rows if len(row) == len(COLUMNS)]


def append(folder):
    """Add this run's line to ledger.tsv in the folder that holds it (runs/), and its difference from the parent to
    parent.diff in its own folder. Returns the line as a dict.

    The parent is what --parent names; nothing is guessed. One write in append mode, so that runs that
    end together do not mix their lines.
    """
    run, entry = read_run(folder), read_entry(folder)
    path, config, sources = run["folder"].resolve().parent / "ledger.tsv", run["config"], read_sources(entry)
    if run["crash"]:
        status = "nan" if run["crash"].get("exit_code") == 3 else "crash"
    else:
        over = is_number(run["artifact_bytes"]) and run["artifact_bytes"] > CAP_BYTES
        status = "over-budget" if over else "ok" if run["val_bpb"] is not None else "unscored"
    parent, changes = config.get("parent"), {}
    try:
        other = read_entry(find_baseline(parent or "", path.parent))
        parent, changes = other["name"], config_differences(config, other["config"])
        lines = [f"{k}: {old} -> {new}" for k, (old, new) in changes.items()]
        lines += source_diff(sources, read_sources(other))
        (run["folder"] / "parent.diff").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except BadInput:
        pass  # no parent, or one that is gone: its name alone is kept
    experiment = digest([run["source_sha256"], {k: v for k, v in config.items() if k not in PER_RUN}])
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "run": run["name"],
            "idea": config.get("idea") or None, "parent": parent or None,
            "config_differences": " ".join(f"{k}={new}" for k, (_, new) in changes.items()) or None,
            "commit": commit_of(sources), "experiment": experiment[:12],
            "dataset": f"{run['dataset'].get('name')}:{str(run['dataset'].get('val_docs_sha256'))[:8]}",
            "budget": f"{config['max_steps']} steps" if config.get("max_steps") else f"{config.get('max_seconds')} s",
            "predictor": entry["predictor"],
            **{k: run[k] for k in ("seed", "val_bpb", "artifact_bytes", "train_seconds", "steps")}, "status": status}
    rows = COLUMNS, ("-" if line[c] is None else " ".join(str(line[c]).split()) for c in COLUMNS)
    with open(path, "ab") as f:
        f.write("".join("\t".join(row) + "\n" for row in rows[f.tell() > 0:]).encode())
    return line
