"""Whose session a call is in: generators, threads, tasks, context managers, closed sessions."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
import torch

import focus_compile
from focus_compile import Session, session
from focus_compile.runtime.ambient import _OPEN, current_session, inside


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    assert current_session() is None and not _OPEN.all()
    yield
    gc.collect()
    assert current_session() is None and not _OPEN.all()


Seen = Session | None


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Ours: torch logs its traces, too."""
    ours = [record for record in caplog.records if record.name.startswith("focus_compile")]
    return [record for record in ours if record.levelno >= logging.WARNING]


def stream(steps: int = 3) -> Iterator[tuple[Session, Seen]]:
    """Its own session, and the current one, at each step."""
    with session() as own:
        for _ in range(steps):
            yield own, current_session()


@contextmanager
def wrapper() -> Iterator[Session]:
    with session() as own:
        assert current_session() is own
        yield own
        assert current_session() is own


@contextmanager
def delegating() -> Iterator[Session]:
    yield from entered()


def entered() -> Iterator[Session]:
    with session() as own:
        yield own


def through_wrapper(opened: Callable[[], object] = wrapper) -> Iterator[tuple[Session, Seen]]:
    with opened() as own:  # type: ignore[attr-defined]
        for _ in range(3):
            yield own, current_session()


def through_stack() -> Iterator[tuple[Session, Seen]]:
    def helper(stack: ExitStack) -> Session:
        return stack.enter_context(session())

    with ExitStack() as stack:
        own = helper(stack)
        for _ in range(3):
            yield own, current_session()


def through_yield_from() -> Iterator[tuple[Session, Seen]]:
    yield from stream()


STREAMS = [stream, through_wrapper, through_stack, through_yield_from]


@pytest.mark.parametrize("make", STREAMS)
def test_streams_advanced_in_turn(make: Callable[[], Iterator[tuple[Session, Seen]]]) -> None:
    one, two = make(), make()
    for (first, seen_first), (second, seen_second) in zip(one, two, strict=True):
        assert seen_first is first and seen_second is second and first is not second
        assert current_session() is None
    with session() as around:
        for own, seen in make():
            assert seen is own and current_session() is around


@pytest.mark.parametrize("make", STREAMS)
def test_a_stream_advanced_by_other_threads(
    make: Callable[[], Iterator[tuple[Session, Seen]]],
) -> None:
    one = make()
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            own, seen = pool.submit(next, one).result()
            assert seen is own
            assert pool.submit(current_session).result() is None
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(next, one, "end").result() == "end"


def test_a_stream_closed_early() -> None:
    one = stream()
    next(one)
    one.close()  # type: ignore[attr-defined]
    assert not _OPEN.all()
    two = stream()
    next(two)
    del two
    assert not _OPEN.all()

    class Holder:
        def __init__(self) -> None:
            self.steps = self.stream()
            next(self.steps)

        def stream(self) -> Iterator[None]:
            with session():
                yield
                yield

    Holder()  # a cycle: the frame knows self, self knows the generator
    gc.collect()
    assert not _OPEN.all()


def test_inside_and_outside_of_one_another() -> None:
    """A stream within a stream, and a session within its body."""

    def outer() -> Iterator[None]:
        with session() as own:
            for inner, seen in stream():
                assert seen is inner and current_session() is own
                with session() as third:
                    assert current_session() is third
                with inside(inner):
                    assert current_session() is inner
                assert current_session() is own
                yield

    for _ in outer():
        assert current_session() is None


@pytest.mark.parametrize("make", [wrapper, delegating])
def test_context_managers(make: Callable[[], contextmanager]) -> None:  # type: ignore[valid-type]
    with make() as own:  # type: ignore[attr-defined]
        assert current_session() is own
        with make() as second:  # type: ignore[attr-defined]
            assert current_session() is second
        assert current_session() is own
    with ExitStack() as stack:
        own = stack.enter_context(make())  # type: ignore[arg-type]
        assert current_session() is own


@pytest.fixture
def opened() -> Iterator[Session]:
    with session() as own:
        yield own


@pytest.fixture
def opened_by_wrapper() -> Iterator[Session]:
    with wrapper() as own:
        yield own


def test_fixtures(opened: Session) -> None:
    assert current_session() is opened


def test_fixtures_of_context_managers(opened_by_wrapper: Session) -> None:
    assert current_session() is opened_by_wrapper


async def async_stream(threads: bool) -> AsyncIterator[tuple[Session, Seen]]:
    with session() as own:
        for _ in range(3):
            await asyncio.sleep(0)
            seen = await asyncio.to_thread(current_session) if threads else current_session()
            yield own, seen


@asynccontextmanager
async def async_wrapper() -> AsyncIterator[Session]:
    with session() as own:
        await asyncio.sleep(0)
        yield own


@pytest.mark.parametrize("threads", [False, True])
def test_asynchronous_streams(threads: bool) -> None:
    async def consume() -> None:
        one, two = async_stream(threads), async_stream(threads)
        for _ in range(3):
            first, seen_first = await anext(one)
            assert current_session() is None
            assert await asyncio.to_thread(current_session) is None
            second, seen_second = await anext(two)
            assert seen_first is first and seen_second is second
        for left in (one, two):
            assert await anext(left, None) is None
        async with async_wrapper() as own:
            assert current_session() is own
            assert await asyncio.to_thread(current_session) is own
            inherited = await asyncio.create_task(coroutine())
            assert inherited is own
        half = async_stream(threads)
        await anext(half)
        await half.aclose()  # type: ignore[attr-defined]
        assert current_session() is None

    async def coroutine() -> Seen:
        await asyncio.sleep(0)
        return current_session()

    async def both() -> None:
        await asyncio.gather(consume(), consume())

    asyncio.run(both())


def test_tasks_have_sessions_of_their_own() -> None:
    async def task() -> None:
        with session() as own:
            for _ in range(4):
                await asyncio.sleep(0)
                assert current_session() is own
                assert await asyncio.to_thread(current_session) is own

    async def tasks() -> None:
        await asyncio.gather(*(task() for _ in range(3)))

    def runs_a_loop() -> Iterator[None]:
        with session():
            asyncio.run(tasks())
            yield

    assert list(runs_a_loop()) == [None]


def test_a_closed_session_is_current_nowhere() -> None:
    with session() as own:
        copied = contextvars.copy_context()
        assert copied.run(current_session) is own
    assert copied.run(current_session) is None


def compiled_toy() -> Callable[..., object]:
    from tests.support.toy import Toy

    def quick(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        return graph

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        return focus_compile.focus_backend(gm, inputs, options={"mask_token_id": 20}, inner=quick)

    torch.manual_seed(0)
    compiled: Callable[..., object] = torch.compile(Toy().eval(), backend=backend)
    return compiled


def test_calls_outside_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """In another thread, while a session is open; not when there is none."""
    compiled = compiled_toy()
    ids = torch.full((2, 7), 20)

    @torch.no_grad()
    def call() -> None:
        compiled(ids)

    call()
    assert not warnings_of(caplog)
    with session(), ThreadPoolExecutor(1) as pool:
        call()
        assert not warnings_of(caplog)
        for _ in range(2):
            pool.submit(call).result()
    (record,) = warnings_of(caplog)
    assert record.levelno == logging.WARNING
    assert "is in no session, while one is open elsewhere" in record.getMessage()
    with session() as own, ThreadPoolExecutor(1) as pool:
        with own.calling(), pytest.raises(RuntimeError, match="two threads call a model in one"):
            pool.submit(contextvars.copy_context().run, call).result()
    one = call_of_a_stream(compiled, ids)
    next(one)
    told = "a session is in mid-block, and in this call gradients"
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match=told):
        pool.submit(next, one).result()


def call_of_a_stream(compiled: Callable[..., object], ids: torch.Tensor) -> Iterator[None]:
    with session():
        with torch.no_grad():
            compiled(ids)
        yield
        compiled(ids)
        yield


def test_a_thread_with_the_number_of_one_that_has_ended() -> None:
    """It is another thread all the same: that its modes make the call dense is told."""
    compiled, ids = compiled_toy(), torch.full((2, 7), 20)

    def advanced(stream: Iterator[None]) -> int:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(next, stream).result()
            return pool.submit(threading.get_ident).result()

    for _ in range(50):
        one, numbers = call_of_a_stream(compiled, ids), list[int]()
        numbers.append(advanced(one))
        with ThreadPoolExecutor(1) as pool:
            numbers.append(pool.submit(threading.get_ident).result())
            told = pool.submit(next, one).exception()
        assert "a session is in mid-block, and in this call gradients" in str(told)
        if len(set(numbers)) == 1:
            break
