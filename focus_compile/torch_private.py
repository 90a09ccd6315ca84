"""Every name of PyTorch that has no promise of stability, in one place.

The rest of the package imports them from here, and asks for no version: what differs between
releases is answered by a function of this module. tests/house/test_torch_private.py holds what each
name must do, and names the releases on which that was seen (docs/versions.md has the suites).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizedModule, cached_backends, innermost_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._guards import CompileContext, TracingContext, tracing
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._logging._internal import trace_structured
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._prims_common import is_contiguous_or_false
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.graph_module import _format_import_block
from torch.library import wrap_triton
from torch.nn import Module
from torch.package.importer import sys_importer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.symbol import SymT, symbol_is_type

__all__ = [
    "BackendCompilerFailed",
    "ConstantSource",
    "DimDynamic",
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "OptimizedModule",
    "ShapeEnv",
    "TracingContext",
    "at_fixed_addresses",
    "backend_of",
    "captures_look_ups",
    "captures_more",
    "compile_arguments",
    "compile_fx",
    "compile_lock",
    "compiles",
    "cudagraphs_by_default",
    "frame_compile_id",
    "import_block",
    "inductor_modes",
    "is_contiguous_or_false",
    "is_made_of_tensors",
    "is_module_state",
    "is_traceable_wrapper_subclass",
    "launchable",
    "make_fx",
    "mode_options",
    "onednn_linear",
    "output_modules",
    "read_expr",
    "recompile_limit",
    "recompile_limits_hit",
    "reported_breaks",
    "symbolic_mode",
    "trace_structured",
    "tracing",
    "tree_flatten",
    "tree_leaves",
    "tree_unflatten",
    "unknown_symbols",
    "untraced",
    "was_compiled_for",
]

_COMPILE_ARGUMENTS = {"isolate_recompiles": True, "recompile_limit": 64}
"""Arguments of ``torch.compile`` that not every release has."""


def inductor_modes() -> tuple[str, ...]:
    """Names of Inductor's modes."""
    return tuple(torch._inductor.list_mode_options())


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor config patches of a mode."""
    options: Mapping[str, Any] = torch._inductor.list_mode_options(mode)
    return dict(options)


def cudagraphs_by_default() -> bool:
    """Whether Inductor records CUDA graphs without being asked by a mode."""
    return bool(torch._inductor.config.triton.cudagraphs)


def recompile_limit() -> int:
    """How many graphs Dynamo compiles of one function before it runs the function eagerly."""
    return int(torch._dynamo.config.recompile_limit)


def frame_compile_id() -> int | None:
    """Number of the graph that Dynamo compiles now, among those of its function; None outside."""
    compile_id: Any = CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_compile_id


def at_fixed_addresses(inputs: Sequence[int]) -> Callable[..., Any]:
    """Argument ``inner_compile`` of :func:`compile_fx` for a graph that did not come from Dynamo.

    ``inputs``: those, by position, that lie where they lay in the last call. A CUDA graph reads and
    writes them there; all others are copied before each replay. Dynamo marks its own graphs so.
    """

    def compiled(*args: Any, **kwargs: Any) -> Any:
        return compile_fx_inner(*args, **{**kwargs, "static_input_idxs": list(inputs)})

    return compiled


def output_modules() -> list[Any]:
    """Modules that Inductor has written or loaded in this process, in order."""
    return PyCodeCache.modules


@contextmanager
def symbolic_mode(mode: FakeTensorMode) -> Iterator[None]:
    """Run operators on fake tensors of ``mode``, whose sizes may be symbols.

    Without Python's dispatcher, operators of 2.11 that ask for sizes in C++ raise "Cannot call
    numel() on tensor with symbolic sizes/strides"; later releases ask in Python by themselves.
    """
    dispatcher = nullcontext() if mode.shape_env is None else enable_python_dispatcher()
    with mode, dispatcher:
        yield


def launchable(kernel: Any) -> Any:
    """A Triton kernel whose launches a compiler sees.

    One that was defined under TRITON_INTERPRET=1 stays as it is; releases up to 2.11 refuse it.
    """
    from triton.runtime.jit import JITFunction  # a CPU build of PyTorch comes without Triton

    return wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def import_block(names: Mapping[str, Any]) -> str:
    """Lines of Python that import what the generated code of a graph module refers to."""
    return str(_format_import_block(dict(names), sys_importer))


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` on a CPU by oneDNN, weights as they lie: Inductor's operator."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def compile_arguments() -> dict[str, Any]:
    """What gives one ``torch.compile`` a recompile limit of its own, where it takes that.

    Without, all that is compiled of one function counts against one limit of 8 graphs.
    """
    parameters = inspect.signature(torch.compile).parameters
    return {name: value for name, value in _COMPILE_ARGUMENTS.items() if name in parameters}


@contextmanager
def captures_more(look_ups: bool = False) -> Iterator[None]:
    """Around a compiled call: what Dynamo would capture anew, or not at all, by its defaults.

    - Sizes that are equal in the call that is captured may differ later. By default a prompt that
      is as long as the block is taken for a rule of the model.
    - Calls of a logger are left out of the graph, and break it no more.
    - With ``look_ups``, numbers and positions that are read of tensors' values are captured.
    """
    shapes: Any = torch.fx.experimental._config
    dynamo: Any = torch._dynamo.config
    loggers = "ignore_logging_functions"
    if not hasattr(dynamo, loggers):  # its name in earlier releases; an alias is not patched
        loggers = "ignore_logger_methods"
    ignored = {*getattr(dynamo, loggers), *_logging_methods()}
    leave = (
        shapes._make_closure_patcher(use_duck_shape=False)(),
        dynamo._make_closure_patcher(**{loggers: ignored})(),
    )
    try:
        with captures_look_ups() if look_ups else nullcontext():
            yield
    finally:
        for restore in leave:
            restore()


@contextmanager
def captures_look_ups() -> Iterator[None]:
    """Around a compiled call: numbers and positions that are read of tensors' values are captured,
    and break no graph."""
    dynamo: Any = torch._dynamo.config
    restore = dynamo._make_closure_patcher(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    )()
    try:
        yield
    finally:
        restore()


def read_expr(number: Any) -> Any:
    """A symbolic number as it was computed: what was found to equal it since is not put in its
    place."""
    return number.node._expr


def unknown_symbols(number: Any) -> set[Any]:
    """Symbols of values that were read of tensors, in a number as it was computed."""
    if not isinstance(number, torch.SymInt | torch.SymBool | torch.SymFloat):
        return set()
    kinds = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)
    return {each for each in read_expr(number).free_symbols if symbol_is_type(each, kinds)}


class _Breaks(logging.Handler):
    """Keeps what Dynamo writes of graph breaks into its structured trace."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        metadata: Any = getattr(record, "metadata", {})
        if metadata.get("artifact", {}).get("name") == "dynamo_graph_break_reason":
            self.texts.append(str(getattr(record, "payload", "")))


@contextmanager
def reported_breaks() -> Iterator[list[str]]:
    """What Dynamo says of graph breaks inside: place, reason and its own traceback.

    Unlike what graphs hold, also of those for which it ran a whole function eagerly.
    """
    handler, trace = _Breaks(), logging.getLogger("torch.__trace")
    trace.addHandler(handler)
    try:
        yield handler.texts
    finally:
        trace.removeHandler(handler)


def _logging_methods() -> Iterator[Any]:
    """What loggers are called by, as libraries extend it (transformers' ``warning_once``)."""
    for name in ("debug", "info", "warning", "error", "warning_once", "info_once"):
        if name in vars(logging.Logger):
            yield vars(logging.Logger)[name]


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that Dynamo runs as it is."""
    dynamo: Any = torch._dynamo
    made: Callable[..., Any] = dynamo.disable(function)
    return made


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
    backend: Any = innermost_backend(callback) if callable(callback) else None
    return backend.compiler_fn if isinstance(backend, torch._TorchCompileWrapper) else backend


def compiles() -> bool:
    """Whether ``torch.compile`` does anything: where it is switched off, it gives back what it got.

    By ``TORCHDYNAMO_DISABLE=1``, for one.
    """

    def probe() -> None: ...

    return torch.compile(probe, backend="eager") is not probe


def was_compiled_for(name: str) -> bool:
    """Whether ``torch.compile`` was called with a backend of that name, since Dynamo was reset."""
    backends: Mapping[int, Any] = cached_backends
    return any(
        isinstance(backend, torch._TorchCompileWrapper) and backend.compiler_name == name
        for backend in [*backends.values()]
    )


def is_made_of_tensors(value: Any) -> bool:
    """Whether a value is a tensor whose class puts it together of others, as quantised weights are.

    A DTensor is one rank's part of a tensor, and no such thing here.
    """
    return is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor)


def is_module_state(node: Node) -> bool:
    """Whether an input of Dynamo's graph is a tensor that the model holds: a weight or a buffer.

    Numbers that it holds are no tensors, though Dynamo may pass them as such: it guards them.
    """
    argument: Any = node.meta.get("grapharg")
    if argument is None or not argument.is_tensor or argument.pass_arg_as_tensor:
        return False
    guard_source = argument.source.guard_source
    return bool(
        guard_source.is_unspecialized_nn_module() or guard_source.is_specialized_nn_module()
    )
