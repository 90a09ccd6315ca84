"""Three text tasks whose answers can be checked exactly: `total`, `chain`, `order`.

A generator draws a prompt; `solve` computes the answer from the prompt text alone, so the judge
never depends on what the generator meant.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase, digits

MAX_PROMPT = 112  # tokens of the longest prompt that the generators make
MAX_ANSWER = 96  # three blocks of 32, EOS included
SYMBOLS = ascii_lowercase + digits


@dataclass(frozen=True)
class Example:
    """One prompt and its only right answer, without EOS."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A generator and a judge.

    Sizes run from 0, short, to 1, long; the easier ones below, down to -1, are for training only.
    """

    name: str
    kind: str
    draw: Callable[[random.Random, float], str]
    solve: Callable[[str], str]

    def example(self, rng: random.Random, size: float) -> Example:
        prompt = self.draw(rng, size)
        return Example(self.name, prompt, self.solve(prompt))


def _between(low: int, high: int, size: float) -> int:
    return low + round((high - low) * min(1.0, size))


def _body(prompt: str, name: str) -> str:
    head, tail = f"{name}:", "="
    if not (prompt.startswith(head) and prompt.endswith(tail)):
        raise ValueError(f"a {name} prompt reads '{head}...{tail}', got {prompt!r}")
    return prompt[len(head) : -len(tail)]


def _draw_total(rng: random.Random, size: float) -> str:
    count, top = (
        (_between(4, 26, size), 10) if size >= 0 else (rng.randint(4, 12), 10 + round(8 * size))
    )
    return "total:" + "".join(f"{a}{rng.randrange(top)}" for a in ascii_lowercase[:count]) + "="


def _solve_total(prompt: str) -> str:
    body, total, answer = _body(prompt, "total"), 0, []
    for label, digit in zip(body[::2], body[1::2], strict=True):
        total = (total + int(digit)) % 10
        answer.append(f"{label}{digit}{total}")
    return "".join(answer)


def _draw_chain(rng: random.Random, size: float) -> str:
    """A path to follow, of at least half of the symbols; the other symbols stand in cycles.

    There is one pair fewer than symbols whatever the path's length, so that where the answer ends
    is known only there. From size 0 on, no position of the first block is EOS in more than 90 % of
    the prompts.
    """
    count = max(4, _between(34, 36, size) if size >= 0 else 34 + round(30 * size))
    nodes = rng.sample(SYMBOLS, count)
    length = rng.randint(count // 2, count)
    pairs, rest = list(pairwise(nodes[:length])), nodes[length:]
    while rest:
        cycle = rest[: rng.randint(2, 12)]
        pairs += pairwise([*cycle, cycle[0]])
        rest = rest[len(cycle) :]
    rng.shuffle(pairs)
    return f"chain:{nodes[0]}|" + "".join(f"{a}{b};" for a, b in pairs) + "="


def _solve_chain(prompt: str) -> str:
    symbol, _, table = _body(prompt, "chain").partition("|")
    step = {table[i]: table[i + 1] for i in range(0, len(table), 3)}
    path = [symbol]
    while path[-1] in step:
        path.append(step[path[-1]])
    return "".join(path)


def _draw_order(rng: random.Random, size: float) -> str:
    labels = list(ascii_lowercase[: _between(3, 20, max(0.0, size))])
    rng.shuffle(labels)
    return "order:" + "".join(f"{label}{rng.randrange(100):02d}" for label in labels) + "="


def _solve_order(prompt: str) -> str:
    body = _body(prompt, "order")
    return "".join(sorted(body[i : i + 3] for i in range(0, len(body), 3)))


TASKS: tuple[Task, ...] = (
    Task(
        "total",
        "mixed: labels and digits are copied, each total modulo 10 needs the one before",
        _draw_total,
        _solve_total,
    ),
    Task(
        "chain",
        "sequential: one look-up path, each symbol needs the one before",
        _draw_chain,
        _solve_chain,
    ),
    Task(
        "order", "mostly parallel: records put into the order of labels", _draw_order, _solve_order
    ),
)
TASK_BY_NAME = {task.name: task for task in TASKS}


def examples(task: str, count: int, seed: int) -> list[Example]:
    """`count` examples of all sizes, the same for the same seed."""
    rng = random.Random(f"{task}/{seed}")
    return [TASK_BY_NAME[task].example(rng, rng.random()) for _ in range(count)]
