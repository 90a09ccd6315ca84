"""Eight threads, and two processes over one cache: every request gets what it gets alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.system.crowd import crowd, model_of_crowd


def check(told: dict[str, int]) -> None:
    assert told["wrong"] == []
    assert told["evicting"] >= told["steps"] / 4 and told["thrifty"] >= 2


def test_eight_threads() -> None:
    """Three when nothing is compiled yet, and nothing is compiled twice; then eight, twice."""
    inside = overlapping = compiled = 0

    def inner(graph: Any, inputs: Any) -> Any:
        nonlocal inside, overlapping, compiled
        inside += 1
        compiled += 1
        time.sleep(0.05)
        overlapping += inside > 1
        inside -= 1
        return graph

    run = model_of_crowd(inner)
    check(crowd(run, 3))
    assert not overlapping
    halves = [half for program in run.executables for half in (program.prefix, program.suffix)]
    assert compiled == len(run.executables) + sum(half.compiled is not None for half in halves)
    assert len(run.executables) > 1  # Dynamo's own: a thread that waited compiles anew
    for _ in range(2):
        check(crowd(run, 8))


def test_two_processes_over_one_cache(tmp_path: Path) -> None:
    """Two threads each, cold, through Inductor, at the same time."""
    environment = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.system.crowd"]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in started:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        check(json.loads(out))
