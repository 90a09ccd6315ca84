"""Names of torch that are private or that not every version has, in one place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend
from torch._dynamo.utils import counters
from torch.fx import Node
from torch.nn import Module

__all__ = ["backend_of", "compile_arguments", "is_module_state", "recompile_limits_hit"]

_WANTED = {"isolate_recompiles": True, "recompile_limit": 64}


def compile_arguments() -> dict[str, Any]:
    """What gives one ``torch.compile`` a recompile limit of its own, where it takes that.

    Without, all that is compiled of one function counts against one limit of 8 graphs.
    """
    known = inspect.signature(torch.compile).parameters
    return {name: value for name, value in _WANTED.items() if name in known}


def recompile_limits_hit() -> int:
    """How many functions Dynamo has stopped compiling, since it was reset."""
    reasons = counters["unimplemented"]
    return sum(count for text, count in reasons.items() if "recompile limit exceeded" in text)


def backend_of(model: Any) -> Any:
    """The backend of ``torch.compile(model)`` or ``model.compile()``; None for an eager model."""
    if isinstance(model, OptimizedModule):
        callback: Any = model.dynamo_ctx.callback
    elif isinstance(model, Module) and model._compiled_call_impl is not None:
        callback = inspect.getclosurevars(model._compiled_call_impl).nonlocals.get("callback")
    else:
        return None
    found: Any = innermost_backend(callback) if callable(callback) else None
    return found.compiler_fn if isinstance(found, torch._TorchCompileWrapper) else found


def is_module_state(node: Node) -> bool:
    """Whether an input of Dynamo's graph is a tensor that the model holds: a weight or a buffer.

    Numbers that it holds are no tensors, though Dynamo may pass them as such: it guards them.
    """
    given: Any = node.meta.get("grapharg")
    if given is None or not given.is_tensor or given.pass_arg_as_tensor:
        return False
    kind = given.source.guard_source
    return bool(kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module())
