"""focus_compile.compile: where it finds the mask token, and what it says of it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import focus_compile
from focus_compile.models.mask_token import FAMILIES, find_mask_token
from tests.support.harness import MASK, PAPER, Sizes, build_model, eager_logits, random_call


class Model(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)


def tokenizer(mask: int | None) -> Any:
    return SimpleNamespace(mask_token_id=mask)


@pytest.mark.parametrize(
    ("model", "given", "expected", "says"),
    [
        (Model(model_type="sdar", mask_token_id=5), tokenizer(7), 7, "from the tokenizer"),
        (Model(model_type="sdar", mask_token_id=5), tokenizer(None), 5, "from model.config"),
        (Model(model_type="sdar_moe"), None, 151669, "guessed: the family 'sdar' uses it"),
        (Model(model_type="llada2_moe"), None, 156895, "guessed: the family 'llada2' uses it"),
        (Model(model_type="llada"), None, 126336, "guessed: the family 'llada' uses it"),
        (Model(model_type="Dream"), None, 151666, "guessed: the family 'dream' uses it"),
        (
            Model(model_type="llada", architectures=["LLaDAModelLM"]),
            None,
            126336,
            "guessed: the family 'llada' uses it",
        ),
        (
            Model(model_type="llada", architectures=["LLaDAMoEModelLM"]),
            tokenizer(156895),
            156895,
            "from the tokenizer",
        ),
    ],
)
def test_where_the_mask_token_comes_from(
    model: nn.Module, given: Any, expected: int, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="focus_compile")
    assert find_mask_token(model, given) == expected
    (record,) = caplog.records
    assert says in record.getMessage()
    assert record.levelno == (logging.WARNING if "guessed" in says else logging.INFO)


def test_known_families() -> None:
    assert FAMILIES == {"sdar": 151669, "llada2": 156895, "llada": 126336, "dream": 151666}


def test_no_mask_token() -> None:
    message = (
        "no mask token: neither the tokenizer nor model.config names one, and model_type 'bert'"
    )
    with pytest.raises(ValueError, match=message):
        focus_compile.compile(Model(model_type="bert"), tokenizer(None))
    with pytest.raises(ValueError, match="no mask token"):
        focus_compile.compile(nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("llada", "LLaDAMoEModelLM"),
        ("llada_moe", None),
        ("lladamoe", "LLaDAMoEModelLM"),
        ("llada2", None),
        ("llava_llada", "LlavaLLaDAModelLM"),
        ("Dream", "DreamOnModel"),
        ("DreamOn", "DreamModel"),
        ("dreamer", None),
        ("sdar_v", "SDARForCausalLM"),
        ("", None),
    ],
)
def test_relatives_are_asked_for_theirs(kind: str, architecture: str | None) -> None:
    """Types that begin alike, and architectures that borrow a type, have other mask tokens."""
    named = [] if architecture is None else [architecture]
    with pytest.raises(
        ValueError, match=r"no mask token: .* give mask_token_id=\.\.\., see the mod"
    ):
        find_mask_token(Model(model_type=kind, architectures=named), tokenizer(None))


def test_a_class_tells_where_the_config_does_not() -> None:
    """A config that was made by hand names no architecture."""
    model = build_model(Sizes(layers=2))
    model.config.architectures = None
    model.config.model_type = "llada"
    with pytest.raises(ValueError, match="model_type 'llada' of Qwen3ForCausalLM is no family"):
        find_mask_token(model)


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="unknown option 'alfa'"):
        focus_compile.compile(Model(mask_token_id=5), alfa=2.0)


@torch.no_grad()
@pytest.mark.usefixtures("no_inductor")
def test_it_runs_focus() -> None:
    model = build_model(Sizes(layers=2))
    compiled = focus_compile.compile(model, tokenizer(MASK), strict=True, alpha=1.0)
    call = random_call(1, model, 3, 9, 7)
    with focus_compile.session(**PAPER) as focus:
        logits = compiled(**call.kwargs(model)).logits
    assert focus.stats.steps == 1 and 0 < focus.stats.retained_fraction < 1
    assert logits.shape == eager_logits(model, call).shape
