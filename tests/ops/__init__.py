"""Tests of focus_compile.ops: the mathematics."""
