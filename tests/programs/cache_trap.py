"""One process of the cache test: plain Inductor, then FOCUS, then FOCUS with another budget.

A rewrite behind Inductor's caches would be skipped when they hold the plain program. Prints a JSON
object: the largest errors, programs run and cache hits; test_compiles.py runs it twice.
"""

from __future__ import annotations

import json
import sys

import torch
from torch._dynamo.utils import counters

from tests.reference.state import Config
from tests.reference.system import standalone_batch
from tests.support.harness import Run, Sizes, build_model, eager_logits, random_call, retained

ALPHA = 1.1


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model = build_model(Sizes(layers=3))
    call = random_call(1, model, 3, 9, 17, "bool")
    expected = eager_logits(model, call)
    out: dict[str, float | int] = {"masked": int(call.masked.sum())}

    plain = torch.compile(model)(**call.kwargs(model)).logits
    out["plain"] = (plain - expected).abs().max().item()
    torch._dynamo.reset()

    run = Run(model, {"alpha": 1e9}, inner=None)
    out["all"] = (run.logits(call) - expected).abs().max().item()
    torch._dynamo.reset()

    run = Run(model, {"alpha": ALPHA}, inner=None)
    logits = run.logits(call)
    kept = retained(logits)
    out["kept"], out["wrong"], out["some"] = int(kept.sum()), 0, 0.0
    results = standalone_batch(
        model, call.ids, call.masked, call.past, call.positions, call.visible, Config(alpha=ALPHA)
    )
    for row, result in enumerate(results):
        out["wrong"] += int(kept[row].tolist() != result.retain_mask)
        error = (logits[row, result.retained] - result.logits).abs().max().item()
        out["some"] = max(out["some"], error)
    out["hits"] = counters["aot_autograd"]["autograd_cache_hit"]
    out["misses"] = counters["aot_autograd"]["autograd_cache_miss"]
    out["bypasses"] = counters["aot_autograd"]["autograd_cache_bypass"]
    out["fx_hits"] = counters["inductor"]["fxgraph_cache_hit"]
    out["fx_misses"] = counters["inductor"]["fxgraph_cache_miss"]
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
