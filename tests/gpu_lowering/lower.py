"""Lower the programs of a model to Triton and cubins, on a machine without a GPU.

python -m tests.gpu_lowering.lower --model qwen3 held/reduce-overhead --arch 90 --out FOLDER

The models go through the real backend; their tensors are fake ones on a fake GPU. ``/`` is followed
by Inductor's mode. Writes into a folder for each, named like it, the output code of each program,
``dense.py``, ``prefix.py`` and ``suffix.py``, and ``report.json``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from focus_compile import backend, focus_backend, torch_private
from focus_compile.generation.cache import hold
from focus_compile.programs.program import Program
from focus_compile.runtime.executable import Executable
from tests.gpu_lowering.fake_gpu import ARCHES, Cubin, fake_gpu, gpu_attention, unfit
from tests.gpu_lowering.output_code import read, tidy
from tests.support.dialects import DIALECTS, Dialect, Draw, qwen3
from tests.support.harness import CACHE
from tests.support.models.llada import LLaDA
from tests.support.quantised import scaled, small


def held(model: Any, draw: Draw) -> dict[str, Any]:
    """A call of ``generate``: the cache holds room for the block, and more behind it."""
    given = MOE.arguments(model, draw)
    layers = given[CACHE].layers
    assert hold(layers, draw.history + draw.ids.shape[1] + 3)
    for layer in layers:
        layer.open(draw.history, draw.ids.shape[1])
    return given


def quantised(model: Any, draw: Draw) -> dict[str, Any]:
    """A call of a model whose weights become int8 codes and scales, once it is on the fake GPU."""
    scaled(1)(model)
    return MOE.arguments(model, draw)


MOE = DIALECTS["sdar-moe-grouped"]
MODELS = {
    "qwen3": Dialect(lambda: qwen3("sdpa"), MOE.arguments, MOE.logits),
    "moe": MOE,
    "canvas": replace(DIALECTS["llada-canvas"], build=lambda: LLaDA(layers=4, tied=True)),
    "qwen3-5": Dialect(lambda: qwen3("sdpa", layers=5), MOE.arguments, MOE.logits),
    "held": Dialect(lambda: qwen3("sdpa"), held, MOE.logits),
    "int8": Dialect(small, quantised, MOE.logits),
    "held-5": Dialect(lambda: qwen3("sdpa", layers=5), held, MOE.logits),
    "llada": DIALECTS["llada"],
    "llada-5": replace(DIALECTS["llada"], build=lambda: LLaDA(layers=5)),
}
"""Three layers, or as many as the name says."""
BATCH, TOKENS, HISTORY = 5, 9, 17
INDUCTOR = {
    "compile_threads": 1,
    "force_disable_caches": True,
    "joint_graph_constant_folding": False,  # runs constants on the device
    "shape_padding": False,  # measures padded products there
    "use_static_triton_launcher": False,  # loads cubins when they are compiled
}


class FakeDraw(Draw):
    """A call whose numbers do not matter."""

    def random(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)


class Captured(Exception):
    """The compiled graph would run now."""


def compile_for_gpu(*args: Any, **kwargs: Any) -> Any:
    with gpu_attention():
        return compile_fx(*args, **kwargs)


def leave(*_: Any) -> Any:
    raise Captured


@dataclass
class Made:
    """What Inductor made of one program.

    Attributes:
        code: modules of output code; cubins: of its kernels, in the order of their launch.
        sizes: symbol -> name of the size; empty for the dense program, whose symbols are Dynamo's.
        skips: how often Inductor said that it makes no CUDA graph.
        fixed: inputs of prefix or suffix that a CUDA graph would read where they lie.
    """

    code: list[str] = field(default_factory=list)
    cubins: list[Cubin] = field(default_factory=list)
    sizes: dict[str, str] = field(default_factory=dict)
    skips: int = 0
    fixed: int = 0

    def report(self) -> dict[str, Any]:
        """Plain data.

        A kernel's ``scalars`` are what its launches give for each argument that is no pointer,
        ``sizes`` the named sizes in them. ``operators`` are those that Inductor did not lower.
        """
        (code,) = self.code
        calls = read(code, self.sizes)
        cubins = {cubin.name: cubin for cubin in self.cubins}
        kernels = [
            self._kernel(cubins[name if name in cubins else re.sub(r"_\d+$", "", name)], given)
            for name, given in calls.launches.items()  # kernels that we wrote are numbered
        ]
        return {
            "kernels": kernels,
            "operators": dict(sorted(calls.operators.items())),
            "host_kernels": calls.host,
            "sizes": self.sizes,
            "partitions": calls.partitions,
            "host_inputs": calls.host_inputs,
            "cuda_graph_skips": self.skips,
            "fixed_inputs": self.fixed,
        }

    def _kernel(self, cubin: Cubin, launches: list[tuple[str, ...]]) -> dict[str, Any]:
        scalars = {
            name: sorted({launch[place] for launch in launches})
            for place, (name, kind) in enumerate(cubin.arguments.items())
            if not kind.startswith("*")
        }
        words = {word for texts in scalars.values() for word in _words(texts)}
        return {
            "name": cubin.name,
            "arch": cubin.arch,
            "cubin_bytes": cubin.size,
            "arguments": cubin.arguments,
            "launches": len(launches),
            "scalars": scalars,
            "sizes": sorted(words & set(self.sizes.values())),
        }


@dataclass
class Lowering:
    """A model's way through the backend, for a GPU of compute capability ``arch``."""

    dialect: Dialect
    arch: int
    mode: str | None = None
    graphs: int = 0
    programs: dict[str, Made] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Lower every program; what came of it as plain data."""
        torch._dynamo.reset()
        with (
            fresh_cache(),
            fake_gpu(self.arch, self.keep),
            mock.patch.object(GraphLowering, "save_output_code", self.save),
            mock.patch.object(backend, "compile_fx", compile_for_gpu),
            mock.patch.object(torch_private, "compile_fx_inner", self.inner),
            torch.no_grad(),
        ):
            self.capture()
        return {
            "arch": self.arch,
            "graphs": self.graphs,
            "graph_breaks": dict(counters["graph_break"]),
            "programs": {name: made.report() for name, made in self.programs.items()},
        }

    @property
    def current(self) -> Made:
        """The program that is being compiled."""
        return next(reversed(self.programs.values()))

    def keep(self, cubin: Cubin) -> None:
        self.current.cubins.append(cubin)

    def save(self, code: str) -> None:
        self.current.code.append(tidy(code))

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        self.current.fixed = len(kwargs["static_input_idxs"])
        return compile_fx_inner(*args, **kwargs)

    def capture(self) -> None:
        """Call the compiled model once; then compile prefix and suffix, which would run now."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = self.dialect.build().to(torch.bfloat16).eval()
        with mode, torch.device("cuda"):
            model = model.to_empty(device="cuda")
            arguments = self.dialect.arguments(model, fake_draw(self.dialect))
        executables: list[Executable] = []

        def capture(gm: GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
            self.programs["dense"] = Made()
            # arguments are fake, but not of the mode that knows the symbols
            inputs = [
                node.meta["example_value"] if isinstance(value, FakeTensor) else value
                for node, value in zip(gm.graph.find_nodes(op="placeholder"), given, strict=True)
            ]
            options = {"strict": True, "inductor": INDUCTOR, "mode": self.mode}
            executables.append(focus_backend(gm, inputs, options=options))
            self.graphs += 1
            return leave

        # a symbolic scale would be made a constant by a second capture
        with suppress(Captured), torch._dynamo.config.patch(specialize_float=True):
            torch.compile(model, backend=capture, dynamic=True, fullgraph=True)(**arguments)
        (executable,) = executables
        self.compile("prefix", executable.prefix)
        self.compile("suffix", executable.suffix)

    def compile(self, name: str, program: Program) -> None:
        made = self.programs[name] = Made()
        examples = program.examples

        def named() -> Any:
            symbols, values = examples()
            made.sizes = {str(size.node.expr): name for name, size in symbols.sizes.items()}
            return symbols, values

        program.examples = named
        before = counters["inductor"]["cudagraph_skips"]
        program._compile()
        made.skips = counters["inductor"]["cudagraph_skips"] - before


def _words(texts: list[str]) -> list[str]:
    return re.findall(r"[A-Za-z_]\w*", " ".join(texts))


def fake_draw(dialect: Dialect) -> Draw:
    """A call on the fake GPU; to be made under a fake mode, with that device as default."""
    history = HISTORY if dialect.history else 0
    return FakeDraw(
        ids=torch.zeros(BATCH, TOKENS, dtype=torch.int64),
        masked=torch.ones(BATCH, TOKENS, dtype=torch.bool),
        visible=torch.ones(BATCH, TOKENS, history + TOKENS, dtype=torch.bool),
        history=history,
        seed=0,
        dtype=torch.bfloat16,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--arch", type=int, choices=ARCHES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    reason = unfit()
    if reason is not None:
        parser.error(reason)
    torch.set_num_threads(1)
    for each in given.model:
        name, _, mode = each.partition("/")
        counters.clear()
        lowering = Lowering(MODELS[name], given.arch, mode or None)
        report = {"model": name, **lowering.run()}
        folder = given.out / each
        folder.mkdir(parents=True, exist_ok=True)
        for program, made in lowering.programs.items():
            (folder / f"{program}.py").write_text("".join(made.code))
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
