"""One turn of the loop: is the edited code better than its parent? Both are trained, packed and
scored, seed by seed.

    python records/turn.py --idea="a wider gate"               the files as they are against HEAD
    python records/turn.py --idea="..." -- --matrix_lr=0.03    behind -- settings of the idea alone
    python records/turn.py --idea="..." --parent=NAME          against a run, a record or a commit
    python records/turn.py                                     every idea so far and its verdict

--seeds=N: seeds 1 to N on both sides; --jobs=N: runs at once, on a CPU one thread each. Settings
before the -- go to both sides: --preset=proxy --data=NAME --max_steps=1000. What is there is not
run again: a turn that was stopped goes on where it stood. runs/turns/<side>/ keeps a side's
sources, what its commands printed, turn.json and the curves; its runs are runs/<side>_s<seed>/.
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not records/: nothing may shadow a package
from data.dataset import ROOT, BadInput, command, find_dataset
from pack import LIVE, lifetime
from records import plot
from records.folders import (files_in, find_entry, flags_of, git, read_json, read_run,
                             write_files)
from records.rules import SOURCE_NAME
from records.stats import compare

TURNS = Path("runs/turns")
STOPPED = (None, "stopped early as asked")   # so ends a run that is done again or goes on
ON_GPU = shutil.which("nvidia-smi")
if not ON_GPU:
    os.environ["OMP_NUM_THREADS"] = "1"
CHILDREN = []   # processes; a turn that is stopped takes along those that run


def files_at(commit):
    """{name: bytes} of the sources at a commit."""
    names = git("ls-tree", "-r", "--name-only", commit).decode().split()
    return {name: git("show", f"{commit}:{name}") for name in names if SOURCE_NAME.fullmatch(name)}


def parent_of(name):
    """A turn's run, a record or a commit -> (its name, {file: bytes} of its sources, its
    settings)."""
    folder = Path(name)
    with suppress(BadInput):
        folder = find_entry(name)
    side = folder.name.rpartition("_s")[0]
    if turn := read_json(TURNS / side / "turn.json"):
        return side, files_in(TURNS / side), turn["settings"]
    if record := read_json(folder / "submission.json"):
        return folder.name, files_at(record["commit"]) | files_in(folder), record["config"]
    files = files_at(name)
    return git("rev-parse", "--short", name).decode().strip(), files, {}


def note(side, **about):
    """Adds to what a side's turn.json says."""
    turn = side / "turn.json"
    turn.write_text(json.dumps({**read_json(turn), **about}, indent=1))


def make_side(name, files, settings):
    """Writes runs/turns/<side>/ of these sources and settings, or finds it -> the folder."""
    content = repr((sorted(files.items()), sorted(settings.items())))
    key = hashlib.sha256(content.encode()).hexdigest()[:8]
    slug = re.sub(r"\W+", "-", name)[:30]
    side = next(TURNS.glob(f"*_{key}"), TURNS / f"{slug}_{key}")
    write_files(side, files)
    note(side, settings=settings)
    return side


def finish(side, seed):
    """Trains, packs and scores one run, as far as that is still to be done -> its folder."""
    run = Path("runs", f"{side.name}_s{seed}")
    score = run / "score.json"
    settings = read_json(side / "turn.json")["settings"]

    def python(*words):
        with open(side / f"{run.name}.out", "a") as out:
            # A session of its own: Ctrl-C is for the turn, a trainer would end early and save.
            child = subprocess.Popen([sys.executable, *words], stdout=out, stderr=out,
                                     start_new_session=True)
        CHILDREN.append(child)
        return child.wait()
    if LIVE in lifetime(run):
        raise BadInput(f"{run} is in training, by another turn: wait for it")
    if read_run(run)["end"] in STOPPED:
        flags = [f"--{k}={v}" for k, v in {**settings, "seed": seed, "run": run.name}.items()]
        if (run / "state.pt").exists():
            flags = [f"--resume={run}"]
        else:
            shutil.rmtree(run, ignore_errors=True)   # killed before it had saved anything
        python(side / "train_gpt.py", *flags)
    end = read_run(run)["end"]
    if end == "finished" and not score.exists() and not python(side / "pack.py", run):
        # The parent's code is not the root's, but ours: no proof, which takes minutes.
        python(ROOT / "eval_bpb.py", run / "artifact.pyz", f"--data={settings['data']}",
               f"--out={score}", "--trust", "--max_seconds=0")
    print(f"{run}: {end}; see {side / run.name}.out", file=sys.stderr)
    return run


def list_ideas():
    for path in sorted(TURNS.glob("*/turn.json"), key=os.path.getmtime):
        turn = read_json(path)
        if "verdict" in turn:
            words = "{verdict}\n  {idea}\n  moved {moved}; {settings}; against {against}"
            print(words.format(**turn))


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
    name, old, settings = parent_of(args.parent)
    # Steps, for what a busy machine does in so many seconds is a lottery.
    settings = {"max_seconds": 0, "max_steps": 300, **settings,
                **read_settings(args.settings + words)}
    preset = settings.setdefault("preset", "proxy" if Path("data/proxy").is_dir() else "demo")
    data = preset if preset in ("demo", "proxy") else "fineweb"
    settings["data"] = os.path.relpath(find_dataset(settings.get("data", data)))
    own = read_settings(sys.argv[cut + 1:])
    new = files_in(ROOT)
    moved = dict((new.items() ^ old.items()) | (own.items() - settings.items()))
    if not moved:
        raise BadInput(f"nothing differs from {args.parent}: edit, or give settings behind --")
    n = args.seeds
    parent = make_side(name, old, settings)
    home = make_side(args.idea, new, {**settings, **own})
    note(home, idea=args.idea, moved=sorted(moved), against=parent.name, verdict="no verdict")
    todo = [(side, seed) for side in (parent, home) for seed in range(1, n + 1)]
    try:
        with ThreadPool(args.jobs) as pool:
            runs = pool.starmap(finish, todo, 1)
    finally:
        for child in CHILDREN:
            child.kill()
    plot.write(home / "curves.svg", runs)
    c = compare(runs[n:], runs[:n])
    note(home, verdict=f"{c['verdict']}: {c['gain_bpb']:+.5f} bits per byte, p {c['p']:.2g}; n {n}")


if __name__ == "__main__":
    sys.exit(command(main))
