"""The names of what the runtime gives to the programs and gets from them."""

from __future__ import annotations

import torch

from focus_compile.graph.inputs import Input
from focus_compile.graph.sizes import Extent

__all__ = ["CONTROL", "runtime_inputs", "slot_name"]

CONTROL = ("retain_mask", "order", "inverse", "places", "sizes", "delta")
"""What the pass ``retain`` adds to a graph's outputs, as one tuple after its own."""


def runtime_inputs(device: torch.device, batch: Extent) -> tuple[Input, ...]:
    """What the passes add to a graph's inputs, slots excepted; ``batch`` is 1 or its name."""
    boolean, integer, real = torch.bool, torch.int64, torch.float32
    shapes: dict[str, tuple[torch.dtype, tuple[Extent, ...]]] = {
        "masked": (boolean, (batch, "token")),
        "fed": (boolean, (batch, "token")),
        "progress": (integer, (batch,)),
        "average": (real, (batch,)),
        "alpha": (real, ()),
        "signal_weights": (real, (2,)),
        "signal_bias": (real, (batch, "token")),
        "fed_tokens": (integer, ("fed",)),
        "fed_inverse": (integer, (batch, "token")),
        "fed_rows": (integer, (batch, "fed_row")),
        "tokens": (integer, ("retained",)),
        "rows": (integer, (batch, "retained_row")),
        "written01": (boolean, (batch, "token")),
        "written": (boolean, (batch, "token")),
        "prefix_visibility": (boolean, ()),
    }
    made = [Input(name, shape, dtype, device) for name, (dtype, shape) in shapes.items()]
    return (*made, Input("reuse", (), boolean, torch.device("cpu")))


def slot_name(layer: int, part: int) -> str:
    """Input that holds the stale keys (part 0) or values (part 1) of a layer."""
    return f"slots{layer}_{'kv'[part]}"
