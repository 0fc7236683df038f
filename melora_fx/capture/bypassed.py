"""What a module's source says about weights that are read past their owner."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

from torch import fx, nn

from melora_fx.names import get_attribute
from melora_fx.torch_private import registered

UNKNOWN = "?"
_TESTS = {"isinstance", "type", "hasattr"}
_HARMLESS = {"dtype", "device", "shape", "size", "dim", "ndim", "is_meta", "numel"}


@functools.cache
def attributes_read_by_forward(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The attribute paths below `self` that `cls.forward`, or a method that it calls, reads.

    `self.out_proj.weight.t()` gives ("out_proj", "weight", "t"); reading only the type, dtype, device or shape of
    something does not count. `.weight` of something that is not a path below `self` (an item of a list, a local name)
    gives (UNKNOWN, "weight"). Found in the source; a class without source gives nothing.
    """
    paths: dict[tuple[str, ...], None] = {}
    pending, seen = ["forward"], set()
    while pending:
        name = pending.pop()
        method = getattr(cls, name, None)
        if name in seen or not callable(method) or method in vars(nn.Module).values():
            continue
        seen.add(name)
        for chain in _attribute_chains(_tree(method)):
            pending += chain[:1]
            if not _HARMLESS & set(chain):
                paths[chain] = None
    return tuple(paths)


def _tree(method: object) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _attribute_chains(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """The longest attribute accesses: `self.a.b.c` gives ("a", "b", "c"), `something.weight` (UNKNOWN, "weight")."""
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
        elif chain[-1] == "weight" and not _HARMLESS & set(chain):
            yield UNKNOWN, "weight"


def bypassed_children(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The modules below `module` whose tensors its forward reads instead of calling them, and the reason to refuse.

    Where the source does not tell which one is read, these are all that `module` holds, in lists or not.
    """
    if isinstance(module, fx.GraphModule) or not registered(module)[2]:
        return
    forward = f"`{type(module).__name__}.forward`"
    remedy = "which would bypass the adapter: pass `example_inputs=`"
    for chain in attributes_read_by_forward(type(module)):  # type: ignore[arg-type]  # classes are hashable
        if chain[0] == UNKNOWN:
            for path in _held(module):
                yield path, f"{forward} reads weights of modules that its source does not name, {remedy}"
        for index in range(1, len(chain)):
            child, value = (
                get_attribute(module, ".".join(chain[:index])),
                get_attribute(module, ".".join(chain[: index + 1])),
            )
            if not isinstance(child, nn.Module):
                break
            if isinstance(value, nn.Parameter) and value.dim() > 1:
                yield ".".join(chain[:index]), f"{forward} reads its weight without calling it, {remedy}"
            elif (
                inspect.ismethod(value) and value.__func__ not in vars(nn.Module).values() and chain[index] != "forward"
            ):
                yield ".".join(chain[:index]), f"{forward} calls its `{chain[index]}`, {remedy}"


def _held(module: nn.Module) -> Iterator[str]:
    """Paths of the children, those in containers included."""
    for name, child in module.named_children():
        yield name
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from (f"{name}.{path}" for path in _held(child))
