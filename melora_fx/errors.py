"""The one error class for graphs and files. Bad arguments raise `ValueError` or `TypeError` instead."""


class MELoRAError(Exception):
    """A graph, a model or a file that cannot be used as asked; the text names it, the place and the remedy."""
