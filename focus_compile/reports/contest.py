"""Dense against FOCUS on a model of the user's: speed, and how far the answers agree.

One compiled model decodes every prompt both ways, in one loop, greedily and at one threshold;
dense is the graph that plain Inductor runs. A first run of each compiles and is not timed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedTokenizerBase

from focus_compile.entry import compile as compile_model
from focus_compile.generation.generated import Generated
from focus_compile.generation.loop import generate
from focus_compile.generation.text import end_tokens, left_padded, prompt_ids
from focus_compile.models.load import BadInput
from focus_compile.runtime.session import session

__all__ = ["Plan", "Result", "Side", "contest", "read_prompts"]


@dataclass(frozen=True)
class Plan:
    """How both decode; ``rounds``: timed runs of each, in turns."""

    batch: int = 8
    block: int = 32
    max_new_tokens: int = 64
    threshold: float = 0.9
    alpha: float = 1.5
    rounds: int = 3


@dataclass(frozen=True)
class Side:
    """What one of the two did, all prompts together.

    Attributes:
        seconds: of each timed run; tokens: decoded in a run; forwards: denoising steps of a run,
            of which ``focus_steps`` ran FOCUS's programs.
        fed, retained: shares of the tokens that early and later layers computed.
    """

    seconds: tuple[float, ...]
    tokens: int
    forwards: int
    focus_steps: int
    fed: float
    retained: float

    @property
    def rate(self) -> float:
        """Tokens per second, the median run's."""
        return self.tokens / statistics.median(self.seconds)


@dataclass(frozen=True)
class Result:
    """The two sides, and how far their answers agree.

    ``same_answers``: share of prompts with the same answer; ``same_tokens``: share of the answers'
    tokens that are the same at the same place, to the end of the longer of the two.
    """

    plan: Plan
    prompts: int
    dense: Side
    focus: Side
    same_answers: float
    same_tokens: float

    @property
    def speedups(self) -> list[float]:
        """Tokens per second of FOCUS over those of dense, round by round."""
        more = self.focus.tokens / self.dense.tokens
        pairs = zip(self.dense.seconds, self.focus.seconds, strict=True)
        return [more * dense / focus for dense, focus in pairs]

    def to_dict(self) -> dict[str, Any]:
        speedups = self.speedups
        spread = {"min": min(speedups), "max": max(speedups)}
        sides = {
            name: asdict(side) | {"tokens_per_s": side.rate}
            for name, side in (("dense", self.dense), ("focus", self.focus))
        }
        return {
            "prompts": self.prompts,
            **asdict(self.plan),
            "threads": torch.get_num_threads(),
            **sides,
            "speedup": {"median": statistics.median(speedups)} | spread,
            "same_answers": self.same_answers,
            "same_tokens": self.same_tokens,
        }

    def __str__(self) -> str:
        found, plan = self.to_dict(), self.plan
        ratio = found["speedup"]
        lines = [
            f"{self.prompts} prompts, batches of {plan.batch}, block {plan.block}, threshold "
            f"{plan.threshold}, alpha {plan.alpha}, {found['threads']} threads, "
            f"{plan.rounds} rounds"
        ]
        lines += [
            f"{name}: {side.rate:.1f} tokens/s, {side.forwards} forwards; "
            f"fed {side.fed:.0%}, retained {side.retained:.0%}"
            for name, side in (("dense", self.dense), ("focus", self.focus))
        ]
        lines += [
            f"speed-up: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            f"same answers: {self.same_answers:.1%}; same tokens: {self.same_tokens:.1%}",
        ]
        ran_dense = self.focus.forwards - self.focus.focus_steps
        if ran_dense:
            lines.append(f"{ran_dense} of FOCUS's steps ran dense: see the warnings above")
        return "\n".join(lines)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line: its text, or, in a file that ends with ``.jsonl``, ``{"prompt": text}``.

    Raises:
        BadInput: the file cannot be read, a line is malformed, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} holds no prompts: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append(line.rstrip("\r"))
            continue
        try:
            found.append(json.loads(line)["prompt"])
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f'{path}:{number}: expected {{"prompt": text}}') from error
        if not isinstance(found[-1], str):
            raise BadInput(f'{path}:{number}: expected {{"prompt": text}}')
    if not found:
        raise BadInput(f"{path} holds no prompts: every line is blank")
    return found


def contest(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    mask_token_id: int,
    prompts: Sequence[str],
    plan: Plan,
    *,
    quiet: bool = False,
) -> Result:
    """Let a model decode prompts densely and with FOCUS, in turns; quiet: without a bar.

    Raises:
        ValueError: a prompt is empty, and the tokenizer has no token that begins a text.
    """
    compiled = compile_model(model, mask_token_id=mask_token_id, dynamic=True, strict=True)
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    parts = [order[at : at + plan.batch] for at in range(0, len(order), plan.batch)]
    rows = [prompt_ids(tokenizer, text) for text in prompts]
    batches = [left_padded([rows[at] for at in part]) for part in parts]
    ends = end_tokens(tokenizer, model)

    def run(enabled: bool, advance: Any) -> tuple[float, list[Generated]]:
        made, start = [], time.perf_counter()
        for ids, real in batches:
            with session(mask_token_id, alpha=plan.alpha, enabled=enabled):
                out = generate(
                    compiled,
                    ids,
                    real,
                    max_new_tokens=plan.max_new_tokens,
                    block_length=plan.block,
                    confidence_threshold=plan.threshold,
                    mask_token_id=mask_token_id,
                    eos_token_id=ends,
                    return_dict=True,
                )
            made.append(out)
            advance()
        return time.perf_counter() - start, made

    answers: dict[bool, list[Generated]] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as bar:
        total = 2 * (plan.rounds + 1) * len(batches)
        job = bar.add_task("compiling, then timing", total=total)
        for turn in range(plan.rounds + 1):
            for enabled in (False, True):
                spent, made = run(enabled, lambda: bar.advance(job))
                answers[enabled] = made
                if turn:
                    seconds[enabled].append(spent)
    pairs = [
        (_answer(one, ends), _answer(two, ends))
        for dense, focus, (ids, _) in zip(answers[False], answers[True], batches, strict=True)
        for one, two in zip(
            dense.sequences[:, ids.shape[1] :].tolist(),
            focus.sequences[:, ids.shape[1] :].tolist(),
            strict=True,
        )
    ]
    same = sum(one == two for left, right in pairs for one, two in zip(left, right, strict=False))
    return Result(
        plan,
        len(prompts),
        _side(seconds[False], answers[False]),
        _side(seconds[True], answers[True]),
        sum(one == two for one, two in pairs) / len(pairs),
        same / sum(max(len(one), len(two)) for one, two in pairs),
    )


def _answer(ids: list[int], ends: list[int]) -> list[int]:
    """An answer's tokens, its end of text with them."""
    places = [place for place, token in enumerate(ids) if token in ends]
    return ids[: places[0] + 1] if places else ids


def _side(seconds: list[float], made: list[Generated]) -> Side:
    forwards = sum(out.forwards for out in made)
    return Side(
        seconds=tuple(seconds),
        tokens=sum(out.decoded for out in made),
        forwards=forwards,
        focus_steps=sum(out.focus_steps for out in made),
        fed=_mean([(out.fed_fraction, _canvas(out)) for out in made]),
        retained=_mean([(out.retained_fraction, _canvas(out)) for out in made]),
    )


def _canvas(out: Generated) -> int:
    """Tokens of the canvas, over all forwards."""
    return out.decode_masks[0].numel() * out.forwards


def _mean(weighed: list[tuple[float, int]]) -> float:
    return sum(value * weight for value, weight in weighed) / sum(weight for _, weight in weighed)
