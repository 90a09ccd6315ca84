"""Which code a figure was measured on."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["commit"]


def commit() -> str:
    """Abbreviated hash of the checkout's commit, with ``+`` where files differ from it."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        made = subprocess.run(
            ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
        )
        return made.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "focus_compile", "passes")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
