"""Draw runs: training loss, validation bits per byte and learning rate over the seconds of training.

    python records/plot.py RUN... [--out=FILE]     runs over each other

The picture has no background: it reads in light and dark.
"""
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)   # not records/: nothing here may shadow a package
from data.dataset import Parser, atomic_write, command
from records.folders import find_entry, is_number, read_metrics

PANELS = {"train_loss": "training loss, nats per token", "val_bpb": "validation, bits per byte",
          "lr": "learning rate, of its peak"}
LEFT, RIGHT, HEIGHT = 64, 700, 150    # px, of a panel
HUES = (212, 24, 140, 270, 330, 180)  # of the runs, by turns


def read_points(folder, key):
    """A run's metrics.jsonl -> [(train_seconds, value)]; steps that a resumed run did again once."""
    points = []
    for row in read_metrics(folder):
        at = row.get("train_seconds")
        if row["kind"] in ("step", "val") and is_number(at) and is_number(row.get(key)):
            points = [point for point in points if point[0] < at] + [(at, row[key])]
    return points


def text(x, y, words, more=""):
    return f'<text x="{x}" y="{y}" {more}>{escape(str(words))}</text>'


def panel(title, lines, top):
    """A frame with a line for each run, each [(train_seconds, value)] -> SVG elements."""
    # The first tenth of a run falls from so high that it would flatten the rest: it is cut off.
    values = [v for line in lines for at, v in line if at >= line[-1][0] / 10] or [0.0]
    low = min(values)
    high = max(max(values), low + 1e-6)
    end = max([line[-1][0] for line in lines if line] or [1.0])
    bottom = top + HEIGHT
    parts = [text(LEFT, top - 8, title), text(4, top + 10, f"{high:.5g}"), text(4, bottom, f"{low:.5g}"),
             text(LEFT, bottom + 14, "0 s"), text(RIGHT - 40, bottom + 14, f"{end:.5g} s"),
             f'<path d="M{LEFT} {top}V{bottom}H{RIGHT}"/>']
    for n, line in enumerate(lines):
        points = ""
        for at, value in line:
            y = bottom - HEIGHT * (min(value, high) - low) / (high - low)
            points += f" {LEFT + (RIGHT - LEFT) * at / end:.1f},{y:.1f}"
        parts.append(f'<polyline stroke="hsl({HUES[n % len(HUES)]} 75% 50%)" points="{points}"/>')
    return parts


def write(path, folders):
    """Run folders -> a picture: their names with the last val_bpb, below them PANELS."""
    parts = []
    for n, folder in enumerate(folders):
        last = [f"{value:.4f}" for _, value in read_points(folder, "val_bpb")[-1:]]
        color = f'style="fill:hsl({HUES[n % len(HUES)]} 75% 50%)"'
        parts.append(text(LEFT, 16 * n + 16, " ".join([Path(folder).name, *last]), color))
    top = 16 * len(folders) + 40
    for key, title in PANELS.items():
        parts += panel(title, [read_points(folder, key) for folder in folders], top)
        top += HEIGHT + 48
    with atomic_write(path, "w") as f:
        f.write(f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 {top - 20}">
<style>text{{font:12px sans-serif;fill:#6e7781}}path{{stroke:#8c959f}}polyline{{stroke-width:2}}
path,polyline{{fill:none}}</style>
{chr(10).join(parts)}
</svg>
''')


def main():
    p = Parser(description=__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders, or names in runs/")
    p.add_argument("--out", default="curves.svg", metavar="FILE", help="the picture")
    args = p.parse_args()
    write(args.out, [find_entry(name) for name in args.runs])
    print(args.out)


if __name__ == "__main__":
    sys.exit(command(main))
