"""What the package raises."""

from __future__ import annotations

from torch.fx import Node

__all__ = ["Unsupported", "module_path"]


def module_path(node: Node) -> str:
    """Dotted path of the module whose forward produced ``node``; empty when unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return str(path).replace("L['self'].", "").replace("L['self']", "")


class Unsupported(Exception):
    """The graph is valid, but FOCUS cannot be applied to it soundly.

    Attributes:
        reason: one sentence that a user can act on.
        op: the operator at fault, or empty.
        module: dotted path of the module that called it, or empty.
    """

    def __init__(self, reason: str, node: Node | None = None) -> None:
        self.reason = reason
        self.op = "" if node is None else str(node.target)
        self.module = "" if node is None else module_path(node)
        where = f" [op {self.op}" if self.op else ""
        where += f" in module {self.module}]" if self.module else "]" if where else ""
        super().__init__(reason + where)
