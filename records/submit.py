"""Make a record folder from runs, and the leaderboard from the record folders.

    python records/submit.py RUN RUN RUN --name=slug    writes records/<track>/YYYY-MM-DD_slug/
    python records/submit.py --leaderboard              writes records/README.md

Each run is trained, packed and scored, with a seed of its own. The folder gets train_gpt.py and
what else of the artifact's sources differs from a commit, one log a seed, submission.json and a
README with a place for the author's words. What check.py would FAIL is refused; nothing is
overwritten.

--name=SLUG           short name of the record: letters, digits, ._-
--author=NAME         yours; git's user.name where it is not given
--track=TRACK         track_10min_16mb or track_non_record_16mb; empty: the first for runs on H100
--parent=RECORD       that it builds on, if any
--commit=REF          whose sources are left out
--date=YYYY-MM-DD     of the record
"""
import json
import re
import sys
import tempfile
import time
import zipfile
from hashlib import sha256
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not records/: nothing may shadow a package
from data.dataset import ROOT, BadInput, atomic_write, command
from records.check import review
from records.folders import (FACTS, NUMBERS, check_facts, committed, find_entry, flags_of, git,
                             is_number, part, read_json, read_run, summarise, write_files)
from records.rules import RULES, SOURCE_NAME, TRACKS

HEAD = """# Records

Made by `python records/submit.py --leaderboard` from the folders below, not edited by hand. Scores
are bits per byte: lower is better, and only scores on one dataset compare. For scale: on fineweb the
public challenge began at 1.2244 and ended at 1.05651. [LOOP.md](LOOP.md) says how to make a record,
[rules.py](rules.py) what is checked; [dead_ends.md](dead_ends.md), [measured.md](measured.md).

For organisers. `python records/check.py FOLDER...` reviews any number of folders and executes
nothing in them. The artifacts come from the authors, for no record holds one: `python eval_bpb.py
ARTIFACT --data=fineweb --out=FILE` has the root's judge score one again. Its sha256 must stand in
one of the record's logs, and its val_bpb agree within 0.0005, for another machine's kernels round
differently. Code that is not the root's is judged as root, for the audit empties the kernel's
caches. Three ways for an artifact's processes to tell each other something are not closed by the
judge's sandbox: how long they take, what the kernel counts, some hundred bits and some ten a core,
and what they leave in the memory of a GPU: judge on megabytes of text. What was memorised no judge
of public documents can see: score the artifact on documents of your own, `python eval_bpb.py
ARTIFACT --data=mine`, next to a record that is known to be honest.
"""
COLUMNS = "val_bpb val_bpb_std seeds name author date bytes_total data hardware parent".split()


def table(columns):
    """The head of a table in Markdown."""
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"


def load_run(name):
    """A run -> (its facts, its log, {name: bytes} of its sources). BadInput where it is not
    trained, packed and scored."""
    folder = find_entry(name)
    run = read_run(folder)
    try:
        if run["end"] != "finished":
            raise ValueError(f"trained until: {run['end'] or 'killed'}")
        log, packed, artifact = [(folder / name).read_bytes()
                                 for name in ("log.txt", "pack.txt", "artifact.pyz")]
        archive = zipfile.ZipFile(folder / "artifact.pyz")
        sources = {name: archive.read(name) for name in archive.namelist()
                   if SOURCE_NAME.fullmatch(name)}
        run["source_sha256"] = {name: sha256(data).hexdigest() for name, data in sources.items()}
        check_facts(run)
        if sha256(artifact).hexdigest() != run["artifact_sha256"]:
            raise ValueError("artifact.pyz is not what was scored")
    except Exception as e:   # of whatever is not there, or cut
        raise BadInput(f"{folder}: no whole score ({e}); run: python pack.py {folder} && python "
                       f"eval_bpb.py {folder}/artifact.pyz") from None
    facts = "".join(f"{key}: {json.dumps(run[key])}\n" for key in FACTS)
    return run, log + b"\n\n" + packed + f"\n---\n{facts}".encode(), sources


def readme(record):
    """The record's README: generated numbers and the place for the author's words."""
    seeds = record["seed_results"]
    spread = f"std {record['val_bpb_std']:.6f}, n {len(seeds)}" if len(seeds) > 1 else "one seed"
    rows = table(["seed", *NUMBERS])
    for seed, row in seeds.items():
        rows += f"| {seed} | {' | '.join(f'{row[key]:.10g}' for key in NUMBERS)} |\n"
    return f"""# {record['name']}

**val_bpb {record['val_bpb']:.6f}** ({spread}) on {record['dataset']['name']}, at most \
{record['bytes_total']:,} bytes, {record['hardware']}.

{rows}
## What changed, and why it works

(write this)

## Run it

Settings stand under `config` in submission.json; sources that are not here are the repository's at
commit {record['commit'][:12]}. What differs from the parent ({record['parent'] or 'there is none'}),
and how it compares: `git diff --no-index PARENT .`, `python records/check.py compare . -- PARENT`.
"""


def build(args, records=ROOT / "records"):
    """Writes the record folder, complete or not at all. Returns its path."""
    runs, logs, sources = zip(*map(load_run, args.runs))
    record = {"author": args.author, "name": args.name, "date": args.date,
              "commit": git("rev-parse", "--verify", args.commit).decode().strip(),
              "parent": args.parent or None, **summarise(runs)}
    record["track"] = args.track or TRACKS["H100" not in record["hardware"]]
    files = {f"train_seed{run['seed']}.log": log for run, log in zip(runs, logs)}
    if len(files) < len(runs):
        raise BadInput("each run needs a seed of its own")
    files["README.md"] = readme(record).encode()
    files["submission.json"] = json.dumps(record, indent=1).encode()
    for name, data in sources[0].items():
        if name == "train_gpt.py" or data != committed(record["commit"], name):
            files[name] = data
    folder = records / record["track"] / Path(f"{args.date}_{args.name}").name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=records) as work:
        new = Path(work, record["track"], folder.name)
        write_files(new, files)
        *findings, _ = review(new)
        for rule, message, file in findings:
            if RULES[rule] == "FAIL":
                raise BadInput(f"{rule} {file}: {message}")
        return new.rename(folder)


def leaderboard(records=ROOT / "records"):
    """The record folders -> the text of README.md. Depends on nothing but the folders."""
    text = HEAD
    for track in TRACKS:
        rows = []
        for path in records.glob(f"{track}/*/submission.json"):
            s = read_json(path)
            s["data"] = part(s, "dataset").get("name")
            s["seeds"] = len(part(s, "seed_results"))
            cells = [f"{s[key]:,.6g}" if is_number(s.get(key)) else s.get(key) for key in COLUMNS]
            # One line each, and no way out of its cell.
            cells = [re.sub(r"[^\w .,:;/()+-]", "?", str(cell or "-"))[:80] for cell in cells]
            cells[3] = f"[{cells[3]}]({track}/{path.parent.name}/README.md)"
            rows.append((str(s["data"]), f"| {' | '.join(cells)} |\n"))
        text += f"\n## {track}\n\n{table(COLUMNS)}"
        text += "".join(row for _, row in sorted(rows))
    return text


def main():
    author = git("config", "--get", "--default", "", "user.name").decode().strip()
    args = flags_of(__doc__, "runs", name="", author=author, track=("", *TRACKS), parent="",
                    commit="HEAD", date=time.strftime("%Y-%m-%d"), leaderboard=False).parse_args()
    if bool(args.runs and args.name) == args.leaderboard:
        raise BadInput("name the runs of one record and --name=SLUG, or --leaderboard")
    if args.runs:
        folder = build(args)
        print(f"{folder}\nnext: write its README's own part, then python records/check.py {folder}")
    with atomic_write(ROOT / "records/README.md", "w") as f:
        f.write(leaderboard())


if __name__ == "__main__":
    sys.exit(command(main))
