"""The FOCUS graph as two programs, prefix and suffix, compiled when first needed."""
