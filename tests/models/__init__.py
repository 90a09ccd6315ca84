"""Tests of focus_compile.models: mask tokens and masks."""
