"""A model's folder, looked at before it is loaded: files that are there in part, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["check_files"]

POINTER = b"version https://git-lfs.github.com/spec/"


def check_files(folder: Path) -> None:
    """Look at a folder's files.

    Raises:
        ValueError: one of them stands for a file that was not fetched, or lacks its end.
    """
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            start = file.read(len(POINTER))
        if start == POINTER:
            raise ValueError(
                f"{path} is a pointer of git-lfs and not the file itself: run `git lfs pull`"
            )
        if path.suffix == ".safetensors" and not _is_complete(path):
            raise ValueError(f"{path} is cut off or damaged: download it again")


def _is_complete(path: Path) -> bool:
    """Whether a file of tensors is as long as its header says."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        total = path.stat().st_size
        if size > total - 8:
            return False
        try:
            header = json.loads(file.read(size))
            ends = [
                int(tensor["data_offsets"][1])
                for name, tensor in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            return False
    return total == 8 + size + max(ends, default=0)
