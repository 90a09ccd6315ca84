"""The full grid of correctness through Inductor, resumable: one JSON line per case.

Every case: a budget that evicts nothing against eager, with plain Inductor's error beside it, and
an evicting budget against the eager reference. Run it from the root of the repository:

    python -m benchmarks.inductor_grid --out grid.jsonl
    python -m benchmarks.inductor_grid --quick

Cases that are in the file already are not run again; ``--summary FILE`` runs none, and writes a
record of what the file holds, from which docs/inductor_grid.md is made (``python -m docs.build``).
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.provenance import commit
from tests.reference.state import Config
from tests.reference.system import standalone_batch
from tests.support.harness import (
    MASK,
    Call,
    Run,
    Sizes,
    bound,
    build_model,
    eager_logits,
    random_call,
    retained,
)

SIZES = Sizes(layers=4)
TOKENS, SEEDS = 9, 3
MASKS = {"sdpa": ("bool", "float"), "eager": ("float",)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    attention: str
    mask: str
    dtype: str
    dynamic: bool | None
    batch: int
    history: int | None

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def cases() -> Iterator[Case]:
    """Grouped so that neighbours share a model and its captures."""
    for attention, masks in MASKS.items():
        for mask, dtype, dynamic in itertools.product(masks, DTYPES, (None, True, False)):
            for batch, history in itertools.product((1, 3, 8), (0, 17, 33, None)):
                yield Case(attention, mask, dtype, dynamic, batch, history)


def exact_of(model: Any, attention: str) -> Any:
    """The fp32 model with the same weights."""
    wide = build_model(SIZES, attention)
    with torch.no_grad():
        for target, source in zip(wide.parameters(), model.parameters(), strict=True):
            target.copy_(source)
    return wide


def dense(run: Run, call: Call) -> torch.Tensor:
    """Plain Inductor's logits."""
    run.configure(mask_token_id=None)
    with torch.no_grad():
        logits: torch.Tensor = run.compiled(**call.kwargs(run.model)).logits
    run.configure(mask_token_id=MASK)
    return logits


def measure(case: Case, run: Run, exact: Any) -> dict[str, Any]:
    """Largest errors over a few random calls; all are relative to fp32 eager."""
    dtype = DTYPES[case.dtype]
    out: dict[str, Any] = {"focus": 0.0, "inductor": 0.0, "eager": 0.0, "bound": 0.0}
    out |= {"evicted": 0, "rows": 0, "wrong_rows": 0, "evicting": 0.0}
    for seed in range(SEEDS):
        call = random_call(seed, run.model, case.batch, TOKENS, case.history, case.mask).to(dtype)
        run.configure(alpha=1e9)
        expected = eager_logits(exact, call.to(torch.float32))
        logits = run.logits(call).float()
        assert retained(logits).all()
        for name, value in (
            ("focus", logits),
            ("inductor", dense(run, call).float()),
            ("eager", eager_logits(run.model, call).float()),
        ):
            out[name] = max(out[name], (value - expected).abs().max().item())
        out["bound"] = max(out["bound"], bound(expected))
        if case.dtype != "fp32":
            continue
        run.configure(alpha=1.1)
        logits = run.logits(call)
        kept = retained(logits)
        out["evicted"] += int((~kept).sum())
        results = standalone_batch(
            run.model,
            call.ids,
            call.masked,
            call.past,
            call.positions,
            call.visible,
            Config(alpha=1.1),
        )
        for row, result in enumerate(results):
            out["rows"] += 1
            if kept[row].tolist() != result.retain_mask:
                out["wrong_rows"] += int(result.margin >= 1e-5)
                continue
            error = (logits[row, result.retained] - result.logits).abs().max().item()
            out["evicting"] = max(out["evicting"], error)
    out["ok"] = _ok(case, out)
    return out


def _ok(case: Case, out: dict[str, Any]) -> bool:
    if case.dtype != "fp32":
        return bool(out["focus"] <= 1.25 * out["eager"])
    limit = min(out["bound"], 2 * max(out["inductor"], 1e-6))
    return bool(
        out["focus"] <= limit
        and out["evicting"] <= 1e-4
        and out["wrong_rows"] == 0
        and out["evicted"] > 0
    )


def read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {Case(**line["case"]).key: line for line in lines}


def run_grid(wanted: Iterable[Case], path: Path | None) -> None:
    done = read(path) if path is not None else {}
    torch.set_num_threads(1)
    run, exact, group = None, None, None
    for case in wanted:
        if case.key in done:
            continue
        if group != (case.attention, case.mask, case.dtype, case.dynamic):
            group = (case.attention, case.mask, case.dtype, case.dynamic)
            torch._dynamo.reset()
            model = build_model(SIZES, case.attention, DTYPES[case.dtype])
            run, exact = (
                Run(model, inner=None, dynamic=case.dynamic),
                exact_of(model, case.attention),
            )
        assert run is not None
        with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
            line = {"case": asdict(case), **measure(case, run, exact)}
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def summarized(path: Path) -> dict[str, Any]:
    """How many cases are ok, and the largest errors, by attention, mask and dtype."""
    lines = list(read(path).values())
    key = ("attention", "mask", "dtype")
    rows = []
    for group, members in itertools.groupby(lines, lambda line: [line["case"][k] for k in key]):
        some = list(members)
        rows.append(
            dict(zip(key, group, strict=True))
            | {"cases": len(some), "ok": sum(line["ok"] for line in some)}
            | {
                name: f"{max(line[name] for line in some):.1e}"
                for name in ("focus", "inductor", "eager", "evicting")
            }
        )
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
        "commit": commit(),
        "sizes": str(SIZES),
        "cases": len(lines),
        "of": sum(1 for _ in cases()),
        "ok": sum(line["ok"] for line in lines),
        "rows": rows,
    }


def main(
    *,
    out: Path = Path("inductor_grid.jsonl"),
    summary: Annotated[Path | None, typer.Option(help="write a record, run nothing")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="two cases, into no file")] = False,
) -> None:
    """Run the cases that the file lacks."""
    if summary is not None:
        summary.write_text(json.dumps(summarized(out), indent=1) + "\n")
    elif quick:
        run_grid(itertools.islice(cases(), 2), None)
    else:
        run_grid(cases(), out)


if __name__ == "__main__":
    typer.run(main)
