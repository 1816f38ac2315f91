"""Compiling ahead of time, with no GPU: the machine code is what it should be, and the cache and its workers hold.

Every compilation runs in a worker process, so the interpreter of the other tests does not get in its way.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dsc.backends.triton import aot
from dsc.backends.triton.targets import TARGETS, parse_targets, require_fp8
from dsc.ir.core import Builder, Module, Value
from dsc.ir.errors import DscError
from dsc.ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad
from dsc.ir.ops.norm import RmsNorm
from dsc.ir.ops.quant import GroupedScaledMatmul, GroupedScaledMatmulWgrad, Quantize, ScaledMatmul
from dsc.ir.quantization import Accumulation
from dsc.ir.types import DType, Tensor

pytestmark = pytest.mark.slow


def program(m: int, n: int, k: int) -> Module:
    """Norm, quantise, multiply: x [m, k] by a quantised weight [n, k]."""
    b = Builder("main")
    x = b.param("x", Tensor(DType.bf16, (m, k)))
    weight = b.param("w", Tensor(DType.bf16, (k,)))
    codes = b.param("b", Tensor(DType.f8e4m3, (n, k)))
    scales = b.param("sb", Tensor(DType.f32, (-(-n // 128), -(-k // 128))))
    a, sa = b.emit(Quantize(b.emit(RmsNorm(x, weight, 1e-6)).result)).results
    return Module((b.finish(b.emit(ScaledMatmul(a, sa, codes, scales)).results),))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def compiled(module: Module, target: str, cache: Path) -> dict[str, aot.Compiled]:
    return {c.job.function: c for c in aot.compile_jobs(aot.jobs(module, parse_targets(target)), cache=cache)}


def matmul_of(target: str, cache: Path, shape: tuple[int, int, int] = (4096, 4096, 7168)) -> aot.Compiled:
    (made,) = (c for name, c in compiled(program(*shape), target, cache).items() if name.startswith("scaled_matmul"))
    return made


@pytest.mark.parametrize("shape", [(4096, 4096, 7168), (64, 576, 7168), (1, 2112, 7168)])
def test_hopper_multiplies_by_warp_groups(shape: tuple[int, int, int], cache: Path) -> None:
    """QGMMA only, no spills, one multiply-add per output and promotion: below 64 rows Triton would leave the warp-group instruction."""
    made = matmul_of("sm_90", cache, shape)
    facts = made.facts
    assert facts["spill_bytes"] == 0
    assert {name.split(".")[0] for name in facts["matrix"]} == {"QGMMA"}
    assert all("E4M3.E4M3" in name for name in facts["matrix"])
    assert any("wgmma.mma_async" in name and "e4m3.e4m3" in name for name in facts["ptx_matrix"])
    assert facts["float32"]["FFMA"] == outputs_of_a_thread(made) * groups_that_multiply(made)
    assert facts["float32"]["FMUL"] <= 4


def groups_that_multiply(made: aot.Compiled) -> int:
    """How many groups of warps have their own copy of the loop: two consumers where it is specialised, beside one that copies tiles.

    Four warps are asked for then, and the compiler adds eight: a loop that it left as it was would have four.
    """
    specialized = "_specialized" in made.job.function
    assert made.facts["num_warps"] == made.job.options["num_warps"] + (8 if specialized else 0)
    return 2 if specialized else 1


def outputs_of_a_thread(made: aot.Compiled) -> int:
    """Accumulators of each thread that multiplies."""
    constants, warps = made.job.constants, made.facts["num_warps"]
    return int(constants["BLOCK_M"] * constants["BLOCK_N"]) // (32 * (8 if "_specialized" in made.job.function else warps))


def test_large_products_are_specialised_on_hopper(cache: Path) -> None:
    """One group of warps copies by tensor descriptors, two multiply, each 64 rows with an instruction of its own."""
    made = matmul_of("sm_90", cache, (4096, 4096, 7168))
    assert made.job.function == "scaled_matmul_specialized_kernel"
    assert made.facts["num_warps"] == 12
    assert made.facts["matrix"] == {"QGMMA.64x128x32.F32.E4M3.E4M3": 2 * 128 // 32}
    ptx = (made.folder / "kernel.ptx").read_text()
    assert "cp.async.bulk.tensor.2d" in ptx
    assert "cp.async.cg" not in ptx


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("sm_89", "QMMA.16832.F32.E4M3.E4M3"),
        ("sm_100", "UTCQMMA"),
        ("sm_120", "QMMA.16832.F32.E4M3.E4M3"),
        ("gfx942", "v_mfma_f32_32x32x16_fp8_fp8"),
        ("gfx950", "v_mfma_f32_32x32x64_f8f6f4"),
    ],
)
def test_every_target_multiplies_fp8(target: str, instruction: str, cache: Path) -> None:
    facts = matmul_of(target, cache).facts
    assert set(facts["matrix"]) == {instruction}
    assert facts["spill_bytes"] == 0


def products_of_experts(rows: int = 32768, experts: int = 8, n: int = 4096, k: int = 7168) -> Module:
    """One of each: forward and weight gradient, in FP8 and in BF16, and that of a Linear, in a size of DeepGEMM's benchmark."""
    b = Builder("main")
    tiles, f8, f32, bf16 = rows // 128, DType.f8e4m3, DType.f32, DType.bf16

    def given(dtype: DType, *shape: int) -> Value:
        return b.param(f"x{next(number)}", Tensor(dtype, shape))

    number = count()
    counts = given(DType.i32, experts)
    x, w = (given(f8, rows, k), given(f32, rows, tiles_k := k // 128)), (given(f8, experts, n, k), given(f32, experts, n // 128, tiles_k))
    dy, turned = (given(f8, rows, n), given(f32, tiles + experts, n)), (x[0], given(f32, tiles + experts, k))
    dense = (given(f8, n, rows), given(f32, n, tiles), given(f8, k, rows), given(f32, k, tiles))
    made = (
        GroupedScaledMatmul(*x, *w, counts, accumulation=Accumulation()),
        GroupedScaledMatmulWgrad(*dy, *turned, counts, accumulation=Accumulation()),
        ScaledMatmul(*dense, b_tile=(1, 128), accumulation=Accumulation(), out=f32),
        GroupedMatmul(given(bf16, rows, k), given(bf16, experts, n, k), counts, transpose_b=True),
        GroupedMatmulWgrad(given(bf16, rows, n), given(bf16, rows, k), counts),
    )
    return Module((b.finish([b.emit(op).result for op in made]),))


def test_hopper_multiplies_rows_of_experts_by_warp_groups(cache: Path) -> None:
    """As one matrix, group by group. Where both scales differ along the result they are multiplied for each output: one FMUL more."""
    made = compiled(products_of_experts(), "sm_90", cache)
    assert {name: c.facts["spill_bytes"] for name, c in made.items()} == dict.fromkeys(made, 0)
    for name in ("grouped_scaled_matmul_specialized_kernel", "grouped_scaled_matmul_wgrad_kernel", "scaled_matmul_kernel"):
        facts = made[name].facts
        assert set(facts["matrix"]) == {"QGMMA.64x128x32.F32.E4M3.E4M3"}
        assert any("wgmma.mma_async" in found and "e4m3.e4m3" in found for found in facts["ptx_matrix"])
        outputs = outputs_of_a_thread(made[name])
        assert facts["float32"]["FFMA"] == outputs * groups_that_multiply(made[name])
        assert facts["float32"]["FMUL"] <= (4 if "specialized" in name else outputs)
    for name in ("grouped_matmul_kernel", "grouped_matmul_wgrad_kernel"):
        assert {found.split(".")[0] for found in made[name].facts["matrix"]} == {"HGMMA"}


def test_cdna3_multiplies_rows_of_experts(cache: Path) -> None:
    made = compiled(products_of_experts(), "gfx942", cache)
    assert {name: c.facts["spill_bytes"] for name, c in made.items()} == dict.fromkeys(made, 0)
    for name in ("grouped_scaled_matmul_kernel", "grouped_scaled_matmul_wgrad_kernel", "scaled_matmul_kernel"):
        assert set(made[name].facts["matrix"]) == {"v_mfma_f32_32x32x16_fp8_fp8"}


def test_without_fp8_codes_are_widened_when_asked(cache: Path) -> None:
    with pytest.raises(DscError, match="sm_80 has no FP8 matrix instruction; --allow-dequant"):
        require_fp8(parse_targets("sm_90,sm_80"), allow_dequant=False)
    require_fp8(parse_targets("sm_80"), allow_dequant=True)
    assert set(matmul_of("sm_80", cache).facts["matrix"]) == {"HMMA.16816.F32.BF16"}


def test_the_check_would_notice_a_slower_instruction(cache: Path) -> None:
    """The negative control: 16 rows per tile leave the warp-group instruction, and the disassembly says so."""
    (job,) = (j for j in aot.jobs(program(64, 576, 7168), parse_targets("sm_90")) if j.function == "scaled_matmul_kernel")
    narrow = replace(job, constants={**job.constants, "BLOCK_M": 16}, options={**job.options, "num_warps": 4})
    (made,) = aot.compile_jobs([narrow], cache=cache)
    assert not any(name.startswith("QGMMA") for name in made.facts["matrix"])


def test_files_and_table(cache: Path, tmp_path: Path) -> None:
    made = list(compiled(program(64, 576, 7168), "sm_90", cache).values())
    aot.write(made, tmp_path)
    lines = (tmp_path / "sm_90" / "kernels.txt").read_text().splitlines()
    assert len(lines) == 4
    assert lines[0].split()[:4] == ["kernel", "ops", "warps", "registers"]
    for c in made:
        files = [tmp_path / "sm_90" / f"{c.job.name}.{ending}" for ending in ("py", "ptx", "cubin", "json")]
        assert all(file.stat().st_size for file in files)
        described = json.loads(files[3].read_text())
        assert described["target"] == "sm_90"
        assert described["registers"] > 0
        assert f"def {c.job.function}" in files[0].read_text()


def test_one_kernel_is_compiled_once_and_its_files_are_found_again(tmp_path: Path) -> None:
    jobs = [j for j in aot.jobs(program(64, 576, 7168), parse_targets("sm_90")) if j.function == "rms_norm_kernel"]
    assert len(jobs) == 1
    with ThreadPoolExecutor(2) as threads:  # two writers of one key
        first = list(threads.map(lambda _: aot.compile_jobs(jobs, cache=tmp_path)[0], range(2)))
    assert first[0].folder == first[1].folder
    assert [p.name for p in tmp_path.iterdir()] == [jobs[0].key]
    assert aot.compile_jobs(jobs, cache=tmp_path)[0].cached
    assert aot.jobs(program(64, 576, 1024), parse_targets("sm_90"))[0].key != jobs[0].key


def test_a_hanging_compiler_is_ended_and_named(tmp_path: Path) -> None:
    jobs = aot.jobs(program(64, 576, 7168), parse_targets("sm_90"))
    with pytest.raises(DscError, match=r"3 of 3 kernels did not compile; sm_90 \w+: took longer than 0.01 s"):
        aot.compile_jobs(jobs, cache=tmp_path, limit=0.01)
    assert not list(tmp_path.iterdir())


def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    (job,) = (j for j in aot.jobs(program(64, 576, 7168), parse_targets("sm_90")) if j.function == "rms_norm_kernel")
    broken = replace(job, constants={**job.constants, "WIDTH": 100})
    with pytest.raises(DscError, match=r"sm_90 rms_norm_kernel_\w+: CompilationError: arange's range must be a power of 2$"):
        aot.compile_jobs([broken], cache=tmp_path)


def test_unknown_targets_list_the_known_ones() -> None:
    with pytest.raises(DscError, match=f"unknown target 'sm_91'; known are {', '.join(TARGETS)}"):
        parse_targets("sm_90,sm_91")
