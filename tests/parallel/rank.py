"""One rank of several cases, one after another: a process takes longer to start than most of them.

torchrun --nproc-per-node 2 -m tests.parallel.rank FOLDER CASE...

A case is ``plans``, or a model of ``sharded.py``, ``-inductor`` behind it or not. Writes
``CASE/RANK.json`` in the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.parallel import plans, sharded


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in cases:
        torch._dynamo.reset()
        below = folder / case
        below.mkdir(exist_ok=True)
        name, _, inductor = case.partition("-")
        report = (
            plans.report_of(below)
            if case == "plans"
            else sharded.report_of(below, name, bool(inductor))
        )
        (below / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
