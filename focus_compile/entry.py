"""``focus_compile.compile``: ``torch.compile`` with the mask token found, and a record kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from transformers import PreTrainedTokenizerBase

from focus_compile.backend import focus_backend
from focus_compile.config import FocusConfig
from focus_compile.models.mask_token import find_mask_token
from focus_compile.models.vocabulary import check_mask_token, rows_of
from focus_compile.runtime.record import Record, Status
from focus_compile.torch_private import backend_of, compile_arguments

__all__ = ["Backend", "compile", "status"]


class Backend:
    """The backend of one model: what becomes of its graphs is counted in ``record``."""

    __name__ = "focus"

    def __init__(self) -> None:
        self.record = Record()

    def __call__(
        self, gm: GraphModule, inputs: Sequence[Any], **keywords: Any
    ) -> Callable[..., Any]:
        return focus_backend(gm, inputs, record=self.record, **keywords)


def compile(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dynamic: bool | None = True,
    **options: Any,
) -> Any:
    """``torch.compile(model, backend="focus")``, with the id of the mask token looked up.

    The id is ``options["mask_token_id"]``, or else the tokenizer's, or else that of
    ``model.config``, or else that of the family (:data:`FAMILIES`) to which exactly this
    ``model_type`` and this architecture belong. Which of them it was is logged: a guess from the
    family as a warning.

    Args:
        dynamic: as in ``torch.compile``; by default sizes are symbolic, so that prompts and batches
            of other sizes need no capture of their own.
        options: see :class:`~focus_compile.FocusConfig`.

    What is compiled counts against a recompile limit of its own, where torch has that, and
    :func:`status` tells what became of it.

    Raises:
        ValueError: the id is not to be found or no row of the model's embedding, or an option is
            unknown or out of range.
    """
    if options.get("mask_token_id") is None:
        options["mask_token_id"] = find_mask_token(model, tokenizer)
    FocusConfig.from_options(options)
    check_mask_token(options["mask_token_id"], rows_of(model))
    return torch.compile(
        model, backend=Backend(), dynamic=dynamic, options=options, **compile_arguments()
    )


def status(compiled: Any) -> Status:
    """What became of a model that :func:`compile` compiled, so far; print it.

    Raises:
        ValueError: another function compiled it, so that nothing was counted.
    """
    backend = backend_of(compiled)
    if not isinstance(backend, Backend):
        raise ValueError("no status: compile the model with focus_compile.compile(...)")
    return backend.record.status()
