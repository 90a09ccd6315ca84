"""Write docs/versions.md: which tests passed on which PyTorch, transformers and Python.

    python docs/versions.py --run tests/fused                run them here, and record it
    python docs/versions.py --read report.xml                record pytest --junitxml's
    python docs/versions.py --read report.xml --note TEXT    and say what explains its failures
    python docs/versions.py                                  write the page anew

What is recorded lies in docs/versions.json. A report must come from the interpreter that reads it.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.provenance import commit  # noqa: E402  a script of docs/ is run by its path

PAGE = Path(__file__).with_suffix(".md")
RECORD = PAGE.with_suffix(".json")
OUTCOMES = ("passed", "failed", "skipped")
HEAD = """# Versions

Which tests passed where, one row per run of a commit: on a CPU, unless a device is named. Failed
tests are named below, run by run. `.ci/run` installs the versions of `.ci/constraints.txt`.
Written by `python -m docs.build` from docs/versions.json, which `python docs/versions.py` adds to.

| torch | transformers | triton | Python | commit | tests | passed | failed | skipped | day |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def here() -> dict[str, str]:
    """The versions of this interpreter's packages."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def outcomes(report: Path) -> dict[str, Any]:
    """Per test file, how many tests passed, failed and were skipped; and which failed."""
    files: dict[str, Counter[str]] = {}
    failed: list[str] = []
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {part.tag for part in case}
        outcome = "failed" if tags & {"failure", "error"} else "passed"
        outcome = "skipped" if "skipped" in tags else outcome
        file = case.attrib["classname"].replace(".", "/") or case.attrib["name"]
        files.setdefault(file, Counter())[outcome] += 1
        if outcome == "failed":
            failed.append(f"{file}::{case.attrib['name']}")
    counts = {file: [count[name] for name in OUTCOMES] for file, count in sorted(files.items())}
    return {"files": counts, "failed": failed}


def add(
    runs: list[dict[str, Any]], report: Path, where: dict[str, str], note: str | None = None
) -> list[dict[str, Any]]:
    """The record with a report; what it says of a test file replaces what was said before."""
    found = outcomes(report)
    same = [run for run in runs if all(run[name] == value for name, value in where.items())]
    others = [run for run in runs if run not in same]
    files: dict[str, Any] = {}
    failed: list[str] = []
    for run in same:
        files |= run["files"]
        failed += [name for name in run["failed"] if name.partition("::")[0] not in found["files"]]
    made = {
        "files": dict(sorted((files | found["files"]).items())),
        "failed": failed + found["failed"],
    }
    notes = [run["note"] for run in same if "note" in run]
    made["note"] = " ".join([*notes, note] if note else notes)
    return [*others, where | made | {"day": date.today().isoformat()}]


def record() -> list[dict[str, Any]]:
    """What docs/versions.json holds."""
    runs: list[dict[str, Any]] = json.loads(RECORD.read_text()) if RECORD.exists() else []
    return runs


def text(runs: list[dict[str, Any]]) -> str:
    """The page."""
    lines = []
    for run in sorted(runs, key=lambda run: (_numbers(run["torch"]), run["day"])):
        names = [name.removeprefix("tests/") for name in run["files"]]
        told = f"{len(names)} files" if len(names) > 6 else ", ".join(names)
        totals = [sum(counts[index] for counts in run["files"].values()) for index in range(3)]
        cells = [run[name] for name in ("torch", "transformers", "triton", "python", "commit")]
        lines.append("| " + " | ".join([*cells, told, *map(str, totals), run["day"]]) + " |")
    return HEAD + "\n".join(lines) + "\n" + "".join(map(_failures, runs))


def _failures(run: dict[str, Any]) -> str:
    """What a run's note says, and the tests that failed."""
    lines = [f"- `{name}`" for name in run["failed"]]
    if run.get("note"):
        lines = [*textwrap.wrap(run["note"], 100), "", *lines]
    if not lines:
        return ""
    title = f"## torch {run['torch']}, {run['commit']}: {len(run['failed'])} failed"
    return "\n" + "\n".join([title, "", *lines]).rstrip() + "\n"


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.partition("+")[0].split("."))


def main(
    *,
    run: Annotated[list[str] | None, typer.Option(help="test file or folder to run here")] = None,
    read: Annotated[Path | None, typer.Option(help="a report of pytest --junitxml")] = None,
    note: Annotated[str | None, typer.Option(help="what a reader must know of this run")] = None,
) -> None:
    """Record a run, if one is given, and write the page."""
    runs = record()
    where = here() | {"commit": commit()}
    if read is not None:
        runs = add(runs, read, where, note)
    if run:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "--junitxml", str(report), *run]
            subprocess.run(command, cwd=ROOT, check=False)
            runs = add(runs, report, where, note)
    RECORD.write_text(json.dumps(runs, indent=1) + "\n")
    PAGE.write_text(text(runs))


if __name__ == "__main__":
    typer.run(main)
