"""Tests of focus_compile.programs: prefix and suffix, compiled."""
