"""What the tests share: models, calls, dialects, tokenizers."""
