"""A job of many prompts, in parts that many processes write: what the batch examples share.

Prompts are JSONL in UTF-8, ``{"prompt": text}`` a line, with ``"id"`` if you like. One that cannot
be answered, such as an empty one for a tokenizer that has nothing to begin a text with, gets an
``"error"`` instead; the others are answered. A part is one batch of prompts of about one length,
the longest first. Each is written under another name and then renamed, so that a part is there
whole or not at all: whoever comes back after a crash does what is missing. Batches do not depend on
who computes them, so that the merged answers are those of one process.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import focus_compile
from focus_compile.generation.text import answers, end_tokens, left_padded, prompt_ids
from focus_compile.models.mask_token import find_mask_token

CHECKPOINT = Path(__file__).resolve().parent / "tiny_dllm" / "aligned_checkpoint"


@dataclass(frozen=True)
class Options:
    """How to decode."""

    model: str
    batch: int
    max_new_tokens: int
    block_length: int
    threshold: float
    alpha: float
    dense: bool


class Job:
    """The parts of a file of prompts, and the folder ``OUT.parts`` that fills with answers.

    Raises:
        OSError: the file is not to be read, or the folder not to be made.
        ValueError: the file holds no prompts, a line of it is none, ``OUT`` is there already, or
            the folder is that of another job.
    """

    def __init__(self, prompts: Path, out: Path, options: Options) -> None:
        self.out, self.options = out, options
        data = prompts.read_bytes()
        self.prompt_file, self.rows, self.lines = prompts, list[dict[str, Any]](), list[int]()
        for number, line in enumerate(data.split(b"\n"), 1):  # no other character ends a line
            if line.strip(b" \t\r" + codecs.BOM_UTF8):
                self.rows.append(_row(prompts, number, line))
                self.lines.append(number)
        if not self.rows:
            raise ValueError(f"{prompts}: {EXPECTED}, but there is none")
        if out.exists():
            raise ValueError(f"{out} exists: remove it, or give another name")
        order = sorted(range(len(self.rows)), key=lambda i: (-len(self.rows[i]["prompt"]), i))
        size = options.batch
        self.parts = [order[at : at + size] for at in range(0, len(order), size)]
        self.folder = out.with_name(out.name + ".parts")
        self.folder.mkdir(parents=True, exist_ok=True)
        same = hashlib.sha256(data + json.dumps(asdict(options)).encode()).hexdigest()
        if (name := self.folder / "job").exists() and name.read_text() != same:
            raise ValueError(f"{self.folder} holds answers of another job: remove it")
        _write(name, same)

    def done(self, part: int) -> bool:
        """Whether a part is written."""
        return self._path(part).exists()

    def missing(self) -> list[int]:
        """Numbers of the parts that are not written yet."""
        return [part for part in range(len(self.parts)) if not self.done(part)]

    def prompts(self, part: int) -> list[str]:
        """The texts of a part."""
        return [self.rows[line]["prompt"] for line in self.parts[part]]

    def write(self, part: int, answers: list[dict[str, Any]]) -> None:
        """Keep a part's answers, one for each of its prompts."""
        lines = [
            (line, self.rows[line] | answer)
            for line, answer in zip(self.parts[part], answers, strict=True)
        ]
        _write(self._path(part), "".join(json.dumps(line) + "\n" for line in lines))

    def merge(self) -> list[str]:
        """Write ``OUT``, in the order of the prompts, and remove the parts.

        Returns a line for each prompt that has no answer.

        Raises:
            RuntimeError: a line is lost or doubled.
        """
        paths = [self._path(part) for part in range(len(self.parts))]
        lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        lines.sort(key=lambda line: line[0])
        if [number for number, _ in lines] != list(range(len(self.rows))):
            raise RuntimeError(f"{self.folder}: not every prompt has one answer")
        _write(self.out, "".join(json.dumps(row) + "\n" for _, row in lines))
        for path in (*paths, self.folder / "job"):
            path.unlink()
        self.folder.rmdir()
        return [
            f"{self.prompt_file}, line {self.lines[number]}: {row['error']}"
            for number, row in lines
            if "error" in row and "error" not in self.rows[number]
        ]

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.jsonl"


class Worker:
    """A compiled model that answers batches of prompts."""

    def __init__(self, options: Options, device: str = "cpu") -> None:
        self.options, self.device = options, device
        self.tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model).eval().to(device)
        self.compiled = focus_compile.compile(model, self.tokenizer, dynamic=True, strict=True)
        self.mask = find_mask_token(model, self.tokenizer)

    def __call__(self, prompts: list[str]) -> list[dict[str, Any]]:
        """``{"answer": text, "tokens": number}`` for each prompt, or ``{"error": why}``."""
        told: list[dict[str, Any]] = []
        fed: list[list[int]] = []
        for prompt in prompts:
            try:
                fed.append(prompt_ids(self.tokenizer, prompt))
                told.append({})
            except ValueError as error:
                told.append({"error": str(error)})
        made = iter(self._answer(fed) if fed else [])
        return [row or next(made) for row in told]

    def _answer(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        ids, real = left_padded(prompts)
        ends = end_tokens(self.tokenizer, self.compiled)
        with focus_compile.session(
            self.mask, alpha=self.options.alpha, enabled=not self.options.dense
        ):
            made = focus_compile.generate(
                self.compiled,
                ids.to(self.device),
                real.to(self.device),
                max_new_tokens=self.options.max_new_tokens,
                block_length=self.options.block_length,
                confidence_threshold=self.options.threshold,
                mask_token_id=self.mask,
                eos_token_id=ends,
            )
        new = made[:, ids.shape[1] :].cpu()
        ended = torch.isin(new, torch.tensor(ends, dtype=torch.int64)).cumsum(1) > 0
        counts = (~ended).sum(1).tolist()
        texts = answers(self.tokenizer, new)
        return [
            {"answer": text, "tokens": count} for text, count in zip(texts, counts, strict=True)
        ]


EXPECTED = 'expected lines like {"prompt": "text"}'


def _row(prompts: Path, number: int, line: bytes) -> dict[str, Any]:
    """One prompt, with what else its line holds; files that were joined hold marks in between."""
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except ValueError as error:
        raise ValueError(f"{prompts}: {EXPECTED}, but line {number} is none: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"{prompts}: {EXPECTED}, but line {number} has no such prompt")
    return row


def _write(path: Path, text: str) -> None:
    """All of it or nothing, whoever else writes the same."""
    new = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
