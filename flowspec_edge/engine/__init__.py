"""ONNX Runtime: stages, head, draft head and tokenizer. No other room imports it."""

import os

# From 1.32 on ONNX Runtime tells its makers, over the internet, of every process that loads it, and leaves a file in
# the temporary directory. It reads this variable as it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
