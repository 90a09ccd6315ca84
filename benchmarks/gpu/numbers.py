"""Stage ``numbers``: the tests in ``tests/gpu``, file by file, some at a time.

Each test is a cell. A file is a process of pytest; where a test kills, hangs or spoils it, that is
the test's outcome, and another process goes on with the rest of the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.lanes import TAIL, kill
from benchmarks.gpu.plan import ROOT, Plan, caches
from benchmarks.gpu.results import Results

__all__ = ["FILES", "run"]

FILES = tuple(
    f"tests/gpu/test_{name}.py"
    for name in ("kernels", "calls", "generation", "graphs", "streams", "waits")
)
POLL = 0.2
START = 120.0
"""Seconds that a process may take to begin its first test, at least."""


def run(
    plan: Plan,
    results: Results,
    *,
    budget: float,
    limit: float,
    jobs: int,
    say: Callable[[str], None],
    files: tuple[str, ...] = FILES,
) -> None:
    """Run the tests that the results lack.

    Args:
        budget: seconds after which no test is begun; limit: seconds after which one is killed.
        jobs: processes at a time. say: is told of each test.
    """
    latest = time.time() + budget
    waiting = [File(name, plan, results, latest, limit, say) for name in files]
    running: list[File] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(POLL)
            running = [file for file in running if file.goes_on()]
    finally:
        for file in running:
            file.stop()
        left = [test for file in (*running, *waiting) for test in file.left]
        results.note(left=[*left, *(test for test in results.report["left"] if test not in left)])


@dataclass
class File:
    """Tests of one file, in one process after the other until each has an outcome."""

    name: str
    plan: Plan
    results: Results
    latest: float
    limit: float
    say: Callable[[str], None]
    process: subprocess.Popen[bytes] | None = None
    folder: tempfile.TemporaryDirectory[str] | None = None
    read: int = 0
    made: int = 0
    """Lines that were read of the process at hand, outcomes that it gave."""
    now: tuple[str, float] | None = None
    """The test that is being run, and when it began."""
    collected: list[str] = field(default_factory=list)
    begun: float = 0.0
    """When the process began, or said something that was not the begin of a test."""

    @property
    def left(self) -> list[str]:
        return [test for test in self.collected if test not in self.results]

    def start(self) -> None:
        """A process for the tests without an outcome."""
        self.folder = tempfile.TemporaryDirectory()
        self.read, self.made, self.now, self.begun = 0, 0, None, time.monotonic()
        command = [sys.executable, "-m", "pytest", self.name, "-q", "-p", "benchmarks.gpu.outcomes"]
        command += ["--outcomes", str(self._file), "--no-later-than", str(self.latest)]
        command += ["-m", "not gpu" if self.plan.device == "cpu" else "gpu"]
        command += ["-o", "filterwarnings=default", "-p", "no:cacheprovider"]
        own = Path(self.name).name
        done = [test for test in self.results.cells if test.partition("::")[0].endswith(own)]
        command += [part for test in done for part in ("--deselect", test)]
        log = (Path(self.folder.name) / "log").open("wb")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **caches(self.plan.cache)},
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        log.close()

    def goes_on(self) -> bool:
        """Take in what there is; False once every test has an outcome, or the time is up."""
        assert self.process is not None
        ended = self.process.poll() is not None
        for line in self._lines():
            self._take(line)
        since, most = (self.begun, max(self.limit, START))
        if self.now is not None:
            since, most = self.now[1], self.limit
        if not ended and time.monotonic() - since > most:
            kill(self.process)
            self._blame("timeout", f"killed after {most:.0f} s")
            ended = True
        elif ended and self.now is not None:
            self._blame("crashed", f"exit status {self.process.returncode}\n{self._told()}")
        elif ended and not self.collected:
            self._put(self.name, "crashed", 0.0, self._told())
        if not ended:
            return True
        told = self._told()
        self.stop()
        if not self.left or time.time() > self.latest:
            self.results.note(left=[*self.results.report["left"], *self.left])
            return False
        if not self.made:  # another process would not run anything either
            self._put(self.name, "crashed", 0.0, told)
            return False
        self.start()
        return True

    def stop(self) -> None:
        if self.process is not None:
            kill(self.process)
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None

    @property
    def _file(self) -> Path:
        assert self.folder is not None
        return Path(self.folder.name) / "outcomes"

    def _lines(self) -> list[dict[str, Any]]:
        """Lines that were not read yet, and are whole."""
        text = self._file.read_text() if self._file.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        new, self.read = whole[self.read :], len(whole)
        return [json.loads(line) for line in new]

    def _take(self, line: dict[str, Any]) -> None:
        self.begun = time.monotonic()
        if "collected" in line:
            self.collected = line["collected"]
        elif "broken" in line:
            self._put(line["broken"], "error", 0.0, line["message"])
        elif "began" in line:
            self.now = (line["began"], time.monotonic())
        else:
            self.now = None
            self._put(line["test"], line["outcome"], line["seconds"], line["message"])

    def _blame(self, outcome: str, message: str) -> None:
        """The test at hand did that to its process."""
        test, since = self.now or (self.name, self.begun)
        self._put(test, outcome, time.monotonic() - since, message)
        self.now = None

    def _put(self, test: str, outcome: str, seconds: float, message: str) -> None:
        found: dict[str, Any] = {"outcome": outcome, "seconds": seconds}
        if message and outcome != "passed":
            found["error"] = message
        self.made += 1
        self.results.put(test, found)
        self.say(f"{test}: {outcome}, {seconds:.1f} s")

    def _told(self) -> str:
        assert self.folder is not None
        return (Path(self.folder.name) / "log").read_text(errors="replace")[-TAIL:]
