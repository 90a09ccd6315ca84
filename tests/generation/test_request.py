"""The arguments of a generation in their many forms, and rows that end inside a block."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers import StopStringCriteria as TransformersStopStrings
from transformers.generation.streamers import TextStreamer

import focus_compile
from tests.support.harness import MASK as HARNESS_MASK
from tests.support.harness import VOCAB, Sizes, build_model
from tests.support.words import END, EOS, MASK, PAD, Saying, characters

PROMPT, BLOCK, NEW = 3, 4, 12
IDS = torch.tensor([[7, 8, 9], [10, 11, 12]])
SAID = ([13, 14, 15, 16, 17, 18, 19, 20, EOS, 22, 23, 24], [33, 34, 35, 36, 37, 38])


def generate(model: Any = None, ids: Any = IDS, **given: Any) -> Any:
    arguments = {"max_new_tokens": NEW, "block_length": BLOCK, "mask_token_id": MASK}
    arguments |= {"use_cache": False, "return_dict": True} | given
    return focus_compile.generate(model or Saying(*SAID), ids, **arguments)


KINDS = {
    "int": lambda value: value,
    "numpy": numpy.int64,
    "0-d": torch.tensor,
    "one": lambda value: torch.tensor([value]),
    "list": lambda value: [value],
    "array": lambda value: numpy.array([value]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_any_kind(kind: str) -> None:
    make: Any = KINDS[kind]
    made = generate(eos_token_id=make(15), pad_token_id=make(PAD), mask_token_id=make(MASK))
    expected = [13, 14, 15] + [PAD] * 9
    assert made.sequences[0, PROMPT:].tolist() == expected
    assert made.sequences[1, PROMPT:].tolist() == SAID[1] * 2


@pytest.mark.parametrize(
    "ends", [(15, 34), numpy.array([34, 15]), torch.tensor([15, 34]), {15, 34}]
)
def test_several_ends(ends: Any) -> None:
    made = generate(eos_token_id=ends, pad_token_id=PAD)
    assert (made.sequences != PAD).sum(1).tolist() == [PROMPT + 3, PROMPT + 2]
    assert made.sequences.shape[1] == PROMPT + BLOCK


def test_no_ends_and_no_padding() -> None:
    """None and -1 stand for none, as in configs."""
    for none in (None, -1, [], [-1]):
        made = generate(eos_token_id=none, pad_token_id=-1)
        assert made.sequences[1, PROMPT:].tolist() == SAID[1] * 2


@pytest.mark.parametrize("make", [list, numpy.array], ids=["lists", "numpy"])
def test_prompts_of_any_kind(make: Any) -> None:
    ids, valid = IDS.tolist(), torch.ones_like(IDS).tolist()
    made = generate(ids=make(ids), attention_mask=make(valid))
    assert torch.equal(made.sequences[:, :PROMPT], IDS)
    numbers = {"max_new_tokens": numpy.int32(NEW), "block_length": torch.tensor(BLOCK)}
    again = generate(ids=IDS.int(), attention_mask=torch.tensor(valid).bool(), **numbers)
    assert again.sequences.dtype == torch.int64
    assert torch.equal(made.sequences, again.sequences)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"eos_token_id": "[E]"}, r"eos_token_id='\[E\]': expected an id or a list of ids"),
        ({"eos_token_id": 1.5}, "eos_token_id=1.5: expected an id or a list"),
        ({"eos_token_id": [1, None]}, "expected an id or a list of ids"),
        ({"pad_token_id": True}, "pad_token_id=True: expected an id or a list"),
        ({"mask_token_id": [1, 2]}, r"mask_token_id=\[1, 2\]: expected one id"),
        ({"mask_token_id": None}, "mask_token_id=None: expected one id"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5, block_length=4: expected at least 1"),
        ({"temperature": "hot"}, "temperature='hot': expected a number"),
        ({"temperature": float("nan")}, "temperature=nan: expected a number >= 0"),
        ({"top_k": 2.5}, "top_k=2.5: expected a whole number from -1 on"),
        ({"top_k": -2}, "top_k=-2: expected a whole number from -1 on"),
        ({"top_p": 1.5}, "top_p=1.5: expected a number from 0 to 1"),
        ({"stopping_criteria": [3]}, r"stopping_criteria=\[3\]: expected functions of"),
        ({"stop_strings": "x"}, "answer's text: give tokenizer, too"),
        ({"ids": [[1, 2], [3]]}, r"input_ids: expected a tensor \[batch, prompt\], got"),
        ({"ids": IDS.float()}, "input_ids has dtype torch.float32: expected ids"),
    ],
)
def test_refused_before_the_first_forward(given: dict[str, Any], told: str) -> None:
    model = Saying(*SAID)
    with pytest.raises(ValueError, match=told):
        generate(model, **given)
    assert not model.seen


def test_ids_that_the_model_does_not_have() -> None:
    """Another model's mask token, or another tokenizer's ids, are named before the first call."""
    model = build_model(Sizes(layers=2))
    arguments: dict[str, Any] = {"max_new_tokens": 2, "block_length": 2}
    told = f"mask_token_id=151669: the model's embedding has {VOCAB} rows"
    with pytest.raises(ValueError, match=told):
        focus_compile.generate(model, IDS, mask_token_id=151669, **arguments)
    for wrong in (VOCAB, -1):
        with pytest.raises(ValueError, match=f"input_ids holds {wrong}: the model has {VOCAB}"):
            focus_compile.generate(
                model, torch.tensor([[1, wrong]]), mask_token_id=HARNESS_MASK, **arguments
            )


@pytest.mark.parametrize(
    "off", [{"top_k": 0}, {"top_k": -1}, {"top_p": 1.0}, {"top_k": numpy.int64(0), "top_p": 1}]
)
def test_off(off: dict[str, Any]) -> None:
    class Undecided(Saying):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            generator = torch.Generator().manual_seed(len(self.seen))
            self.seen.append(input_ids)
            return SimpleNamespace(logits=torch.randn(*input_ids.shape, 64, generator=generator))

    sampled = {"temperature": 1.0, "seed": 3}
    plain, same = generate(Undecided(), **sampled), generate(Undecided(), **sampled, **off)
    assert torch.equal(plain.sequences, same.sequences)
    narrow = generate(Undecided(), **sampled, top_k=torch.tensor(2))
    assert not torch.equal(plain.sequences, narrow.sequences)


def second_is(token: int) -> Any:
    """A criterion that looks at the last token only, as many do."""
    return lambda ids, scores, **_: ids[:, -1] == token


@pytest.mark.parametrize("several", [list, tuple, StoppingCriteriaList, lambda one: one[0]])
def test_criteria_end_rows_inside_a_block(several: Any) -> None:
    """One or several; each sees every token as if tokens had come one by one."""
    made = generate(stopping_criteria=several([second_is(18)]), pad_token_id=PAD)
    assert made.sequences[0, PROMPT:].tolist() == [*SAID[0][:6], *[PAD] * 6]
    assert made.sequences[1, PROMPT:].tolist() == SAID[1] * 2
    assert [int(steps[0]) > 0 for steps in made.steps_per_block] == [True, True, False]


def test_criteria_of_transformers() -> None:
    """Their own, and a class of mine that answers with one bool for all rows."""

    class Long(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= PROMPT + 7

    for criterion in (MaxLengthCriteria(PROMPT + 7), Long()):
        made = generate(stopping_criteria=criterion, pad_token_id=PAD)
        assert (made.sequences != PAD).sum(1).tolist() == [PROMPT + 7] * 2
    words = characters()
    said = words("4.2:and more")["input_ids"]
    theirs = TransformersStopStrings(words, [":a"])
    made = [
        generate(Saying(said, said), **more, pad_token_id=PAD).sequences
        for more in (
            {"stopping_criteria": theirs},
            {"stop_strings": ":a", "tokenizer": words},
            {"stop_strings": ["x", ":a"], "tokenizer": words},
        )
    ]
    assert words.decode(made[0][0, PROMPT:], skip_special_tokens=True) == "4.2:a"
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_the_first_end_counts() -> None:
    """An end of text, a string and a criterion in one row, the string first."""
    words = characters()
    said = [words("ab:c[E]d")["input_ids"], words("ab<|end|>")["input_ids"]]
    made = generate(
        Saying(*said),
        eos_token_id=EOS,
        stop_strings=[":", "<|end|>"],
        tokenizer=words,
        stopping_criteria=second_is(words("d")["input_ids"][0]),
    ).sequences[:, PROMPT:]
    assert made.shape[1] == BLOCK
    assert words.decode(made[0]) == "ab:[E]" and made[1, 2] == END
    late = generate(Saying(*said), eos_token_id=EOS, eos_early_stop=False).sequences
    assert late.shape[1] == PROMPT + NEW and words.decode(late[0, PROMPT:]).startswith("ab:c[E][E]")


def test_streamers_get_nothing_behind_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' own prints one end of text; of several rows, the longest counts."""
    words = characters()
    said = words("what:42[E]more")["input_ids"]
    streamer = TextStreamer(words, skip_prompt=True)
    generate(Saying(said), IDS[:1], eos_token_id=EOS, streamer=streamer)
    assert capsys.readouterr().out == "what:42[E]\n"

    class Pieces:
        def __init__(self) -> None:
            self.sizes: list[int] = []

        def put(self, value: Tensor) -> None:
            self.sizes.append(value.shape[1])

        def end(self) -> None:
            self.sizes.append(0)

    pieces = Pieces()
    generate(Saying(said, words("a[E]")["input_ids"]), eos_token_id=EOS, streamer=pieces)
    assert pieces.sizes == [PROMPT, 4, 4, 0]
