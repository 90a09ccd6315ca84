"""The programs of a captured graph: dense, prefix and suffix, each compiled when first needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from focus_compile.compiling import compiling
from focus_compile.errors import NotCompiled
from focus_compile.graph.inputs import Input
from focus_compile.programs.halves import Half, Halves
from focus_compile.programs.output_code import output_files
from focus_compile.programs.symbols import Symbols
from focus_compile.torch_private import (
    TracingContext,
    compile_lock,
    is_contiguous_or_false,
    symbolic_mode,
    tracing,
)

__all__ = ["Inner", "Program", "SpecializedSize", "make_programs"]

Examples = Callable[[], tuple[Symbols, dict[str, Tensor]]]
Inner = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]
"""The inner compiler, ``(graph, example inputs) -> callable``: Inductor's or eager."""


class SpecializedSize(AssertionError):
    """A compiler turned a symbolic size into a constant: the program would serve one size only."""


class Program:
    """Prefix or suffix: called by name, compiled on the first call.

    Attributes:
        name: prefix or suffix.
        half: its graph, with the names of its inputs and outputs.
        calls: how often it ran.
        compiled: the callable, or None before the first call.
        files: where Inductor wrote its output code, once it is compiled.
    """

    def __init__(self, name: str, half: Half, inner: Inner, examples: Examples) -> None:
        self.name = name
        self.half = half
        self.inner = inner
        self.examples = examples
        self.calls = 0
        self.compiled: Callable[..., Any] | None = None
        self.files: list[str] = []
        self._dense: tuple[bool, ...] = ()

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on inputs by name; outputs by name.

        Raises:
            NotCompiled: the compiler failed.
        """
        if self.compiled is None:
            with compile_lock:  # Dynamo's: compilers share state of the process
                self.compiled = self.compiled or self._compile()
        self.calls += 1
        outputs = self.compiled(
            *[
                values[name].contiguous() if dense else values[name]
                for name, dense in zip(self.half.inputs, self._dense, strict=True)
            ]
        )
        return dict(zip(self.half.outputs, outputs, strict=True))

    def _compile(self) -> Callable[..., Any]:
        symbols, values = self.examples()
        examples = [values[name] for name in self.half.inputs]
        # Inductor's prefix may return a live value in another layout than its graph says
        self._dense = tuple(is_contiguous_or_false(value) for value in examples)
        graph = GraphModule(self.half.gm, copy.deepcopy(self.half.gm.graph))
        with (
            compiling(f"the {self.name}", len(graph.graph.nodes)),
            tracing(TracingContext(symbols.mode)),
            torch.no_grad(),
            output_files() as self.files,
        ):
            compiled = self._compile_with_inner(graph, examples)
        if symbols.shape_env.replacements:
            raise SpecializedSize(f"sizes became constants: {symbols.shape_env.replacements}")
        return compiled

    def _compile_with_inner(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return self.inner(graph, inputs)
        except torch.OutOfMemoryError:
            raise  # callers know what to do about it
        except (RuntimeError, OSError) as error:  # Inductor's own, the compiler's, the disk's
            raise NotCompiled(self.name, error) from error


def make_programs(halves: Halves, inputs: Sequence[Input], inner: Inner) -> tuple[Program, Program]:
    """Prefix and suffix, not yet compiled, over symbolic inputs."""

    slots = {given.name for given in inputs if given.held} & halves.slots.keys()
    held = {halves.slots[slot]: slot for slot in slots}

    def outside() -> tuple[Symbols, dict[str, Tensor]]:
        symbols = Symbols()
        return symbols, symbols.tensors(inputs)

    def inside() -> tuple[Symbols, dict[str, Tensor]]:
        symbols, values = outside()
        given = [values[name] for name in halves.prefix.inputs]
        with symbolic_mode(symbols.mode), torch.no_grad():
            made = Interpreter(halves.prefix.gm).run(*given)
            live = {
                name: torch.empty(value.shape, dtype=value.dtype, device=value.device)
                for name, value in zip(halves.prefix.outputs, made, strict=True)
            }
        return symbols, values | live | {name: values[slot] for name, slot in held.items()}

    prefix = Program("prefix", halves.prefix, inner, outside)
    return prefix, Program("suffix", halves.suffix, inner, inside)
