"""One process of a model that is sharded by transformers' ``tp_plan="auto"``.

torchrun --nproc-per-node 2 -m tests.parallel.sharded FOLDER

Writes ``RANK.json``: what the backend said of the graph, and how far logits are from eager ones, of
the sharded model and of a whole one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import focus_compile
from focus_compile import focus_backend
from tests.harness import eager_inner

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_dllm" / "checkpoint"


@torch.no_grad()
def main(folder: Path) -> None:
    torch.set_num_threads(1)
    whole = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, tp_plan="auto").eval()
    projection = model.model.layers[0].self_attn.q_proj.weight
    mask = model.config.vocab_size - 1
    ids = torch.randint(0, mask, (3, 7), generator=torch.Generator().manual_seed(0))
    ids[:, 2:] = mask
    call = {"input_ids": ids, "attention_mask": torch.ones(3, 1, 7, 7, dtype=torch.bool)}
    story = focus_compile.explain(model, **call)

    def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        return focus_backend(gm, inputs, options={"mask_token_id": mask}, inner=eager_inner)

    made = torch.compile(model, backend=backend)(**call).logits
    report = {
        "local_heads": projection.to_local().shape[0] // model.config.head_dim,
        "refusals": [refusal.to_dict() for refusal in story.refusals],
        "from_eager": float((made - model(**call).logits).abs().max()),
        "from_whole": float((made - whole(**call).logits).abs().max()),
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
