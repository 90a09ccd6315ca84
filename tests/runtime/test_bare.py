"""Calls in no session: a loop that knows nothing of this package, one thread or several."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import focus_compile
from focus_compile import EvictedTokenDecoded, focus_backend
from focus_compile.runtime.implicit import session_here
from tests.support.harness import MASK, eager_inner
from tests.support.models.llada import LLaDA

PROMPT, TOKENS, BLOCK = 4, 24, 8


@pytest.fixture(scope="module")
def model() -> LLaDA:
    torch.manual_seed(0)
    return LLaDA(groups=2).eval()


def compiled_with(model: LLaDA, **options: Any) -> Any:
    def backend(gm: GraphModule, inputs: Any) -> Any:
        return focus_backend(
            gm, inputs, options={"mask_token_id": MASK, **options}, inner=eager_inner
        )

    return torch.compile(model, backend=backend, dynamic=True)


@pytest.fixture(scope="module")
def compiled(model: LLaDA) -> Iterator[Any]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32, fail_on_recompile_limit_hit=True):
        yield compiled_with(model, alpha=1.0)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    session_here().reset()
    yield


def canvas(seed: int, batch: int = 2) -> Tensor:
    ids = torch.full((batch, PROMPT + TOKENS), MASK)
    source = torch.Generator().manual_seed(seed)
    ids[:, :PROMPT] = torch.randint(0, MASK, (batch, PROMPT), generator=source)
    return ids


def best_of(logits: Tensor, ids: Tensor, window: slice, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` masked tokens of a window with the highest confidence, and their tokens."""
    confidence, token = logits.float().softmax(-1).max(-1)
    inside = torch.zeros_like(ids, dtype=torch.bool)
    inside[:, window] = True
    confidence = confidence.masked_fill((ids != MASK) | ~inside, -1)
    return confidence.topk(count, 1).indices, token


def semi_autoregressive(model: Any, ids: Tensor, count: int = 2) -> Tensor:
    """LLaDA's loop: blocks from left to right, a fixed number of tokens in each step."""
    ids = ids.clone()
    for start in range(PROMPT, ids.shape[1], BLOCK):
        for _ in range(BLOCK // count):
            logits = model(input_ids=ids).logits
            at, token = best_of(logits, ids, slice(start, start + BLOCK), count)
            ids.scatter_(1, at, token.gather(1, at))
    return ids


def whole_canvas(model: Any, ids: Tensor) -> Tensor:
    return _steps(model, ids, 3)


def _steps(model: Any, ids: Tensor, count: int) -> Tensor:
    ids = ids.clone()
    while bool((ids == MASK).any()):
        left = int((ids == MASK).sum(1).max())
        logits = model(input_ids=ids).logits
        at, token = best_of(logits, ids, slice(None), min(count, left))
        ids.scatter_(1, at, token.gather(1, at))
    return ids


def by_threshold(model: Any, ids: Tensor) -> Tensor:
    """Fast-dLLM's loop: all tokens above a confidence, or the most confident one."""
    ids = ids.clone()
    for _ in range(TOKENS + 1):
        masked = ids == MASK
        if not bool(masked.any()):
            return ids
        confidence, token = model(input_ids=ids).logits.softmax(-1).max(-1)
        confidence = confidence.masked_fill(~masked, -1)
        best = confidence == confidence.max(1, keepdim=True).values
        ids = torch.where(masked & ((confidence > 0.5) | best), token, ids)
    raise AssertionError("a loop by threshold makes no progress")


def argmax_everywhere(model: Any, ids: Tensor) -> Tensor:
    """Every position becomes its most probable token in each of some steps, however sure."""
    for _ in range(TOKENS):
        token = model(input_ids=ids).logits.argmax(-1)
        ids = torch.where(ids == MASK, token, ids)
    return ids


LOOPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "blocks": semi_autoregressive,
    "one by one": lambda model, ids: semi_autoregressive(model, ids, 1),
    "canvas": whole_canvas,
    "threshold": by_threshold,
    "argmax": argmax_everywhere,
}


@pytest.mark.parametrize("loop", LOOPS)
@torch.no_grad()
def test_loops_that_know_nothing(loop: str, compiled: Any) -> None:
    """They end with a text without masks, and decode nothing where nothing was computed."""
    for seed in range(6):
        made = LOOPS[loop](compiled, canvas(seed))
        assert not bool((made == MASK).any())
        assert torch.equal(made[:, :PROMPT], canvas(seed)[:, :PROMPT])


@pytest.mark.parametrize("options", [{"exact": True}, {"alpha": 1e9, "delayed_cache": False}])
@pytest.mark.parametrize("loop", LOOPS)
@torch.no_grad()
def test_nothing_evicted(loop: str, options: dict[str, Any], model: LLaDA) -> None:
    """Exactly, or with a budget for all tokens, texts equal those of the eager model."""
    compiled = compiled_with(model, **options)
    for seed in range(3):
        assert torch.equal(LOOPS[loop](compiled, canvas(seed)), LOOPS[loop](model, canvas(seed)))


@torch.no_grad()
def test_it_evicts(compiled: Any) -> None:
    """A bare loop saves: from its second step on fewer tokens are retained."""
    ids, counts = canvas(0, 1), []
    for _ in range(5):
        logits = compiled(input_ids=ids).logits
        counts.append(int(((logits != 0).sum(-1) > 1).sum()))
        at, token = best_of(logits, ids, slice(None), 2)
        ids = ids.scatter(1, at, token.gather(1, at))
    assert counts[0] == ids.shape[1] and min(counts[1:]) < ids.shape[1] // 2


@torch.no_grad()
def test_a_call_that_is_made_twice(compiled: Any) -> None:
    """The same call gives the same result, also after two others in between."""
    first = compiled(input_ids=canvas(0)).logits
    assert torch.equal(compiled(input_ids=canvas(0)).logits, first)
    for seed in (1, 2):
        compiled(input_ids=canvas(seed))
    assert torch.equal(compiled(input_ids=canvas(0)).logits, first)


def evicted_of(logits: Tensor) -> Tensor:
    return (logits != 0).sum(-1) <= 1


def in_mid_block(compiled: Any) -> tuple[Tensor, Tensor]:
    """Ids after two calls, of which the second has evicted tokens, and those."""
    ids = canvas(0, 1)
    for _ in range(2):
        logits = compiled(input_ids=ids).logits
        before = ids
        at, token = best_of(logits, ids, slice(None), 2)
        ids = ids.scatter(1, at, token.gather(1, at))
    gone = evicted_of(logits) & (before == MASK)
    assert bool(gone.any())
    return ids, gone


@torch.no_grad()
def test_an_evicted_token_predicts_the_mask(compiled: Any) -> None:
    """Whoever takes the most probable token leaves it masked, and finds no lower confidence."""
    ids, gone = in_mid_block(compiled)
    logits = compiled(input_ids=ids).logits
    gone, there = evicted_of(logits) & (ids == MASK), ~evicted_of(logits) & (ids == MASK)
    assert bool(gone.any()) and bool((logits.argmax(-1)[gone] == MASK).all())
    confidence = logits.double().softmax(-1).amax(-1)
    assert float(confidence[gone].max()) < 1.05 / logits.shape[-1] < float(confidence[there].min())


@torch.no_grad()
def test_a_token_decoded_where_nothing_was_computed(compiled: Any) -> None:
    """The next call says so once; the request may begin again after it."""
    ids, gone = in_mid_block(compiled)
    ids = ids.masked_fill(gone & (gone.cumsum(1) == 1), 3)
    with pytest.raises(EvictedTokenDecoded, match=r"tokens_per_step=k retains .* session\.require"):
        compiled(input_ids=ids)
    assert bool((compiled(input_ids=ids).logits != 0).any())


@torch.no_grad()
def test_requests_in_turn(compiled: Any, model: LLaDA) -> None:
    """Loops that take turns on one thread get what each of them gets alone, or exact logits."""
    exact = compiled_with(model, alpha=1e9, delayed_cache=False)
    alone = [whole_canvas(exact, canvas(seed)) for seed in range(3)]
    ids = [canvas(seed) for seed in range(3)]
    while any(bool((each == MASK).any()) for each in ids):
        for number, each in enumerate(ids):
            if bool((each == MASK).any()):
                at, token = best_of(compiled(input_ids=each).logits, each, slice(None), 3)
                ids[number] = each.scatter(1, at, token.gather(1, at))
    for made, expected in zip(ids, alone, strict=True):
        assert torch.equal(made, expected)  # each call began a request: nothing was evicted


@torch.no_grad()
def test_threads(compiled: Any) -> None:
    """Each has a session of its own."""
    expected = []
    for seed in range(3):
        session_here().reset()  # what was seen of the loop before
        expected.append(whole_canvas(compiled, canvas(seed)))
    made: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        with torch.no_grad():
            made[seed] = whole_canvas(compiled, canvas(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made[seed], expected[seed]) for seed in range(3))


@torch.no_grad()
def test_a_model_that_is_gone(compiled: Any) -> None:
    """Its state goes with it."""
    model = LLaDA(groups=2).eval()
    compiled_with(model)(input_ids=canvas(0))
    session: Any = session_here()
    assert len(session._states) == 1
    torch._dynamo.reset()
    del model
    import gc

    gc.collect()
    assert not session._states


@torch.no_grad()
def test_tokens_per_step(model: LLaDA) -> None:
    """At least so many masked tokens of each row are retained, by option or by session."""
    run = compiled_with(model, alpha=1.0, first_step="evict", tokens_per_step=7)
    kept = ~evicted_of(run(input_ids=canvas(1)).logits) & (canvas(1) == MASK)
    assert kept.sum(1).min() >= 7 and not bool(kept.all())
    with focus_compile.session(tokens_per_step=11) as focus:
        run(input_ids=canvas(1))
        assert focus.retain_mask is not None
        assert (focus.retain_mask & (canvas(1) == MASK)).sum(1).min() >= 11
    with pytest.raises(ValueError, match="tokens_per_step=0: expected an int from 1 on"):
        focus_compile.Session(tokens_per_step=0)


@torch.no_grad()
def test_required_tokens(model: LLaDA) -> None:
    """They are retained beside the budget, in the next call alone."""
    run = compiled_with(model, alpha=1.0, first_step="evict", signal="position")
    with focus_compile.session() as focus:
        run(input_ids=canvas(1))
        free = focus.retain_mask
        assert free is not None
        required = (canvas(1) == MASK) & ~free
        required = required & (required.cumsum(1) == 3)
        assert required.any()
        focus.reset()
        focus.require = required
        run(input_ids=canvas(1))
        kept = focus.retain_mask
        assert kept is not None and bool((kept | ~required).all()) and not bool(kept.all())
        assert focus.require is None
        focus.reset()
        run(input_ids=canvas(1))
        assert torch.equal(focus.retain_mask, free)
        focus.require = required[:, 1:]
        with pytest.raises(ValueError, match=r"session.require has shape \(2, 27\): the token ids"):
            run(input_ids=canvas(1))
        with pytest.raises(ValueError, match=r"dtype torch\.int64: expected torch\.bool"):
            focus.require = required.long()


@pytest.mark.parametrize("order", ["sequential", "random"])
@torch.no_grad()
def test_loops_that_know_their_positions(order: str, model: LLaDA) -> None:
    """Named before each call, none of them is ever evicted, and others are."""
    run, source = compiled_with(model, alpha=1.0), torch.Generator().manual_seed(3)
    ids, saved = canvas(5), 0
    with focus_compile.session(first_step="evict") as focus:
        while bool((ids == MASK).any()):
            masked = ids == MASK
            rank = torch.rand(ids.shape, generator=source)
            rank = torch.arange(ids.shape[1]).expand(ids.shape) if order == "sequential" else rank
            rank = rank.float().masked_fill(~masked, torch.inf)
            chosen = masked & (rank.argsort(1).argsort(1) < 2)
            focus.require = chosen
            token = run(input_ids=ids).logits.argmax(-1)
            ids = torch.where(chosen, token, ids)
            saved += int((~focus.retain_mask).sum())  # type: ignore[operator]
    assert saved > 100
