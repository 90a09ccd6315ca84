"""Names of PyTorch without a promise of stability: one module has them, and what each must do.

Seen on the releases of ``SEEN``; docs/versions.md has the suites that ran on them.
"""

from __future__ import annotations

import ast
import logging
import re
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, symbolic_trace

from focus_compile import torch_private
from focus_compile.config import FocusConfig
from focus_compile.graph.inputs import Input
from focus_compile.programs.symbols import Symbols
from tests.support.paths import ROOT

LOGGER = logging.getLogger(__name__)
SEEN = ((2, 11), (2, 13), (2, 14), (2, 15))
"""Releases of PyTorch on which every test of this file passed."""
SOURCES = [*sorted(ROOT.glob("focus_compile/**/*.py")), *sorted(ROOT.glob("passes/*.py"))]


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def private_names(tree: ast.AST) -> list[str]:
    """What a source imports or reads of PyTorch that begins with ``_`` or is experimental."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            found += (
                [path] if path.startswith("torch.") and not path.startswith("torch.ops") else []
            )
    private = re.compile(r"^torch(\.\w+)*\.(_[a-z]\w*|experimental)\b")
    return [name for name in found if private.match(name)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_one_module_has_them(source: Path) -> None:
    found = private_names(ast.parse(source.read_text()))
    assert bool(found) == (source.name == "torch_private.py"), found


def test_private_names_are_found() -> None:
    text = (
        "from torch._guards import tracing\nimport torch\ntorch._dynamo.reset()\ntorch.ops.aten._x"
    )
    assert private_names(ast.parse(text)) == [
        "torch._guards.tracing",
        "torch._dynamo.reset",
        "torch._dynamo",
    ]
    assert private_names(ast.parse("from torch.fx.experimental.proxy_tensor import make_fx"))
    assert not private_names(ast.parse("from torch.fx import Graph\nimport torch\ntorch.zeros(1)"))


def test_this_release_was_seen() -> None:
    """Another one needs the whole suite once, and its place in ``SEEN``."""
    assert release(torch.__version__) in SEEN
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = (line for line in project["dependencies"] if line.startswith("torch>"))
    low, high = re.fullmatch(r"torch>=([\d.]+),<([\d.]+)", bound).groups()  # type: ignore[union-attr]
    assert release(low) == SEEN[0] and release(high) == (SEEN[-1][0], SEEN[-1][1] + 1)


def test_modes_of_inductor() -> None:
    modes = torch_private.inductor_modes()
    assert {"default", "reduce-overhead", "max-autotune"} <= set(modes)
    assert torch_private.mode_options("reduce-overhead")["triton.cudagraphs"] is True
    assert not torch_private.cudagraphs_by_default()
    with torch._inductor.config.patch("triton.cudagraphs", True):
        assert torch_private.cudagraphs_by_default()
    assert FocusConfig(mode="reduce-overhead").patches()["triton.cudagraphs"] is True


def test_inputs_at_fixed_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor is told of a graph that did not come from Dynamo: nothing, without this."""
    told = []
    inner = torch_private.compile_fx_inner

    def compiled(*args: Any, **kwargs: Any) -> Any:
        told.append(kwargs["static_input_idxs"])
        return inner(*args, **kwargs)

    monkeypatch.setattr(torch_private, "compile_fx_inner", compiled)
    graph, x = symbolic_trace(lambda x, y: x + y), torch.ones(3)
    for fixed in ([], [1]):
        torch_private.compile_fx(
            graph, [x, x], inner_compile=torch_private.at_fixed_addresses(fixed)
        )
    assert told == [[], [1]]


def test_graphs_of_a_function_are_counted() -> None:
    seen: list[int | None] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        seen.append(torch_private.frame_compile_id())
        return gm.forward

    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    for size in (2, 3, 4):
        compiled(torch.zeros(size))
    assert seen == [0, 1, 2] and torch_private.frame_compile_id() is None
    with torch._dynamo.config.patch(recompile_limit=5):
        assert torch_private.recompile_limit() == 5


def test_sizes_that_are_equal_once() -> None:
    """By default Dynamo captures anew when they differ later."""

    def graphs(around: Any) -> int:
        seen: list[Any] = []

        def backend(gm: GraphModule, _: Any) -> Any:
            seen.append(gm)
            return gm.forward

        torch._dynamo.reset()
        compiled = torch.compile(lambda x, y: (x + 1, y + 2), backend=backend, dynamic=True)
        for sizes in ((5, 5), (3, 7)):
            with around():
                compiled(*map(torch.zeros, sizes))
        return len(seen)

    assert graphs(torch_private.captures_more) == 1 and graphs(nullcontext) == 2


def test_loggers_break_no_graph() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        LOGGER.info("seen")
        return x + 1

    with torch_private.captures_more():
        torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(3))


def test_backends_of_a_process() -> None:
    torch._dynamo.reset()
    torch.compile(lambda x: x, backend="eager")
    assert not torch_private.was_compiled_for("focus")
    torch.compile(lambda x: x, backend="focus", options={})
    assert torch_private.was_compiled_for("focus")
    torch._dynamo.reset()
    assert not torch_private.was_compiled_for("focus")


def test_operators_run_on_symbolic_sizes() -> None:
    """``expand`` to sizes that come from another tensor: what the first half of a suffix does."""

    class Expand(nn.Module):
        def forward(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.expand.default(x, [like.shape[0], like.shape[1]]) + like

    symbols = Symbols()
    device, real = torch.device("cpu"), torch.float32
    values = symbols.tensors([
        Input("x", (1, "token"), real, device), Input("like", ("batch", "token"), real, device)
    ])  # fmt: skip
    with torch_private.symbolic_mode(symbols.mode), torch.no_grad():
        out = Interpreter(symbolic_trace(Expand())).run(*values.values())
    assert out.shape == values["like"].shape
    assert isinstance(out.shape[0], torch.SymInt) and not symbols.shape_env.replacements


def test_matrix_product_of_onednn() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 7), torch.randn(11, 7), torch.randn(11)
    for given in (bias, None):
        made = torch_private.onednn_linear(x, weight, given)
        torch.testing.assert_close(made, nn.functional.linear(x, weight, given))


def test_output_modules_grow_when_inductor_writes_one() -> None:
    torch._dynamo.reset()
    before = len(torch_private.output_modules())
    torch.compile(lambda x: x.sin() + 17)(torch.zeros(3))
    made = torch_private.output_modules()[before:]
    assert any("call" in vars(module) for module in made)


def test_imports_of_generated_code() -> None:
    made = symbolic_trace(nn.ReLU()).graph.python_code("self")
    lines = torch_private.import_block({**made.globals, "torch": torch}).splitlines()
    assert "import torch" in lines and "from math import inf" in lines


def test_kernels_keep_their_launches_visible() -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from focus_compile.ops.triton.kernels import list_masked

    assert isinstance(list_masked, triton.runtime.jit.JITFunction)
    assert torch_private.launchable(list_masked) is not list_masked

    def interpreted() -> None:
        """Not a compiled kernel: as TRITON_INTERPRET=1 makes them."""

    assert torch_private.launchable(interpreted) is interpreted
