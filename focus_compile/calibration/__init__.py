"""Which signal points at what a model decodes, measured before anything is evicted."""
