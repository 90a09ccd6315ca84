"""The report's section on signals: figures and pictures of a calibration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from focus_compile.calibration.choice import judge
from focus_compile.calibration.replay import Candidate, Tally
from focus_compile.cli import app
from focus_compile.reports.page import page
from tests.reports.test_page import part
from tests.support.paths import TINY
from tests.support.stories import MARKUP, SIZES, story

PICTURE = ["rdme", "aess", "osrd"]
CLASSES = [
    ["retained", "decoded", "missed", "evicted"],
    ["again", "evicted", "rescued", "rescued"],
    ["done", "rescued", "retained", "decoded"],
]


def calibration() -> dict[str, Any]:
    """Two candidates, the second one chosen."""
    tallies = (
        Tally(steps=9, decoded=9, cost=180.0, gain=9),
        Tally(
            steps=9, decoded=9, cost=90.0, gain=9, evicting=8, sure=8, hits=6, rescued=2, kept=4.0,
            ranked=4, auc=3.0, recall=2.0, picture=PICTURE,
        ),
    )  # fmt: skip
    candidates = (Candidate("position", (0, 1), "evict"), Candidate("delta", (0, 2), "open"))
    judged = [
        judge(candidate, tally, 5, 8).to_dict()
        for candidate, tally in zip(candidates, tallies, strict=True)
    ]
    return {
        "prompts": 32, "steps": 9, "threshold": 0.9, "alpha": 1.5, "why": MARKUP,
        "judged": judged, "chosen": judged[1],
    }  # fmt: skip


def test_section() -> None:
    """Every figure in its row, every letter in its cell; nothing of the file is markup."""
    html = part(page(story(5), "a title", calibration=calibration(), **SIZES), "signals")
    rows = [re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", line) for line in html.splitlines()]
    told = [row for row in rows if row[:1] in (["position"], ["delta 2-0 (chosen)"])]
    assert told == [
        ["position", "evict", "0.50", "-", "-", "0.0%", "-", "-", "100%"],
        ["delta 2-0 (chosen)", "open", "0.25", "0.750", "0.409 to 0.929", "25.0%", "0.75", "0.50",
         "50%"],
    ]  # fmt: skip
    picture = html[html.index("delta 2-0, open") :]
    found = [re.findall(r'<td class="(\w+)"', line) for line in picture.splitlines()]
    assert [line for line in found if line] == CLASSES
    assert MARKUP not in html
    assert 'id="signals"' not in page(story(5), "a title", **SIZES)


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given.pop("judged"),
        lambda given: given["judged"][0].pop("picture"),
        lambda given: given["judged"][1].update(picture=["rx"]),
        lambda given: given.update(judged=3),
    ],
)
def test_malformed(change: Any) -> None:
    given = calibration()
    change(given)
    with pytest.raises(ValueError, match=r"^calibration: .* expected the file of focus-compile"):
        page(story(5), "a title", calibration=given, **SIZES)


def test_command_line(tmp_path: Path) -> None:
    """A file that is none ends in one line; what is no JSON, too."""
    file = tmp_path / "calibration.json"
    checkpoint = str(TINY / "checkpoint")
    words = ["report", checkpoint, "-o", str(tmp_path / "page.html"), "--calibration", str(file)]
    for text, told in (("{", " is no calibration: "), ("{}", "calibration: 'chosen': expected")):
        file.write_text(text)
        made = CliRunner().invoke(app, words)
        assert made.exit_code == 2 and told in made.stderr and made.stderr.count("\n") == 1
    file.write_text(json.dumps(calibration()))
    assert CliRunner().invoke(app, words).exit_code == 0
    assert 'id="signals"' in (tmp_path / "page.html").read_text()
