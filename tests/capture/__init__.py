"""Tests of focus_compile.capture: from the captured graph to its canonical form."""
