"""Write docs/how-it-works.md: listings from one small model, from Dynamo's graph to kernels.

python docs/how_it_works.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import sympy
import torch
import transformers
from matplotlib.figure import Figure
from torch.fx import GraphModule
from transformers import Qwen3Config, Qwen3ForCausalLM

import focus_compile
from focus_compile.models.load import denoising_call
from focus_compile.runtime.executable import Executable
from focus_compile.views.describe import code, describe

HERE = Path(__file__).resolve().parent
PAGE, TEMPLATE = HERE / "how-it-works.md", HERE / "how-it-works.md.j2"
FUNNEL = HERE / "how-it-works-funnel.png"
BATCH, BLOCK, PAST, MASK = 2, 8, 16, 127
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
}  # fmt: skip
PLAIN = {"cpp.simdlen": 1, "cpp.threads": 1, "fx_graph_cache": False}


def subject() -> tuple[Qwen3ForCausalLM, dict[str, Any]]:
    """The model and a call of it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    return model, denoising_call(model, BATCH, BLOCK, PAST, MASK)


def text() -> str:
    """The page."""
    model, call = subject()
    (graph,) = focus_compile.explain(model, **call).graphs
    assert graph.analysis is not None and graph.cost is not None
    analysis, cost, found = graph.analysis, graph.cost, describe(graph.analysis)
    canonical, after = code(analysis.canonical.gm), code(analysis.stages[-1][1])
    site = analysis.plan.sites[1]
    named = [site.query, site.key, site.value, site.out]
    labels = {**found["values"], **found["inputs"]}
    fed, retained = sympy.symbols("f r", positive=True)
    data = {
        "layers": SIZES["num_hidden_layers"],
        "hidden": SIZES["hidden_size"],
        "heads": SIZES["num_attention_heads"],
        "groups": SIZES["num_key_value_heads"],
        "head_dim": SIZES["head_dim"],
        "batch": BATCH,
        "tokens": BLOCK,
        "history": PAST,
        "torch": torch.__version__.partition("+")[0],
        "transformers": ".".join(transformers.__version__.split(".")[:2]),
        "dynamo_nodes": graph.nodes,
        "dynamo": around(code(graph.graph), "scaled_dot_product_attention(", 1, 7, 2),
        "canonical_nodes": len(analysis.canonical.gm.graph.nodes),
        "canonical": around(canonical, "aten.scaled_dot_product_attention", 1, 5, 4),
        "labels": [(name, labels[name]) for name in named if name in labels],
        "sites": found["sites"],
        "live": ", ".join(f"`{name}` ({place})" for name, place in found["live"].items()),
        "passes": " → ".join(
            f"{step['name']} ({step['nodes']} nodes, {step['focus_operators']} of ours)"
            for step in found["passes"]
        ),
        "after": around(after, "focus.attend", 1, 8, 4),
        "cpp": cpp_kernel(model, call),
        "triton": triton_kernel(),
        "dense": str(cost.dense),
        "focus": str(cost.focus),
        "long": str(sympy.simplify(cost.limit_of_long_blocks(fed, retained))),
    }
    for name, half in (("prefix", analysis.halves.prefix), ("suffix", analysis.halves.suffix)):
        nodes = half.gm.graph.nodes
        shapes = found["shapes"][name].items()
        own = sum(str(node.target).startswith("focus.") for node in nodes)
        data[f"{name}_nodes"], data[f"{name}_operators"] = len(nodes), own
        data[f"{name}_shapes"] = ", ".join(
            f"`{given} {shape}`"
            for given, shape in shapes
            if not given.startswith(("slots", "input"))
        )
    everything = BATCH * BLOCK
    step = (BATCH, BLOCK, 0, everything, everything / 10)
    deep, many = cost.of_layers(sympy.Symbol("L")), cost.of_layers(28)
    data["dense_deep"], data["focus_deep"] = str(deep.dense), str(deep.focus)
    data["ratio"], data["ratio_deep"] = (f"{each.speedup(*step):.2f}" for each in (cost, many))
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(data)


def around(listing: str, word: str, which: int, before: int, after: int) -> str:
    """Lines around the ``which``-th one (from 0) that has a word; comments left out."""
    lines = [line[8:] for line in listing.splitlines() if line.startswith("        ")]
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    at = [index for index, line in enumerate(lines) if word in line][which]
    picked = lines[max(0, at - before) : at + after + 1]
    return "\n".join(line.split(";  ")[0].rstrip() for line in picked)


def cpp_kernel(model: Any, call: dict[str, Any]) -> str:
    """The C++ kernel of the suffix between the products of the first MLP."""
    made: list[Executable] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        options = {"mask_token_id": MASK, "strict": True, "inductor": PLAIN}
        made.append(focus_compile.focus_backend(gm, inputs, options=options))
        return made[-1]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**call)
    (file,) = made[0].suffix.files
    source = Path(file).read_text()
    found = re.search(r"cpp_fused_\w*silu\w* = async_compile\.[^\n]*r'''\n(.*?)'''", source, re.S)
    assert found is not None
    body = found[1]
    return body[body.index("extern") :].strip()


def triton_kernel() -> str:
    """The kernel of the same place in Triton."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "tests.gpu_lowering.lower", "--model", "qwen3", "--arch", "90"]
        subprocess.run([sys.executable, *words, "--out", folder], check=True, cwd=HERE.parent)
        source = (Path(folder) / "qwen3" / "suffix.py").read_text()
    kernels = re.findall(r"(@triton\.jit\ndef \w*silu\w*\(.*?)\n'''", source, re.S)
    return kernels[0].strip()


def draw_funnel() -> None:
    """The picture: tokens that each layer computes in the call, dense and with FOCUS."""
    model, call = subject()
    with torch.no_grad(), focus_compile.session(MASK, first_step="evict") as focus:
        torch.compile(model, backend="focus")(**call)
        fed, kept = focus.stats.fed, focus.stats.retained
    names = ["layer 0", "layer 1: q, k, v", "layer 1: the rest", "layer 2", "logits"]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    for shift, label, counts, color in (
        (-0.2, "dense", [BATCH * BLOCK] * 5, "#b8bec9"),
        (0.2, "FOCUS", [fed, fed, kept, kept, kept], "#2f6db5"),
    ):
        bars = axes.barh([place + shift for place in places], counts, 0.4, label=label, color=color)
        axes.bar_label(bars, padding=3)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens of the batch that are computed in this call")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.savefig(FUNNEL, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    draw_funnel()
    PAGE.write_text(text())
