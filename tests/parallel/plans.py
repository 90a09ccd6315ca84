"""One rank of a small model, sharded by one plan after another; each call against eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import focus_compile
from tests.parallel.sharded import MASK, compiled, folder_of

MLP = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
PLANS: dict[str, dict[str, str]] = {
    "mlp": {f"model.layers.*.mlp.{name}": style for name, style in MLP.items()},
    "vocabulary": {"model.embed_tokens": "embedding_rowwise"},
    "features": {"model.embed_tokens": "embedding_colwise"},
    "sequence": {"model.norm": "sequence_parallel"},
}


@torch.no_grad()
def report_of(folder: Path) -> dict[str, Any]:
    """For each plan of ``PLANS``, refusals, the processes that share heads out, and how far logits
    are from eager ones when nothing is evicted."""
    path = folder_of("untied", folder)
    report: dict[str, Any] = {}
    for name, plan in PLANS.items():
        torch._dynamo.reset()
        config = AutoConfig.from_pretrained(path)
        config.base_model_tp_plan = {}  # else what a plan does not name is sharded as by "auto"
        sharded = DistributedConfig(tp_plan=plan)
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, distributed_config=sharded
        ).eval()
        ids = torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(0))
        ids[:, 2:] = MASK
        call = {"input_ids": ids, "attention_mask": torch.ones(3, 1, 7, 7, dtype=torch.bool)}
        story = focus_compile.explain(model, **call)
        function, _ = compiled(model, MASK, inductor=False, strict=False)
        with focus_compile.session(alpha=1e6) as focus:
            logits = function(**call).logits
        report[name] = {
            "refusals": [refusal.to_dict() for refusal in story.refusals],
            "ranks": [graph["analysis"]["ranks"] for graph in story.to_dict()["graphs"]]
            if story.applied
            else [],
            "steps": focus.stats.steps,
            "told": "heads shared out among" in str(story),
            "from_eager": float((logits - model(**call).logits).abs().max()),
        }
    return report
