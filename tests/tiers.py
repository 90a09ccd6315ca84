"""Which tier a test is in: the first pattern that is found in its id decides, then its time.

Without a pattern, or with None, it is in the default tier, that of the README's test command, if
``slow.txt`` does not name it: some of every file, minutes in all. The rest is ordered by what it
needs (``MARKERS``). ``slow.txt`` is measured, on an idle machine:

    pytest -n 2 --full --junitxml=times.xml && python -m tests.tiers times.xml
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["MARKERS", "PATTERNS", "SLOW", "slow", "tier"]

LIMIT = 5.0
"""Seconds: a call of a small model captures one graph in that time."""

LIST = Path(__file__).with_name("slow.txt")
SLOW = frozenset(LIST.read_text().splitlines())

MARKERS = {
    "inductor": "compiles through Inductor",
    "process": "starts processes",
    "triton": "runs or compiles Triton kernels, on no GPU",
    "browser": "needs a browser",
    "soak": "many calls of one process: minutes",
    "docs": "compiles for a page of docs/",
    "gpu": "needs a GPU",
    "wide": "more of what the default tier shows by a few: dialects, draws, forms",
    "slow": f"takes more than {LIMIT:.0f} s",
}

PATTERNS: tuple[tuple[str, str | None], ...] = (
    # a few of what follows
    (r"test_inductor\.py::test_there_are_enough_draws", None),
    (r"test_inductor\.py::test_\w+\[sdpa\]", None),
    (r"test_(dialects|families)\.py.*\[llada-canvas(-written)?\]", None),
    (r"test_no_eviction\.py.*\[sdpa-(bool|static|3|8|1)", None),
    (r"test_eviction\.py.*\[(sdpa-cache-bool|sdpa-whole-bool|sdpa-cache-float|eager-cache)", None),
    (r"test_fuzz\.py.*(without_loops|\[(qwen3-two-layers|llada-canvas)\])", None),
    (r"test_edges\.py.*\[break-0\]", None),
    (r"test_found\.py::test_masks_are_for_one_call\[dense\]", None),
    (r"test_compiles\.py.*\[17-sdpa\]", None),
    (r"test_trained\.py.*\[aligned_checkpoint-written-True\]", None),
    (r"test_cache_writes\.py::test_applied\[(setitem|slice_scatter)-11-symbols-2-dropped", None),
    (r"test_made\.py::test_applied\[type_as-symbols", None),
    (r"test_readout\.py::test_generate\[(confidence|same-body)", None),
    (r"test_readout\.py::test_(generate|breaks|a_window|packed|shifts)", "wide"),
    (r"test_taint\.py::test_slots\w+\[(?!llada\])", "wide"),
    # Inductor
    (r"test_families_inductor\.py.*\[llada-canvas\]", None),
    (r"faults/test_inductor\.py", "inductor"),
    (r"test_(families_)?inductor\.py", "inductor"),
    (r"test_no_eviction_generate\.py::test_inductor", "inductor"),
    (r"test_linear\.py::test_inductor", "inductor"),
    (r"test_quantised\.py::test_inductor", "inductor"),
    (r"test_compiles\.py::test_table", "inductor"),
    (r"test_explain\.py::test_(a_real_run|artifacts)", "inductor"),
    # processes
    (r"test_batch\.py::test_refusals", None),
    (r"parallel/.*::test_(whose|vocabulary)", None),
    (r"test_cli\.py::test_(a_bad_trace|bad_input|no_mask)", None),
    (r"test_crowd\.py::test_eight", "inductor"),
    (r"test_(batch|crowd|own_loop)\.py|parallel/|test_compiles\.py::test_the_cache", "process"),
    (r"test_cli\.py|test_lm_eval\.py::test_command_line|test_first_use\.py::test_bench", "process"),
    (r"test_gpu_benchmark\.py::test_(steps|profile|compile|numbers|the_page)", "process"),
    (r"test_tiers\.py", "process"),
    # others
    (r"test_(fused\.py::test_operators_on_a_cpu|launches\.py)", None),
    (r"fused/|gpu_lowering/", "triton"),
    (r"test_page_browser\.py::test_markup", None),
    (r"test_page_browser\.py", "browser"),
    (r"test_soak\.py::test_nothing_grows", "soak"),
    (r"test_how_it_works\.py", "docs"),
    # many of a kind
    (r"test_(dialects|families)\.py::test_(\w+\[|the_distinct)", "wide"),
    (r"test_quantised\.py::test_(evicting|nothing_evicted)\[(?!scaled\])", "wide"),
    (r"test_no_eviction\.py", "wide"),
    (r"test_(cache_writes|made)\.py", "wide"),
    (r"test_eviction\.py::test_equals_the_reference", "wide"),
    (r"fuzz/test_(fuzz|edges|found)\.py", "wide"),
    (r"gpu/test_(calls|graphs|generation|streams|kernels)\.py.*cpu-(?!llada)", "wide"),
    (r"gpu/test_generation\.py::test_tokens_on_the_device.*\[cpu\]", "wide"),
    (r"test_(compiles|trained|signal)\.py", "wide"),
    (r"test_lm_eval\.py::test_(dense|focus|lengths|stop)", "wide"),
    (r"faults/test_steps\.py::test_interrupted", "wide"),
    (r"test_smollm\.py::test_the_tokenizer", "wide"),
)


def tier(test: str) -> str | None:
    """The marker of a test, by its id; None: the default tier."""
    return by_pattern(test) or ("slow" if test in SLOW else None)


def by_pattern(test: str) -> str | None:
    """What the first pattern that is found in the id says."""
    return next((name for pattern, name in PATTERNS if re.search(pattern, test)), None)


def slow(seconds: Mapping[str, float]) -> list[str]:
    """Tests over the limit that no pattern places; the quickest of each file is never one."""
    files: dict[str, list[str]] = defaultdict(list)
    for test in seconds:
        if by_pattern(test) is None:
            files[test.split("::")[0]].append(test)
    quickest = {min(tests, key=seconds.__getitem__) for tests in files.values()}
    measured = [test for tests in files.values() for test in tests]
    return sorted(test for test in {*measured} - quickest if seconds[test] > LIMIT)


def read(report: str) -> dict[str, float]:
    """Seconds of each test, from a JUnit report."""
    cases = ElementTree.parse(report).iter("testcase")
    return {
        f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}": float(
            case.attrib["time"]
        )
        for case in cases
    }


if __name__ == "__main__":
    LIST.write_text("".join(f"{test}\n" for test in slow(read(sys.argv[1]))))
