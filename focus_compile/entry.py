"""``focus_compile.compile``: ``torch.compile`` for a whole model, its own methods included."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Signature, signature
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from transformers import PreTrainedTokenizerBase

from focus_compile.adapters.adaptation import Adaptation, adaptation, adapted
from focus_compile.backend import focus_backend
from focus_compile.config import FocusConfig
from focus_compile.log import warning_once
from focus_compile.models.compiled import backend_of, install, original, remove, twin
from focus_compile.models.contiguous import contiguous
from focus_compile.models.mask_token import find_mask_token, predicts_next
from focus_compile.models.vocabulary import check_mask_token, rows_of
from focus_compile.runtime.record import Record, Status
from focus_compile.torch_private import (
    captures_more,
    compile_arguments,
    compiles,
    recompile_limits_hit,
)

__all__ = ["Backend", "adapt", "compile", "in_place", "restore", "status"]

log = logging.getLogger(__name__)

LIMIT = (
    "Dynamo has reached its recompile limit with this model: calls that match no graph captured so "
    "far run eagerly, without FOCUS. TORCH_LOGS=recompiles tells what differs from call to call: "
    "pass the same kinds of arguments in every call, or compile the model anew"
)


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
    in_place: bool = False,
    adapt: bool = True,
    **options: Any,
) -> Any:
    """``torch.compile(model, backend="focus")``, for the model's own methods too.

    The id of the mask token is ``options["mask_token_id"]``, or else the tokenizer's, or else that
    of ``model.config``, or else that of the family (:data:`FAMILIES`) to which exactly this
    ``model_type`` and this architecture belong. Which of them it was is logged: a guess from the
    family as a warning.

    Args:
        dynamic: as in ``torch.compile``; by default sizes are symbolic, so that prompts and batches
            of other sizes need no capture of their own.
        in_place: compile the model itself, for code that holds it: a pipeline, or a module that it
            is a part of. :func:`restore` undoes it, and so does the end of :func:`in_place`.
        adapt: replace, for compiled calls, code of the model that would break the graph by code
            that computes the same (docs/models.md); what is replaced is logged, at INFO.
        options: see :class:`~focus_compile.FocusConfig`.

    What is compiled counts against a recompile limit of its own, where torch has that, and a
    warning comes where it is reached; :func:`status` tells what became of the model.

    Returns:
        a twin of the model: an object of a class derived from the model's, which shares weights,
        modules and every other attribute with it. Its methods, ``generate`` as the model's author
        wrote it, say, run the compiled forward, whether they call ``self(...)`` or
        ``self.forward(...)``. The model itself stays as it was. Copied or pickled, the twin is
        compiled anew. With ``in_place`` the model; its copies and pickles are not compiled.

    Raises:
        ValueError: the id is not to be found or no row of the model's embedding, or an option is
            unknown or out of range; or the model is compiled in place already.
        RuntimeError: from the compiled model: somebody replaced its ``forward`` since, or the model
            wrote into a mask that an adapter had read.
    """
    if options.get("mask_token_id") is None:
        options["mask_token_id"] = find_mask_token(original(model), tokenizer)
    if "shifted_logits" not in options:
        options["shifted_logits"] = predicts_next(original(model))
    config = FocusConfig.from_options(options)
    check_mask_token(options["mask_token_id"], rows_of(model))
    backend = Backend()

    def make(plain: nn.Module) -> Callable[..., Any]:
        changes = adaptation(plain) if adapt else Adaptation()
        with changes:
            forward = plain.forward
        compiled = torch.compile(
            forward, backend=backend, dynamic=dynamic, options=options, **compile_arguments()
        )
        return partial(_call, compiled, config.strict, changes, signature(forward))

    known = backend if compiles() else None
    if in_place:
        return install(model, make, known)
    return twin(model, make, known, partial(compile, dynamic=dynamic, adapt=adapt, **options))


@contextmanager
def adapt(model: nn.Module) -> Iterator[nn.Module]:
    """Replace code of a model that would break its graph, until the end of the ``with``.

    For the bare line, ``torch.compile(model, backend="focus")``; :func:`compile` does so by itself.
    What is replaced, and where, is logged, a line each at INFO; it computes the same numbers. State
    dicts are as before, and copies and pickles are not adapted. Calls of one model come one after
    another inside of it.

    Raises:
        RuntimeError: from the model: it wrote into a mask that an adapter had read.
    """
    with adapted(model):
        yield model


def restore(model: nn.Module) -> None:
    """Make a model what it was before ``compile(model, in_place=True)``.

    Raises:
        ValueError: the model is not compiled in place.
    """
    remove(model)


@contextmanager
def in_place(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> Iterator[nn.Module]:
    """Compile a model in place (:func:`compile`), and restore it at the end of the ``with``. ::

        with focus_compile.in_place(model, tokenizer, alpha=1.5), focus_compile.session():
            out = model.diffusion_generate(ids)

    Raises:
        ValueError: see :func:`compile`.
    """
    compiled: nn.Module = _compile(model, tokenizer, in_place=True, **options)
    try:
        yield compiled
    finally:
        restore(model)


def status(compiled: Any) -> Status:
    """What became of a model that :func:`compile` compiled, so far; print it.

    Raises:
        ValueError: another function compiled it, so that nothing was counted.
    """
    backend = backend_of(compiled)
    if not isinstance(backend, Backend):
        raise ValueError("no status: compile the model with focus_compile.compile(...)")
    return backend.record.status()


def _call(
    compiled: Callable[..., Any],
    strict: bool,
    changes: Adaptation,
    known: Signature,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """One call of a compiled forward.

    Raises:
        RuntimeError: Dynamo ran it eagerly, for its recompile limit is reached, and ``strict``.
    """
    before = recompile_limits_hit()
    with contiguous(args, kwargs) as (given, named), changes.calling(known, given, named):
        with captures_more(changes.looks_up):
            made = compiled(*given, **named)
    if recompile_limits_hit() > before:
        if strict:
            raise RuntimeError(LIMIT)
        warning_once(log, LIMIT)
    return made


_compile = compile  # the name of a builtin means that one wherever it is called
