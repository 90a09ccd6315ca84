"""docs/how-it-works.md holds what its script captures today."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers

from tests.gpu_lowering.fake_gpu import unfit
from tests.support.paths import DOCS

RECORDED = ("2.13.0", "5.24")
UNFIT = unfit()
HERE = (torch.__version__.partition("+")[0], ".".join(transformers.__version__.split(".")[:2]))


@pytest.mark.skipif(
    HERE != RECORDED, reason=f"listings are those of torch, transformers {RECORDED}"
)
@pytest.mark.skipif(UNFIT is not None, reason=str(UNFIT))
def test_the_listings_are_not_stale() -> None:
    spec = importlib.util.spec_from_file_location("how_it_works", DOCS / "how_it_works.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.text()
    assert f"torch {HERE[0]} and transformers {HERE[1]}" in text
    assert (DOCS / "how-it-works.md").read_text() == text
