"""Small models in the dialects of public diffusion LLMs: names, layouts, caches; own words."""
