"""Hugging Face models: folders, mask tokens, attention masks."""
