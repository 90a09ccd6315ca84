"""docs/{throughput,profile,scaling,compile_time}.json -> docs/performance.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent

HEAD = """# Performance

Written by `python -m docs.build` from `throughput.json`, `profile.json`, `scaling.json` and
`compile_time.json`. {threads} threads, {dtype}, torch {torch}. CPUs and versions of
transformers differ between rows of the first table; the other files do not record theirs. A ratio
compares what ran on one CPU; do not compare tokens per second between CPUs. No GPU has been
measured.

The same model object and the same loop (`focus_compile.generate`) run eagerly, through plain
Inductor, and through FOCUS, in turns, in one process. Random weights decode in random order, which
trained models do not; so `trace:` rows replay what the eager FOCUS of the tests did with the
trained model of `examples/tiny_dllm` ({alignment}): the same
positions are decoded in the same steps by every contestant, and FOCUS selects by the recorded
deltas after it has computed its own, in the paper's way (`first_step="evict"`, `rescue=None`). A
run is an error if it fed or retained other tokens than the eager FOCUS. `sequential:3` and
`fixed:3` decode 3 tokens per step, leftmost or most confident ones.

"by FLOPs" is the ratio of the floating-point operations that plain Inductor and FOCUS need for the
tokens that were fed and retained, read off the captured graph: a limit, unless a kernel is faster
for FOCUS than for the dense model. Blocks count the exact dense commit, steps do not.

```
python -m benchmarks.throughput --full
python -m benchmarks.profile_step --out docs/profile.json
python -m benchmarks.scaling --out docs/scaling.json
python -m benchmarks.compile_time --out docs/compile_time.json
python -m docs.build
python -m docs.pictures
```

## Tokens per second

Blocks of {block}, {pairs} alternating pairs; prompts in tokens; median, least and largest of the
ratios focus / inductor, pair by pair. What `--full` lists and this table lacks has not been
run. Rows were measured on different commits, as a row takes up to half an hour.

"""

DETAIL = """
## One step, in ms

Medians over the runs: a denoising forward, the commit, and what the loop does outside the model
for each step (confidence, choice of tokens). Peak: resident memory of the process, weights and all
contestants' programs included, sampled in one more run of each contestant.

"""

PROFILE = """
## Where a step's time goes

{shape}, batch {batch}, `{strategy}`, {threads} threads, commit {commit}; by PyTorch's profiler, the
mean of the denoising steps of one block. "keys and values": the new rows put beside those of
history and block, which the dense model does by `cat`.

"""

SCALING = """
## What a step costs

{shape}, {layers} layers; the first step of a block, batch {batch}, block {block}, history {history}
and {kept} retained tokens per row where nothing else is said; median of {repeats}; commit {commit}.

![seconds per step](performance_scaling.png)

"""

COMPILE = """
## Compile time

"blocks": wall time to the end of the second block of one loop, compilation counted. "capture": a
call with masks and one without, of one captured graph, so that each of its programs is compiled.
"cold": empty Inductor cache, "warm": filled by the run before. Medians over pairs of processes.

"""
NOTES = """
## What limits it

- The commit of a block is a dense forward, and so is the prefill: the faster the steps, the more it
  weighs. Few steps per block (`threshold:order`) leave FOCUS little to save.
- Layers 0 and 1 compute every token that is fed, in any case.
- Small batches: the host reads how many tokens are retained between the two programs, and some
  dozens of small operators cost the same for one row as for many.
- A denoising step that decodes much retains much: `threshold:total` decodes most of a block in its
  first step, so that its average, and with it the number of tokens to keep, stays high.
- Part of the gain is the backend's and not the method's: prefix and suffix call oneDNN for their
  matrix products, plain Inductor MKL, which is slower for few rows (`focus_compile/ops/linear.py`),
  and on AMD CPUs slower for all: a dense forward took 1540 ms with oneDNN's products where plain
  Inductor took 3354, so that about half of the ratios of AMD rows is not FOCUS's. (Measured beside
  this page's scripts, which have no such contestant; on Intel it was not measured.) FOCUS against
  such a dense program is not measured yet; by arithmetic, at least 2.2 of the 4.9 of `sdar-0.6b`,
  batch 16, `trace:chain`, would be left (its own commits would gain, too).
- Models as small as `tiny` and `bench-3l` spend their steps in small operators, not in FLOPs:
  `bench-3l` (three layers of width 128), batch 8, runs at **0.5** of plain Inductor's speed
  (`python -m benchmarks.throughput --quick`), and examples/quickstart.py (16 prompts per task, the
  toy) at 0.8 to 1.1 of it.
"""
COMMON = ("threads", "dtype", "torch", "block", "pairs")
"""What all rows of throughput.json share."""
ALIGNED = "`aligned_checkpoint`, see [quality](quality.md)"


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def _throughput(rows: list[dict[str, Any]]) -> str:
    (common,) = {tuple(row[name] for name in COMMON) for row in rows}
    out = HEAD.format(alignment=ALIGNED, **dict(zip(COMMON, common, strict=True)))
    out += _head(
        *("shape", "batch", "prompt", "strategy", "fed", "retained"),
        *("eager", "inductor", "focus"),
        *("blocks: ratio", "by FLOPs", "reached", "steps: ratio", "by FLOPs", "commit"),
        *("CPU", "transformers"),
    )
    for row in rows:
        cells = [row["shape"], row["batch"], row["prompt"], f"`{row['strategy']}`"]
        cells += [f"{row['focus'][key]:.0%}" for key in ("fed_fraction", "retained_fraction")]
        cells += [
            f"{row[name]['tokens_per_s']:.1f}" if name in row else "-"
            for name in ("eager", "inductor", "focus")
        ]
        cells += [_ratio(row["ratio_focus_inductor"]), f"{row['limit_ratio']:.2f}"]
        cells += [f"{row['limit_efficiency']:.0%}", _ratio(row["ratio_steps_only"])]
        cells += [f"{row['limit_ratio_steps_only']:.2f}", row["commit"]]
        out += _line([*cells, row["machine"], row["transformers"]])
    out += DETAIL + _head(
        *("shape", "batch", "strategy", "contestant", "forward", "commit", "outside"),
        *("tokens/s, least to largest", "peak, MiB", "exact match"),
    )
    for row in rows:
        for name, figures in row.items():
            if not isinstance(figures, dict) or "tokens_per_s" not in figures:
                continue
            cells = [row["shape"], row["batch"], f"`{row['strategy']}`", name]
            cells += [
                f"{figures[key]:.1f}" for key in ("ms_per_step", "ms_commit", "ms_outside_model")
            ]
            cells.append(f"{figures['tokens_per_s_min']:.1f}-{figures['tokens_per_s_max']:.1f}")
            cells.append(f"{figures['peak_mib']:.0f}" if "peak_mib" in figures else "-")
            cells.append(f"{figures['exact_match']:.3f}" if "exact_match" in figures else "-")
            out += _line(cells)
    return out


def _profile(report: dict[str, Any]) -> str:
    out = PROFILE.format(**report) + _head("part", "ms", "share")
    seconds = report["seconds"]
    for part, spent in seconds.items():
        out += _line([part, f"{1e3 * spent:.1f}", f"{spent / seconds['step']:.1%}"])
    return out


def _scaling(report: dict[str, Any]) -> str:
    out = SCALING.format(**report) + _head("against", "slope, ms", "intercept, ms", "R2")
    for name in report["curves"]:
        curve = report["curves"][name]
        label = "retained tokens of the batch" if name == "kept" else name
        cells = [label, f"{1e3 * curve['slope_s']:.4f}", f"{1e3 * curve['intercept_s']:.2f}"]
        out += _line([*cells, f"{curve['r2']:.4f}"])
    return out


def _compile(rows: list[dict[str, Any]]) -> str:
    columns = ("shape", "work", "cache", "pairs", "inductor, s", "focus, s", "ratio", "commit")
    out = COMPILE + _head(*columns)
    for row in rows:
        for kind in ("cold", "warm"):
            found = row[kind]
            ratio = {"median": found["ratio"], "min": found["ratio_min"], "max": found["ratio_max"]}
            cells = [row["shape"], row["work"], kind, row["runs"]]
            cells += [f"{found[name]:.1f}" for name in ("inductor", "focus")]
            out += _line([*cells, _ratio(ratio), row["commit"]])
    return out


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def _head(*names: str) -> str:
    return _line(list(names)) + _line(["---"] * len(names))


def text() -> str:
    """The page."""
    page = _throughput(_load("throughput")["rows"])
    page += _profile(_load("profile"))
    page += _scaling(_load("scaling"))
    page += _compile(_load("compile_time")["rows"])
    return page + NOTES


def _load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / f"{name}.json").read_text())
    return found
