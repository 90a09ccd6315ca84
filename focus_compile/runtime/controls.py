"""What the programs of one masked call are given beside the model's own arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from focus_compile.config import FocusConfig
from focus_compile.graph.inputs import Input
from focus_compile.graph.sizes import length
from focus_compile.ops.tables import Feed
from focus_compile.plan.controls import Controls
from focus_compile.runtime.block import BlockState
from focus_compile.runtime.session import Session
from focus_compile.runtime.signals import Choice, Step, check_signal, signal_of

__all__ = ["Constants", "controls", "empty_slots", "is_exact", "ranking"]


class Constants:
    """Numbers as tensors, made anew when they change: the host waits for every copy to a GPU."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Any, Tensor]] = {}

    def get(self, name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``value`` as a tensor; the one of the last call that asked for the same."""
        key = (value, dtype, device)
        last = self._last.get(name)
        if last is None or last[0] != key:  # another thread may put its own there meanwhile
            last = self._last[name] = key, torch.tensor(value, dtype=dtype, device=device)
        return last[1]


def is_exact(config: FocusConfig, session: Session | None) -> bool:
    """Whether every token is fed and retained: by the session's setting, or the option."""
    return config.exact if session is None or session.exact is None else session.exact


def ranking(config: FocusConfig, session: Session | None) -> Choice:
    """The session's signal before that of the options."""
    chosen = None if session is None else session.signal
    return check_signal(config.signal if chosen is None else chosen)


def controls(
    config: FocusConfig,
    session: Session | None,
    state: BlockState,
    fed: Feed,
    *,
    reuse: bool,
    constants: Constants,
) -> Controls[Tensor]:
    """Settings of the session before those of the options; masks and counts of the blocks.

    ``reuse``: nobody else reads the slots, so that joins may write into them. ``constants``: those
    of the program's last call.

    Raises:
        ValueError: the session's signal has a bias of another shape than ``[B, T]``.
    """
    device = state.masked.device
    alpha, visibility = config.alpha, config.visibility
    if session is not None:
        alpha = alpha if session.alpha is None else session.alpha
        visibility = session.visibility or visibility
    if is_exact(config, session):
        alpha = torch.inf
    factor = constants.get("alpha", alpha, torch.float32, device)
    average = state.average
    first_step = "evict" if session is None else session.first_step or config.first_step
    if first_step != "evict":
        opening = ~state.warm
        if first_step == "auto":
            opening = opening & state.opens(factor.ceil())
        average = torch.where(opening, torch.inf, average)  # a budget for all of them
    index = 0 if session is None else session.stats.steps
    seen = (state.confidence, state.age) if state.has_confidence else (None, None)
    step = Step(index, state.ids, state.masked, fed.fed, *seen)
    signal = signal_of(ranking(config, session), step)
    bias = signal.bias
    if bias is None:
        bias = torch.zeros(state.masked.shape, dtype=torch.float32, device=device)
    if bias.shape != state.masked.shape:
        shape, expected = tuple(bias.shape), tuple(state.masked.shape)
        raise ValueError(f"the signal's bias has shape {shape}: expected {expected}")
    exact = True if config.stale_kv else state.final
    return Controls(
        masked=state.masked,
        fed=fed.fed,
        progress=state.progress,
        average=average,
        alpha=factor,
        signal_weights=constants.get("weights", signal.weights, torch.float32, device),
        signal_bias=bias.to(device, torch.float32).contiguous(),
        fed_tokens=fed.tokens,
        fed_inverse=fed.inverse,
        fed_rows=fed.rows,
        written01=state.written01 & exact,
        written=state.written & exact,
        prefix_visibility=constants.get("prefix", visibility == "prefix", torch.bool, device),
        reuse=constants.get("reuse", reuse, torch.bool, torch.device("cpu")),
    )


def empty_slots(
    slots: Sequence[Input],
    inputs: Sequence[Input],
    values: Mapping[str, Tensor],
    canvas: torch.Size,
) -> dict[str, Tensor]:
    """Slots that nobody has written: no memory, and no layer reads them.

    ``inputs``: the arguments, of whose ``values`` sizes are read; ``canvas``: ``[B, T]``.
    """
    sizes = dict(zip(("batch", "token"), canvas, strict=True))
    for given in inputs:
        for name, size in zip(given.shape, values[given.name].shape, strict=True):
            if isinstance(name, str):
                sizes[name] = size
    return {slot.name: _zeros(slot, sizes) for slot in slots}


def _zeros(slot: Input, sizes: Mapping[str, int]) -> Tensor:
    shape = [length(extent, sizes) for extent in slot.shape]
    return torch.zeros(shape[-1:], dtype=slot.dtype, device=slot.device).expand(shape)
