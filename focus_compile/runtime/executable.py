"""What runs when a compiled model is called: pick the dense program, or prefix and suffix."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from focus_compile.calibrated import Calibrated
from focus_compile.capture.returned_sizes import with_sizes
from focus_compile.config import FocusConfig
from focus_compile.errors import EmptyCall, EvictedTokenDecoded, UncommittedHistory
from focus_compile.graph.sharding import local
from focus_compile.log import warning_once
from focus_compile.models.vocabulary import check_mask_token
from focus_compile.ops.tables import feed, retained_tables
from focus_compile.plan.controls import Selection, Tables
from focus_compile.plan.plan import Domain
from focus_compile.programs.halves import Halves
from focus_compile.programs.layout import Layout
from focus_compile.programs.program import Program
from focus_compile.runtime.arguments import arguments, held_slots
from focus_compile.runtime.block import BlockState, History, history_of
from focus_compile.runtime.controls import Constants, controls, empty_slots, is_exact, ranking
from focus_compile.runtime.demand import Demand, demand_of, rescue_of
from focus_compile.runtime.holes import Holes
from focus_compile.runtime.identity import model_key, overlap, weights_of
from focus_compile.runtime.implicit import session_here
from focus_compile.runtime.logits import Logits, is_shifted, reading_of
from focus_compile.runtime.origin import Origin
from focus_compile.runtime.outputs import Packed, packed_logits, returned
from focus_compile.runtime.reader import MaskedCall, Outputs
from focus_compile.runtime.record import Record
from focus_compile.runtime.rescue import recompute
from focus_compile.runtime.session import Session, warn_outside
from focus_compile.runtime.signals import reads_confidence
from focus_compile.runtime.turns import kept_together

__all__ = ["CAUSAL", "Executable"]

log = logging.getLogger(__name__)

NO_MASKS = (
    "backend 'focus' runs the dense program: it does not know which tokens are masked. Give the id "
    "of the mask token, torch.compile(model, backend='focus', options={'mask_token_id': ...}) or "
    "focus_compile.session(mask_token_id=...), or the masks themselves: session.masked = ..."
)

CAUSAL = (
    "attention is causal: no token sees those on its right, as those of a diffusion LLM must. Of "
    "attention_mask=None and of a 2-D mask, transformers makes a causal mask: pass one of shape "
    "[B, 1, T, S + T], focus_compile.block_mask(model, valid, tokens)"
)
HELD = (
    "backend 'focus' runs the dense program: the model writes keys and values into a part of a "
    "cache, where those of evicted tokens have to stay until they are computed. generate() keeps "
    "them; an own loop takes a cache that grows, or transformers' StaticCache"
)

NO_LOGITS = (
    "rescue, confidences and audits are off: no output of this program is known to hold the "
    "logits, which tell whether a retained token is sure. Compile the outermost module, and remove "
    "graph breaks"
)
OVERLAP = (
    "backend 'focus' runs the dense program: the model writes into an input whose memory another "
    "input shares"
)
LOOKED_UP = (
    "backend 'focus' runs the dense program: positions that the model looks up in an argument are "
    "not as many as the block has tokens, or a number is out of range. Mark one place for each "
    "token of the block, the same in every row, or pass positions, int64 [T] or [B, T]"
)

SHARDED = (
    "evict='auto': processes share this model, and each would time for itself and choose another "
    "program. Time both yourself (evict=True, evict=False), and give the one that is sooner"
)


class Executable:
    """One captured graph, compiled: Dynamo calls it with the graph's arguments.

    Attributes:
        dense_calls: how often the dense program ran; ``prefix.calls`` and ``suffix.calls`` count
            the others.
        captured: the programs are recorded as CUDA graphs.
        written: arguments, by position, that the model writes into.
        stored: names of keys and values that are a part of the caller's cache.
        returns: whether the function that Dynamo captured returns behind this graph; else it goes
            on behind a graph break.
        read_as: models whose logits are an output of this program, and which
            (:class:`~focus_compile.runtime.reader.Program`).
    """

    def __init__(
        self,
        dense: Callable[..., Any],
        halves: Halves,
        layout: Layout,
        config: FocusConfig,
        programs: tuple[Program, Program],
        record: Record | None = None,
        *,
        returns: bool = True,
    ) -> None:
        more = layout.parts or layout.look_ups is not None
        self.dense = _first(dense, layout.given) if more else dense
        self.halves = halves
        self.layout = layout
        self.config = config
        self.prefix, self.suffix = programs
        self.record = record or Record()
        self.dense_calls = 0
        self.captured = config.captures(slot.device for slot in layout.slots)
        self.returns = returns
        self.constants = Constants()
        self.written = {argument.position for argument in layout.written}
        self.stored = {halves.slots[held.slot] for held in layout.held}
        self.read_as = Outputs()
        self.logits = Logits(halves, self.read_as)
        self.holes = Holes(halves, layout)
        self.checked: set[tuple[Calibrated, tuple[int, ...]]] = set()

    @property
    def returns_logits(self) -> bool:
        return bool(self.halves.vocabulary)

    def __call__(self, *args: Any) -> Any:
        args += tuple(part.of(args) for part in self.layout.parts)
        session = session_here()
        with session.calling():
            return self._run(args, session)

    def _run(self, args: Sequence[Any], session: Session) -> Any:
        ids = args[self.layout.ids]
        if not (session.enabled and ids.numel()):
            session.masked = None  # they were given for this call
        if not ids.numel():
            raise EmptyCall(tuple(ids.shape))
        self._check_calibration(args, session)
        looked_up = self.layout.looked_up(args)
        args = (*args, *(looked_up or ()))
        owns = session.owns_kv
        masked = self._masked(ids, session) if session.enabled else None
        known = session.take_any_masked()
        if not owns:
            self._complete(args, ids.shape[-1], session)
        if masked is None or ids.shape[-1] == 1 or not (masked.any() if known is None else known):
            return self._dense(args, session)
        evict = self.config.evict if session.evict is None else session.evict
        if evict is False:
            self.record.dense_call("evict=False")
            return self._dense(args, session, masked=True)
        if self.layout.held and not owns:
            warning_once(log, HELD)
            self.record.dense_call("keys and values are written into a part of a cache")
            return self._dense(args, session, masked=True)
        if self.layout.written and overlap(args, self.written):
            warning_once(log, OVERLAP)
            self.record.dense_call("written and shared memory")
            return self._dense(args, session, masked=True)
        if looked_up is None:
            warning_once(log, LOOKED_UP)
            self.record.dense_call("what the model looks up does not fit the block")
            return self._dense(args, session, masked=True)
        if self.layout.causal:
            warning_once(log, CAUSAL)
        if session.implicit:
            warn_outside()
        if evict == "auto" and not is_exact(self.config, session):
            return self._sooner(args, ids.view(masked.shape), masked, session)
        return self._focus(args, ids.view(masked.shape), masked, session)

    def _sooner(self, args: Sequence[Any], ids: Tensor, masked: Tensor, session: Session) -> Any:
        """Raises:
        ValueError: processes share the model.
        """
        if any(isinstance(arg, DTensor) for arg in args):
            raise ValueError(SHARDED)
        lap = session.laps.of(self.record.paces.get(masked), int(masked.sum()))
        with lap.call(ids.device):
            if lap.evict:
                return self._focus(args, ids, masked, session)
            self.record.dense_call("evict='auto'")
            return self._dense(args, session, masked=True)

    def _complete(self, args: Sequence[Any], tokens: int, session: Session) -> None:
        """Raises:
        UncommittedHistory: the past has slots of evicted tokens, and it is not known which call
            returned it.
        """
        empty = self.holes.empty(args, tokens)
        if empty is None:
            return
        pasts = [(local(argument.of(args)), dim) for argument, dim in self.layout.pasts]
        if not session.origins.complete(model_key(args), pasts, empty):
            raise UncommittedHistory(int(empty.sum()))

    def _dense(self, args: Sequence[Any], session: Session, masked: bool = False) -> Any:
        self.dense_calls += 1
        session.stats.dense_calls += 1
        session.stats.masked_dense += masked
        if masked:
            session.retain_mask = session.rescue_mask = session.scores = session.logits = None
        else:
            session.laps.end()
        session.end_blocks(model_key(args))
        return self.dense(*args)

    def _masked(self, ids: Tensor, session: Session) -> Tensor | None:
        """bool ``[B, T]``, by precedence: given masks, the session's mask token, the option's."""
        given = session.take_masked(ids)
        if given is not None:
            return session.in_block(given)
        token = session.mask_token_id
        token = self.config.mask_token_id if token is None else token
        if token is None:
            warning_once(log, NO_MASKS)
            return None
        check_mask_token(token, self.layout.vocabulary)
        session.mask_sought = token
        return session.in_block((ids == token).view(-1, ids.shape[-1]))

    def _focus(self, args: Sequence[Any], ids: Tensor, masked: Tensor, session: Session) -> Any:
        values = arguments(self.layout, args, masked.shape[1])
        state = self._state(args, values, ids, masked, session)
        exact = is_exact(self.config, session)
        delayed = self.config.delayed_cache and not exact
        skip = session.commits_exactly
        fed = feed(torch.ones_like(masked) if exact else state.fed(delayed, skip))
        owns = session.owns_kv and not self.captured
        reuse = owns and state.goes_on and bool(state.slots)
        slots = state.slots or empty_slots(
            self.layout.slots, self.layout.inputs, values, masked.shape
        )
        values |= slots | held_slots(self.layout, args, state)
        values |= vars(
            controls(self.config, session, state, fed, reuse=reuse, constants=self.constants)
        )
        # the suffix is compiled for contiguous values at the cut, whatever the prefix prefers
        values |= {
            name: value if name in self.stored else value.contiguous()
            for name, value in self.prefix(values).items()
        }
        selection = Selection(
            **{key: values[at] for key, at in vars(self.halves.selection).items()}
        )
        count, most = selection.sizes.tolist()
        tokens, rows = retained_tables(
            selection.order, selection.places, count, most, self.config.buckets
        )
        values |= self.suffix(values | vars(Tables(tokens=tokens, rows=rows)))
        kept, rescued = Packed(tokens[:count], selection.retain_mask), None
        if count < fed.tokens.numel():
            rescued = self._rescued(values, state, kept, session)
        if rescued is not None:
            again, kept = recompute(
                self.suffix, self.halves, values, fed.fed, kept, rescued, self.config.buckets,
                stored=self.stored, overwrites=self.captured,
            )  # fmt: skip
            values |= again
        self._audit(args, masked, values, kept, rescued, session)
        domains = {Domain.FED: Packed(fed.tokens, fed.fed), Domain.RETAINED: kept}
        packed = self.logits.packed(session, returns=self.returns)
        if packed is not None and (own := self.halves.own[packed]):
            session.logits = packed_logits(own, values, domains[Domain.RETAINED])
        shown = self._shown(values, kept, session)
        made = returned(self.halves, shown, domains, packed, ids)
        if shown is not values:
            origin = Origin.of(self.dense, self.layout, args, made, shown[self.holes.values])
            session.origins.keep(model_key(args), origin)
        made = self._written(args, made)
        self.record.focus_call()
        retained = kept.keep.clone()  # it outlives this call
        state.advance(fed.fed, retained, self._slots(values), delayed)
        if self._reads_confidences(session):
            sure = self._sure(values, masked.shape, kept, session)
            if sure is not None and is_shifted(self.config, session):
                sure[:, 0] = -1  # judged by logits of another block
            state.computed(sure)
        session.retain_mask, session.rescue_mask = retained, rescued
        session.scores = selection.delta.clone()
        session.stats.record(masked.numel(), fed.tokens.numel(), len(kept.tokens), rescued)
        self._tell(session, made, retained, packed)
        session.keep(model_key(args), state)  # last: a call that is interrupted has no state
        return with_sizes(made, self.layout.sizes, args)

    def _written(
        self, args: Sequence[Any], made: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Write into the arguments that the model writes into; what it returns beside them."""
        own = len(made) - len(self.layout.written)
        for argument, value in zip(self.layout.written, made[own:], strict=True):
            argument.of(args).copy_(value)
        return made[:own]

    def _check_calibration(self, args: Sequence[Any], session: Session) -> None:
        """Raises:
        ValueError: the calibration is of another model, or of other layers.
        """
        calibrated = session.calibration
        if calibrated is None and self.config.calibration is None:
            return
        if calibrated is not None:
            layers = calibrated.options.get("layers", self.config.layers)
            if layers != self.config.layers:
                raise ValueError(
                    f"the calibration ranks by layers {layers}, and the model is compiled for "
                    f"{self.config.layers}: compile it with options={{'layers': {layers}}}"
                )
        key = model_key(args)
        for each in (calibrated, self.config.calibration):
            if each is not None and (each, key) not in self.checked:
                each.check(arg for arg in args if isinstance(arg, Parameter))
                self.checked.add((each, key))

    def _shown(
        self, values: dict[str, Tensor], kept: Packed, session: Session
    ) -> dict[str, Tensor]:
        """What the caller sees: nothing of evicted tokens that it could take for theirs."""
        if session.owns_kv or len(kept.tokens) == kept.keep.numel():
            return values
        return self.holes.marked(values, kept.keep)

    def _rescued(
        self, values: Mapping[str, Tensor], state: BlockState, kept: Packed, session: Session
    ) -> Tensor | None:
        """Evicted tokens that are computed after all, bool ``[B, T]``; None: there is none."""
        demand, rescued = self._demand(session), None
        if demand is not None:
            sure = self._sure(values, state.masked.shape, kept, session)
            if sure is None:
                warning_once(log, NO_LOGITS)
            rescued = rescue_of(sure, state.masked, kept.keep, demand)
        if not session.implicit or len(state.masked) == 1:
            return rescued
        computed = kept.keep if rescued is None else kept.keep | rescued
        more = kept_together(state, computed, is_shifted(self.config, session))
        return rescued if more is None else computed & ~kept.keep | more

    def _reads_confidences(self, session: Session) -> bool:
        choice = ranking(self.config, session)
        return reads_confidence(choice) and (session.confidences or isinstance(choice, str))

    def _demand(self, session: Session) -> Demand | None:
        """When rows are rescued: by the session's setting, the option, or how they are decoded."""
        return demand_of(self.config.rescue, session.rescue, session.decoding)

    def _sure(
        self,
        values: Mapping[str, Tensor],
        shape: torch.Size,
        retained: Packed,
        session: Session,
    ) -> Tensor | None:
        """With which confidence each token could be decoded, fp32 ``[B, T]``; -1: it cannot.

        None where it is not known which output are the logits.
        """
        reading = reading_of(self.config, session)
        found = self.logits.predictions(values, shape, retained, reading)
        return None if found is None else found.confidence

    def _audit(
        self,
        args: Sequence[Any],
        masked: Tensor,
        values: Mapping[str, Tensor],
        kept: Packed,
        rescued: Tensor | None,
        session: Session,
    ) -> None:
        """Count what dense makes of this step, if it is audited; before arguments are written."""
        audit = session.stats.audit
        if audit is None or not audit.next_is_due():
            return
        reading = reading_of(self.config, session)
        focus = self.logits.predictions(values, masked.shape, kept, reading)
        dense = self.logits.dense_predictions(self.dense, self.layout, args, masked.shape, reading)
        if focus is None or dense is None:
            warning_once(log, NO_LOGITS)
            return
        calibration = session.calibration or self.config.calibration
        audit.calibrated = None if calibration is None else calibration.hit_range
        demand = self._demand(session) or session.decoding
        threshold = math.inf if demand is None else demand.threshold
        audit.record(masked, focus, dense, rescued, threshold)

    def _tell(
        self,
        session: Session,
        made: Sequence[Tensor | None],
        retained: Tensor,
        packed: int | None,
    ) -> None:
        """Show what was returned to whom it may concern."""
        if session.reader is None:
            return
        outputs = {
            index: value
            for index, (own, value) in enumerate(zip(self.halves.own, made, strict=True))
            if own is not None and own.domain is Domain.RETAINED and value is not None
        }
        session.reader.calls.append(MaskedCall(self, retained, outputs, packed))

    def _state(
        self,
        args: Sequence[Any],
        values: Mapping[str, Tensor],
        ids: Tensor,
        masked: Tensor,
        session: Session,
    ) -> BlockState:
        """The state of this call's blocks: the session's, brought up to date, or a fresh one."""
        history = History(0, None)
        key = model_key(args)
        state = session.state(key) if key else None
        if self.layout.past is not None:
            past = values[self.layout.past]
            places: Tensor | None = None
            if (index := self.layout.index) is not None:
                (places,) = index.gm(*(values[name] for name in index.inputs))
            known = None if state is None else state.history
            history = history_of(past, self.layout.past_dim, places, known)
        weights = weights_of(args, self.layout.buffers, self.layout.key_program)
        session.forget(key)  # until this call is through
        session.origins.begin(key)
        shifted, alone = is_shifted(self.config, session), session.implicit
        anew = session.others(key, ids, masked, history, shifted) if key else None
        if state is None:
            return BlockState(ids, masked, history, weights)
        try:
            if not state.fits(ids, weights) or not self._stores(state):
                return BlockState(ids, masked, history, weights)
            state.observe(ids, masked, history, shifted, session.edited, alone=alone, anew=anew)
        except EvictedTokenDecoded:
            if not session.implicit:  # there nobody could reset it
                session.keep(key, state)  # refused before anything was changed
            raise
        return state

    def _stores(self, state: BlockState) -> bool:
        """Whether the slots of a state are of this graph's dtype and device."""
        return all(
            (slot.dtype, slot.device)
            == (state.slots[slot.name].dtype, state.slots[slot.name].device)
            for slot in self.layout.slots
            if slot.name in state.slots
        )

    def _slots(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every layer's keys and values, for the next step; a CUDA graph overwrites its results."""
        return {
            slot: values[name].clone() if self.captured else values[name]
            for slot, name in self.halves.slots.items()
            if name not in self.stored
        }


def _first(dense: Callable[..., Any], given: int) -> Callable[..., Any]:
    """A program that is given more arguments, and leaves them out."""

    def run(*args: Any) -> Any:
        return dense(*args[:given])

    return run
