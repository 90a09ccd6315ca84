"""A plugin of pytest: the outcome of every test, in a file, as soon as there is one.

    pytest -p benchmarks.gpu.outcomes --outcomes FILE --no-later-than SECONDS_SINCE_1970

Lines of JSON: which tests there are, which one began, what became of it. No test begins after the
given time, nor after one that spoiled the process's access to the GPU.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

__all__ = ["SPOILED"]

SPOILED = re.compile(r"CUDA error|CUBLAS_STATUS|device-side assert|AcceleratorError")
TAIL = 3000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file of outcomes")
    parser.addoption("--no-later-than", type=float, default=float("inf"), help="time of the clock")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("outcomes") is not None:
        config.pluginmanager.register(Outcomes(config))


class Outcomes:
    """Writes the lines."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("outcomes")
        self.latest: float = config.getoption("no_later_than")
        self.session: pytest.Session | None = None

    def write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.session = session
        self.write(collected=[item.nodeid for item in session.items])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(broken=report.nodeid, message=report.longreprtext[-TAIL:])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """True, "it has been run", keeps a test from being begun."""
        if time.time() > self.latest:
            item.session.shouldstop = "the time is up"
            return True
        self.write(began=item.nodeid)
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.write(
            test=report.nodeid,
            outcome=report.outcome,
            seconds=report.duration,
            message=report.longreprtext[-TAIL:],
        )
        if report.failed and self.session is not None and SPOILED.search(report.longreprtext):
            self.session.shouldstop = "the GPU answers this process no more"
