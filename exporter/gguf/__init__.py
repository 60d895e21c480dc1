"""Reads GGUF files: header, tokenizer, and weights at their own bytes. Needs numpy and gguf, and no torch."""
