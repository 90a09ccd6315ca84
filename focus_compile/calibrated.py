"""What a calibration recommends, as the backend and sessions take it: a file, or the object."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focus_compile.torch_private import is_made_of_tensors

__all__ = ["Calibrated", "fingerprint", "given_signal", "read"]

SAMPLE = 64
"""Values of a weight that tell it from another."""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Settings for one model.

    Attributes:
        model: its name, for messages; weights: fingerprints of its parameters.
        options: ``signal``, ``layers``, ``first_step`` and ``rescue``; empty: do not evict.
        hit_range: the 95 % interval of the share of evicting steps in which a token that dense was
            sure of was kept; None: there was none, or it is not known.
    """

    model: str
    weights: frozenset[str]
    options: Mapping[str, Any]
    hit_range: tuple[float, float] | None = None

    @property
    def in_session(self) -> dict[str, Any]:
        """What a session can set; the layers are compiled in."""
        return {name: value for name, value in self.options.items() if name != "layers"}

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Raises:
        ValueError: a parameter is not one of the calibrated model, or has another dtype.
        """
        for parameter in parameters:
            if fingerprint(parameter) not in self.weights:
                raise ValueError(
                    f"the calibration is of another model than this one, or of another dtype: it "
                    f"names {self.model}; run focus-compile calibrate on this model"
                )


def given_signal(signal: Any, calibration: Any) -> Any:
    """The signal that takes precedence over a calibration's; None: that is to be used.

    Raises:
        ValueError: it is ``"auto"``, the calibration's, and there is no calibration.
    """
    if not isinstance(signal, str) or signal != "auto":
        return signal
    if calibration is None:
        raise ValueError(
            "signal='auto': the signal is that of a calibration, and there is none; give "
            "calibration=..., the file of focus-compile calibrate"
        )
    return None


def fingerprint(parameter: Tensor) -> str:
    """Of a parameter's shape, dtype and first values, or of what it is made of, if of others."""
    told = f"{tuple(parameter.shape)} {parameter.dtype} ".encode() + _first_values(parameter)
    return hashlib.sha256(told).hexdigest()[:12]


def _first_values(parameter: Tensor) -> bytes:
    if is_made_of_tensors(parameter):
        names, _ = parameter.__tensor_flatten__()  # type: ignore[attr-defined]
        return " ".join(fingerprint(getattr(parameter, name)) for name in names).encode()
    values = parameter.detach().flatten()[:SAMPLE].cpu().contiguous().view(torch.uint8)
    return bytes(values.tolist())


def read(value: Any) -> Calibrated:
    """A calibration: the path of its file, or an object with its ``to_dict()``.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, Calibrated):
        return value
    try:
        if isinstance(value, str | Path):
            data = json.loads(Path(value).read_text(encoding="utf-8"))
        else:
            data = value.to_dict()
        options = data["options"] or {}
        seen = (data.get("chosen") or {}).get("hit_range")
        hit_range = None if seen is None else (float(seen[0]), float(seen[1]))
        if "layers" in options:
            options = options | {"layers": tuple(options["layers"])}
        if isinstance(options.get("signal"), list):
            options = options | {"signal": tuple(options["signal"])}
        return Calibrated(str(data["model"]), frozenset(data["weights"]), options, hit_range)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"calibration={value!r}: expected the file of focus-compile calibrate, or what "
            "focus_compile.calibrate returns"
        ) from error
