"""Tiers of tests; one thread, one Dynamo cache per module, warnings forgotten between tests."""

from __future__ import annotations

import functools
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from focus_compile.log import text_once
from tests.support.dialects import Subject, SubjectOf
from tests.support.harness import halves_through_inductor, without_inductor
from tests.tiers import MARKERS, tier

torch.set_num_threads(1)
logging.getLogger("torch.__trace").propagate = False  # else pytest formats every trace record


def pytest_addoption(parser: pytest.Parser) -> None:
    """``pytest tests/fuzz --fuzz N``: N sequences of calls, other ones at every run."""
    text = "sequences of calls, over all subjects; without it a fixed, small set is run"
    parser.addoption("--fuzz", type=int, default=None, help=text)
    parser.addoption("--full", action="store_true", help="every tier")
    parser.addoption("--rest", action="store_true", help="what is left out without --full")


def pytest_configure(config: pytest.Config) -> None:
    """``--rest`` captures without PyTorch's cache of fake results, in processes that tests start,
    too: small models are captured a fifth quicker. The default tier has it, as users have."""
    if config.getoption("--rest"):
        os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"
        torch._dynamo.config.fake_tensor_cache_enabled = False
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tiers that were asked for; tests that are named on the command line run anyway."""
    for item in items:
        name = tier(item.nodeid)
        if name is not None:
            item.add_marker(name)
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if config.getoption("--full") or (named and not config.getoption("--rest")):
        return
    rest = [item for item in items if any(mark.name in MARKERS for mark in item.iter_markers())]
    left_out = set(items) - set(rest) if config.getoption("--rest") else set(rest)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    _long_files_first(items)


def _long_files_first(items: list[pytest.Item]) -> None:
    """By the first marker of a file's tests, so that no worker begins a long file alone at last."""
    order = {name: index for index, name in enumerate(MARKERS)}
    ranks: dict[Path, int] = {}
    for item in items:
        rank = order.get(tier(item.nodeid) or "", len(order))
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


def pytest_collection_finish() -> None:
    """What is there now stays: a collection need not look at it hundreds of times."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def dynamo() -> Iterator[None]:
    """A fresh Dynamo for each module, whose tests may share compiled models.

    The recompile limit is far away, and reaching it is an error instead of eager execution.
    """
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def subject_of() -> SubjectOf:
    """A dialect's model, compiled once for all tests of a module."""
    return functools.cache(Subject)


@pytest.fixture
def no_inductor() -> Iterator[None]:
    """Programs run as the graphs that Inductor would get."""
    with without_inductor():
        yield


@pytest.fixture
def dense_without_inductor() -> Iterator[None]:
    """Prefix and suffix go through Inductor; dense programs, which are plain Inductor's, do not."""

    with halves_through_inductor() as halves:
        yield
    assert halves


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    """Warnings that are given once are given once per test."""
    text_once.cache_clear()
