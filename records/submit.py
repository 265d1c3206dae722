"""Make a record folder from runs, and the leaderboard from the record folders.

    python records/submit.py runs/a runs/b runs/c --name=short-slug     writes records/<track>/YYYY-MM-DD_short-slug/
    python records/submit.py --leaderboard                              writes records/README.md and leaderboard.svg

Each run is trained, packed and scored: the same sources, config and dataset, each with a seed of its own. The folder
gets the sources as run, one log per seed, submission.json with every number taken from the runs' files, and a README
with a place for the author's words. Nothing is overwritten; runs that differ, that are over a budget, or that were
scored on a part of the documents are refused.
"""
import datetime
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "records"]  # no shadowed packages
from data.dataset import BadInput, Parser, atomic_write, command
from records import plot
from records.check import known_records, nearest_record
from records.ledger import (CAP_BYTES, PER_RUN, commit_of, config_differences, digest, find_baseline, is_number,
                            load_submission, part, read_entry, read_regular, read_run, read_sources, seed_results,
                            source_diff)
from records.rules import BEST_PUBLIC_BPB, CLOCK_SECONDS, CLOCK_SLACK, RULE_NATS, RULE_P, TRACKS
from records.stats import comparison, nats_per_bit

SEED_KEYS = ("val_bpb", "val_loss", "artifact_bytes", "train_seconds", "steps", "tokens", "eval_seconds")


def load_runs(paths):
    """Run folders -> read_run dicts with the bytes of their sources, fit for one record; BadInput says why not."""
    runs = [read_run(p) for p in paths]
    first = runs[0]
    for run in runs:
        where, score = run["folder"], run["score"] or {}
        if run["crash"]:
            raise BadInput(f"{where}: the run ended early: {run['crash'].get('reason')}")
        if score.get("limit_docs"):   # 0 and null are all of them
            raise BadInput(f"{where}: scored on {score['limit_docs']} documents only")
        if run["val_bpb"] is None:
            raise BadInput(f"{where}: no score; run: python pack.py {where} && python eval_bpb.py {where}/artifact.pyz")
        if missing := [k for k in SEED_KEYS if not is_number(run[k])]:
            raise BadInput(f"{where}: no {', '.join(missing)} in metrics.jsonl and score.json")
        if run["artifact_bytes"] > CAP_BYTES:
            raise BadInput(f"{where}: {run['artifact_bytes']:,} bytes, over the cap of {CAP_BYTES:,}")
        run["sources"] = read_sources({**run, "source": where / "source"})
        for name, sha256 in run["source_sha256"].items():
            if hashlib.sha256(run["sources"].get(name, b"")).hexdigest() != sha256:
                raise BadInput(f"{where}/source/{name}: not the source that ran")
        for what, key in (("source", "source_sha256"), ("config", "config"), ("dataset", "dataset")):
            if differ := config_differences(run[key], first[key]):
                name, (old, new) = next(iter(differ.items()))
                raise BadInput(f"{where}: another {what} than {first['folder']}: {name} is {new}, not {old}")
    if len({run["seed"] for run in runs}) < len(runs):
        raise BadInput(f"each run needs a seed of its own, not {', '.join(str(run['seed']) for run in runs)}")
    return runs


def read_source(path):
    try:
        return read_regular(path, 2 << 20)
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None


def check_track(track, runs):
    """The track asked for, or the one that the runs fit. BadInput where they do not fit the record track asked for."""
    reasons = [f"{len(runs)} seeds, not 3"] if len(runs) < 3 else []
    for run in runs:
        where, device, name = run["folder"], str(run["environment"].get("device")), run["dataset"].get("name")
        reasons += [f"{where}: {key} {run[key]:.1f} is over {CLOCK_SECONDS}"
                    for key in ("train_seconds", "eval_seconds") if run[key] > CLOCK_SECONDS + CLOCK_SLACK]
        reasons += [f"{where} ran on {device}, not 8 x H100"] if not re.search(r"8\s*x.{0,12}H100", device) else []
        reasons += [f"{where} is on {name}, not fineweb"] if name != "fineweb" else []
    if track == TRACKS[0] and reasons:
        raise BadInput(f"not fit for {TRACKS[0]}: {reasons[0]}")
    return track or TRACKS[bool(reasons)]


def seed_log(run):
    """The log of one seed: the trainer's, the packer's ledger, and the official numbers after the last `---`."""
    judged = {k: run["score"].get(k) for k in ("mode", "unconfined", "phases", "audit", "predictor", "environment")}
    parts = [read_source(run["folder"] / "log.txt"), b"eval_bpb.py: " + json.dumps(judged).encode()]
    if (run["folder"] / "pack.txt").is_file():
        parts.insert(1, b"pack.py:\n" + read_source(run["folder"] / "pack.txt"))
    summary = "".join(f"{k}: {run[k]}\n" for k in (*SEED_KEYS, "seed"))
    return b"\n\n".join(part.rstrip() for part in parts) + b"\n---\n" + summary.encode()


def submission(runs, args, track, parent):
    """The content of submission.json: the public challenge's field names, then lineage, hashes and environment."""
    first = runs[0]
    config = {k: v for k, v in first["config"].items() if k not in PER_RUN}
    scores = {}
    for key in ("val_loss", "val_bpb"):
        scores[key] = statistics.fmean(run[key] for run in runs)
        scores |= {f"{key}_std": statistics.stdev(run[key] for run in runs)} if len(runs) > 1 else {}
    rows = {str(run["seed"]): {**{k: run[k] for k in SEED_KEYS}, "log": f"train_seed{run['seed']}.log",
                               **{k: run["score"].get(k) for k in ("artifact_sha256", "limit_docs", "audit")},
                               "source_sha256": digest(run["source_sha256"]), "config_sha256": digest(config)}
            for run in runs}
    return {"author": args.author, "github_id": args.github_id, "name": args.name,
            "blurb": args.idea or first["config"].get("idea") or args.name,
            "date": args.date, "track": track, **scores, "bytes_total": max(run["artifact_bytes"] for run in runs),
            "seeds": [run["seed"] for run in runs], "seed_results": rows,
            "hardware": str(first["environment"].get("device")), "parent": parent, "dataset": first["dataset"],
            "config": config, "source_sha256": first["source_sha256"], "environment": first["environment"]}


def verdict(mine, other):
    """One sentence: these scores against those of read_entry() on the same documents, with p where there is one."""
    ours, theirs = ({s: v["val_bpb"] for s, v in seed_results(mine)}, other["scores"])
    if mine["dataset"].get("val_docs_sha256") != other["dataset"].get("val_docs_sha256"):
        return "scored on other documents, so nothing compares."
    if not all(map(is_number, theirs.values())):
        return "it has no score."
    gain = f"a gain of {statistics.fmean(theirs.values()) - mine['val_bpb']:+.5f} bits per byte"
    budgets = [{k: x["config"].get(k) for k in ("max_seconds", "max_steps")} for x in (mine, other)]
    if budgets[0] != budgets[1]:
        return f"{gain} with another budget, so no test."
    if min(len(ours), len(theirs)) < 2:
        return f"{gain}; a side has one seed, so no test."
    c = comparison(ours, theirs, nats_per_bit(mine["dataset"]))
    how = "paired by seed" if c["paired"] else "Welch's"
    return (f"{gain}, {c['gain_nats']:+.5f} nats per token. One-sided p ({how}) is {c['p']:.3g} for any gain and "
            f"{c['p_written']:.3g} for the {RULE_NATS} nats of the written rule, which asks {RULE_P}.")


def readme(mine, sources, parent, best):
    """The record's README: generated numbers, the place for the author's words, the difference from the parent."""
    std = f" (std {mine['val_bpb_std']:.6f}, n {len(mine['seeds'])})" if "val_bpb_std" in mine else " (one seed)"
    rows = "".join("| {s} | {val_bpb:.6f} | {val_loss:.6f} | {artifact_bytes:,} | {train_seconds:.1f} | {steps:,} | "
                   "{eval_seconds:.1f} |\n".format(s=s, **v) for s, v in seed_results(mine))
    text = [f"# {mine['name']}\n",
            f"**val_bpb {mine['val_bpb']:.6f}**{std} on {mine['dataset'].get('name')}, "
            f"at most {mine['bytes_total']:,} bytes, {mine['hardware']}.\n",
            "| seed | val_bpb | val_loss | artifact bytes | train s | steps | eval s |\n" + "|---" * 7 + "|\n" + rows]
    for other, what in ((parent, "parent"), (best, "best before it")):
        if other and (what == "parent" or not parent or best["name"] != parent["name"]):
            text.append(f"Against the {what}, {other['name']}: {verdict(mine, other)}\n")
    idea = f"{mine['idea']}\n\n" if mine["idea"] else ""
    text.append(f"## What changed, and why it works\n\n{idea}(write this)\n")
    if parent:
        differ = config_differences(mine["config"], parent["config"])
        settings = "".join(f"- `{k}` {old} -> {new}\n" for k, (old, new) in differ.items())
        text += [f"## Difference from {parent['name']}\n", settings or "No setting differs.\n"]
        text.append(folded(source_diff(sources, read_sources(parent))))
    text.append("## Run it\n\nEvery setting stands under `config` in submission.json; those that are not the defaults "
                "of train_gpt.py go on its command line, with `--seed`.\n")
    return "\n".join(text)


def folded(lines, most=400):
    """The lines of a diff as a block that opens, at most `most` of them."""
    if not lines:
        return "No source differs.\n"
    shown = "\n".join(lines[:most] + [f"... {len(lines) - most:,} more lines"] * (len(lines) > most))
    shown = shown.replace("```", "` ` `")   # a source cannot close the block
    return f"<details><summary>{len(lines):,} lines of diff</summary>\n\n```diff\n{shown}\n```\n</details>\n"


def lineage(args, runs, known):
    """-> (read_entry() of what the record is to beat, or None; the name of the record that it builds on, or None).
    A parent that is a run builds on what its own --parent names, and so on."""
    name, seen = args.parent or runs[0]["config"].get("parent") or "none", set()
    if name == "none":
        return None, None
    parent = entry = read_entry(find_baseline(name, runs[0]["folder"].parent))
    while not entry["record"] and entry["name"] not in seen:
        seen.add(entry["name"])
        try:
            entry = read_entry(find_baseline(entry["config"].get("parent") or "", runs[0]["folder"].parent))
        except BadInput:
            break
    return parent, entry["name"] if entry["name"] in known else None


def build(args, records=ROOT / "records"):
    """Writes the record folder, complete or not at all. Returns its path."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,60}", args.name or ""):
        raise BadInput("--name=short-slug: letters, digits and ._- are expected, 60 at most")
    runs = load_runs(args.runs)
    sources, track = runs[0]["sources"], check_track(args.track, runs)
    folder = records / track / f"{args.date}_{args.name}"
    if folder.exists():
        raise BadInput(f"{folder} exists; nothing is overwritten")
    known = {p.name: p for p in known_records(records)}
    parent, record = lineage(args, runs, known)
    mine = submission(runs, args, track, record) | {
        "idea": args.idea or runs[0]["config"].get("idea") or "", "commit": commit_of(sources),
        "parent_run": parent["name"] if parent and not parent["record"] else None}
    rivals = [p for p in known.values() if part(load_submission(p), "dataset").get("val_docs_sha256")
              == mine["dataset"].get("val_docs_sha256")]
    best = min(rivals, key=lambda p: load_submission(p)["val_bpb"], default=None)
    if not parent and not args.parent:
        near, by = nearest_record(sources.get("train_gpt.py", b"").decode("utf-8", "replace"), rivals)
        print("no --parent is named" + (f"; by its code {by.name} is nearest ({near:.0%})" if by else ""))
    files = {**sources, "submission.json": (json.dumps(mine, indent=1) + "\n").encode(),
             "README.md": readme(mine, sources, parent, best and read_entry(best)).encode(),
             **{f"train_seed{run['seed']}.log": seed_log(run) for run in runs}}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as work:
        for name, blob in files.items():
            path = Path(work) / "record" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(blob)
        os.rename(Path(work) / "record", folder)
    return folder


def leaderboard(records=ROOT / "records"):
    """The record folders -> {"README.md": text, "leaderboard.svg": text}. Depends on nothing but the folders."""
    entries = [(p, load_submission(p)) for p in known_records(records)]
    if bad := [p for p, s in entries if not is_number(s.get("val_bpb")) or not is_number(s.get("bytes_total"))]:
        raise BadInput(f"{bad[0]}/submission.json: no val_bpb or no bytes_total")
    text = ["# Records\n",
            "Made by `python records/submit.py --leaderboard` from the folders below, not edited by hand. Scores are "
            "bits per byte: lower is better, and only scores on one dataset compare. [LOOP.md](LOOP.md) says how to "
            "make a record, [rules.py](rules.py) what is checked.\n",
            f"For scale, on fineweb: the public challenge began at 1.2244 and ended at {BEST_PUBLIC_BPB} (#2135).\n",
            "![best score over time](leaderboard.svg)\n"]
    titles = ("10 minutes on 8xH100, 16 MB, fineweb", "Anything else that fits in 16 MB")
    columns = ("val_bpb", "std", "n", "record", "author", "date", "bytes", "dataset", "hardware", "parent")
    for track, title in zip(TRACKS, titles):
        mine = [e for e in entries if e[0].parent.name == track]
        rows = [row(*e) for e in sorted(mine, key=lambda e: (dataset_name(e[1]), e[1]["val_bpb"]))]
        head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
        text += [f"## {title}\n", head + "".join(rows) if rows else "None yet.\n"]
    return {"README.md": "\n".join(text), "leaderboard.svg": draw(entries)}


def dataset_name(s):
    return str(part(s, "dataset").get("name", "?"))


def row(path, s):
    """One line of the table. What a submission says cannot break out of its cell."""
    std = f"{s['val_bpb_std']:.5f}" if is_number(s.get("val_bpb_std")) else "-"
    cells = [f"**{s['val_bpb']:.5f}**", std, len(seed_results(s)), "", s.get("author"), s.get("date"),
             f"{s['bytes_total']:,}", dataset_name(s), s.get("hardware"), s.get("parent") or "-"]
    cells = [escape(" ".join(str(c).split())[:80]) for c in cells]
    cells = [re.sub(r"[|\[\]`\\]", lambda m: f"&#{ord(m[0])};", c) for c in cells]
    cells[3] = f"[{path.name[11:]}]({path.parent.name}/{path.name}/README.md)"
    return f"| {' | '.join(cells)} |\n"


def draw(entries):
    """The best score so far, one step line per dataset -> SVG."""
    series = {}
    for path, s in entries:
        day = datetime.date.fromisoformat(path.name[:10]).toordinal()
        series.setdefault(dataset_name(s), []).append((day, s["val_bpb"], path.name[11:]))
    points = [point for rows in series.values() for point in rows]
    if not points:
        return plot.svg([plot.text(plot.WIDTH / 2, 40, "no record yet", "middle")], 80)
    days = min(day for day, _, _ in points), max(day for day, _, _ in points) + 1
    ticks = [(day, datetime.date.fromordinal(day).isoformat()) for day in days]
    scores = plot.widen([score for _, score, _ in points], 0.1)
    parts, x, y = plot.axes("val_bpb, best so far", 30, 264, days, scores, ticks)
    for n, (name, rows) in enumerate(sorted(series.items())):
        color, best, line = f"c{n % len(plot.COLORS)}", math.inf, ""
        for day, score, slug in sorted(rows):
            line += f"H{x(day):.1f}V{y(min(best, score)):.1f}" if line else f"M{x(day):.1f} {y(score):.1f}"
            best = min(best, score)
            parts.append(f'<circle class="{color}" cx="{x(day):.1f}" cy="{y(score):.1f}" r="3">'
                         f'<title>{escape(slug)} {score:.5f}</title></circle>')
        parts += [f'<path class="line {color}" d="{line}H{plot.RIGHT}"/>',
                  plot.text(plot.RIGHT, y(best) - 8, f"{name} {best:.4f}", "end")]
    return plot.svg(parts, 300)


def main():
    p = Parser(description=__doc__)
    p.add_argument("runs", nargs="*", metavar="RUN", help="run folders, one a seed")
    p.add_argument("--name", metavar="SLUG", help="short name of the record: letters, digits and ._-")
    p.add_argument("--author", help="your name; without it git's user.name")
    p.add_argument("--github_id", help="your GitHub name; without it the author")
    p.add_argument("--track", choices=TRACKS, help="without it: the record track if the runs fit it")
    p.add_argument("--parent", metavar="RUN|RECORD", help="what this builds on, or none; without it what the runs say")
    p.add_argument("--idea", help="what differs from the parent, in one sentence; without it what the runs say")
    p.add_argument("--date", default=datetime.datetime.now(datetime.timezone.utc).date().isoformat(), help="YYYY-MM-DD")
    p.add_argument("--leaderboard", action="store_true", help="only write the leaderboard")
    args = p.parse_args()
    if bool(args.runs) == args.leaderboard:
        raise BadInput("name the runs of one record, or --leaderboard")
    if args.runs:
        try:
            if len(args.date) != 10 or datetime.date.fromisoformat(args.date) > datetime.date.today():
                raise ValueError
        except ValueError:
            raise BadInput(f"--date={args.date}: YYYY-MM-DD is expected, today at the latest") from None
        git = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True)
        args.author = args.author or git.stdout.strip()
        if not args.author:
            raise BadInput("--author=NAME is needed (or git's user.name)")
        args.github_id = args.github_id or args.author
        folder = build(args)
        print(f"{folder}\nnext: write README.md's own part, then: python records/check.py {folder}")
    for name, text in leaderboard().items():
        with atomic_write(ROOT / "records" / name, "w") as f:
            f.write(text)


if __name__ == "__main__":
    sys.exit(command(main))
