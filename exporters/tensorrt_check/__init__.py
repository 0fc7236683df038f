"""What keeps a graph from building in TensorRT."""
