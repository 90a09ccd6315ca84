"""Three text tasks whose answers can be checked exactly: `total`, `chain`, `order`.

A generator draws a prompt; `solve` computes the answer from the prompt text alone, so the judge
never depends on what the generator meant.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase

MAX_PROMPT = 66  # tokens of the longest prompt that the generators make
MAX_ANSWER = 96  # three blocks of 32, EOS included
CHAIN_HOPS = {1: 20, 2: 10, 3: 6}  # paths in one prompt -> most hops of each


@dataclass(frozen=True)
class Example:
    """One prompt and its only right answer, without EOS."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A generator (its size runs from 0, short, to 1, long) and a judge."""

    name: str
    kind: str
    draw: Callable[[random.Random, float], str]
    solve: Callable[[str], str]

    def example(self, rng: random.Random, size: float) -> Example:
        prompt = self.draw(rng, size)
        return Example(self.name, prompt, self.solve(prompt))


def _between(low: int, high: int, size: float) -> int:
    return low + round((high - low) * min(1.0, max(0.0, size)))


def _body(prompt: str, name: str) -> str:
    head, tail = f"{name}:", "="
    if not (prompt.startswith(head) and prompt.endswith(tail)):
        raise ValueError(f"a {name} prompt reads '{head}...{tail}', got {prompt!r}")
    return prompt[len(head) : -len(tail)]


def _draw_total(rng: random.Random, size: float) -> str:
    labels = ascii_lowercase[: _between(4, 26, size)]
    return "total:" + "".join(f"{label}{rng.randrange(10)}" for label in labels) + "="


def _solve_total(prompt: str) -> str:
    body, total, answer = _body(prompt, "total"), 0, []
    for label, digit in zip(body[::2], body[1::2], strict=True):
        total = (total + int(digit)) % 10
        answer.append(f"{label}{digit}{total}")
    return "".join(answer)


def _draw_chain(rng: random.Random, size: float) -> str:
    count = rng.choice(sorted(CHAIN_HOPS))
    hops = _between(2, CHAIN_HOPS[count], size)
    nodes = rng.sample(ascii_lowercase, count * (hops + 1))
    paths = [nodes[c * (hops + 1) : (c + 1) * (hops + 1)] for c in range(count)]
    pairs = [f"{a}{b};" for path in paths for a, b in pairwise(path)]
    rng.shuffle(pairs)
    return "chain:" + ";".join(path[0] for path in paths) + "|" + "".join(pairs) + "="


def _solve_chain(prompt: str) -> str:
    starts, _, table = _body(prompt, "chain").partition("|")
    step = {table[i]: table[i + 1] for i in range(0, len(table), 3)}
    paths = []
    for symbol in starts.split(";"):
        path = [symbol]
        while path[-1] in step:
            path.append(step[path[-1]])
        paths.append("".join(path) + ";")
    return "".join(paths)


def _draw_order(rng: random.Random, size: float) -> str:
    labels = list(ascii_lowercase[: _between(3, 20, size)])
    rng.shuffle(labels)
    return "order:" + "".join(f"{label}{rng.randrange(100):02d}" for label in labels) + "="


def _solve_order(prompt: str) -> str:
    body = _body(prompt, "order")
    return "".join(sorted(body[i : i + 3] for i in range(0, len(body), 3)))


TASKS: tuple[Task, ...] = (
    Task(
        "total", "sequential: each digit is the running total modulo 10", _draw_total, _solve_total
    ),
    Task("chain", "mixed: one to three independent look-up chains", _draw_chain, _solve_chain),
    Task(
        "order", "mostly parallel: records put into the order of labels", _draw_order, _solve_order
    ),
)
TASK_BY_NAME = {task.name: task for task in TASKS}


def examples(task: str, count: int, seed: int) -> list[Example]:
    """`count` examples of all sizes, the same for the same seed."""
    rng = random.Random(f"{task}/{seed}")
    return [TASK_BY_NAME[task].example(rng, rng.random()) for _ in range(count)]
