"""Review record folders without running anything in them, and compare runs.

    python records/check.py FOLDER...                     review; nothing in a folder is executed
    python records/check.py --base=REF                    the commits since REF only add one record?
    python records/check.py compare RUN... -- RUN...      is the left side better? Paired by seed

A line a folder as soon as it is read, its findings below it, `LEVEL rule file message`; rules.py
has all rules and whence they come. An artifact that another folder or a record here has is found,
too. Exit code by the worst finding: 4 FLAG, 1 FAIL, 0 none; 2 bad input. `compare` exits 0.

The bytes under review are hostile. A child process with limits on time and memory reads each
folder; it follows no link and opens only regular files under a size limit. What it found before
something stopped it stands, and that it was stopped is a FAIL. What no reader of files can prove
(no look-ahead, score before learn) the judge proves: its verdicts stand in the logs, and
`python eval_bpb.py ARTIFACT` repeats them.
"""
import ast
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

os.environ["OPENBLAS_NUM_THREADS"] = "1"   # of the children too: threads take address space
sys.path[0] = str(Path(__file__).resolve().parents[1])  # not records/: nothing may shadow a package
from data.dataset import ROOT, BadInput, command, printable
from records import rules
from records.folders import (SHARED, check_facts, committed, files_in, flags_of, git, known_records,
                             nats_per_bit, part, read_entry, summarise)
from records.rules import RULES, TRACKS
from records.stats import compare, comparison

JUDGE = b"\n# The judge. Below this line nothing may be changed"


# ---- the folder. Each check yields findings, (rule, message, file)


def check_files(r):
    """Fills r.files and r.texts without following a link. What is not a plain small file of an
    innocent name, or has secrets in it, is a finding."""
    paths = [*itertools.islice(r.folder.rglob("*"), rules.ENTRY_LIMIT)]
    if len(paths) == rules.ENTRY_LIMIT:
        yield "review-limit", f"{len(paths)} files or more; the rest is not read", "."
    room = rules.FOLDER_LIMIT
    for path in sorted(paths):
        name = path.relative_to(r.folder).as_posix()
        for rule, pattern in rules.IN_NAMES.items():
            if pattern.search(name):
                yield rule, "a name that does not belong in a record", name
        about = path.lstat()
        if stat.S_ISDIR(about.st_mode):
            continue
        if not stat.S_ISREG(about.st_mode):
            yield "link", "a link or a special file; not followed, not opened", name
        elif about.st_size > room:
            yield "file-size", f"{about.st_size:,} bytes are too many; not read", name
        else:
            r.files[name] = path.read_bytes()
            r.texts[name] = r.files[name].decode("utf-8", "replace")
            room -= about.st_size
            for rule, pattern in rules.IN_TEXTS.items():
                if m := pattern.search(r.texts[name]):
                    yield rule, f"{m[0][:8]}...", name
    for name in ("README.md", "submission.json", "train_gpt.py"):
        if not r.files.get(name):
            yield "missing-file", "is missing or empty", name


def check_json(r):
    """Fills r.json; what no log says."""
    r.json = {**json.loads(r.texts["submission.json"])}   # a TypeError where it is no object
    above = r.folder.parent.name
    track = r.json.get("track")
    r.record = track == TRACKS[0]
    if track not in TRACKS or above in TRACKS and above != track:
        yield "track", f"track {track!r} in the folder {above}; known: {', '.join(TRACKS)}", "."
    if not rules.FOLDER_NAME.fullmatch(r.folder.name):
        yield "folder-name", "YYYY-MM-DD_short-slug is expected", "."


# ---- the seeds


def check_logs(r):
    """Fills r.seeds."""
    for name, text in r.texts.items():
        if not name.endswith(".log"):
            continue
        try:
            end = text.rpartition("\n---\n")[2]
            lines = [line.partition(": ") for line in end.splitlines()]
            facts = {key: json.loads(value) for key, _, value in lines}
            check_facts(facts)
            r.seeds[name] = facts
        except Exception as e:   # of values that no one expects
            yield "log", f"no facts of a seed at its end: {e!r}", name
    if len(r.seeds) < (3 if r.record else 1):
        yield "track", f"{len(r.seeds)} logs of seeds; a record of the first track needs 3, others 1", "."


def check_seeds(r):
    """Each seed of the same experiment, within the budgets and proved."""
    for key in ("seed", "artifact_sha256"):
        if len({facts[key] for facts in r.seeds.values()}) < len(r.seeds):
            yield "seeds", f"two logs have the same {key}", "."
    for name, facts in r.seeds.items():
        f = SimpleNamespace(**facts)
        for key in SHARED:
            if summarise([facts])[key] != r.json.get(key):
                rule = "environment" if key == "environment" else "seeds"
                yield rule, f"another {key} than in submission.json", name
        if f.artifact_bytes > rules.CAP_BYTES:
            yield "artifact-cap", f"{f.artifact_bytes:,} bytes, over {rules.CAP_BYTES:,}", name
        replay = str(f.audit.get("replay", "none" if r.record else "pass"))
        if f.mode not in ("own", "audited") or not replay.startswith("pass"):
            yield "proof", f"mode {f.mode}, replay {replay}: score with --audit, not --trust", name
        seconds = max(f.train_seconds, f.eval_seconds)
        device = str(f.environment.get("device"))
        n_bytes = f.dataset["val_bytes"]
        if r.record and (seconds > rules.CLOCK_SECONDS
                         or not re.search(r"8 ?x.{0,12}H100", device)
                         or abs(n_bytes / rules.DOCUMENTS_BYTES - 1) > 5e-4):
            yield "track", (f"ran on {device}, for {seconds} s, scored on {n_bytes} bytes; not "
                            f"8xH100, over 600 s, or not fineweb's {rules.DOCUMENTS_BYTES}"), name


def check_summary(r):
    """submission.json and README say what the logs say."""
    if not r.seeds:
        return
    expected = summarise([*r.seeds.values()])
    for key in sorted(expected.keys() - SHARED):
        if r.json.get(key) != expected[key]:
            yield ("log-score", f"{key} is {r.json.get(key)}, by the logs {expected[key]}",
                   "submission.json")
    readme = r.texts["README.md"]
    if f"{expected['val_bpb']:.6f}" not in readme:
        yield "readme", f"does not say {expected['val_bpb']:.6f}, the val_bpb", "README.md"
    if "(write this)" in readme:
        yield "readme-words", "the author's part is still empty", "README.md"


# ---- sources and lineage


def check_sources(r):
    """The sources are those that ran, hide nothing, and none of them changes the judge."""
    hashes = part(r.json, "source_sha256")
    here = [name for name in r.files if name.endswith(".py")]
    root = files_in(ROOT)
    for name in sorted({"train_gpt.py", *hashes, *here}):
        # What a record leaves out comes from its commit, or from the root.
        allowed = [committed(r.json.get("commit"), name), root.get(name, b"")]
        data = r.files.get(name, allowed[0] or allowed[1])
        if sha256(data).hexdigest() != hashes.get(name):
            yield "source-hash", "is not the source that ran, by its sha256", name
        if name in r.files and (what := hidden_code(data)):
            yield "plain-source", what, name
        if name == "eval_bpb.py":
            data, *allowed = (source.partition(JUDGE)[2] for source in (data, *allowed))
        if name not in ("train_gpt.py", "pack.py") and not (data and data in allowed):
            yield "judge", "is not the root's, which scores", name


def check_lineage(r):
    """The parent is a record here; a record beats the best of its track until that day."""
    known = known_records()
    known.pop(r.folder.name, None)
    name = r.json.get("parent")
    if name not in {None, *known}:
        yield "parent", f"{name!r} is no record here; null where there is none", "submission.json"
    rivals = [read_entry(folder) for name, folder in known.items()
              if TRACKS[0] in folder.parts and name[:10] <= r.folder.name]
    if r.record and rivals:
        best = min(rivals, key=lambda rival: rival["val_bpb"])
        ours = {str(facts["seed"]): facts["val_bpb"] for facts in r.seeds.values()}
        c = comparison(ours, best["scores"], nats_per_bit(best["dataset"]))
        if c["p_written"] >= rules.RULE_P:
            yield "significance", f"{c['gain_nats']:+.4f} nats over the best, p {c['p_written']:.2g}", "."


def hidden_code(data):
    """Source bytes -> what would run or load code which is not written there, "" for none.

    By words alone, under whatever alias: a name, a part of a module's name, an attribute, an
    argument, a whole string. What is put together at run time is the business of the sandbox.
    """
    try:
        words = rules.SAFE.sub("", ast.dump(ast.parse(data.decode("utf-8-sig"))))
    except Exception as e:   # deep nesting is a RecursionError or a MemoryError
        return f"does not parse: {e!r}"
    # In another coding, comments may be code.
    found = rules.COOKIE.match(data) or rules.HIDING.search(words)
    return f"{found[0]!r}: what runs is not written here" if found else ""


CHECKS = (check_files, check_json, check_logs, check_seeds, check_summary, check_lineage,
          check_sources)   # the last takes seconds


def review(folder):
    """All that the files of one folder can tell: yields each finding as it is made, at last the
    list of its artifacts' sha256."""
    r = SimpleNamespace(folder=Path(folder).resolve(), record=False)
    r.files = {}   # name: bytes, of what may be read
    r.texts = {}
    r.json = {}    # submission.json
    r.seeds = {}   # name of a log: the facts at its end
    for check in CHECKS:
        try:
            yield from check(r)
        except Exception as e:   # of values that no one expects: the others still speak
            yield "review-limit", f"{check.__name__} stopped at {e!r}", "."
    yield [facts["artifact_sha256"] for facts in r.seeds.values()]


# ---- many folders


def child(folder):
    """The child's main: limits; what review() yields as lines of JSON on stdout."""
    with suppress(Exception):   # not on this system
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (rules.CHILD_SECONDS, rules.CHILD_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_AS, (rules.CHILD_BYTES, rules.CHILD_BYTES))
        signal.alarm(4 * rules.CHILD_SECONDS)
    for value in review(folder):
        print(json.dumps(value), flush=True)


def review_in_child(folder):
    """-> (findings, artifacts) of one folder; whatever ended its reader is a finding too."""
    out = subprocess.run([sys.executable, __file__, "--child", folder], capture_output=True)
    values = [json.loads(line) for line in out.stdout.split(b"\n")[:-1]]
    if out.returncode:
        stopped = f"not read to the end: exit code {out.returncode}, {out.stderr[-160:]}"
        values = [("review-limit", stopped, "."), *values, []]
    return values[:-1], values[-1]


def show(name, findings):
    """Prints a folder's line, its first findings below it -> the levels of all."""
    levels = {RULES[rule] for rule, _, _ in findings}
    print(f"{printable(name, 'ascii')}: {', '.join(sorted(levels)) or 'clean'}", flush=True)
    for rule, message, file in findings[:rules.SHOWN_LIMIT]:
        line = f"  {RULES[rule]} {rule} {file} {message}"
        print(printable(line[:400], "ascii"), flush=True)
    return levels


def review_all(folders):
    """Reviews folders side by side, after the records that are here already: yields the levels of
    each folder's findings, which it shows as soon as it is read."""
    given = {Path(folder).resolve() for folder in folders}
    names = [*(str(path) for path in known_records().values() if path not in given), *folders]
    first = {}   # artifact: the folder that has it
    with ThreadPool() as pool:
        for name, (findings, artifacts) in zip(names, pool.imap(review_in_child, names)):
            for artifact in artifacts:
                if first.setdefault(artifact, name) != name:
                    copy = f"the artifact {artifact:.12} of {first[artifact]}"
                    findings.append(("copy", copy, "."))
            if name in folders:
                yield show(name, findings)


def change_set(ref):
    """-> (findings on each commit since ref, also on what a later one took back, the folders
    added)."""
    changes = git("log", "-m", "--format=", "--name-status", "--no-renames", "--end-of-options",
                  f"{ref}..HEAD", "--")
    found = []
    folders = set()
    for line in changes.decode().splitlines():
        if m := rules.ADDED.match(line):
            folders.add(str(ROOT / m[1]))
        elif not line.endswith("\trecords/README.md"):   # generated
            found.append(("change-set", "a change set only adds a record's folder", line[2:]))
    if len(folders) != 1:
        found.append(("change-set", f"one record, not {len(folders)}", "records"))
    return found, sorted(folders)


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2])
    if sys.argv[1:2] == ["compare"]:
        cut = [*sys.argv, "--"].index("--")
        compare(sys.argv[2:cut], sys.argv[cut + 1:])
        return 0
    args = flags_of(__doc__, "folders", base="").parse_args()
    levels = []   # of each folder
    folders = args.folders
    if args.base:
        findings, added = change_set(args.base)
        levels.append(show("change set", findings))
        folders += added
    if not (folders or levels):
        raise BadInput("name record folders, or --base=REF")
    levels += review_all(folders)
    print(f"---\n{sum(not found for found in levels)} of {len(levels)} clean")
    found = set().union(*levels)
    return 1 if "FAIL" in found else 4 * ("FLAG" in found)


if __name__ == "__main__":
    sys.exit(command(main))
