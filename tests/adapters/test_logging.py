"""A model that logs in its forward: Dynamo would run the whole function eagerly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config

import focus_compile
from tests.support.toy import HIDDEN, VOCAB, Toy

MASK = VOCAB - 1


class Headed(nn.Module):
    """As older modeling files ask their config, whose property logs since transformers 5."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.body = Qwen3Config(), Toy()
        self.body.head = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids: Tensor, return_dict: bool | None = None) -> Tensor:
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        return self.lm_head(self.body(ids))


@torch.no_grad()
@pytest.mark.usefixtures("no_inductor")
def test_one_graph_with_its_head() -> None:
    """Logits may be packed, since the graph holds the whole model."""
    torch._dynamo.reset()
    model = Headed().eval()
    compiled = focus_compile.compile(model, mask_token_id=MASK, strict=True)
    ids = torch.full((2, 9), MASK)
    with focus_compile.session(exact=True, logits="packed") as focus:
        compiled(ids)
        made = focus.logits
    assert focus.stats.steps == 1 and made is not None
    assert focus_compile.status(compiled).graphs == 1
    expected = model(ids).flatten(0, 1)
    torch.testing.assert_close(made.values, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_explain_names_the_line() -> None:
    torch._dynamo.reset()
    story = focus_compile.explain(Headed().eval(), torch.full((2, 9), MASK))
    (broke,) = story.skipped
    assert "use_return_dict" in broke.line and "logging" in broke.reason
    assert (broke.remedy or "").startswith("a property of the config logs: pass return_dict=True")
