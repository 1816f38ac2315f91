"""Pictures as SVG inside the page: bytes over a run, and how far two runs lie apart. Their colours are those of the page's scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor, log10

from ...ir.timeline import Kind
from ..ui import size
from .html import Child, Html, el

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 300, 72, 12, 12, 30


def frame(*body: Child, label: str, height: int = HEIGHT, **attributes: str) -> Html:
    """A picture as wide as the page that keeps its proportions."""
    picture = el("svg", body, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label, class_="chart", **attributes)
    return el("div", picture, class_="picture", tabindex="0", role="region", aria_label=label)


def ticks(most: float, wanted: int = 4) -> list[float]:
    """Round numbers from 0 up to `most`."""
    if most <= 0:
        return [0.0]
    raw = most / wanted
    unit = 10.0 ** floor(log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    return [step * i for i in range(floor(most / step) + 1)]


def y_axis(most: float, marks: Sequence[tuple[float, str]], height: int = HEIGHT) -> list[Html]:
    """Lines across at some heights, with what they stand for."""
    found = []
    for value, words in marks:
        y = f"{place(value, most, height):.1f}"
        found.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        found.append(el("text", words, x=LEFT - 8, y=y, class_="tick end beside"))
    return found


def place(value: float, most: float, height: int = HEIGHT) -> float:
    """How far down a value is drawn."""
    return height - BOTTOM - (height - TOP - BOTTOM) * (value / most if most else 0)


def stacked(series: Mapping[Kind, Sequence[int]], turn: float | None) -> Html:
    """Bytes of each kind upon one another over the points of a run; `turn`, a share of the run, is where backward begins."""
    columns = max(map(len, series.values()))
    most = max((sum(values[i] for values in series.values()) for i in range(columns)), default=0)
    wide = (WIDTH - LEFT - RIGHT) / max(1, columns)
    below = [0] * columns
    areas: list[Html] = []
    for number, (kind, values) in enumerate(series.items()):
        above = [low + value for low, value in zip(below, values, strict=True)]
        areas.append(el("path", el("title", kind), d=_area(below, above, wide, lambda v: place(v, most)), class_=f"kind-{number}"))
        below = above
    floor_y = HEIGHT - BOTTOM
    axis = y_axis(most, [(tick, size(tick).replace(".00", "")) for tick in ticks(most)])
    words = [
        el("text", "begin", x=LEFT, y=HEIGHT - 8, class_="tick"),
        el("text", "end of the run", x=WIDTH - RIGHT, y=HEIGHT - 8, class_="tick end"),
    ]
    if turn is not None:
        x = f"{LEFT + turn * (WIDTH - LEFT - RIGHT):.1f}"
        words.append(el("line", x1=x, x2=x, y1=TOP, y2=floor_y, class_="turn"))
        words.append(el("text", "backward begins", x=x, y=HEIGHT - 8, class_="tick middle"))
    cursor = el("line", x1=LEFT, x2=LEFT, y1=TOP, y2=floor_y, class_="cursor", id="memory-cursor")
    return frame(
        axis, areas, words, cursor, label="Bytes alive over the run", id="memory-chart", data_left=str(LEFT), data_right=str(RIGHT)
    )


def _area(below: Sequence[int], above: Sequence[int], wide: float, y: Callable[[float], float]) -> str:
    """The outline between two rows of steps; of equal neighbours one step is made."""

    def steps(values: Sequence[int], order: Sequence[int], ahead: int) -> list[str]:
        found, last = [], None
        for i in order:
            if values[i] != last:
                found.append(f"H{LEFT + (i + ahead) * wide:.1f}V{y(values[i]):.1f}")
                last = values[i]
        return found

    forth, back = range(len(above)), range(len(above) - 1, -1, -1)
    start = f"M{LEFT},{y(0):.1f}"
    end = f"H{LEFT + len(above) * wide:.1f}"
    return "".join([start, *steps(above, forth, 0), end, *steps(below, back, 1), f"H{LEFT}Z"])


def dots(points: Sequence[tuple[float, str, str]], label: str) -> Html:
    """Values above 0 in order, on a logarithmic scale: value, class, words."""
    shown = [(i, value, kind, words) for i, (value, kind, words) in enumerate(points) if value > 0]
    if not shown:
        return Html()
    low = floor(min(log10(value) for _, value, _, _ in shown))
    high = max(floor(max(log10(value) for _, value, _, _ in shown)) + 1, low + 1)
    height, wide = 240, (WIDTH - LEFT - RIGHT) / max(1, len(points) - 1)
    step = max(1, (high - low) // 6)
    axis = y_axis(high - low, [(e - low, f"1e{e}") for e in range(low, high + 1, step)], height)
    marks = [
        el(
            "circle",
            el("title", words),
            cx=f"{LEFT + i * wide:.1f}",
            cy=f"{place(log10(v) - low, high - low, height):.1f}",
            r=3,
            class_=kind,
        )
        for i, v, kind, words in shown
    ]
    words = [
        el("text", "first op", x=LEFT, y=height - 8, class_="tick"),
        el("text", "last op", x=WIDTH - RIGHT, y=height - 8, class_="tick end"),
    ]
    return frame(axis, marks, words, label=label, height=height)
