"""What explain says about refusals: for every one that the package can raise, what to do."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.errors import Unsupported
from focus_compile.refusals import AUTOCAST, catalogue
from tests.axes import test_dispatch, test_labels
from tests.backend import test_refusal
from tests.support.dialects import draw_call
from tests.support.paths import ROOT
from tests.support.toy import Toy

SOURCES = [*(ROOT / "focus_compile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
CATALOGUE = catalogue()


def raised() -> Iterator[tuple[str, list[str]]]:
    """What every refusal in the sources is made of: its entry, and the fields it fills."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                kind = ast.unparse(node.func)
                assert kind != "Refusal" or path.name == "refusals.py", path
                if kind in ("Unsupported", "NothingToEvict"):
                    assert isinstance(node.args[0], ast.Name), ast.unparse(node)
                    yield node.args[0].id, [str(word.arg) for word in node.keywords]


def test_every_refusal_has_a_cure() -> None:
    """It is of the catalogue, by name, which has no entry that none of them needs."""
    found = list(raised())
    assert len(found) > 50
    for name, fields in found:
        assert sorted(fields) == sorted(CATALOGUE[name].fields), name
    assert {name for name, _ in found} == set(CATALOGUE)


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_entry(name: str) -> None:
    """Its cure is a sentence behind a colon; its fields are named and filled, all of them."""
    entry = CATALOGUE[name]
    assert re.fullmatch(r"[a-z]+( \S+)+[^.,:;!]", entry.cure)
    values: dict[str, object] = {field: f"<{field}: {{x}}>" for field in entry.fields}
    refusal = Unsupported(entry, **values)
    assert refusal.cure == entry.cure and refusal.reason == str(refusal)
    assert all(field.isidentifier() for field in entry.fields)
    assert all(refusal.reason.count(str(value)) == 1 for value in values.values())
    empty = dict.fromkeys(("op", "module", "line"), "")
    assert refusal.to_dict() == {"reason": refusal.reason, "cure": entry.cure, **empty}
    fewer = [{key: values[key] for key in entry.fields - {field}} for field in entry.fields]
    for wrong in ({**values, "other": 1}, *fewer):
        with pytest.raises(TypeError, match=" has the fields "):
            Unsupported(entry, **wrong)


def test_an_unknown_reason_has_none() -> None:
    """A reason alone, of code outside of the package."""
    assert Unsupported("something else").cure == ""
    assert Unsupported(AUTOCAST).to_dict()["cure"].startswith("leave autocast")


def test_reasons_are_told_apart() -> None:
    assert len({entry.reason for entry in CATALOGUE.values()}) == len(CATALOGUE)


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
