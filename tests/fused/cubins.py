"""Compile the Triton kernels for GPUs that are not there, and read what they take of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from focus_compile.ops.triton import kernels, moves
from focus_compile.ops.triton.layers import COLUMNS, ROWS
from focus_compile.ops.triton.operators import ROW, SELECT, tile

CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
"""Comes with Triton's wheel, as ptxas does."""


@dataclass(frozen=True)
class Usage:
    """What a thread takes (registers, bytes of stack and local memory), a block (shared bytes)."""

    registers: int
    stack: int
    local: int
    shared: int


def signatures(element: str) -> dict[str, dict[str, str]]:
    """Triton's types of every kernel's arguments, for queries and keys of type ``element``."""
    ints, floats, bools, longs = "*i32", "*fp32", "*i1", "*i64"
    attend = {"query": f"*{element}", "key": f"*{element}", "order": ints, "count": ints}
    attend |= {"highest": floats, "total": floats}
    sizes = {"tokens": "i32", "heads": "i32", "groups": "i32", "scale": "fp32"}
    return {
        "list_masked": {"masked": bools, "order": ints, "rank": ints, "count": ints}
        | {"tokens": "i32"},
        "attend_rows": attend | sizes,
        "attend_columns": attend | {"columns": floats} | sizes,
        "select": dict.fromkeys(("importance0", "importance1", "weights", "bias"), floats)
        | {"masked": bools, "fed": bools, "progress": longs, "average": floats, "alpha": floats}
        | {"delta": floats, "chosen": "*i8", "retained": bools, "count": longs, "tokens": "i32"},
        "number_kept": {"keep": bools}
        | dict.fromkeys(("ends", "order", "inverse", "places"), longs)
        | {"tokens": "i32", "rows": "i32"},
        "join_history": dict.fromkeys(("past", "stale"), f"*{element}")
        | {"written": bools, "out": f"*{element}"}
        | _numbers("history length outer inner past_b past_o past_t stale_b stale_o stale_t"),
        "join_rows": {"new": f"*{element}", "tokens": longs, "out": f"*{element}"}
        | _numbers("history length inner new_o new_n out_b out_o out_t"),
        "fold_queries": {"query": f"*{element}", "index": longs, "out": f"*{element}"}
        | _numbers("most heads size query_h query_n"),
        "unfold_lines": {"lines": f"*{element}", "index": longs, "out": f"*{element}"}
        | _numbers("most heads share size line_b line_g line_r"),
    }


def _numbers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def usage(name: str, arch: int, element: str = "bf16", size: int = 128) -> Usage:
    """Compile one kernel for compute capability ``arch``; ``size``: of the heads."""
    kernel = getattr(moves if hasattr(moves, name) else kernels, name)
    types = signatures(element)[name]
    constants = {
        "list_masked": ROW, "select": SELECT, "number_kept": ROW,
        "join_history": {"ROWS": ROWS, "COLUMNS": COLUMNS},
        **{key: {"COLUMNS": size} for key in ("join_rows", "fold_queries", "unfold_lines")},
    }.get(name, tile(size))  # fmt: skip
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {
        "enable_fp_fusion": True
    }  # as by default, of which Triton 3.9 warns that it will change
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    return Usage(found["REG"], found["STACK"], found["LOCAL"], made.metadata.shared)
