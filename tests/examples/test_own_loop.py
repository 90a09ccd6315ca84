"""examples/own_loop.py: the loop that users copy, held against the eager FOCUS of the tests."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

import focus_compile
from focus_compile.backend import focus_backend
from tests.reference.generation import Decoding, generate_row
from tests.reference.state import Config
from tests.support.harness import eager_inner
from tests.support.paths import EXAMPLES


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OTHER = (
    "chain:j|1b;3u;h4;0g;m6;k8;f1;5w;z7;2r;tx;lk;qd;b3;y2;d5;ac;"
    "87;oe;w0;e9;rz;np;us;4h;jf;9v;x0;v0;sl;cy;g7;p6;="
)


@pytest.fixture(scope="module")
def compiled(example: ModuleType) -> Any:
    """The example's model, compiled with FOCUS, without Inductor."""
    model = Qwen3ForCausalLM.from_pretrained(example.CHECKPOINT).eval()
    mask = AutoTokenizer.from_pretrained(example.CHECKPOINT).mask_token_id

    def backend(gm: Any, inputs: Any) -> Any:
        options = {"mask_token_id": mask, "strict": True}
        return focus_backend(gm, inputs, options=options, inner=eager_inner)

    return torch.compile(model, backend=backend, dynamic=True)


def alone(example: ModuleType, model: Any, row: list[int]) -> list[int]:
    """The answer of one block, by the eager FOCUS of the tests."""
    tokenizer = AutoTokenizer.from_pretrained(example.CHECKPOINT)
    return generate_row(
        model,
        row,
        blocks=1,
        block_length=example.BLOCK,
        mask_id=tokenizer.mask_token_id,
        config=Config(),
        decoding=Decoding(confidence_threshold=example.THRESHOLD, ban_mask_token=True),
    ).tokens


def test_a_batch(example: ModuleType, compiled: Any) -> None:
    """Two prompts: the tokens of each decoded alone; FOCUS ran and evicted."""
    tokenizer = AutoTokenizer.from_pretrained(example.CHECKPOINT)
    ids = torch.tensor([tokenizer.encode(text) for text in (example.PROMPT, OTHER)])
    with focus_compile.session() as focus:
        made = example.my_denoising_loop(compiled, ids, 1, tokenizer.mask_token_id, focus)
        stats = focus.stats
    assert 0 < stats.retained < stats.fed < stats.canvas and stats.steps > 4
    for row, answer in zip(ids.tolist(), made.tolist(), strict=True):
        assert answer == alone(example, compiled._orig_mod, row)


def test_what_it_prints(
    example: ModuleType,
    compiled: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole script; README shows its output."""
    tokenizer = AutoTokenizer.from_pretrained(example.CHECKPOINT)
    monkeypatch.setattr(focus_compile, "compile", lambda *_, **__: compiled)
    example.main()
    lines = capsys.readouterr().out.splitlines()
    answer = alone(example, compiled._orig_mod, tokenizer.encode(example.PROMPT))
    assert lines[0] == tokenizer.decode(answer, skip_special_tokens=True) == "k6mr3n57ofjstagd9"
    print(*lines, sep="\n")
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert "examples/own_loop.py" in readme
    assert [line for line in lines if line not in readme] == []
