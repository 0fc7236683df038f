"""Applies a plan to a model: adapters in its graphs, modules that run them, and the sites to read and switch."""
