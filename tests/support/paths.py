"""Where the repository's folders are."""

from pathlib import Path

__all__ = ["DOCS", "EXAMPLES", "ROOT", "SPEC", "TESTS", "TINY", "TRUST"]

ROOT = Path(__file__).resolve().parents[2]
TESTS, EXAMPLES, DOCS = ROOT / "tests", ROOT / "examples", ROOT / "docs"
TINY = EXAMPLES / "tiny_dllm"
SPEC = TESTS / "spec" / "focus_cases.json"
"""The worked cases of the specification."""
TRUST = TESTS / "spec" / "trust_cases.json"
"""Those of its sections 10 to 13."""
