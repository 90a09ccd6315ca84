"""Graph breaks: where Dynamo leaves a model's code, and what can be done about it.

A model that breaks into several graphs before its logits is no case for FOCUS: no graph holds the
tokens' way from the embedding to the logits, and code behind a break would meet rows of zeros. Some
public modeling files break; these have a way around it.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.fx import GraphModule

from focus_compile.errors import Unsupported
from focus_compile.refusals import BEHIND_A_BREAK, DYNAMIC_ROPE, NO_EMBEDDING

__all__ = ["GraphBreak", "graph_break", "refuse_fragment", "reported_break"]

_NEAR = 3
"""Functions that tell what a line is a part of: its own and those that called it."""
_PLACE = re.compile(r"Graph break in user code at (.+):(\d+)")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')
_RESUMED = re.compile(r'File "([^"]+)", line \d+, in torch_dynamo_resume_in_\w+_at_(\d+)')

_ADAPTS = "focus_compile.compile(model)"
_EXPERTS = r"expert|moe|router"
_READS = r"tensor\.item\(\)|data.dependent|numpy|tolist|dynamic shape|nonzero|int\("

REMEDIES: tuple[tuple[str, str, str], ...] = (
    # found in reason and line; found in the functions on the way there; what to do
    (
        r"accelerate/hooks\.py",
        "",
        "accelerate's hooks run outside of graphs: load the model on one device, without "
        "device_map, or call accelerate.hooks.remove_hook_from_submodules(model)",
    ),
    (
        r"expert_hit",
        "",
        "experts are computed in a loop over those that are hit: compile with "
        f"{_ADAPTS}, which makes one operator of a loop over a list of modules; transformers' own "
        "models are loaded with experts_implementation='grouped_mm' or 'batched_mm'",
    ),
    (
        r"modeling_rope_utils\.py",
        "",
        "dynamic RoPE (rope_type 'dynamic' or 'longrope') reads the length of the text in the "
        "model's forward: set rope_type='default' in the config's rope_parameters where texts are "
        "no longer than the model was trained for, or 'yarn', whose table is fixed",
    ),
    (
        r"use_return_dict",
        "",
        f"a property of the config logs: pass return_dict=True, or compile with {_ADAPTS}, which "
        "leaves logging out of graphs",
    ),
    (
        r"logging|logger",
        "",
        f"Dynamo does not trace logging: compile with {_ADAPTS}, which leaves it out of graphs, "
        "or take the call out of the model's forward",
    ),
    (
        r"(\ball\(|\bany\(|\b(0|0\.0|false) (not )?in ).*mask|mask\.(all|any)\(",
        "",
        "an `if` reads the mask's values, such as SDAR's `if torch.all(attention_mask)`: compile "
        f"with {_ADAPTS}, which reads those of an argument before the graph; load the weights into "
        "transformers' Qwen3ForCausalLM (SDAR) and pass a 4D mask; or decide outside the model",
    ),
    (
        _READS,
        _EXPERTS,
        "the tokens of each expert are counted by Python, as in LLaDA2-MoE's `moe_infer`: compile "
        f"with {_ADAPTS}, which makes one operator of it where experts are plain perceptrons; or "
        "compute experts as transformers' grouped_mm and batched_mm do (docs/models.md)",
    ),
    (
        r"nonzero|dynamic shape|torch\.where\(",
        "",
        "positions are looked up by value, so that their number is a value too: compile with "
        f"{_ADAPTS}, which looks up those of an argument before the graph, or look them up outside "
        "the model, and pass them as a tensor",
    ),
    (
        r"data.dependent branching",
        "",
        "an `if` depends on a tensor's value: decide outside the model and pass True or False, or "
        "compute both and choose with torch.where",
    ),
    (
        _READS,
        "",
        "Python reads a tensor's value at this line: take the number from shapes (x.shape), "
        "compute it outside the model and pass it, or, where it comes of an argument, compile with "
        f"{_ADAPTS}",
    ),
)


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph, or ran a function eagerly: its words, the user's line, and a remedy
    where one is known."""

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
    message = reason.reason.strip().splitlines()[0] if reason.reason.strip() else "graph break"
    return _broke(message, [(frame.filename, frame.lineno, frame.name) for frame in frames])


def reported_break(text: str) -> GraphBreak | None:
    """A graph break as Dynamo's trace has it (:func:`~.torch_private.reported_breaks`)."""
    head, _, stack = text.partition("User code traceback:")
    said = head.partition("Graph Break Reason:")[2].split("\n")
    said = [line.strip() for line in said if line.strip()]
    frames = [(file, int(number), name) for file, number, name in _FRAME.findall(stack)]
    place = _PLACE.search(head)
    if place is None or not said:
        return None
    ends = [at for at, frame in enumerate(frames) if frame[:2] == (place[1], int(place[2]))]
    frames = frames[: ends[0] + 1] if ends else [(place[1], int(place[2]), "")]
    preface = len(said) > 1 and said[0].endswith(":")  # what Dynamo did, then why
    return _broke(said[preface], frames)


def _broke(message: str, frames: Sequence[tuple[str, int, str]]) -> GraphBreak:
    """``frames``: file, line and function, from the outermost to that of the break."""
    codes = [linecache.getline(file, number).strip() for file, number, _ in frames]
    line = f"{frames[-1][0]}:{frames[-1][1]} `{codes[-1]}`" if frames else "?"
    names = [name for *_, name in frames]
    way = " ".join((*codes[-_NEAR:], *names[-_NEAR:])).lower()
    text = f"{message} {line}".lower()
    cures = (cure for at, on, cure in REMEDIES if re.search(at, text) and re.search(on, way))
    return GraphBreak(message, line, next(cures, None))


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
