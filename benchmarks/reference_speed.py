"""One V2-Lite-wide MoE layer on 256 tokens: the NumPy reference, in float32 and in FP8, against the float32 layer of `transformers`.

All run in this process, on the same weights and tokens and with the same number of threads; the best of five runs counts, all taking
turns; with one thread it is processor time that counts, which does not depend on what else the machine does. FP8 is the recipe of the
DeepSeek-V3 report with float32 accumulation and weights stored in FP8. What it costs to quantise the weights as the program runs, as
training does, is printed beside it. The ratios are to be at most 2 and 5. OpenBLAS chooses its kernels by the processor unless the
variables OPENBLAS_CORETYPE or OPENBLAS_L2_SIZE are set, which slow it down: unset them.

    python benchmarks/reference_speed.py
"""

from __future__ import annotations

import os

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))))
os.environ.setdefault("OPENBLAS_NUM_THREADS", str(THREADS))

import sys  # noqa: E402
import time  # noqa: E402
from collections import OrderedDict  # noqa: E402
from collections.abc import Callable  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from transformers.models.deepseek_v2 import DeepseekV2Config  # noqa: E402
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe  # noqa: E402

import dsc  # noqa: E402
from dsc import backends  # noqa: E402
from dsc.ir.core import Module  # noqa: E402
from dsc.ir.quantization import SCALE_SUFFIX  # noqa: E402
from dsc.models.config import load_config  # noqa: E402
from dsc.models.deepseek import MoE  # noqa: E402
from dsc.numerics.scale import quantize  # noqa: E402
from dsc.passes.manager import apply  # noqa: E402

TOKENS, HIDDEN, EXPERTS, WIDTH, TOP_K, SHARED = 256, 2048, 64, 1408, 6, 2
AT_MOST = {"float32": 2.0, "FP8, weights stored": 5.0}


def layer() -> Module:
    """DeepSeekMoE as DeepSeek-V2-Lite has it: softmax gate without groups, weights not normalised, two shared experts as one MLP."""
    with torch.device("meta"):
        model = nn.Sequential(OrderedDict(mlp=MoE(load_config("deepseek-v2-lite", ["dtype=float32"]))))
        return apply(dsc.trace(model, (torch.empty(1, TOKENS, HIDDEN),)), "simplify")


def peer() -> DeepseekV2Moe:
    """The same layer of `transformers`, with random weights."""
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_shared_experts=SHARED,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    )
    config._experts_implementation = "grouped_mm"
    module = DeepseekV2Moe(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return module


def weights_of(module: DeepseekV2Moe) -> dict[str, np.ndarray]:
    """The peer's weights under the names that `layer` uses, without a copy."""
    experts, shared = module.experts, module.shared_experts
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    found = {
        "mlp.gate.weight": module.gate.weight,
        "mlp.experts.gate_proj": gate,
        "mlp.experts.up_proj": up,
        "mlp.experts.down_proj": experts.down_proj,
        **{f"mlp.shared_experts.{name}.weight": getattr(shared, name).weight for name in ("gate_proj", "up_proj", "down_proj")},
    }
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def seconds(function: Callable[[], object]) -> float:
    clock = time.process_time if THREADS == 1 else time.perf_counter  # one thread's own time does not depend on its neighbours
    start = clock()
    function()
    return clock() - start


def stored_in_fp8(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights as an FP8 checkpoint holds them, by the names that a quantised program reads."""
    found = dict(weights)
    for name, array in weights.items():
        if name != "mlp.gate.weight":
            found[name], found[name + SCALE_SUFFIX] = quantize(array, (128, 128))
    return found


def main() -> int:
    torch.set_num_threads(THREADS)
    module, program, runner = peer(), layer(), backends.get("numpy")
    plain = weights_of(module)
    stored = stored_in_fp8(plain)
    tokens = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    x = tokens.numpy()
    programs = {
        "float32": (program, plain),
        "FP8, weights stored": (apply(program, "quantize-fp8{stored=true}"), stored),
        "FP8, weights quantised on the way": (apply(program, "quantize-fp8"), plain),
    }

    def ours(name: str) -> np.ndarray:
        chosen, weights = programs[name]
        return runner.run(chosen, lambda path, type: weights[path], (x,))[0][0]

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return module(tokens)[0].numpy()

    expected = theirs()
    errors = {name: float(np.linalg.norm(ours(name) - expected) / np.linalg.norm(expected)) for name in programs}
    times = {name: [] for name in (*programs, "")}
    for _ in range(5):
        times[""].append(seconds(theirs))
        for name in programs:
            times[name].append(seconds(lambda name=name: ours(name)))
    peers = min(times.pop(""))
    print(f"one V2-Lite-wide MoE layer, {TOKENS} tokens, {THREADS} threads, best of 5")
    print(f"transformers {transformers.__version__} grouped_mm, float32: {peers * 1e3:.0f} ms")
    for name, found in times.items():
        limit = f" (at most {AT_MOST[name]:g})" if name in AT_MOST else ""
        ratio = f"ratio {min(found) / peers:.2f}{limit}"
        print(f"dsc numpy, {name}: {min(found) * 1e3:.0f} ms, {ratio}, relative difference {errors[name]:.1e}")
    slow = any(min(times[name]) > limit * peers for name, limit in AT_MOST.items())
    return int(slow or errors["float32"] > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
