"""Clusters by name, from `clusters/*.toml`: a device, how many share a scale-up domain, the links inside and between domains, and a price.

A file names its device, or describes one as a table. With `base` it says only what it changes of another cluster, so a variant is a few
lines; a figure that is changed is signed by the file that changes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from ..ir.errors import require
from .device import DEVICES, KERNELS, PEAK, Device, find, parse_device, read_device
from .figures import SIGNED, Figure, group, read_toml

CLUSTERS = Path(__file__).with_name("clusters")
PRICE, MEMORY = "price.hour", "device.chip.memory"

Feature = Literal["wide-accumulator", "group-scaling", "fused-cast", "transposed-reads"]
"""What the authors of DeepSeek-V3 ask of a chip's arithmetic (report, section 3.5.2).

wide-accumulator   FP8 sums need no promotion to be accurate             group-scaling      the matrix unit multiplies by the tiles' scales
fused-cast         values are cast to FP8 on their way into shared memory transposed-reads  operands are turned as they are read
"""


@dataclass(frozen=True)
class Link:
    """A way between GPUs: bytes a second per GPU and direction, the share that long transfers reach, and the time to the first byte."""

    bandwidth: Figure
    efficiency: Figure
    latency: Figure


LINK = {"bandwidth": "B/s", "efficiency": "1", "latency": "s"}


@dataclass(frozen=True)
class Comm:
    """How communication runs beside computation.

    sms       SMs given to communication while it runs beside computation  notify            s that ranks agree on sizes before an exchange
    slowdown  time of communication beside computation by its time alone   compute_slowdown  the same of computation, SMs apart
    """

    sms: Figure
    notify: Figure
    slowdown: Figure
    compute_slowdown: Figure


COMM = {"sms": "1", "notify": "s", "slowdown": "1", "compute_slowdown": "1"}


@dataclass(frozen=True)
class Cluster:
    """GPUs in scale-up domains of `node` GPUs each, `intra` links inside and `inter` links between them, at a price per GPU and hour."""

    name: str
    device: Device
    node: int
    intra: Link
    inter: Link
    comm: Comm
    price: Figure
    features: frozenset[Feature] = frozenset()
    about: str = ""

    @property
    def launch(self) -> Figure:
        """Seconds between two kernels of a stream."""
        return self.device.kernels.launch

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its key, those of the device after those of the cluster."""
        for name, part in (("intra", self.intra), ("inter", self.inter), ("comm", self.comm)):
            yield from ((f"{name}.{f.name}", getattr(part, f.name)) for f in fields(part))
        yield PRICE, self.price
        yield from ((f"device.peak.{key}", getattr(self.device.peak, key)) for key in PEAK)
        yield MEMORY, self.device.memory
        yield from ((f"device.kernels.{key}", getattr(self.device.kernels, key)) for key in KERNELS)

    def figure(self, key: str) -> Figure:
        """One figure by its key, as `figures` names them. Raises `DscError` with the keys that there are."""
        found = dict(self.figures())
        require(key in found, f"{self.name} has no figure {key}; it has {', '.join(found)}")
        return found[key]

    def with_figures(self, values: Mapping[str, float]) -> Cluster:
        """The cluster with other figures, by key, as if they were known exactly: what would be if."""
        return self.replaced({key: replace(self.figure(key), mid=value, low=value, high=value) for key, value in values.items()})

    def replaced(self, figures: Mapping[str, Figure]) -> Cluster:
        """The cluster with these figures, by key."""
        made = self
        for key, changed in figures.items():
            self.figure(key)
            part, name = key.rsplit(".", 1)
            if key == PRICE:
                made = replace(made, price=changed)
            elif not part.startswith("device"):
                made = replace(made, **{part: replace(getattr(made, part), **{name: changed})})
            elif key == MEMORY:
                made = replace(made, device=replace(made.device, memory=changed))
            else:
                part = part.removeprefix("device.")
                holder = replace(getattr(made.device, part), **{name: changed})
                made = replace(made, device=replace(made.device, **{part: holder}))
        return made


def clusters() -> tuple[str, ...]:
    """The names of the clusters that dsc ships."""
    return tuple(sorted(file.stem for file in CLUSTERS.glob("*.toml")))


def cluster(name: str) -> Cluster:
    """The cluster of that name (in any case), or that a .toml file describes. Raises `DscError` with the nearest names."""
    return _read(find(name, CLUSTERS, "cluster"))


@cache
def _read(file: Path) -> Cluster:
    return _parse(_complete(file, ()), str(file))


def _complete(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The tables of a file over those of its base, each figure signed by whoever says it."""
    raw = read_toml(file)
    require(file not in above, f"{file}: base leads back to itself through {', '.join(map(str, above))}")
    base = raw.pop("base", None)
    described = raw.get("device")
    if isinstance(described, dict):
        inner = described.pop("base", None)
        require(inner is None or isinstance(inner, str), f"{file}: device.base: expected a device, found {inner!r}")
        described = _signed(described)
        raw["device"] = _merged(_signed(read_toml(_beside(inner, file, DEVICES, "device"))), described) if inner else described
    elif isinstance(described, str):
        raw["device"] = str(_beside(described, file, DEVICES, "device"))
    elif described is not None:
        require(False, f'{file}: expected device = "name" or a table, found {described!r}')
    if base is None:
        return _signed(raw)
    require(isinstance(base, str), f'{file}: expected base = "cluster", found {base!r}')
    return _merged(_complete(_beside(base, file, CLUSTERS, "cluster"), (*above, file)), _signed(raw))


def _beside(name: str, file: Path, folder: Path, what: str) -> Path:
    """The file that `file` means by a name: a path is relative to its folder."""
    found = find(name, folder, f"{what} in {file}:")
    return found if found.is_absolute() or found.parent == folder else file.parent / found


def _signed(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Tables with the provenance and source of each group in each of its figures."""
    found: dict[str, Any] = {}
    for key, table in tables.items():
        signature = {s: table[s] for s in SIGNED if s in table} if isinstance(table, Mapping) else {}
        if key == "accumulation" or not isinstance(table, Mapping):
            found[key] = table
        elif key == "device":
            found[key] = _signed(table)
        else:
            given = {k: dict(v) if isinstance(v, Mapping) else {"mid": v} for k, v in table.items() if k not in SIGNED}
            found[key] = {k: signature | v for k, v in given.items()} | signature
    return found


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in over.items():
        old = found.get(key)
        if key == "device" and isinstance(value, Mapping) and isinstance(old, str):
            old = _signed(read_toml(Path(old)))
        both = isinstance(value, Mapping) and isinstance(old, Mapping) and "mid" not in value
        found[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return found


def _parse(raw: Mapping[str, Any], where: str) -> Cluster:
    known = ("name", "about", "device", "node", "features", "intra", "inter", "comm", "price")
    unknown = ", ".join(sorted(set(raw) - set(known)))
    require(not unknown, f"{where}: unknown key {unknown}; expected base or some of {', '.join(known)}")
    require(isinstance(raw.get("name"), str), f'{where}: expected name = "...", found {raw.get("name")!r}')
    about = raw.get("about", "")
    require(isinstance(about, str), f'{where}: expected about = "...", found {about!r}')
    node = raw.get("node")
    require(type(node) is int and node >= 1, f"{where}: node: expected how many GPUs a scale-up domain has, 1 or more, found {node!r}")
    features = raw.get("features", [])
    require(isinstance(features, list), f"{where}: features: expected a list, found {features!r}")
    for feature in features:
        require(feature in get_args(Feature), f"{where}: features: unknown {feature!r}, expected some of {', '.join(get_args(Feature))}")
    described = raw.get("device")
    require(described is not None, f'{where}: expected device = "name" or a table')
    chip = parse_device(described, f"{where}: device") if isinstance(described, Mapping) else read_device(Path(str(described)))
    intra, inter = (Link(**group(raw.get(key), LINK, f"{where}: {key}")) for key in ("intra", "inter"))
    comm = Comm(**group(raw.get("comm"), COMM, f"{where}: comm"))
    for key, link in (("intra", intra), ("inter", inter)):
        require(link.bandwidth.low > 0, f"{where}: {key}.bandwidth: expected more than 0 B/s")
        share = link.efficiency
        require(share.low > 0 and share.high <= 1, f"{where}: {key}.efficiency: expected a share above 0, at most 1, found {share}")
    for key in ("slowdown", "compute_slowdown"):
        require(getattr(comm, key).low >= 1, f"{where}: comm.{key}: expected 1 or more, found {getattr(comm, key)}")
    require(comm.sms.high < max(2, chip.units), f"{where}: comm.sms is {comm.sms}, but {chip.name} has {chip.units}")
    price = group(raw.get("price"), {"hour": "USD/h"}, f"{where}: price")["hour"]
    return Cluster(str(raw["name"]), chip, int(node), intra, inter, comm, price, frozenset(features), about)  # type: ignore[arg-type]
