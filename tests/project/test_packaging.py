"""What pyproject.toml says of the package against what lies in the folders."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
NOT_PACKAGES = {"tests", "benchmarks", "examples", "docs", "build", "dist", "demo", "out"}
NOT_DATA = {".py", ".pyc", ".pyi"}


def files_of_the_package() -> list[Path]:
    """Every file in the folders of the package, relative to the root. The files of the root itself are not among them."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in NOT_PACKAGES]
    visible = [folder for folder in folders if not folder.name.startswith((".", "__")) and not folder.name.endswith(".egg-info")]
    return sorted(
        file.relative_to(ROOT) for folder in visible for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    )


def module_name(folder: Path) -> str:
    return ".".join(["dsc", *folder.parts])


def test_every_folder_with_sources_is_a_listed_package() -> None:
    with_sources = {module_name(file.parent) for file in files_of_the_package() if file.suffix == ".py"}
    assert {"dsc", *with_sources} == set(SETUPTOOLS["packages"])


def test_every_package_has_an_init_file() -> None:
    folders = [ROOT.joinpath(*name.split(".")[1:]) for name in SETUPTOOLS["packages"]]
    assert [folder.relative_to(ROOT).as_posix() for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_every_data_file_is_shipped() -> None:
    shipped = [
        f"{name.replace('.', '/')}/{pattern}".removeprefix("dsc/")
        for name, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
    ]
    data = [file.as_posix() for file in files_of_the_package() if file.suffix not in NOT_DATA]
    assert [file for file in data if not any(fnmatch(file, pattern) for pattern in shipped)] == []
