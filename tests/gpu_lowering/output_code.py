"""What Inductor's output code calls: Triton kernels, with the sizes they get, and operators."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ["Calls", "read", "tidy"]

_OPERATORS = ("extern_kernels.", "torch.ops.", "aten.", "inductor_ops.")


@dataclass
class Calls:
    """What the output code of one program calls.

    Attributes:
        launches: of each Triton kernel, by name: the arguments as expressions of named sizes.
        operators: how often each operator is called that Inductor did not lower.
        host: names of kernels that are not Triton's, such as C++ for the CPU.
        partitions: how many parts would be recorded as a CUDA graph each.
        host_inputs: how many inputs lie on the CPU, by the examples that the module makes itself.
    """

    launches: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    host: list[str] = field(default_factory=list)
    partitions: int = 0
    host_inputs: int = 0


def tidy(code: str) -> str:
    """Output code without the comments that name files."""
    return re.sub(r"(?m)^# kernel path: .*\n", "", code)


def read(code: str, sizes: Mapping[str, str]) -> Calls:
    """Calls of a module of output code; ``sizes``: symbol -> name of the size."""
    module = ast.parse(code)
    calls = Calls(
        partitions=len(re.findall(r"(?m)^ *def partition_\d+\(", code)),
        host_inputs=len(re.findall(r"(?m)^ *\w+ = rand_strided\(.*device='cpu'", code)),
    )
    for name, maker in _made(module):
        if maker == "async_compile.triton":
            calls.launches[name] = []
        elif maker.startswith("async_compile."):
            calls.host.append(name)
    names = _Names(sizes)
    for statement in _statements(module):
        for call in _calls(statement):
            dotted = ast.unparse(call.func)
            owner, _, method = dotted.rpartition(".")
            if method == "run" and owner in calls.launches:
                launch = tuple(names.text(argument) for argument in call.args)
                calls.launches[owner].append(launch)
            elif dotted.startswith(_OPERATORS):
                name = dotted.removeprefix("extern_kernels.").removeprefix("torch.ops.")
                calls.operators[name] = calls.operators.get(name, 0) + 1
        if isinstance(statement, ast.Assign):
            names.assign(statement)
    return calls


class _Names(ast.NodeTransformer):
    """What names stand for: symbols for named sizes, others for what was assigned last."""

    def __init__(self, sizes: Mapping[str, str]) -> None:
        self.sizes = sizes
        self.known: dict[str, ast.expr] = {}

    def text(self, node: ast.expr) -> str:
        return ast.unparse(self.visit(copy.deepcopy(node)))

    def assign(self, statement: ast.Assign) -> None:
        for target in statement.targets:
            if isinstance(target, ast.Name):
                self.known.pop(target.id, None)
                if not _calls(statement.value):
                    self.known[target.id] = self.visit(copy.deepcopy(statement.value))

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.sizes:
            return ast.Name(self.sizes[node.id])
        return self.known.get(node.id, node)


def _made(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Names at module level that a call makes, and the function that is called."""
    for statement in module.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
            yield ast.unparse(statement.targets[0]), ast.unparse(statement.value.func)


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """Statements of functions, in order, those that hold other statements excepted."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            yield from _flat(node.body)


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.With | ast.If | ast.For | ast.Try):
            yield from _flat(statement.body)
        elif not isinstance(statement, ast.FunctionDef):
            yield statement


def _calls(node: ast.AST) -> list[ast.Call]:
    return [found for found in ast.walk(node) if isinstance(found, ast.Call)]
