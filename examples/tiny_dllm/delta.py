"""The importance delta of masked tokens in plain PyTorch: FOCUS ranks by it (docs/algorithm.md).

`delta_signal.py` judges it; the last stage of `train.py` trains it.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, softplus
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb


def importance(q_BHTD: Tensor, k_BGTD: Tensor, masked_BT: Tensor, scale: float) -> Tensor:
    """How much attention each masked token gets from the masked tokens of its row; [B, T]."""
    rows, heads, tokens, size = q_BHTD.shape
    groups = k_BGTD.shape[1]
    order = (~masked_BT).int().argsort(dim=1, stable=True)  # masked ones first, left to right
    pick = order[:, None, :, None]
    q_BHTD = q_BHTD.float().gather(2, pick.expand(rows, heads, tokens, size))
    k_BGTD = k_BGTD.float().gather(2, pick.expand(rows, groups, tokens, size))
    scores = scale * q_BHTD @ k_BGTD.repeat_interleave(heads // groups, 1).transpose(2, 3)
    outside, lowest = ~masked_BT.gather(1, order), torch.finfo(torch.float32).min
    scores = scores.masked_fill(outside[:, None, None, :], lowest)
    pooled = max_pool1d(scores.flatten(0, 1), kernel_size=3, stride=1, padding=1)
    pooled = pooled.view_as(scores).masked_fill(outside[:, None, None, :], lowest)
    paid = pooled.softmax(-1).masked_fill(outside[:, None, :, None], 0.0).sum((1, 2))
    return torch.zeros_like(paid).scatter(1, order, paid.masked_fill(outside, 0.0))


class Watch:
    """A context that sees q and k of layers 0 and 1 of every forward of the model."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.model = model
        self.seen: dict[str, Tensor] = {}
        self.rotary: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> Watch:
        self.handles = [self.model.model.rotary_emb.register_forward_hook(self._see_rotary)]
        for layer in (0, 1):
            attention = self.model.model.layers[layer].self_attn
            for name, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
                self.handles.append(norm.register_forward_hook(self._see(f"{name}{layer}")))
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, name: str):
        def hook(_module: torch.nn.Module, _inputs: tuple, output: Tensor) -> None:
            self.seen[name] = output.transpose(1, 2)

        return hook

    def _see_rotary(self, _module: torch.nn.Module, _inputs: tuple, output: tuple) -> None:
        self.rotary = output

    def importances(self, masked: Tensor, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Of layers 0 and 1 in the last forward; masked [B, T] and they are of its last tokens.

        With `copies` these are that many noised blocks side by side, each looked at alone.
        """
        assert self.rotary is not None
        rows, length = masked.shape
        folded = masked.reshape(rows * copies, length // copies)
        scale = self.model.model.layers[0].self_attn.scaling

        def fold(states_BHTD: Tensor) -> Tensor:
            last = states_BHTD[:, :, -length:].unflatten(2, (copies, length // copies))
            return last.transpose(1, 2).flatten(0, 1)

        found = []
        for layer in (0, 1):
            q, k = apply_rotary_pos_emb(
                self.seen[f"q{layer}"], self.seen[f"k{layer}"], *self.rotary
            )
            found.append(importance(fold(q), fold(k), folded, scale).view(rows, length))
        return found[0], found[1]


def alignment(delta: Tensor, masked: Tensor, decoded: Tensor) -> Tensor:
    """Mean over rows of softplus(1 - gap), gap = delta of a decoded minus of another masked token.

    Rows [B, T] in which every masked token is decoded have nothing to tell apart and do not count.
    """
    pair = decoded[:, :, None] & (masked & ~decoded)[:, None, :]
    gap = delta[:, :, None] - delta[:, None, :]
    paid = torch.where(pair, softplus(1.0 - gap), 0.0).sum((1, 2))
    count = pair.sum((1, 2))
    rows = (count > 0).sum().clamp(min=1)
    return (paid / count.clamp(min=1)).sum() / rows
