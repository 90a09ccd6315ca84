"""Tests of the backend as a whole: options, refusals, testing."""
