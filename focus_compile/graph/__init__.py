"""Any ATen graph: nodes, re-emission, recomputation, sizes, inputs."""
