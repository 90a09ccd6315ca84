"""A model whose methods are adapted: modules get a class derived from their own, for a while."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType, TracebackType
from typing import Any

from torch import nn

from focus_compile.adapters.experts import METHOD, Experts, experts_of, without_loop
from focus_compile.adapters.filled import filled_tests, may_test, told
from focus_compile.adapters.looks_up import looked_up, may_look_up
from focus_compile.adapters.source import place, read, rebuilt
from focus_compile.torch_private import captures_look_ups, untraced

__all__ = ["Adaptation", "adaptation", "adapted"]

log = logging.getLogger(__name__)


class Adapted:
    """What the class of an adapted module has besides the module's own."""

    _focus_plain: type[nn.Module]

    def __init_subclass__(cls, **_: Any) -> None:
        """Of the module's own class, which may ask much of one, nothing is asked."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the module that it was."""
        plain = object.__new__(self._focus_plain)
        object.__setattr__(plain, "__dict__", vars(self))
        return plain.__reduce_ex__(1)  # from 2 on, pickle compares the class with this one


@dataclass(eq=False)
class Adaptation:
    """The modules of a model that are adapted inside of its ``with``, which may be entered by
    several threads, and again; nothing else of them changes.

    Attributes:
        classes: the class of each such module; names: of arguments whose values methods test.
        notes: what was replaced, a line each.
        looks_up: whether methods look up positions or numbers in the model's arguments.
    """

    classes: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = field(default_factory=list)
    names: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)
    looks_up: bool = False
    inside: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Adaptation:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                for module, _, replacing in self.classes:
                    object.__setattr__(module, "__class__", replacing)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for module, plain, _ in self.classes:
                    object.__setattr__(module, "__class__", plain)

    @contextmanager
    def calling(
        self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[None]:
        """Around a call of the model's forward, which has this signature."""
        if not self.classes:
            yield
            return
        with self, told(_arguments(signature, args, kwargs), self.names):
            yield


@contextmanager
def adapted(model: nn.Module) -> Iterator[nn.Module]:
    """A model adapted inside of the ``with``, for eager calls and whichever compiler."""
    made, known = adaptation(model), inspect.signature(model.forward)
    open_calls: list[Any] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = told(_arguments(known, args, kwargs), made.names)
        call.__enter__()
        open_calls.append(call)

    def leave(*_: Any) -> None:
        if open_calls:  # else the call failed before it began
            open_calls.pop().__exit__(None, None, None)

    handles: list[Any] = []
    if made.names:
        first = model.register_forward_pre_hook(untraced(enter), prepend=True, with_kwargs=True)
        last = model.register_forward_hook(untraced(leave), always_call=True)
        handles = [first, last]
    try:
        with made, captures_look_ups() if made.looks_up else nullcontext():
            yield model
    finally:
        for handle in handles:
            handle.remove()


def adaptation(model: nn.Module) -> Adaptation:
    """What of a model's modules can be adapted; a line at INFO says what is."""
    made = Adaptation()
    arguments = tuple(inspect.signature(model.forward).parameters)[1:]  # but the ids
    classes: dict[tuple[type[nn.Module], Experts | None], type[nn.Module] | None] = {}
    known: dict[tuple[str, str], Experts | None] = {}
    for module in model.modules():
        kind, experts = type(module), experts_of(module, known)
        if (kind, experts) not in classes:
            classes[kind, experts] = _adapted(module, experts, made, arguments)
        replacing = classes[kind, experts]
        if replacing is not None:
            made.classes.append((module, kind, replacing))
    for note in made.notes:
        log.info("%s", note)
    return made


def _adapted(
    module: nn.Module, experts: Experts | None, made: Adaptation, arguments: Collection[str]
) -> type[nn.Module] | None:
    """A class whose methods read no values in the middle of a graph; None where none does."""
    kind = type(module)
    if issubclass(kind, Adapted):
        return None
    methods: dict[str, Callable[..., Any]] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch":
            break
        for name, function in vars(base).items():
            if name in methods or getattr(kind, name, None) is not function:
                continue
            loop = None if experts is None else without_loop(module, experts, function)
            if loop is not None and experts is not None:
                methods |= {name: loop, METHOD: experts.method()}
                made.notes.append(
                    f"adapted {kind.__name__}.{name} ({place(function)}): its loop over "
                    f"`{experts.name}` is one operator"
                )
                continue
            method = read(function) if _may_read(function) else None
            if method is None:
                continue
            if sought := looked_up(method, arguments):
                made.looks_up = True
                made.notes.append(
                    f"{kind.__name__}.{name} ({place(function)}): what it looks up in "
                    f"{_listed(sought)} is looked up before the graph"
                )
            found = filled_tests(method)
            if found is None:
                continue
            tree, names = found
            methods[name] = rebuilt(method, tree)
            made.names |= names
            made.notes.append(
                f"adapted {kind.__name__}.{name} ({place(function)}): whether {_listed(names)} "
                "has a zero is read once in a call, before the graph"
            )
    if not methods:
        return None
    same = {name: getattr(kind, name) for name in ("__qualname__", "__module__", "__doc__")}
    maker: Any = type(kind)
    replacing: type[nn.Module] = maker(
        kind.__name__, (Adapted, kind), {**same, **methods, "_focus_plain": kind}
    )
    return replacing


def _may_read(function: Any) -> bool:
    return isinstance(function, FunctionType) and (may_test(function) or may_look_up(function))


def _listed(names: frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name; those that the forward takes as ``**kwargs`` too."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return dict(kwargs)  # the call itself will say what is wrong
    return {**bound.arguments, **kwargs}
