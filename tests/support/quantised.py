"""Ways to quantise a model's linears: torchao's, a tensor of our own, a module of our own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.support.dialects import QWEN3
from tests.support.models.parts import randomize

Convert = Callable[[nn.Module], None]
FORMS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Features in groups of 32, which int4 wants."""


def small(dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{**QWEN3, **FORMS}))
    randomize(model, 0)
    return model.to(dtype).eval()


def torchao(name: str, **options: Any) -> Convert:
    """``quantize_`` of all linears but the head, whose vocabulary is no multiple of 16."""

    def convert(model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao import quantization
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            known = {**vars(quantization), "Int4OnCPU": PrototypeInt4WeightOnlyConfig}
            quantization.quantize_(model, known[name](**options), filter_fn=_is_inner)

    return convert


def _is_inner(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


class Scaled(Tensor):
    """int8 codes and a scale per row, which may be ``Scaled``, too; torch_dispatch alone."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Scaled:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, codes.shape, dtype=scale.dtype, device=codes.device
        )

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, weight: Tensor, depth: int) -> Tensor:
        if depth == 0:
            return weight
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), cls.of(scale, depth - 1))

    def __repr__(self, **_: Any) -> str:
        return f"Scaled({tuple(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> Scaled:
        return Scaled(parts["codes"], parts["scale"])

    def plain(self) -> Tensor:
        scale = self.scale.plain() if isinstance(self.scale, Scaled) else self.scale
        return self.codes.to(scale.dtype) * scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        plain = [arg.plain() if isinstance(arg, Scaled) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def scaled(depth: int) -> Convert:
    """All weights, those of the embedding included."""

    def convert(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                weight = Scaled.of(module.weight.detach(), depth)
                module.weight = nn.Parameter(weight, requires_grad=False)

    return convert


class _Product(Function):
    """``x @ weight.T`` of a weight of 4-bit codes, two in a byte, with a scale for each block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, table: Tensor) -> Tensor:
        codes = torch.stack([packed >> 4, packed & 15], -1).reshape(len(scales), -1)
        weight = table[codes.int()] * scales[:, None]
        return F.linear(x, weight.view(-1, x.shape[-1]))


class PackedLinear(nn.Module):
    """bitsandbytes' way: packed weights in a buffer, taken apart in an autograd Function."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        table = torch.linspace(-1, 1, 16, dtype=linear.weight.dtype)
        blocks = linear.weight.detach().reshape(-1, 16)
        scales = blocks.abs().amax(1)
        codes = (blocks / scales[:, None] - table[:, None, None]).abs().argmin(0).view(-1, 2)
        self.register_buffer("packed", ((codes[:, 0] << 4) | codes[:, 1]).to(torch.uint8))
        self.register_buffer("scales", scales)
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = _Product.apply(x, self.packed, self.scales, self.table)
        return made


def packed(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
