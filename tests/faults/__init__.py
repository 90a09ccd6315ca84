"""Faults around a compiled model: no wrong result, one clear error, a working next call."""
