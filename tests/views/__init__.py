"""Tests of focus_compile.views: one analysis as pictures and formulas."""
