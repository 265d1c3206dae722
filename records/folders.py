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
from records.rules import SOURCE_NAME

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
    p.add_flags({name: (default, "see above") for name, default in flags.items()})
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
    """File -> the JSON object in it, a dict; {} where there is no file. Raises BadInput."""
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path}: not a JSON object")
    return found


def read_metrics(folder):
    """A run's metrics.jsonl -> its rows, dicts with a kind. Lines that a kill cut are left out."""
    rows = []
    path = Path(folder, "metrics.jsonl")
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            rows.append({"kind": "", **json.loads(line)})
        except (ValueError, TypeError, RecursionError):
            continue
    return rows


def read_run(folder):
    """A run folder -> its facts as far as they are there, and end: the reason why it ended, None of
    a run that was killed."""
    latest = {str(row["kind"]): row for row in read_metrics(folder)}
    start = part(latest, "start")
    score = read_json(Path(folder, "score.json"))
    return {**start, **part(latest, "summary"), "val_bpb": None, "val_loss": None, **score,
            "environment": start.get("environment"),   # where it was trained, not scored
            "seed": part(start, "config").get("seed"),
            "eval_seconds": part(score, "phases").get("to_score"),
            "end": part(latest, "end").get("reason")}


def check_facts(facts):
    """ValueError or another error of values for what is missing or cannot be."""
    for key, kind in FACTS.items():
        x = facts.get(key)
        if not isinstance(x, kind) or key in NUMBERS and not (is_number(x) and x > 0):
            raise ValueError(f"{key} is {x}")
    if not abs(facts["val_loss"] / facts["val_bpb"] / nats_per_bit(facts["dataset"]) - 1) <= 1e-5:
        raise ValueError("val_bpb is not val_loss by the dataset's tokens and bytes")


def summarise(seeds):
    """Facts of all seeds -> what submission.json says of them."""
    first = seeds[0]
    scores = [facts["val_bpb"] for facts in seeds]
    rows = {}
    for facts in seeds:
        rows[str(facts["seed"])] = {key: facts[key] for key in OF_A_SEED}
    return {**{key: first[key] for key in SHARED},
            "config": {k: v for k, v in first["config"].items() if k not in PER_RUN},
            "hardware": str(first["environment"].get("device")),
            "val_bpb": statistics.fmean(scores),
            "val_bpb_std": statistics.stdev(scores) if len(scores) > 1 else None,
            "bytes_total": max(facts["artifact_bytes"] for facts in seeds), "seed_results": rows}


def known_records():
    """{name: folder} of the records of this repository."""
    paths = sorted(ROOT.glob("records/track_*/*/submission.json"))
    return {path.parent.name: path.parent for path in paths}


def files_in(folder):
    """{name: bytes} of the sources in a folder."""
    paths = [*folder.glob("*.py"), *folder.glob("data/*.py")]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if SOURCE_NAME.fullmatch(name)}


def write_files(folder, files):
    """Writes {name: bytes} into a folder, which may not be there yet."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def find_entry(name):
    """A run or a record, by its folder or its name -> its folder. BadInput without one."""
    for folder in (Path(name), Path("runs", name), known_records().get(name, Path(name))):
        if (folder / "metrics.jsonl").is_file() or (folder / "submission.json").is_file():
            return folder.resolve()
    raise BadInput(f"{name}: no such run and no such record")


def read_entry(name):
    """A run or a record -> what is known of it, and its scores {seed: val_bpb}. BadInput without
    whole scores."""
    folder = find_entry(name)
    entry = read_json(folder / "submission.json")
    rows = part(entry, "seed_results")
    if not entry:
        entry = read_run(folder)
        rows = {str(entry["seed"]): entry}
    scores = {seed: part(rows, seed).get("val_bpb") for seed in rows}
    if not all(map(is_number, scores.values())):
        raise BadInput(f"{name}: no whole score; run: python pack.py {name} && python eval_bpb.py "
                       f"{name}/artifact.pyz")
    return {**entry, "scores": scores}


def git(*args):
    """What a git command prints, as bytes. BadInput with its words where it fails."""
    out = subprocess.run(["git", *args], cwd=ROOT, capture_output=True)
    if out.returncode:
        raise BadInput(f"git {args[0]}: {out.stderr.decode('utf-8', 'replace').strip()[:200]}")
    return out.stdout


def committed(commit, name):
    """The bytes of a file at a commit of this repository; b"" without such a commit or file."""
    try:
        known = re.fullmatch("[0-9a-f]{7,64}", str(commit))
        return git("show", f"{commit}:{name}") if known else b""
    except BadInput:
        return b""
