"""Tests of focus_compile.generation: generate()."""
