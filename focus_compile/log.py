"""Warnings that are logged once per process and text."""

from __future__ import annotations

import logging
from functools import lru_cache

__all__ = ["text_once", "warning_once"]


def warning_once(logger: logging.Logger, message: str, *args: object) -> None:
    """Log a warning, unless the same text was logged before.

    Text alone is remembered: an error among ``args`` would keep its frames alive, and their model.
    """
    text_once(logger.name, message % args if args else message)


@lru_cache(maxsize=256)
def text_once(name: str, text: str) -> None:
    """Log a warning by a logger's name; ``text_once.cache_clear()`` forgets which were logged."""
    logging.getLogger(name).warning("%s", text)
