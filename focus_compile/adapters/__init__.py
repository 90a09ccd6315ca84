"""Code of models that breaks graphs, replaced by code that computes the same and does not."""
