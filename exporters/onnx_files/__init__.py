"""An .onnx file seen from outside: its axes, weights, data files, and what it says of itself."""
