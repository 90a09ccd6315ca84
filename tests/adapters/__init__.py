"""Tests of focus_compile.adapters: code of models that breaks graphs."""
