"""One thread, one Dynamo cache per module, warnings forgotten between tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from focus_compile.report import text_once

torch.set_num_threads(1)
logging.getLogger("torch.__trace").propagate = False  # else pytest formats every trace record


def pytest_addoption(parser: pytest.Parser) -> None:
    """``pytest tests/fuzz --fuzz N``: N sequences of calls, other ones at every run."""
    text = "sequences of calls, over all subjects; without it a fixed, small set is run"
    parser.addoption("--fuzz", type=int, default=None, help=text)


@pytest.fixture(autouse=True, scope="module")
def dynamo() -> Iterator[None]:
    """A fresh Dynamo for each module, whose tests may share compiled models.

    The recompile limit is far away, and reaching it is an error instead of eager execution.
    """
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    """Warnings that are given once are given once per test."""
    text_once.cache_clear()
