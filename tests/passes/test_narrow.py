"""Narrow: packed rows of fed tokens up to layer 1's q, k and v, of retained ones after."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from focus_compile.errors import Unsupported
from focus_compile.passes.narrow import narrow
from focus_compile.passes.retain import retain
from focus_compile.passes.score import score
from tests.passes.reading import Subject, missing, subject
from tests.passes.step import FED, RETAINED, Step, controls
from tests.passes.tiny import BATCH, HIDDEN, LAYERS, TOKENS, Between, Values, call, model

LAYER1 = """\
linear = aten.linear(add, q1)
view = aten.view(linear, [1, fed_tokens.size(0), 6, 16])
transpose = aten.transpose(view, 1, 2)
mul = aten.mul(transpose, pack)
linear = aten.linear(add, k1)
view = aten.view(linear, [1, fed_tokens.size(0), 2, 16])
transpose = aten.transpose(view, 1, 2)
mul = aten.mul(transpose, pack)
linear = aten.linear(add, v1)
view = aten.view(linear, [1, fed_tokens.size(0), 2, 16])
transpose = aten.transpose(view, 1, 2)
joined1_k = focus.join(past1_k, mul, fed_tokens, slots1_k, written01, reuse, 2)
joined1_v = focus.join(past1_v, transpose, fed_tokens, slots1_v, written01, reuse, 2)
unpack = focus.unpack(mul, fed_inverse, 0, 2)
unpack = focus.unpack(mul, fed_inverse, 0, 2)
importance1 = focus.importance(unpack, unpack, masked, 0.25)
delta = focus.signal(importance0, importance1, signal_weights, signal_bias)
retain_mask = focus.retain(delta, masked, fed, progress, average, alpha)
tables = focus.tables(retain_mask)
order = getitem(tables, 0)
inverse = getitem(tables, 1)
places = getitem(tables, 2)
sizes = getitem(tables, 3)
site_index = focus.site_index(fed_inverse, rows)
visible = focus.visible(written01, fed, retain_mask, prefix_visibility)
site_mask = focus.site_mask(mask, rows, visible, past0_k.size(2), 3, torch.float32)
line_index = focus.line_index(tokens, inverse, rows)
scaled_dot_product_attention_rows = focus.attend(mul, joined1_k, joined1_v, site_mask, site_index, \
line_index, 0.25)
scaled_dot_product_attention = aten.transpose(scaled_dot_product_attention_rows, 1, 2)
transpose = aten.transpose(scaled_dot_product_attention, 1, 2)
reshape = aten.reshape(transpose, [1, tokens.size(0), 96])
linear = aten.linear(reshape, o1)
tanh = aten.tanh(linear)
repack = focus.repack(add, fed_inverse, tokens, 1)
add = aten.add(repack, tanh)
""".splitlines()
"""The cut: one text for all that turns from fed to retained."""


def test_lines_where_tokens_enter(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    """Ids, what rows share and what positions share are packed; the canvas is gone."""
    before, after = (tiny.lines(stages[name]) for name in ("retain", "narrow"))
    assert before[:2] == [
        "embedding = aten.embedding(embed, ids)",
        "add = aten.add(embedding, style)",
    ]
    assert after[:4] == [
        "pack = focus.pack(ids, fed_tokens, fed_inverse, 0, 1)",
        "embedding = aten.embedding(embed, pack)",
        "pack_rows = focus.pack_rows(style, fed_tokens, fed_inverse, 0, 1)",
        "add = aten.add(embedding, pack_rows)",
    ]
    assert after.count("pack = focus.pack(table, fed_tokens, fed_inverse, None, 0)") == 1
    assert after.count("pack = focus.pack(table, tokens, inverse, None, 0)") == 1
    gone = missing(before, after)
    assert "cat = aten.cat([past2_k, mul], 2)" in gone
    assert sum("scaled_dot_product_attention(" in line for line in gone) == LAYERS
    assert not any("ids.size" in line or "aten.cat" in line for line in after)


def test_lines_at_the_cut(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    after = tiny.lines(stages["narrow"])
    first = after.index(LAYER1[0])
    assert after[first : first + len(LAYER1)] == LAYER1


def test_lines_after_the_cut(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    """Later layers store retained tokens only; one way back serves them all."""
    after = tiny.lines(stages["narrow"])
    for line in (
        "joined2_k = focus.join(past2_k, mul, tokens, slots2_k, written, reuse, 2)",
        "visible = focus.visible(written, retain_mask, retain_mask, prefix_visibility)",
        "site_index = focus.site_index(inverse, rows)",
    ):
        assert line in after[after.index(LAYER1[-1]) :]
    assert sum(line.startswith("line_index") for line in after) == 2


def test_inputs_and_outputs(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    assert missing(tiny.inputs(stages["narrow"]), tiny.inputs(stages["retain"])) == [
        "fed_tokens", "fed_inverse", "fed_rows", "tokens", "rows", "written01", "written",
        "prefix_visibility", "reuse",
        "slots0_k", "slots0_v", "slots1_k", "slots1_v", "slots2_k", "slots2_v",
    ]  # fmt: skip
    pairs = [f"joined{layer}_k, joined{layer}_v" for layer in range(LAYERS)]
    own = f"[linear, {', '.join(pairs)}]"
    control = "[retain_mask, order, inverse, places, sizes, delta]"
    kv = ", ".join(f"[{pair}]" for pair in pairs)
    assert tiny.outputs(stages["narrow"]) == f"[{own}, {control}, [{kv}]]"


@torch.no_grad()
@pytest.mark.parametrize("prefix", [False, True])
def test_numbers(prefix: bool, tiny: Subject, stages: dict[str, GraphModule]) -> None:
    """Logits of retained tokens, row by row, and the slots of every layer."""
    values = {**call(), **controls(prefix)}
    (logits, *own), (mask, *_), kv = tiny.run(stages["narrow"], values)["output"]
    expected, *slots = model(values, Step(values, prefix).attend)
    assert torch.equal(mask, RETAINED) and not torch.equal(RETAINED, FED) and not FED.all()
    assert logits.shape[:2] == (1, int(RETAINED.sum()))
    torch.testing.assert_close(logits[0], expected[RETAINED], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(own, slots, atol=2e-5, rtol=1e-5)
    assert [id(part) for pair in kv for part in pair] == list(map(id, own))
    other, *_ = model(values, Step(values, not prefix).attend)
    assert (other - expected)[RETAINED].abs().max() > 0.01
    assert (model(values)[0] - expected)[RETAINED].abs().max() > 0.01


def causal(
    layer: int, query: Tensor, key: Tensor, value: Tensor, values: Values
) -> tuple[Tensor, Tensor, Tensor]:
    """No cache: the site's own operands are the K/V writes; no mask: later keys are hidden."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out, key, value


@torch.no_grad()
def test_without_a_cache() -> None:
    """Nothing to join to; ``is_causal`` counts queries, and is a mask once they are gathered."""
    values = {**call(past=0), **controls(past=0)}
    own = {name: values[name] for name in call() if name != "mask" and "past" not in name}
    changed = subject(own, lambda given: model(given, causal))
    after = narrow(retain(score(changed.canonical.gm, changed.plan), changed.plan), changed.plan)
    lines = changed.lines(after)
    for line in (
        "joined2_k = focus.join(None, mul, tokens, slots2_k, written, reuse, 2)",
        "causal = focus.causal(masked, joined1_k)",
        "site_mask = focus.site_mask(causal, rows, visible, 0, 3, torch.float32)",
    ):
        assert line in lines
    (logits, *cache), _, _ = changed.run(after, values)["output"]
    values["mask"] = torch.ones(BATCH, 1, TOKENS, TOKENS).bool().tril()
    expected, *slots = model(values, Step(values).attend)
    torch.testing.assert_close(logits[0], expected[RETAINED], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(cache, slots, atol=2e-5, rtol=1e-5)
    assert (model(values)[0] - expected)[RETAINED].abs().max() > 0.01


def product_per_row(x: Tensor, values: Values) -> Tensor:
    """A matrix for each row of the batch."""
    return x + torch.matmul(x, values["matrix"])


def folded(x: Tensor, values: Values) -> Tensor:
    """Tokens of all rows in one axis, and a canvas value that was folded likewise."""
    return (x.reshape(-1, HIDDEN) + values["bias"].reshape(-1, HIDDEN)).view(x.shape)


def unknown_size(x: Tensor, values: Values) -> Tensor:
    """A view that spells out an axis which is neither batch, tokens nor a number."""
    batch, tokens, size = x.shape
    spread = x.unsqueeze(-1) * values["many"]
    return x + spread.view(batch, tokens, size * values["many"].shape[0]).sum(-1, keepdim=True)


def order_of_another_layer() -> Between:
    """Tokens sorted by expert, in the order of the first layer for all layers."""
    orders: list[Tensor] = []

    def between(x: Tensor, values: Values) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        if not orders:
            chosen = F.linear(rows, values["router"]).topk(1).indices
            orders.append(torch.sort(chosen.reshape(-1))[1])
        listed = torch.tanh(rows[orders[0]])
        return listed[orders[0].argsort()].view(x.shape)

    return between


Case = tuple[Between, dict[str, tuple[int, ...]], str]
REFUSED: dict[str, Case] = {
    "a matrix per row": (
        product_per_row,
        {"matrix": (BATCH, HIDDEN, HIDDEN)},
        "packed tokens meet one value per row in this operator [op aten.matmul.default]",
    ),
    "a folded canvas value": (
        folded,
        {"bias": (BATCH, TOKENS, HIDDEN)},
        "packed tokens meet a value whose token axis is folded [op aten.add.Tensor]",
    ),
    "an axis of unknown size": (
        unknown_size,
        {"many": (9,)},
        "a packed value has an axis of unknown size [op aten.view.default]",
    ),
    "an order of fed tokens": (
        order_of_another_layer(),
        {"router": (3, HIDDEN)},
        "fed tokens, in another order, meet retained ones [op aten.index.Tensor]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    between, shapes, message = REFUSED[name]
    values = {**call(layers=2), **{name: torch.randn(shape) for name, shape in shapes.items()}}
    changed = subject(values, lambda given: model(given, between=between), {"many": (0,)})
    before = retain(score(changed.canonical.gm, changed.plan), changed.plan)
    with pytest.raises(Unsupported) as refusal:
        narrow(before, changed.plan)
    assert str(refusal.value) == message
    assert refusal.value.cure
