"""Who reads the logits of compiled programs: whether they may stay packed.

A program sees a part of a model, at worst: its last value may be hidden states, a confidence, or
logits that are changed after it returned them. So logits stay packed only where it is known that
they reach the caller as they are. ``generate`` knows: it sees what the model returned, and what the
programs did. An own loop's session sees the programs alone, and goes by what they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol
from weakref import ref

from torch import Tensor, nn

from focus_compile.config import FocusConfig
from focus_compile.torch_private import OptimizedModule

__all__ = ["MaskedCall", "Outputs", "Program", "Reader", "outermost"]


class Outputs:
    """Which output models returned as their logits; of the very objects, equal ones are others.

    A model may be any callable, hashable or not; one that cannot be referred to weakly is
    forgotten at once.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Any], int]] = {}

    def get(self, model: Any) -> int | None:
        """The output's position, or None for a model that was not seen."""
        known = self._known.get(id(model))
        return known[1] if known is not None and known[0]() is model else None

    def set(self, model: Any, output: int) -> None:
        key, known = id(model), self._known
        with suppress(TypeError):
            known[key] = ref(model, lambda _: known.pop(key, None)), output

    def forget(self, model: Any) -> None:
        self._known.pop(id(model), None)


class Program(Protocol):
    """A captured graph that evicts.

    ``read_as``: the models that returned one of its outputs as their logits, the very tensor, and
    which output it was, by position. ``config``: its options.
    """

    read_as: Outputs
    config: FocusConfig

    @property
    def returns_logits(self) -> bool: ...


@dataclass(frozen=True)
class MaskedCall:
    """What a program did in one masked call.

    Attributes:
        retained: bool ``[B, T]``.
        outputs: those with a row per token, by position, as they were returned.
        packed: which of them was left packed, an expanded zero in its place; None: none.
    """

    program: Program
    retained: Tensor
    outputs: Mapping[int, Tensor]
    packed: int | None

    def output_of(self, returned: Tensor) -> int | None:
        """Which output a tensor is: the object, not one with the same values."""
        return next((at for at, made in self.outputs.items() if made is returned), None)


@dataclass
class Reader:
    """A model whose output is compared with what programs return.

    Attributes:
        calls: masked calls of programs in the forward at hand.
        checked: whether it was seen that what follows the program treats tokens one by one.
    """

    model: nn.Module
    calls: list[MaskedCall] = field(default_factory=list)
    checked: bool = False


def outermost() -> bool:
    """Whether no module called the compiled one: then nothing but the caller changes its output.

    The one that ``torch.compile`` returns, which calls the user's, is none.
    """
    calls, frame = 0, _caller()
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            calls += not isinstance(frame.f_locals["self"], OptimizedModule)
        frame = frame.f_back
    return calls <= 1


def _caller() -> FrameType | None:
    return sys._getframe(1)
