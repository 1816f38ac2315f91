"""A prepared program: what is brought to the device once, what a run allocates, when a CUDA graph is recorded, and what a launch costs.

Launches are tested without a GPU through Triton's own launcher, built against a `libcuda.so.1` of a few lines that counts what it is asked
to launch: loading of machine code, order and kind of the arguments, and host time are real, only the device is not.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import weakref
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

from dsc import backends
from dsc.backends.triton import torch_ops
from dsc.backends.triton.launch import Scratch
from dsc.backends.triton.prepared import Prepared
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.registry import KERNELS, Launch, Slot
from dsc.backends.triton.run import Executor
from dsc.backends.triton.targets import TARGETS
from dsc.backends.triton.torch_ops.registry import INTO, WAITS
from dsc.ir.core import Builder, Module, Op
from dsc.ir.errors import DscError
from dsc.ir.ops.collective import Collective
from dsc.ir.ops.control import Param
from dsc.ir.ops.elementwise import SwiGLU
from dsc.ir.ops.linalg import Matmul
from dsc.ir.ops.norm import RmsNorm
from dsc.ir.types import DType, Tensor
from dsc.testing.samples import SAMPLES

F32, ROWS, WIDTH = DType.f32, 4, 32


def mlp() -> Module:
    """Two kernels and two products by the vendor's GEMM."""
    b = Builder("main")
    x = b.param("x", Tensor(F32, (ROWS, WIDTH)))
    scale = b.emit(Param("norm", (Tensor(F32, (WIDTH,)),))).result
    up, down = (b.emit(Param(name, (Tensor(F32, (WIDTH, WIDTH)),))).result for name in ("up", "down"))
    wide = b.emit(Matmul(b.emit(RmsNorm(x, scale, 1e-6)).result, up, transpose_b=True)).result
    return Module((b.finish(b.emit(Matmul(b.emit(SwiGLU(wide, wide)).result, down)).results),))


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Weights:
    """A source of weights that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, name: str, type: Tensor) -> np.ndarray:
        self.asked.append(name)
        return random(len(name), *type.shape)


def test_weights_are_fetched_once_for_as_long_as_their_source_lives() -> None:
    module, executor, weights = mlp(), Executor(), Weights()
    for seed in range(3):
        x = random(seed, ROWS, WIDTH)
        np.testing.assert_allclose(
            executor.run(module, weights, (x,))[0], backends.get("numpy").run(module, Weights(), (x,))[0], rtol=1e-4, atol=1e-5
        )
    assert weights.asked == ["norm", "up", "down"]
    other = Weights()
    executor.run(module, other, (random(0, ROWS, WIDTH),))
    assert other.asked == ["norm", "up", "down"]
    assert len(executor.kept) == 2


@pytest.mark.parametrize("dropped", ["weights", "module"])
def test_nothing_is_kept_when_the_weights_or_the_module_are_gone(dropped: str) -> None:
    module, executor, weights = mlp(), Executor(), Weights()
    executor.run(module, weights, (random(0, ROWS, WIDTH),))
    ((prepared,),) = executor.kept[weights][module].values()
    watched = weakref.ref(prepared)
    del prepared
    if dropped == "weights":
        del weights
    else:
        del module
    gc.collect()
    assert watched() is None


class Allocations(TorchDispatchMode):
    """Counts the torch ops whose result lies in memory that none of their arguments has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.found.append(str(func))
        return result


def test_kernels_and_vendor_products_allocate_nothing() -> None:
    module = mlp()
    prepared = Executor().prepare(module, Weights(), (random(0, ROWS, WIDTH),))
    assert len(prepared.actions) == 4
    with Allocations() as counted:
        prepared.execute()
    assert counted.found == []
    with Allocations() as counted:
        torch.ones(3) + 1
    assert len(counted.found) == 2  # the count sees what it should


def test_inputs_and_results_stay_where_they_are() -> None:
    module, weights = mlp(), Weights()
    prepared = Executor().prepare(module, weights, (random(0, ROWS, WIDTH),))
    addresses = [t.data_ptr() for t in (*prepared.inputs, *prepared.results)]
    first, second = (prepared((random(seed, ROWS, WIDTH),))[0] for seed in (1, 2))
    assert addresses == [t.data_ptr() for t in (*prepared.inputs, *prepared.results)]
    expected = [backends.get("numpy").run(module, Weights(), (random(seed, ROWS, WIDTH),))[0] for seed in (1, 2)]
    np.testing.assert_allclose([first, second], expected, rtol=1e-4, atol=1e-5)


def test_a_product_written_in_place_has_the_bits_of_the_other() -> None:
    b = Builder("f")
    for shapes in [((6, 8), (8, 5)), ((2, 3, 8), (8, 5)), ((2, 3, 8), (2, 8, 5)), ((2, 3, 0), (0, 5))]:
        operands = [b.param("x", Tensor(F32, shape)) for shape in shapes]
        op = Matmul(*operands)
        a, c = (torch.from_numpy(random(1, *shape)) for shape in shapes)
        made = torch.full(tuple(op.result.tensor.shape), torch.nan)
        into = INTO[Matmul](op, a, c, made)
        assert into is not None
        into()
        assert torch.equal(made, torch_ops.run(op, (a, c))[0])


NO_SCRATCH = Scratch(torch.device("cpu"))


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph."""

    replayed = 0

    def replay(self) -> None:
        self.replayed += 1


def recording(monkeypatch: pytest.MonkeyPatch, failing: bool = False) -> list[str]:
    events: list[str] = []

    @contextmanager
    def graph(made: FakeGraph) -> Any:
        events.append("record")
        yield
        if failing:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return events


def counted(graphed: bool) -> tuple[Prepared, list[int]]:
    calls: list[int] = []
    return Prepared((), (), (), (), [lambda: calls.append(1)], ["@main main#0: add"], NO_SCRATCH, graphed, ()), calls


def test_the_second_run_is_recorded_and_the_next_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    events = recording(monkeypatch)
    prepared, calls = counted(graphed=True)
    for _ in range(4):
        prepared.execute()
    assert events == ["record"]
    assert len(calls) == 2  # the first run, and the recording, which does not execute
    assert prepared.graph.replayed == 3


def test_what_cannot_be_recorded_is_launched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    events = recording(monkeypatch, failing=True)
    prepared, calls = counted(graphed=True)
    for _ in range(4):
        prepared.execute()
    assert events == ["record"]
    assert len(calls) == 5
    assert capsys.readouterr().err == (
        "dsc: no CUDA graph, each kernel is launched by itself: operation not permitted when stream is capturing\n"
    )
    switched_off, calls = counted(graphed=False)
    for _ in range(3):
        switched_off.execute()
    assert len(calls) == 3


def test_an_action_that_fails_names_its_op() -> None:
    def fail() -> None:
        raise IndexError("out of range")

    with pytest.raises(DscError, match=r"^@main main#1: take: out of range$"):
        Prepared((), (), (), (), [lambda: None, fail], ["@main main#0: add", "@main main#1: take"], NO_SCRATCH, False, ()).execute()


def test_ops_that_wait_for_values_are_named_and_no_others_do() -> None:
    """On tensors without memory an op whose function reads a value fails."""
    reading = set()
    seen: Counter[type[Op]] = Counter()
    for sample in SAMPLES:
        seen[sample.cls] += 1
        if seen[sample.cls] <= 2 and sample.cls in torch_ops.TORCH and not issubclass(sample.cls, Collective):
            op = sample.op()
            try:
                torch_ops.run(op, tuple(layout_of(v.type) for v in op.operands))
            except (RuntimeError, NotImplementedError) as error:
                reading |= {sample.cls} if "meta tensor" in str(error) else set()
    assert reading == WAITS


def test_the_workspace_of_a_launch_without_programs_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may stand among the arguments of a later launch."""
    space = Slot("workspace", 0, F32, (8,), (1,))

    def launcher(op: Op, target: Any, x: Slot, w: Slot, y: Slot) -> tuple[Launch, Launch]:
        return Launch(None, (0,), {"X": x, "S": space}, workspace=(space,)), Launch(None, (1,), {"S": space, "Y": y})

    monkeypatch.setitem(KERNELS, RmsNorm, launcher)
    module = mlp()
    plan = plan_function(module, module.main, [layout_of(p.type) for p in module.main.params], TARGETS["sm_90"], {})
    (step,) = (s for s in plan.steps if isinstance(s.op, RmsNorm))
    assert len(step.launches) == len(step.workspace) == 1
    assert plan.buffers[step.workspace[0]].bytes == 32


STUB = r"""
#include <stddef.h>
typedef unsigned long long u64;
typedef struct { unsigned grid[3], block[3], shared; void *stream; void *attributes; unsigned count; } Config;
u64 launches, last_grid, last_threads, last_pointer;
#define OK(name) int name() { return 0; }
OK(cuCtxSetCurrent) OK(cuCtxSetLimit) OK(cuCtxGetLimit) OK(cuFuncSetAttribute) OK(cuFuncSetCacheConfig) OK(cuModuleUnload)
OK(cuOccupancyMaxActiveClusters) OK(cuTensorMapEncodeTiled) OK(cuTensorMapEncodeIm2col) OK(cuStreamIsCapturing) OK(cuGetErrorString)
OK(cuPointerGetAttributes) OK(cuPointerGetAttribute)
int cuCtxGetCurrent(u64 *context) { *context = 1; return 0; }
int cuDevicePrimaryCtxRetain(u64 *context, int device) { *context = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = 227 * 1024; return 0; }
int cuFuncGetAttribute(int *value, int which, void *function) { *value = 1024; return 0; }
int cuModuleLoadData(u64 *module, const char *image) { *module = (u64)image; return image[0] == 0x7f && image[1] == 'E' ? 0 : 200; }
int cuModuleGetFunction(u64 *function, u64 module, const char *name) { *function = module; return 0; }
int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  launches++; last_grid = config->grid[0]; last_threads = config->block[0]; last_pointer = *(u64 *)parameters[0];
  return 0;
}
"""

PROGRAM = r"""
import ctypes, json, sys, time
from pathlib import Path
import numpy as np, torch
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver
active = CudaDriver()
active.get_current_device, active.get_current_stream = (lambda: 0), (lambda device: 0)
active.get_current_target = lambda: __import__("triton").backends.compiler.GPUTarget("cuda", 90, 32)
driver.set_active(active)
from dsc.backends.triton import aot, machine_code, run
from dsc.backends.triton.targets import TARGETS
from dsc.backends.triton.torch_ops.registry import INTO, WAITS
from dsc.ir.core import Builder, Module
from dsc.backends.arrays import STORAGE
from dsc.ir.ops.norm import RmsNorm
from dsc.ir.ops.quant import ScaledMatmul
from dsc.ir.types import DType, Tensor
run.machine = lambda: (TARGETS["sm_90"], torch.device("cpu"))
b, layers = Builder("main"), 50
x, w = b.param("x", Tensor(DType.bf16, (64, 512))), b.param("w", Tensor(DType.bf16, (512,)))
y = x
for _ in range(layers):
    y = b.emit(RmsNorm(y, w, 1e-6)).result
module = Module((b.finish([y]),))
folder = Path(sys.argv[1])
aot.write(aot.compile_jobs(aot.jobs(module, [TARGETS["sm_90"]]), cache=folder / "first"), folder / "kernels")
compiled = []
original = machine_code.compile_jobs
machine_code.compile_jobs = lambda jobs: compiled.extend(jobs) or original(jobs, cache=folder / "first")
import ml_dtypes
inputs = np.ones((64, 512), ml_dtypes.bfloat16), np.ones(512, ml_dtypes.bfloat16)
prepared = run.Executor(graphs=False).with_kernels(folder / "kernels").prepare(module, lambda *_: None, inputs)
stub = ctypes.CDLL("libcuda.so.1")
read = lambda name: ctypes.c_uint64.in_dll(stub, name).value
found = {"compiled": len(compiled), "before": read("launches")}
prepared.execute()
found |= {"launches": read("launches"), "threads": read("last_threads"), "grid": read("last_grid")}
prepared.actions[0]()
found |= {"pointer": read("last_pointer") == prepared.inputs[0].data_ptr()}
def microseconds(prepared):
    times = []
    for _ in range(200):
        start = time.perf_counter()
        prepared.execute()
        times.append((time.perf_counter() - start) / len(prepared.actions))
    return min(times) * 1e6
found["microseconds"] = [microseconds(prepared)]
(description,) = (folder / "kernels" / "sm_90").glob("*[0-9a-f].json")
description.write_text(description.read_text().replace('"key": "', '"key": "0'))
run.Executor().with_kernels(folder / "kernels").prepare(module, lambda *_: None, inputs)
found["compiled where the key differs"] = len(compiled)
b, size = Builder("main"), 2048
a, c = (b.param(name, Tensor(DType.f8e4m3, (size, 256))) for name in "ac")
sa, sc = b.param("sa", Tensor(DType.f32, (size, 2))), b.param("sc", Tensor(DType.f32, (size // 128, 2)))
ops = [ScaledMatmul(a, sa, c, sc) for _ in range(20)]
module = Module((b.finish([b.emit(op).result for op in ops]),))
inputs = [np.ones(p.type.shape, STORAGE[p.type.dtype]) for p in module.main.params]
prepared = run.Executor(graphs=False).prepare(module, lambda *_: None, inputs)
prepared.execute()
found |= {"kernel": compiled[-1].function, "grid of products": read("last_grid"), "scratch": len(prepared.scratch.buffer) > 0}
buffer = prepared.scratch.buffer.data_ptr()
found["microseconds"].append(microseconds(prepared))
found["scratch stays"] = prepared.scratch.buffer.data_ptr() == buffer
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("gcc") is None or not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    reason="no C compiler with Python's headers, which Triton's launcher is built with",
)
def test_launches_through_tritons_own_launcher(tmp_path: Path) -> None:
    """Machine code comes from the artifact where the content key is the same. A launch's host time is printed."""
    (tmp_path / "stub.c").write_text(STUB)
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", tmp_path / "libcuda.so.1", tmp_path / "stub.c"], check=True)
    variables = {"TRITON_INTERPRET": "0", "TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    variables |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=300, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print("microseconds a launch:", ", ".join(f"{each:.2f}" for each in found.pop("microseconds")))
    assert found == {
        **{"compiled": 0, "before": 0, "launches": 50, "threads": 256, "grid": 8, "pointer": True},
        **{"compiled where the key differs": 1, "kernel": "scaled_matmul_specialized_kernel", "grid of products": 132},
        **{"scratch": True, "scratch stays": True},
    }
