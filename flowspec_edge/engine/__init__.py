"""ONNX Runtime: stages, head, draft head and tokenizer. No other room imports it."""
