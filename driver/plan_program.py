"""The program that a plan is made of: a source, traced once, and compiled for the ranks of one pipeline stage of each mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import gcd, lcm
from pathlib import Path
from typing import Any

from ..hardware.cluster import Cluster
from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.mesh import Mesh
from ..ir.walk import expert_weights, weights
from .plan_layers import Program

STEP = 64
"""How often a program runs before weights change, as far as its order goes: their casts take next to nothing of a run."""


@dataclass
class Compiler:
    """Traces `source` when it is first needed, once for each number of sequences, and compiles it for meshes.

    What a rank runs does not depend on dp, but for the size of groups that add gradients up, which a step's end is charged with. So every
    mesh is compiled with `lanes` ranks along dp, enough for every ep, and one trace serves them all. `placing` is the pass that gives
    experts slots, if they have any; `dispatch` says how tokens go to the experts of other nodes, as for `shard-experts`.
    """

    source: str | Path
    recipe: str | None
    seq: int | None
    recompute: str = "recompute"
    overrides: Sequence[str] = ()
    mode: str = "train"
    context: int | None = None
    placing: str = ""
    dispatch: str = "auto"
    lanes: int = 1
    on_step: Callable[[str], None] = lambda step: None
    traced: dict[int, Module] = field(default_factory=dict)
    sharded: dict[tuple[Mesh, int], Module] = field(default_factory=dict)
    programs: dict[tuple[Mesh, int, str], Program] = field(default_factory=dict)

    def of(self, tokens: int) -> Compiler:
        """One for sequences of so many tokens: of context where decoding."""
        seq, context = (None, tokens) if self.mode == "decode" else (tokens, None)
        same = (seq, context) == (self.seq, self.context)
        return self if same else replace(self, seq=seq, context=context, traced={}, sharded={}, programs={})

    def program(self, mesh: Mesh, sequences: int, cluster: Cluster) -> Program:
        """What a rank of a cluster runs for `sequences` of each rank along dp. Assumptions about a cluster leave the program as it is."""
        stage = Mesh(1, self.lanes, mesh.ep, mesh.tp, mesh.node)
        key = stage, sequences, cluster.name
        if key not in self.programs:
            self.programs[key] = Program(self._sharded(stage, sequences), cluster, STEP)
        return self.programs[key]

    def _sharded(self, mesh: Mesh, sequences: int) -> Module:
        from ..passes.manager import parse_pipeline
        from ..passes.recompute import Recompute

        if (mesh, sequences) not in self.sharded:
            module = self.trace(mesh.dp * sequences)
            dispatch = self.dispatch if mesh.size("ep.node") > 1 else "auto"
            passes = [f'shard-experts{{mesh="{mesh}",dispatch={dispatch}}}', self.recompute if self.mode == "train" else "", "fuse"]
            for each in parse_pipeline(",".join(filter(None, passes))):  # not verified between: what `dsc compile` verifies is the same
                quick = isinstance(each, Recompute) and each.budget_gb is None
                module = each.unreported(module) if quick else each(module)  # type: ignore[attr-defined]
            self.sharded[mesh, sequences] = module
            self.on_step(f"sharded for {mesh}")
        return self.sharded[mesh, sequences]

    def trace(self, batch: int) -> Module:
        """The program of `batch` sequences on one rank, differentiated in training and quantised."""
        from ..passes.manager import apply
        from .compile import default_pipeline, read

        if batch not in self.traced:
            _, module, config = read(self.source, mode=self.mode, batch=batch, seq=self.seq, context=self.context, overrides=self.overrides)
            passes = default_pipeline(self.recipe, config, self.mode, placing=self.placing).replace("autodiff,", "autodiff{split=true},")
            self.traced[batch] = apply(module, passes)
            self.on_step("traced")
        return self.traced[batch]


def lanes(tried: Sequence[Mesh]) -> int:
    """The least number of ranks along dp that every mesh could have."""
    return lcm(*(mesh.ep // gcd(mesh.ep, mesh.tp) for mesh in tried))


def meshes(gpus: int, node: int, config: Mapping[str, Any], batch: int, tp: Sequence[int]) -> list[Mesh]:
    """Every mesh of `gpus` ranks with these tp in which ep is a power of two, and experts, heads, layers and batch divide as they must."""
    experts, heads, layers = config.get("n_routed_experts") or 1, config["num_attention_heads"], config["num_hidden_layers"]
    found = []
    for pp, width in product((n for n in range(1, min(gpus, layers) + 1) if gpus % n == 0), tp):
        stage = gpus // pp
        if stage % width or heads % width or batch % (stage // width):
            continue
        for ep in (1 << i for i in range(experts.bit_length()) if experts % (1 << i) == 0 and stage % (1 << i) == 0):
            try:
                found.append(Mesh(pp, stage // width, ep, width, node))
            except DscError:  # groups that do not fit nodes
                continue
    return found


def roomy(tried: Sequence[Mesh], module: Module, capacity: float) -> list[Mesh]:
    """The meshes on which weights and gradients alone fit, evenly spread: 6 bytes for each parameter that a rank holds."""
    experts = expert_weights(module)
    split = sum(t.size for name, t in weights(module).items() if name in experts)
    whole = sum(t.size for name, t in weights(module).items() if name not in experts)
    return [m for m in tried if 6 * (split / m.ep + whole / m.tp) / m.pp <= capacity]


def config_of(source: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of a model. `DscError` for a source without one."""
    from ..models.config import load_config
    from .compile import resolve

    found = resolve(source)
    known = found.kind in ("config", "checkpoint")
    require(known, f"{source} is no model configuration; expected a shipped name (dsc models), a config.json or a checkpoint folder")
    return load_config(source, overrides).to_dict()
