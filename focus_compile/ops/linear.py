"""The matrix product of few rows on a CPU."""

from __future__ import annotations

from torch import Tensor

from focus_compile.torch_private import onednn_linear

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN: ``[..., N, K]``, ``[M, K]`` -> ``[..., N, M]``, fp32.

    PyTorch's own ``mm`` calls MKL, which reaches its speed from some hundred rows on: with 1024 x
    3072 weights on one AVX-512 core, 16, 48, 80, 128 and 512 rows run at 56, 78, 87, 91 and 94
    GFLOP/s, oneDNN with the weights as they lie at 71, 90, 101, 102 and 107; with 30,000 columns 80
    rows at 66 and 93.
    """
    return onednn_linear(x, weight, bias)
