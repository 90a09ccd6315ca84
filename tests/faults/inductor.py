"""A process in which Inductor meets faults, one after another; prints a JSON object.

``python -m tests.faults.inductor cold FOLDER``: an empty cache, a disk that is full, a cache folder
that cannot be made, a compiler that is not there. ``damaged``: entries of the cache that are
garbage. Only the prefix is compiled: what plain Inductor does is not the question, and it would
take as long again for the suffix.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from focus_compile import NotCompiled
from tests.faults.steps import first_call, new_run, same
from tests.support.harness import Run, eager_inner, eager_logits

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def halves_only() -> Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]:
    """Inductor for all but the dense program."""
    seen: list[GraphModule] = []

    def inner(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(graph)
        compiled: Callable[..., Any] = graph if len(seen) == 1 else compile_fx(graph, inputs)
        return compiled

    return inner


def full_disk() -> AbstractContextManager[Any]:
    return patch("torch._inductor.codecache.write_atomic", side_effect=FULL)


def no_folder(below: Path) -> AbstractContextManager[Any]:
    """A path below a regular file: no user can make a folder there, root neither."""
    return patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": str(below / "cache")})


def no_compiler() -> AbstractContextManager[Any]:
    return inductor_config.patch("cpp.cxx", ("/nonexistent/g++",))


def attempt(run: Run) -> dict[str, Any]:
    """What a masked call comes to."""
    call = first_call(run)
    try:
        logits = run.logits(call)
    except NotCompiled as error:
        (program,) = run.executables
        program.suffix.inner = eager_inner
        return {"program": error.program, "error": str(error), "dense": run.counts()[0]}
    return {"right": same(logits, eager_logits(run.model, call)), "counts": run.counts()}


def cold(run: Run, folder: Path) -> dict[str, Any]:
    regular = folder / "regular"
    regular.write_text("")
    out: dict[str, Any] = {}
    for name, fault in (
        ("folder", no_folder(regular)),
        ("disk", full_disk()),
        ("compiler", no_compiler()),
    ):
        with fault:
            out[name] = attempt(run)
    (program,) = run.executables
    with patch.object(program.suffix, "inner", side_effect=FULL):  # the prefix is compiled
        out["suffix"] = attempt(run)
    out["after"] = attempt(run)
    out["misses"] = counters["inductor"]["fxgraph_cache_miss"]
    return out


def damaged(run: Run, folder: Path) -> dict[str, Any]:
    """First the kernels of the prefix, then every entry of the graph cache."""
    libraries = sorted((folder / "cache").rglob("*.so"))
    kept = {path: path.read_bytes() for path in libraries}
    for path in libraries:
        path.write_bytes(b"garbage")
    out: dict[str, Any] = {"libraries": len(libraries), "library": attempt(run)}
    for path, content in kept.items():
        path.write_bytes(content)
    entries = [path for path in (folder / "cache" / "fxgraph").rglob("*") if path.is_file()]
    entries += [path for path in (folder / "cache" / "aotautograd").rglob("*") if path.is_file()]
    for path in entries:
        path.write_bytes(b"garbage")
    out["entries"] = len(entries)
    out["after"] = attempt(run)
    return out


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    run = new_run(inner=halves_only())
    run.configure(alpha=1e9)
    json.dump({"cold": cold, "damaged": damaged}[sys.argv[1]](run, Path(sys.argv[2])), sys.stdout)


if __name__ == "__main__":
    main()
