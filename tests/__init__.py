"""Tests of focus_compile."""
