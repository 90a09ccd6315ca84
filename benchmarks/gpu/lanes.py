"""Run cells in processes that may fail, hang or be killed; all but the cell at hand survives.

A failed cell ends its process: what it held on the device is free, and an illegal memory access,
which spoils every later launch of a process, spoils nothing else.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import ROOT, Cell, Plan, caches
from benchmarks.gpu.results import Results

__all__ = ["TAIL", "kill", "run"]

WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
TAIL = 4000
"""Characters of a process's log that explain its end."""


def run(
    cells: Sequence[Cell],
    plan: Plan,
    results: Results,
    *,
    budget: float,
    limit: float,
    say: Callable[[str], None],
    command: Sequence[str] = WORKER,
) -> None:
    """Measure the cells that the results lack.

    Args:
        budget: seconds after which no cell is begun; limit: seconds after which one is killed.
        say: is told of each cell. command: of a process; the plan is added to it.
    """
    end = time.monotonic() + budget
    wanted = [cell for cell in cells if cell.key not in results]
    worker: Worker | None = None
    try:
        while wanted and time.monotonic() < end:
            cell = wanted.pop(0)
            if worker is None or worker.cell.lane != cell.lane:
                if worker is not None:
                    worker.close()
                worker = Worker(command, cell, plan, results.path.with_suffix(".log"))
            began = time.monotonic()
            found = worker.measure(cell, limit)
            found["seconds"] = time.monotonic() - began
            if "machine" in found:
                results.note(machine=found["machine"])
            results.put(cell.key, found)
            say(f"{cell.key}: {found['outcome']}, {found['seconds']:.1f} s")
            if found["outcome"] != "ok":
                worker.close()
                worker = None
    finally:
        if worker is not None:
            worker.close()
        results.note(left=[cell.key for cell in wanted])


class Worker:
    """A process that measures the cells of a lane, one after the other."""

    def __init__(self, command: Sequence[str], cell: Cell, plan: Plan, log: Path) -> None:
        self.cell = cell
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("ab")
        self.start = log.stat().st_size
        self.process = subprocess.Popen(
            [*command, plan.dumps()],
            cwd=ROOT,
            env={**os.environ, **caches(plan.cache), **cell.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            process_group=0,
        )

    def measure(self, cell: Cell, limit: float) -> dict[str, Any]:
        """What the process answers; ``crashed`` if it died, ``timeout`` if it took too long."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(dict(cell.what)).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            return self._ended("crashed")
        ready, _, _ = select.select([stdout], [], [], limit)
        if not ready:
            kill(self.process)
            return self._ended("timeout")
        line = stdout.readline()
        if not line.endswith(b"\n"):
            return self._ended("crashed")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process and all that it started, at once."""
        kill(self.process)
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()

    def _ended(self, outcome: str) -> dict[str, Any]:
        status = self.process.wait()
        self.log.flush()
        with Path(self.log.name).open("rb") as file:
            file.seek(self.start)
            told = file.read().decode(errors="replace")
        return {"outcome": outcome, "error": f"exit status {status}\n{told[-TAIL:]}"}


def kill(process: subprocess.Popen[Any]) -> None:
    """End a process and those that it started, if they are still there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
