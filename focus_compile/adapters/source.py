"""A method as a syntax tree, and a function again."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

__all__ = ["Method", "place", "read", "rebuilt"]


@dataclass(frozen=True)
class Method:
    """A method's function, without decorators, and its syntax tree, with the file's own lines."""

    function: FunctionType
    tree: ast.FunctionDef

    @property
    def owner(self) -> str | None:
        """The class in whose body it stands, after which Python renames names such as ``__x``."""
        owner = self.function.__qualname__.split(".")[-2:-1]
        return owner[0] if owner and owner[0].isidentifier() else None


def place(function: Any) -> str:
    """File and line of a function, behind its decorators."""
    code = getattr(function, "__wrapped__", function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def read(function: Any) -> Method | None:
    """A plain function as a tree; None where its source is not at hand, or it is decorated."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    try:
        lines, first = inspect.getsourcelines(function)
        (tree,) = ast.parse(textwrap.dedent("".join(lines))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        return None
    ast.increment_lineno(tree, first - 1)
    method = Method(function, tree)
    same = rebuilt(method, copy.deepcopy(tree)).__code__
    return method if _names(same) <= _names(function.__code__) else None


def rebuilt(method: Method, tree: ast.FunctionDef) -> FunctionType:
    """The function of a changed tree: globals, defaults and closure are those of the method's.

    It is compiled in a class of the same name, so that names are changed as Python changed them.
    Nothing is executed: the tree is compiled as the file was, and its code taken out.
    """
    old = method.function
    arguments = [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs]
    for argument in (*arguments, tree.args.vararg, tree.args.kwarg):
        if argument is not None:
            argument.annotation = None
    tree.returns = None
    tree.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]
    tree.args.kw_defaults = [value and ast.Constant(None) for value in tree.args.kw_defaults]
    outer = ast.parse(f"def outer({', '.join(old.__code__.co_freevars)}): pass")
    maker = outer.body[0]
    assert isinstance(maker, ast.FunctionDef)
    body: list[ast.stmt] = [tree]
    if method.owner is not None:
        (around,) = ast.parse(f"class {method.owner}: pass").body
        assert isinstance(around, ast.ClassDef)
        around.body, body = body, [around]
        if method.owner not in old.__code__.co_freevars:  # else the method would see that class
            body.insert(0, ast.Global([method.owner]))
    maker.body = body
    file = old.__code__.co_filename
    module = compile(ast.fix_missing_locations(outer), file, "exec", dont_inherit=True)
    code = _inner(module, "outer")
    code = _inner(code if method.owner is None else _inner(code, method.owner), tree.name)
    cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, old.__globals__, old.__name__, old.__defaults__, closure)
    made.__kwdefaults__ = old.__kwdefaults__
    made.__qualname__, made.__doc__, made.__module__ = old.__qualname__, old.__doc__, old.__module__
    return made


def _inner(code: CodeType, name: str) -> CodeType:
    """The code of a function that is defined in another's."""
    return next(
        value for value in code.co_consts if isinstance(value, CodeType) and value.co_name == name
    )


def _names(code: CodeType) -> set[str]:
    """Names of globals and attributes: others than the method's own are a class's that is not."""
    inner = (_names(value) for value in code.co_consts if isinstance(value, CodeType))
    return {*code.co_names}.union(*inner)
