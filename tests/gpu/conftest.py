"""The device that a test runs on, and fp32 that is fp32 there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.where import Where

_GPU = pytest.param(
    Where("cuda"),
    id="cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: PyTorch finds none"),
    ],
)


@pytest.fixture(scope="module", params=[pytest.param(Where("cpu"), id="cpu"), _GPU])
def where(request: pytest.FixtureRequest) -> Where:
    found: Where = request.param
    return found


@pytest.fixture(autouse=True, scope="module")
def no_tf32() -> Iterator[None]:
    """Matrix products of fp32 are not rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
