"""Draw runs: training loss, validation bits per byte, learning rate over the seconds of training.

    python records/plot.py RUN... [--out=FILE]     runs over each other

The picture has no background: it reads in light and dark.
"""
import sys
from html import escape
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not records/: nothing may shadow a package
from data.dataset import BadInput, atomic_write, command
from records.folders import find_entry, flags_of, is_number, read_metrics

PANELS = {"train_loss": "training loss, nats per token", "val_bpb": "validation, bits per byte",
          "lr": "learning rate, of its peak"}
COLORS = ("#0a84ff", "#d9730d", "#2da44e", "#a371f7", "#e0569b", "#768390")   # of runs, by turns
STYLE = ("text{font:12px sans-serif;fill:#768390}path,polyline{fill:none;stroke:#768390}"
         "polyline{stroke-width:1.5}")


def read_points(folder, key):
    """A run's metrics.jsonl -> [(train_seconds, value)]; what a resumed run did again once."""
    points = []
    for row in read_metrics(folder):
        at = row.get("train_seconds")
        if is_number(at) and is_number(row.get(key)):
            points = [point for point in points if point[0] < at] + [(at, row[key])]
    return points


def panel(title, lines, top):
    """A frame with a line for each run, each [(train_seconds, value)] -> SVG."""
    # The first tenth of a run falls from so high that it would flatten the rest: it is cut off.
    values = [v for line in lines for at, v in line if at >= line[-1][0] / 10] or [0.0]
    low = min(values)
    high = max(*values, low + 1e-6)
    end = max([line[-1][0] for line in lines if line], default=1.0) or 1.0
    out = f"""<text x="64" y="{top - 6}">{title}</text><path d="M64 {top}v150h640"/>
<text x="4" y="{top + 10}">{high:.5g}</text><text x="4" y="{top + 150}">{low:.5g}</text>
<text x="64" y="{top + 165}">0 s</text><text x="650" y="{top + 165}">{end:.5g} s</text>
<svg x="64" y="{top}" width="640" height="150">
"""
    for n, line in enumerate(lines):
        points = [f"{640 * at / end:.1f},{150 * (high - v) / (high - low):.1f}" for at, v in line]
        out += f'<polyline style="stroke:{COLORS[n % 6]}" points="{" ".join(points)}"/>\n'
    return out + "</svg>\n"


def write(path, folders):
    """Run folders -> a picture: their names with the last val_bpb, below them PANELS."""
    out = f"<style>{STYLE}</style>\n"
    for n, folder in enumerate(folders):
        last = [f"{value:.4f}" for _, value in read_points(folder, "val_bpb")[-1:]]
        name = escape(" ".join([Path(folder).name, *last]))
        out += f'<text x="64" y="{16 * n + 16}" style="fill:{COLORS[n % 6]}">{name}</text>\n'
    top = 16 * len(folders) + 32
    for key, title in PANELS.items():
        out += panel(title, [read_points(folder, key) for folder in folders], top)
        top += 205
    with atomic_write(path, "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {top}">\n{out}</svg>\n')


def main():
    args = flags_of(__doc__, "runs", out="curves.svg").parse_args()
    if not args.runs:
        raise BadInput("name runs: folders, or names in runs/")
    write(args.out, [find_entry(name) for name in args.runs])
    print(args.out)


if __name__ == "__main__":
    sys.exit(command(main))
