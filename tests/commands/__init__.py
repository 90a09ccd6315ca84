"""Tests of the command line and of the evaluation harness."""
