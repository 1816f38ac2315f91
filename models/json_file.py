"""Reading JSON that somebody else may have written, with every fault as one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..ir.errors import DscError, require


def present(path: Path, wanted: str) -> Path:
    """The file, if it is one. `DscError` where it is not there, or a folder and no file of the kind that is `wanted`."""
    require(path.exists(), f"{path}: no such file")
    require(not path.is_dir(), f"{path}: found a folder, expected {wanted}")
    return path


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object in `path`, or what else of `kind`. Raises `DscError` if the file cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DscError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise DscError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DscError(f"{path}: not JSON: byte {error.start} is not UTF-8 text") from None
    except RecursionError as error:
        raise DscError(f"{path}: not JSON: {error}") from None
    require(isinstance(value, kind), f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
