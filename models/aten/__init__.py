"""From aten to IR: one rule per torch op (`rules.TABLE`), and the walk over an exported graph that applies them (`graph.outputs_of`)."""

from . import attention, creation, custom, elementwise, indexing, linalg, norm, reduce, shape  # noqa: F401 - they fill the table
