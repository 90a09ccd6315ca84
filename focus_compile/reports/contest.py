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

from focus_compile.compiling import shown
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
        token_ratio = self.focus.tokens / self.dense.tokens
        pairs = zip(self.dense.seconds, self.focus.seconds, strict=True)
        return [token_ratio * dense / focus for dense, focus in pairs]

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
        data, plan = self.to_dict(), self.plan
        ratio = data["speedup"]
        lines = [
            f"{self.prompts} prompts, batches of {plan.batch}, block {plan.block}, threshold "
            f"{plan.threshold}, alpha {plan.alpha}, {data['threads']} threads, "
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
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line.rstrip("\r"))
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f'{path}:{number}: expected {{"prompt": text}}') from error
        if not isinstance(prompts[-1], str):
            raise BadInput(f'{path}:{number}: expected {{"prompt": text}}')
    if not prompts:
        raise BadInput(f"{path} holds no prompts: every line is blank")
    return prompts


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
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    groups = [order[index : index + plan.batch] for index in range(0, len(order), plan.batch)]
    rows = [prompt_ids(tokenizer, text) for text in prompts]
    batches = [left_padded([rows[index] for index in group]) for group in groups]
    end_ids = end_tokens(tokenizer, model)

    def run(enabled: bool, advance: Any) -> tuple[float, list[Generated]]:
        generated, start = [], time.perf_counter()
        for ids, attention_mask in batches:
            with session(mask_token_id, alpha=plan.alpha, enabled=enabled):
                answer = generate(
                    compiled,
                    ids,
                    attention_mask,
                    max_new_tokens=plan.max_new_tokens,
                    block_length=plan.block,
                    confidence_threshold=plan.threshold,
                    mask_token_id=mask_token_id,
                    eos_token_id=end_ids,
                    return_dict=True,
                )
            generated.append(answer)
            advance()
        return time.perf_counter() - start, generated

    answers: dict[bool, list[Generated]] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    total = 2 * (plan.rounds + 1) * len(batches)
    with (
        Progress(console=Console(stderr=True), transient=True, disable=quiet) as bar,
        shown(bar, job := bar.add_task("compiling, then timing", total=total)),
    ):
        for turn in range(plan.rounds + 1):
            for enabled in (False, True):
                spent, generated = run(enabled, lambda: bar.advance(job))
                answers[enabled] = generated
                if turn:
                    seconds[enabled].append(spent)
    pairs = [
        (_up_to_end(dense_ids, end_ids), _up_to_end(focus_ids, end_ids))
        for dense, focus, (ids, _) in zip(answers[False], answers[True], batches, strict=True)
        for dense_ids, focus_ids in zip(
            dense.sequences[:, ids.shape[1] :].tolist(),
            focus.sequences[:, ids.shape[1] :].tolist(),
            strict=True,
        )
    ]
    same_answers = sum(dense_ids == focus_ids for dense_ids, focus_ids in pairs)
    same_tokens = sum(
        dense_token == focus_token
        for dense_ids, focus_ids in pairs
        for dense_token, focus_token in zip(dense_ids, focus_ids, strict=False)
    )
    return Result(
        plan,
        len(prompts),
        _side(seconds[False], answers[False]),
        _side(seconds[True], answers[True]),
        same_answers / len(pairs),
        same_tokens / sum(max(map(len, pair)) for pair in pairs),
    )


def _up_to_end(ids: list[int], end_ids: list[int]) -> list[int]:
    """An answer's tokens, its end of text with them."""
    end_positions = [position for position, token in enumerate(ids) if token in end_ids]
    return ids[: end_positions[0] + 1] if end_positions else ids


def _side(seconds: list[float], generated: list[Generated]) -> Side:
    forwards = sum(answer.forwards for answer in generated)
    return Side(
        seconds=tuple(seconds),
        tokens=sum(answer.decoded for answer in generated),
        forwards=forwards,
        focus_steps=sum(answer.focus_steps for answer in generated),
        fed=_mean([(answer.fed_fraction, _canvas_tokens(answer)) for answer in generated]),
        retained=_mean(
            [(answer.retained_fraction, _canvas_tokens(answer)) for answer in generated]
        ),
    )


def _canvas_tokens(answer: Generated) -> int:
    """Tokens of the canvas, over all forwards."""
    return answer.decode_masks[0].numel() * answer.forwards


def _mean(weighed: list[tuple[float, int]]) -> float:
    return sum(value * weight for value, weight in weighed) / sum(weight for _, weight in weighed)
