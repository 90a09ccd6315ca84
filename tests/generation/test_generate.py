"""The arguments of generate, on an eager model: what each of them does, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3ForCausalLM,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import focus_compile
from focus_compile import Generated, focus_backend
from tests.support.harness import MASK, PAPER, VOCAB, Sizes, build_model, eager_inner

BLOCK, PROMPT, BATCH = 6, 5, 3
EOS, PAD = 58, 59


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return build_model(Sizes(layers=2))


def prompts() -> Tensor:
    return torch.randint(0, 50, (BATCH, PROMPT), generator=torch.Generator().manual_seed(2))


def generate(model: Qwen3ForCausalLM, ids: Tensor | None = None, **given: Any) -> Generated:
    options: dict[str, Any] = {
        "max_new_tokens": 2 * BLOCK,
        "block_length": BLOCK,
        "mask_token_id": MASK,
        "remasking_strategy": "fixed",
        "return_dict": True,
    }
    out = focus_compile.generate(model, prompts() if ids is None else ids, **options | given)
    assert isinstance(out, Generated)
    return out


class Only(LogitsProcessor):
    """Row by row (told by the first token of its prompt), one token is the only possible one."""

    def __init__(self, tokens: dict[int, int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, context in enumerate(input_ids):
            token = self.tokens.get(int(context[0]))
            if token is not None:
                scores[row] = scores[row].index_fill(
                    0, torch.tensor([t for t in range(VOCAB) if t != token]), -torch.inf
                )
        return scores


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ids": torch.zeros(4, dtype=torch.int64)}, r"shape \(4,\): expected \[batch, prompt\]"),
        ({"ids": torch.zeros(2, 0, dtype=torch.int64)}, r"shape \(2, 0\): expected"),
        ({"attention_mask": torch.ones(BATCH, 2)}, r"attention_mask has shape \(3, 2\): input_ids"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 3)}, "padded on the left"),
        ({"max_new_tokens": 0}, "max_new_tokens=0, block_length=6: expected at least 1"),
        ({"block_length": 0}, "block_length=0: expected at least 1"),
        ({"remasking_strategy": "random"}, "remasking_strategy='random': expected one of"),
        ({"confidence_threshold": 1.5}, "confidence_threshold=1.5: expected a number from 0 to 1"),
        ({"denoising_steps": 2, "tokens_per_step": 2}, "or tokens_per_step, not both"),
        ({"denoising_steps": 0}, "denoising_steps=0: expected at least 1"),
        ({"tokens_per_step": 0}, "tokens_per_step=0: expected at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0: expected a number >= 0"),
        ({"temperature": 1.0, "top_p": 2.0}, "top_p"),
        ({"temperature": 1.0, "top_k": -2}, "top_k"),
    ],
)
def test_refused(model: Qwen3ForCausalLM, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **given)


def test_returned_fields_agree(model: Qwen3ForCausalLM) -> None:
    out = generate(model, tokens_per_step=2)
    assert torch.equal(out.sequences[:, :PROMPT], prompts())
    assert out.sequences.shape == (BATCH, PROMPT + 2 * BLOCK)
    assert [steps.tolist() for steps in out.steps_per_block] == [[3] * BATCH] * 2
    assert out.forwards == 6
    assert out.decoded == BATCH * 2 * BLOCK
    assert out.tokens_per_forward == out.decoded / out.forwards == 2 * BATCH
    assert (out.fed_fraction, out.retained_fraction, out.focus_steps) == (1.0, 1.0, 0)
    plain = focus_compile.generate(
        model,
        prompts(),
        max_new_tokens=2 * BLOCK,
        block_length=BLOCK,
        mask_token_id=MASK,
        remasking_strategy="fixed",
        tokens_per_step=2,
    )
    assert isinstance(plain, Tensor)
    assert torch.equal(plain, out.sequences)


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (2, 2), (4, 3), (6, 6), (9, 6)])
def test_denoising_steps(model: Qwen3ForCausalLM, steps: int, expected: int) -> None:
    """As many tokens per step as are needed; 4 steps for 6 tokens mean 2 per step, hence 3."""
    out = generate(model, denoising_steps=steps)
    assert out.steps_per_block[0].tolist() == [expected] * BATCH


def test_new_tokens_are_rounded_up_to_blocks(model: Qwen3ForCausalLM) -> None:
    assert generate(model, max_new_tokens=BLOCK + 1).sequences.shape[1] == PROMPT + 2 * BLOCK


def test_sequential_decodes_from_the_left(model: Qwen3ForCausalLM) -> None:
    """One token at a time is one block of one token at a time, but for what the block shows."""
    expected = prompts()
    masks = torch.full((BATCH, 2), MASK)
    with torch.no_grad():
        for count in range(2):
            ids = torch.cat([expected, masks[:, count:]], 1)
            visible = torch.ones(BATCH, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
            visible[..., :PROMPT, PROMPT:] = False
            logits = model(ids, attention_mask=visible).logits
            token = logits[:, PROMPT + count].argmax(-1, keepdim=True)
            expected = torch.cat([expected, token], 1)
    out = generate(model, max_new_tokens=2, block_length=2, remasking_strategy="sequential")
    assert torch.equal(out.sequences, expected)


def test_processors_are_applied(model: Qwen3ForCausalLM) -> None:
    first = int(prompts()[1, 0])
    out = generate(model, logits_processor=LogitsProcessorList([Only({first: 33})]))
    assert out.sequences[1, PROMPT:].tolist() == [33] * 2 * BLOCK
    assert torch.equal(out.sequences[0], generate(model).sequences[0])


def test_sampling(model: Qwen3ForCausalLM) -> None:
    """Seeded, it repeats itself; it is not greedy; top_k=1 is."""

    def sample(seed: int, **given: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, temperature=1.5, generator=generator, **given).sequences

    greedy = generate(model).sequences
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert not torch.equal(sample(1), greedy)
    sequential = {"remasking_strategy": "sequential"}
    assert torch.equal(sample(1, top_k=1, **sequential), generate(model, **sequential).sequences)


def test_end_of_text(model: Qwen3ForCausalLM) -> None:
    """A row that ends is padded from there on, idles, and does not disturb the others."""
    only = LogitsProcessorList([Only({int(prompts()[1, 0]): EOS})])
    given = {"logits_processor": only, "eos_token_id": EOS}
    out = generate(model, **given, pad_token_id=PAD)
    assert out.sequences[1, PROMPT:].tolist() == [EOS] + [PAD] * (2 * BLOCK - 1)
    assert [int(steps[1]) for steps in out.steps_per_block] == [BLOCK, 0]
    plain = generate(model).sequences
    others = torch.tensor([0, 2])
    assert not (plain[others] == EOS).any()
    assert torch.equal(out.sequences[others], plain[others])

    late = generate(model, **given, eos_early_stop=False)
    assert late.sequences[1, PROMPT:].tolist() == [EOS] * 2 * BLOCK
    assert [int(steps[1]) for steps in late.steps_per_block] == [BLOCK, BLOCK]


def test_generation_ends_when_all_rows_have(model: Qwen3ForCausalLM) -> None:
    only = LogitsProcessorList([Only({int(row[0]): EOS for row in prompts()})])
    out = generate(model, logits_processor=only, eos_token_id=EOS)
    assert out.sequences.shape[1] == PROMPT + BLOCK
    assert len(out.steps_per_block) == 1


def test_stopping_criteria(model: Qwen3ForCausalLM) -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(PROMPT + BLOCK)])
    out = generate(model, max_new_tokens=5 * BLOCK, stopping_criteria=criteria)
    assert out.sequences.shape[1] == PROMPT + BLOCK


def test_streamer_gets_the_prompt_and_each_block(model: Qwen3ForCausalLM) -> None:
    streamer = Recorder()
    out = generate(model, prompts()[:1], streamer=streamer)
    assert [piece.shape[1] for piece in streamer.pieces] == [PROMPT, BLOCK, BLOCK]
    assert torch.equal(torch.cat(streamer.pieces, 1), out.sequences)
    assert streamer.ended


def test_seed_is_a_generator(model: Qwen3ForCausalLM) -> None:
    first, second = (generate(model, temperature=1.0, seed=seed).sequences for seed in (3, 4))
    again = generate(model, temperature=1.0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, again.sequences) and not torch.equal(first, second)
    with pytest.raises(ValueError, match="give seed or generator, not both"):
        generate(model, seed=3, generator=torch.Generator())


def test_any_of_several_ends_of_text(model: Qwen3ForCausalLM) -> None:
    """Row 0 can only say one of them, row 1 the other, row 2 neither."""
    ids = prompts()
    ids[:, 0] = torch.tensor([1, 2, 3])
    only = LogitsProcessorList([Only({1: EOS, 2: PAD, 3: 7})])
    out = generate(model, ids, logits_processor=only, eos_token_id=[EOS, PAD]).sequences
    assert (out[0, PROMPT:] == EOS).all()
    assert out[1, PROMPT] == PAD and (out[1, PROMPT + 1 :] == EOS).all()
    assert (out[2, PROMPT:] == 7).all()


def test_the_mask_token_is_never_decoded(model: Qwen3ForCausalLM) -> None:
    """Also where the model finds it likelier than all others."""

    class Likeliest(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, MASK] += 1e3
            return scores

    out = generate(model, logits_processor=LogitsProcessorList([Likeliest()])).sequences
    assert not (out == MASK).any()


def test_a_function_chooses(model: Qwen3ForCausalLM) -> None:
    """Right to left, two per step."""
    seen: list[int] = []

    def last_two(candidates: focus_compile.Candidates, where: Tensor) -> Tensor:
        assert candidates.tokens.shape == candidates.confidence.shape == where.shape
        assert bool((candidates.confidence[where] >= 0).all())
        seen.append(int(where.sum()))
        return where & (where.flip(1).cumsum(1).flip(1) <= 2)

    generate(model, max_new_tokens=BLOCK, remasking_strategy=last_two)
    assert seen == [BATCH * left for left in (6, 4, 2)]


@pytest.mark.parametrize("choose", [torch.zeros_like, torch.ones_like], ids=["none", "decoded"])
def test_a_function_must_choose_candidates(model: Qwen3ForCausalLM, choose: Any) -> None:
    def strategy(_: focus_compile.Candidates, where: Tensor) -> Tensor:
        first = where.cumsum(1) == 1
        return first if bool(where.all()) else choose(where)

    with pytest.raises(ValueError, match="expected some candidates, and no others"):
        generate(model, remasking_strategy=strategy)


@pytest.mark.parametrize("compiled", [False, True])
def test_eager_attention_gets_an_additive_mask(compiled: bool) -> None:
    """transformers adds what it is given to the scores; padding is hidden as with sdpa."""
    valid = torch.ones(BATCH, PROMPT, dtype=torch.int64)
    valid[0, :3] = 0
    made = []
    for attention in ("sdpa", "eager"):
        torch._dynamo.reset()
        model: Any = build_model(Sizes(layers=2), attention)
        if compiled:
            model = torch.compile(model, backend=strict, dynamic=True)
        with focus_compile.session(alpha=1e9):
            made.append(generate(model, attention_mask=valid).sequences)
    assert torch.equal(*made)


def strict(gm: GraphModule, inputs: Any) -> Any:
    return focus_backend(gm, inputs, options={"strict": True, **PAPER}, inner=eager_inner)
