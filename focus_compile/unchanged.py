"""A captured graph that FOCUS leaves as it is: refused, or a call of a single token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.nn import Parameter

from focus_compile.session import current_session

__all__ = ["Unchanged", "model_key", "weights_of"]


def model_key(args: Sequence[Any]) -> tuple[int, ...]:
    """What tells one model from another: its parameters, among a graph's arguments."""
    return tuple(id(arg) for arg in args if isinstance(arg, Parameter))


def weights_of(args: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """What tells a model's weights from those it had before: their memory, and writes to it."""
    return tuple(
        (arg.data_ptr(), 0 if arg.is_inference() else arg._version)
        for arg in args
        if isinstance(arg, Parameter)
    )


class Unchanged:
    """The dense program alone; to a session its calls are what mask-free ones are.

    They end every block of the model, and take the masks that were given for them.
    """

    def __init__(self, dense: Callable[..., Any]) -> None:
        self.dense = dense

    def __call__(self, *args: Any) -> Any:
        session = current_session()
        if session is not None:
            session.masked = None
            session.end_blocks(model_key(args))
        return self.dense(*args)
