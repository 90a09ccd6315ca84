"""Block diffusion with a compiled or eager model: requests, the denoising loop, texts."""
