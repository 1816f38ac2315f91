"""Files of tiles that were measured: TOML, a table for each device, in it a tile for each key of `tiles.tunable`.

["NVIDIA H200"]
"scaled_gemm m=4096 n=7168 k=2048 ..." = { m = 128, n = 128, k = 128, num_warps = 4, num_stages = 4, group = 8, specialized = true }
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ...ir.errors import DscError
from .tiles import Gemm

VARIABLE = "DSC_TILES"
"""The environment variable that names the file which programs on a GPU take tiles from."""

Tiles = Mapping[str, Gemm]


def read_tiles(file: Path) -> dict[str, dict[str, Gemm]]:
    """The tiles of each device. `DscError` where the file is not one of `write_tiles`."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
        return {device: {key: Gemm(**tile) for key, tile in tiles.items()} for device, tiles in found.items()}
    except OSError as error:
        raise DscError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise DscError(f"{file} is not a file of tiles: {error}") from None


def write_tiles(file: Path, device: str, tiles: Tiles) -> None:
    """Put the tiles of `device` into the file, beside those of other devices and of other keys that it has."""
    known = read_tiles(file) if file.exists() else {}
    known[device] = {**known.get(device, {}), **tiles}
    lines = []
    for name in sorted(known):
        lines.append(f'["{name}"]')
        for key, tile in sorted(known[name].items()):
            fields = ", ".join(f"{field} = {str(value).lower()}" for field, value in asdict(tile).items())
            lines.append(f'"{key}" = {{ {fields} }}')
    draft = file.with_name(f".{file.name}.partial")
    draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draft.replace(file)


def tuned_here() -> Tiles | None:
    """The tiles for the GPU of this machine in the file that DSC_TILES names; None where it names none."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    import torch

    return read_tiles(Path(name)).get(torch.cuda.get_device_name(0), {})
