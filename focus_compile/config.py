"""Options of the backend, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

import torch

from focus_compile.calibrated import given_signal, read
from focus_compile.torch_private import cudagraphs_by_default, inductor_modes, mode_options

__all__ = ["FIRST_STEPS", "FocusConfig", "Rescue", "is_count", "is_rescue"]

_VISIBILITIES = ("written", "prefix")
FIRST_STEPS = ("auto", "evict", "open")
Rescue = float | Literal["auto"] | None
"""A probability; ``"auto"``: whoever is asked next decides; None: nobody is rescued."""


@dataclass(frozen=True)
class FocusConfig:
    """What ``torch.compile(model, backend="focus", options={...})`` accepts.

    Attributes:
        mask_token_id: the id of the mask token; None if a session or the caller gives the masks.
        alpha: budget factor of docs/algorithm.md section 2, at least 1 (paper: 1.5). However large,
            it is not ``exact``: the delayed cache of a session keeps keys and values as they were
            when their tokens became final.
        visibility: which block slots a retained query sees, ``"written"`` or ``"prefix"``
            (section 5.4).
        delayed_cache: whether a session stops feeding final tokens (section 6).
        stale_kv: whether the keys and values of evicted tokens stay visible in later steps
            (section 5.2); without, only those of this step and of final tokens are.
        signal: what ranks tokens (section 12): ``"delta"``, ``"importance"``, ``"position"``,
            ``"confidence"``, or the weights of both importances. ``"auto"``: that of
            ``calibration``, which must be given. Functions go to a session.
        layers: the two layers whose attention ranks tokens; the second one is cut in two: later
            layers compute retained tokens alone.
        first_step: what a session does in the first step of a block (section 10): ``"evict"``,
            ``"open"``, which evicts nothing there, or ``"auto"``, which opens where a row's last
            block decoded much in its first step, or is not known.
        rescue: a threshold from 0 to 1: rows in which no retained token has that probability get
            their evicted tokens computed in the same step (section 11). ``"auto"``: that of
            :func:`focus_compile.generate`, where it decodes by one; a loop of one's own is not
            known to have any. None: never, as the paper.
        calibration: the file of :func:`focus_compile.calibrate`, or what it returned: sets signal,
            layers, first_step and rescue where they are not given. Another model's is refused at
            the first call. One that says "do not evict" sets ``evict=False``.
        tokens_per_step: how many tokens of a row the caller's loop decodes in a step: at least so
            many masked ones are retained. None: as many as it has decoded so far (section 2).
        shifted_logits: in calls of loops of one's own, the token at p is predicted by the logits of
            p - 1, as in Dream. A session or a generation may say so for itself.
        evict: False runs the dense program in every call. ``"auto"``: the program that decodes a
            token sooner, per batch class, tried on the machine as it works (section 16).
        exact: nothing is evicted and nothing delayed: FOCUS's programs compute every token of a
            masked call in every layer, and the logits are the model's own to rounding, in every
            step of a session too. For regression tests (:mod:`focus_compile.testing`): it saves
            nothing. alpha and delayed_cache have no effect then.
        strict: raise instead of falling back to the dense program when a graph is refused.
        mode: Inductor's mode, as ``torch.compile(mode=...)`` names it.
        inductor: Inductor config patches for all three programs.
        buckets: numbers of retained tokens of a batch, ascending: the suffix is run with the first
            one that holds them, the last retained token repeated, so that it sees few sizes; what
            none holds is run as it is. For CUDA graphs (docs/gpu.md).
    """

    mask_token_id: int | None = None
    alpha: float = 1.5
    visibility: str = "written"
    delayed_cache: bool = True
    stale_kv: bool = True
    signal: str | tuple[float, float] = "delta"
    layers: tuple[int, int] = (0, 1)
    first_step: str = "auto"
    rescue: Rescue = "auto"
    calibration: Any = None
    tokens_per_step: int | None = None
    shifted_logits: bool = False
    evict: bool | str = True
    exact: bool = False
    strict: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.mask_token_id is not None:
            _expect(
                "mask_token_id",
                self.mask_token_id,
                _is_int(self.mask_token_id) and self.mask_token_id >= 0,
                "an int >= 0 or None",
            )
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        valid = number and self.alpha >= 1 and not math.isnan(self.alpha)
        _expect("alpha", self.alpha, valid, "a number >= 1")
        _expect(
            "visibility",
            self.visibility,
            self.visibility in _VISIBILITIES,
            f"one of {_VISIBILITIES}",
        )
        _expect(
            "first_step", self.first_step, self.first_step in FIRST_STEPS, f"one of {FIRST_STEPS}"
        )
        names = ("delta", "importance", "position", "confidence")
        valid = self.signal in names if isinstance(self.signal, str) else _is_pair(self.signal)
        _expect("signal", self.signal, valid, f"one of {names}, or two weights")
        valid = _is_pair(self.layers) and all(_is_int(layer) for layer in self.layers)
        valid = valid and 0 <= self.layers[0] < self.layers[1]
        _expect("layers", self.layers, valid, "two layers, (i, j) with 0 <= i < j")
        object.__setattr__(self, "layers", tuple(self.layers))
        _expect(
            "rescue",
            self.rescue,
            is_rescue(self.rescue),
            "a probability from 0 to 1, 'auto' or None",
        )
        valid = self.tokens_per_step is None or is_count(self.tokens_per_step)
        _expect("tokens_per_step", self.tokens_per_step, valid, "an int >= 1 or None")
        _expect("evict", self.evict, is_evict(self.evict), "True, False or 'auto'")
        for name in ("delayed_cache", "stale_kv", "shifted_logits", "exact", "strict"):
            _expect(
                name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False"
            )
        modes = inductor_modes()
        _expect(
            "mode", self.mode, self.mode is None or self.mode in modes, f"None or one of {modes}"
        )
        _expect(
            "inductor",
            self.inductor,
            isinstance(self.inductor, Mapping),
            "a dict of Inductor config patches",
        )
        object.__setattr__(self, "inductor", MappingProxyType(dict(self.inductor)))
        buckets = list(self.buckets) if isinstance(self.buckets, list | tuple) else [0]
        valid = all(_is_int(size) and size > 0 for size in buckets)
        valid = valid and buckets == sorted(set(buckets))
        _expect("buckets", self.buckets, valid, "a list of ints >= 1, ascending")
        object.__setattr__(self, "buckets", tuple(buckets))

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> FocusConfig:
        """Build from ``options``.

        Raises:
            ValueError: an unknown option, or a value out of range; it names what is allowed.
        """
        options = dict(options or {})
        names = tuple(entry.name for entry in fields(cls))
        unknown = [name for name in options if name not in names]
        if unknown:
            raise ValueError(
                f"unknown option {unknown[0]!r}: the options of backend 'focus' are "
                f"{', '.join(names)}"
            )
        if options.get("signal") == "auto":
            try:
                given_signal(options.pop("signal"), options.get("calibration"))
            except ValueError as error:
                raise ValueError(f"option {error}") from error
        if options.get("calibration") is not None:
            try:
                found = read(options["calibration"])
            except ValueError as error:
                raise ValueError(f"option {error}") from error
            options = {"evict": bool(found.options), **found.options, **options}
            options["calibration"] = found
        return cls(**options)

    def captures(self, devices: Iterable[torch.device]) -> bool:
        """Whether Inductor is to record programs on these devices as CUDA graphs."""
        default = cudagraphs_by_default()
        enabled = bool(self.patches().get("triton.cudagraphs", default))
        return enabled and any(device.type == "cuda" for device in devices)

    def patches(self) -> dict[str, Any]:
        """Inductor config patches of ``mode`` and ``inductor``."""
        patches: dict[str, Any] = {}
        if self.mode is not None:
            patches |= mode_options(self.mode)
        return patches | dict(self.inductor)


def is_evict(value: Any) -> bool:
    """Whether a value says who evicts: True, False, or ``"auto"``."""
    return isinstance(value, bool) or value == "auto"


def is_rescue(value: Any) -> bool:
    """Whether a value is a :data:`Rescue`, a probability from 0 to 1."""
    if value is None or value == "auto":
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_pair(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2
    return pair and all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in value
    )


def is_count(value: Any) -> bool:
    """Whether a value is an int from 1 on."""
    return _is_int(value) and value >= 1


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect(name: str, value: Any, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"option {name}={value!r}: expected {allowed}")
