"""One sequence of calls as plain data, and the strategy that draws such sequences."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from tests.reference.state import Visibility
from tests.support.dialects import Dialect

STEP = "step"
EVENTS = (
    "commit", "interrupt", "reset", "remask", "rewrite", "swap", "replace", "resize", "dense",
    "outside", "enter", "leave", "crash", "evicted", "grow", "shrink", "misshape", "budget",
    "window", "single", "manner", "gate",
)  # fmt: skip
"""What happens between the steps of a block; functions of :mod:`tests.fuzz.events`."""


@dataclass(frozen=True)
class Plan:
    """A sequence: sizes of the first call, options, and what happens, each with a number.

    Attributes:
        given: masks are given by ``session.masked``, and no token is a mask token.
        named: alpha and visibility are given to the session, not to the backend.
        packed, owns, commits, shifted: as the attributes of a session.
        exact: nothing is evicted and nothing delayed, whatever the rest says.
    """

    seed: int
    batch: int
    tokens: int
    history: int
    events: tuple[tuple[str, int], ...]
    alpha: float = 1.2
    visibility: Visibility = "written"
    delayed: bool = True
    stale: bool = True
    given: bool = False
    named: bool = False
    packed: bool = False
    owns: bool = False
    commits: bool = False
    shifted: bool = False
    exact: bool = False
    rescue: float | None = None


def plans(
    dialect: Dialect, edges: bool, events: tuple[str, ...] = EVENTS
) -> st.SearchStrategy[Plan]:
    """Sequences for a dialect; ``edges``: sizes of 0 and 1 too, which Dynamo captures anew."""
    number = st.integers(0, 999)
    event = st.tuples(st.sampled_from((STEP,) * 12 + events), number)
    least = dialect.least if edges else dialect.least + 2
    return st.builds(
        Plan,
        seed=st.integers(0, 2**20),
        batch=st.integers(1 if edges else 2, 4),
        tokens=st.integers(2, 8),
        history=st.integers(least, 7) if dialect.history else st.just(0),
        events=st.lists(event, min_size=5, max_size=16).map(tuple),
        alpha=st.sampled_from((1.0, 1.2, 1.5, 2.0, 1e9)),
        visibility=st.sampled_from(("written", "prefix")),
        delayed=st.booleans(),
        stale=st.booleans(),
        given=st.booleans(),
        named=st.booleans(),
        packed=st.booleans(),
        owns=st.booleans(),
        commits=st.booleans(),
        shifted=st.booleans(),
        exact=st.sampled_from((False,) * 5 + (True,)),
        rescue=st.sampled_from((None, None, 0.12, 1.0)),
    )
