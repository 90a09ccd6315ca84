"""Whatever goes wrong on the command line is one line and exit code 2, after what was computed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import focus_compile
from focus_compile import cli
from tests.support.harness import Sizes, build_model
from tests.support.words import MASK, characters

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 9\n"


def factory() -> nn.Module:
    return build_model(Sizes(layers=2))


def with_arguments(size: int) -> nn.Module:
    return factory()


def without_config() -> nn.Module:
    return nn.Linear(2, 2)


def failing() -> nn.Module:
    raise KeyError("no such size\nin this table")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers hold characters that ASCII lacks."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    model = build_model(Sizes(layers=2))
    model.save_pretrained(folder)
    words = characters(eos_token=None)
    words.save_pretrained(folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    known = table["model"]["vocab"]
    table["model"]["vocab"] = {
        word if index < 10 else chr(0x410 + index): index for word, index in known.items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return folder


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "model"))


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "compile_model", lambda model, **_: model)


def run(*words: Any) -> Result:
    torch._dynamo.reset()
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def line(made: Result) -> str:
    """What a failing command says."""
    assert made.exit_code == 2, (made.output, made.exception)
    assert made.stderr.count("\n") == 1 and made.stderr.startswith("focus-compile: ")
    return made.stderr


def pointer(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(POINTER)


def cut(folder: Path, keep: int = -7) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (pointer("model.safetensors"), "is a pointer of git-lfs and not the file itself"),
    "tokenizer": (pointer("tokenizer.json"), "tokenizer.json is a pointer of git-lfs"),
    "pickle": (pointer("pytorch_model.bin"), "run `git lfs pull`"),
    "end": (cut, "model.safetensors is cut off or damaged: download it again"),
    "header": (lambda folder: cut(folder, 50), "is cut off or damaged"),
    "empty": (lambda folder: cut(folder, 0), "is cut off or damaged"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "words": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "(--traceback shows where",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(folder: Path, name: str) -> None:
    damage, told = DAMAGES[name]
    damage(folder)
    commands = [["generate", folder, "--prompt", "a"]]
    if name not in ("tokenizer", "words"):
        commands.append(["explain", folder])
    for command in commands:
        assert told in line(run(*command)), command


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("with_arguments", "is no function that can be called without arguments"),
        ("MASK", "is no function that can be called without arguments"),
        ("without_config", "Linear has no config: let the function return the model and"),
        ("failing", "KeyError: 'no such size"),
    ],
)
def test_functions(name: str, told: str) -> None:
    made = run("explain", f"tests.commands.test_cli_failures:{name}")
    assert told in line(made) and (MASK, made.stdout) == (MASK, "")


def test_a_traceback_is_asked_for() -> None:
    made = run("explain", "tests.commands.test_cli_failures:failing", "--traceback")
    assert isinstance(made.exception, KeyError)


def test_answers_come_before_what_fails(folder: Path, tmp_path: Path) -> None:
    """Prompts with the mask token, padded, without padding and end tokens; then the trace fails."""
    words = ["generate", folder, "--prompt", "ab", "--prompt", "c[M]", "--max-new-tokens", 4]
    words += ["--block", 4]
    whole = run(*words)
    assert whole.exit_code == 0 and len(whole.stdout.splitlines()) == 2, whole.output
    for place in (tmp_path / "nowhere" / "trace.json", tmp_path):
        made = run(*words, "--trace", place)
        assert str(place) in line(made) and made.stdout == whole.stdout
        assert json.loads(run(*words, "--json", "--trace", place).stdout)["answers"]
    assert "--prompt is empty: give a text to go on from" in line(run(*words, "--prompt", ""))


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    """The story is told all the same."""
    (tmp_path / "file").touch()
    source = "tests.commands.test_cli_failures:factory"
    made = run("explain", source, "--block", 4, "--history", 0, "--save", tmp_path / "file" / "x")
    assert "attention sites" in made.stdout and "file" in line(made)
    made = run("report", source, "--block", 4, "--history", 0, "-o", tmp_path)
    assert str(tmp_path) in line(made)


def test_a_terminal_of_few_characters(stored: Path) -> None:
    """As a program, whose output is ASCII: the characters that it lacks are written as escapes."""
    script = "import focus_compile.cli as c; c.compile_model = lambda model, **_: model; c.app()"
    words = [stored, "--prompt", "\u0420", "--max-new-tokens", 4, "--block", 4]
    made = subprocess.run(
        [sys.executable, "-c", script, "generate", *map(str, words)],
        check=False,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": os.getcwd()},
    )
    assert made.returncode == 0, made.stderr
    assert b"Traceback" not in made.stderr and made.stdout.strip()


def test_version() -> None:
    made = run("--version")
    assert made.exit_code == 0
    assert made.stdout == f"focus-compile {focus_compile.__version__} (torch {torch.__version__})\n"
