"""What a module's source says about weights that are read past their owner."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from melora_fx.names import get_attribute
from melora_fx.torch_private import registered

UNKNOWN = "?"
"""Stands for an owner that the source does not name."""

_TESTS = {"isinstance", "type", "hasattr"}
"""Functions that ask only what their arguments are."""

_HARMLESS = {"dtype", "device", "shape", "size", "dim", "ndim", "is_meta", "numel"}
"""Attributes that tell nothing of a tensor's values."""


@functools.cache
def attributes_read_by_forward(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The attribute paths below `self` that `cls.forward`, or a method that it calls, reads.

    `self.out_proj.weight.t()` gives ("out_proj", "weight", "t"); reading only the type, dtype, device or shape of
    something does not count. `.weight` of something that is not a path below `self` (an item of a list, a local name)
    gives (UNKNOWN, "weight"). Found in the source; a class without source gives nothing.
    """
    paths: dict[tuple[str, ...], None] = {}
    seen: set[str] = set()
    pending = ["forward"]
    while pending:
        name = pending.pop()
        method = getattr(cls, name, None)
        if name in seen or not callable(method) or _is_of_every_module(method):
            continue
        seen.add(name)
        for chain in _attribute_chains(_tree(method)):
            pending += chain[:1]
            if not _HARMLESS & set(chain):
                paths[chain] = None
    return tuple(paths)


def _tree(method: object) -> ast.AST:
    """The syntax of a method's source; empty without source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _attribute_chains(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """The longest attribute accesses: `self.a.b.c` gives ("a", "b", "c"), `something.weight` (UNKNOWN, "weight")."""
    passed_over = {id(node) for node in _inner_or_tested(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in passed_over:
            continue
        start, chain = _unchained(node)
        if isinstance(start, ast.Name) and start.id == "self":
            yield chain
        elif chain[0] == "weight" and not _HARMLESS & set(chain):
            yield UNKNOWN, "weight"


def _inner_or_tested(tree: ast.AST) -> Iterator[ast.expr]:
    """What an attribute is read of, as it belongs to a longer chain, and what a call merely asks the kind of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _TESTS:
            yield from node.args


def _unchained(node: ast.Attribute) -> tuple[ast.expr, tuple[str, ...]]:
    """What a chain of attributes begins with, and their names in order."""
    chain: list[str] = []
    value: ast.expr = node
    while isinstance(value, ast.Attribute):
        chain.append(value.attr)
        value = value.value
    return value, tuple(reversed(chain))


def bypassed_children(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The modules below `module` whose tensors its forward reads instead of calling them, and the reason to refuse.

    Where the source does not tell which one is read, these are all that `module` holds, in lists or not.
    """
    if isinstance(module, fx.GraphModule) or not registered(module)[2]:
        return
    for chain in attributes_read_by_forward(type(module)):  # type: ignore[arg-type]  # classes are hashable
        for path, what in _bypassed_by_chain(module, chain):
            forward = f"`{type(module).__name__}.forward`"
            yield path, f"{forward} {what}, which would bypass the adapter: pass `example_inputs=`"


def _bypassed_by_chain(module: nn.Module, chain: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Path of each module that one chain of attributes reads from, and what the forward does there."""
    if chain[0] == UNKNOWN:
        yield from ((path, "reads weights of modules that its source does not name") for path in _held(module))
        return
    for index in range(1, len(chain)):
        path = ".".join(chain[:index])
        child = get_attribute(module, path)
        if not isinstance(child, nn.Module):
            return
        name = chain[index]
        value = getattr(child, name, None)
        if isinstance(value, nn.Parameter) and value.dim() > 1:
            yield path, "reads its weight without calling it"
        elif inspect.ismethod(value) and name != "forward" and not _is_of_every_module(value.__func__):
            yield path, f"calls its `{name}`"


def _is_of_every_module(function: Any) -> bool:
    """Whether it is one of `nn.Module`'s own, as `parameters` or `train`."""
    return function in vars(nn.Module).values()


def _held(module: nn.Module) -> Iterator[str]:
    """Paths of the children, those in containers included."""
    for name, child in module.named_children():
        yield name
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from (f"{name}.{path}" for path in _held(child))
