"""docs/{fuzz,fuzz_edges,soak}.json -> docs/reliability.md."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent

HEAD = """# Reliability

Written by `python -m docs.build` from `fuzz.json`, `fuzz_edges.json` and `soak.json`.

```
python -m tests.fuzz.campaign
python -m tests.fuzz.campaign --edges --sequences 2000 --out docs/fuzz_edges.json
python -m benchmarks.soak --out docs/soak.json
python -m docs.build
```
"""

FUZZ = """
## Never wrong in silence

`tests/fuzz` plays random sequences of calls on small random models of {subjects} kinds (all
dialects of [models.md](models.md), Qwen3 under every kind of mask, caches of fixed length) and
compares every call with the eager FOCUS of `tests/reference`, which shares no code with the
package: which tokens were fed and retained, all logits, and which errors are raised. Where
nothing was evicted, and in dense calls, the logits are also those of the eager model.
Uninitialised memory is filled with NaN meanwhile. One run of {sequences} sequences (`--sequences
{sequences} --start {seed}`, commit {commit}, torch {torch}, nothing compiled behind the graphs,
fp32, CPU): **none was wrong**. Failures that earlier runs with other seeds found were mended
(`tests/fuzz/test_found.py` has each of them). {ties} sequences ended at a near tie, where rounding
may select other tokens. The tests play 480 of them each time.

| what happened | times |
|---|---|
{rows}

Not covered: bf16, Inductor's code (other tests have both), signals other than FOCUS's, GPUs.
"""

EDGES = """
### Edges

The same where the backend is given a part of a model, or more than one ({subjects} kinds,
`tests/fuzz/edges.py`): a module behind which the head is not compiled, a confidence and hidden
states beside the logits, a graph break at each place of the model, with and without a bias in the
head, default dtypes of bf16, fp16 and fp64 and a default device, and two or three streams, each a
generator in a session of its own, that take turns in one thread or in several. {sequences}
sequences (`--start {seed}`, commit {commit}, torch {torch}), {calls} masked calls of FOCUS and
{dense} dense ones: **none was wrong**. Where a graph is refused, as those before a break are, the
calls give what the model gives. {turns} turns of streams were taken in other threads.
"""

NAMES = {
    "calls": "masked calls compared",
    "fewer fed": "of them, with tokens that were final and not fed",
    "fewer retained": "of them, with tokens that were fed and evicted",
    "nothing evicted": "of them, with nothing evicted: also compared with the eager model",
    "commit": "blocks committed by a dense call",
    "dense": "masked calls with FOCUS switched off",
    "single": "calls of one token in mid-block",
    "outside": "calls of another task, outside the session, in mid-block",
    "Accident": "calls interrupted by an exception: in the signal, in prefix or suffix",
    "crash": "sessions ended by an exception, and followed by another one",
    "enter": "sessions within a session in mid-block",
    "reset": "sessions reset",
    "remask": "decoded tokens masked again",
    "rewrite": "decoded tokens changed",
    "swap": "batches reordered",
    "replace": "rows given to another request",
    "resize": "batches or blocks of another size",
    "shrink": "histories cut",
    "window": "blocks of a canvas moved",
    "budget": "alpha and visibility changed in mid-block",
    "manner": "changes between masks given by hand and mask tokens",
    "misshape": "masks of a wrong shape refused",
    "EvictedTokenDecoded": "evicted tokens decoded: refused",
    "UncommittedHistory": "histories that kept a masked call's keys: refused",
}

SOAK = """
## Soak

{generations} generations of one tiny Qwen3 (three layers of width 32) through Inductor in one
process, {forwards} denoising forwards in {seconds:.0f} s beside other work: batches of
{batches[0]} to {batches[1]}, prompts of {prompts[0]} to {prompts[1]} tokens padded on the left,
{blocks[0]} to {blocks[1]} blocks of 4, 6 or 8 tokens; {interrupted} of the generations were
interrupted by an
exception in mid-block. Python {python}, torch {torch}, transformers {transformers}, {machine},
{threads} thread, commit {commit}.

Resident memory, after a garbage collection and `malloc_trim`: {quarters}.
Over the second half, {used} samples, it changed by **{slope_bytes:.1f} ± {slope_error_bytes:.1f}
bytes per generation** (least squares and its standard error). The last graph was captured in
generation {last_capture}. Going beyond Dynamo's recompile limit ({recompile_limit}) would have
been an error.

| | at generation {warm_at} | at the end |
|---|---|---|
{rows}

`generate` needs eight graphs of one model where batches and prompts of one *and* of more rows or
tokens occur, which is Dynamo's default limit, since it captures a size of 1 anew. Who calls the
compiled model in other ways too, or from several threads before it is warm (each of them captures
it anew), should raise `torch._dynamo.config.recompile_limit`: beyond it calls run eagerly. The
limit is a thread's own.
"""


def _fuzz(report: dict[str, Any]) -> str:
    total: Counter[str] = Counter()
    for counts in report["subjects"].values():
        total.update({name: n for name, n in counts.items() if name not in ("seconds", "seed")})
    rows = "\n".join(f"| {text} | {total[name]} |" for name, text in NAMES.items())
    return FUZZ.format(
        subjects=len(report["subjects"]),
        sequences=total["sequences"],
        seed=next(iter(report["subjects"].values()))["seed"],
        torch=report["torch"],
        commit=report["commit"].rstrip("+"),
        ties=total["ties"],
        rows=rows,
    )


def _edges(report: dict[str, Any]) -> str:
    total: Counter[str] = Counter()
    for counts in report["subjects"].values():
        total.update(counts)
    return EDGES.format(
        subjects=len(report["subjects"]),
        sequences=total["sequences"],
        seed=next(iter(report["subjects"].values()))["seed"],
        commit=report["commit"].rstrip("+"),
        torch=report["torch"],
        calls=total["calls"],
        dense=total["dense calls"],
        turns=total["turns in threads"],
    )


def soak(report: dict[str, Any]) -> str:
    resident = [
        f"{report['samples'][index][1] / 2**20:.1f} MiB at generation {report['samples'][index][0]}"
        for index in (part * len(report["samples"]) // 4 - 1 for part in (1, 2, 3, 4))
    ]
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {number} | {report['end'][name]} |"
        for name, number in report["warm"].items()
    )
    return SOAK.format(**report, quarters=", ".join(resident), rows=rows)


def text() -> str:
    """The page."""
    return HEAD + _fuzz(_load("fuzz")) + _edges(_load("fuzz_edges")) + soak(_load("soak"))


def _load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / f"{name}.json").read_text())
    return found
