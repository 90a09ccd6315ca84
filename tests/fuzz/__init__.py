"""Differential fuzzing: sequences of calls against an eager FOCUS that shares no code with it."""
