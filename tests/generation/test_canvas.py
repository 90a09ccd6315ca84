"""generate() for models without a cache: prompt and all blocks in every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import focus_compile
from focus_compile.generation.batch import CanvasBatch
from tests.reference.emulation import Emulation
from tests.reference.state import Config
from tests.support.harness import MASK, PAPER, Sizes, build_model
from tests.support.models.dream import Dream
from tests.support.models.llada import LLaDA

PROMPT, BLOCK, BLOCKS, PER_STEP = 5, 6, 2, 2


class Named(nn.Module):
    """A Dream that returns its logits by name."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Dream(groups=3)

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None
    ) -> CausalLMOutput:
        return CausalLMOutput(logits=self.model(input_ids, attention_mask)[0])


def prompts(batch: int) -> Tensor:
    return torch.randint(0, MASK, (batch, PROMPT), generator=torch.Generator().manual_seed(4))


def generated(model: Any, ids: Tensor, **arguments: Any) -> focus_compile.Generated:
    made = focus_compile.generate(
        model,
        ids,
        max_new_tokens=BLOCK * BLOCKS,
        block_length=BLOCK,
        mask_token_id=MASK,
        remasking_strategy="fixed",
        tokens_per_step=PER_STEP,
        use_cache=False,
        return_dict=True,
        **arguments,
    )
    return made


def reference(model: Any, ids: Tensor, shifted: bool, alpha: float | None) -> Tensor:
    """The loop written out; ``alpha``: by the emulation of FOCUS, None: dense."""
    batch = len(ids)
    canvas = torch.cat([ids, torch.full((batch, BLOCK * BLOCKS), MASK)], 1)
    for start in range(PROMPT, canvas.shape[1], BLOCK):
        emulation = Emulation(Config(alpha or 1.0))
        while (canvas[:, start : start + BLOCK] == MASK).any():
            masked = canvas == MASK
            masked[:, start + BLOCK :] = False
            if alpha is None:
                logits, retained = model(input_ids=canvas).logits, torch.ones_like(masked)
            else:
                step = emulation.step(lambda c=canvas: model(input_ids=c).logits, canvas, masked, 0)
                logits, retained = step.logits, step.retained
            if shifted:
                logits, retained = logits.roll(1, 1), retained.roll(1, 1)
            logits[..., MASK] = -torch.inf
            best = torch.softmax(logits, -1).max(-1)
            for b in range(batch):
                open_ones = (masked[b] & retained[b]).nonzero().flatten().tolist()
                chosen = sorted(open_ones, key=lambda p, b=b: -float(best.values[b, p]))[:PER_STEP]
                canvas[b, chosen] = best.indices[b, chosen]
                if emulation.rows:
                    emulation.rows[b].record(len(chosen))
    return canvas


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
def test_generation_without_a_cache(shifted: bool) -> None:
    """Eager and disabled: the dense loop's tokens. FOCUS: those of its emulation."""
    torch._dynamo.reset()
    model = Named().eval() if shifted else LLaDA(groups=2).eval()
    ids = prompts(3)
    compiled = torch.compile(
        model, backend="focus", dynamic=True, options={"strict": True, **PAPER}
    )
    dense = reference(model, ids, shifted, None)
    assert torch.equal(generated(model, ids, shifted_logits=shifted).sequences, dense)
    with focus_compile.session(enabled=False):
        made = generated(compiled, ids, shifted_logits=shifted)
    assert torch.equal(made.sequences, dense)
    with focus_compile.session(alpha=1.2):
        made = generated(compiled, ids, shifted_logits=shifted)
    assert torch.equal(made.sequences, reference(model, ids, shifted, 1.2))
    assert made.focus_steps == made.forwards and made.retained_fraction < made.fed_fraction < 0.9


@torch.no_grad()
def test_rows_that_have_ended_without_a_cache() -> None:
    """They are filled up; the other rows' tokens are as they are alone."""
    model = LLaDA(groups=2).eval()
    ids = prompts(4)
    whole = generated(model, ids).sequences
    end = int(whole[0, PROMPT + 1])
    made = generated(model, ids, eos_token_id=end, pad_token_id=0).sequences
    assert (made[0, PROMPT + 2 :] == 0).all()
    for row, (one, two) in enumerate(zip(made, whole, strict=True)):
        answer = two[PROMPT:]
        stop = int((answer == end).long().argmax()) if end in answer else len(answer)
        assert torch.equal(one[: PROMPT + stop], two[: PROMPT + stop]), row


@torch.no_grad()
def test_padded_prompts_without_a_cache() -> None:
    """A padded row gives what it gives alone, for a model that takes a mask and positions."""
    model = Named().eval()
    ids = prompts(2)
    valid = torch.ones_like(ids)
    valid[0, :2] = 0
    both = generated(model, ids, attention_mask=valid).sequences
    alone = generated(model, ids[:1, 2:]).sequences
    assert torch.equal(both[0, 2:], alone[0])


class Masking(nn.Module):
    """A LLaDA of the later public file: a 4-D bias, and no position ids. ``heeds``: it is used."""

    def __init__(self, heeds: bool) -> None:
        super().__init__()
        self.model, self.heeds = Dream(groups=3, layers=4), heeds

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, attention_bias: Any = None
    ) -> CausalLMOutput:
        assert attention_mask is None  # two-dimensional: looked at on the host
        bias = attention_bias if self.heeds else None
        return CausalLMOutput(logits=self.model(input_ids, bias)[0])


class Counting(nn.Module):
    """A model that takes a mask, but counts positions from the first token of all."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.places = Dream(groups=3), nn.Embedding(64, 40)
        self.model.embed_tokens.register_forward_hook(self.count)

    def count(self, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out + self.places.weight[: out.shape[1]]

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> CausalLMOutput:
        return CausalLMOutput(logits=self.model(input_ids, attention_mask)[0])


class Open(nn.Module):
    """A wrapper that passes on what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Named()

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        made: CausalLMOutput = self.model(*args, **kwargs)
        return made


NEIGHBOURS: dict[str, Callable[[], nn.Module]] = {
    "sdpa": lambda: build_model(Sizes(layers=3)),
    "eager": lambda: build_model(Sizes(layers=3), "eager"),
    "bf16": lambda: build_model(Sizes(layers=3), dtype=torch.bfloat16),
    "dream": Named,
    "bias": lambda: Masking(heeds=True),
    "kwargs": Open,
}


@torch.no_grad()
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_row_never_depends_on_its_neighbours(name: str) -> None:
    """Alone, beside rows of other lengths, and in another order: the same answer; not a causal one.

    transformers' own mask is causal where it gets none, which no padding is no reason for.
    """
    model = NEIGHBOURS[name]().eval()
    ids = prompts(3)
    valid = torch.ones_like(ids)
    valid[1, :2] = valid[2, :4] = 0
    both = generated(model, ids, attention_mask=valid).sequences
    turned = generated(model, ids.flip(0), attention_mask=valid.flip(0)).sequences.flip(0)
    for row, padding in enumerate((0, 2, 4)):
        alone = generated(model, ids[row : row + 1, padding:]).sequences
        assert torch.equal(both[row, padding:], alone[0])
        assert torch.equal(turned[row, padding:], alone[0])
    assert len(both[:, PROMPT:].unique()) > 2 and not torch.equal(both[0], both[1])


@torch.no_grad()
@pytest.mark.parametrize("build", [lambda: LLaDA(groups=2), lambda: Masking(heeds=False), Counting])
def test_padding_that_is_seen_is_refused(build: Callable[[], nn.Module]) -> None:
    """No mask, a mask that is ignored, positions that count padding; prompts of one length go."""
    model = build().eval()
    ids = prompts(2)
    valid = torch.ones_like(ids)
    valid[0, :2] = 0
    with pytest.raises(ValueError, match="the model sees their padding, so that a row's answer"):
        generated(model, ids, attention_mask=valid)
    assert generated(model, ids, attention_mask=torch.ones_like(ids)).decoded == 24


@torch.no_grad()
def test_a_compiled_model_is_tried_eagerly() -> None:
    """The trial of a few tokens compiles nothing, and counts in no session."""
    model, calls = Named().eval(), []

    def backend(gm: Any, _: Any) -> Any:
        calls.append(gm)
        return gm

    compiled = torch.compile(model, backend=backend, dynamic=True)
    valid = torch.ones(2, PROMPT, dtype=torch.int64)
    valid[0, :2] = 0
    with focus_compile.session() as focus:
        CanvasBatch(compiled, prompts(2), valid.bool(), prompts(2))
    assert not calls and not focus.stats.dense_calls
