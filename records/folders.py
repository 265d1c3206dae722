"""Read run and record folders as data. Crashes cut these files, people edit them and strangers
write them, so every number is checked before use.

What is known of one seed is called its facts: FACTS. submit.py writes them under the last `---` of
the seed's log, one `key: JSON` a line; submission.json holds what summarise() makes of them, so
that check.py can make it again.
"""
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

from data.dataset import ROOT, BadInput, Parser

PER_RUN = {"seed", "run"}   # in which two runs of one experiment may differ
NUMBERS = ("val_bpb", "val_loss", "artifact_bytes", "train_seconds", "eval_seconds", "steps",
           "tokens")
SHARED = ("dataset", "config", "source_sha256", "environment")
OF_A_SEED = {**dict.fromkeys(NUMBERS, (int, float)), "artifact_sha256": str, "mode": str,
             "audit": dict}
FACTS = {"seed": int, **OF_A_SEED, **dict.fromkeys(SHARED, dict)}


def flags_of(doc, many, **flags):
    """A command's docstring, which describes its flags, what may be named many times, {flag:
    default} -> its Parser."""
    p = Parser(description=doc)
    p.add_argument(many, nargs="*", help="see above")
    for name, default in flags.items():
        p.add_argument(f"--{name}", default=default, type=type(default), help="see above")
    return p


def is_number(x):
    """A finite int or float; bool is neither."""
    return type(x) in (int, float) and abs(x) <= sys.float_info.max


def part(value, key):
    """The object under a key of a JSON object, {} where there is none."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def nats_per_bit(dataset):
    """Nats per token in one bit per byte."""
    return math.log(2) * dataset["val_bytes"] / dataset["val_tokens"]


def read_json(path):
    """File -> the JSON object in it, a dict. Raises BadInput."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path}: not a JSON object")
    return found


def read_if_there(path):
    """A JSON object in a file, {} where there is no file."""
    return read_json(path) if path.exists() else {}


def read_turn(run):
    """The turn.json of the turn that started a run, {} of a run by hand."""
    side = Path(run).resolve().name.rpartition("_s")[0]
    return read_if_there(Path("runs/turns", side, "turn.json"))


def read_metrics(folder):
    """A run's metrics.jsonl -> its rows, dicts with a kind. Lines that a kill cut are left out."""
    rows = []
    path = Path(folder, "metrics.jsonl")
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            rows.append({"kind": "", **json.loads(line)})
        except (ValueError, TypeError):
            continue
    return rows


def read_run(folder):
    """A run folder -> its facts as far as they are there, and end: the reason why it ended, None of
    a run that was killed."""
    latest = {row["kind"]: row for row in read_metrics(folder)}
    start = part(latest, "start")
    score = read_if_there(Path(folder, "score.json"))
    run = {**start, **part(latest, "summary"), "val_bpb": None, "val_loss": None, **score}
    run["environment"] = start.get("environment")   # where it was trained, not where it was scored
    run["seed"] = part(run, "config").get("seed")
    run["eval_seconds"] = part(run, "phases").get("total")
    run["end"] = part(latest, "end").get("reason")
    return run


def check_facts(facts):
    """ValueError or another error of values for what is missing or cannot be."""
    for key, kind in FACTS.items():
        x = facts.get(key)
        if not isinstance(x, kind) or key in NUMBERS and not (is_number(x) and x > 0):
            raise ValueError(f"{key} is {x}")
    if abs(facts["val_loss"] / facts["val_bpb"] / nats_per_bit(facts["dataset"]) - 1) > 1e-5:
        raise ValueError("val_bpb is not val_loss by the dataset's tokens and bytes")


def summarise(seeds):
    """Facts of all seeds -> what submission.json says of them."""
    out = {key: seeds[0][key] for key in SHARED}
    out["config"] = {k: v for k, v in out["config"].items() if k not in PER_RUN}
    scores = [facts["val_bpb"] for facts in seeds]
    out["hardware"] = str(out["environment"].get("device"))
    out["val_bpb"] = statistics.fmean(scores)
    out["val_bpb_std"] = statistics.stdev(scores) if len(scores) > 1 else None
    out["bytes_total"] = max(facts["artifact_bytes"] for facts in seeds)
    out["seed_results"] = rows = {}
    for facts in seeds:
        rows[str(facts["seed"])] = {key: facts[key] for key in OF_A_SEED}
    return out


def known_records(records=ROOT / "records"):
    """{name: folder} of the records of this repository."""
    paths = [*records.glob("track_*/*/submission.json")]
    return {path.parent.name: path.parent for path in sorted(paths)}


def find_entry(name):
    """A run or a record, by its folder or its name -> its folder. BadInput without one."""
    for folder in (Path(name), Path("runs", name), known_records().get(name, Path(name))):
        if (folder / "metrics.jsonl").is_file() or (folder / "submission.json").is_file():
            return folder.resolve()
    raise BadInput(f"{name}: no such run and no such record")


def read_entry(name):
    """A run or a record -> what is known of it, and its scores {seed: val_bpb}."""
    folder = find_entry(name)
    entry = read_if_there(folder / "submission.json")
    if not entry:
        entry = read_run(folder)
        return {**entry, "scores": {str(entry["seed"]): entry["val_bpb"]}}
    rows = part(entry, "seed_results")
    return {**entry, "scores": {seed: part(rows, seed).get("val_bpb") for seed in rows}}


def git(*args):
    """What a git command prints, as bytes. BadInput with its words where it fails."""
    out = subprocess.run(["git", *args], cwd=ROOT, capture_output=True)
    if out.returncode:
        raise BadInput(f"git {args[0]}: {out.stderr.decode('utf-8', 'replace').strip()[:200]}")
    return out.stdout


def committed(commit, name):
    """The bytes of a file at a commit of this repository; b"" without such a commit or file."""
    try:
        return git("show", f"{commit}:{name}") if re.fullmatch("[0-9a-f]{7,64}", str(commit)) else b""
    except BadInput:
        return b""
