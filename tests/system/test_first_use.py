"""What someone meets who has only read README: its code, short reprs, legends, bench, hub ids."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM
from typer.testing import CliRunner

import focus_compile
from benchmarks import provenance
from focus_compile.backend import focus_backend
from focus_compile.cli import app
from focus_compile.generation.generated import Generated
from focus_compile.graph.sizes import GENERIC
from focus_compile.models.load import BadInput, load, tokenizer
from focus_compile.reports import contest as contests
from focus_compile.reports.contest import Plan, contest, read_prompts
from focus_compile.reports.measure import measure
from focus_compile.views.describe import legend
from tests.support.harness import MASK, Sizes, build_model, eager_inner
from tests.support.paths import ROOT
from tests.support.stories import story
from tests.support.toy import Toy

CHECKPOINT = ROOT / "examples" / "tiny_dllm" / "aligned_checkpoint"


def run(*words: str) -> Any:
    torch._dynamo.reset()
    return CliRunner().invoke(app, list(words))


def without_inductor(gm: Any, inputs: Any, **options: Any) -> Any:
    return focus_backend(gm, inputs, **{**options, "inner": eager_inner})


def test_readme_defines_its_names() -> None:
    """Its longest block of Python uses no name that it does not define."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = max(blocks, key=len)
    assert "own_loop" not in code and "generate(" in code and "explain(" in code
    made = subprocess.run(
        [Path(sys.executable).with_name("ruff"), "check", "--isolated", "--select=F,E9", "-"],
        input=code,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout


def test_reprs_are_short() -> None:
    out = Generated(torch.zeros(2, 70, dtype=torch.int64), [torch.ones(2)], 9, 30, 0.5, 0.25)
    assert repr(out) == (
        "<Generated: 2 rows of 70 tokens, 1 blocks in 9 denoising forwards, 0 of them FOCUS's; "
        "fed 50%, retained 25%>"
    )
    told = story(5)
    assert repr(told).startswith("<Explanation: FOCUS applied: yes; graphs: 1, refusals: 0")
    assert "applied" in repr(told.graphs[0])
    refused = focus_compile.explain(Toy(lambda x: x.cumsum(1)).eval(), torch.zeros(2, 7).long())
    assert "FOCUS applied: no" in repr(refused)
    for value in (told, told.graphs[0], told.graphs[0].analysis, refused, refused.graphs[0]):
        assert len(repr(value)) < 200


def test_explain_at_80_columns() -> None:
    """The first line is the verdict, and no module's path is cut."""
    told = story(5)
    analysis = told.graphs[0].analysis
    assert analysis is not None
    paths = {site.module for site in analysis.plan.sites}
    words = "from tests.support.stories import story; story(5).print()"
    made = subprocess.run(
        [sys.executable, "-c", words], cwd=ROOT, env={"COLUMNS": "60", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert made.stdout.startswith("FOCUS applied: yes\n")
    assert "…" not in made.stdout and paths and "layers.0" in made.stdout


def test_legend_of_saved_graphs(tmp_path: Path) -> None:
    """What stands for sizes is told at the head of the files in which it occurs."""
    root = story(5).save(tmp_path)
    for name in ("graph0_before.py", "graph0_after.py", "graph0.diff"):
        text = (root / name).read_text()
        head = text[: text.index("\n", text.rindex("#   "))]
        told = dict(re.findall(r"^#   (\d+)  (.*)$", head, re.MULTILINE))
        assert told[str(GENERIC["batch"])] == "batch" and told["60020"] == "history + token"
        for number in set(GENERIC.values()):
            assert (str(number) in told) == (
                re.search(rf"\b{number}\b", text[len(head) :]) is not None
            )
    assert legend("view(3, 12345)") == ""
    assert "history2" in legend(f"view({GENERIC['history'] + 36})")


def real_call(tokens: int, masks: slice) -> dict[str, Any]:
    ids = torch.randint(0, MASK, (2, tokens), generator=torch.Generator().manual_seed(1))
    ids[:, masks] = MASK
    visible = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": visible, "use_cache": False}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr("focus_compile.reports.measure.focus_backend", without_inductor)
    yield


def test_eviction_is_forced(quick: None) -> None:
    """A signal that keeps the last mask keeps them all: the forced budget evicts all the same."""
    model = build_model(Sizes(layers=3))
    made = measure(model, (), real_call(15, slice(2, 13)), MASK)
    assert made is not None and made.equal and made.tested
    assert made.steps == 6 and made.evicted > 30
    assert made.nothing_evicted <= made.tolerance


def test_not_tested_is_said(quick: None) -> None:
    """With one mask in a row there is nothing to evict, whatever the budget."""
    model = build_model(Sizes(layers=3))
    told = focus_compile.explain(model, run=True, mask_token_id=MASK, **real_call(9, slice(3, 4)))
    made = told.measured
    assert made is not None and made.equal and not made.tested and made.evicted == 0
    assert "not tested: nothing was evicted" in str(told)
    assert made.to_dict()["tested"] is False


@pytest.fixture
def contestant(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Any, Any]]:
    """The shipped model and its tokenizer, compiled without Inductor."""

    def compiled(model: Any, *, mask_token_id: int, **_: Any) -> Any:
        options = {"mask_token_id": mask_token_id, "strict": True}

        def backend(gm: Any, inputs: Any) -> Any:
            return without_inductor(gm, inputs, options=options)

        return torch.compile(model, backend=backend, dynamic=True)

    monkeypatch.setattr(contests, "compile_model", compiled)
    torch._dynamo.reset()
    words = AutoTokenizer.from_pretrained(CHECKPOINT)
    return lambda: (Qwen3ForCausalLM.from_pretrained(CHECKPOINT).eval(), words)


def test_bench_of_a_model(contestant: Any, tmp_path: Path) -> None:
    """Both sides decode every prompt; on these tasks answers agree, and the numbers add up."""
    file = tmp_path / "prompts.txt"
    file.write_text("order:b32c15a63=\n\norder:c32d15a6=\n", encoding="utf-8")
    words = ["bench", str(CHECKPOINT), "--prompts", str(file), "--batch", "2", "--rounds", "2"]
    made = run(*words, "--max-new-tokens", "32", "--json")
    assert made.exit_code == 0, made.output
    data = json.loads(made.stdout)
    assert data["prompts"] == 2 and data["same_answers"] == data["same_tokens"] == 1
    dense, focus = data["dense"], data["focus"]
    assert dense["fed"] == dense["retained"] == 1 and dense["focus_steps"] == 0
    assert focus["focus_steps"] == focus["forwards"] > 0 and focus["retained"] <= focus["fed"] < 1
    assert len(dense["seconds"]) == len(focus["seconds"]) == 2
    ratios = [a / b for a, b in zip(dense["seconds"], focus["seconds"], strict=True)]
    assert data["speedup"]["min"] == pytest.approx(min(ratios) * focus["tokens"] / dense["tokens"])


def test_answers_that_differ(contestant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FOCUS that decodes something else is found out, token by token."""
    model, words = contestant()
    plain = contests.generate

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        if out.focus_steps:
            out.sequences[0, -32] = 5 if out.sequences[0, -32] != 5 else 6
        return out

    monkeypatch.setattr(contests, "generate", wrong)
    prompts = ["order:b32c15a63=", "order:b32c15a63="]
    plan = Plan(batch=2, max_new_tokens=32, rounds=1)
    made = contest(model, words, words.mask_token_id, prompts, plan, quiet=True)
    assert made.same_answers == 0.5
    assert made.same_tokens == pytest.approx(1 - 1 / (2 * len("a63b32c15 ")))
    assert "speed-up: " in str(made) and "same answers: 50.0%" in str(made)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.txt", "\n \n", "holds no prompts: every line is blank"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": 3}\n', 'p.jsonl:2: expected {"prompt": text}'),
        ("p.jsonl", '{"prompt": 3}\n', 'p.jsonl:1: expected {"prompt": text}'),
        ("p.jsonl", "[1]\n", 'p.jsonl:1: expected {"prompt": text}'),
    ],
)
def test_prompts_that_are_none(name: str, text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput) as raised:
        read_prompts(tmp_path / name)
    assert told in str(raised.value)


def test_prompts(tmp_path: Path) -> None:
    """Lines end with newlines alone; a byte order mark is none of the text."""
    text = tmp_path / "p.txt"
    text.write_bytes("\ufeffone\u2028two\r\n{three\n".encode())
    assert read_prompts(text) == ["one\u2028two", "{three"]
    lines = tmp_path / "p.jsonl"
    lines.write_bytes('\ufeff{"prompt": "one\u2028two"}\n'.encode())
    assert read_prompts(lines) == ["one\u2028two"]
    with pytest.raises(BadInput, match="holds no prompts"):
        read_prompts(tmp_path / "nowhere")


def test_bench_says_what_is_missing(contestant: Any, tmp_path: Path) -> None:
    made = run("bench", str(CHECKPOINT))
    assert made.exit_code == 2 and "needs --prompts FILE" in made.stderr
    made = run("bench", "--prompts", "x")
    assert (
        made.exit_code == 2 and "--prompts needs a model: focus-compile bench PATH" in made.stderr
    )
    model, words = contestant()
    words.bos_token = words.eos_token = None
    with pytest.raises(ValueError, match="an empty prompt: this tokenizer has no token that"):
        contest(model, words, words.mask_token_id, [""], Plan(), quiet=True)


def test_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure measured in an unpacked archive, or without git, is no traceback."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "benchmarks" / "provenance.py"))
    assert provenance.commit() == "unknown"
    monkeypatch.undo()
    monkeypatch.setattr(provenance.shutil, "which", lambda _: None)
    assert provenance.commit() == "unknown"


REMOTE = """
import os, pathlib
from transformers import PretrainedConfig, PreTrainedModel
pathlib.Path(__file__).with_name("ran").touch()
class Config(PretrainedConfig):
    model_type = "mine"
class Model(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.post_init()
    def forward(self, x):
        return x
"""


def test_remote_code_runs_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that names an ``AutoModel`` of its own files, as Dream's does."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.py").write_text(REMOTE)
    names = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    with pytest.raises(BadInput, match="--trust-remote-code"):
        load(str(folder))
    assert not list(tmp_path.rglob("ran"))
    made = run("explain", str(folder))
    assert made.exit_code == 2 and "--trust-remote-code (docs/security.md)" in made.stderr
    torch.save({}, folder / "pytorch_model.bin")
    model, call = load(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "Model" and call is None
    assert list(tmp_path.rglob("ran"))


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``owner/name`` goes to transformers, and whether to trust goes with it, always."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def fails(path: str, **options: Any) -> Any:
        seen.append((path, options))
        raise OSError("there is\nno network")

    for name in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(f"focus_compile.models.load.{name}.from_pretrained", fails)
    for ask in (load, tokenizer):
        with pytest.raises(BadInput, match=r"^some-one/a\.model-8B: there is no network$"):
            ask("some-one/a.model-8B")
        with pytest.raises(BadInput, match="there is no network"):
            ask("some-one/a.model-8B", True)
    told = [(path, options["trust_remote_code"]) for path, options in seen]
    assert told == [("some-one/a.model-8B", False), ("some-one/a.model-8B", True)] * 2
    seen.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("models/none", "a/b/c", "../up", "-x/y", "a b/c"):  # folders that are not there
        with pytest.raises(BadInput, match="no such folder"):
            load(path)
    assert not seen
