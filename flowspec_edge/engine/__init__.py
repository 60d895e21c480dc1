"""Runs graphs. No other package imports ONNX Runtime."""
