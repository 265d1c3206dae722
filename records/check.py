"""Review record folders without running anything in them, and compare runs.

    python records/check.py FOLDER...                     review; nothing in a folder is executed
    python records/check.py --base=REF                    the commits since REF only add one record?
    python records/check.py FOLDER --rescore=ARTIFACT     also run the root's judge on the artifact
    python records/check.py compare RUN... -- RUN...      is the left side better? Paired by seed

A line a folder as soon as it is read, its findings below it, `LEVEL rule file:line message
[source]`; at the end copies between the folders and a table, worst first. rules.py has all rules.
Exit code by the worst finding: 0 INFO or none, 4 FLAG, 1 FAIL; 2 bad input. `compare` exits 0.

The bytes under review are hostile. A child process with limits on time and memory reads each
folder; it follows no link and opens only regular files under a size limit. What it found before
something stopped it stands, and that it was stopped is a FAIL. What no reader of files can prove
(no look-ahead, score before learn) the judge proves: its verdicts stand in the logs, and --rescore
repeats them.
"""
import ast
import datetime
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

os.environ["OPENBLAS_NUM_THREADS"] = "1"   # of the children too: threads take address space
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)   # not records/: nothing here may shadow a package
from data.dataset import BadInput, Parser, Progress, atomic_write, command
from records import rules
from records.folders import (SHARED, check_facts, committed, git, is_number, known_records,
                             nats_per_bit, part, read_entry, read_json, summarise)
from records.rules import LEVELS, RULES, TRACKS
from records.stats import compare, comparison

JUDGE = b"\n# The judge. Below this line nothing may be changed"


def printable(text):
    """One line of ASCII, whatever is in it."""
    return str(text)[:300].encode("unicode_escape").decode()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def finding(rule, message, file="submission.json", line=1):
    level, source = RULES[rule]
    return {"level": level, "rule": rule, "file": printable(file), "line": line,
            "message": printable(message), "source": source}


class Review:
    """One folder under review, and what is known of it."""

    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        self.files = []        # names of what may be read
        self.json = {}
        self.seeds = {}        # name of a log: the facts at its end
        self.record = False    # whether it asks for the record track

    def read(self, name):
        """The bytes of one of the folder's files, b"" where there is none that may be read."""
        return (self.folder / name).read_bytes() if name in self.files else b""

    def text(self, name):
        return self.read(name).decode("utf-8", "replace")

    def committed(self, name):
        return committed(str(self.json.get("commit")), name)


# ---- the folder. Each check yields (rule, message, file, line); file and line may be left out


def check_files(r):
    """Fills r.files without following a link; whatever is not a plain small file is a finding."""
    paths = [*itertools.islice(r.folder.rglob("*"), rules.ENTRY_LIMIT)]
    if len(paths) == rules.ENTRY_LIMIT:
        yield "review-limit", f"{len(paths)} files or more; the rest is not read", "."
    room = rules.FOLDER_LIMIT
    for path in sorted(paths):
        name = path.relative_to(r.folder).as_posix()
        size = path.lstat().st_size
        limit = rules.SOURCE_LIMIT if name.endswith(".py") else rules.FILE_LIMIT
        if not re.fullmatch(r"[A-Za-z0-9._+-]+", path.name):
            yield "file-name", "letters, digits and ._+- only", name
        if rules.FORBIDDEN.search(name):
            yield "forbidden-file", "does not belong in a record", name
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield "link", "a link or a special file; not followed, not opened", name
        elif path.is_file() and size > min(room, limit):
            yield "file-size", f"{size:,} bytes are too many; not read", name
        elif path.is_file():
            r.files.append(name)
            room -= size
    for name in ("README.md", "submission.json", "train_gpt.py"):
        if not r.read(name):
            yield "missing-file", "is missing or empty", name


def check_json(r):
    """Fills r.json; what no log says."""
    r.json = {**json.loads(r.read("submission.json"))}   # a TypeError where it is no object
    for key in ("author", "github_id", "name", "blurb", "commit"):
        if not (isinstance(r.json.get(key), str) and r.json[key]):
            yield "json", f"{key}: missing, empty or no text"
    day = r.folder.name[:10]
    above = r.folder.parent.name
    track = r.json.get("track")
    r.record = track == TRACKS[0]
    if track not in TRACKS or above in TRACKS and above != track:
        yield "track", f"track {track!r} in the folder {above}; known: {', '.join(TRACKS)}"
    if not rules.FOLDER_NAME.fullmatch(r.folder.name):
        yield "folder-name", f"{r.folder.name}: YYYY-MM-DD_short-slug is expected", "."
    if r.json.get("date") != day or day > str(datetime.date.today()):
        yield "date", f"date {r.json.get('date')} in the folder {r.folder.name}"


def check_texts(r):
    """Keys and paths of one machine in any file."""
    for name in r.files:
        text = r.text(name)
        for rule, pattern in (("secret", rules.SECRET), ("machine-path", rules.MACHINE_PATH)):
            if m := pattern.search(text):
                yield rule, f"{m[0][:8]}...", name, text.count("\n", 0, m.start()) + 1


# ---- the seeds


def check_logs(r):
    """Fills r.seeds; and what stands in a log does not say otherwise than its end."""
    for name in r.files:
        body, _, end = r.text(name).rpartition("\n---\n")
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
        facts["step"] = facts["steps"]
        ratio = nats_per_bit(facts["dataset"])
        for n, line in enumerate(body.splitlines()[:20_000], 1):
            said = dict(re.findall(r"\b([a-z_]{1,20}): ?(\d{1,12}(?:\.\d{1,9})?)\b", line[:400]))
            for key in said.keys() & {"train_seconds", "step", "tokens", "artifact_bytes"}:
                if float(said[key]) > facts[key] + 0.1:
                    yield "log", f"{key} {said[key]}, but {facts[key]} at its end", name, n
            if said.keys() > {"step", "val_loss", "val_bpb"}:   # of some documents, rounded
                nats = float(said["val_loss"]) / max(float(said["val_bpb"]), 1e-9)
                if abs(nats / ratio - 1) > 0.1:
                    yield "byte-count", f"val_loss is {nats:.3f} val_bpb, not {ratio:.3f}", name, n
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
        if abs(f.val_loss / (f.val_bpb * nats_per_bit(f.dataset)) - 1) > 1e-5:
            yield "arithmetic", "val_bpb is not val_loss by the dataset's tokens and bytes", name
        if f.artifact_bytes > rules.CAP_BYTES:
            yield "artifact-cap", f"{f.artifact_bytes:,} bytes, over {rules.CAP_BYTES:,}", name
        if f.mode not in ("own", "audited") or r.record and not f.audit:
            yield "proof", f"mode {f.mode}: score it with --audit, not --trust", name
        for proof, verdict in f.audit.items():
            if not str(verdict).startswith("pass"):
                yield "proof", f"{proof}: {verdict}", name
        if r.record:
            yield from check_record(name, f)


def check_record(name, f):
    """The record track: 8xH100, 600 s each, fineweb."""
    data = f.dataset
    limit = f.config.get("max_seconds")
    device = f.environment.get("device")
    if max(f.train_seconds, f.eval_seconds, limit) > rules.CLOCK_SECONDS:
        yield "track", (f"train_seconds {f.train_seconds}, eval_seconds {f.eval_seconds}, "
                        f"max_seconds {limit}: over 600"), name
    if not re.search(r"8 ?x.{0,12}H100", str(device)):
        yield "track", f"ran on {device}; the record track is 8xH100", name
    if (data.get("name"), data.get("val_docs")) != ("fineweb", rules.FINEWEB_DOCS) or abs(
            data["val_bytes"] / rules.FINEWEB_BYTES - 1) > 5e-4:
        yield "track", (f"scored on {data.get('name')}, {data.get('val_docs')} documents, "
                        f"{data['val_bytes']} bytes, not fineweb's {rules.FINEWEB_DOCS}, "
                        f"{rules.FINEWEB_BYTES}"), name
    if f.val_bpb < rules.BEST_PUBLIC_BPB - 0.02:
        yield "odd-score", f"the best public score is {rules.BEST_PUBLIC_BPB}", name


def check_summary(r):
    """submission.json and README say what the logs say."""
    if not r.seeds:
        return
    expected = summarise([*r.seeds.values()])
    for key in sorted(expected.keys() - SHARED):
        if r.json.get(key) != expected[key]:
            yield "log-score", f"{key} is {r.json.get(key)}, by the logs {expected[key]}"
    if len(r.seeds) > 2 and expected["val_bpb_std"] < 5e-5:
        yield "odd-score", f"a standard deviation of only {expected['val_bpb_std']:.6f}"
    readme = r.text("README.md")
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
        allowed = [r.committed(name), (ROOT / name).read_bytes() if known else None]
        data = r.read(name) if name in r.files else allowed[0]
        if data is None:
            yield "commit", "neither here nor at a commit that is known: the root's", name
            data = allowed[1] or b""
        if sha256(data) != hashes.get(name):
            yield "source-hash", "is not the source that ran, by its sha256", name
        if name == "eval_bpb.py":
            allowed = [source and source.partition(JUDGE)[2] for source in allowed]
            data = data.partition(JUDGE)[2]
        if name not in ("train_gpt.py", "pack.py") and data not in allowed:
            yield "judge", "is not the root's, which scores", name


def check_parent(r):
    name = r.json.get("parent")
    if name is not None and (name == r.folder.name or name not in known_records()):
        yield "parent", f"{name!r} is no record here; null where there is none"
    elif name and r.record:
        ours = {str(facts["seed"]): facts["val_bpb"] for facts in r.seeds.values()}
        c = comparison(ours, read_entry(name)["scores"], nats_per_bit(r.json["dataset"]))
        if c["p_written"] >= rules.RULE_P:
            yield "significance", (f"{c['gain_nats']:+.4f} nats over the parent: p "
                                   f"{c['p_written']:.2g} for {rules.RULE_NATS} or more")


def hidden_code(data):
    """Source bytes -> (line, what) of all that would run or load code which is not written there.

    By words alone, under whatever alias: a name, a part of a module's name, an attribute, an
    argument, a whole string. What is put together at run time is the business of the sandbox.
    """
    head = b"\n".join(data.splitlines()[:2])
    cookie = re.search(rb"coding[:=][ \t]*([-\w.]+)", head)
    if cookie and cookie[1].lower() != b"utf-8":
        yield 1, f"{cookie[0].decode()}: comments may be code"
        return
    try:
        tree = ast.parse(data.decode("utf-8-sig"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        yield 1, f"does not parse: {e!r}"
        return
    for node in ast.walk(tree):
        bad = rules.HIDING
        if isinstance(node, ast.Name):
            bad = bad | rules.BUILTINS
        value = getattr(node, "value", None)   # of an argument
        if isinstance(node, ast.keyword) and rules.SAFE.get(node.arg) is getattr(value, "value", 0):
            continue
        for _, value in ast.iter_fields(node):
            for word in bad.intersection(value.split(".") if isinstance(value, str) else ()):
                yield getattr(node, "lineno", 1), f"{word}: what runs is not written here"


def check_code(r):
    """No code that is not written there. The only check that takes seconds, so the last."""
    for name in r.files:
        for line, what in hidden_code(r.read(name)) if name.endswith(".py") else ():
            yield "plain-source", what, name, line


CHECKS = (check_files, check_json, check_texts, check_logs, check_seeds, check_summary,
          check_parent, check_sources, check_code)


def review(folder, report):
    """All that the files of one folder can tell, each finding reported as it is made -> {what and
    its sha256: rule on its copies}."""
    r = Review(folder)
    shown = Counter()
    for check in CHECKS:
        try:
            for what in check(r):
                shown[what[0]] += 1
                if shown[what[0]] <= rules.SHOWN_LIMIT:
                    report(finding(*what))
        except Exception as e:   # of values that no one expects: the others still speak
            report(finding("review-limit", f"{check.__name__} stopped at {e!r}", "."))
    hashes = {}
    for name, facts in r.seeds.items():
        hashes[f"artifact {facts['artifact_sha256']}"] = "copy"
        hashes[f"log {sha256(r.read(name))}"] = "copy"
    source = r.read("train_gpt.py")
    if source not in (b"", r.committed("train_gpt.py")):
        hashes[f"train_gpt.py {sha256(source)}"] = "same-source"
    return hashes


# ---- many folders


def child(folder):
    """The child's main: limits; a JSON line on stdout for each finding; last {"hashes": ...}."""
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (rules.CHILD_SECONDS, rules.CHILD_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_AS, (rules.CHILD_BYTES, rules.CHILD_BYTES))
        signal.alarm(4 * rules.CHILD_SECONDS)
    except (ImportError, AttributeError, ValueError, OSError):
        pass  # not on this system; the size limits remain

    def say(value):
        print(json.dumps(value), flush=True)
    say({"hashes": review(folder, say)})


def review_in_child(folder):
    """-> (findings, hashes) of one folder; whatever ended its reader is a finding too."""
    if not os.path.isdir(folder):
        rule = "stray-file" if os.path.lexists(folder) else "missing-folder"
        return [finding(rule, "is no folder", ".")], {}
    out = subprocess.run([sys.executable, __file__, "--child", folder], capture_output=True)
    values = [json.loads(line) for line in out.stdout.split(b"\n")[:-1]]
    if values and "hashes" in values[-1]:
        return values[:-1], values[-1]["hashes"]
    why = out.stderr.decode("utf-8", "replace").strip()[-160:]
    return [*values, finding("review-limit", f"not read to the end: its reader ended with "
                             f"{out.returncode}, allowed {rules.CHILD_SECONDS} s and "
                             f"{rules.CHILD_BYTES >> 30} GiB {why}", ".")], {}


def find_copies(hashes):
    """{folder: {hash: rule}} -> findings, one for each group of folders that share something."""
    holders = {}
    for folder in sorted(hashes):
        for key, rule in hashes[folder].items():
            holders.setdefault((rule, key), []).append(folder)
    found = {}
    for (rule, key), folders in holders.items():
        if len(folders) > 1:
            what = f"the same {key[:24]} as {folders[1]}, {len(folders)} folders in all"
            found.setdefault((rule, *folders), finding(rule, what, folders[0]))
    return [*found.values()]


def worst(findings):
    return max((LEVELS.index(f["level"]) for f in findings), default=0)


def show(name, findings, done):
    """Prints a folder's line with its findings below it, and keeps them in done."""
    done[name] = findings
    counts = Counter(f["level"] for f in findings)
    print(f"{name}: {', '.join(f'{n} {level}' for level, n in counts.items()) or 'clean'}")
    for f in findings:
        print("  {level} {rule} {file}:{line} {message} [{source}]".format(**f))
    sys.stdout.flush()


def review_all(folders, jobs, done):
    """Reviews folders side by side, each shown as soon as it is read; then the copies, also of the
    records that are here already."""
    here = {Path(folder).resolve() for folder in folders}
    known = [str(path) for path in known_records().values() if path not in here]
    hashes = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = {pool.submit(review_in_child, name): name for name in [*folders, *known]}
        with Progress("reviewed", len(waiting), "folders") as progress:
            for future in as_completed(waiting):
                name = printable(waiting[future])
                findings, hashes[name] = future.result()
                progress.add()
                if name not in known:
                    show(name, findings, done)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if copies := find_copies(hashes):
        show("between the folders", copies, done)


def print_table(done):
    print("---")
    bad = [name for name in done if worst(done[name])]
    for name in sorted(bad, key=lambda name: -worst(done[name])):
        names = sorted({f["rule"] for f in done[name]})
        print(f"{LEVELS[worst(done[name])]}  {name}: {', '.join(names)}")
    print(f"{len(done) - len(bad)} of {len(done)} clean")


# ---- commits; the judge


def change_set(ref):
    """-> (findings on what was committed since the merge base with ref; the folders added)."""
    base = git("merge-base", "--end-of-options", ref, "HEAD").decode().strip()
    words = git("diff", "--name-status", "--no-renames", "-z", base, "HEAD").decode().split("\0")
    found = []
    folders = set()
    for status, name in zip(words[0::2], words[1::2]):
        m = re.match(rf"(records/(?:{'|'.join(TRACKS)})/[^/]+)/", name)
        if m and status == "A":
            folders.add(str(ROOT / m[1]))
        elif name != "records/README.md":   # generated
            found.append(finding("change-set", "a change set only adds a record's folder", name))
    if len(folders) != 1:
        found.append(finding("change-set", f"one record, not {len(folders)}", "records"))
    return found, sorted(folders)


def rescore(folder, artifact, data):
    """Runs the root's judge on the artifact and compares with the record's claim -> findings."""
    if os.path.isdir(artifact):
        artifact = os.path.join(artifact, "artifact.pyz")
    submission = read_json(Path(folder, "submission.json"))
    data = data or part(submission, "dataset").get("name")
    with tempfile.TemporaryDirectory() as work:
        out = Path(work, "score.json")
        judge = [ROOT / "eval_bpb.py", artifact, f"--data={data}", f"--out={out}"]
        code = subprocess.run([sys.executable, *judge], stdout=sys.stderr).returncode
        score = read_json(out) if out.exists() else {}
    found = score.get("val_bpb")
    for row in part(submission, "seed_results").values():
        if row["artifact_sha256"] == score.get("artifact_sha256") and is_number(found):
            if abs(row["val_bpb"] - found) < 5e-4:   # another machine's kernels
                return []
    return [finding("rescore", f"the judge exits {code} and finds {found}; no seed of the record "
                    "claims that of this artifact", artifact)]


def main():
    if sys.argv[1:2] == ["compare"]:
        return compare(sys.argv[2:])
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2])
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # `| head` is no error
    p = Parser(description=__doc__)
    p.add_argument("folders", nargs="*", metavar="FOLDER", help="record folders")
    p.add_argument("--base", metavar="REF", help="review what was committed since this reference")
    p.add_argument("--rescore", metavar="ARTIFACT", help="artifact.pyz or run, to be judged again")
    p.add_argument("--data", metavar="NAME", help="dataset of --rescore; empty: the record's")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="folders at once")
    p.add_argument("--json", metavar="FILE", help="write every finding here, too")
    args = p.parse_args()
    done = {}   # folder: findings
    folders = args.folders
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
        print_table(done)
        if args.json:
            with atomic_write(args.json, "w") as f:
                json.dump(done, f, indent=1)
    return (0, 4, 1)[max(map(worst, done.values()), default=0)]


if __name__ == "__main__":
    sys.exit(command(main))
