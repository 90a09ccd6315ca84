"""What may happen in a sequence: one function per event, each with a number that varies it."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import TYPE_CHECKING, Any

import torch

import focus_compile
from tests.fuzz.caller import LONGEST, Caller
from tests.fuzz.faults import Accident, failing_program, failing_signal
from tests.fuzz.level import Level
from tests.fuzz.oracle import TOLERANCE, Oracle
from tests.fuzz.subjects import outside as elsewhere

if TYPE_CHECKING:
    from tests.fuzz.play import Player


def step(player: Player, number: int) -> None:
    """Decode some of what was retained, then the next call of the block."""
    level = player.here
    if level.oracle.last is not None and _goes_on(player):
        known = level.oracle.last.retained
        if player.plan.shifted and level.focus is not None:
            known = torch.cat([torch.ones_like(known[:, :1]), known[:, :-1]], 1)
        level.caller.decode(known, number)
    player.masked()
    if not level.caller.inside().any():
        commit(player, number)


def _goes_on(player: Player) -> bool:
    last = player.here.oracle.last
    return last is not None and last.ids.shape == player.here.caller.ids.shape


def commit(player: Player, number: int) -> None:
    """The finished block, densely; then the next one."""
    caller = player.here.caller
    caller.fill()
    player.unmasked()
    if player.subject.dialect.history and player.here.focus is not None:
        caller.history += caller.tokens
    if caller.history > LONGEST:
        caller.history = player.plan.history
        caller.rows = [row + 50_000 for row in caller.rows]
    caller.open_block(number)


def dense(player: Player, number: int) -> None:
    """A masked call with FOCUS switched off."""
    focus = player.here.focus
    if focus is None:
        return player.masked()
    focus.enabled = False
    player.unmasked()
    focus.enabled = True
    return None


def single(player: Player, number: int) -> None:
    """A call of one token, which no program but the dense one serves."""
    level, caller = player.here, player.here.caller
    if level.focus is None:
        return None
    one = Caller(number, caller.batch, 1, caller.history, given=False)
    one.fill()
    draw = one.draw()
    level.focus.block = None
    level.focus.masked = one.masked if number % 2 else None
    actual = player.subject.logits(player.subject.compiled, draw)
    expected = player.subject.logits(player.subject.model, draw)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
    level.oracle.ended = True
    return None


def interrupt(player: Player, number: int) -> None:
    """An exception in the signal, or amid the nodes of prefix or suffix; then go on."""
    focus = player.here.focus
    if number % 3 == 0 and focus is not None:
        player.masked(lambda: failing_signal(focus))
    else:
        player.masked(lambda: failing_program(suffix=number % 3 == 1, node=number))


def crash(player: Player, number: int) -> None:
    """A step that fails ends the session."""
    interrupt(player, number)
    leave(player, number)
    enter(player, number)


def outside(player: Player, number: int) -> None:
    """A call of another task, outside every session, in mid-block."""
    elsewhere(_alone, player, number)


def _alone(player: Player, number: int) -> None:
    level = player.here
    caller = Caller(number, level.caller.batch, level.caller.tokens, player.plan.history, False)
    player.levels.append(Level(caller, Oracle(player.config), None))
    try:
        player.masked()
    finally:
        player.levels.pop()


def enter(player: Player, number: int) -> None:
    """A session within the session."""
    plan, outer = player.plan, player.here.caller
    if len(player.levels) > 3:
        return
    arguments: dict[str, Any] = {"logits": "packed" if plan.packed else "canvas"}
    if plan.named:
        arguments |= {"alpha": plan.alpha, "visibility": plan.visibility, "exact": plan.exact}
    scope = focus_compile.session(shifted_logits=plan.shifted, rescue=plan.rescue, **arguments)
    focus = scope.__enter__()
    focus.owns_kv, focus.commits_exactly = plan.owns, plan.commits and plan.delayed
    skips = focus.commits_exactly and not plan.exact
    oracle = Oracle(changed(player.config, rescue=plan.rescue), plan.shifted, skips)
    caller = Caller(plan.seed + number, outer.batch, plan.tokens, plan.history, plan.given)
    player.levels.append(Level(caller, oracle, focus, scope))


def leave(player: Player, number: int) -> None:
    """The end of a session, now and then by an exception."""
    if player.here.scope is None:
        return
    scope = player.levels.pop().scope
    error = Accident() if number % 2 else None
    assert not scope.__exit__(error and Accident, error, None)


def reset(player: Player, number: int) -> None:
    if player.here.focus is not None:
        player.here.focus.reset()
        player.here.oracle.forget()


def manner(player: Player, number: int) -> None:
    """Masks are given by hand from here on, or no longer."""
    if player.here.focus is not None:
        player.here.caller.given = not player.here.caller.given


def remask(player: Player, number: int) -> None:
    """A decoded position of one row is masked again."""
    caller = player.here.caller
    row = number % caller.batch
    caller.masked[row, number % caller.tokens] = True
    player.masked()


def rewrite(player: Player, number: int) -> None:
    """A token of one row is another one."""
    caller = player.here.caller
    row, place = number % caller.batch, number % caller.tokens
    caller.ids[row, place] = (caller.ids[row, place] + 1) % 50
    player.masked()


def swap(player: Player, number: int) -> None:
    """The rows in another order."""
    caller = player.here.caller
    caller.keep_rows([(row + number) % caller.batch for row in range(caller.batch)])
    player.masked()


def replace(player: Player, number: int) -> None:
    """Another request in one row: another history, all masks."""
    caller = player.here.caller
    row = number % caller.batch
    caller.rows[row] = 200_000 + number
    if number % 2:
        caller.masked[row] = True
    player.masked()


def resize(player: Player, number: int) -> None:
    """A batch of other rows, or blocks of another length."""
    caller = player.here.caller
    if number % 2:
        caller.keep_rows([row % caller.batch for row in range(2 + number % 3)])
    else:
        caller.tokens = 2 + number % 7
        caller.window = None
        caller.open_block(number)
    player.masked()


def shrink(player: Player, number: int) -> None:
    """A shorter history: another one for every row."""
    caller = player.here.caller
    if caller.history > player.plan.history:
        caller.history -= 1
    player.masked()


def evicted(player: Player, number: int) -> None:
    """A step, and then a position is decoded that it evicted."""
    player.masked()
    caller, last = player.here.caller, player.here.oracle.last
    if last is None or not _goes_on(player):
        return
    before = caller.masked
    wrong = last.masked & ~last.retained & before
    if wrong.any():
        row, place = wrong.nonzero()[number % int(wrong.sum())].tolist()
        caller.masked = before.clone()
        caller.masked[row, place] = False
        if caller.inside().any():
            refused = player.here.oracle.expected_error(caller.draw()) is not None
            player.masked()
            caller.masked = before if refused else caller.masked
        else:
            caller.masked = before


def grow(player: Player, number: int) -> None:
    """A longer history, without a mask-free call: another path has made it."""
    caller = player.here.caller
    if not player.subject.dialect.history or caller.history > LONGEST:
        return
    caller.history += 1 + number % 2
    player.masked()


def misshape(player: Player, number: int) -> None:
    """Masks of another shape are refused, and forgotten."""
    focus, caller = player.here.focus, player.here.caller
    if focus is None:
        return
    focus.block = caller.window
    focus.masked = torch.ones(caller.batch, caller.tokens + 1, dtype=torch.bool)
    try:
        player.subject.logits(player.subject.compiled, caller.draw())
    except ValueError:
        return
    raise AssertionError("expected ValueError")


def budget(player: Player, number: int) -> None:
    """Another alpha and visibility in mid-block."""
    focus = player.here.focus
    if focus is None:
        return
    focus.alpha = (1.0, 1.3, 2.5)[number % 3]
    focus.visibility = ("written", "prefix")[number % 2]
    alpha = player.config.alpha if player.plan.exact else focus.alpha
    oracle = player.here.oracle
    oracle.config = changed(oracle.config, alpha=alpha, visibility=focus.visibility)
    player.masked()


def gate(player: Player, number: int) -> None:
    """From here on rows are rescued where nothing retained is as sure, or no longer."""
    level = player.here
    if level.focus is None:
        return
    level.focus.rescue = (0.05, 0.12, 1.0, None)[number % 4]
    level.oracle.config = changed(level.oracle.config, rescue=level.focus.rescue)
    player.masked()


def window(player: Player, number: int) -> None:
    """The block at hand is a part of the canvas."""
    caller = player.here.caller
    if player.here.focus is None:
        return
    start = number % (caller.tokens - 1)
    before = caller.window
    caller.window = (start, caller.tokens - number % 2)
    if caller.inside().any() and player.here.oracle.expected_error(caller.draw()) is None:
        player.masked()
    else:
        caller.window = before
