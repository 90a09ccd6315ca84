"""Tests of focus_compile.axes: rules and labels."""
