"""Which code and which CPU a figure was measured on."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

__all__ = ["commit", "cpu"]


def commit() -> str:
    """Abbreviated hash of the checkout's commit, with ``+`` where files differ from it.

    ``unknown`` where there is no git, or this is no checkout, such as an unpacked archive.
    """
    root = Path(__file__).resolve().parent.parent
    if shutil.which("git") is None or not (root / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        made = subprocess.run(
            ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
        )
        return made.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "focus_compile", "passes")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def cpu() -> str:
    """The CPU's name as Linux has it, elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
