"""What the package must never do with what it is given: checkpoints, names in models, paths."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import focus_compile
from focus_compile.cli import app
from tests.support.paths import ROOT
from tests.support.toy import Toy

SOURCES = sorted([*ROOT.glob("focus_compile/**/*.py"), *ROOT.glob("passes/*.py")])
MODULES = {
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "code", "pty", "ftplib", "http",
    "requests", "smtplib", "socket", "telnetlib", "urllib", "xmlrpc",
}  # fmt: skip
TRUST = "trust_remote_code"
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}


def offences(tree: ast.AST) -> Iterator[str]:
    """What runs strings, unpickles, asks a shell or reaches for the network."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (f"import {name}" for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                yield called
            for keyword in node.keywords:
                handed_on = isinstance(keyword.value, ast.Name) and keyword.value.id == TRUST
                if keyword.arg == "shell" or (keyword.arg == TRUST and not handed_on):
                    yield f"{called}({keyword.arg}=...)"
        if isinstance(node, ast.FunctionDef):
            yield from (f"{node.name}({TRUST}=True)" for _ in trusting(node.args))


def trusting(arguments: ast.arguments) -> Iterator[ast.arg]:
    """Parameters by which remote code is trusted unless the caller says no."""
    named = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*arguments.defaults]
    values = [*[None] * (len(named) - len(defaults)), *defaults, *arguments.kw_defaults]
    for argument, value in zip([*named, *arguments.kwonlyargs], values, strict=True):
        if argument.arg == TRUST and ast.unparse(value or ast.Constant(None)) != "False":
            yield argument


def test_no_source_runs_what_it_is_given() -> None:
    assert len(SOURCES) > 60
    found = {path.name: list(offences(ast.parse(path.read_text()))) for path in SOURCES}
    # a method's own syntax tree, changed: docs/security.md
    assert {name: what for name, what in found.items() if what} == {"source.py": ["compile"]}
    (adapters,) = (path for path in SOURCES if path.name == "source.py")
    assert 'compile(ast.fix_missing_locations(outer), file, "exec"' in adapters.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "eval(name)",
        "torch.load(path)",
        "os.system(line)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=not refused)",
        "def load(path, trust_remote_code=True): ...",
        "def load(path, *, trust_remote_code): ...",
    ],
)
def test_the_search_finds(text: str) -> None:
    assert list(offences(ast.parse(text)))


class Named(nn.Module):
    """A refused model, within a module of any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, Toy(lambda x: x.cumsum(1)))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = getattr(self, self.name)(ids)
        return out


@torch.no_grad()
@pytest.mark.parametrize("quote", ['"""', "'''", '""""', '\\"""', "\n"])
def test_names_are_text_in_the_script_of_a_refusal(quote: str, tmp_path: Path) -> None:
    """What a model calls its modules cannot become code of the script that ``save`` writes."""
    name = f"{quote}\nopen('written', 'w')\n{quote}"
    told = focus_compile.explain(Named(name).eval(), torch.randint(0, 23, (3, 9)))
    assert told.refusals and "written" in str(told)
    script = told.save(tmp_path) / "graph0_refused.py"
    docstring, *code = ast.parse(script.read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    assert "written" in docstring.value.value  # the refusal tells where it stands
    calls = [node for statement in code for node in ast.walk(statement)]
    calls = [ast.unparse(node.func) for node in calls if isinstance(node, ast.Call)]
    assert "torch.compile" in calls and "open" not in calls


@pytest.mark.parametrize(
    "path", ["$(touch written)", "; touch written", "`touch written`", "-h;touch written", "os:x'"]
)
def test_paths_are_data(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that a shell would run, or that looks like an option, is one clear error."""
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(app, ["explain", "--", path])
    assert made.exit_code == 2 and path in made.stderr and made.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
