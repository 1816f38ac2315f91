"""The coefficients of the H800, from published tables of components (`tables.py`): the same ones whenever it runs.

Four of products are found together, those that bring the logarithms of DeepGEMM's rows nearest to the model's in the sum of squares, by the
simplex method (Nelder and Mead, Computer Journal 7(4), 1965). Each of the others scales the rows of one table, so it is what makes the
mean of their logarithms right. Promotion is not among them: a table of kernels that all promote cannot tell it from multiplying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import exp, inf, log

from ..ir.errors import require
from .cluster import Cluster
from .tables import Entry, attentions, beside_exchanges, beside_products, decodes, dispatches, low_latency, norms, products, wgrads

Predict = Callable[[Cluster], Iterator[Entry]]
PRODUCTS = ("device.kernels.matrix", "device.kernels.feed", "device.kernels.ramp", "device.kernels.memory")


def fitted(start: Cluster) -> dict[str, float]:
    """Each coefficient by its key, beginning with those of `start`."""
    made = start
    found: dict[str, float] = {}

    def settle(values: Mapping[str, float]) -> None:
        nonlocal made
        found.update(values)
        made = made.with_figures(values)

    values = nearest(lambda logs: _squares(made.with_figures(_exp(PRODUCTS, logs)), products), [log(made.figure(k).mid) for k in PRODUCTS])
    settle(_exp(PRODUCTS, values))
    for key, table, kept, sign in _SCALES:
        ratio = _mean(log(1 + e.error) for e in table(made) if kept in e.label)
        settle({key: made.figure(key).mid * exp(sign * ratio)})
    away = [e for e in low_latency(made) if e.label.endswith(" ranks")]
    excess = _mean((e.predicted - e.published) * 1e-6 for e in away)
    settle({"comm.notify": made.figure("comm.notify").mid - excess})
    return found


def _few(table: Predict, names: tuple[str, ...]) -> Predict:
    return lambda cluster: (e for e in table(cluster) if e.label.endswith(names))


_SCALES: tuple[tuple[str, Predict, str, int], ...] = (
    ("comm.compute_slowdown", beside_products, "", -1),
    ("device.kernels.wgrad", wgrads, "", -1),
    ("device.kernels.attention", attentions, "forward", 1),
    ("device.kernels.attention_backward", attentions, "backward", 1),
    ("device.kernels.decode", decodes, "matrix", 1),
    ("device.kernels.cache", decodes, "memory", 1),
    ("device.kernels.rows", norms, "", 1),
    ("intra.efficiency", _few(dispatches, (" 8 ranks", " 16 ranks")), "", 1),
    ("inter.efficiency", _few(dispatches, (" 32 ranks", " 64 ranks")), "", 1),
    ("comm.slowdown", beside_exchanges, "", -1),
)
"""A coefficient, the rows that it scales, what their labels contain, and whether their time falls (1) or rises (-1) with it."""


def _exp(keys: Sequence[str], logs: Sequence[float]) -> dict[str, float]:
    return {key: exp(value) for key, value in zip(keys, logs, strict=True)}


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _squares(cluster: Cluster, table: Predict) -> float:
    return sum(log(1 + entry.error) ** 2 for entry in table(cluster))


def nearest(loss: Callable[[Sequence[float]], float], start: Sequence[float], size: float = 0.2, rounds: int = 2000) -> list[float]:
    """Where `loss` is least near `start`, by a simplex of `size` that is begun anew when it has shrunk. `DscError` without SciPy."""
    require(find_spec("scipy") is not None, "to fit coefficients needs scipy: pip install 'dsc[plan]'")
    from scipy.optimize import minimize

    best = list(start)
    for _ in range(3):
        corners = [best, *([x + size * (i == j) for j, x in enumerate(best)] for i in range(len(best)))]
        how = {"initial_simplex": corners, "maxiter": rounds, "fatol": 1e-13, "xatol": inf}
        best = minimize(loss, best, method="Nelder-Mead", options=how).x.tolist()
    return best
