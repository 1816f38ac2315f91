"""From a model to the IR: `trace` takes any `torch.nn.Module`, or the name of one that dsc builds itself.

A module is exported whole into one function. A model of dsc's own is a stack of blocks: torch.fx follows the stack, torch.export
looks inside each distinct block once, and equal blocks become calls of one function, so that neither the time nor the size of
the result grows with depth.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.printer import Word
from .aten.graph import pruned
from .aten.rules import Emitter
from .build import Mode, build, example_inputs, output_names
from .config import ModelConfig, load_config
from .exported import export, import_program
from .stack import trace_stack

_SEQ, _CONTEXT, _TINY = 4096, 4096, 64


def trace(
    source: nn.Module | ModelConfig | str | Path,
    inputs: Sequence[Any] | None = None,
    *,
    mode: Mode = "forward",
    batch: int | None = None,
    seq: int | None = None,
    context: int | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Module:
    """The IR of a model; all sizes in it are static.

    `source` is a module, with example `inputs` that give its shapes (their numbers do not matter); or `file.py:function`, whose
    function returns the two; or a shipped name, a config.json, a checkpoint folder or a ModelConfig, with `overrides` as
    `load_config` takes them. The latter are built in one of four modes: "forward" (tokens to logits), "train" (to losses), "prefill"
    (prompts to the logits of their last tokens, and caches), "decode" (one token per sequence, caches of `context` tokens taken and
    returned). `batch` is sequences (1 unless given), `seq` and `context` are tokens of each (4096, or 64 for a configuration named -tiny).

    Parameters become `param` ops under their names in the state dict, other buffers literals or constants. Results are the tensors that
    the module returns, in the order of torch's pytrees; other objects are left out. Raises DscError where the model cannot be traced:
    one line for every op that has no counterpart, with the line of the model that it comes from.

        >>> import torch, dsc
        >>> module = dsc.trace(torch.nn.Linear(4, 2), (torch.zeros(3, 4),))
    """
    if isinstance(source, str) and ".py:" in source:
        require(inputs is None, f"{source} makes its own inputs, so none are expected here")
        source, inputs = load_factory(source)
    if isinstance(source, nn.Module):
        require(inputs is not None, f"tracing {type(source).__name__} needs example inputs: trace(module, (x,))")
        require(isinstance(inputs, (tuple, list)), f"inputs are a {type(inputs).__name__}, expected a tuple: trace(module, (x,))")
        return _trace_module(source, tuple(inputs or ()))
    require(inputs is None, "a configuration's inputs follow from mode, batch, seq and context; none are expected here")
    known = isinstance(source, (ModelConfig, str, Path))
    require(known, f"cannot trace a {type(source).__name__}: expected a torch module, or the name or path of a configuration")
    unused, used = ("seq", "context") if mode == "decode" else ("context", "seq")
    given = {"seq": seq, "context": context}[unused]
    require(given is None, f"{unused} is {given}, but mode {mode} has none: {used} says how many tokens a sequence has there")
    config = source if isinstance(source, ModelConfig) and not overrides else _load(source, overrides)
    name = _name(source, config)
    tiny = name.endswith("-tiny")
    batch = 1 if batch is None else batch
    seq = (_TINY if tiny else _SEQ) if seq is None else seq
    context = (_TINY if tiny else _CONTEXT) if context is None else context
    for what, value in (("batch", batch), ("seq", seq), ("context", context)):
        require(isinstance(value, int) and value > 0, f"{what} is {value}, expected a whole number above 0")
    model = build(config, mode)
    func, others, constants = trace_stack(model, example_inputs(config, mode, batch, seq, context), output_names(config, mode))
    length = {"context": context} if mode == "decode" else {"seq": seq}
    attributes = {"model": name, "mode": Word(mode), "batch": batch, **length}
    return Module((func, *others), attributes=attributes, constants=constants)


def _load(source: ModelConfig | str | Path, overrides: Sequence[str] | Mapping[str, Any]) -> ModelConfig:
    return load_config(source.to_dict() if isinstance(source, ModelConfig) else source, overrides)


def _name(source: ModelConfig | str | Path, config: ModelConfig) -> str:
    """A shipped name, the name of the checkpoint's folder or of the file, or else the family."""
    if isinstance(source, ModelConfig):
        return config.model_type
    path = Path(source)
    return path.resolve().parent.name if path.name == "config.json" else path.stem if path.suffix == ".json" else path.resolve().name


def _trace_module(module: nn.Module, inputs: tuple[Any, ...]) -> Module:
    with _tensors_alone(module):
        program = export(module, inputs)
    b = Emitter("main")
    results = import_program(program, b)
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    require(len(b.params) == len(tensors), f"{type(module).__name__} has {len(tensors)} tensors as inputs, but {len(b.params)} were traced")
    return Module((pruned(b, results),), attributes={"model": type(module).__name__}, constants=b.constants)


@contextmanager
def _tensors_alone(module: nn.Module) -> Iterator[None]:
    """Let the module return its tensors only: torch.export refuses what else it may hand out, such as transformers' cache objects."""
    forward, own = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def tensors(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(leaf for leaf in tree_leaves(forward(*args, **kwargs)) if isinstance(leaf, torch.Tensor))

    module.forward = tensors
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward  # and the method of the class is seen again


def load_factory(source: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module and the example inputs that `file.py:function` returns.

    Raises DscError if there is no such file or function, if it raises, or if it returns something else.
    """
    file, _, name = source.rpartition(":")
    path = Path(file)
    require(path.is_file(), f"{file}: no such file")
    require(name.isidentifier(), f"{source}: expected file.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise DscError(f"{file} is not a Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as if the file were run: it may import its neighbours
    try:
        spec.loader.exec_module(loaded)
        function = getattr(loaded, name, None)
        require(callable(function), f"{file} has no function {name}")
        made = function()  # type: ignore[misc]
    except DscError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())  # one line, whatever the error has
        raise DscError(f"{_place(error, path)}: {type(error).__name__}: {said}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and isinstance(made[1], (tuple, list))
    require(pair, f"{source} returned {type(made).__name__}, expected (module, (input, ...))")
    return made[0], tuple(made[1])


def _place(error: Exception, path: Path) -> str:
    """The last line of `path` that the error passed through."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{path}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path.resolve()]
    return f"{path}:{lines[-1]}" if lines else str(path)
