"""Files of prompts, and prompts among them that have no answer (examples/offline.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.examples.test_batch import offline, options
from tests.support.harness import MASK as HARNESS_MASK
from tests.support.harness import Sizes, build_model
from tests.support.words import characters

MARK = b"\xef\xbb\xbf"


def job(folder: Path, data: bytes) -> Any:
    (folder / "in.jsonl").write_bytes(data)
    return offline.Job(folder / "in.jsonl", folder / "out.jsonl", options())


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "é", "\ufeff"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_only_newlines_end_a_line(tmp_path: Path, character: str, end: bytes) -> None:
    text = f"a{character}b"
    line = json.dumps({"prompt": text, "id": 3}, ensure_ascii=character < " ").encode()
    made = job(tmp_path, MARK + line + end + end + line)
    assert [row["prompt"] for row in made.rows] == [text, text] and made.lines == [1, 3]
    made.write(0, [{"answer": text}, {"answer": ""}])
    assert made.merge() == []
    lines = (tmp_path / "out.jsonl").read_bytes().rstrip().split(b"\n")
    assert [json.loads(each)["answer"] for each in lines] == [text, ""]


def test_joined_files_have_marks_in_between(tmp_path: Path) -> None:
    data = MARK + b'{"prompt": "a"}\n' + MARK + b'{"prompt": "b"}\n' + MARK
    assert [row["prompt"] for row in job(tmp_path, data).rows] == ["a", "b"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": 3}',
        b'["a"]',
        b'{"prompt": "a"',
        b"\xff\xfe{",
        '{"prompt": "é"}'.encode("latin-1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes) -> None:
    told = r'in\.jsonl: expected lines like \{"prompt": "text"\}, but line 3 '
    with pytest.raises(ValueError, match=told) as error:
        job(tmp_path, b'{"prompt": "a"}\n\n' + line + b"\n")
    assert "\n" not in str(error.value) and not (tmp_path / "out.jsonl.parts").exists()
    with pytest.raises(FileNotFoundError):
        offline.Job(tmp_path / "nowhere", tmp_path / "out", options())


def worker(tokenizer: Any) -> Any:
    made = offline.Worker.__new__(offline.Worker)
    made.options, made.device, made.tokenizer = options(), "cpu", tokenizer
    made.compiled, made.mask = build_model(Sizes(layers=2)), HARNESS_MASK
    return made


def test_prompts_without_an_answer_do_not_keep_others_from_theirs(tmp_path: Path) -> None:
    """Empty ones begin with what begins a text; where nothing does, or for half a character, the
    line is named. Without padding and end tokens all is well.
    """
    texts = ["ab", "", "c", "x\ud83d"]
    data = "".join(json.dumps({"prompt": text}) + "\n" for text in texts).encode()
    with_ends = worker(characters())
    alone = [with_ends([text])[0] for text in texts]
    assert ["error" in row for row in alone] == [False, False, False, True]
    assert with_ends(texts) == alone
    bare = worker(characters(pad_token=None, eos_token=None))
    made = job(tmp_path, data)
    for part in made.missing():
        made.write(part, bare(made.prompts(part)))
    told = made.merge()
    assert [line.split(": ")[0].removeprefix(f"{tmp_path}/") for line in told] == [
        "in.jsonl, line 2",
        "in.jsonl, line 4",
    ]
    assert "an empty prompt: this tokenizer" in told[0] and "surrogates" in told[1]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row.get("answer") is None for row in rows] == [False, True, False, True]
    assert rows[0]["answer"] == bare(["ab"])[0]["answer"]
