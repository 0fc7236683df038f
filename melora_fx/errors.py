"""Holds the one error class for graphs, models and files. Bad arguments raise `ValueError` or `TypeError` instead."""


class MELoRAError(Exception):
    """A graph, a model or a file cannot be used as requested. The text names it, the place and the remedy."""
