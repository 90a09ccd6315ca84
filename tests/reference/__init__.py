"""The reference: FOCUS as plain loops, one row at a time, independent of the package."""
