"""One rank of a model that transformers' ``tp_plan="auto"`` shards, against a whole one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

import focus_compile
from focus_compile import focus_backend
from tests.support.checkpoints import save_first_layers
from tests.support.harness import eager_inner, halves_through_inductor
from tests.support.paths import TINY

CHECKPOINT = TINY / "aligned_checkpoint"
MASK, BLOCK, NEW = 63, 8, 16
SMALL: dict[str, Any] = {
    "vocab_size": 66, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 96,
}  # fmt: skip
"""A vocabulary that two processes share evenly and four do not."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "tied": lambda: Qwen3Config(**SMALL, tie_word_embeddings=True),
    "untied": lambda: Qwen3Config(**SMALL, tie_word_embeddings=False),
    "experts": lambda: Qwen3MoeConfig(**SMALL, **EXPERTS),
}


def folder_of(case: str, folder: Path) -> Path:
    """A model that rank 0 saves: three layers of the trained one, or one of random weights."""
    path = folder / case
    if dist.get_rank() == 0:
        if case == "trained":
            save_first_layers(CHECKPOINT, path)
        else:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[case]()).save_pretrained(path)
    dist.barrier()
    return path


def compiled(model: Any, mask: int, inductor: bool, strict: bool = True) -> tuple[Any, list[Any]]:
    """With FOCUS, refusals being errors; and the executables that were made."""
    made: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        options = {"mask_token_id": mask, "strict": strict}
        inner = None if inductor else eager_inner
        made.append(focus_backend(gm, inputs, options=options, inner=inner))
        return made[-1]

    return torch.compile(model, backend=backend, dynamic=True), made


def run(model: Any, ids: torch.Tensor, mask: int, inductor: bool, rescue: float) -> dict[str, Any]:
    """A generation of two blocks for prompts of two lengths, dense and with FOCUS."""
    visible = torch.ones_like(ids)
    visible[0, :3] = 0
    out: dict[str, Any] = {}
    callable_, made = compiled(model, mask, inductor)
    for name, enabled in (("focus", True), ("dense", False)):
        with focus_compile.session(enabled=enabled):
            result = focus_compile.generate(
                callable_,
                ids,
                visible,
                max_new_tokens=NEW,
                block_length=BLOCK,
                mask_token_id=mask,
                remasking_strategy="fixed",
                tokens_per_step=2,
                rescue=rescue,
                return_dict=True,
            )
        out[name] = {
            "tokens": result.sequences.tolist(),
            "retained": [keep.tolist() for keep in result.retain_masks],
            "rescued": [keep.tolist() for keep in result.rescue_masks],
            "forwards": result.forwards,
        }
    out["heads"] = [each.layout.slots[0].shape[1] for each in made if hasattr(each, "layout")]
    return out


@torch.no_grad()
def report_of(folder: Path, case: str, inductor: bool) -> dict[str, Any]:
    """What the rank's sharded model decodes and retains, with FOCUS and densely; rank 0 also runs a
    whole model. ``inductor``: prefix and suffix of the sharded one go through it."""
    path = folder_of(case, folder)
    mask = MASK if case != "trained" else AutoConfig.from_pretrained(path).vocab_size - 1
    ids = torch.randint(0, mask, (3, 7), generator=torch.Generator().manual_seed(0))
    plan = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=plan).eval()
    rescue = 0.2 if case == "trained" else 0.025  # some rows of some steps are sure of less
    through = halves_through_inductor() if inductor else contextlib.nullcontext([])
    with through as halves:
        report = {"sharded": run(model, ids, mask, inductor, rescue)}
    assert bool(halves) == inductor
    if dist.get_rank() == 0:
        torch._dynamo.reset()
        whole = AutoModelForCausalLM.from_pretrained(path).eval()
        report["whole"] = run(whole, ids, mask, inductor=False, rescue=rescue)
    return report
