"""tests/plot.py: what a picture shows is read back from it, by the numbers on its axes."""

import itertools
import json
import random
import re
from xml.etree import ElementTree

import plot
import pytest

SVG = "{http://www.w3.org/2000/svg}"
RUNS = {
    "lora": ([(1, 3.1), (2, 2.4), (3, 1.9)], [(1, 2.9), (3, 2.05)]),
    "a & b": ([(1, 3.3), (2, 2.6), (3, 2.2)], [(3, 2.3)]),
}


def pixels(svg: str) -> tuple[list, list]:
    """-> (text, x, y, anchor) of every text, (tag, class, x, y) of dots and of lines' points"""
    texts, marks = [], []
    for item in ElementTree.fromstring(svg):
        kind = item.get("class")
        if item.tag == SVG + "text":
            where = float(item.get("x")), float(item.get("y"))
            texts.append((item.text, *where, item.get("text-anchor")))
        elif item.tag == SVG + "circle" and kind:
            marks.append(("dot", kind, float(item.get("cx")), float(item.get("cy"))))
        elif item.tag == SVG + "polyline" and kind != "grid":
            points = [point.split(",") for point in item.get("points").split()]
            marks += [("line", kind, float(x), float(y)) for x, y in points]
    return texts, marks


def values(svg: str, what: str, kind: str) -> list[tuple[float, float]]:
    """The values of marks, by the smallest and the largest number of each axis."""
    texts, marks = pixels(svg)
    numbers = [text for text in texts if re.fullmatch(r"-?[\d.]+", text[0])]
    ups = sorted((float(t), y - 4) for t, x, y, anchor in numbers if anchor == "end")
    alongs = sorted((float(t), x) for t, x, y, anchor in numbers if anchor == "middle")

    def read(pixel, axis):
        (low, start), (high, end) = axis[0], axis[-1]
        return low + (pixel - start) / (end - start) * (high - low)

    found = [(x, y) for tag, mark, x, y in marks if (tag, mark) == (what, kind)]
    return [(read(x, alongs), read(y, ups)) for x, y in found]


def test_curves_show_both_losses_of_every_run(tmp_path):
    folders = []
    for name, (training, held_out) in RUNS.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        lines = [{"run": {}}, *({"step": x, "loss": y} for x, y in training)]
        lines += [{"step": x, "eval_loss": y} for x, y in held_out] + [{"done": True, "step": 3}]
        (folders[-1] / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plot.main([str(tmp_path / "loss.svg"), *map(str, folders)])
    svg = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    for n, (training, held_out) in enumerate(RUNS.values()):
        for what, kind, right in [
            ("line", f"c{n} faint", training),
            ("line", f"c{n}", held_out),
            ("dot", f"c{n}", held_out),
        ]:
            found = values(svg, what, kind)
            assert len(found) == len(right)
            for ours, theirs in zip(found, right):
                assert ours == pytest.approx(theirs, abs=0.005)
    assert {str(folder) for folder in folders} < {text for text, *_ in pixels(svg)[0]}


def test_a_scatter_shows_its_points(tmp_path):
    points = {"lora": [1.1, 0.93], "full_ft": [2.6, 0.92], "prompt_tuning": [1.0, 1.28]}
    content = {"x": "memory", "y": "loss", "points": points}
    (tmp_path / "points.json").write_text(json.dumps(content))
    plot.main([str(tmp_path / "a.svg"), str(tmp_path / "points.json")])
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for n, point in enumerate(points.values()):
        assert values(svg, "dot", f"c{n}") == [pytest.approx(point, abs=0.005)]
    assert {"memory", "loss", *points} < {text for text, *_ in pixels(svg)[0]}


@pytest.mark.parametrize("seed", range(20))
def test_labels_do_not_overlap(seed):
    """Twelve points, half of them in a cluster of 60 by 40 pixels, two at the same place."""
    draw, frame = random.Random(seed), (60, 46, 650, 360)
    points = [(draw.uniform(200, 260), draw.uniform(200, 240)) for _ in range(5)]
    points += [points[0], *((draw.uniform(60, 650), draw.uniform(46, 360)) for _ in range(6))]
    texts = ["x" * draw.randint(3, 20) for _ in points]
    boxes = plot.place_labels(points, texts, frame)
    assert not any(plot.overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    for left, top, right, bottom in boxes:
        assert 60 <= left < right <= 650 and 46 <= top < bottom <= 360
        assert not any(left < x < right and top < y < bottom for x, y in points)


def test_long_runs_are_means_of_stretches():
    points = [(step, step % 2) for step in range(1, 1001)]
    thin = plot.thin_out(points)
    assert len(thin) == 200 and thin[0] == (3, pytest.approx(0.6))
    assert plot.thin_out(points[:150]) == points[:150]


@pytest.mark.parametrize("low, high", [(0.93, 1.28), (1, 600), (0, 0), (1e-5, 3e-5), (-2.1, 7)])
def test_ticks_are_round_and_enclose(low, high):
    found = plot.ticks(low, high, 6)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8
    steps = {float(f"{b - a:.3g}") for a, b in itertools.pairwise(found)}
    assert len(steps) == 1 and f"{steps.pop():e}"[0] in "125"


def test_both_backgrounds_have_every_color():
    style = ElementTree.fromstring(plot.curves(RUNS)).find(SVG + "style").text
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    names = [r"svg\{color", r"\.back\{fill", *(rf"\.c{n}\{{color" for n in range(8))]
    for name in names:
        ours, theirs = (re.search(rf"{name}:(#\w{{6}})", part)[1] for part in (light, dark))
        assert ours != theirs
