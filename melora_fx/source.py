"""What a module's source says about weights that are read past their owner."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_TESTS = {"isinstance", "type", "hasattr"}
_HARMLESS = {"dtype", "device", "shape", "size", "dim", "ndim", "is_meta", "numel"}


@functools.cache
def weights_read_by_forward(cls: type[nn.Module]) -> tuple[str, ...]:
    """Paths of the children whose tensors `cls.forward`, or a method that it calls, reads itself.

    `self.out_proj.weight` gives "out_proj"; reading only its type, dtype, device or shape does not count. An adapter on
    such a child would be skipped silently, since the child is not called. Found in the source; a class without source
    gives nothing.
    """
    paths: dict[str, None] = {}
    pending, seen = ["forward"], set()
    while pending:
        name = pending.pop()
        method = getattr(cls, name, None)
        if name in seen or not callable(method) or method in vars(nn.Module).values():
            continue
        seen.add(name)
        for chain in _attribute_chains(_tree(method)):
            pending += chain[:1]
            for index, attribute in enumerate(chain[1:], start=1):
                if attribute.endswith("weight") and not set(chain[index + 1 : index + 2]) & _HARMLESS:
                    paths[".".join(chain[:index])] = None
    return tuple(paths)


def _tree(method: object) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _attribute_chains(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """The longest attribute accesses on `self`: `self.a.b.c` gives ("a", "b", "c")."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _TESTS:
            inner |= {id(argument) for argument in call.args}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        chain: list[str] = []
        value: ast.expr = node
        while isinstance(value, ast.Attribute):
            chain.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id == "self":
            yield tuple(reversed(chain))
