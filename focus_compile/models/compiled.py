"""A model whose own methods run its compiled forward: a twin beside it, or the model itself.

``torch.compile(model)`` returns a wrapper whose methods are the model's: ``compiled.generate()``
calls the forward that was not compiled. Here the compiled forward belongs to a class, derived from
the model's. The twin is an object of that class over the very ``__dict__`` of the model: weights,
buffers, modules and settings are the same ones, whoever sets them. In place, the model itself gets
the class. Either way ``self(...)`` and ``self.forward(...)`` run what is compiled, and no attribute
is added, so that state dicts, copies and pickles are as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from focus_compile import torch_private

__all__ = ["Compiled", "backend_of", "install", "is_in_place", "original", "remove", "twin"]

REPLACED = (
    "the forward of this model was replaced after it was compiled: undo "
    "(focus_compile.restore(model) where it is compiled in place), replace it, and compile then"
)
NOT_IN_PLACE = (
    "this model is not compiled in place: focus_compile.compile(model, in_place=True) does that"
)
Make = Callable[[nn.Module], Callable[..., Any]]
"""From the untouched model to a compiled form of its forward."""


@dataclass(frozen=True, eq=False)
class _State:
    """Of one compiled model.

    Attributes:
        plain: the model as it was: of its own class, over the same ``__dict__``.
        base: its class; own: a forward of the object's own at the time, or None.
        run: the compiled forward; backend: what compiled it.
        again: compiles another model likewise; for copies of a twin. In place it is None.
    """

    plain: nn.Module
    base: type[nn.Module]
    own: Any
    run: Callable[..., Any]
    backend: Any
    again: Callable[[nn.Module], nn.Module] | None


class _Forward:
    """The compiled forward, ahead of what the model's ``__dict__`` holds under that name."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        state: _State = owner._focus
        if instance is None:
            return state.base.forward
        if vars(instance).get("forward") is not state.own:
            raise RuntimeError(REPLACED)
        return state.run

    def __set__(self, instance: Any, value: Any) -> None:
        raise RuntimeError(REPLACED)

    def __delete__(self, instance: Any) -> None:
        raise RuntimeError(REPLACED)


class Compiled:
    """What the class of a compiled model has besides the model's own."""

    _focus: _State
    forward: Any = _Forward()

    def __init_subclass__(cls, **_: Any) -> None:
        """Of the model's own class, which may ask much of one, nothing is asked."""

    @property
    def _orig_mod(self) -> nn.Module:
        """The model as it was; as ``torch.compile`` calls it."""
        return self._focus.plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In place: as the untouched model. A twin: what compiles a copy of the model."""
        state = self._focus
        if state.again is not None:
            return state.again, (state.plain,)
        return state.plain.__reduce_ex__(1)  # from 2 on, pickle compares the class with this one


def twin(
    model: nn.Module, make: Make, backend: Any, again: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """A model that shares everything with ``model`` but its forward, which is compiled.

    Args:
        make: compiles the forward; backend: what :func:`backend_of` returns of the result.
        again: compiles a copy: what is done where the result is copied or pickled.
    """
    plain = original(model)
    made: nn.Module = object.__new__(_class(plain, make, backend, again))
    object.__setattr__(made, "__dict__", vars(plain))
    return made


def install(model: nn.Module, make: Make, backend: Any) -> nn.Module:
    """Compile the forward of ``model`` itself, until :func:`remove`; returns ``model``.

    Raises:
        ValueError: it is compiled in place already.
    """
    if isinstance(model, Compiled):
        raise ValueError(
            "this model is compiled already: compile the model itself, and call "
            "focus_compile.restore(model) before it is compiled in place again"
        )
    model = original(model)
    plain: nn.Module = object.__new__(type(model))
    object.__setattr__(plain, "__dict__", vars(model))
    object.__setattr__(model, "__class__", _class(plain, make, backend, None))
    return model


def remove(model: nn.Module) -> None:
    """Undo :func:`install`.

    Raises:
        ValueError: the model is not compiled in place.
    """
    kind: Any = type(model)
    if not is_in_place(model) or "_focus" not in vars(kind):
        raise ValueError(NOT_IN_PLACE)
    object.__setattr__(model, "__class__", kind._focus.base)


def is_in_place(model: Any) -> bool:
    """Whether a model itself was given its compiled forward."""
    return isinstance(model, Compiled) and model._focus.again is None


def original(model: nn.Module) -> nn.Module:
    """The untouched model of one that was compiled, by whichever function; else the model.

    Also of an object that hands its attributes on to a compiled model: it may time its calls.
    """
    plain: nn.Module = getattr(model, "_orig_mod", model)
    return plain


def backend_of(model: Any) -> Any:
    """The backend that compiled a model; None for an eager one."""
    if isinstance(model, Compiled):
        return model._focus.backend
    return torch_private.backend_of(model)


def _class(
    plain: nn.Module,
    make: Make,
    backend: Any,
    again: Callable[[nn.Module], nn.Module] | None,
) -> type[nn.Module]:
    base: Any = type(plain)
    own = vars(plain).get("forward")
    run = functools.wraps(plain.forward)(make(plain))
    same = {name: getattr(base, name) for name in ("__qualname__", "__module__", "__doc__")}
    state = _State(plain, base, own, run, backend, again)
    made: type[nn.Module] = type(base)(base.__name__, (Compiled, base), {**same, "_focus": state})
    return made
