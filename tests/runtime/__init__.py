"""Tests of focus_compile.runtime: one call, and sessions."""
