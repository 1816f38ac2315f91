"""Recomputing: keep fewer residuals, and run the ops that made the others again in backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..hardware.cost import seconds
from ..hardware.device import device
from ..ir.core import Func, Module, Op
from ..ir.errors import require
from ..ir.ops.elementwise import SwiGLU
from ..ir.ops.linalg import Matmul
from ..ir.ops.norm import RmsNorm
from ..ir.ops.quant import ScaledMatmul
from ..ir.stages import is_staged
from ..ir.timeline import timeline
from .manager import Declined, Pass, register
from .pairs import Pair, Plan, carried_out, listed, pairs, rerun, runs
from .residual_solver import cheapest

UP_PROJECTIONS = ("q_b_proj", "kv_b_proj")
"""MLA's projections up from the latent vectors."""


@register
@dataclass(frozen=True)
class Recompute(Pass):
    """Take values out of the bundles of residuals, and compute them again in backward, in phase R, right before they are first read.

    `policy=deepseek` does so for every RMSNorm, MLA's up-projections and the output of SwiGLU (DeepSeek-V3 report, section 3.2.3), and
    with them for what only moves, turns or quantises their results. With `budget-gb` (10^9 bytes) the pass chooses: residuals and
    workspace of one run stay within it at every point, and what is run again takes the least time, by the roofline of `device`. Inputs,
    weights, their gradients and the optimiser's state are not part of the budget. A function has one choice for all of its calls. Routing,
    whole numbers, handles and calls are never run again. Of a pipeline's stages less is kept of each micro-batch (a policy only, no
    budget): the pass comes after `split-stages`. What was chosen and what it costs is among the notes (`--why`).

    Before `recompute`:

        module { stage=differentiated, gradients={main={weights=[], calls=[]}} }

        func @main(%x: bf16[4, 8], %d: bf16[4, 8]) {
          %y: bf16[4, 8], %kept: bundle{bf16[4, 8], bf16[4, 8], bf16[4, 8]} = call(@f_fwd, [%x], weights="f")  @ main#1 F
          %d_x: bf16[4, 8], %d_w: f32[8, 8] = call(@f_bwd, [%kept, %d], weights="f")                           @ main#1.1 I
          return %y, %d_x, %d_w
        }

        func @f_fwd(%x: bf16[4, 8]) {
          %g: bf16[8] = param("norm.weight")                                                                   @ norm#1 F
          %n: bf16[4, 8] = rms_norm(%x, %g, eps=1e-06)                                                         @ norm#2 F
          %s: bf16[4, 8] = swiglu(%n, %n)                                                                      @ f#1 F
          %w: bf16[8, 8] = param("proj.weight")                                                                @ proj#1 F
          %y: bf16[4, 8] = matmul(%s, %w, transpose_b=true)                                                    @ proj#2 F
          %kept: bundle{bf16[4, 8], bf16[4, 8], bf16[4, 8]} = pack([%x, %n, %s])                               @ f_fwd#1 F
          return %y, %kept
        }

        func @f_bwd(%kept: bundle{bf16[4, 8], bf16[4, 8], bf16[4, 8]}, %d: bf16[4, 8]) {
          %x: bf16[4, 8], %n: bf16[4, 8], %s: bf16[4, 8] = unpack(%kept)                                       @ f_bwd#1 I
          %w: bf16[8, 8] = param("proj.weight")                                                                @ proj#1 I
          %d_s: bf16[4, 8] = matmul(%d, %w)                                                                    @ proj#2.1 I
          %t: bf16[8, 4] = transpose(%d, perm=[1, 0])                                                          @ proj#2.2 W
          %d_w: f32[8, 8] = matmul(%t, %s, out=f32)                                                            @ proj#2.3 W
          %a: bf16[4, 8], %b: bf16[4, 8] = swiglu_backward(%n, %n, %d_s)                                       @ f#1.1 I
          %d_n: bf16[4, 8] = add(%a, %b)                                                                       @ f#1.2 I
          %g: bf16[8] = param("norm.weight")                                                                   @ norm#1 I
          %d_x: bf16[4, 8], %d_g: f32[8] = rms_norm_backward(%x, %g, %d_n, eps=1e-06)                          @ norm#2.1 I
          return %d_x, %d_w
        }

    after:

        module { stage=rematerialized, gradients={main={weights=[], calls=[]}} }

        func @main(%x: bf16[4, 8], %d: bf16[4, 8]) {
          %y: bf16[4, 8], %kept: bundle{bf16[4, 8]} = call(@f_fwd, [%x], weights="f")                          @ main#1 F
          %d_x: bf16[4, 8], %d_w: f32[8, 8] = call(@f_bwd, [%kept, %d], weights="f")                           @ main#1.1 I
          return %y, %d_x, %d_w
        }

        func @f_fwd(%x: bf16[4, 8]) {
          %g: bf16[8] = param("norm.weight")                                                                   @ norm#1 F
          %n: bf16[4, 8] = rms_norm(%x, %g, eps=1e-06)                                                         @ norm#2 F
          %s: bf16[4, 8] = swiglu(%n, %n)                                                                      @ f#1 F
          %w: bf16[8, 8] = param("proj.weight")                                                                @ proj#1 F
          %y: bf16[4, 8] = matmul(%s, %w, transpose_b=true)                                                    @ proj#2 F
          %kept: bundle{bf16[4, 8]} = pack([%x])                                                               @ f_fwd#1 F
          return %y, %kept
        }

        func @f_bwd(%kept: bundle{bf16[4, 8]}, %d: bf16[4, 8]) {
          %x: bf16[4, 8] = unpack(%kept)                                                                       @ f_bwd#1 I
          %w: bf16[8, 8] = param("proj.weight")                                                                @ proj#1 I
          %d_s: bf16[4, 8] = matmul(%d, %w)                                                                    @ proj#2.1 I
          %t: bf16[8, 4] = transpose(%d, perm=[1, 0])                                                          @ proj#2.2 W
          %h: bf16[8] = param("norm.weight")                                                                   @ norm#1.1 R
          %n: bf16[4, 8] = rms_norm(%x, %h, eps=1e-06)                                                         @ norm#2.2 R
          %s: bf16[4, 8] = swiglu(%n, %n)                                                                      @ f#1.3 R
          %d_w: f32[8, 8] = matmul(%t, %s, out=f32)                                                            @ proj#2.3 W
          %a: bf16[4, 8], %b: bf16[4, 8] = swiglu_backward(%n, %n, %d_s)                                       @ f#1.1 I
          %d_n: bf16[4, 8] = add(%a, %b)                                                                       @ f#1.2 I
          %g: bf16[8] = param("norm.weight")                                                                   @ norm#1 I
          %d_x: bf16[4, 8], %d_g: f32[8] = rms_norm_backward(%x, %g, %d_n, eps=1e-06)                          @ norm#2.1 I
          return %d_x, %d_w
        }
    """

    name: ClassVar[str] = "recompute"
    requires: ClassVar[str] = "differentiated..sharded"
    ensures: ClassVar[str | None] = "rematerialized"

    policy: Literal["deepseek", "none"] = "deepseek"
    budget_gb: float | None = None
    device: str = "h800"

    def __post_init__(self) -> None:
        require(self.budget_gb is None or self.budget_gb > 0, f"budget-gb is {self.budget_gb}, expected more than 0")
        device(self.device)

    def __call__(self, module: Module) -> Module:
        found = pairs(module)
        count = runs(module)
        chip = device(self.device)
        known: dict[Op, float] = {}

        def once(op: Op) -> float:
            if op not in known:
                known[op] = seconds(op, chip)
            return known[op]

        def cost(pair: Pair, op: Op) -> float:
            return once(op) * count.get(pair.backward.name, 0)

        plan = self._plan(module, found, cost)
        after = carried_out(module, found, plan)
        total = 0.0
        for pair in found:
            ops, saved = rerun(pair, plan.get(pair.forward.name, pair.kept))
            spent = [(op, cost(pair, op)) for op in ops]
            total += sum(time for _, time in spent)
            shown = [f"{op.id} ({time * 1e3:.3g} ms)" for op, time in spent if time]
            if shown:
                dropped = sum(v.type.bytes for v in pair.kept) - sum(v.type.bytes for v in saved)
                self._note(pair.backward, pair.unpack, f"keeps {dropped / 1e9:.3g} GB less, runs again {', '.join(shown)}")
        line = timeline(module)
        before, most = (run.peak("residuals", "workspace")[0] for run in (line, timeline(after)))
        step = sum(once(point.op) for point in line.points)
        share = f" ({total / step:.1%} of {step * 1e3:.3g} ms)" if step else ""
        summary = f"residuals and workspace {before / 1e9:.4g} GB -> {most / 1e9:.4g} GB, for {total * 1e3:.3g} ms more{share}"
        self._note(module.main, None, f"{summary} on {chip.name}")
        return after.replace(stage="rematerialized")

    def unreported(self, module: Module) -> Module:
        """As a call, without the notes on what was chosen, which cost most of the time of a policy."""
        require(self.budget_gb is None, "recompute{budget-gb} is made by a call")
        found = pairs(module)
        return carried_out(module, found, self._plan(module, found, lambda pair, op: 0.0)).replace(stage="rematerialized")

    def _plan(self, module: Module, found: Sequence[Pair], cost: Callable[[Pair, Op], float]) -> Plan:
        if self.budget_gb is not None:
            staged = "a rank of a pipeline holds several micro-batches of its stages: policy=deepseek would fit"
            require(not is_staged(module), f"budget-gb bounds one run of all of @{module.main.name}, but {staged}")
            return cheapest(module, found, self.budget_gb * 1e9, cost)
        if self.policy == "deepseek":
            return {pair.forward.name: listed(pair, [op for op in pair.forward.ops if in_deepseeks_list(op)]) for pair in found}
        return {}

    def _note(self, func: Func, op: Op | None, text: str) -> None:
        self.declined.append(Declined(func.name, op.id if op else "memory", text))


def in_deepseeks_list(op: Op) -> bool:
    """Whether DeepSeek-V3 runs `op` again in backward: RMSNorm, an up-projection of MLA, SwiGLU."""
    component = op.id.partition("#")[0]
    return isinstance(op, RmsNorm | SwiGLU) or (isinstance(op, Matmul | ScaledMatmul) and component.endswith(UP_PROJECTIONS))
