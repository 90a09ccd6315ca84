"""Sequences at the edges: equal to the oracle, or to the model where FOCUS is not applied."""

from __future__ import annotations

import itertools
import random
import zlib
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.edges import EDGE_SUBJECTS, PLACES, edge_subject, events_of, play_streams
from tests.fuzz.plan import Plan, plans
from tests.fuzz.play import attempt

SEQUENCES = {
    "part": 4,
    "scoring": 4,
    "default-fp64": 3,
    "break-0": 2,
    "break-4-bias": 2,
    "break-5": 2,
}
"""Few, for a suite that runs in minutes; the campaign plays all edges, and many of each."""


def played(name: str, sequences: int, start: int = 0) -> Counter[str]:
    """Counts of what happened in a subject's sequences."""
    tally: Counter[str] = Counter()
    dialect = edge_subject(name).dialect
    # a part of a model has no logits that would tell who is to be rescued
    one = plans(dialect, edges=False, events=events_of(name)).map(lambda p: replace(p, rescue=None))
    streams = name.startswith("streams")

    @seed(zlib.crc32(name.encode()) + start)
    @settings(
        max_examples=sequences, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(st.lists(one, min_size=2 if streams else 1, max_size=3 if streams else 1), st.integers())
    def holds(drawn: list[Plan], number: int) -> None:
        if not streams:
            return attempt(edge_subject(name), drawn[0], tally)
        first = drawn[0]
        alike = [
            replace(plan, named=True, delayed=first.delayed, stale=first.stale) for plan in drawn
        ]
        order = random.Random(number)
        turns = (order.randrange(210) for _ in itertools.count())
        tally["sequences"] += 1
        return play_streams(edge_subject(name), alike, turns, number % 3, tally)

    holds()
    return tally


@pytest.mark.parametrize("name", SEQUENCES)
def test_edges(name: str) -> None:
    tally = played(name, SEQUENCES[name])
    print(f"\n{name}: {dict(tally)}")
    assert tally["calls"] + tally["dense calls"] > 5
    if not name.startswith("break"):
        assert tally["fewer retained"] and tally["calls"] > 10


@pytest.mark.parametrize("place", PLACES[2:4])
def test_a_break_between_layers_is_refused(place: int) -> None:
    """What follows it would take rows of evicted tokens, which are zeros, for theirs."""
    tally = played(f"break-{place}", 2, 1)
    assert tally["dense calls"] and not tally["calls"]


@pytest.mark.parametrize("name", ["streams"])
def test_streams(name: str) -> None:
    tally = played(name, 4)
    print(f"\n{name}: {dict(tally)}")
    assert tally["calls"] > 20 and tally["fewer retained"] > 5
    assert tally["turns in threads"] > 5


def test_all_edges_are_played_in_a_campaign() -> None:
    assert {*SEQUENCES} < {*EDGE_SUBJECTS}
