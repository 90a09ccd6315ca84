"""What the passes will do to a canonical graph, or why they will not."""
