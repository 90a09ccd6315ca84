"""Options: what is refused, in which words, and what reaches Inductor."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from focus_compile import FocusConfig
from focus_compile.backend import focus_backend
from tests.support.harness import eager_inner

BAD: list[tuple[str, Any, str]] = [
    ("mask_token_id", -1, "an int >= 0 or None"),
    ("mask_token_id", 1.5, "an int >= 0 or None"),
    ("mask_token_id", True, "an int >= 0 or None"),
    ("mask_token_id", "60", "an int >= 0 or None"),
    ("alpha", 0.99, "a number >= 1"),
    ("alpha", math.nan, "a number >= 1"),
    ("alpha", True, "a number >= 1"),
    ("alpha", "1.5", "a number >= 1"),
    ("tokens_per_step", 0, "an int >= 1 or None"),
    ("visibility", "all", "one of ('written', 'prefix')"),
    ("visibility", None, "one of ('written', 'prefix')"),
    ("delayed_cache", 1, "True or False"),
    ("stale_kv", None, "True or False"),
    ("signal", "left", "one of ('delta', 'importance', 'position', 'confidence'), or two weights"),
    ("signal", (1.0, 2.0, 3.0), "one of ('delta', 'importance', 'position', 'confidence'), or"),
    ("layers", (1, 1), "two layers, (i, j) with 0 <= i < j"),
    ("layers", (0, 1.0), "two layers, (i, j) with 0 <= i < j"),
    ("first_step", "closed", "one of ('auto', 'evict', 'open')"),
    ("rescue", 1.1, "a probability from 0 to 1, 'auto' or None"),
    ("rescue", math.nan, "a probability from 0 to 1, 'auto' or None"),
    ("calibration", 5, "the file of focus-compile calibrate, or what"),
    ("calibration", "nowhere.json", "the file of focus-compile calibrate, or what"),
    ("evict", "never", "True, False or 'auto'"),
    ("exact", "yes", "True or False"),
    ("strict", "yes", "True or False"),
    ("shifted_logits", 1, "True or False"),
    ("mode", "fastest", "None or one of ("),
    ("inductor", ["max_autotune"], "a dict of Inductor config patches"),
    ("buckets", 64, "a list of ints >= 1, ascending"),
    ("buckets", [64, 16], "a list of ints >= 1, ascending"),
    ("buckets", [0, 16], "a list of ints >= 1, ascending"),
    ("buckets", [16.0], "a list of ints >= 1, ascending"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_out_of_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError) as refusal:
        FocusConfig.from_options({name: value})
    assert str(refusal.value).startswith(f"option {name}={value!r}: expected {allowed}")


def test_unknown_option_names_all_options() -> None:
    with pytest.raises(ValueError) as refusal:
        FocusConfig.from_options({"mask_token": 60})
    names = ", ".join(entry.name for entry in dataclasses.fields(FocusConfig))
    expected = f"unknown option 'mask_token': the options of backend 'focus' are {names}"
    assert str(refusal.value) == expected


def test_every_option_has_a_bad_value_here() -> None:
    assert {name for name, _, _ in BAD} == {e.name for e in dataclasses.fields(FocusConfig)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_token_id": 0, "alpha": 1, "visibility": "prefix"},
        {"alpha": math.inf, "delayed_cache": False, "strict": True},
        {"mode": "reduce-overhead", "inductor": {"max_autotune": True}},
    ],
)
def test_in_range(options: dict[str, Any]) -> None:
    config = FocusConfig.from_options(options)
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if entry.name in options:
            assert value == options[entry.name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 2.0  # type: ignore[misc]


def test_options_are_copied() -> None:
    given = {"max_autotune": True}
    config = FocusConfig.from_options({"inductor": given})
    given["max_autotune"] = False
    assert config.inductor["max_autotune"] is True
    with pytest.raises(TypeError):
        config.inductor["max_autotune"] = False  # type: ignore[index]


def test_mode_and_inductor_become_patches() -> None:
    mode = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert mode
    config = FocusConfig.from_options({"mode": "max-autotune-no-cudagraphs"})
    assert config.patches() == mode
    name = next(iter(mode))
    config = FocusConfig.from_options(
        {"mode": "max-autotune-no-cudagraphs", "inductor": {name: None, "debug": True}}
    )
    assert config.patches() == {**mode, name: None, "debug": True}  # what is explicit wins


def test_a_bad_option_is_an_error_of_the_call() -> None:
    """Also where the graph has nothing for FOCUS to do."""

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return focus_backend(gm, inputs, options={"alpha": 0}, inner=eager_inner)

    compiled = torch.compile(nn.Linear(3, 5), backend=backend)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="option alpha=0: expected"):
        compiled(torch.randn(2, 3))


def test_the_entry_point_is_found_by_name() -> None:
    assert "focus" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("focus") is focus_backend
