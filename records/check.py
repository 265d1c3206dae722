"""Review record folders without running anything in them, and compare runs.

    python records/check.py FOLDER...                     review; nothing in a folder is executed
    python records/check.py --base=REF                    the commits since REF only add one record?
    python records/check.py FOLDER --rescore=ARTIFACT     also run the root's judge on the artifact
    python records/check.py compare RUN... -- RUN...      is the left side better? Paired by seed

--data=NAME is the dataset of --rescore, if not the record's; --jobs=N folders are read at once;
--json=FILE gets every finding, too.

A line a folder as soon as it is read, its findings below it, `LEVEL rule file message
[source]`; at the end copies between the folders and a table, worst first. rules.py has all rules.
Exit code by the worst finding: 4 FLAG, 1 FAIL, 0 none; 2 bad input. `compare` exits 0.

The bytes under review are hostile. A child process with limits on time and memory reads each
folder; it follows no link and opens only regular files under a size limit. What it found before
something stopped it stands, and that it was stopped is a FAIL. What no reader of files can prove
(no look-ahead, score before learn) the judge proves: its verdicts stand in the logs, and --rescore
repeats them.
"""
import ast
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

os.environ["OPENBLAS_NUM_THREADS"] = "1"   # of the children too: threads take address space
sys.path[0] = str(Path(__file__).resolve().parents[1])   # not records/: nothing may shadow a package
from data.dataset import ROOT, BadInput, Progress, atomic_write, command, printable
from records import rules
from records.folders import (SHARED, check_facts, committed, flags_of, git, is_number,
                             known_records, nats_per_bit, part, read_entry, read_if_there, read_json,
                             summarise)
from records.rules import LEVELS, RULES, TRACKS
from records.stats import compare, comparison

JUDGE = b"\n# The judge. Below this line nothing may be changed"
OURS = [ROOT / "records" / name for name in ("evidence", "__pycache__")]   # no records: for a glob


def finding(rule, message, file="submission.json"):
    level = RULES[rule]
    return {"level": level, "rule": rule, "file": file, "message": str(message)[:300],
            "source": LEVELS[level][rule]}


# ---- the folder. Each check yields (rule, message, file); the file may be left out


def check_files(r):
    """Fills r.files and r.texts without following a link; whatever is not a plain small file is a finding."""
    paths = [*itertools.islice(r.folder.rglob("*"), rules.ENTRY_LIMIT)]
    if len(paths) == rules.ENTRY_LIMIT:
        yield "review-limit", f"{len(paths)} files or more; the rest is not read", "."
    room = rules.FOLDER_LIMIT
    for path in sorted(paths):
        name = path.relative_to(r.folder).as_posix()
        for rule, pattern in rules.IN_NAMES.items():
            if pattern.search(name):
                yield rule, "a name that does not belong in a record", name
        size = path.lstat().st_size
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink() or not path.is_file():
            yield "link", "a link or a special file; not followed, not opened", name
        elif size > room:
            yield "file-size", f"{size:,} bytes are too many; not read", name
        else:
            r.files[name] = path.read_bytes()
            r.texts[name] = r.files[name].decode("utf-8", "replace")
            room -= size
    for name in ("README.md", "submission.json", "train_gpt.py"):
        if not r.files.get(name):
            yield "missing-file", "is missing or empty", name


def check_json(r):
    """Fills r.json; what no log says."""
    r.json = {**json.loads(r.texts["submission.json"])}   # a TypeError where it is no object
    for key in ("author", "github_id", "name", "blurb", "commit"):
        if not r.json.get(key):
            yield "json", f"{key}: missing or empty"
    above = r.folder.parent.name
    track = r.json.get("track")
    r.record = track == TRACKS[0]
    if track not in TRACKS or above in TRACKS and above != track:
        yield "track", f"track {track!r} in the folder {above}; known: {', '.join(TRACKS)}"
    if not rules.FOLDER_NAME.fullmatch(r.folder.name) or r.json.get("date") != r.folder.name[:10]:
        yield "folder-name", f"{r.folder.name}: {r.json.get('date')}_short-slug is expected", "."


def check_texts(r):
    """Keys and paths of one machine in any file."""
    for name, text in r.texts.items():
        for rule, pattern in rules.IN_TEXTS.items():
            if m := pattern.search(text):
                yield rule, f"{m[0][:8]}...", name


# ---- the seeds


def check_logs(r):
    """Fills r.seeds; and what stands in a log does not say otherwise than its end."""
    for name, text in r.texts.items():
        body, _, end = text.rpartition("\n---\n")
        if not name.endswith(".log"):
            continue
        try:
            lines = [line.partition(": ") for line in end.splitlines()]
            facts = {key: json.loads(value) for key, _, value in lines}
            check_facts(facts)
        except Exception as e:   # of values that no one expects
            yield "log", f"no facts of a seed at its end: {e!r}", name
            continue
        r.seeds[name] = facts
        for key, value in rules.SAID.findall(body):
            if float(value) > facts[f"{key}s"] + 0.1:
                yield "log", f"{key}s {value}, but {facts[f'{key}s']} at its end", name
    if len(r.seeds) < (3 if r.record else 1):
        yield "track", f"{len(r.seeds)} logs of seeds; a record needs 3", "."


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
        failed = {k: v for k, v in f.audit.items() if not str(v).startswith("pass")}
        if failed or f.mode not in ("own", "audited") or r.record and not f.audit:
            yield "proof", f"mode {f.mode}, {failed}: score it with --audit, not --trust", name
        if r.record:
            yield from check_record(name, f)


def check_record(name, f):
    """The record track: 8xH100, 600 s each, fineweb."""
    seconds = f.train_seconds, f.eval_seconds, f.config.get("max_seconds")
    device = str(f.environment.get("device"))
    documents = f.dataset.get("name"), f.dataset.get("val_docs")
    n_bytes = f.dataset["val_bytes"]
    if (max(seconds) > rules.CLOCK_SECONDS or not re.search(r"8 ?x.{0,12}H100", device)
            or documents != rules.DOCUMENTS or abs(n_bytes / rules.DOCUMENTS_BYTES - 1) > 5e-4):
        yield "track", (f"ran on {device} for {seconds} s (training, scoring, allowed), scored on "
                        f"{documents} of {n_bytes} bytes; not 8xH100, over 600 s or other documents "
                        f"than {rules.DOCUMENTS} of {rules.DOCUMENTS_BYTES}"), name


def check_summary(r):
    """submission.json and README say what the logs say."""
    if not r.seeds:
        return
    expected = summarise([*r.seeds.values()])
    for key in sorted(expected.keys() - SHARED):
        if r.json.get(key) != expected[key]:
            yield "log-score", f"{key} is {r.json.get(key)}, by the logs {expected[key]}"
    readme = r.texts["README.md"]
    if f"{expected['val_bpb']:.6f}" not in readme:
        yield "readme", f"does not say {expected['val_bpb']:.6f}, the val_bpb", "README.md"
    if "(write this)" in readme:
        yield "readme-words", "the author's part is still empty", "README.md"


# ---- sources and lineage


def check_sources(r):
    """The sources are those that ran, and none of them changes the judge."""
    hashes = part(r.json, "source_sha256")
    here = [name for name in r.files if name.endswith(".py")]
    for name in sorted({"train_gpt.py", *hashes, *here}):
        known = rules.SOURCE_NAME.fullmatch(name) and (ROOT / name).exists()
        # What a record leaves out comes from its commit, or from the root.
        allowed = [committed(r.json.get("commit"), name), (ROOT / name).read_bytes() if known else b""]
        data = r.files.get(name, allowed[0] or allowed[1])
        if sha256(data).hexdigest() != hashes.get(name):
            yield "source-hash", "is not the source that ran, by its sha256", name
        if name == "eval_bpb.py":
            data, *allowed = (source.partition(JUDGE)[2] for source in (data, *allowed))
        if name not in ("train_gpt.py", "pack.py") and not (data and data in allowed):
            yield "judge", "is not the root's, which scores", name


def check_parent(r):
    name = r.json.get("parent")
    if name not in {None, *known_records()} - {r.folder.name}:
        yield "parent", f"{name!r} is no record here; null where there is none"
    elif name and r.record:
        ours = {str(facts["seed"]): facts["val_bpb"] for facts in r.seeds.values()}
        c = comparison(ours, read_entry(name)["scores"], nats_per_bit(r.json["dataset"]))
        if c["p_written"] >= rules.RULE_P:
            yield "significance", (f"{c['gain_nats']:+.4f} nats over the parent: p "
                                   f"{c['p_written']:.2g} for {rules.RULE_NATS} or more")


def hidden_code(data):
    """Source bytes -> what would run or load code which is not written there.

    By words alone, under whatever alias: a name, a part of a module's name, an attribute, an
    argument, a whole string. What is put together at run time is the business of the sandbox.
    """
    if rules.COOKIE.match(data):
        yield "of another coding: comments may be code"
    try:
        words = rules.SAFE.sub("", ast.dump(ast.parse(data.decode("utf-8-sig"))))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        words = ""
        yield f"does not parse: {e!r}"
    for m in rules.HIDING.finditer(words):
        yield f"{m[0]}: what runs is not written here"


def check_code(r):
    """No code that is not written there. The only check that takes seconds, so the last."""
    for name, data in r.files.items():
        for what in hidden_code(data) if name.endswith(".py") else ():
            yield "plain-source", what, name


CHECKS = (check_files, check_json, check_texts, check_logs, check_seeds, check_summary,
          check_parent, check_sources, check_code)


def review(folder, report):
    """All that the files of one folder can tell, each finding reported as it is made -> {what and
    its sha256: rule on its copies}."""
    r = SimpleNamespace(folder=Path(folder).resolve(), record=False)
    r.files = {}   # name: bytes, of what may be read
    r.texts = {}
    r.json = {}    # submission.json
    r.seeds = {}   # name of a log: the facts at its end
    shown = Counter()
    for check in CHECKS:
        try:
            for rule, *where in check(r):
                shown[rule] += 1
                if shown[rule] <= rules.SHOWN_LIMIT:
                    report(finding(rule, *where))
        except Exception as e:   # of values that no one expects: the others still speak
            report(finding("review-limit", f"{check.__name__} stopped at {e!r}", "."))
    hashes = {f"artifact {facts['artifact_sha256']}": "copy" for facts in r.seeds.values()}
    source = r.files.get("train_gpt.py")
    if source and source != committed(r.json.get("commit"), "train_gpt.py"):
        hashes[f"train_gpt.py {sha256(source).hexdigest()}"] = "same-source"
    return hashes


# ---- many folders


def child(folder):
    """The child's main: limits; a JSON line on stdout for each finding, the last for the hashes."""
    with suppress(ImportError, AttributeError, ValueError, OSError):   # not on this system
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (rules.CHILD_SECONDS, rules.CHILD_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_AS, (rules.CHILD_BYTES, rules.CHILD_BYTES))
        signal.alarm(4 * rules.CHILD_SECONDS)

    def say(value):
        print(json.dumps(value), flush=True)
    say(review(folder, say))


def review_in_child(folder):
    """-> (findings, hashes) of one folder; whatever ended its reader is a finding too."""
    if not os.path.isdir(folder):
        rule = "stray-file" if os.path.lexists(folder) else "missing-folder"
        return [finding(rule, "is no folder", ".")], {}
    out = subprocess.run([sys.executable, __file__, "--child", folder], capture_output=True)
    values = [json.loads(line) for line in out.stdout.split(b"\n")[:-1]]
    if not out.returncode:
        return values[:-1], values[-1]
    return [*values, finding("review-limit", f"not read to the end: its reader ended with "
                             f"{out.returncode}, {out.stderr[-160:]}", ".")], {}


def find_copies(hashes):
    """{folder: {hash: rule}} -> findings, one for each folder that shares something with another."""
    first = {}
    found = {}
    for folder in sorted(hashes):
        for key, rule in hashes[folder].items():
            other = first.setdefault(key, folder)
            if other != folder:
                found[rule, folder, other] = finding(rule, f"the same {key[:24]} as {other}", folder)
    return [*found.values()]


def show(name, findings, done):
    """Prints a folder's line with its findings below it, and keeps them in done."""
    done[name] = findings
    counts = Counter(f["level"] for f in findings)
    print(f"{name}: {', '.join(f'{n} {level}' for level, n in counts.items()) or 'clean'}")
    for f in findings:
        line = "  {level} {rule} {file} {message} [{source}]".format(**f)
        print(printable(line, "ascii"))
    sys.stdout.flush()


def review_all(folders, jobs, done):
    """Reviews folders side by side, each shown as soon as it is read; then the copies, also of the
    records that are here already."""
    here = {Path(folder).resolve() for folder in folders}
    names = [*folders, *(str(path) for path in known_records().values() if path not in here)]
    hashes = {}
    with ThreadPool(jobs) as pool, Progress("reviewed", len(names), "folders") as progress:
        for name, (findings, found) in zip(names, pool.imap(review_in_child, names)):
            progress.add()
            name = printable(name, "ascii")
            hashes[name] = found
            if len(hashes) <= len(folders):
                show(name, findings, done)
    if copies := find_copies(hashes):
        show("between the folders", copies, done)


def print_table(done):
    """-> the exit code."""
    print("---")
    code = 0
    for level, worse in (("FAIL", 1), ("FLAG", 4)):
        for name in done:
            if names := {f["rule"] for f in done[name] if f["level"] == level}:
                print(f"{level}  {name}: {', '.join(sorted(names))}")
                code = code or worse
    print(f"{sum(not found for found in done.values())} of {len(done)} clean")
    return code


# ---- commits; the judge


def change_set(ref):
    """-> (findings on what was committed since the merge base with ref; the folders added)."""
    base = git("merge-base", "--end-of-options", ref, "HEAD").decode().strip()
    found = []
    folders = set()
    for line in git("diff", "--name-status", "--no-renames", base, "HEAD").decode().splitlines():
        name = line.partition("\t")[2]
        if m := rules.ADDED.match(line):
            folders.add(str(ROOT / m[1]))
        elif name != "records/README.md":   # generated
            found.append(finding("change-set", "a change set only adds a record's folder", name))
    if len(folders) != 1:
        found.append(finding("change-set", f"one record, not {len(folders)}", "records"))
    return found, sorted(folders)


def rescore(folder, artifact, data):
    """Runs the root's judge on the artifact and compares with the record's claim -> findings."""
    record = read_json(Path(folder, "submission.json"))
    data = data or part(record, "dataset").get("name")
    with tempfile.TemporaryDirectory() as work:
        out = Path(work, "score.json")
        judge = [ROOT / "eval_bpb.py", artifact, f"--data={data}", f"--out={out}"]
        code = subprocess.run([sys.executable, *judge], stdout=sys.stderr).returncode
        score = read_if_there(out)
    found = score.get("val_bpb")
    rows = part(record, "seed_results").values()
    claims = {row["artifact_sha256"]: row["val_bpb"] for row in rows}
    claim = claims.get(score.get("artifact_sha256"))
    if is_number(found) and claim and abs(claim - found) < 5e-4:   # another machine's kernels
        return []
    return [finding("rescore", f"the judge exits {code} and finds {found}, the record claims {claim} "
                    "of this artifact", artifact)]


def main():
    if sys.argv[1:2] == ["compare"]:
        return compare(sys.argv[2:])
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2])
    args = flags_of(__doc__, "folders", base="", rescore="", data="", jobs=os.cpu_count(),
                    json="").parse_args()
    done = {}   # folder: findings
    folders = [name for name in args.folders if Path(name).resolve().parent not in OURS]
    if args.base:
        findings, added = change_set(args.base)
        show("change set", findings, done)
        folders += added
    if not (folders or done) or args.rescore and len(folders) != 1 or args.jobs < 1:
        raise BadInput("name record folders, or --base=REF; one with --rescore; --jobs=1 at least")
    try:
        review_all(folders, args.jobs, done)
        if args.rescore:
            show("rescore", rescore(folders[0], args.rescore, args.data), done)
    finally:
        code = print_table(done)
        if args.json:
            with atomic_write(args.json, "w") as f:
                json.dump(done, f, indent=1)
    return code


if __name__ == "__main__":
    sys.exit(command(main))
