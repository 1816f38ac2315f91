"""What a plan assumes: the figures of the cluster, and those of the run itself. Each has a low, a middle and a high value, and a source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..hardware.cluster import Cluster
from ..hardware.figures import Figure
from ..ir.errors import DscError, require

Which = Literal["low", "mid", "high"]


def own_figures(gpus: int) -> dict[str, Figure]:
    """What belongs to no machine, for a run on `gpus` GPUs.

    imbalance   rows of the fullest rank's experts by the mean: every rank waits for it in each exchange
    available   the share of time in which the cluster trains
    reserved    bytes of a GPU's memory that are not for tensors
    """
    lost = min(0.1, 0.1 * gpus / 16384)
    return {
        "run.imbalance": Figure(
            1.125, 1.0, 1.2, "1", "published", "profile-data, train.json: rows of the fullest product by the mean; 1.2: PithTrain's default"
        ),
        "run.available": Figure(
            1 - lost,
            1 - 2 * lost,
            1.0,
            "1",
            "published",
            "Llama 3 report, section 3.3.4: under 10% lost on 16,384 GPUs, in proportion to their number",
        ),
        "run.reserved": Figure(4e9, 2e9, 6e9, "B", "assumed", "context, communication buffers and fragmentation"),
    }


@dataclass(frozen=True)
class Inputs:
    """A cluster and the figures of a run."""

    cluster: Cluster
    own: Mapping[str, Figure]

    @property
    def figures(self) -> dict[str, Figure]:
        """All of them, by key."""
        return dict(self.cluster.figures()) | dict(self.own)

    def __getitem__(self, key: str) -> float:
        """The middle of a figure of the run."""
        return self.own[key].mid

    def with_figure(self, key: str, figure: Figure) -> Inputs:
        """The same with another figure."""
        if key in self.own:
            return replace(self, own={**self.own, key: figure})
        return replace(self, cluster=_changed(self.cluster, key.split("."), figure))

    def fixed(self, key: str, which: Which) -> Inputs:
        """The same with one figure at an end of its range."""
        return self.with_figure(key, self.figures[key].fixed(which))

    def assume(self, given: Sequence[str]) -> Inputs:
        """With `key=number` for each of `given`, in the figure's unit without prefix. `DscError` for an unknown key."""
        found = self
        for text in given:
            key, _, value = (part.strip() for part in text.partition("="))
            known = found.figures
            require(key in known, f"--assume {text}: unknown {key!r}, expected one of {', '.join(known)}")
            try:
                number = float(value)
            except ValueError:
                raise DscError(f"--assume {text}: expected a number of {known[key].unit}, found {value!r}") from None
            found = found.with_figure(key, Figure(number, number, number, known[key].unit, "assumed", "--assume"))
        return found


def _changed(part: Any, path: Sequence[str], figure: Figure) -> Any:
    name, *rest = path
    name = {"chip": "memory", "hour": "price"}.get(name, name)
    if name in ("memory", "price") or not rest:
        return replace(part, **{name: figure})
    return replace(part, **{name: _changed(getattr(part, name), rest, figure)})
