"""The batch examples: workers and whole jobs are killed, the answers are those of one process.

The first three layers of the trained toy compile in less than half of its time, in each of a dozen
processes; their answers are wrong, but they are answers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests.support.checkpoints import save_first_layers
from tests.support.paths import EXAMPLES, TINY

PROMPTS, BATCH, LIMIT = 32, 2, 500
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
"""``torch.compile`` gives the model back: for jobs whose processes are killed again and again."""
OPTIONS = ["--batch", str(BATCH), "--max-new-tokens", "64", "--model"]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


offline = load(EXAMPLES / "offline.py")
tasks = load(EXAMPLES / "tiny_dllm" / "tasks.py")


def arguments(folder: Path) -> list[str]:
    return [*OPTIONS, str(folder / "model")]


def torchrun(processes: int, restarts: int, *files: Path) -> list[str]:
    script = str(EXAMPLES / "batch_torchrun.py")
    module = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts)]
    job = [f"--nproc-per-node={processes}", script, *map(str, files), *arguments(files[0].parent)]
    return [sys.executable, *module, *job]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """In a group of its own, so that all of it can be killed."""
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Standard error of a job that succeeds."""
    error = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 0, error
    return error


def wait(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_one(process: subprocess.Popen[str], name: str) -> None:
    """Kill one of a job's processes whose command holds a name."""
    for child in reversed(psutil.Process(process.pid).children(recursive=True)):
        with suppress(psutil.Error):
            if name in " ".join(child.cmdline()):
                child.kill()
                return
    raise AssertionError(f"no process {name}")


def parts(out: Path) -> set[str]:
    return {path.name for path in out.with_name(out.name + ".parts").glob("*.jsonl")}


def answered(error: str) -> int:
    """Prompts that the processes say they answered."""
    (counts,) = re.findall(r"workers answered ([\d, ]+) of", error) or [
        ",".join(re.findall(r"rank \d answered (\d+) of", error))
    ]
    return sum(map(int, counts.split(",")))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the model that answers them."""
    path = tmp_path_factory.mktemp("batch") / "prompts.jsonl"
    save_first_layers(TINY / "aligned_checkpoint", path.with_name("model"))
    drawn = tasks.examples("order", PROMPTS, 7)
    lines = [json.dumps({"id": f"n{n}", "prompt": each.prompt}) for n, each in enumerate(drawn)]
    path.write_text("\n".join(lines))
    return path


def alone(prompts: Path, name: str, **environment: str) -> str:
    """What one process writes."""
    out = prompts.with_name(name)
    script = str(EXAMPLES / "batch_torchrun.py")
    command = [sys.executable, script, str(prompts), str(out), *arguments(prompts.parent)]
    error = finish(start(command, **environment))
    assert answered(error) == PROMPTS and not out.with_name(f"{name}.parts").exists()
    return out.read_text()


@pytest.fixture(scope="module")
def one(prompts: Path) -> str:
    """What one process writes, with FOCUS."""
    return alone(prompts, "one.jsonl")


def test_one_process(prompts: Path, one: str) -> None:
    """A line for each prompt, in their order, with what they hold."""
    asked = [json.loads(line) for line in prompts.read_text().splitlines()]
    told = [json.loads(line) for line in one.splitlines()]
    assert [{name: line[name] for name in ("id", "prompt")} for line in told] == asked
    assert len({line["answer"] for line in told}) > PROMPTS / 4
    assert all(len(line["answer"]) >= line["tokens"] for line in told)  # a task's name is a token
    assert all(bool(line["answer"]) == bool(line["tokens"]) for line in told)


def test_torchrun(prompts: Path) -> None:
    """Killed: one of two workers, whom torchrun starts again; then all; then it is resumed."""
    one, out = alone(prompts, "eager.jsonl", **EAGER), prompts.with_name("two.jsonl")
    job = start(torchrun(2, 2, prompts, out), **EAGER)
    wait(job, lambda: len(parts(out)) >= 2)
    kill_one(job, "batch_torchrun.py")
    before = parts(out)
    wait(job, lambda: len(parts(out)) >= len(before) + 2)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    for process in psutil.process_iter(["cmdline"]):  # torchrun gives workers groups of their own
        if str(out) in (process.info["cmdline"] or []):
            with suppress(psutil.Error):
                process.kill()
                process.wait(30)
    kept = parts(out)
    assert before < kept and len(kept) < PROMPTS / BATCH
    assert not out.exists()
    error = finish(start(torchrun(2, 0, prompts, out), **EAGER))
    assert answered(error) == PROMPTS - BATCH * len(kept)
    assert out.read_text() == one


def test_ray(prompts: Path, one: str) -> None:
    """One of two actors is killed; Ray starts another."""
    out = prompts.with_name("ray.jsonl")
    script = str(EXAMPLES / "batch_ray.py")
    job = start(
        [
            sys.executable,
            script,
            str(prompts),
            str(out),
            "--workers",
            "2",
            *arguments(prompts.parent),
        ]
    )
    wait(job, lambda: len(parts(out)) >= 2)
    kill_one(job, "ray::MapWorker")
    error = finish(job)
    assert answered(error) == PROMPTS
    assert error.count("Loading weights") >= 3, "no third worker"
    assert out.read_text() == one


def options(**changed: Any) -> Any:
    given = {"model": "m", "batch": 2, "max_new_tokens": 8, "block_length": 4}
    return offline.Options(**{**given, "threshold": 0.9, "alpha": 1.5, "dense": False, **changed})


def test_parts(tmp_path: Path) -> None:
    """The longest prompts first; merged in the order of the file; then nothing is left."""
    texts = ["bb", "a", "ccc", "dd", "eeee"]
    (tmp_path / "in").write_text(
        "".join(json.dumps({"prompt": text, "line": 0}) + "\n\n" for text in texts)
    )
    job = offline.Job(tmp_path / "in", tmp_path / "out", options())
    assert [job.prompts(part) for part in job.missing()] == [["eeee", "ccc"], ["bb", "dd"], ["a"]]
    job.write(1, [{"answer": "B"}, {"answer": "D"}])
    again = offline.Job(tmp_path / "in", tmp_path / "out", options())
    assert again.missing() == [0, 2] and again.done(1)
    again.write(0, [{"answer": "E"}, {"answer": "C"}])
    again.write(2, [{"answer": "A"}])
    again.merge()
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    answered = [{"prompt": text, "line": 0, "answer": text[0].upper()} for text in texts]
    assert lines == answered
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    job = offline.Job(tmp_path / "in", tmp_path / "out", options())
    with pytest.raises(ValueError, match=r"out\.parts holds answers of another job: remove it"):
        offline.Job(tmp_path / "in", tmp_path / "out", options(alpha=2.0))
    job.write(0, [{}, {}])
    (tmp_path / "out.parts" / "000001.jsonl").write_text("[0, {}]\n")
    with pytest.raises(RuntimeError, match="not every prompt has one answer"):
        job.merge()
    (tmp_path / "done").touch()
    with pytest.raises(ValueError, match="done exists: remove it"):
        offline.Job(tmp_path / "in", tmp_path / "done", options())
    for text in ("", '{"text": "a"}\n', '["a"]\n'):
        (tmp_path / "in").write_text(text)
        with pytest.raises(ValueError, match=r"in: expected lines like \{\"prompt\": \"text\"\}"):
            offline.Job(tmp_path / "in", tmp_path / "new", options())
