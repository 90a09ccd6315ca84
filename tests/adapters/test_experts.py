"""Loops over experts become one operator; what is near to them and computes otherwise does not."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import focus_compile
from focus_compile.adapters.adaptation import adaptation
from focus_compile.adapters.experts import experts_of
from tests.support.toy import HIDDEN, VOCAB, Toy

MASK, WIDTH, COUNT, CHOICES = VOCAB - 1, HIDDEN, 5, 2
IDS = torch.arange(24).view(2, 12) % MASK
IDS[:, 4:] = torch.where(IDS[:, 4:] % 5 == 0, IDS[:, 4:], MASK)

pytestmark = pytest.mark.usefixtures("no_inductor")


class Gated(nn.Module):
    """An expert in the words of most."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 24, bias=False)
        self.up_proj = nn.Linear(WIDTH, 24, bias=False)
        self.down_proj = nn.Linear(24, WIDTH, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return made


class Mixtral(nn.Module):
    """An expert in Mixtral's words, as wide inside as outside, so that any layer fits anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.w2(F.gelu(self.w1(x), approximate="tanh") * self.w3(x))
        return made


class Plain(nn.Module):
    """An expert without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 48, bias=False), nn.Linear(48, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.outer(F.relu(self.inner(x)))
        return made


class Normed(Plain):
    """One that computes something more."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=-1)


class Biased(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(48, WIDTH)


class Mixture(nn.Module):
    """What routes tokens."""

    def __init__(self, expert: type[nn.Module] = Gated) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, COUNT, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(COUNT))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = F.softmax(self.gate(x), -1).topk(CHOICES)
        return weights / weights.sum(-1, keepdim=True), ids


class OnHost(Mixture):
    """LLaDA2's way: tokens sorted by expert, slices as long as the host has read."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, WIDTH)
        weights, ids = self.route(rows)
        return self.moe_infer(rows, ids, weights).view(x.shape)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = F.one_hot(ids.view(-1), len(self.experts)).sum(0)
        order = ids.view(-1).argsort()
        rows, made, start = x[order // ids.shape[1]], [], 0
        for expert, count in enumerate(counts.cpu().numpy()):
            if count:
                made.append(self.experts[expert](rows[start : start + count]))
            start += count
        back = torch.empty_like(rows)
        back[order] = torch.cat(made)
        return (back.view(*ids.shape, -1) * weights[..., None]).sum(1)


class ToList(OnHost):
    """A neighbour: split by a list of numbers."""

    def moe_infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        order = ids.view(-1).argsort()
        counts = torch.bincount(ids.view(-1), minlength=COUNT).tolist()
        parts = x[order // ids.shape[1]].split(counts)
        made = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        back = torch.zeros_like(made).index_copy(0, order, made)
        return torch.einsum("nkh,nk->nh", back.view(*ids.shape, -1), weights)


class Hit(Mixture):
    """RND1's way: a loop over the experts that are hit."""

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = states.shape
        x = states.view(-1, width)
        weights, chosen = self.route(x)
        total = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=COUNT).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            choice, token = torch.where(mask[expert].squeeze(0))
            made = self.experts[expert](x[token]) * weights[token, choice, None]
            total.index_add_(0, token, made.to(x.dtype))
        return total.reshape(batch, length, width), chosen


class All(Mixture):
    """OLMoE's way, a neighbour: a loop over all of them, rows behind a new dim."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        shape = hidden_states.shape
        hidden_states = hidden_states.view(-1, WIDTH)
        routing_weights, selected = self.route(hidden_states)
        final = torch.zeros(hidden_states.shape, dtype=hidden_states.dtype)
        expert_mask = F.one_hot(selected, num_classes=COUNT).permute(2, 1, 0)
        for index in range(COUNT):
            layer = self.experts[index]
            idx, top_x = torch.where(expert_mask[index])
            state = hidden_states[None, top_x].reshape(-1, WIDTH)
            final.index_add_(0, top_x, layer(state) * routing_weights[top_x, idx, None])
        return final.reshape(shape), selected


class AddedTo(All):
    """Another one: a total that is added to by its places."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.view(-1, WIDTH)
        weights, selected = self.route(x)
        total, mask = torch.zeros_like(x), F.one_hot(selected, COUNT).permute(2, 1, 0)
        for index, layer in enumerate(self.experts):
            choice, token = mask[index].nonzero(as_tuple=True)
            total[token] += layer(x[token]) * weights[token, choice, None]
        return total.view(hidden_states.shape), selected


class Compared(Mixture):
    """And one that asks where the ids are an expert's."""

    def forward(self, states: Tensor) -> Tensor:
        x = states.view(-1, WIDTH)
        weights, ids = self.route(x)
        total = torch.zeros_like(x)
        for index, layer in enumerate(self.experts):
            token, choice = torch.where(ids == index)
            total[token] += layer(x[token]) * weights[token, choice].unsqueeze(-1)
        return total.view(states.shape)


class Reused(Mixture):
    """Not to be replaced: what the loop found last is read after it."""

    def forward(self, states: Tensor) -> Tensor:
        x = states.view(-1, WIDTH)
        weights, ids = self.route(x)
        total = torch.zeros_like(x)
        for index, layer in enumerate(self.experts):
            token, choice = torch.where(ids == index)
            made = layer(x[token]) * weights[token, choice, None]
            total.index_add_(0, token, made)
        return total.view(states.shape) + made.sum()


class Squared(Hit):
    """One that looks like the first, and shares out by squares."""

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        x = states.view(-1, WIDTH)
        weights, chosen = self.route(x)
        total = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=COUNT).permute(2, 1, 0)
        for expert in range(COUNT):
            choice, token = torch.where(mask[expert])
            made = self.experts[expert](x[token]) * weights[token, choice, None] ** 2
            total.index_add_(0, token, made)
        return total.view(states.shape), chosen


class Capacity(OnHost):
    """One that drops what an expert has too much of."""

    def moe_infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        total = torch.zeros_like(x)
        for expert in range(COUNT):
            token, choice = (ids == expert).nonzero(as_tuple=True)
            token, choice = token[:2], choice[:2]
            if token.numel() == 0 or weights.sum().item() == 0:
                continue
            total.index_add_(
                0, token, self.experts[expert](x[token]) * weights[token, choice, None]
            )
        return total


class First(nn.Module):
    """A mixture as a toy's operator between layers: what it says of routing is left out."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        made = self.mixture(x)
        return x + (made[0] if isinstance(made, tuple) else made)


class Model(Toy):
    """A toy whose tokens know where they are."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__(First(mixture), layers=4)
        self.embedding = Places()


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(20, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return made


FORMS: dict[type[Mixture], str] = {
    OnHost: "moe_infer", ToList: "moe_infer", Hit: "forward", All: "forward", AddedTo: "forward",
    Compared: "forward",
}  # fmt: skip
EXPERTS: list[tuple[type[nn.Module], tuple[str, str, str | None, str]]] = [
    (Gated, ("up_proj", "down_proj", "gate_proj", "silu")),
    (Mixtral, ("w3", "w2", "w1", "gelu_tanh")),
    (Plain, ("inner", "outer", None, "relu")),
]


def build(mixture: Mixture) -> Toy:
    torch.manual_seed(0)
    return Model(mixture).eval()


@pytest.mark.parametrize("form", FORMS)
def test_one_operator(form: type[Mixture], caplog: pytest.LogCaptureFixture) -> None:
    """In one graph, to which FOCUS is applied; logits are the untouched model's."""
    caplog.set_level(logging.INFO, "focus_compile")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build(form())
    with torch.no_grad():
        expected = model(IDS)
        compiled = focus_compile.compile(model, mask_token_id=MASK, strict=True)
        with focus_compile.session(exact=True) as focus:
            actual = compiled(IDS)
        assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert focus.stats.steps == 1 and focus_compile.status(compiled).graphs == 1
        assert type(model.between.mixture) is form and torch.equal(model(IDS), expected)
        with focus_compile.session(first_step="evict", alpha=1.0) as focus:
            compiled(IDS)
        assert focus.stats.retained < focus.stats.fed == IDS.numel()
    (line,) = [text for text in caplog.messages if text.startswith("adapted ")]
    assert line.startswith(f"adapted {form.__name__}.{FORMS[form]} (")
    assert line.endswith("its loop over `experts` is one operator") and "test_experts.py:" in line


@pytest.mark.parametrize(("expert", "parts"), EXPERTS)
def test_experts_of_any_words(
    expert: type[nn.Module], parts: tuple[str, str, str | None, str]
) -> None:
    """Names of layers tell nothing: what they compute does."""
    mixture = Hit(expert)
    found = experts_of(mixture, {})
    assert found is not None
    assert (found.up, found.down, found.gate, found.activation) == parts
    x = torch.randn(2, 7, WIDTH)
    with torch.no_grad(), focus_compile.adapt(mixture):
        actual = mixture(x)
    with torch.no_grad():
        expected = mixture(x)
    assert (actual[0] - expected[0]).abs().max() <= 1e-6 * expected[0].abs().max()
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("form", [Squared, Capacity, Reused])
def test_what_computes_otherwise_is_kept(form: type[Mixture]) -> None:
    assert adaptation(build(form())).notes == []


@pytest.mark.parametrize("expert", [Normed, Biased])
def test_experts_that_compute_otherwise_are_kept(expert: type[nn.Module]) -> None:
    assert experts_of(Hit(expert), {}) is None
    assert adaptation(build(Hit(expert))).notes == []


def test_experts_with_something_on_them_are_kept() -> None:
    """A hook would not be called; a weight of another class is no matrix to multiply by."""
    mixture = Hit()
    mixture.experts[2].register_forward_hook(lambda *_: None)
    assert experts_of(mixture, {}) is None
    mixture = Hit()
    mixture.experts[3] = Plain()
    assert experts_of(mixture, {}) is None


class Adapter(nn.Linear):
    """As LoRA's: it has a weight, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_layers_that_are_replaced_afterwards() -> None:
    """Their weights alone would be silently wrong. Where strict, the broken graph is the error."""
    torch._dynamo.reset()
    model = build(Hit())
    compiled = focus_compile.compile(model, mask_token_id=MASK)
    with torch.no_grad(), focus_compile.session(exact=True):
        compiled(IDS)
        expert = model.get_submodule("between.mixture.experts.1")
        expert.up_proj = Adapter(WIDTH, 24, bias=False)
        with pytest.raises(RuntimeError, match="compile the model anew"):
            compiled(IDS)
        again = focus_compile.compile(model, mask_token_id=MASK, adapt=False)
        assert torch.allclose(again(IDS), model(IDS), atol=1e-5)


def test_without_adapters_it_is_explained() -> None:
    torch._dynamo.reset()
    model = build(OnHost())
    story = focus_compile.explain(model, IDS)
    assert not story.applied
    assert "compile with focus_compile.compile(model)" in (story.breaks[0].remedy or "")
    plain = focus_compile.compile(model, mask_token_id=MASK, adapt=False)
    with torch.no_grad(), focus_compile.session():
        assert torch.equal(plain(IDS), model(IDS))
    assert focus_compile.status(plain).focus_calls == 0


def test_weights_are_read_when_called() -> None:
    """A copy, and weights that are loaded later, compute with their own."""
    torch._dynamo.reset()
    model = build(Hit())
    compiled = focus_compile.compile(model, mask_token_id=MASK, strict=True)
    with torch.no_grad(), focus_compile.session(exact=True):
        compiled(IDS)
        for weight in model.between.parameters():
            weight.mul_(1.5)
        assert torch.allclose(compiled(IDS), model(IDS), atol=1e-5)
    other = copy.deepcopy(compiled)
    with torch.no_grad(), focus_compile.session(exact=True):
        assert torch.allclose(other(IDS), model(IDS), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator(dtype: torch.dtype) -> None:
    """Against a sum over all experts of all tokens; an expert may have no token, or all."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 6, generator=generator).to(dtype)
    up, gate = (torch.randn(4, 5, 6, generator=generator).to(dtype) for _ in range(2))
    down = torch.randn(4, 6, 5, generator=generator).to(dtype)
    ids = torch.tensor([[2, 0], [2, 3]] * 4 + [[2, 0]])
    weights = torch.rand(9, 2, generator=generator)
    made = torch.ops.focus.experts(x, ids, weights, [*up], [*down], [*gate], "silu")
    wide = x.double()
    every = torch.stack([
        (F.silu(wide @ g.double().T) * (wide @ u.double().T)) @ d.double().T
        for u, g, d in zip(up, gate, down, strict=True)
    ])  # fmt: skip
    chosen = every[ids, torch.arange(9)[:, None]] * weights.double()[..., None]
    expected = chosen.sum(1)
    bound = 1e-5 if dtype == torch.float32 else 0.03
    assert made.dtype == dtype
    assert (made.double() - expected).abs().max() <= bound * expected.abs().max()
