"""Sources, bundles and calls. A call is differentiated by the pass, for it needs the function that is called."""

from __future__ import annotations

from ...ir.ops.control import Call, Constant, Iota, Literal, Pack, Param, Unpack
from ...ir.ops.fused import NAMED, Fused
from .rules import missing, no_gradient

no_gradient("a weight is where gradients end", Param)
no_gradient("it reads nothing", Constant, Literal, Iota)
no_gradient("the pass differentiates the function that is called", Call)
missing("bundles carry handles and residuals, whose gradient is never asked for", Pack, Unpack)
missing("a program is differentiated before its ops are fused", Fused, *NAMED)
