"""What a model returns beside its logits: values of the first layers, of every fed token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from focus_compile.backend import focus_backend
from focus_compile.runtime.executable import Executable
from tests.support.harness import (
    MASK,
    PAPER,
    Sizes,
    build_model,
    eager_inner,
    random_call,
    retained,
)


class Watched(nn.Module):
    """A model that also returns what hooks saw of the queries of layers 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model(Sizes(layers=3))
        self.seen: dict[int, Tensor] = {}
        for layer in (0, 1):
            norm = self.model.model.layers[layer].self_attn.q_norm
            norm.register_forward_hook(self._keep(layer))

    def _keep(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.seen[layer] = output.transpose(1, 2) * 2

        return hook

    def forward(self, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.model(**kwargs).logits
        return logits, self.seen[0], self.seen[1]


@torch.no_grad()
def test_values_before_the_cut_are_returned_of_every_fed_token() -> None:
    """They lie beside layer 1's q, k and v, and no later value needs them."""
    watched, programs = Watched(), list[Any]()

    def backend(gm: Any, inputs: Any) -> Any:
        options = {"mask_token_id": MASK, "strict": True, "alpha": 1.0, **PAPER}
        programs.append(focus_backend(gm, inputs, options=options, inner=eager_inner))
        return programs[-1]

    call = random_call(1, watched.model, 3, 9, 7)
    expected = watched(**call.kwargs(watched.model))
    logits, *seen = torch.compile(watched, backend=backend)(**call.kwargs(watched.model))
    (program,) = programs
    assert isinstance(program, Executable) and program.suffix.calls == 1
    assert 0 < int(retained(logits).sum()) < retained(logits).numel()
    for actual, wanted in zip(seen, expected[1:], strict=True):
        assert wanted.shape == (3, 6, 9, 16)
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
