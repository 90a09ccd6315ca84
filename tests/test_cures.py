"""What explain says about refusals: for every one that the package can raise, what to do."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.cures import CURES, cure_of
from focus_compile.errors import Unsupported
from tests import test_dispatch, test_labels, test_refusal
from tests.dialects import draw_call
from tests.toy import Toy

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*(ROOT / "focus_compile").glob("*.py"), *(ROOT / "passes").glob("*.py")]


def texts(node: ast.expr, tree: ast.Module) -> Iterator[str]:
    """How the string that an expression gives may begin."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield from texts(node.values[0], tree)
    elif isinstance(node, ast.Name):
        values = [
            found.value
            for found in ast.walk(tree)
            if isinstance(found, ast.Assign) and ast.unparse(found.targets[0]) == node.id
        ]
        assert values, f"no value of {node.id}"
        for value in values:
            yield from texts(value, tree)
    elif ast.unparse(node) == "str(error)":  # of a plan that checks itself
        (check,) = (
            found
            for found in ast.walk(tree)
            if isinstance(found, ast.FunctionDef) and found.name == "__post_init__"
        )
        for found in ast.walk(check):
            if isinstance(found, ast.Raise) and "ValueError(" in ast.unparse(found):
                assert isinstance(found.exc, ast.Call)
                yield from texts(found.exc.args[0], tree)
    else:
        assert isinstance(node, ast.Call), ast.unparse(node)
        name = ast.unparse(node.func)
        for found in ast.walk(tree):
            if isinstance(found, ast.FunctionDef) and found.name == name:
                for inner in ast.walk(found):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        yield from texts(inner.value, tree)


def raised() -> set[str]:
    """The reasons of all refusals, as far as they are written down."""
    found: set[str] = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                if ast.unparse(node.exc.func) == "Unsupported":
                    found |= set(texts(node.exc.args[0], tree))
    return found


def test_every_refusal_has_a_cure() -> None:
    """And the table has no entry that none of them needs."""
    reasons = raised()
    assert len(reasons) > 50
    assert not [reason for reason in reasons if not cure_of(reason)]
    for start, _ in CURES:
        assert any(reason.startswith(start) for reason in reasons), start


def test_entries_do_not_hide_each_other() -> None:
    starts = [start for start, _ in CURES]
    for index, start in enumerate(starts):
        assert not any(start.startswith(before) for before in starts[:index]), start


def test_an_unknown_reason_has_none() -> None:
    assert Unsupported("something else").cure == ""
    assert Unsupported("autocast is enabled: so").to_dict()["cure"].startswith("leave autocast")


def told(model: Any, *args: Any, **kwargs: Any) -> tuple[Unsupported, str]:
    torch._dynamo.reset()
    story = focus_compile.explain(model, *args, **kwargs)
    (refusal,) = story.refusals
    return refusal, " ".join(str(story).split())


def check(refusal: Unsupported, text: str, reason: str) -> None:
    """The text holds the reason with operator and module, and the cure."""
    assert refusal.reason.startswith(reason) or reason in refusal.reason
    for part in (f"refused, compiled unchanged: {refusal}", f"what to do: {refusal.cure}"):
        assert " ".join(part.split()) in text
    assert refusal.cure


@torch.no_grad()
@pytest.mark.parametrize("name", test_refusal.REFUSED)
def test_refused_models(name: str) -> None:
    make, reason = test_refusal.REFUSED[name]
    model, arguments = make()
    check(*told(model, *arguments()), reason)


@torch.no_grad()
@pytest.mark.parametrize("name", test_labels.REFUSED)
def test_refused_operators(name: str) -> None:
    between, reason, op = test_labels.REFUSED[name]
    refusal, text = told(Toy(between).eval(), test_labels.toy_ids())
    check(refusal, text, reason)
    assert refusal.op == op


@torch.no_grad()
@pytest.mark.parametrize(("way", "reason"), test_dispatch.REFUSED)
def test_refused_experts(way: Callable[..., Any], reason: str) -> None:
    dialect = test_dispatch.changed(way)
    model = dialect.build().eval()
    check(*told(model, **dialect.arguments(model, draw_call(dialect, 0))), reason)


def test_the_table_in_docs() -> None:
    """docs/refusals.md is what its script writes."""
    spec = importlib.util.spec_from_file_location("refusals", ROOT / "docs" / "refusals.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "refusals.md").read_text() == script.text()
