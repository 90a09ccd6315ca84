"""What the package needs to be imported: a list that a bare machine with PyTorch can have."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys
for name in ("pydot", "lm_eval", "ray", "peft", "accelerate", "matplotlib", "pytest"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import focus_compile
modules = [found.name for found in pkgutil.walk_packages(focus_compile.__path__, "focus_compile.")]
for name in modules:
    if name != "focus_compile.lm_eval":  # the extra [eval]
        importlib.import_module(name)
print(len(modules))
"""


def test_optional_packages_are_not_needed() -> None:
    """pydot only where a graph is drawn; what extras bring nowhere but there."""
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert int(made.stdout) > 60
