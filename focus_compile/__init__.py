"""FOCUS for diffusion LLMs as a compiler pass: ``torch.compile(model, backend="focus")``."""

from importlib.metadata import version

from focus_compile import testing
from focus_compile.backend import focus_backend
from focus_compile.calibration.calibrate import Calibration, calibrate
from focus_compile.config import FocusConfig
from focus_compile.entry import adapt, compile, in_place, restore, status
from focus_compile.errors import EvictedTokenDecoded, NotCompiled, UncommittedHistory, Unsupported
from focus_compile.generation.decoding import Candidates
from focus_compile.generation.generated import Generated
from focus_compile.generation.loop import generate
from focus_compile.generation.warmup import warmup
from focus_compile.models.masks import block_mask
from focus_compile.reports.explanation import Explanation, explain
from focus_compile.runtime.record import Status
from focus_compile.runtime.session import PackedLogits, Session, session
from focus_compile.runtime.signals import Signal, Step
from focus_compile.runtime.statistics import SessionStats
from focus_compile.views.cost import Cost

__version__ = version("focus-compile")

__all__ = [
    "Calibration",
    "Candidates",
    "Cost",
    "EvictedTokenDecoded",
    "Explanation",
    "FocusConfig",
    "Generated",
    "NotCompiled",
    "PackedLogits",
    "Session",
    "SessionStats",
    "Signal",
    "Status",
    "Step",
    "UncommittedHistory",
    "Unsupported",
    "__version__",
    "adapt",
    "block_mask",
    "calibrate",
    "compile",
    "explain",
    "focus_backend",
    "generate",
    "in_place",
    "restore",
    "session",
    "status",
    "testing",
    "warmup",
]
