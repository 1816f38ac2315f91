"""The loss curve of a run: loss.csv, a row for each step, and its picture."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..ir.errors import DscError, require

FILE, PICTURE = "loss.csv", "loss.png"
SMOOTHING = 0.9
"""The weight of what came before in a smoothed curve (DeepSeek-V3 report, appendix B.1)."""

Row = Mapping[str, str]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a loss.csv, without a last one that was cut short by the end of its writer."""
    with path.open(newline="", encoding="utf-8") as stream:
        text = stream.read()
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(whole.splitlines()))


class Curve:
    """A loss.csv that grows by a row at a time. Rows after `step` are dropped first: a resumed run makes them again."""

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        self.path = path
        rows = [row for row in read(path) if int(row["step"]) <= step] if path.exists() else []
        found = list(rows[0]) if rows else list(columns)
        require(found == list(columns), f"{path}: has the columns {', '.join(found)}, expected {', '.join(columns)}")
        require(len(rows) == step, f"{path}: has {len(rows)} of the {step} steps before the checkpoint")
        draft = path.with_name(f".{path.name}.partial")
        with draft.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(path)
        self.rows: list[Row] = list(rows)
        self.columns = tuple(columns)

    def append(self, row: Row) -> None:
        """Write a row, so that it is in the file when this returns."""
        try:
            with self.path.open("a", newline="", encoding="utf-8") as stream:
                csv.DictWriter(stream, self.columns, lineterminator="\n").writerow(row)
        except OSError as error:
            raise DscError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.rows.append(row)


def smoothed(values: Iterable[float], weight: float = SMOOTHING) -> list[float]:
    """The exponential moving average of a curve, begun at its first value."""
    found: list[float] = []
    for value in values:
        found.append(weight * found[-1] + (1 - weight) * value if found else value)
    return found


def draw(curves: Mapping[str, Sequence[Row]], path: Path, column: str = "loss") -> bool:
    """A picture of one or more curves over their steps, faint as measured and bold smoothed. False where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for i, (name, rows) in enumerate(curves.items()):
        steps, values = [int(row["step"]) for row in rows], [float(row[column]) for row in rows]
        axes.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values), color=f"C{i}", linewidth=1.5, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{column} in nats per token")
    axes.grid(alpha=0.3)
    axes.legend(title=f"EMA {SMOOTHING:g}")
    draft = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_png(draft)
    draft.replace(path)
    return True
