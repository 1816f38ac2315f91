"""Every op of the IR, one file per family. Importing this package fills the op table."""

from __future__ import annotations

from . import attention, collective, control, elementwise, fused, internode, linalg, loss, moe, norm, quant, reduce, shape  # noqa: F401
