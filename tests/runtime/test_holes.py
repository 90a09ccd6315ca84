"""What a masked call returns of evicted tokens is no history: it is completed, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import focus_compile
from focus_compile import UncommittedHistory, focus_backend
from focus_compile.runtime.holes import TINY, empty_slots
from tests.support.dialects import DIALECTS, draw_call
from tests.support.harness import CACHE, MASK, Run, eager_inner
from tests.support.models.llada import LLaDA, Past

PROMPT, CANVAS, BLOCK = 5, 20, 6
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "kept": lambda x: x,
    "copied": torch.clone,
    "cropped": lambda x: x[:, :, :-1],
    "concatenated": lambda x: torch.cat([x[:, :, :2], x], 2),
    "of other rows": lambda x: x[[1, 0]],
    "in bf16 meanwhile": lambda x: x.bfloat16().float(),
}
CHANGED = ("of other rows", "in bf16 meanwhile")
"""Forms in which it is not told which call made it."""
CALLS: dict[str, dict[str, Any]] = {
    "masked": {"input_ids": torch.full((2, BLOCK), MASK)},
    "mask-free": {"input_ids": torch.arange(2 * BLOCK).view(2, BLOCK)},
    "one token": {"input_ids": torch.full((2, 1), 7)},
    "replaced": {
        "input_ids": torch.full((2, BLOCK), MASK),
        "replace_position": torch.arange(PROMPT, PROMPT + BLOCK),
    },
}


@pytest.fixture(scope="module")
def model() -> LLaDA:
    torch.manual_seed(0)
    return LLaDA(groups=2).eval()


@pytest.fixture(scope="module")
def compiled(model: LLaDA) -> Iterator[Any]:
    torch._dynamo.reset()

    def backend(gm: GraphModule, inputs: Any) -> Any:
        options = {"mask_token_id": MASK, "alpha": 1.0, "first_step": "evict"}
        return focus_backend(gm, inputs, options=options, inner=eager_inner)

    with torch._dynamo.config.patch(recompile_limit=32, fail_on_recompile_limit_hit=True):
        yield torch.compile(model, backend=backend, dynamic=True)


def canvas() -> Tensor:
    ids = torch.full((2, CANVAS), MASK)
    ids[:, :PROMPT] = torch.arange(2 * PROMPT).view(2, PROMPT)
    return ids


@pytest.fixture
def kept(compiled: Any) -> Past:
    """Keys and values of a masked canvas, some tokens evicted, in no session."""
    with torch.no_grad():
        past: Past = compiled(input_ids=canvas(), use_cache=True).attn_key_values
    empty = empty_slots(past[-1][1], 2)
    assert empty is not None and 2 < int(empty.sum()) < CANVAS - PROMPT
    return past


def in_form(past: Past, form: str) -> Past:
    return [(FORMS[form](key), FORMS[form](value)) for key, value in past]


REFUSED = [
    (call, form) for call in CALLS for form in FORMS if form in CHANGED or call == "one token"
]
COMPLETED = [(call, form) for call in CALLS for form in FORMS if (call, form) not in REFUSED]


@pytest.mark.parametrize(("call", "form"), REFUSED)
@torch.no_grad()
def test_refused(call: str, form: str, compiled: Any, kept: Past) -> None:
    """By every call: masked or not, over another cache's slots, of a graph that is unchanged."""
    past = in_form(kept, form)
    with pytest.raises(
        UncommittedHistory, match=r"evicted tokens in the past: \d+\. What a masked"
    ):
        compiled(**CALLS[call], past_key_values=past, use_cache=True)


@pytest.mark.parametrize(("call", "form"), COMPLETED)
@torch.no_grad()
def test_completed(call: str, form: str, compiled: Any, kept: Past, model: LLaDA) -> None:
    """A cache that a masked call filled holds what an eager model's does, in every layer."""
    past = in_form(kept, form)
    whole = in_form(model(input_ids=canvas(), use_cache=True).attn_key_values, form)
    compiled(**CALLS[call], past_key_values=past, use_cache=True)
    for layer in (*past, *whole):
        for part in layer if call == "replaced" else ():  # the block's own slots, which are others
            part[:, :, CALLS[call]["replace_position"]] = 0
    for mine, eager in zip(past, whole, strict=True):
        for one, other in zip(mine, eager, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    with focus_compile.session(alpha=1e9):
        made = compiled(**CALLS[call], past_key_values=_copy(past), use_cache=True).logits
    expected = model(**CALLS[call], past_key_values=_copy(whole), use_cache=True).logits
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_copy_for_every_call(compiled: Any, kept: Past, model: LLaDA) -> None:
    """Each is completed, although other masked calls were made meanwhile."""
    whole = model(input_ids=canvas(), use_cache=True).attn_key_values
    for _ in range(3):
        past = in_form(kept, "copied")
        compiled(**CALLS["masked"], past_key_values=past, use_cache=True)
        torch.testing.assert_close(past[-1][1], whole[-1][1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_another_call_of_it(compiled: Any, kept: Past) -> None:
    """Neither a session that did not make it, nor one that has made others since, completes it."""
    with focus_compile.session():
        with pytest.raises(UncommittedHistory):
            compiled(**CALLS["masked"], past_key_values=kept, use_cache=True)
        mine = compiled(input_ids=canvas(), use_cache=True).attn_key_values
        compiled(input_ids=canvas().roll(1, 0), use_cache=True)
        with pytest.raises(UncommittedHistory):
            compiled(**CALLS["masked"], past_key_values=mine, use_cache=True)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_masks_of_a_refused_call(call: str, enabled: bool, compiled: Any, kept: Past) -> None:
    """They were given for that call, and are not the next one's."""
    given, past = CALLS[call]["input_ids"], in_form(kept, "of other rows")
    with focus_compile.session() as focus:
        focus.enabled = enabled
        focus.masked = torch.ones_like(given, dtype=torch.bool)
        with pytest.raises(UncommittedHistory):
            compiled(**CALLS[call], past_key_values=past, use_cache=True)
        assert focus.masked is None


@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_served(call: str, compiled: Any, kept: Past, model: LLaDA) -> None:
    """What was computed, what another path stored, and marked slots that a call takes itself."""
    given = CALLS[call]
    cropped = [(key[:, :, :PROMPT], value[:, :, :PROMPT]) for key, value in kept]
    with focus_compile.session(alpha=1e9):
        exact = model(input_ids=canvas(), use_cache=True).attn_key_values
        if call == "replaced":
            for key, value in exact:  # nobody reads these
                key[:, :, given["replace_position"]] = value[:, :, given["replace_position"]] = TINY
        else:
            compiled(**given, past_key_values=cropped, use_cache=True)
    expected = model(**given, past_key_values=_copy(exact), use_cache=True).logits
    with focus_compile.session(alpha=1e9):
        made = compiled(**given, past_key_values=_copy(exact), use_cache=True).logits
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def _copy(past: Past) -> Past:
    return [(key.clone(), value.clone()) for key, value in past]


@torch.no_grad()
def test_a_session_goes_on(compiled: Any) -> None:
    """Marks are in what the caller gets; the next step sees what evicted tokens had before."""
    with focus_compile.session() as focus:
        made = compiled(input_ids=canvas(), use_cache=True)
        again = compiled(input_ids=canvas(), use_cache=True)
        assert focus.retain_mask is not None
        slots = again.attn_key_values[-1][1]
        marked = (slots == TINY).all(-1).all(1)
        assert torch.equal(marked, ~focus.retain_mask) and marked.any()
        assert not torch.equal(again.logits, made.logits)  # it sees more, and no mark
    with focus_compile.session() as focus:
        focus.owns_kv = True  # as in `generate`: nobody else ever sees them
        own = compiled(input_ids=canvas(), use_cache=True).attn_key_values[-1][1]
        assert empty_slots(own, 2) is None


@torch.no_grad()
def test_slots_behind_a_mask() -> None:
    """A cache of fixed length that an earlier text has used: the mask hides what is left of it."""
    dialect = DIALECTS["sdar-static"]
    model: Any = dialect.build().eval()
    compiled = Run(model, dynamic=True).compiled
    draw = draw_call(dialect, 1)
    for first, refused in ((draw.history + draw.ids.shape[1], False), (draw.history - 1, True)):
        arguments = dialect.arguments(model, draw)
        for layer in arguments[CACHE].layers:
            layer.values[:, :, first] = TINY
        if refused:
            with pytest.raises(
                UncommittedHistory, match=r"^slots of evicted tokens in the past: 1\. "
            ):
                compiled(**arguments)
        else:
            compiled(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_a_mark(dtype: torch.dtype) -> None:
    """A whole slot of it; zeros and single numbers are none, nor has an integer cache any."""
    mark = 201 * 2.0**-24 if dtype == torch.float16 else TINY
    past = torch.zeros(2, 3, 7, 4, dtype=dtype)
    assert empty_slots(past, 2) is None
    past[1, :, 5, 0] = mark
    assert empty_slots(past, 2) is None
    past[1, :, 5] = mark
    found = empty_slots(past, 2)
    assert found is not None and found.tolist() == [False] * 5 + [True, False]
    assert float(past[1, 0, 5, 0]) == mark  # exact in this dtype
    assert empty_slots(past.transpose(1, 2), 1) is not None
    assert empty_slots(past.long(), 2) is None and empty_slots(past[:, :, :0], 2) is None


@torch.no_grad()
def test_what_the_caller_wrote_meanwhile(compiled: Any, kept: Past, model: LLaDA) -> None:
    """A dual cache's own slots, say: they are let be, others are completed."""
    places = torch.arange(PROMPT, PROMPT + BLOCK)
    for key, value in kept:
        key[:, :, places], value[:, :, places] = 0.25, 0.5
    compiled(**CALLS["masked"], past_key_values=kept, use_cache=True)
    whole = model(input_ids=canvas(), use_cache=True).attn_key_values
    rest = torch.tensor([place for place in range(CANVAS) if place not in places])
    for mine, eager in zip(kept, whole, strict=True):
        for one, other, number in zip(mine, eager, (0.25, 0.5), strict=True):
            torch.testing.assert_close(one[:, :, rest], other[:, :, rest], atol=1e-5, rtol=1e-5)
            assert bool((one[:, :, places] == number).all())


@torch.no_grad()
def test_other_weights_since(compiled: Any, kept: Past, model: LLaDA) -> None:
    """The call cannot be made again."""
    weight = next(model.parameters())
    weight.add_(0)
    with pytest.raises(UncommittedHistory):
        compiled(**CALLS["masked"], past_key_values=kept, use_cache=True)
