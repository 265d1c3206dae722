"""One turn of the loop: is the edited code better than its parent? Both are trained, packed and
scored, seed by seed.

    python records/turn.py --idea="a wider gate"               the files as they are against HEAD
    python records/turn.py --idea="..." -- --matrix_lr=0.03    behind -- settings of the idea alone
    python records/turn.py --idea="..." --parent=NAME          against a run, a record or a commit
    python records/turn.py                                     every idea so far and its verdict

--seeds=N: seeds 1 to N on both sides; --jobs=N: runs at once, on a CPU one thread each. Settings
before the -- go to both sides: --preset=proxy --data=NAME --max_steps=1000. What is there is not run again: a turn that was stopped goes on
where it stood. runs/turns/<side>/ keeps a side's sources, what its commands printed, turn.json and
the curves; its runs are runs/<side>_s<seed>/.
"""
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])   # not records/: nothing may shadow a package
from data.dataset import ROOT, BadInput, command, find_dataset
from records import plot
from records.folders import (find_entry, flags_of, git, is_number, read_if_there, read_run,
                             read_json, read_turn)
from records.rules import SOURCE_NAME
from records.stats import compare, comparison, smallest_gain

TURNS = Path("runs/turns")
# Of the parts of train_gpt.py, and of its settings.
HEADING = re.compile(r"^(?:    )?# (model|kernels|batch|data|optimizer|schedules|calibration|training)\b",
                     re.M | re.I)
STOPPED = (None, "stopped early as asked")   # so ends a run that may go on
ON_GPU = shutil.which("nvidia-smi")
if not ON_GPU:
    os.environ["OMP_NUM_THREADS"] = "1"
CHILDREN = []   # processes; a turn that is stopped takes along those that run


def files_in(folder):
    """{name: bytes} of the sources in a folder."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    return {name: paths[name].read_bytes() for name in paths if SOURCE_NAME.fullmatch(name)}


def files_at(commit):
    """{name: bytes} of the sources at a commit."""
    names = git("ls-tree", "-r", "--name-only", commit).decode().split()
    return {name: git("show", f"{commit}:{name}") for name in names if SOURCE_NAME.fullmatch(name)}


def parent_of(name):
    """A turn's run, a record or a commit -> (its name, {file: bytes} of its sources, its settings,
    the record that it is or builds on)."""
    try:
        folder = find_entry(name)
    except BadInput:
        return git("rev-parse", "--short", name).decode().strip(), files_at(name), {}, None
    if turn := read_turn(folder):
        side = folder.name.rpartition("_s")[0]
        return side, files_in(TURNS / side), turn["settings"], turn.get("record")
    record = read_json(folder / "submission.json")
    files = files_at(record["commit"]) | files_in(folder)
    return folder.name, files, record["config"], folder.name


def parts_of(files):
    """{name: bytes} of sources -> {(part, text)}: train_gpt.py by its headings, the others whole."""
    parts = set()
    for name, data in files.items():
        text = data.decode()
        words = [name, *(HEADING.split(text) if name == "train_gpt.py" else [text])]
        parts |= {*zip(map(str.lower, words[0::2]), words[1::2])}
    return parts


def make_side(name, files, settings, **about):
    """Writes runs/turns/<side>/ of these sources and settings, or finds it -> the folder."""
    content = repr((sorted(files.items()), sorted(settings.items())))
    key = hashlib.sha256(content.encode()).hexdigest()[:8]
    slug = re.sub(r"\W+", "-", name.lower())[:30].strip("-")
    home = next(TURNS.glob(f"*_{key}"), TURNS / f"{slug}_{key}")
    for file, data in files.items():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(data)
    turn = home / "turn.json"
    turn.write_text(json.dumps({**read_if_there(turn), "settings": settings, **about}, indent=1))
    return home


def finish(home, seed):
    """Trains, packs and scores one run, as far as that is still to be done; says how it went."""
    run = Path("runs", f"{home.name}_s{seed}")
    score = run / "score.json"
    settings = read_json(home / "turn.json")["settings"]
    flags = [f"--{k}={v}" for k, v in {**settings, "seed": seed, "run": run.name}.items()]
    end = read_run(run)["end"]
    if end in STOPPED and (run / "state.pt").exists():
        flags = [f"--resume={run}"]
    elif end in STOPPED:
        shutil.rmtree(run, ignore_errors=True)   # killed before it had saved anything
    commands = [
        [home / "train_gpt.py", *flags], [home / "pack.py", run],
        # The parent's code is not the root's, but ours: no proof, which takes minutes.
        [ROOT / "eval_bpb.py", run / "artifact.pyz", f"--data={settings['data']}", f"--out={score}",
         "--trust", "--max_seconds=0"]]
    if end == "finished":
        commands = commands[1:]
    if score.exists() or end not in (*STOPPED, "finished"):
        commands = []   # all is done, or it failed, and would again
    for words in commands:
        with open(home / f"{run.name}.out", "a") as out:
            # A session of its own: Ctrl-C is for the turn, a trainer would end early and save.
            child = subprocess.Popen([sys.executable, *words], stdout=out, stderr=out,
                                     start_new_session=True)
        CHILDREN.append(child)
        if child.wait():
            break
    state = "scored" if score.exists() else "no score"
    print(f"{run}: {state}, {read_run(run)['end']}; see {home / run.name}.out", file=sys.stderr)


def read_side(name):
    """-> ({seed: val_bpb} of the side's runs that have a whole score, how its runs ended)."""
    runs = [read_run(path) for path in Path("runs").glob(f"{name}_s*")]
    scores = {str(run["seed"]): run["val_bpb"] for run in runs if is_number(run["val_bpb"])}
    return scores, {run["end"] for run in runs}


def list_ideas():
    for path in sorted(TURNS.glob("*/turn.json"), key=os.path.getmtime):
        turn = read_json(path)
        if "idea" not in turn:
            continue
        side = path.parent.name
        ours, ends = read_side(side)
        theirs, _ = read_side(turn["against"])
        words = f"{'undecided' if ends <= {None, 'finished'} else 'drop'}: {ends}"
        if min(len(ours), len(theirs)) > 1:
            c = comparison(ours, theirs, 1.0)
            words = f"{c['verdict']}: {c['gain_bpb']:+.5f} bits per byte, p {c['p']:.2g}"
        print(f"{words}; n {len(ours)}\n  {turn['idea']}\n  moved {', '.join(turn['moved'])}; {side} "
              f"against {turn['against']}, {turn['settings']}")


def run_all(home, parent, seeds, jobs):
    """Both sides' runs, the parent's first and then its noise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # through the finally below
    try:
        with ThreadPool(jobs) as pool:
            theirs = pool.starmap_async(finish, [(parent, seed) for seed in seeds])
            ours = pool.starmap_async(finish, [(home, seed) for seed in seeds])
            theirs.get()
            scores = [*read_side(parent.name)[0].values()]
            if len(scores) > 1:
                print(f"noise      {parent.name}: std {statistics.stdev(scores):.5f}, n {len(scores)}; "
                      f"unpaired, a gain under {smallest_gain(scores):.5f} bits per byte does not show",
                      flush=True)
            ours.get()
    finally:
        for child in CHILDREN:
            child.kill()


def read_settings(words):
    """Words of a command line -> {setting: value}."""
    found = dict(re.findall(r"--(\w+)=(.*)", "\n".join(words)))
    if len(found) < len(words):
        raise BadInput(f"{words}: settings of train_gpt.py are written --name=value, each once")
    return found


def main():
    p = flags_of(__doc__, "settings", idea="", parent="HEAD", seeds=3,
                 jobs=1 if ON_GPU else os.cpu_count())
    cut = [*sys.argv, "--"].index("--")
    args, words = p.parse_known_args(sys.argv[1:cut])
    if not args.idea:
        return list_ideas()
    if args.seeds < 2 or args.jobs < 1:
        raise BadInput("--seeds=2 at least: one run says nothing about noise; --jobs=1 at least")
    name, old, settings, record = parent_of(args.parent)
    # Steps, for what a busy machine does in so many seconds is a lottery.
    settings = {"max_seconds": 0, "max_steps": 300, **settings, **read_settings(args.settings + words)}
    preset = settings.setdefault("preset", "proxy" if Path("data/proxy").is_dir() else "demo")
    data = preset if preset in ("demo", "proxy") else "fineweb"
    settings["data"] = os.path.relpath(find_dataset(settings.get("data", data)))
    own = read_settings(sys.argv[cut + 1:])
    new = files_in(ROOT)
    if new == old and own.items() <= settings.items():
        raise BadInput(f"nothing differs from {args.parent}: edit, or give settings behind --")
    moved = {part for part, _ in parts_of(new) ^ parts_of(old)} | own.keys()
    parent = make_side(name, old, settings)
    home = make_side(args.idea, new, {**settings, **own}, idea=args.idea, against=parent.name,
                     moved=sorted(moved), record=record)
    seeds = range(1, args.seeds + 1)
    run_all(home, parent, seeds, args.jobs)
    ours, theirs = ([f"runs/{side.name}_s{n}" for n in seeds] for side in (home, parent))
    plot.write(home / "curves.svg", ours + theirs)
    return compare([*ours, "--", *theirs])


if __name__ == "__main__":
    sys.exit(command(main))
