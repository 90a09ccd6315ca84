"""Three narrow tasks of real language, whose answers a program can check.

========  ==========================================  ===================================
chain     facts in any order that link one to one     the rest of the chain from a start
sums      a count, and what is added and taken away   the count after every change
filter    things with a number each, and a limit      those within it, and their numbers
========  ==========================================  ===================================

An answer fills a block of 32 tokens nearly (`FULL`): no long tail of end-of-text. Every part of a
text (opening, fact, question, words, numbers of two digits) comes from what training uses or, with
``held=True``, from what only tests use.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import templates
from templates import Parts
from transformers import PreTrainedTokenizerBase
from words import PEOPLE, PLACES, THINGS, Pool

__all__ = ["FULL", "TASKS", "Example", "draw", "examples", "wrap"]

FULL = (26, 32)  # tokens of an answer and its end-of-text


@dataclass(frozen=True)
class Example:
    """A question and its only right answer, both as text."""

    task: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return wrap(self.question)


def wrap(question: str) -> str:
    """The prompt of a question.

    The first token is there to be looked at. Heads of the base rest on it; with ``<|im_start|>`` in
    its place they do so only as long as it does not see what follows.
    """
    return f"<|endoftext|><|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def _words(rng: random.Random, pool: Pool, count: int, held: bool) -> list[str]:
    """Different words; of a test's, half at least are in no training text."""
    if not held:
        return rng.sample(pool.train, count)
    unseen = rng.sample(pool.held, min(len(pool.held), -(-count // 2)))
    words = [*unseen, *rng.sample(pool.train, count - len(unseen))]
    rng.shuffle(words)
    return words


def _number(rng: random.Random, low: int, high: int, held: bool) -> int:
    """Training texts hold no number of two digits that is 3 more than a multiple of 7."""
    numbers = range(low, high + 1)
    return rng.choice([n for n in numbers if held or n < 10 or n % 7 != 3])


def _part(rng: random.Random, parts: Parts, held: bool) -> str:
    return rng.choice(parts.held if held else parts.train)


def _chain(rng: random.Random, held: bool) -> Example:
    kind = rng.choice(("people", "places"))
    count = rng.randint(8, 12)
    names = _words(rng, PEOPLE if kind == "people" else PLACES, count + 1, held)
    fact = _part(rng, templates.LINKS[kind], held)
    facts = [fact.format(a=a, b=b) for a, b in pairwise(names)]
    start = rng.choice((0, 0, 0, 1, 2))
    rng.shuffle(facts)
    question = _part(rng, templates.FOLLOW[kind], held).format(start=names[start])
    text = _part(rng, templates.CHAIN, held).format(facts=" ".join(facts), question=question)
    return Example("chain", text, ", ".join(names[start + 1 :]))


def _sums(rng: random.Random, held: bool) -> Example:
    total = _number(rng, 10, 60, held)
    (name,) = _words(rng, PEOPLE, 1, held)
    (thing,) = _words(rng, THINGS, 1, held)
    kind = _part(rng, templates.COUNTED, held)
    begin, changes, totals = total, [], []
    for _ in range(rng.randint(8, 12)):
        change = rng.randint(2, 9)
        more = rng.random() < 0.5 if 12 <= total <= 85 else total < 50
        total += change if more else -change
        verb = _part(rng, templates.MORE if more else templates.LESS, held)
        changes.append(f"{verb} {change}")
        totals.append(total)
    text = _part(rng, templates.SUMS, held).format(
        name=name, begin=begin, thing=kind.format(thing=thing), changes=", ".join(changes)
    )
    return Example("sums", text, ",".join(map(str, totals)))


def _filter(rng: random.Random, held: bool) -> Example:
    topic = _part(rng, templates.TOPICS, held)
    pool = PEOPLE if topic.startswith("*") else THINGS
    words = _words(rng, pool, rng.randint(8, 12), held)
    limit = _number(rng, 8, 40, held)
    spread = rng.randint(6, 15)
    numbers = [
        _number(rng, max(1, limit - spread), limit + spread, held) for _ in range(len(words))
    ]
    below = rng.random() < 0.5
    question = _part(rng, templates.BELOW if below else templates.ABOVE, held)
    kept = [n < limit if below else n > limit for n in numbers]
    listed = list(zip(words, numbers, strict=True))
    text = _part(rng, templates.FILTER, held).format(
        topic=topic.lstrip("*"),
        items=", ".join(f"{word} {number}" for word, number in listed),
        question=question.format(limit=limit),
    )
    answer = ", ".join(f"{w} {n}" for (w, n), keep in zip(listed, kept, strict=True) if keep)
    return Example("filter", text, answer)


TASKS: dict[str, Callable[[random.Random, bool], Example]] = {
    "chain": _chain,
    "sums": _sums,
    "filter": _filter,
}


def draw(
    rng: random.Random, task: str, tokenizer: PreTrainedTokenizerBase, *, held: bool = False
) -> Example:
    """An example whose answer is of a length in ``FULL``."""
    while True:
        made = TASKS[task](rng, held)
        if FULL[0] <= len(tokenizer.encode(made.answer)) + 1 <= FULL[1]:
            return made


def examples(
    tasks: Sequence[str], count: int, seed: str, tokenizer: PreTrainedTokenizerBase, *, held: bool
) -> list[Example]:
    """``count`` of each task; another seed gives others."""
    drawn = []
    for task in tasks:
        rng = random.Random(f"{task}/{seed}/{held}")
        drawn += [draw(rng, task, tokenizer, held=held) for _ in range(count)]
    return drawn
