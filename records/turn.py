"""One turn of the loop: is the edited code better than its parent? Both are trained, packed and scored, seed by seed.

    python records/turn.py --idea="a wider gate"               the files as they are against the last commit
    python records/turn.py --idea="..." -- --matrix_lr=0.03    what stands behind -- is the idea's alone
    python records/turn.py --idea="..." --parent=RUN           against a run's or a record's code and settings
    python records/turn.py                                     every idea so far and its verdict, the dropped ones too

Any setting of train_gpt.py before the -- goes to both sides: --preset=proxy --data=NAME --max_steps=1000. Runs go side
by side, one thread each on a CPU. What is there is not run again: a turn that was stopped goes on where it stood.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "records"]  # no shadowed packages
from data.dataset import BadInput, Parser, command, find_dataset
from records.ledger import PER_RUN, append, digest, find_baseline, read_entry, read_ledger, read_run, read_sources
from records.stats import compare, comparison
from train_gpt import PRESETS, SOURCES, Config

CHILDREN = set()   # the processes that run; a turn that is stopped takes them along


class Run(NamedTuple):
    folder: Path   # runs/<run>
    home: Path     # its sources, as they were when the turn began
    flags: list    # of train_gpt.py


def parent_of(name):
    """A run, a record or a commit -> (its name, {file: bytes} of its sources, its config; {} of a commit)."""
    try:
        entry = read_entry(find_baseline(name))
        return entry["name"].rpartition("_s")[0] or entry["name"], read_sources(entry), entry["config"]
    except BadInput:
        pass
    shown = {f: subprocess.run(["git", "show", f"{name}:{f}"], cwd=ROOT, capture_output=True) for f in SOURCES}
    if any(out.returncode for out in shown.values()):
        raise BadInput(f"--parent={name}: no run, no record and no commit with a train_gpt.py")
    return name, {f: out.stdout for f, out in shown.items()}, {}


def settings(args, given, config):
    """-> {flag: value} of both sides: the parent's config if it has one, what was given, the budget, the dataset."""
    out = {k: v for k, v in config.items() if k not in PER_RUN} if not args.preset else {}
    out |= {"preset": args.preset or ("proxy" if Path("data/proxy").is_dir() and not config else "demo"), **given}
    if "max_seconds" not in given:   # steps, for what a busy machine does in so many seconds is a lottery
        out |= {"max_seconds": 0, "max_steps": given.get("max_steps") or out.get("max_steps") or 300}
    data = str(out.get("data") or PRESETS.get(out["preset"], {}).get("data", "fineweb"))
    if data == "demo" and not (ROOT / "data/demo/meta.json").exists():
        subprocess.run([sys.executable, str(ROOT / "data/prepare.py"), "demo"], check=True)
    folder = find_dataset(data)
    return out | {"data": data if Path(data) == folder else os.path.relpath(folder)}


def plan(name, sources, flags, seeds, more):
    """The runs of one side, under the names that they have or will get. more(seed): flags that do not count."""
    key = digest([{f: digest(b.decode("utf-8", "replace")) for f, b in sources.items()}, flags])[:8]
    home, runs = Path("runs/sources") / key, []
    for file, blob in sources.items():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(blob)
    for seed in seeds:
        there = sorted(Path("runs").glob(f"*_{key}_s{seed}"))
        slug = re.sub(r"\W+", "-", name.lower())[:30].strip("-")
        folder = there[0] if there else Path("runs") / f"{slug}_{key}_s{seed}"
        words = {**flags, "seed": seed, "run": folder.name, **more(seed)}
        runs.append(Run(folder, home, [f"--{k}={v}" for k, v in words.items()]))
    return runs


def call(run, *words):
    """Runs a command to its end -> the last line that it printed, or '' where it ended well."""
    env = os.environ if shutil.which("nvidia-smi") else {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(run.home / f"{run.folder.name}.out", "a+b") as out:
        child = subprocess.Popen([sys.executable, *map(str, words)], env=env, stdout=out, stderr=out,
                                 start_new_session=True)   # Ctrl-C is for the turn: a trainer would end early and save
        CHILDREN.add(child)
        failed = child.wait()
        CHILDREN.discard(child)
        out.seek(0)
        return (out.read().decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1] if failed else ""


def finish(run):
    """Trains, packs and scores, as far as that is still to be done -> why it failed, or ''."""
    folder, why = run.folder, ""
    if (folder / "crash.json").exists():
        return read_run(folder)["crash"].get("reason", "a crash")
    if not (folder / "score.json").exists():
        if not trained(folder):
            if (folder / "state.pt").exists():
                why = call(run, run.home / "train_gpt.py", f"--resume={folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)   # killed before it had saved anything
                why = call(run, run.home / "train_gpt.py", *run.flags)
        if not why and not (folder / "artifact.pyz").exists():
            why = call(run, run.home / "pack.py", folder)
        # It writes the ledger's line. The parent's code is not this folder's, but ours: no proof, which takes minutes.
        why = why or call(run, ROOT / "eval_bpb.py", folder / "artifact.pyz", "--trust")
        if why and (folder / "metrics.jsonl").exists():
            append(folder)
    return why


def trained(folder):
    path = folder / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1]) if path.exists() and not (folder / "state.pt").exists() else {}
    return last.get("kind") == "summary" and last.get("finished")


def run_all(runs, jobs):
    """Every run to its end, side by side, with a line on stderr for each -> {folder: why it failed}."""
    failed, pool = {}, ThreadPoolExecutor(jobs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # through the finally below
    waiting = {pool.submit(finish, run): run.folder for run in runs}
    try:
        for n, future in enumerate(as_completed(waiting), 1):
            folder, why = waiting[future], future.result()
            failed |= {folder: why} if why else {}
            print(f"{n} of {len(runs)} runs: {folder} {why or 'is scored'}", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in [*CHILDREN]:
            os.killpg(child.pid, signal.SIGKILL)
    return failed


def ideas(rows):
    """Lines of the ledger -> [(verdict, numbers, its first line)] of each experiment that had an idea or a parent."""
    by_run, experiments, out = {row["run"]: row for row in rows}, {}, []   # of a run the last line counts
    for row in by_run.values():
        experiments.setdefault(row["experiment"], []).append(row)

    def scores(rows):
        return {row["seed"]: float(row["val_bpb"]) for row in rows if row["status"] == "ok"}
    for mine in experiments.values():
        first, ours = mine[0], scores(mine)
        if first["idea"] == first["parent"] == "-":
            continue
        parent, theirs, unlike = by_run.get(first["parent"]), {}, []
        if parent:
            theirs = scores(experiments[parent["experiment"]])
            unlike = [k for k in ("dataset", "budget", "predictor") if parent[k] != first[k]]
        shared = [s for s in ours if s in theirs]
        if len(shared) > 1:
            ours, theirs = {s: ours[s] for s in shared}, {s: theirs[s] for s in shared}
        stopped = ", ".join(sorted({row["status"] for row in mine} - {"ok"}))
        if not ours:
            verdict, numbers = "drop", stopped
        elif unlike or min(len(ours), len(theirs)) < 2:
            verdict, numbers = "undecided", f"another {', '.join(unlike)}" if unlike else "too few runs"
        else:
            c = comparison(ours, theirs, 1.0)
            verdict = c["verdict"] if c["verdict"] in ("keep", "drop") else "undecided"
            numbers = f"{c['gain_bpb']:+.5f} bits per byte, p {c['p']:.2g}, n {len(ours)}"
            numbers += f" ({stopped})" * bool(stopped)
        out.append((verdict, numbers, first))
    return out


def main():
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    p = Parser(description=__doc__)
    p.add_argument("--idea", help="what differs from the parent, in one sentence; without it: the ideas so far")
    p.add_argument("--parent", default="HEAD", help="a run, a record or a commit")
    p.add_argument("--seeds", type=int, default=3, help="seeds 1 to this on both sides")
    p.add_argument("--preset", choices=list(PRESETS), help="the parent's; else proxy with data/proxy, or demo")
    p.add_argument("--jobs", type=int, default=1 if shutil.which("nvidia-smi") else os.cpu_count(), help="runs at once")
    args, more = p.parse_known_args(argv[:cut])
    given, own = ({k: v for f in words for k, v in re.findall(r"^--(\w+)=(.*)$", f)}
                  for words in (more, argv[cut + 1:]))
    if bad := [k for k in {**given, **own} if k not in {f.name for f in fields(Config)} - PER_RUN] or [
            f for f in more + argv[cut + 1:] if not re.match(r"--\w+=", f)]:
        raise BadInput(f"{bad[0]}: settings of train_gpt.py are written --name=value")
    if not args.idea:
        for verdict, numbers, row in ideas(read_ledger("runs/ledger.tsv")):
            print(f"{verdict:<10} {row['idea']}\n{'':<10} {numbers}; {row['run']} against {row['parent']}, "
                  f"{row['budget']} on {row['dataset']}, commit {row['commit']}, {row['config_differences']}")
        return 0
    if args.seeds < 2 or args.jobs < 1:
        raise BadInput("--seeds=2 at least, for one run says nothing about noise; --jobs=1 at least")
    name, old, config = parent_of(args.parent)
    flags = settings(args, given, config)
    known = {"preset", *(f.name for f in fields(Config))}
    seeds = range(1, args.seeds + 1)
    parents = plan(name, old, flags, seeds, lambda seed: {})
    new = {f: (ROOT / f).read_bytes() for f in SOURCES}
    mine = plan(args.idea, new, {k: v for k, v in flags.items() if k in known} | own, seeds,
                lambda seed: {"parent": parents[seed - 1].folder.name, "idea": args.idea})
    if mine[0].folder == parents[0].folder:
        raise BadInput(f"nothing differs from {args.parent}: edit train_gpt.py, or give settings behind --")
    print(f"{args.idea}: {mine[0].folder.name} against {parents[0].folder.name}, {flags['data']}", file=sys.stderr)
    failed = run_all([*parents, *mine], args.jobs)
    whole = [(str(a.folder), str(b.folder)) for a, b in zip(mine, parents) if not {a.folder, b.folder} & {*failed}]
    if len(whole) < 2:
        raise BadInput(f"{len(whole)} pairs of runs have a score: {'; '.join(failed.values()) or 'two are needed'}")
    compare([*(a for a, _ in whole), "--", *(b for _, b in whole)])
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
