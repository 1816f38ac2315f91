"""How long the commands take that should seem instant: each in a fresh process, the best of five. To be reached: `dsc --help` in 0.3 s.

The floor is an empty Python process; what a command costs is what is above it. None of these needs torch, and a test sees that none
imports it.

    python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS = {"dsc --help": 0.3}
RUNS = 5


def best(command: list[str]) -> float:
    """Seconds of the fastest run, after one that fills the file cache."""
    found = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def main() -> int:
    """Print the figures; 1 where a limit is missed."""
    dsc = [sys.executable, "-m", "dsc"]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "v3")
        start = time.perf_counter()
        subprocess.run([*dsc, "compile", "deepseek-v3", "-o", out], check=True, capture_output=True)
        compiled = time.perf_counter() - start
        traced = str(Path(out) / "ir" / "00-traced.dsc")
        tiny = str(Path(folder) / "tiny")
        subprocess.run([*dsc, "compile", "deepseek-v3-tiny", "-o", tiny], check=True, capture_output=True)
        figures = {"python -c pass": best([sys.executable, "-c", "pass"]), "import dsc": best([sys.executable, "-c", "import dsc"])}
        for name, arguments in {
            "dsc --help": ["--help"],
            "dsc ops": ["ops"],
            "dsc opt v3.dsc": ["opt", traced],
            "dsc opt v3.dsc -p simplify": ["opt", traced, "-p", "simplify"],
            "dsc inspect v3": ["inspect", out],
            "dsc inspect v3 --params --memory": ["inspect", out, "--params", "--memory"],
            "dsc run tiny": ["run", tiny],
        }.items():
            figures[name] = best([*dsc, *arguments])
        size = sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())
    for name, seconds in figures.items():
        limit = f"  (at most {LIMITS[name]} s)" if name in LIMITS else ""
        print(f"{name:<34} {seconds:6.3f} s{limit}")
    print(f"{'dsc compile deepseek-v3, torch too':<34} {compiled:6.3f} s, an artifact of {size / 1000:.0f} kB")
    return int(any(figures[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
