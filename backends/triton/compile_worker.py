"""The process that compiles: reads one job a line on standard input, as JSON, writes its files, answers with one line.

It never runs in the process of a program: the compiler excludes the interpreter there, and on some targets it hangs or aborts instead of
raising. `aot.py` starts it with `TRITON_INTERPRET=0` and ends it when a job takes too long.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SASS_MATRIX = re.compile(r"\b((?:Q|H|I)GMMA|UTC[QHI]MMA|[QHIO]MMA)(?:\.[\w.]+)?")
AMD_MATRIX = re.compile(r"\bv_(?:s?mfma|wmma|swmmac)\w+")


def ast_source(kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], divisible: Iterable[str]) -> Any:
    """A kernel as Triton's compiler and launcher take it. The arguments `divisible` are multiples of 16."""
    from triton.compiler import ASTSource

    names = kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return ASTSource(kernel, {name: signature[name] for name in names}, dict(constants), attributes)


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel into `job["folder"]` as kernel.<ending>, and say what the compiler made of it."""
    import triton
    from triton.backends.compiler import GPUTarget

    from .generated import GENERATED, import_file

    generated = job["module"].startswith(GENERATED)
    home = import_file(job["module"].removeprefix(GENERATED)) if generated else importlib.import_module(job["module"])
    kernel = getattr(home, job["function"])
    source = ast_source(kernel, job["signature"], job["constants"], job["divisible"])
    made = triton.compile(source, target=GPUTarget(*job["gpu"]), options=job["options"])
    if re.search(r"^\s+trap;", made.asm.get("ptx", ""), re.MULTILINE):
        raise RuntimeError("the compiler made a trap of it: it wants more tensor memory than there is")
    folder = Path(job["folder"])
    assembly, binary = job["endings"]
    (folder / f"kernel.{assembly}").write_text(made.asm[assembly])
    (folder / f"kernel.{binary}").write_bytes(made.asm[binary])
    shutil.copyfile(made.metadata_group[f"{source.name}.json"], folder / "kernel.triton.json")
    metadata = made.metadata
    found = {"entry": metadata.name, "shared": metadata.shared, "num_warps": metadata.num_warps}
    return found | (_nvidia(folder / f"kernel.{binary}", made.asm["ptx"]) if assembly == "ptx" else _amd(made.asm["amdgcn"]))


def _nvidia(cubin: Path, ptx: str) -> dict[str, Any]:
    """Registers, spills and matrix instructions, from the binary. A kernel's stack holds spilled registers and nothing else."""
    usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    sass = _tool("nvdisasm", "--print-code", str(cubin))
    instructions = Counter(m.group(0) for m in SASS_MATRIX.finditer(sass))
    operations = Counter(re.findall(r"\b(FFMA2?|FMUL2?|FADD2?)\b", sass))
    return {
        "registers": counts.get("REG", 0),
        "spill_bytes": counts.get("STACK", 0),
        "matrix": dict(instructions),
        "float32": dict(operations),
        "ptx_matrix": dict(Counter(re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*", ptx))),
    }


def _amd(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        "matrix": dict(Counter(AMD_MATRIX.findall(assembly))),
    }


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the tools that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Answer jobs until standard input ends. Whatever a compiler prints goes to standard error."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = compile_job(job)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
