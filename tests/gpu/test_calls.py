"""Single calls: a device computes what the CPU does, nothing evicted and evicting, fp32 and bf16.

References are the eager model on the same device and, with eviction, the emulation of
``tests/reference`` around the eager fp32 model on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from tests.gpu.where import Where
from tests.reference.emulation import Emulated, Emulation
from tests.reference.state import Config
from tests.support.dialects import DIALECTS, Dialect, Draw, Subject, draw_call, qwen3
from tests.support.harness import eager_inner, retained

_MOE = DIALECTS["sdar-moe-grouped"]
SUBJECTS: dict[str, Dialect] = {
    "qwen3": Dialect(lambda: qwen3("sdpa"), _MOE.arguments, _MOE.logits),
    "moe-grouped": _MOE,
    "llada-canvas": DIALECTS["llada-canvas"],
    "static-cache": DIALECTS["sdar-static"],
}
TOLERANCE, NEAR_TIE = 1e-4, 1e-4
NEAR_TIE_16 = 0.2
"""How far the signal of a 16-bit model may be from that of the fp32 one."""


@dataclass
class Pair:
    """A compiled subject on the device, and the same weights as an eager fp32 model on the CPU."""

    subject: Subject
    exact: Any

    def draw(self, seed: int) -> tuple[Draw, Draw]:
        """A call, for the CPU and for the subject."""
        call = draw_call(self.subject.dialect, seed)
        return call, call.to(self.subject.device, self.subject.dtype)

    @torch.no_grad()
    def logits(self, call: Draw) -> Tensor:
        """The eager fp32 model's."""
        dialect = self.subject.dialect
        return dialect.logits(self.exact(**dialect.arguments(self.exact, call)))

    def emulated(self, call: Draw, config: Config) -> Emulated:
        return Emulation(config).step(
            lambda: self.logits(call), call.ids, call.masked, call.history
        )


CPU = ("qwen3", "static-cache")
"""Subjects that show on a CPU that the tests are sound; test_families.py has all dialects."""


def pair(name: str, where: Where, dtype: torch.dtype, inner: Any = eager_inner) -> Pair:
    few = CPU if dtype == torch.float32 else CPU[:1]
    if not where.gpu and name not in few:
        pytest.skip("on a CPU others will do")
    subject = Subject(SUBJECTS[name], inner, dtype, where.device)
    torch.manual_seed(0)
    return Pair(subject, SUBJECTS[name].build().eval())


@pytest.fixture(scope="module", params=SUBJECTS)
def fp32(request: pytest.FixtureRequest, where: Where) -> Iterator[Pair]:
    yield pair(request.param, where, torch.float32)


@pytest.fixture(scope="module", params=SUBJECTS)
def bf16(request: pytest.FixtureRequest, where: Where) -> Iterator[Pair]:
    yield pair(request.param, where, torch.bfloat16)


@pytest.fixture(scope="module", params=SUBJECTS)
def lowered(request: pytest.FixtureRequest, where: Where) -> Iterator[Pair]:
    if not where.gpu:
        pytest.skip("tests/system/test_families_inductor.py has it")
    yield pair(request.param, where, torch.float32, None)


def check_all_kept(given: Pair, draws: int) -> None:
    """Equal to the eager model, on the same device and on the CPU."""
    for seed in range(draws):
        call, there = given.draw(seed)
        with focus_compile.session(alpha=1e9):
            actual = given.subject.focus(there)
        expected = given.subject.eager(there)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(actual.cpu(), given.logits(call), atol=TOLERANCE, rtol=TOLERANCE)


def check_evicting(given: Pair, draws: int) -> None:
    """Which tokens are retained, and their logits: as the emulation has them."""
    evicting = ties = 0
    for seed in range(draws):
        call, there = given.draw(seed)
        config = Config(1.0 + (seed % 4) / 5, ("written", "prefix")[seed % 2])
        found = given.emulated(call, config)
        with focus_compile.session(alpha=config.alpha, visibility=config.visibility):
            actual = given.subject.focus(there).cpu()
        if not torch.equal(retained(actual), found.retained):
            assert found.margin < NEAR_TIE, f"draw {seed}: margin {found.margin}"
            ties += 1
            continue
        expected = found.logits * found.retained.unsqueeze(-1)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
        evicting += bool((~found.retained).any())
    assert evicting >= max(1, draws // 4)
    assert ties <= draws // 20


def test_nothing_evicted(fp32: Pair, where: Where) -> None:
    check_all_kept(fp32, where.draws(50, 2))


def test_evicting(fp32: Pair, where: Where) -> None:
    check_evicting(fp32, where.draws(50, 4))


def test_through_inductor(lowered: Pair) -> None:
    """With the Triton kernels in the prefix: few calls, since only compilation is new."""
    check_all_kept(lowered, 3)
    check_evicting(lowered, 6)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_nothing_evicted_bf16(bf16: Pair, where: Where) -> None:
    """As near to the fp32 model as the eager bf16 model is.

    In the median: a router that rounds otherwise picks another expert, and moves a token far.
    """
    for seed in range(where.draws(50, 2)):
        call, there = bf16.draw(seed)
        exact = bf16.logits(call)
        with focus_compile.session(alpha=1e9):
            actual = bf16.subject.focus(there)
        error, usual = (
            (x.float().cpu() - exact).abs().median() for x in (actual, bf16.subject.eager(there))
        )
        assert error <= 1.3 * usual, f"draw {seed}: {error} beside {usual}"


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_evicting_bf16(bf16: Pair, where: Where) -> None:
    """The retained tokens are the fp32 emulation's but at near ties, and so are their logits."""
    draws = where.draws(50, 4)
    alike = evicting = 0
    errors, usual = [], []
    for seed in range(draws):
        call, there = bf16.draw(seed)
        found = bf16.emulated(call, Config(1.2))
        with focus_compile.session(alpha=1.2):
            actual = bf16.subject.focus(there).float().cpu()
        evicting += bool((~retained(actual)).any())
        if not torch.equal(retained(actual), found.retained):
            assert found.margin < NEAR_TIE_16, f"draw {seed}: margin {found.margin}"
            continue
        alike += 1
        kept = found.retained
        errors.append((actual - found.logits)[kept].abs().median())
        usual.append((bf16.subject.eager(there).float().cpu() - bf16.logits(call)).abs().median())
    assert min(evicting, alike) >= max(1, draws // 4), (evicting, alike)
    assert torch.stack(errors).mean() <= 1.5 * torch.stack(usual).mean()
