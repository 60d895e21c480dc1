"""Pure logic: events and time in, actions out. Imports no socket, no clock and no ONNX Runtime."""
