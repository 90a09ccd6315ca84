"""The command line's errors: one line that says why, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from focus_compile.errors import Unsupported
from focus_compile.models.load import BadInput
from focus_compile.torch_private import BackendCompilerFailed

__all__ = ["one_line"]

LONGEST = 400


@contextmanager
def one_line(traceback: bool) -> Iterator[None]:
    """A refusal: one line and exit code 1; any other error: one line and exit code 2.

    With ``traceback`` the error as it is.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise  # how a command ends, and what typer reports
    except Exception as error:  # the one place: whatever went wrong is told
        if traceback:
            raise
        code, message = _code_and_message(error)
        typer.echo(f"focus-compile: {message}", err=True)
        raise typer.Exit(code) from error


def _code_and_message(error: Exception) -> tuple[int, str]:
    cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    if isinstance(cause, Unsupported):
        return 1, f"refused: {cause}; {cause.cure}"
    text = " ".join(str(cause).split())
    if isinstance(cause, BadInput):
        return 2, text
    if isinstance(cause, OSError) and cause.filename is not None:
        return 2, f"{cause.filename}: {cause.strerror}"
    if len(text) > LONGEST:
        text = text[:LONGEST] + "..."
    return 2, f"{type(cause).__name__}: {text} (--traceback shows where it came from)"
