"""Where Inductor's output code lies: Python files that call its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from focus_compile.torch_private import output_modules

__all__ = ["output_files"]


@contextmanager
def output_files() -> Iterator[list[str]]:
    """Collects the files that Inductor writes, or finds in its cache, inside.

    Empty where another compiler is at work. One compilation writes one file.
    """
    files: list[str] = []
    before = len(output_modules())
    yield files
    modules = [module for module in output_modules()[before:] if "call" in vars(module)]
    files += [str(module.__file__) for module in modules]
