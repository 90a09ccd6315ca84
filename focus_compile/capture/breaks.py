"""Graph breaks: where Dynamo leaves a model's code, and what can be done about it.

A model that breaks into several graphs before its logits is no case for FOCUS: no graph holds the
tokens' way from the embedding to the logits, and code behind a break would meet rows of zeros. Some
public modeling files break; these have a way around it.
"""

from __future__ import annotations

import linecache
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.fx import GraphModule

from focus_compile.errors import Unsupported
from focus_compile.refusals import BEHIND_A_BREAK, DYNAMIC_ROPE, NO_EMBEDDING

__all__ = ["GraphBreak", "graph_break", "refuse_fragment"]

_RESUMED = re.compile(r'File "([^"]+)", line \d+, in torch_dynamo_resume_in_\w+_at_(\d+)')

REMEDIES = (
    (
        ("accelerate/hooks.py",),
        "accelerate's hooks run outside of graphs: load the model on one device, without "
        "device_map, or call accelerate.hooks.remove_hook_from_submodules(model)",
    ),
    (
        ("expert_hit",),
        "experts are computed in a loop over those that are hit: load the model with "
        "experts_implementation='grouped_mm' or 'batched_mm'",
    ),
    (
        ("modeling_rope_utils.py",),
        "dynamic RoPE (rope_type 'dynamic' or 'longrope') reads the length of the text in the "
        "model's forward: set rope_type='default' in the config's rope_parameters where texts are "
        "no longer than the model was trained for, or 'yarn', whose table is fixed",
    ),
    (
        ("data-dependent branching", "torch.all("),
        "an `if` reads a tensor's value, such as SDAR's `if torch.all(attention_mask)`: load the "
        "weights into transformers' Qwen3ForCausalLM (SDAR) and pass a 4D mask, or decide outside "
        "the model",
    ),
    (
        ("data dependent operator", "numpy(", "item(", "tolist("),
        "values go to the host, such as the counts per expert of LLaDA2-MoE's `moe_infer`: compute "
        "experts as transformers' grouped_mm and batched_mm do (docs/models.md; on a CPU "
        "`F.grouped_mm` itself traces in bf16 only)",
    ),
)


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph: its words, the user's line, and a remedy where one is known."""

    reason: str
    line: str
    remedy: str | None

    def __str__(self) -> str:
        cure = "" if self.remedy is None else f"; {self.remedy}"
        return f"{self.line}: {self.reason}{cure}"


def graph_break(gm: GraphModule) -> GraphBreak | None:
    """Why the graph ended where it did, or None: at the model's own end."""
    # Dynamo sets it on every graph; who calls the backend with a graph of his own does not
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    frames = [frame for frame in reason.user_stack if frame.line]
    line = "?"
    if frames:
        last = frames[-1]
        line = f"{last.filename}:{last.lineno} `{last.line}`"
    message = reason.reason.strip().splitlines()[0] if reason.reason.strip() else "graph break"
    text = f"{message} {line}".lower()
    remedies = [cure for signs, cure in REMEDIES if any(sign in text for sign in signs)]
    return GraphBreak(message, line, remedies[0] if remedies else None)


def refuse_fragment(gm: GraphModule) -> NoReturn:
    """Refuse a graph that embeds no token ids.

    Raises:
        Unsupported: it names the line of the graph break that it begins behind, if any.
    """
    traces = (node.meta.get("stack_trace") or "" for node in gm.graph.nodes)
    resumed = next(filter(None, map(_RESUMED.search, traces)), None)
    if resumed is None:
        raise Unsupported(NO_EMBEDDING)
    line = linecache.getline(resumed[1], int(resumed[2])).strip()
    location = f"{resumed[1]}:{resumed[2]} `{line}`"
    if "rotary" in line or "rope" in line:
        raise Unsupported(DYNAMIC_ROPE, place=location)
    raise Unsupported(BEHIND_A_BREAK, place=location)
