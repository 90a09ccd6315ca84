"""Sessions: the scope of one generation, in which calls of a compiled model share block state."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from focus_compile.calibrated import given_signal, read
from focus_compile.config import FIRST_STEPS, Rescue, is_count, is_evict
from focus_compile.log import warning_once
from focus_compile.runtime.ambient import Scope, current_session, open_elsewhere
from focus_compile.runtime.audit import Audit
from focus_compile.runtime.block import BlockState, History
from focus_compile.runtime.demand import Demand, check_rescue
from focus_compile.runtime.origin import Origins
from focus_compile.runtime.pace import Laps
from focus_compile.runtime.reader import Reader
from focus_compile.runtime.signals import Choice, check_signal
from focus_compile.runtime.statistics import SessionStats
from focus_compile.torch_private import recompile_limits_hit, was_compiled_for

__all__ = [
    "PackedLogits",
    "Session",
    "SessionStats",
    "current_session",
    "session",
    "warn_outside",
]

log = logging.getLogger(__name__)

OUTSIDE = (
    "a call of backend 'focus' is in no session, while one is open elsewhere: its settings and "
    "state are not used. A session holds in the thread or task that entered it, and, entered in a "
    "generator, while that generator runs. Enter focus_compile.session(...) in this thread, around "
    "the call"
)
NO_MASKED_CALL = (
    "a session ends without one masked call, after %d dense ones: no token was %s. Give the id of "
    "the model's own mask token (tokenizer.mask_token_id), or session.masked"
)
MORE_MISSED = (
    "eviction misses more than its calibration has seen: %s. There a sure token was kept in "
    "%.1f %% to %.1f %% of such rows: calibrate anew, with prompts like these"
)
BYPASSED = (
    "a session ends in which no call reached backend 'focus', though a model was compiled with it. "
    "Of torch.compile(model, backend='focus') the model's own methods (compiled.generate) call the "
    "model that was not compiled. Use focus_compile.compile(model, ...), whose methods run what is "
    "compiled, or compile the model that other code holds: in_place=True"
)
NOT_REACHED = (
    "a session ends in which masked calls may have run eagerly, without backend 'focus': Dynamo "
    "has reached its recompile limit. Compile with focus_compile.compile(...), which has a limit "
    "of its own, vary alpha by session(alpha=...), or raise torch._dynamo.config.recompile_limit"
)


class _Thread(threading.local):
    """A mark for each thread; the number of one that has ended is given to another."""

    def __init__(self) -> None:
        self.mark = object()


_THREAD = _Thread()


@dataclass(frozen=True)
class PackedLogits:
    """Logits of the retained tokens of a call.

    ``values`` ``[N, V]``; ``rows`` and ``positions`` int64 ``[N]``: where in the batch and in the
    block each of them stands, in row-major order.
    """

    values: Tensor
    rows: Tensor
    positions: Tensor


class Session:
    """Block state of the compiled models called inside; made by :func:`session`.

    Attributes:
        mask_token_id, alpha, visibility, exact, tokens_per_step, evict: override the model's
            options where not None. laps: with ``evict="auto"``, which program decodes the block.
        calibration: what set them, or None.
        first_step: overrides the model's option where not None; rescue: where not ``"auto"``.
        decoding: how ``generate`` decodes, which says when a row needs its evicted tokens; None in
            an own loop.
        signal: overrides the model's option where not None: a name, the weights of both
            importances, a :class:`~focus_compile.runtime.signals.Signal`, or a function of the
            :class:`~focus_compile.runtime.signals.Step` that returns one. ``"auto"``: that of
            ``calibration``, which must be given.
        enabled: whether masked calls run FOCUS's programs, or the dense one like all others.
        implicit: it is that of the calls of a thread that are in no other one.
        packed: where the compiled program is the whole model and has one output as wide as the
            vocabulary, masked calls return no logits on the canvas but one zero, expanded, and
            ``logits`` holds them: :class:`PackedLogits` of the last masked call. Elsewhere they
            return logits on the canvas, and ``logits`` is None.
        reader: sees what a model returns, and so decides what is packed; None in an own loop.
        stats: counts so far.
        retain_mask: bool ``[B, T]``, what the last masked call retained, rescued tokens included;
            None: all, or no call yet. rescue_mask: those that it rescued, None: none. scores: fp32
            ``[B, T]``, what ranked its masked tokens.
        any_masked: whether the masks of the next call hold one, as its caller knows; taken by that
            call. None: it waits for the device to tell.
        edited: bool ``[B, T]``, decoded tokens that the loop has changed since the last call; taken
            by the next one. They are computed anew, and their rows go on. A decoded token that
            changes without it starts its row's block anew: it could be another text.
        commits_exactly: the caller commits every block with a mask-free call, so that a row whose
            last mask has gone need not be fed again before.
        shifted_logits: the token at p is predicted by the logits of p - 1 (Dream), so that it may
            be decoded where p - 1 was retained; the first one by the last call before the block.
        confidences: whether a function as ``signal`` is told those of the steps before: False, for
            they take a softmax of every step's logits.
        last: with ``shifted_logits``, the logits of the token before the block, ``[B, V]``, by
            which a rescue judges its first token; None: that token has none.
        block: ``(start, stop)``, the positions of the block that is being decoded, where calls get
            the whole canvas: masks outside are no candidates, and count as decoded. None: all.
        owns_kv: the caller drops the keys and values that a masked call returns, so that the next
            one may write into them instead of copying the history.
        mask_sought: the id of the mask token that calls looked for last, None before.
        reached: calls that the backend saw, and generations that took settings from here.
        origins: where pasts came from that have slots of evicted tokens.
        eager: masked calls of a generation that the backend did not see.
        calls: the thread whose call is running, if one is, so that no other thread's can.
    """

    implicit = False

    def __init__(
        self,
        mask_token_id: int | None = None,
        alpha: float | None = None,
        visibility: str | None = None,
        signal: Choice | None = None,
        logits: str = "canvas",
        enabled: bool = True,
        shifted_logits: bool = False,
        exact: bool | None = None,
        first_step: str | None = None,
        rescue: Rescue = "auto",
        calibration: Any = None,
        audit: int | None = None,
        tokens_per_step: int | None = None,
        evict: bool | str | None = None,
    ) -> None:
        signal = given_signal(signal, calibration)
        self.calibration = None if calibration is None else read(calibration)
        if self.calibration is not None:
            found = self.calibration.in_session
            signal = found.get("signal") if signal is None else signal
            first_step = first_step or found.get("first_step")
            rescue = found.get("rescue", rescue) if rescue == "auto" else rescue
            enabled = enabled and bool(found)
        _check(alpha, visibility, logits, first_step, tokens_per_step, audit)
        if evict is not None and not is_evict(evict):
            raise ValueError(f"evict={evict!r}: expected True, False or 'auto'")
        self.evict = evict
        self.laps = Laps()
        self.tokens_per_step = tokens_per_step
        self.first_step = first_step
        self.rescue = check_rescue(rescue)
        self.decoding: Demand | None = None
        self.confidences = False
        self.last: Tensor | None = None
        self.mask_token_id = mask_token_id
        self.alpha = alpha
        self.visibility = visibility
        self.exact = exact
        self.signal = None if signal is None else check_signal(signal)
        self.stats = SessionStats(audit=None if audit is None else Audit(audit))
        self.retain_mask: Tensor | None = None
        self.rescue_mask: Tensor | None = None
        self.scores: Tensor | None = None
        self.enabled = enabled
        self.shifted_logits = shifted_logits
        self.block: tuple[int, int] | None = None
        self.packed = logits == "packed"
        self.logits: PackedLogits | None = None
        self.reader: Reader | None = None
        self.any_masked: bool | None = None
        self.edited: Tensor | None = None
        self.commits_exactly = False
        self.owns_kv = False
        self.mask_sought: int | None = None
        self.reached = self.eager = 0
        self.calls: dict[str, object] = {}
        self._limits = recompile_limits_hit()
        self._masked: Tensor | None = None
        self._require: Tensor | None = None
        self._states: dict[tuple[int, ...], BlockState] = {}
        self.origins = Origins()
        self._kept: tuple[int, ...] | None = None
        self._thread: object = None

    @property
    def masked(self) -> Tensor | None:
        """Which tokens of the next call are masked, bool ``[B, T]``; taken by that call."""
        return self._masked

    @masked.setter
    def masked(self, value: Tensor | None) -> None:
        if value is not None and value.dtype != torch.bool:
            raise ValueError(f"session.masked has dtype {value.dtype}: expected torch.bool")
        self._masked, self.any_masked = value, None

    @property
    def require(self) -> Tensor | None:
        """Masked tokens that the next call must not evict, bool ``[B, T]``; taken by that call.

        For loops that know before a call which positions they will decode after it.
        """
        return self._require

    @require.setter
    def require(self, value: Tensor | None) -> None:
        if value is not None and value.dtype != torch.bool:
            raise ValueError(f"session.require has dtype {value.dtype}: expected torch.bool")
        self._require = value

    def reset(self) -> None:
        """Forget every block: the next call of each model starts anew."""
        self.laps.end()
        self._states.clear()
        self.origins.clear()
        self._masked = self._require = None
        self.retain_mask = self.rescue_mask = self.scores = None
        self.logits = None

    close = reset  # for contextlib.closing

    def request(self, **changes: Any) -> Session:
        """The session of a generation inside this one: what :class:`Session` takes, as it is here,
        ``changes`` excepted; the audit is shared."""
        names = [name for name in signature(Session).parameters if name not in ("logits", "audit")]
        inner = Session(**{name: getattr(self, name) for name in names} | changes)
        inner.confidences = self.confidences
        inner.stats.audit = self.stats.audit
        return inner

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing of what a generation does."""
        settings = (
            self.alpha, self.visibility, self.signal, self.exact, self.first_step,
            self.tokens_per_step, self.evict,
        )  # fmt: skip
        unset = self.rescue == "auto" and all(setting is None for setting in settings)
        return self.enabled and unset

    def report(self) -> None:
        """At its end: warn if FOCUS had nothing to do, or was never asked."""
        if not self.enabled or self.stats.steps:
            missed = recompile_limits_hit() > self._limits
        elif self.stats.masked_dense:
            missed = False  # masked calls ran densely, by a choice, or with a warning of their own
        elif self.stats.dense_calls and self.mask_sought is not None:
            warning_once(log, NO_MASKED_CALL, self.stats.dense_calls, self.mask_sought)
            missed = False
        else:
            missed = bool(recompile_limits_hit()) and not self.reached
            if not (missed or self.reached) and was_compiled_for("focus"):
                warning_once(log, BYPASSED)
        if missed and self.enabled:
            warning_once(log, NOT_REACHED)
        audit = self.stats.audit
        if audit is not None and audit.calibrated is not None and audit.misses_more:
            warning_once(log, MORE_MISSED, audit, *(100 * share for share in audit.calibrated))

    def take_any_masked(self) -> bool | None:
        known, self.any_masked = self.any_masked, None
        return known

    def take_masked(self, ids: Tensor) -> Tensor | None:
        """The masks given for this call, if any."""
        masked, self._masked = self._masked, None
        if masked is None:
            return None
        expected = (ids.numel() // ids.shape[-1], ids.shape[-1])
        if masked.shape != expected:
            shape = tuple(masked.shape)
            raise ValueError(f"session.masked has shape {shape}: the token ids have {expected}")
        return masked.to(ids.device)

    def required(self, masked: Tensor) -> Tensor | None:
        """Those of the masked tokens ``[B, T]`` of this call that are not to be evicted, or None.

        Raises:
            ValueError: ``require`` has another shape.
        """
        if self._require is None:
            return None
        if self._require.shape != masked.shape:
            shape, expected = tuple(self._require.shape), tuple(masked.shape)
            raise ValueError(f"session.require has shape {shape}: the token ids have {expected}")
        return self._require.to(masked.device) & masked

    def in_block(self, masked: Tensor) -> Tensor:
        """Masks ``[B, T]`` inside the block that is being decoded.

        Raises:
            ValueError: the block is not within the T tokens.
        """
        if self.block is None:
            return masked
        start, stop = self.block
        if not 0 <= start < stop <= masked.shape[1]:
            raise ValueError(f"session.block={self.block}: the call has {masked.shape[1]} tokens")
        index = torch.arange(masked.shape[1], device=masked.device)
        return masked & (index >= start) & (index < stop)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Around one call of a compiled model.

        An interrupt behind :meth:`keep` takes the state back: the caller never saw the logits.

        Raises:
            RuntimeError: another thread's call is in progress.
        """
        thread = _THREAD.mark
        # no lock: one that an interrupt left closed would keep other threads out for ever
        if self.calls.setdefault("thread", thread) is not thread:
            raise RuntimeError(
                "two threads call a model in one session at the same time: enter "
                "focus_compile.session(...) in each of them"
            )
        self._kept = None
        try:
            try:
                self.reached += 1
                yield
            finally:
                self.edited = None
                self.calls.clear()
                self._require = None
        except BaseException as error:
            if self._kept is not None and not isinstance(error, Exception):
                self.forget(self._kept)
            raise

    def state(self, key: tuple[int, ...]) -> BlockState | None:
        return self._states.get(key)

    def forget(self, key: tuple[int, ...]) -> None:
        self._states.pop(key, None)

    def keep(self, key: tuple[int, ...], state: BlockState) -> None:
        for other in self._related(key):
            self.forget(other)  # the model with other layers, such as without its adapter
        self._thread = _THREAD.mark
        self._kept = key  # before: an interrupt in between takes it back
        self._states[key] = state

    def others(
        self, key: tuple[int, ...], ids: Tensor, masked: Tensor, history: History, shifted: bool
    ) -> Tensor | None:
        """Rows that start anew since other calls came in between, bool ``[B]``; None: none does.

        In a session that was entered none does: its calls are those of one loop.
        """
        return None

    def end_blocks(self, key: tuple[int, ...]) -> None:
        """A mask-free call: what a model is called with next starts anew."""
        for other in (key, *self._related(key)):
            if other in self._states:
                self._states[other].committed = True

    def changes_threads(self, key: tuple[int, ...]) -> bool:
        """Whether a model's last call was a masked one, made by another thread."""
        state = self._states.get(key)
        mid_block = state is not None and not state.committed
        return mid_block and self._thread is not _THREAD.mark

    def _related(self, key: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Models that share weights with one, itself excepted."""
        others = [other for other in self._states if other != key]
        return [other for other in others if not set(key).isdisjoint(other)] if others else []


def _check(
    alpha: float | None,
    visibility: str | None,
    logits: str,
    first_step: str | None,
    tokens_per_step: int | None,
    audit: int | None,
) -> None:
    """Raises:
    ValueError: one of a session's settings is out of range.
    """
    if alpha is not None and not alpha >= 1:
        raise ValueError(f"alpha={alpha!r}: expected a number >= 1")
    if visibility not in (None, "written", "prefix"):
        raise ValueError(f"visibility={visibility!r}: expected 'written' or 'prefix'")
    if logits not in ("canvas", "packed"):
        raise ValueError(f"logits={logits!r}: expected 'canvas' or 'packed'")
    if first_step is not None and first_step not in FIRST_STEPS:
        raise ValueError(f"first_step={first_step!r}: expected one of {FIRST_STEPS}")
    if tokens_per_step is not None and not is_count(tokens_per_step):
        raise ValueError(f"tokens_per_step={tokens_per_step!r}: expected an int from 1 on")
    if audit is not None and not is_count(audit):
        raise ValueError(f"audit={audit!r}: expected None, or a number of steps from 1 on")


def warn_outside() -> None:
    """Warn if a session is open elsewhere in the process; for a masked call that is in none."""
    if open_elsewhere():
        warning_once(log, OUTSIDE)


@contextmanager
def session(
    mask_token_id: int | None = None,
    alpha: float | None = None,
    visibility: str | None = None,
    signal: Choice | None = None,
    logits: str = "canvas",
    enabled: bool = True,
    shifted_logits: bool = False,
    exact: bool | None = None,
    first_step: str | None = None,
    rescue: Rescue = "auto",
    calibration: Any = None,
    audit: int | None = None,
    tokens_per_step: int | None = None,
    evict: bool | str | None = None,
) -> Iterator[Session]:
    """Scope of one generation: K/V slots, averages and progress live until it ends.

    It holds in the thread or task that enters it; entered in a generator, for the calls that this
    generator makes, wherever it is advanced (:mod:`focus_compile.runtime.ambient`). Calls in it
    come one after another: threads that work at the same time need a session each.

    Args:
        mask_token_id, alpha, visibility, signal, shifted_logits: see :class:`Session`.
        logits: ``"canvas"``: ``[B, T, V]``, 0 where evicted. ``"packed"``: the model's output holds
            an expanded zero in their place, and ``session.logits`` those of the retained tokens,
            ``[N, V]``: a large vocabulary is never spread over the canvas. It is None, and the
            output holds the logits after all, where the compiled program is not known to return
            what the model does: a part of the model is compiled, a module calls the compiled one,
            the graph breaks, or several outputs are as wide as the vocabulary. A warning says so.
        enabled: False runs the dense program, plain Inductor's, in every call: for comparisons.
        exact: True evicts nothing and feeds every token in every step: logits of FOCUS's programs
            equal eager's to rounding throughout. A large alpha alone does not: the delayed cache
            stops feeding final tokens, and keeps their keys and values as they were.
        first_step: ``"evict"``, ``"open"`` or ``"auto"``: see :class:`FocusConfig`. rescue: a
            probability: a row whose retained tokens all have less gets its evicted tokens computed
            in the same step, and decides among all. Give it the threshold of your own loop.
            ``"auto"``: the model's option. None: never.
        calibration: the file of :func:`focus_compile.calibrate`, or what it returned: sets signal,
            first_step and rescue where they are not given, and enabled to False where it says "do
            not evict". The model must be compiled for its layers.
        audit: one step in so many is computed densely as well, and ``session.stats.audit`` counts
            what was missed, and what dense makes another token of. It costs a dense step each, and
            changes nothing. None: none is. With a calibration, a warning comes at the session's end
            if more is missed than it has seen.
        tokens_per_step: a loop of one's own decodes as many tokens of each row in a step: at least
            so many masked ones are retained. Overrides the model's option where not None.
        evict: True, False or ``"auto"``, as the model's option; None: as that says.

    Raises:
        ValueError: a value is out of range.
    """
    opened = Session(
        mask_token_id=mask_token_id,
        alpha=alpha,
        visibility=visibility,
        signal=signal,
        logits=logits,
        enabled=enabled,
        shifted_logits=shifted_logits,
        exact=exact,
        first_step=first_step,
        rescue=rescue,
        calibration=calibration,
        audit=audit,
        tokens_per_step=tokens_per_step,
        evict=evict,
    )
    scope = Scope(opened)
    scope.enter()
    try:
        yield opened
        opened.report()
    finally:
        scope.exit()
        opened.reset()
        if (around := current_session()) is not None:
            around.reached += opened.reached
