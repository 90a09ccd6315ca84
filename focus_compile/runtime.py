"""What runs when a compiled model is called: pick the dense program, or prefix and suffix."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.config import FocusConfig
from focus_compile.cut import Halves
from focus_compile.feed import feed
from focus_compile.programs import Inner, Program
from focus_compile.session import Session, current_session

__all__ = ["Executable", "Layout"]

log = logging.getLogger(__name__)

NO_MASKS = (
    "backend 'focus' runs the dense program: it does not know which tokens are masked. Give the id "
    "of the mask token, torch.compile(model, backend='focus', options={'mask_token_id': ...}) or "
    "focus_compile.session(mask_token_id=...), or the masks themselves: session.masked = ..."
)


@dataclass(frozen=True)
class Layout:
    """How the canonical graph's inputs relate to the arguments of Dynamo's graph.

    Attributes:
        arguments: for each input ``input{i}``, the index of the argument.
        dense_inputs: inputs that the programs expect contiguous.
        last_dim_inputs: inputs that they expect contiguous in the last dim: past keys and values.
        ids: name of the token ids.
        slots: name, dtype and shape of each slot; -1 stands for the batch, -2 for the tokens.
        token_dims: for each layer, the token dim of its keys and of its values.
    """

    arguments: tuple[int, ...]
    dense_inputs: frozenset[str]
    last_dim_inputs: frozenset[str]
    ids: str
    slots: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    token_dims: tuple[tuple[int, int], ...]


class Executable:
    """One captured graph, compiled: Dynamo calls it with the graph's arguments.

    Attributes:
        dense_calls: how often the dense program ran; ``prefix.calls`` and ``suffix.calls`` count
            the others.
    """

    def __init__(
        self,
        dense: Callable[..., Any],
        halves: Halves,
        layout: Layout,
        config: FocusConfig,
        inner: Inner,
    ) -> None:
        self.dense = dense
        self.halves = halves
        self.layout = layout
        self.config = config
        self.prefix = Program(halves.prefix, inner)
        self.suffix = Program(halves.suffix, inner)
        self.dense_calls = 0

    def __call__(self, *args: Any) -> Any:
        session = current_session()
        ids = args[self.layout.arguments[int(self.layout.ids.removeprefix("input"))]]
        masked = self._masked(ids, session)
        if masked is None or ids.shape[-1] == 1 or not bool(masked.any()):
            self.dense_calls += 1
            return self.dense(*args)
        return self._focus(args, masked, session)

    def _masked(self, ids: Tensor, session: Session | None) -> Tensor | None:
        """bool ``[B, T]``, by precedence: given masks, the session's mask token, the option's."""
        token = self.config.mask_token_id
        if session is not None:
            given = session.take_masked(ids)
            if given is not None:
                return given
            token = token if session.mask_token_id is None else session.mask_token_id
        if token is None:
            torch._logging.warning_once(log, NO_MASKS)
            return None
        return (ids == token).view(-1, ids.shape[-1])

    def _focus(self, args: Sequence[Any], masked: Tensor, session: Session | None) -> Any:
        device = masked.device
        batch, tokens = masked.shape
        values = self._arguments(args)
        tables = feed(torch.ones_like(masked))
        none = torch.zeros_like(masked)
        values |= {
            "masked": masked,
            "fed": tables.fed,
            "fed_tokens": tables.tokens,
            "fed_inverse": tables.inverse,
            "fed_rows": tables.rows,
            "progress": torch.full((batch,), -1, device=device),
            "average": torch.ones(batch, device=device),
            "alpha": torch.tensor(self.config.alpha, dtype=torch.float32, device=device),
            "signal_weights": torch.tensor([-1.0, 1.0], device=device),
            "signal_bias": torch.zeros(batch, tokens, device=device),
            "written01": none,
            "written": none,
            "prefix_visibility": torch.tensor(self.config.visibility == "prefix", device=device),
        }
        for name, dtype, shape in self.layout.slots:
            size = [{-1: batch, -2: tokens}.get(extent, extent) for extent in shape]
            values[name] = torch.zeros(size[-1:], dtype=dtype, device=device).expand(size)
        values |= self.prefix(values)
        count, most = values["sizes"].tolist()
        values["tokens"] = values["order"][:count]
        values["rows"] = values["places"][:, :most].contiguous()
        values |= self.suffix(values)
        if session is not None:
            session.retain_mask = values["retain_mask"]
        return tuple(None if name is None else values[name] for name in self.halves.own)

    def _arguments(self, args: Sequence[Any]) -> dict[str, Tensor]:
        """The canonical graph's inputs, in the layout that the programs were compiled for."""
        values: dict[str, Tensor] = {}
        for position, argument in enumerate(self.layout.arguments):
            name, value = f"input{position}", args[argument]
            bad = name in self.layout.dense_inputs and not value.is_contiguous()
            bad |= name in self.layout.last_dim_inputs and value.stride(-1) != 1
            values[name] = value.contiguous() if bad else value
        return values
