"""A model that is sharded over heads is refused on every rank, and computes what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
PROCESSES = 2


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of PyTorch has no gloo")
def test_sharded_by_transformers(tmp_path: Path) -> None:
    """Every rank would retain other tokens: its importance is that of its own heads."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES), "-m", "tests.parallel.sharded", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    for report in reports:
        (refusal,) = report["refusals"]
        assert refusal["reason"].startswith("weights are sharded over processes")
        assert refusal["cure"].startswith("load the whole model in every process")
        assert report["from_eager"] == 0 and report["from_whole"] < 1e-3
    heads = [report["local_heads"] for report in reports]
    assert heads == [reports[0]["local_heads"]] * PROCESSES and heads[0] * PROCESSES == 4
