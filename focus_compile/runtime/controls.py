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
from focus_compile.runtime.budget import budget, required
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


def is_exact(config: FocusConfig, session: Session) -> bool:
    """Whether every token is fed and retained: by the session's setting, or the option."""
    return config.exact if session.exact is None else session.exact


def ranking(config: FocusConfig, session: Session) -> Choice:
    """The session's signal before that of the options."""
    return check_signal(config.signal if session.signal is None else session.signal)


def controls(
    config: FocusConfig,
    session: Session,
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
        ValueError: the session's signal has a bias of another shape than ``[B, T]``, or its
            ``require`` has.
    """
    device = state.masked.device
    alpha = config.alpha if session.alpha is None else session.alpha
    visibility = session.visibility or config.visibility
    if is_exact(config, session):
        alpha = torch.inf
    factor = constants.get("alpha", alpha, torch.float32, device)
    needed = required(config, session, state)
    seen = (state.confidence, state.age) if state.has_confidence else (None, None)
    step = Step(session.stats.steps, state.ids, state.masked, fed.fed, *seen)
    signal = signal_of(ranking(config, session), step)
    bias = signal.bias
    if bias is None:
        bias = torch.zeros(state.masked.shape, dtype=torch.float32, device=device)
    if bias.shape != state.masked.shape:
        shape, expected = tuple(bias.shape), tuple(state.masked.shape)
        raise ValueError(f"the signal's bias has shape {shape}: expected {expected}")
    if needed is not None:
        bias = bias.to(device).masked_fill(needed, torch.nan)  # section 3: such a token is kept
    exact = True if config.stale_kv else state.final
    return Controls(
        masked=state.masked,
        fed=fed.fed,
        progress=state.progress,
        average=budget(config, session, state, factor, needed),
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
