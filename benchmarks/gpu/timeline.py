"""What a profile says of the denoising steps in it: launches, idle time, time by kind of work.

Reads the events of a Chrome trace, as PyTorch's profiler exports it. A kernel's kind is that of the
operator that launched it, or else of its own name; what neither tells is "other", and listed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.generation import FORWARD

__all__ = ["HOST_GAP", "KINDS", "Kind", "Timeline", "kind_of"]

Event = dict[str, Any]
GPU = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME = ("cuda_runtime", "cuda_driver")
HOST_GAP, OTHER = "host gap", "other"
OUTSIDE = "outside the model"
LAUNCH = re.compile(r"LaunchKernel|GraphLaunch|LaunchCooperative")


@dataclass(frozen=True)
class Kind:
    """Operators of ``focus`` and ``focus_fused``, operators of ATen, names of kernels."""

    name: str
    focus: frozenset[str] = frozenset()
    aten: frozenset[str] = frozenset()
    kernels: str = "(?!)"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


KINDS = (
    Kind(
        "importance",
        _words("importance sum_ranks block"),
        kernels="list_masked|attend_rows|attend_columns",
    ),
    Kind("selection", _words("signal retain tables choose"), kernels="^select(_|$)|number_kept"),
    Kind(
        "pack",
        _words("pack pack_rows repack unpack restore site_index line_index extend"),
        kernels="^(un|re)?pack(_|$)",
    ),
    Kind("join", _words("join store store_ replace clear"), kernels="^join(_|$)"),
    Kind(
        "attend",
        _words("attend site_mask visible causal extend_mask"),
        _words("scaled_dot_product_attention"),
        "fmha|flash|attention|attend|cudnn_generated_fort|fold_queries|unfold_lines",
    ),
    Kind(
        "matrix products",
        _words("linear"),
        _words("mm addmm bmm baddbmm linear matmul _grouped_mm _scaled_mm"),
        "gemm|gemv|nvjet|cutlass|cublas|splitK|triton_(tem|mm)",
    ),
    Kind("fused by Inductor", kernels="^triton_"),
)


def kind_of(operators: Iterable[str], kernel: str) -> str:
    """Kind of a kernel; ``operators``: those that it was launched in, the outermost first."""
    for operator in operators:
        space, _, name = operator.partition("::")
        for kind in KINDS:
            if space in ("focus", "focus_fused") and name in kind.focus:
                return kind.name
            if space == "aten" and name in kind.aten:
                return kind.name
    if kernel.startswith(("Memcpy", "Memset")):
        return "copies"
    return next((kind.name for kind in KINDS if re.search(kind.kernels, kernel)), OTHER)


@dataclass(frozen=True)
class Timeline:
    """Events of a profiled run whose first ``steps`` forwards are the denoising steps."""

    events: Sequence[Event]
    steps: int

    def report(self) -> dict[str, Any]:
        """Means over the steps; milliseconds.

        ``kernels``: on the device, copies counted apart; ``host_launches``: calls that launch
        them, a whole CUDA graph being one; ``idle``: share of the steps' time in which the device
        ran nothing. Null on a CPU, where kernels are calls.
        """
        windows = self._windows()
        device = [(event, window) for event, window in self._inside(GPU, windows)]
        spent, others = self._on_device(device) if device else self._on_host(windows)
        wall = sum(end - start for start, end in windows)
        busy = sum(spent.values())
        if device:
            busy = _union((_span(event) for event, _ in device))
        spent[HOST_GAP] = wall - busy
        if device:  # kernels that ran at the same time are counted once each
            overlap = sum(spent.values()) - wall
            spent |= {"at the same time": -overlap} if overlap > 1 else {}
        spent[OUTSIDE] = windows[-1][1] - windows[0][0] - wall
        number = len(windows)
        kernels = [event for event, _ in device if event["cat"] == "kernel"]
        launches = [e for e, _ in self._inside(RUNTIME, windows) if LAUNCH.search(e["name"])]
        return {
            "ms_per_step": wall / number / 1e3,
            "kernels_per_step": len(kernels) / number if device else None,
            "copies_per_step": (len(device) - len(kernels)) / number if device else None,
            "host_launches_per_step": len(launches) / number if device else None,
            "idle": 1 - busy / wall if device else None,
            "ms_by_kind": {name: us / number / 1e3 for name, us in spent.items() if us},
            "other": {name: us / number / 1e3 for name, us in others.most_common(12)},
        }

    def _windows(self) -> list[tuple[float, float]]:
        """Begin and end of each denoising step, in the profile's microseconds."""
        marks = sorted(
            _span(event)
            for event in self.events
            if event.get("cat") == "user_annotation" and event["name"] == FORWARD
        )
        if len(marks) < self.steps or not self.steps:
            raise ValueError(f"{len(marks)} forwards in the profile: expected {self.steps}")
        return marks[: self.steps]

    def _inside(
        self, categories: Sequence[str], windows: Sequence[tuple[float, float]]
    ) -> Iterator[tuple[Event, int]]:
        """Events that begin within a window, and its number."""
        starts = [start for start, _ in windows]
        for event in self.events:
            if event.get("cat") in categories and event.get("ph") == "X":
                place = bisect_right(starts, float(event["ts"])) - 1
                if place >= 0 and float(event["ts"]) <= windows[place][1]:
                    yield event, place

    def _on_device(
        self, device: Sequence[tuple[Event, int]]
    ) -> tuple[dict[str, float], Counter[str]]:
        """Microseconds of each kind, and of the kernels that are of none."""
        launched = {
            event["args"]["correlation"]: event
            for event in self.events
            if event.get("cat") in RUNTIME and "correlation" in event.get("args", {})
        }
        enclosing = self._enclosing(launched.values())
        numbered = {
            event["args"]["External id"]: (event["name"],)
            for event in self._operators()
            if "External id" in event.get("args", {})
        }
        spent: dict[str, float] = defaultdict(float)
        others: Counter[str] = Counter()
        for event, _ in device:
            launch = launched.get(event["args"].get("correlation"))
            operators = enclosing.get(id(launch)) or numbered.get(
                event["args"].get("External id"), ()
            )
            kind = kind_of(operators, event["name"])
            spent[kind] += float(event["dur"])
            if kind == OTHER:
                others[f"{next(reversed(operators), '')} {event['name'][:80]}".strip()] += float(
                    event["dur"]
                )
        return dict(spent), others

    def _enclosing(self, launches: Iterable[Event]) -> dict[int, tuple[str, ...]]:
        """Operators around each launch, the outermost first, by the launch's identity."""
        lines: dict[Any, list[Event]] = defaultdict(list)
        for event in (*self._operators(), *launches):
            lines[event["tid"]].append(event)
        found = {}
        for line in lines.values():
            stack: list[Event] = []
            for event in sorted(line, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
                while stack and _span(stack[-1])[1] < _span(event)[1]:
                    stack.pop()
                if event["cat"] == "cpu_op":
                    stack.append(event)
                else:
                    found[id(event)] = tuple(outer["name"] for outer in stack)
        return found

    def _on_host(
        self, windows: Sequence[tuple[float, float]]
    ) -> tuple[dict[str, float], Counter[str]]:
        """Likewise of operators that ran on the CPU: the time that each spent outside of others.

        What has no namespace is no operator: a compiled region's own time is the host's.
        """
        spent: dict[str, float] = defaultdict(float)
        others: Counter[str] = Counter()
        stack: list[tuple[Event, str]] = []
        inside = [event for event, _ in self._inside(("cpu_op",), windows)]
        for event in sorted(inside, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
            while stack and _span(stack[-1][0])[1] < _span(event)[1]:
                stack.pop()
            if stack and (outer := stack[-1][1]):
                spent[outer] -= float(event["dur"])
            names = [*(other["name"] for other, _ in stack), event["name"]]
            kind = kind_of(names, "") if any("::" in name for name in names) else ""
            if kind:
                spent[kind] += float(event["dur"])
            if kind == OTHER:
                others[event["name"]] += float(event["dur"])
            stack.append((event, kind))
        return dict(spent), others

    def _operators(self) -> list[Event]:
        return [event for event in self.events if event.get("cat") == "cpu_op"]


def _span(event: Event) -> tuple[float, float]:
    start = float(event["ts"])
    return start, start + float(event["dur"])


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what the spans cover together."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
