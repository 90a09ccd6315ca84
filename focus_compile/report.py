"""Warnings that are logged once per process and text."""

from __future__ import annotations

import logging
from functools import lru_cache

__all__ = ["warning_once"]


@lru_cache(maxsize=256)
def warning_once(logger: logging.Logger, message: str, *args: object) -> None:
    """Log a warning, unless the same one was logged before; ``cache_clear()`` forgets them."""
    logger.warning(message, *args)
