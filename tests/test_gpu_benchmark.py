"""``benchmarks/gpu.py`` goes all the way on a CPU; what needs a GPU says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

from benchmarks import gpu


def test_all_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    gpu.main(
        device="cpu", shape="bench-3l", batches="8", strategies="trace:total", pairs=1, out=out
    )
    report = json.loads(out.read_text())
    assert report["machine"]["torch"] == torch.__version__ and report["seconds"] > 0
    assert "tests" not in report  # those need a launch
    (row,) = report["rows"]
    assert row["focus"]["retained_fraction"] < 1 and row["inductor"]["retained_fraction"] == 1
    for name in ("inductor", "focus"):
        bound, work = row["roofline"][name], row["work_per_step"][name]
        assert work["flops"] > work["bytes"] > 0
        compute = 1e3 * work["flops"] / report["roofs"]["flops_per_s"]
        assert bound["compute_ms"] == pytest.approx(compute)
        longest = max(bound["compute_ms"], bound["memory_ms"])
        assert bound["share_of_roof"] == pytest.approx(longest / row[name]["ms_per_step"])
    saved = row["work_per_step"]["focus"]["flops"] / row["work_per_step"]["inductor"]["flops"]
    assert 0.3 < saved < 0.9
    assert "of roof" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(typer.BadParameter, match="no GPU here"):
        gpu.main(batches="8")
