"""Pictures of runs as SVG, for light and dark pages, with the standard library alone.

# training and held-out loss of runs, from their metrics.jsonl
python tests/plot.py loss.svg runs/lora runs/dora runs/full_ft
# a point for each method: {"x": TITLE, "y": TITLE, "points": {"lora": [0.5, 1.2], ...}}
python tests/plot.py frontier.svg points.json
"""

import argparse
import html
import itertools
import json
import math
from pathlib import Path

# one color a run or method, on white and on black; from the ninth on, lines are dashed
LIGHT = "#0072b2 #d55e00 #009e73 #b5489a #9a6b00 #4b8bbe #6f42c1 #6e7781".split()
DARK = "#58b0e8 #ff8c42 #2fc997 #ee9ad0 #e3b341 #9cd3f7 #b794f6 #a0a8b0".split()
FONT, LETTER = 12, 7  # height of a line and width of a letter, in pixels


def document(width: int, height: int, parts: list[str]) -> str:
    """A picture whose colors follow the reader's preference. Its parts draw in currentColor."""

    def colors(ink: str, back: str, palette: list[str]) -> str:
        rules = [f"svg{{color:{ink}}}", f".back{{fill:{back}}}"]
        return "".join([*rules, *(f".c{n}{{color:{color}}}" for n, color in enumerate(palette))])

    start = '<svg xmlns="http://www.w3.org/2000/svg" '
    start += f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    shapes = "text{fill:currentColor}.grid{stroke-opacity:.15}.faint{stroke-opacity:.5}"
    light, dark = colors("#1f2328", "#ffffff", LIGHT), colors("#e6edf3", "#0d1117", DARK)
    font = f"text{{font-family:sans-serif;font-size:{FONT}px}}"
    style = f"{font}{shapes}{light}\n@media (prefers-color-scheme: dark) {{{dark}}}"
    back = f'<rect class="back" width="{width}" height="{height}"/>'
    return "\n".join([start, f"<style>{style}</style>", back, *parts, "</svg>"]) + "\n"


def write_text(x: float, y: float, text: str, anchor: str = "start") -> str:
    text = html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, the first below low and the last above high."""
    rough = (high - low or abs(high) or 1.0) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


class Axes:
    """A frame in pixels around all (x, y) values, with a grid. `parts` is what is drawn."""

    def __init__(self, frame: tuple, points: list[tuple], x_title: str, y_title: str):
        self.left, self.top, self.right, self.bottom = frame
        xs, ys = zip(*points)
        self.xs, self.ys = ticks(min(xs), max(xs), 8), ticks(min(ys), max(ys), 6)
        self.parts = [write_text(self.left, self.top - 14, y_title)]
        middle = (self.left + self.right) / 2
        self.parts.append(write_text(middle, self.bottom + 36, x_title, "middle"))
        for value in self.ys:
            self.line([(self.xs[0], value), (self.xs[-1], value)], "grid")
            y = self.place(self.xs[0], value)[1] + 4
            self.parts.append(write_text(self.left - 8, y, f"{value:.10g}", "end"))
        for value in self.xs:
            self.line([(value, self.ys[0]), (value, self.ys[-1])], "grid")
            x = self.place(value, self.ys[0])[0]
            self.parts.append(write_text(x, self.bottom + 18, f"{value:.10g}", "middle"))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Values -> pixels"""
        across = (x - self.xs[0]) / (self.xs[-1] - self.xs[0])
        up = (y - self.ys[0]) / (self.ys[-1] - self.ys[0])
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )

    def line(self, points: list[tuple], kind: str, width: float = 1, dashes: str = "none") -> None:
        where = " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in points)
        shape = f'fill="none" stroke="currentColor" stroke-width="{width}"'
        shape += f' stroke-dasharray="{dashes}"'
        self.parts.append(f'<polyline class="{kind}" points="{where}" {shape}/>')

    def dots(self, points: list[tuple], kind: str, radius: float) -> None:
        for x, y in (self.place(*point) for point in points):
            shape = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="currentColor"'
            self.parts.append(f'<circle class="{kind}" {shape}/>')


def thin_out(points: list[tuple], most: int = 200) -> list[tuple]:
    """Means over stretches of equal length, at most so many."""
    size = math.ceil(len(points) / most)
    groups = (points[n : n + size] for n in range(0, len(points), size))
    return [tuple(sum(values) / len(group) for values in zip(*group)) for group in groups]


def curves(runs: dict[str, tuple[list, list]], x_title: str = "optimizer step") -> str:
    """Name -> ([(x, training loss)], [(x, held-out loss)]). Lines, and lines with dots. -> SVG"""
    width, height = 640 + LETTER * max(13, *map(len, runs)), 380
    points = [point for run in runs.values() for part in run for point in part]
    axes = Axes((56, 44, 560, height - 52), points, x_title, "loss (nats a token)")
    legend = [("training loss", 1.2, False), ("held-out loss", 2.2, True)]
    some_held_out = any(held_out for _, held_out in runs.values())
    for n, (text, wide, dotted) in enumerate(legend[: 1 + some_held_out]):
        y, line = 40 + 18 * n, f'stroke="currentColor" stroke-width="{wide}"'
        axes.parts.append(f'<line x1="580" x2="604" y1="{y}" y2="{y}" {line}/>')
        if dotted:
            axes.parts.append(f'<circle cx="592" cy="{y}" r="3.5" fill="currentColor"/>')
        axes.parts.append(write_text(612, y + 4, text))
    for n, (name, (training, held_out)) in enumerate(runs.items()):
        kind, dashes = f"c{n % len(LIGHT)}", "none" if n < len(LIGHT) else "5 3"
        axes.line(thin_out(training), f"{kind} faint", 1.2, dashes)
        if held_out:
            axes.line(held_out, kind, 2.2, dashes)
            axes.dots(held_out, kind, 3.5)
        y, line = 92 + 18 * n, f'stroke="currentColor" stroke-width="4" stroke-dasharray="{dashes}"'
        axes.parts.append(f'<line class="{kind}" x1="580" x2="604" y1="{y}" y2="{y}" {line}/>')
        axes.parts.append(write_text(612, y + 4, name))
    return document(width, max(height, 110 + 18 * len(runs)), axes.parts)


def overlap(a: tuple, b: tuple) -> bool:
    """Of boxes (left, top, right, bottom)."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place_labels(points: list[tuple], texts: list[str], frame: tuple) -> list[tuple]:
    """Boxes (left, top, right, bottom) in the frame, one for each text, near its point: the
    nearest that covers no point and no other box, and whose way from the point crosses none. All
    in pixels."""
    taken, boxes = [(x - 6, y - 6, x + 6, y + 6) for x, y in points], []
    for n, ((x, y), text) in enumerate(zip(points, texts)):
        wide, high = LETTER * len(text), FONT + 2
        for distance, turn in itertools.product(range(9, 400, 6), range(16)):
            across, down = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            left = x + across * distance - wide * (1 - across) / 2
            top = y + down * distance - high * (1 - down) / 2
            box = (left, top, left + wide, top + high)
            inside = frame[0] <= left and box[2] <= frame[2]
            inside = inside and frame[1] <= top and box[3] <= frame[3]
            near = nearest(box, x, y)
            parts = [n / 16 for n in range(4, 16)]  # of the way: points may touch
            way = [(x + (near[0] - x) * part, y + (near[1] - y) * part) for part in parts]
            others = taken[:n] + taken[n + 1 :]
            crossed = any(overlap((*spot, *spot), other) for spot in way for other in others)
            if inside and not crossed and not any(overlap(box, other) for other in taken):
                break
        taken.append(box)
        boxes.append(box)
    return boxes


def nearest(box: tuple, x: float, y: float) -> tuple[float, float]:
    """The point of a box that is nearest to (x, y)."""
    return min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])


def scatter(points: dict[str, tuple[float, float]], x_title: str, y_title: str) -> str:
    """A labelled point for each name. -> SVG"""
    width, height = 680, 420
    axes = Axes((56, 44, width - 24, height - 52), list(points.values()), x_title, y_title)
    places = [axes.place(*point) for point in points.values()]
    boxes = place_labels(places, list(points), (60, 46, width - 26, height - 54))
    for n, ((name, point), (x, y), box) in enumerate(zip(points.items(), places, boxes)):
        kind = f"c{n % len(LIGHT)}"
        near = nearest(box, x, y)
        if math.dist(near, (x, y)) > 12:  # too far to be taken for the point's own
            ends = 'x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"'.format(x, y, *near)
            axes.parts.append(f'<line class="{kind}" {ends} stroke="currentColor"/>')
        axes.dots([point], kind, 5)
        side = {box[0]: "start", box[2]: "end"}.get(near[0], "middle")  # text begins at the point
        where = near[0] if side != "middle" else (box[0] + box[2]) / 2
        axes.parts.append(write_text(where, box[3] - 3, name, side))
    return document(width, height, axes.parts)


def read_run(folder: Path) -> tuple[list, list]:
    """metrics.jsonl -> [(step, training loss)], [(step, held-out loss)]"""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return tuple(
        [(x["step"], x[key]) for x in entries if key in x] for key in ("loss", "eval_loss")
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path, help="the SVG file")
    parser.add_argument("sources", type=Path, nargs="+", help="folders of runs, or one .json file")
    args = parser.parse_args(argv)
    if args.sources[0].suffix == ".json":
        found = json.loads(args.sources[0].read_text(encoding="utf-8"))
        picture = scatter(found["points"], found["x"], found["y"])
    else:
        picture = curves({str(folder): read_run(folder) for folder in args.sources})
    args.output.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
