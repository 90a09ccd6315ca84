"""A long run of the fuzzer that can be interrupted and gone on with.

    nice -n 19 python -m tests.fuzz.campaign --sequences 5000 --out docs/fuzz.json
    nice -n 19 python -m tests.fuzz.campaign --edges --sequences 2000 --out docs/fuzz_edges.json

Every subject is one entry of the file, written when all its sequences have held; entries that are
there are not run again. A failure stops the run and is shrunk by hypothesis.
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import typer
from hypothesis import HealthCheck, given, seed, settings

from benchmarks.provenance import commit
from tests.fuzz.edges import EDGE_SUBJECTS
from tests.fuzz.plan import Plan, plans
from tests.fuzz.play import attempt
from tests.fuzz.subjects import EDGES, SUBJECTS, subject
from tests.fuzz.test_edges import played


def campaign(name: str, sequences: int, start: int) -> dict[str, Any]:
    """Counts of what happened in a subject's sequences."""
    started = time.perf_counter()
    tally = (
        played(name, sequences, start) if name in EDGE_SUBJECTS else _played(name, sequences, start)
    )
    return {"seconds": round(time.perf_counter() - started, 1), "seed": start, **tally}


def _played(name: str, sequences: int, start: int) -> Counter[str]:
    tally: Counter[str] = Counter()
    chosen = settings(
        max_examples=sequences, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )

    @seed(zlib.crc32(name.encode()) + start)
    @chosen
    @given(plans(SUBJECTS[name], edges=name in EDGES))
    def holds(plan: Plan) -> None:
        attempt(subject(name), plan, tally)

    holds()
    return tally


def main(
    *,
    sequences: int = 5000,
    out: Path = Path("docs/fuzz.json"),
    start: int = 1,
    edges: bool = False,
) -> None:
    """Run what the file lacks; ``start``: another one gives other sequences.

    ``edges``: the models of ``edges.py`` instead of the dialects.
    """
    logging.getLogger("torch.__trace").propagate = False
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"subjects": {}}
    report |= {"torch": torch.__version__, "commit": commit()}
    names = [*EDGE_SUBJECTS] if edges else [*SUBJECTS]
    for name in names:
        if name in report["subjects"]:
            continue
        torch._dynamo.reset()
        report["subjects"][name] = campaign(name, -(-sequences // len(names)), start)
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(name, report["subjects"][name])


if __name__ == "__main__":
    typer.run(main)
