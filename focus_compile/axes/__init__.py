"""Axis labels: which dimension of every value is batch, token, or history plus block."""
