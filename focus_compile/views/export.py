"""Prefix and suffix as ``torch.export`` programs: for viewers, and for whoever reads ``.pt2``."""

from __future__ import annotations

import copy

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from focus_compile.programs.program import Program

__all__ = ["exported"]


def exported(program: Program) -> ExportedProgram:
    """A program over symbolic sizes; weights are inputs, so that it holds none.

    Every size that has a name is dynamic: rows, tokens of the block, history, fed and retained
    tokens. Loading it needs ``import focus_compile``, which defines the ``focus::`` operators.
    """
    _, values = program.examples()
    shapes = [values[name].shape for name in program.half.inputs]
    dtypes = [values[name].dtype for name in program.half.inputs]
    # numbers in place of symbols; memory that nobody touches
    sizes = [[int(size) for size in shape] for shape in shapes]
    inputs = [torch.empty(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    dynamic = [
        {dim: Dim.AUTO for dim, size in enumerate(shape) if not isinstance(size, int)}
        for shape in shapes
    ]
    graph = GraphModule(program.half.gm, copy.deepcopy(program.half.gm.graph))
    exported_program = torch.export.export(
        graph, tuple(inputs), dynamic_shapes=tuple(dynamic), strict=False
    )
    exported_program.example_inputs = None
    return exported_program
