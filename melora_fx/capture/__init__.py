"""From a model to FX graphs: module by module in place, or one graph of the whole model."""
