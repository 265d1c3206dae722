"""Review record folders without running anything in them, and compare runs.

    python records/check.py FOLDER...                     review; nothing in the folder is executed or imported
    python records/check.py --base=REF                    also check that this change set only adds one record
    python records/check.py FOLDER --rescore=ARTIFACT     also run this repository's judge on the artifact, isolated
    python records/check.py compare RUN... -- RUN...      is the left side better? Paired where the seeds match

One finding a line: `LEVEL rule file:line message [source of the rule]`; rules.py has them all. Records of this
repository are read strictly, folders from elsewhere leniently (--mode). Exit code by the worst finding: 0 INFO or none,
4 FLAG, 1 FAIL; 2 bad input. `compare` exits 0.

What no reader of files can prove (normalised scores, no look-ahead, score before learn) the judge proves by
construction and by replay, `eval_bpb.py --audit`: its verdicts stand in submission.json and --rescore repeats them.
The bytes under review are hostile. A child process with limits on time and memory reads each folder; it follows no
link, opens only regular files under a size limit, and decodes wrapped sources within limits. What stops it is itself a
finding.
"""
import ast
import datetime
import hashlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "records"]  # no shadowed packages
from data.dataset import BadInput, Parser, command
from records.ledger import CAP_BYTES, is_number, load_submission, parse_json, part, read_regular, seed_results
from records.rules import (BAD_TOKEN_COUNTS, BEST_PUBLIC_BPB, BYTES_PER_TOKEN, CHILD_BYTES, CHILD_CPU_SECONDS,
                           CLOCK_SECONDS, CLOCK_SLACK, ENTRY_LIMIT, FILE_LIMIT, FINDING_LIMIT, FINEWEB_VAL_BYTES,
                           FINEWEB_VAL_DOCS, FORBIDDEN, LEVELS, PRACTISED_P, RULE_NATS, RULE_P, RULES, TRACKS)
from records.sources import changes, content, definitions, fingerprint, parse, scan, scan_text
from records.stats import compare, comparison, nats_per_bit

NEEDED = ("README.md", "submission.json", "train_gpt.py")
PROOFS = {"replay", "lengths"}   # of eval_bpb.py --audit
FOLDER_NAME = re.compile(r"\d{4}-\d\d-\d\d_[A-Za-z0-9._-]+")


def printable(text):
    """One line whatever is in it: control characters, line ends and lone surrogates are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[:400])


def known_records(records=ROOT / "records"):
    """The record folders of this repository, oldest first."""
    found = (p for track in TRACKS for p in (records / track).glob("*") if (p / "submission.json").is_file())
    return sorted((p for p in found if FOLDER_NAME.fullmatch(p.name) and not p.is_symlink()), key=lambda p: p.name)


class Review:
    """One folder under review: its regular files, its findings, and what the rules share."""

    def __init__(self, folder, strict):
        self.folder, self.strict, self.findings = Path(folder), strict, []
        self.name, self.track = self.folder.resolve().name, self.folder.resolve().parent.name
        self.files, self.names, self.trees, self.scanned = {}, set(), {}, 0   # files {name: bytes}; names of everything
        self.inner = {}   # {name: text} of sources that were wrapped
        self.json, self.requirements, self.record = {}, set(), self.track != TRACKS[1]

    def emit(self, rule, file, message, line=0):
        strict, lenient, source = RULES[rule]
        if len(self.findings) < FINDING_LIMIT:
            self.findings.append({"level": strict if self.strict else lenient, "rule": rule, "file": printable(file),
                                  "line": line, "message": printable(message), "source": source})

    def claim(self, rule, message):
        self.emit(rule, "submission.json", message)

    def walk(self):
        """Fills self.files without following a link; whatever is not a regular file is a finding."""
        pending = [""]
        while pending:
            folder = pending.pop()
            try:
                entries = list(itertools.islice(os.scandir(self.folder / folder), 100 * ENTRY_LIMIT))
                entries.sort(key=lambda e: (e.name not in NEEDED and not e.name.endswith(".log"), e.name))
            except OSError as e:
                self.emit("review-limit", folder or ".", f"cannot be listed: {e.strerror}")
                continue
            for entry in entries[:ENTRY_LIMIT]:
                name = f"{folder}/{entry.name}" if folder else entry.name
                self.names.add(name)
                if not re.fullmatch(r"[A-Za-z0-9._+-]+", entry.name):
                    self.emit("file-name", name, "letters, digits and ._+- only")
                for pattern, what in FORBIDDEN:
                    if pattern.search(name):
                        self.emit("forbidden-file", name, f"{what} does not belong in a record")
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name)
                elif not entry.is_file(follow_symlinks=False):
                    self.emit("link", name, "a link or a special file; not followed, not opened")
                else:
                    self.files[name] = entry.stat(follow_symlinks=False).st_size
                    if self.files[name] > FILE_LIMIT:
                        self.emit("file-size", name, f"{self.files[name]:,} bytes, over {FILE_LIMIT:,}; not read")
            if len(self.names) >= ENTRY_LIMIT:
                return self.emit("review-limit", ".", f"{ENTRY_LIMIT} files or more; the rest was not read")

    def read(self, name):
        """The bytes of one of the folder's files, b"" where there are none to be had (the walk or this says why)."""
        try:
            fits = self.files.get(name, FILE_LIMIT + 1) <= FILE_LIMIT
            return read_regular(self.folder / name, FILE_LIMIT) if fits else b""
        except OSError as e:
            self.emit("review-limit", name, f"cannot be read: {e.strerror}")
            return b""

    def text(self, name):
        return self.read(name).decode("utf-8", "replace")

    def logs(self):
        return sorted(n for n in self.files if n.endswith(".log") or re.search(r"(log|seed|train).*\.txt$", n))[:50]


def review_folder(folder, strict, known=""):
    """Everything that the files of one folder can tell -> list of findings. Runs in the child process."""
    r = Review(folder, strict)
    public = [p.parent for p in Path(known).glob("**/submission.json")] if known else []   # read as hostile too
    r.known = {p.name: p for p in known_records() + public if p.resolve() != r.folder.resolve()}
    r.walk()
    read_submission(r)
    check_package(r)
    for name in sorted(r.files):
        if name.endswith(".py"):
            try:
                scan(r, name, r.text(name))
            except RecursionError:
                r.emit("review-limit", name, "nested too deeply to be read")
        elif re.search(r"\.(sh|txt|log|md|json|toml|ya?ml|cfg|env)$", name):
            scan_text(r, name, r.text(name))
    checks = [check_numbers, check_bytes, check_scores, *[check_ours] * strict] if r.json else []
    for look in (*checks, check_logs, check_lineage):
        try:
            look(r)
        except Exception as e:   # of values that no one expects: the others still speak
            r.claim("review-limit", f"{look.__name__} stopped at {type(e).__name__}: {e}")
    once = {}   # one line a rule and family of files: numbers apart, the rest alike
    for f in r.findings:
        family = ".log" if f["file"] in r.logs() else re.sub(r"\d+", "#", f["file"])
        once.setdefault((f["rule"], family, re.sub(r"\d[\d.,]*", "#", f["message"])), []).append(f)
    for first, *more in once.values():
        text = (r.inner.get(first["file"]) or r.text(first["file"])).split("\n")
        if line := "".join(text[first["line"] - 1:first["line"]]).strip():
            first["message"] += f": {printable(line[:80])}"
        if others := sorted({f["file"] for f in more} - {first["file"]}):
            first["message"] += f" (and {len(others)} more like it, {others[-1]})"
    return [first for first, *_ in once.values()]


def read_submission(r):
    """submission.json -> r.json; what is wrong with it as JSON."""
    if "submission.json" in r.files:
        data = r.read("submission.json")
        try:
            try:
                value = parse_json(data)
            except ValueError as e:
                value = json.loads(data.decode("utf-8-sig"))   # a duplicate key or NaN only: worth reading on
                r.claim("json-strict", e)
            if not isinstance(value, dict):
                raise ValueError("a JSON object is expected")
            r.json = value
        except (ValueError, RecursionError) as e:
            r.emit("json", "submission.json", f"does not parse: {e}", getattr(e, "lineno", 0))
    names = re.findall(r"^[ \t]*([A-Za-z0-9_.-]+)", r.text("requirements.txt"), re.M)[:200]
    r.requirements = {n.lower().replace("-", "_") for n in names}
    r.record = r.record and not re.search(r"non|unlimited", str(r.json.get("track", "")).lower())


def check_package(r):
    day = r.name[:10]
    try:
        if not FOLDER_NAME.fullmatch(r.name):
            raise ValueError
        if datetime.date.fromisoformat(day) > datetime.date.today() + datetime.timedelta(1):
            r.emit("folder-date", ".", f"{day} is in the future")
        if str(r.json.get("date", day))[:10] != day:
            r.claim("folder-date", f"date {r.json['date']} is not the folder's")
    except ValueError:
        r.emit("folder-name", ".", f"{r.name}: YYYY-MM-DD_short-slug is expected")
    for needed in NEEDED:
        if not r.files.get(needed):
            r.emit("missing-file", needed, "is empty" if needed in r.files else "is missing")
    if (n := len(r.logs())) < (3 if r.record else 1):
        r.emit("log-count", ".", f"{n} training logs; a record needs 3" if r.record else "no training log")
    if r.strict and r.track not in TRACKS:
        r.emit("track", ".", f"a record stands in one of {', '.join(TRACKS)}")
    if "(write this)" in r.text("README.md"):
        r.emit("readme-words", "README.md", "the author's part is still empty")


def check_numbers(r):
    """Fields, budgets and hardware that submission.json states."""
    j = r.json
    fields = {"author": str, "github_id": (str, int), "name": str, "date": str, "val_bpb": (int, float)}
    if r.strict:
        fields |= {"val_loss": (int, float), "bytes_total": int, "seeds": list, "seed_results": dict, "track": str,
                   "hardware": str, "blurb": str, "dataset": dict, "source_sha256": dict,
                   "config": dict, "environment": dict}
    for key, kind in fields.items():
        if not isinstance(j.get(key), kind) or isinstance(j.get(key), bool) or j.get(key) == "":
            r.claim("json-field", f"{key}: {'wrong type or empty' if key in j else 'missing'}")
    if r.strict and j.get("track") != r.track:
        r.claim("track", f"track {j.get('track')!r} in the folder {r.track}")
    if r.record and ("hardware" in j or r.strict) and not re.search(r"8\s*x.{0,12}H100", str(j.get("hardware")), re.I):
        r.claim("track", f"hardware {j.get('hardware')!r}; the record track is 8xH100")
    clocks = {"train-clock": ("train_seconds", "wallclock_seconds", "training_seconds", "train_time_seconds"),
              "eval-clock": ("eval_seconds", "eval_time_seconds")}
    for who, row in [("", j)] + [(f"seed {s}: ", v) for s, v in seed_results(j)]:
        for key in ("val_bpb", "val_loss"):
            if row.get(key) is not None and not (is_number(row[key]) and row[key] > 0):
                r.claim("json-value", f"{who}{key} is {row[key]!r}")
        for key in ("bytes_total", "total_bytes", "artifact_bytes", "artifact_bytes_max", "submission_bytes"):
            if is_number(row.get(key)) and row[key] > CAP_BYTES:
                r.claim("artifact-cap", f"{who}{key} {row[key]:,} is {row[key] - CAP_BYTES:,} over {CAP_BYTES:,}")
        for rule, key in ((rule, key) for rule, keys in clocks.items() for key in keys):
            if r.record and is_number(row.get(key)) and row[key] > CLOCK_SECONDS + CLOCK_SLACK:
                r.claim(rule, f"{who}{key} {row[key]:g} is over {CLOCK_SECONDS}")


def check_bytes(r):
    """Totals add up, and no shipped code is left uncounted."""
    j = r.json
    code = next((j[k] for k in ("bytes_code", "code_bytes") if is_number(j.get(k))), None)
    model = next((v for k, v in j.items() if re.match(r"bytes_model|model_bytes", k) and is_number(v)), None)
    total = j.get("bytes_total", j.get("artifact_bytes"))
    if total is None and not any("artifact_bytes" in v for _, v in seed_results(j)):
        r.claim("json-field", "no total of bytes (bytes_total)")
    if code is not None and model is not None and is_number(total) and abs(total - code - model) > 16:
        r.claim("artifact-bytes", f"bytes_total {total:,} is not code {code:,} + model {model:,}")
    aside = re.compile(r"prepare|download|test|plot|human|plain|build")
    shipped = sum(size for n, size in r.files.items() if n.endswith((".py", ".cpp", ".cu")) and not aside.search(n))
    if not r.strict and code is not None and shipped > code * 1.02 + 64:
        r.claim("code-bytes", f"{shipped:,} bytes of code are shipped, {code:,} are counted")


def check_scores(r):
    """The score against its seeds, its own loss, and what is known to be possible."""
    j, bpb, results = r.json, r.json.get("val_bpb"), seed_results(r.json)
    if not is_number(bpb) or bpb <= 0:
        return
    if bpb < BEST_PUBLIC_BPB - 0.02 and part(j, "dataset").get("name", "fineweb") == "fineweb":
        r.claim("score-range", f"val_bpb {bpb}: more than 0.02 under the best public score, {BEST_PUBLIC_BPB}")
    scores = [v["val_bpb"] for _, v in results if is_number(v.get("val_bpb"))]
    seeds = [str(s) for s in (j["seeds"] if isinstance(j.get("seeds"), (list, dict)) else [s for s, _ in results])]
    if len(set(seeds)) < len(seeds):
        r.claim("seeds", f"a seed is named twice: {', '.join(seeds)}")
    if len(set(seeds)) < 3 and r.record:
        r.claim("seeds", f"{len(set(seeds))} seeds are named; a record needs 3")
    if results and set(seeds) != {s for s, _ in results}:
        r.claim("seeds", f"seeds {', '.join(seeds)} are not those of seed_results")
    if scores and abs(statistics.fmean(scores) - bpb) > (1e-6 if r.strict else 1.5e-4):
        r.claim("seed-mean", f"val_bpb {bpb} is not the mean of its seeds, {statistics.fmean(scores):.6f}")
    if len(scores) > 2 and statistics.stdev(scores) < 5e-5:
        r.claim("seed-spread", f"{len(scores)} seeds with a standard deviation of only {statistics.stdev(scores):.6f}")
    if not r.strict and is_number(j.get("val_loss")) and j["val_loss"] > 0:
        ratio = j["val_loss"] / math.log(2) / bpb
        if min(abs(ratio / known - 1) for known in BYTES_PER_TOKEN.values()) > 0.01:
            known = ", ".join(f"{k} {v}" for k, v in BYTES_PER_TOKEN.items())
            r.claim("bpb-arithmetic", f"val_loss and val_bpb give {ratio:.3f} bytes per token; known are {known}")


def check_ours(r):
    """What submit.py wrote, recomputed: the score from its parts, hashes from the files, the judge from the root."""
    j, results = r.json, seed_results(r.json)
    data, config, hashes = (part(j, key) for key in ("dataset", "config", "source_sha256"))
    factor = nats_per_bit(data)
    for who, row in [("", j)] + [(f"seed {s}: ", v) for s, v in results]:
        loss, bpb = row.get("val_loss"), row.get("val_bpb")
        if factor is None or not is_number(loss) or not is_number(bpb) or bpb <= 0:
            r.claim("json-field", f"{who}val_loss, val_bpb and the dataset's val_tokens and val_bytes are needed")
        elif abs(loss / (bpb * factor) - 1) > 1e-5:
            r.claim("bpb-arithmetic", f"{who}val_bpb {bpb} is not val_loss {loss} at {factor:.6f} nats per bit")
    docs, size = data.get("val_docs"), data.get("val_bytes")
    if data.get("name") == "fineweb" and (docs != FINEWEB_VAL_DOCS or abs((size or 0) / FINEWEB_VAL_BYTES - 1) > 5e-4):
        r.claim("val-count", f"{docs} documents of {size} bytes; fineweb has {FINEWEB_VAL_DOCS} of {FINEWEB_VAL_BYTES}")
    if r.record and data.get("name") != "fineweb":
        r.claim("val-count", f"dataset {data.get('name')!r}; the record track is scored on fineweb")
    if r.record and is_number(config.get("max_seconds")) and config["max_seconds"] > CLOCK_SECONDS:
        r.claim("clock-override", f"max_seconds {config['max_seconds']}")
    for seed, row in results:
        if row.get("limit_docs"):
            r.claim("limited-score", f"seed {seed} is scored on {row['limit_docs']} documents only")
        audit = part(row, "audit")
        for probe, verdict in audit.items():
            if not str(verdict).lower().startswith(("pass", "ok", "true")):
                r.claim("audit", f"seed {seed}: {probe}: {verdict}")
        if r.record and (missing := PROOFS - audit.keys()):
            r.claim("audit", f"seed {seed}: not proved by {', '.join(sorted(missing))}; score it with --audit")
    shas = Counter(row["artifact_sha256"] for _, row in results if row.get("artifact_sha256"))
    if copies := [s for s, row in results if shas[row.get("artifact_sha256")] > 1]:
        r.claim("seeds", f"seeds {', '.join(copies)} have the same artifact: copies of one run are not seeds")
    for key in ("source_sha256", "config_sha256"):
        if len({str(row.get(key)) for _, row in results}) > 1:
            r.claim("seeds", f"the seeds differ in {key}")
    for name in sorted({*hashes} | {n for n in r.files if n.endswith(".py")}):
        if hashlib.sha256(r.read(name)).hexdigest() != hashes.get(name):
            r.emit("source-hash", name, "is not the source that ran, by its sha256 in submission.json")
    for name in ("eval_bpb.py", "data/confine.py", "data/dataset.py", "data/tokenizer.py"):
        if name in r.trees:
            root = judge_half(ast.parse(source := (ROOT / name).read_text()), source)
            mine = judge_half(r.trees[name], r.text(name))
            if differ := sorted(k for k in mine.keys() | root.keys() if mine.get(k) != root.get(k)):
                r.emit("judge-changed", name, f"not the root's, which --rescore uses: {', '.join(differ[:8])}")


def judge_half(tree, source):
    """{name: code} of what no record may change: of eval_bpb.py all that stands below its first line `# The judge`."""
    line = source[:source.find("\n# The judge") + 1].count("\n")
    return definitions(ast.Module([n for n in tree.body if n.lineno > line], []))[0]


def check_logs(r):
    """Logs, submission.json and README agree; and what only logs tell: token counts, the clock, versions."""
    texts, results = {n: r.text(n) for n in r.logs()}, seed_results(r.json)
    torch = re.compile(r"(?i)\b(?:py)?torch(?:_version)?[ :='\"]{1,4}(\d+\.\d+\.\d+)")
    versions = sorted({v for t in texts.values() for v in torch.findall(t)})
    if len(versions) > 1:
        r.emit("environment", next(iter(texts)), f"the logs name different torch versions: {', '.join(versions[:5])}")
    for name, text in texts.items():
        for count, why in BAD_TOKEN_COUNTS.items():
            if re.search(rf"tokens[:= ]{{1,3}}{count}\b", text):
                r.emit("val-count", name, f"{count:,} validation tokens: {why}")
        slowest = max(map(int, re.findall(r"train_time:(\d{1,9})ms", text)), default=0)
        if r.record and slowest > 1000 * (CLOCK_SECONDS + CLOCK_SLACK):
            r.emit("train-clock", name, f"train_time {slowest:,} ms")
    found = [float(x) for t in texts.values() for x in re.findall(r"bpb[\w ]{0,20}[:= ]{1,3}(\d\.\d+)", t)]
    for seed, row in results:
        if r.strict:
            summary = re.findall(r"^(\w+): (\S+)$", r.text(str(row.get("log"))).rpartition("\n---\n")[2], re.M)
            summary, row = dict(summary), {**row, "seed": seed}
            for key in ("val_bpb", "artifact_bytes", "train_seconds", "steps", "seed"):
                if summary.get(key) != str(row.get(key)):
                    r.emit("log-score", row.get("log") or ".", f"seed {seed}: {key} {row.get(key)} in submission.json, "
                                                               f"{summary.get(key, 'missing')} in the log's summary")
        elif texts and is_number(row.get("val_bpb")) and not any(abs(x - row["val_bpb"]) < 1e-4 for x in found):
            r.claim("log-score", f"seed {seed}: val_bpb {row['val_bpb']} is in no log")
    bpb, readme = r.json.get("val_bpb"), r.text("README.md")
    said = [float(x) for x in re.findall(r"\d\.\d{2,10}", readme)]
    if readme and is_number(bpb) and not any(abs(x - bpb) < (1e-6 if r.strict else 6e-4) for x in said):
        r.emit("readme-score", "README.md", f"does not say {bpb:.4f}, the val_bpb of submission.json")


def check_lineage(r):
    """Copies, the nearest relative and what changed, parents that are unknown or were ruled invalid, significance."""
    rulings = {name: x for x in json.loads((ROOT / "records" / "rulings.json").read_bytes()) for name in x["records"]}
    others, said = r.known, r.json.get("parent", "missing")
    if r.strict and said is not None and not (isinstance(said, str) and said in others):
        r.claim("parent", f"parent {said!r} is no record here (null where there is none)")
    said = json.dumps([v for k, v in r.json.items() if re.search(r"parent|lineage|base|attribution|credit", k)])
    line, parent = [r.name], r.json.get("parent")
    while isinstance(parent, str) and parent in others and parent not in line:
        line.append(parent)
        try:
            parent = load_submission(others[parent]).get("parent")
        except BadInput:
            break
    for name in dict.fromkeys(line + [f"#{n}" for n in re.findall(r"\b\d{3,4}\b", said)]):
        if name in rulings:
            r.claim("tainted-parent", name + " was ruled invalid: {why} ({source}, {grade})".format(**rulings[name]))
    if len(line) > 1 and r.strict and r.record:
        check_significance(r, load_submission(others[line[1]]))
    if "train_gpt.py" not in r.trees:
        return
    near, folder = nearest_record(r.text("train_gpt.py"), others.values())
    if near > 0.3:
        trees = [parse(Review(folder, True), "", content(t)) for t in (r.text("train_gpt.py"), source_text(folder))]
        what = changes(*trees) if all(trees) else "not compared"
        r.emit("nearest", "train_gpt.py", f"{folder.name} shares {near:.1%}; {what}")
        if near > 0.99 and folder.name not in line:
            r.emit("near-copy", "train_gpt.py", f"{folder.name} up to names and constants, and not named as parent")


def source_text(folder):
    path = folder / "train_gpt.py"
    return read_regular(path, FILE_LIMIT).decode("utf-8", "replace") if path.is_file() else ""


def nearest_record(text, folders):
    """(shared part, 0 to 1; folder) of the record whose train_gpt.py is nearest to this text; (0, None) without one."""
    mine, near = fingerprint(content(text)), (0.0, None)
    for folder in folders:
        theirs = fingerprint(content(source_text(folder)))
        near = max(near, (len(mine & theirs) / max(len(mine | theirs), 1), folder), key=lambda x: x[0])
    return near


def check_significance(r, parent):
    ours, theirs = ({s: v["val_bpb"] for s, v in seed_results(x) if is_number(v.get("val_bpb"))}
                    for x in (r.json, parent))
    factor = nats_per_bit(part(r.json, "dataset"))
    if min(len(ours), len(theirs)) < 2 or factor is None:
        return r.claim("significance", "too few seeds for a test against the parent")
    c = comparison(ours, theirs, factor)
    if not c["written_rule"]:
        r.claim("significance", f"{c['gain_nats']:+.4f} nats over the parent; p {c['p_written']:.2g} for {RULE_NATS} "
                f"or more, the rule asks {RULE_P} (practised, any gain at p < {PRACTISED_P}: "
                f"{'met' if c['practised_rule'] else 'not met'}, p {c['p']:.2g})")


def git(*args):
    out = subprocess.run(["git", "-c", "core.fsmonitor=false", *args], cwd=ROOT, capture_output=True)
    if out.returncode:
        raise BadInput(f"git {args[0]}: {out.stderr.decode('utf-8', 'replace').strip()[:200]}")
    return out.stdout


def change_set(ref):
    """(findings on what changed since the merge base with ref; the record folders added). What is not committed counts
    below records/ only: the sources of the next idea are nobody's business yet."""
    r, folders = Review(ROOT, True), set()
    base = git("merge-base", "--end-of-options", ref, "HEAD").decode().strip()
    changed = []
    for where in ((base, "--", "records"), (base, "HEAD", "--", ":!records")):
        words = git("diff", "--name-status", "--no-renames", "--no-ext-diff", "-z", *where).split(b"\0")
        changed += zip(words[0:-1:2], words[1::2])
    untracked = git("ls-files", "--others", "--exclude-standard", "-z", "--", "records").split(b"\0")[:-1]
    changed += [(b"A", name) for name in untracked]
    if not changed:
        raise BadInput(f"nothing has changed since {ref}")
    for status, raw in changed:
        name = os.fsdecode(raw)
        parts = name.split("/")
        if len(parts) > 3 and parts[0] == "records" and parts[1] in TRACKS:
            folders.add("/".join(parts[:3]))
            if status != b"A":
                r.emit("change-set", name, "a record is only added, never changed or removed")
        elif name not in ("records/README.md", "records/leaderboard.svg"):   # generated from the folders
            r.emit("change-set", name, "is outside the new record's folder")
    if len(folders) != 1:
        r.emit("change-set", "records", f"one record a change set, not {len(folders)}: {', '.join(sorted(folders))}")
    return r.findings, [str(ROOT / f) for f in sorted(folders) if (ROOT / f).is_dir()]


def rescore(folder, artifact, data, strict):
    """Runs the root's judge on a copy of the artifact, isolated, and compares with the record's claim -> findings."""
    r, artifact = Review(folder, strict), Path(artifact)
    artifact = artifact / "artifact.pyz" if artifact.is_dir() else artifact
    try:
        blob = read_regular(artifact, CAP_BYTES)
    except OSError as e:
        raise BadInput(f"{artifact}: {e.strerror}") from None
    sha256 = hashlib.sha256(blob).hexdigest()
    submission = load_submission(folder)
    data = data or part(submission, "dataset").get("name")
    claims = {row.get("artifact_sha256"): (seed, row.get("val_bpb")) for seed, row in seed_results(submission)}
    if sha256 not in claims:
        r.claim("rescore", f"no seed has an artifact of sha256 {sha256[:12]}...")
        return r.findings
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "artifact.pyz"
        copy.write_bytes(blob)
        judge = [sys.executable, str(ROOT / "eval_bpb.py"), str(copy), "--audit"]
        judge += [f"--data={data}"] if data else []   # without it the judge says that it needs one
        out = subprocess.run(judge, cwd=ROOT, stderr=subprocess.PIPE, stdout=sys.stderr)
        score = parse_json((Path(work) / "score.json").read_bytes()) if out.returncode == 0 else {}
    (seed, claim), found = claims[sha256], score.get("val_bpb")
    if out.returncode:
        last = (out.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        r.emit("rescore", artifact.name, f"seed {seed}: the judge exits {out.returncode}: {last}")
    elif not (is_number(claim) and is_number(found) and abs(claim - found) < 5e-4):   # another machine's kernels
        r.emit("rescore", artifact.name, f"seed {seed}: claimed {claim}, the judge finds {found}")
    else:
        print(f"rescore: seed {seed}: claimed {claim:.6f}, the judge finds {found:.6f}", file=sys.stderr)
    return r.findings


def review_in_child(folder, strict, known=""):
    """review_folder in a process with limits -> findings; whatever ends that process is itself one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    call = [sys.executable, str(Path(__file__).resolve()), "--child", str(int(strict)), str(folder), known]
    try:
        out = subprocess.run(call, capture_output=True, env=env, timeout=4 * CHILD_CPU_SECONDS)
        if out.returncode == 0:
            return json.loads(out.stdout)
        why = f"ended with {out.returncode}: {out.stderr.decode('utf-8', 'replace').strip()[-160:]}"
    except subprocess.TimeoutExpired:
        why = "no time left"
    r = Review(folder, strict)
    r.emit("review-limit", ".", f"not read to the end within {CHILD_CPU_SECONDS} s and {CHILD_BYTES >> 30} GiB; {why}")
    return r.findings


def child(strict, folder, known):
    """The child's main: limits first, then the review as JSON on stdout."""
    try:
        import resource
        for limit, value in ((resource.RLIMIT_CPU, CHILD_CPU_SECONDS), (resource.RLIMIT_AS, CHILD_BYTES)):
            resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    except (ImportError, ValueError, OSError):
        pass  # not on this system; the parent's timeout and the size limits remain
    print(json.dumps(review_folder(folder, strict == "1", known)))


def main():
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # `| head` is no error
    if sys.argv[1:2] == ["compare"]:
        return compare(sys.argv[2:])
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:5])
    p = Parser(description=__doc__)
    p.add_argument("folders", nargs="*", metavar="FOLDER", help="record folders")
    p.add_argument("--base", metavar="REF", help="check the change set since this git reference, and review its record")
    p.add_argument("--mode", choices=("auto", "strict", "lenient"), default="auto",
                   help="auto: strict below this repository's records/, lenient elsewhere")
    p.add_argument("--known", metavar="DIR", default="", help="a folder of more records, which may be parents too")
    p.add_argument("--rescore", metavar="ARTIFACT", help="artifact.pyz or run folder of one seed, to be judged again")
    p.add_argument("--data", metavar="NAME_OR_PATH", help="dataset for --rescore; without it the record's, by its name")
    args = p.parse_args()
    found, folders = {}, args.folders   # {folder: findings}
    if args.base is not None:
        found["change set"], added = change_set(args.base)
        folders = folders + added
    elif not folders:
        raise BadInput("name a record folder, or --base=REF")
    if args.rescore and len(folders) != 1:
        raise BadInput("--rescore goes with one folder")
    for folder in folders:
        if not os.path.isdir(folder):
            raise BadInput(f"{printable(folder)}: not a folder")
        strict = args.mode == "strict" or (args.mode == "auto" and ROOT / "records" in Path(folder).resolve().parents)
        findings = review_in_child(folder, strict, args.known)
        if args.rescore:
            findings += rescore(folder, args.rescore, args.data, strict)
        found[printable(folder)] = findings
    counts = Counter()
    for folder, findings in found.items():
        for f in sorted(findings, key=lambda f: -LEVELS.index(f["level"])):
            print(f"{f['level']} {f['rule']} {f['file']}:{f['line'] or 1} {f['message']} [{f['source']}]")
        here = Counter(f["level"] for f in findings)
        print(f"{folder}: {', '.join(f'{here[v]} {v}' for v in reversed(LEVELS))}")
        counts += here
    return 1 if counts["FAIL"] else 4 if counts["FLAG"] else 0


if __name__ == "__main__":
    sys.exit(command(main))
