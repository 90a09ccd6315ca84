"""One graph, traced and rewritten once for all tests of passes."""

from __future__ import annotations

import pytest
from torch.fx import GraphModule

from focus_compile.passes import PASSES
from tests.passes.reading import Subject, subject
from tests.passes.tiny import call


@pytest.fixture(scope="session")
def tiny() -> Subject:
    return subject(call())


@pytest.fixture(scope="session")
def shallow() -> Subject:
    """Two layers, the least that there is something to do for."""
    return subject(call(layers=2))


@pytest.fixture(scope="session")
def stages(tiny: Subject) -> dict[str, GraphModule]:
    """The graph after each pass; ``canonical`` is the one before the first."""
    made = {"canonical": tiny.canonical.gm}
    gm = tiny.canonical.gm
    for apply in PASSES:
        gm = apply(gm, tiny.plan)
        made[apply.__name__] = gm
    return made
