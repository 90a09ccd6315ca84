"""What the package raises."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch.fx import Node

from focus_compile.refusals import Refusal

__all__ = [
    "EmptyCall",
    "EvictedTokenDecoded",
    "NotCompiled",
    "NothingToEvict",
    "UncommittedHistory",
    "Unsupported",
    "module_path",
    "source_line",
]


_LOCAL = re.compile(r"^L\['\w+'\]\.?")  # how Dynamo writes the variable that holds the model
_FRAME = re.compile(r'File "(.*)", line (\d+), in .*\n(.*)')  # of a traceback, as Dynamo keeps it


def module_path(node: Node) -> str:
    """Dotted path of the module whose forward produced ``node``; empty when unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return _LOCAL.sub("", str(path))


def source_line(node: Node) -> str:
    """The line of Python that ``node`` comes from, ``file:number `code```; empty when unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, number, code = frames[-1]
    return f"{file}:{number} `{code.strip()}`"


def _operator(node: Node) -> str:
    target: Any = node.target
    function = inspect.isfunction(target)
    return f"{target.__module__}.{target.__name__}" if function else str(target)


class Picklable(Exception):
    """An error whose text is computed from its arguments; it survives copy and pickle.

    Python rebuilds an exception from its text alone, which these constructors do not take.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.args), self.__dict__


def _rebuilt(error_class: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """An error as it was, its text included, without making it anew."""
    return error_class.__new__(error_class, *args)


class Unsupported(Picklable):
    """The graph is valid, but FOCUS cannot be applied to it soundly.

    Made of an entry of the catalogue (refusals.py), the operator at fault, and a value for every
    field of the entry's reason. Code outside of this package may give a reason alone, as a string.

    Attributes:
        reason: what is wrong, in one sentence.
        cure: what a user can do about it; empty for a reason alone.
        op: the operator at fault, or empty.
        module: dotted path of the module that called it, or empty.
        line: the model's own line that called it, ``file:number `code```, or empty.
    """

    def __init__(
        self, refusal: Refusal | str, node: Node | None = None, /, **fields: object
    ) -> None:
        if isinstance(refusal, str):
            self.reason, self.cure = refusal, ""
        else:
            self.reason, self.cure = refusal.filled(fields), refusal.cure
        self.line = "" if node is None else source_line(node)
        self.op = "" if node is None else _operator(node)
        self.module = "" if node is None else module_path(node)
        location = f" [op {self.op}" if self.op else ""
        location += f" in module {self.module}]" if self.module else "]" if location else ""
        super().__init__(self.reason + location)

    def to_dict(self) -> dict[str, str]:
        """Its attributes and the cure, as plain data."""
        data = {"reason": self.reason, "op": self.op, "module": self.module, "line": self.line}
        return data | {"cure": self.cure}


class NothingToEvict(Unsupported):
    """The block is a single token: the dense program is all there is to run."""


class NotCompiled(Picklable, RuntimeError):
    """The compiler failed at a program of FOCUS's; this call gave no result, the next one retries.

    ``program``: ``"prefix"`` or ``"suffix"``; the compiler's own error is the cause.
    """

    def __init__(self, program: str, error: Exception) -> None:
        self.program = program
        super().__init__(
            f"the {program} was not compiled, and this call gave no result (the next one compiles "
            f"it again): {type(error).__name__}: {error}"
        )


class EmptyCall(Picklable, ValueError):
    """There is no row, or no token in a row."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(f"the token ids have shape {shape}: batch or block is empty")


class UncommittedHistory(Picklable, RuntimeError):
    """The history holds what a masked call returned of tokens that it had evicted: nothing.

    ``slots``: how many such tokens there are.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        super().__init__(
            f"slots of evicted tokens in the past: {slots}. What a masked call returned was kept, "
            "and has no keys and values of them: commit each block with one call of its decoded "
            "tokens, and crop the cache after every masked call; or run the call that fills the "
            "cache densely (session.enabled = False), or, where a prompt holds the mask token, "
            "with session.masked all zeros"
        )


class EvictedTokenDecoded(Picklable, RuntimeError):
    """A position was decoded that the last call had evicted: its logits were not computed."""

    def __init__(self, row: int, position: int) -> None:
        self.row, self.position = row, position
        super().__init__(
            f"row {row} decoded position {position} of the block, which the last call evicted: "
            "choose among the positions of session.retain_mask; or say how the loop decodes: "
            "tokens_per_step=k retains at least k tokens of a row, session.require the positions "
            "that the next step decodes; or evict nothing: options={'evict': False}"
        )
