"""FOCUS for diffusion LLMs as a compiler pass: ``torch.compile(model, backend="focus")``."""

from importlib.metadata import version

from focus_compile import testing
from focus_compile.backend import focus_backend
from focus_compile.compile import compile, status
from focus_compile.config import FocusConfig
from focus_compile.cost import Cost
from focus_compile.decoding import Candidates
from focus_compile.errors import (
    EvictedTokenDecoded,
    NotCompiled,
    UncommittedHistory,
    Unsupported,
)
from focus_compile.explain import Explanation, explain
from focus_compile.generate import generate
from focus_compile.generated import Generated
from focus_compile.masks import block_mask
from focus_compile.session import PackedLogits, Session, Signal, Step, session
from focus_compile.statistics import SessionStats
from focus_compile.status import Status

__version__ = version("focus-compile")

__all__ = [
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
    "block_mask",
    "compile",
    "explain",
    "focus_backend",
    "generate",
    "session",
    "status",
    "testing",
]
