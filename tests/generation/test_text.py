"""Prompts, ends and answers: the same for the command line, evaluations and examples."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

import focus_compile
from focus_compile import lm_eval
from focus_compile.generation.text import StopStrings, answers, end_tokens, left_padded, prompt_ids
from tests.support.paths import EXAMPLES
from tests.support.words import BOS, END, EOS, MASK, SOP, Saying, characters


def model(config: Any, generation: Any = None) -> Any:
    made = Saying([EOS])
    made.config.eos_token_id = config
    if generation is not None:
        made.generation_config = SimpleNamespace(eos_token_id=generation)
    return made


@pytest.mark.parametrize(
    ("own", "config", "generation", "expected"),
    [
        ("[E]", None, None, [EOS]),
        ("[E]", END, None, [EOS, END]),
        ("[E]", 9, [END, EOS], [EOS, END]),
        (None, 9, torch.tensor([END]), [END]),
        (None, (END, BOS), None, [END, BOS]),
        (None, -1, None, []),
        (None, None, None, []),
    ],
)
def test_ends_of_text(own: Any, config: Any, generation: Any, expected: list[int]) -> None:
    """The tokenizer's, then those of generation_config, or else those of the config."""
    assert end_tokens(characters(eos_token=own), model(config, generation)) == expected


@pytest.mark.parametrize(
    ("before", "text", "expected"),
    [
        ("", "a", ["a"]),
        ("[B]", "a", ["[B]", "a"]),
        ("[B]", "[B]a", ["[B]", "a"]),
        ("[B]", "[B]", ["[B]"]),
        ("[B]", "a[B]", ["[B]", "a", "[B]"]),
        ("[B] <sop>", "[B]<sop>a", ["[B]", "<sop>", "a"]),
        ("[B] <sop>", "<sop>a", ["[B]", "<sop>", "<sop>", "a"]),
        ("", "", ["[E]"]),
        ("[B]", "", ["[B]"]),
        ("", "a[M]b", ["a", "[M]", "b"]),
    ],
)
def test_a_beginning_comes_once(before: str, text: str, expected: list[str]) -> None:
    words = characters(before)
    assert words.convert_ids_to_tokens(prompt_ids(words, text)) == expected


def test_prompts_that_are_no_text() -> None:
    with pytest.raises(ValueError, match="an empty prompt: this tokenizer has no token that"):
        prompt_ids(characters(eos_token=None), "")
    assert prompt_ids(characters(eos_token=None, bos_token="<sop>"), "") == [SOP]
    with pytest.raises(ValueError, match="surrogates not allowed"):
        prompt_ids(characters(), "a\ud83d")


def test_padding_needs_no_token() -> None:
    ids, real = left_padded([[7, 8, 9], [5]])
    assert ids[0].tolist() == [7, 8, 9] and ids[1, 2] == 5
    assert real.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("said", "stops", "count", "text"),
    [
        ("42<|end|>and", ["<|end|>"], 3, "42"),
        ("42\nand", "\n", 3, "42"),
        ("4:2.and:", ["d:", "2."], 4, "4:"),
        ("42\n<|end|>", ["\n<|end|>", ""], 4, "42"),
        ("4[U]2.", ["."], 4, "42"),
        ("42<|end|>", ["end|>"], 3, "42"),
        ("42", ["x"], None, "42"),
    ],
)
def test_stop_strings(said: str, stops: Any, count: int | None, text: str) -> None:
    """How many tokens are kept, and the text before the string; special tokens are not told."""
    words = characters()
    ids = words(said)["input_ids"]
    found = StopStrings(words, stops)
    assert (found.length(ids), found.before(ids)) == (count, text)
    assert answers(words, torch.tensor([ids]), stops) == [text]
    with pytest.raises(ValueError, match="looked for in an answer's text: give tokenizer, too"):
        StopStrings(None, stops)


def evaluated(
    words: Any, stub: Saying, contexts: list[str], until: list[str], **more: Any
) -> list[str]:
    """The evaluation's answers, of a model that is not compiled."""
    lm = lm_eval.FocusLM(
        stub, words, focus=False, block_length=4, use_cache=False, batch_size=4, **more
    )
    lm.model = stub
    return lm.generate_until(
        [
            Instance("generate_until", {}, (text, {"until": until, "max_gen_toks": 12}), number)
            for number, text in enumerate(contexts)
        ],
        disable_tqdm=True,
    )


@pytest.fixture(scope="module")
def offline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline_example", EXAMPLES / "offline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["offline_example"] = module
    spec.loader.exec_module(module)
    return module


def test_all_callers_end_alike(offline: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end that only generation_config names, in the second block."""
    words = characters()
    said = words("what:42<|end|>more")["input_ids"]

    def stub() -> Saying:
        made = Saying(said)
        made.generation_config = SimpleNamespace(eos_token_id=[EOS, END])  # type: ignore[assignment]
        return made

    assert evaluated(words, stub(), ["a?"], ["nothing"]) == ["what:42"]
    worker = offline.Worker.__new__(offline.Worker)
    worker.options = offline.Options("m", 4, 12, 4, 0.9, 1.5, True)
    worker.device, worker.tokenizer, worker.mask = "cpu", words, MASK
    worker.compiled = stub()
    without = focus_compile.generate
    monkeypatch.setattr(
        focus_compile, "generate", lambda *a, **k: without(*a, use_cache=False, **k)
    )
    assert worker(["a?"]) == [{"answer": "what:42", "tokens": 7}]


def test_evaluations() -> None:
    """Special tokens and strings over a block's edge end an answer; a beginning comes once."""
    words = characters("[B]", bos_token="[B]")
    stub = Saying(words("42.", add_special_tokens=False)["input_ids"])
    assert evaluated(words, stub, ["[B]a?"], ["2.4"]) == ["4"]
    assert stub.seen[0][0].tolist()[: stub.prompt] == prompt_ids(words, "a?")
    assert len({tuple(seen.shape) for seen in stub.seen}) == 1
    plain = characters(pad_token=None, eos_token=None)
    said = [plain("7<|end|>8")["input_ids"], plain("6[U]5")["input_ids"]]
    stub = Saying(*said)
    lm = lm_eval.FocusLM(stub, plain, focus=False, block_length=4, use_cache=False)
    with pytest.raises(ValueError, match="the tokenizer nor the model names an end of text"):
        _ = lm.eot_token_id
    assert evaluated(plain, stub, ["b?", "a?"], ["<|end|>", "65"]) == ["", "7"]
    assert lm.tok_encode("a") == plain("a")["input_ids"]


@pytest.mark.parametrize("name", ["trust_remote_code", "think_end_token", "temprature"])
def test_unknown_model_args(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown model_args: {name}; a checkpoint that"):
        lm_eval.FocusLM("nowhere", **{name: True})
