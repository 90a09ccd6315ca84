"""Random sequences of calls, each held against the eager FOCUS of tests/reference, step by step."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.oracle import quick_importance
from tests.fuzz.plan import EVENTS, Plan, plans
from tests.fuzz.play import attempt
from tests.fuzz.subjects import EDGES, FIXED, SUBJECTS, subject
from tests.reference import algorithm

PER_SUBJECT = 20
WITH_SINGLE = (*EDGES, *FIXED)
"""Those that get calls of one token too: Dynamo captures each model anew for them."""
NOT_SINGLE = tuple(event for event in EVENTS if event != "single")


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """Counts over all subjects; each kind of event and of error must have happened."""
    tally: Counter[str] = Counter()
    yield tally
    print(f"\n{dict(tally)}")
    if tally["subjects"] == len(SUBJECTS):
        assert not [name for name in EVENTS if not tally[name]]
        seen = (
            "EvictedTokenDecoded",
            "Accident",
            "nothing evicted",
            "rescued",
        )
        for name in seen:
            assert tally[name] > 10
        assert tally["fewer fed"] > tally["calls"] / 10  # 14 % of the long campaign's
        assert tally["fewer retained"] > tally["calls"] / 5  # 45 %
        assert tally["ties"] < tally["calls"] / 100


@pytest.mark.parametrize("name", SUBJECTS)
def test_sequences_equal_the_emulation(
    name: str, tally: Counter[str], pytestconfig: pytest.Config
) -> None:
    wanted = pytestconfig.getoption("--fuzz")
    events = EVENTS if wanted or name in WITH_SINGLE else NOT_SINGLE
    chosen = settings(
        max_examples=PER_SUBJECT if wanted is None else -(-wanted // len(SUBJECTS)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    @(seed(zlib.crc32(name.encode())) if wanted is None else lambda test: test)
    @chosen
    @given(plans(SUBJECTS[name], name in (EDGES if wanted else EDGES[:1]), events))
    def holds(plan: Plan) -> None:
        attempt(subject(name), plan, tally)

    holds()
    tally["subjects"] += 1


def test_importance_without_loops() -> None:
    """What makes the emulation quick is what its loops say."""
    source = torch.Generator().manual_seed(0)
    for tokens, heads, groups in ((0, 4, 2), (1, 4, 2), (2, 6, 6), (7, 6, 2), (9, 3, 1)):
        query = torch.randn(tokens, heads, 5, generator=source)
        key = torch.randn(tokens, groups, 5, generator=source)
        expected = algorithm.importance(query, key, 0.7)
        torch.testing.assert_close(quick_importance(query, key, 0.7), expected)
