"""One turn of the loop: is the edited code better than its parent? Both are trained, packed and
scored, seed by seed.

    python records/turn.py --idea="a wider gate"               the files as they are against HEAD
    python records/turn.py --idea="..." -- --matrix_lr=0.03    behind -- settings of the idea alone
    python records/turn.py --idea="..." --parent=NAME          against a run, a record or a commit
    python records/turn.py                                     every idea so far and its verdict

Settings before the -- go to both sides: --preset=proxy --data=NAME --max_steps=1000. Runs go side
by side, one thread each on a CPU. What is there is not run again: a turn that was stopped goes on
where it stood. runs/turns/<side>/ keeps a side's sources, what its commands printed, turn.json and
the curves; its runs are runs/<side>_s<seed>/.
"""
import hashlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)   # not records/: nothing here may shadow a package
from data.dataset import BadInput, Parser, command, find_dataset
from records import plot
from records.folders import (PER_RUN, find_entry, git, is_number, read_entry, read_json, read_run,
                             read_turn)
from records.rules import SOURCE_NAME
from records.stats import compare, comparison, smallest_gain

TURNS = Path("runs/turns")
AXES = {"model": "model", "kernels": "model", "batch": "data", "data": "data",
        "optimizer": "optimizer", "schedules": "optimizer", "training": "optimizer",
        "calibration": "packer", "pack.py": "packer", "eval_bpb.py": "predictor"}
ON_GPU = shutil.which("nvidia-smi")
CHILDREN = []   # processes; a turn that is stopped takes along those that run


def files_in(folder):
    """{name: bytes} of the sources in a folder."""
    paths = [*folder.glob("*.py"), *folder.glob("data/*.py")]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in files.items() if SOURCE_NAME.fullmatch(name)}


def files_at(commit):
    """{name: bytes} of the sources at a commit."""
    archive = tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit)))
    members = [m for m in archive if SOURCE_NAME.fullmatch(m.name)]
    return {m.name: archive.extractfile(m).read() for m in members}


def parent_of(name):
    """A run, a record or a commit -> (its name, {file: bytes} of its sources, its settings, the
    record that it is or builds on)."""
    try:
        folder = find_entry(name)
    except BadInput:
        return git("rev-parse", "--short", name).decode().strip(), files_at(name), {}, None
    turn = read_turn(folder)
    if turn:
        side = folder.name.rpartition("_s")[0]
        return side, files_in(TURNS / side), turn["settings"], turn.get("record")
    entry = read_entry(folder)
    files = files_at(entry.get("commit", "HEAD")) | files_in(folder) | files_in(folder / "source")
    settings = {k: v for k, v in entry["config"].items() if k not in PER_RUN}
    return folder.name, files, settings, folder.name if "commit" in entry else None


def axes(files):
    """{name: bytes} of sources -> {axis: text}, by file and by the words that head a part."""
    found = {}
    for name in sorted(files):
        axis = AXES.get(name, "data" if "/" in name else "model")
        for line in files[name].decode().splitlines():
            if heading := re.match(r"(?:    )?# (\w+)", line):
                axis = AXES.get(heading[1].lower(), axis)
            found[axis] = found.get(axis, "") + f"\n{line}"
    return found


def make_side(name, files, settings, **about):
    """Writes runs/turns/<side>/ of these sources and settings, or finds it -> the folder."""
    content = repr((sorted(files.items()), sorted(settings.items())))
    key = hashlib.sha256(content.encode()).hexdigest()[:8]
    slug = re.sub(r"\W+", "-", name.lower())[:30].strip("-")
    home = next(TURNS.glob(f"*_{key}"), TURNS / f"{slug}_{key}")
    for file, data in files.items():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(data)
    path = home / "turn.json"
    if about or not path.exists():
        path.write_text(json.dumps({"settings": settings, **about}, indent=1))
    return home


def call(home, run, words):
    """Runs a side's command to its end -> the last that it printed, "" where it ended well."""
    path = home / f"{run.name}.out"
    with open(path, "ab") as out:
        # A session of its own: Ctrl-C is for the turn, a trainer would end early and save.
        child = subprocess.Popen([sys.executable, *words], stdout=out, stderr=out,
                                 start_new_session=True)
        CHILDREN.append(child)
        return path.read_text(errors="replace").strip()[-300:] if child.wait() else ""


def finish(home, seed, settings):
    """Trains, packs and scores one run, as far as that is still to be done; says how it went."""
    run = Path("runs", f"{home.name}_s{seed}")
    score = run / "score.json"
    why = "scored" if score.exists() else ""
    end = read_run(run)["end"] if (run / "metrics.jsonl").exists() else None
    commands = [[home / "pack.py", run],
                # The parent's code is not the root's, but ours: no proof, which takes minutes.
                [ROOT / "eval_bpb.py", run / "artifact.pyz", f"--data={settings['data']}",
                 f"--out={score}", "--trust"]]
    if (run / "state.pt").exists():
        commands.insert(0, [home / "train_gpt.py", f"--resume={run}"])
    elif end is None:
        shutil.rmtree(run, ignore_errors=True)   # killed before it had saved anything
        flags = {**settings, "seed": seed, "run": run.name}.items()
        commands.insert(0, [home / "train_gpt.py", *(f"--{k}={v}" for k, v in flags)])
    elif end != "finished":
        why = end
    for words in commands:
        why = why or call(home, run, words)
    print(f"{run}: {why or 'scored'}", file=sys.stderr, flush=True)


def scores_of(side):
    """{seed: val_bpb} of the runs of a side that have a whole score."""
    scores = {}
    for path in Path("runs").glob(f"{side}_s*/score.json"):
        scores[path.parent.name.rpartition("_s")[2]] = read_json(path).get("val_bpb")
    return {seed: bpb for seed, bpb in scores.items() if is_number(bpb)}


def list_ideas():
    for path in sorted(TURNS.glob("*/turn.json"), key=os.path.getmtime):
        turn = read_json(path)
        if "idea" not in turn:
            continue
        side = path.parent.name
        ours = scores_of(side)
        theirs = scores_of(turn["against"])
        if min(len(ours), len(theirs)) > 1:
            c = comparison(ours, theirs, 1.0)
            words = f"{c['verdict']}: {c['gain_bpb']:+.5f} bits per byte, p {c['p']:.2g}"
        else:
            ends = {read_run(run.parent)["end"] for run in Path("runs").glob(f"{side}_s*/metrics.jsonl")}
            words = f"{'undecided' if ends <= {None, 'finished'} else 'drop'}: {ends}"
        print(f"{words}; n {len(ours)}\n  {turn['idea']}\n  moved {', '.join(turn['moved'])}; {side} "
              f"against {turn['against']}, {turn['settings']}")


def run_all(home, parent, seeds, jobs):
    """Both sides' runs, the parent's first and then its noise."""
    sides = {side: read_json(side / "turn.json")["settings"] for side in (parent, home)}
    pool = ThreadPoolExecutor(jobs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # through the finally below
    try:
        waiting = {}
        for side, settings in sides.items():
            waiting[side] = [pool.submit(finish, side, seed, settings) for seed in seeds]
        for side, runs in waiting.items():
            for future in runs:
                future.result()
            scores = [*scores_of(side.name).values()]
            if side == parent and len(scores) > 1:
                print(f"noise      {side.name}: std {statistics.stdev(scores):.5f}, n {len(scores)}; "
                      f"unpaired, a gain under {smallest_gain(scores):.5f} bits per byte does not "
                      "show", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in CHILDREN:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def main():
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    p = Parser(description=__doc__)
    p.add_argument("--idea", help="what differs from the parent; empty: list the ideas so far")
    p.add_argument("--parent", default="HEAD", help="a run, a record or a commit")
    p.add_argument("--seeds", type=int, default=3, help="seeds 1 to this on both sides")
    p.add_argument("--jobs", type=int, default=1 if ON_GPU else os.cpu_count(), help="runs at once")
    args, both = p.parse_known_args(argv[:cut])
    if not args.idea:
        return list_ideas()
    for word in (*both, *argv[cut + 1:]):
        if not re.match(r"--\w+=", word):
            raise BadInput(f"{word}: settings of train_gpt.py are written --name=value")
    both, own = (dict(word[2:].split("=", 1) for word in words) for words in (both, argv[cut + 1:]))
    if args.seeds < 2 or args.jobs < 1:
        raise BadInput("--seeds=2 at least: one run says nothing about noise; --jobs=1 at least")
    if not ON_GPU:
        os.environ["OMP_NUM_THREADS"] = "1"
    name, old, settings, record = parent_of(args.parent)
    # Steps, for what a busy machine does in so many seconds is a lottery.
    settings = {"preset": "proxy" if Path("data/proxy").is_dir() else "demo", "max_seconds": 0,
                "max_steps": 300, **settings, **both}
    data = settings.get("data", settings["preset"])
    if data == "demo" and not (ROOT / "data/demo/meta.json").exists():
        subprocess.run([sys.executable, ROOT / "data/prepare.py", "demo"], check=True)
    settings["data"] = os.path.relpath(find_dataset(data))
    new = files_in(ROOT)
    if new == old and own.items() <= settings.items():
        raise BadInput(f"nothing differs from {args.parent}: edit, or give settings behind --")
    before = axes(old)
    moved = [axis for axis, text in axes(new).items() if text != before.get(axis)
             or any(f"\n    {key}:" in text for key in own)]
    parent = make_side(name, old, settings)
    home = make_side(args.idea, new, {**settings, **own}, idea=args.idea, against=parent.name,
                     moved=moved, record=record)
    seeds = range(1, args.seeds + 1)
    run_all(home, parent, seeds, args.jobs)
    ours, theirs = ([f"runs/{side.name}_s{n}" for n in seeds] for side in (home, parent))
    plot.write(home / "curves.svg", ours + theirs)
    return compare([*ours, "--", *theirs])


if __name__ == "__main__":
    sys.exit(command(main))
