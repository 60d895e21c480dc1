"""The only importer of ONNX Runtime."""
