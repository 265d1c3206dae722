"""Draw runs: training loss, validation bits per byte and learning rate over the seconds of training.

    python records/plot.py RUN... [--out=FILE]       runs over each other, in one picture

The trainer draws each run into runs/<run>/curve.svg. The pictures have no background: they read in light and dark.
"""
import math
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "records"]  # no shadowed packages
from data.dataset import BadInput, Parser, atomic_write, command, find_run
from records.ledger import is_number, parse_json

PANELS = {"train_loss": ("training loss, nats per token", 190), "val_bpb": ("validation, bits per byte", 190),
          "lr": ("learning rate, of its peak", 90)}  # what is drawn, its title, its height
WIDTH, LEFT, RIGHT = 720, 64, 700
COLORS = [("#0969da", "#58a6ff"), ("#bc4c00", "#f0883e"), ("#8250df", "#bc8cff"), ("#1a7f37", "#3fb950"),
          ("#bf3989", "#f778ba"), ("#6e7781", "#b1bac4")]  # on light, on dark


def svg(parts, height):
    """The parts of a picture -> the picture, with the styles that follow the reader's choice of light or dark."""
    light, dark = ("".join(f".c{n}{{stroke:{color}}}.f{n}{{fill:{color}}}" for n, color in enumerate(colors))
                   for colors in zip(*COLORS))
    style = ("text{font:12px sans-serif;fill:#57606a}.axis{fill:none;stroke:#8c959f}.grid{stroke:#8c959f;opacity:.25}"
             ".line{fill:none;stroke-width:2;stroke-linejoin:round}circle{fill:none;stroke-width:2}" + light +
             "@media(prefers-color-scheme:dark){text{fill:#9da7b3}.axis{stroke:#6e7681}" + dark + "}")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">'
    return "\n".join([head, f"<style>{style}</style>", *parts, "</svg>\n"])


def text(x, y, words, anchor="start", color=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{color}>{escape(str(words))}</text>'


def round_numbers(low, high, n):
    """-> about n round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= (high - low) / n)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def axes(title, top, bottom, x_range, y_range, x_ticks):
    """A frame with its title, round numbers and x_ticks [(value, words)] -> parts, x(value), y(value): their places."""
    def x(value):
        return LEFT + (RIGHT - LEFT) * (value - x_range[0]) / (x_range[1] - x_range[0])

    def y(value):
        return bottom - (bottom - top) * (value - y_range[0]) / (y_range[1] - y_range[0])
    parts = [text(LEFT, top - 10, title), f'<path class="axis" d="M{LEFT} {top}V{bottom}H{RIGHT}"/>']
    for value in round_numbers(*y_range, (bottom - top) // 40):
        parts += [text(LEFT - 8, y(value) + 4, f"{value:.6g}", "end"),
                  f'<path class="grid" d="M{LEFT} {y(value):.1f}H{RIGHT}"/>']
    for value, words in x_ticks:
        anchor = "start" if x(value) < LEFT + 20 else "end" if x(value) > RIGHT - 20 else "middle"
        parts.append(text(x(value), bottom + 18, words, anchor))
    return parts, x, y


def widen(values, share=0.05):
    """-> (low, high), a little further apart than the values."""
    low, high = min(values), max(values)
    margin = (high - low) * share or 0.01
    return low - margin, high + margin


def read_points(folder):
    """A run's metrics.jsonl -> {key of PANELS: [(train_seconds, value)]}. Steps that a resumed run did again are there
    once, a last line that a kill cut is not."""
    points = {key: [] for key in PANELS}
    try:
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise BadInput(f"{folder}/metrics.jsonl: {e.strerror}") from None
    for line in lines:
        try:
            row = parse_json(line)
            kind, now = row["kind"], row.get("train_seconds")
        except (ValueError, KeyError, TypeError):
            continue
        if is_number(now) and kind == "resume":
            points = {key: [p for p in old if p[0] <= now] for key, old in points.items()}
        for key in points if is_number(now) and kind in ("step", "val") else ():
            points[key] += [(now, row[key])] if is_number(row.get(key)) else []
    return points


def draw(folders):
    """Run folders -> SVG, a panel for each of PANELS, a line for each run."""
    runs = [(Path(folder).resolve().name, read_points(folder)) for folder in folders]
    end = max((at for _, points in runs for line in points.values() for at, _ in line), default=0) or 1.0
    parts, top = [], 12
    for n, (name, points) in enumerate(runs):
        score = f": {points['val_bpb'][-1][1]:.4f}" if points["val_bpb"] else ""
        top += 18
        parts.append(text(LEFT, top, name + score, color=f' class="f{n % len(COLORS)}"'))
    for key, (title, height) in PANELS.items():
        lines = [points[key] for _, points in runs]
        if not any(lines):
            continue
        top += 34
        # The first tenth of a run falls from so high that it would flatten the rest: it may leave the frame.
        values = [v for line in lines for at, v in line if at >= line[-1][0] / 10]
        ticks = [(at, f"{at:.6g} s") for at in round_numbers(0, end, 8)] if key == [*PANELS][-1] else []
        frame, x, y = axes(title, top, top + height, (0, end), (0, 1) if key == "lr" else widen(values), ticks)
        box = f"{LEFT - 4} {top - 4} {RIGHT - LEFT + 8} {height + 8}"
        parts += [*frame, '<svg x="{}" y="{}" width="{}" height="{}" '.format(*box.split()) + f'viewBox="{box}">']
        for n, line in enumerate(lines):
            color, at = f"c{n % len(COLORS)}", " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
            parts.append(f'<polyline class="line {color}" points="{at}"/>')
            parts += [f'<circle class="{color}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"><title>{b:.5f}</title></circle>'
                      for a, b in line if key == "val_bpb"]
        parts.append("</svg>")
        top += height
    return svg(parts, top + 28)


def write(path, folders):
    with atomic_write(path, "w") as f:
        f.write(draw(folders))


def main():
    p = Parser(prog="plot.py", description=__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders, or names in runs/")
    p.add_argument("--out", default="curves.svg", metavar="FILE", help="the picture")
    args = p.parse_args()
    write(args.out, [find_run(name) for name in args.runs])
    print(args.out)


if __name__ == "__main__":
    sys.exit(command(main))
