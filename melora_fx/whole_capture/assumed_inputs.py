"""Checks in every call of a capture that the arguments, values and sizes are as its export assumed."""

import inspect
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from melora_fx.errors import MELoRAError
from melora_fx.torch_private import in_fx_trace, tree_code, tree_flatten, tree_unflatten

from .conditions import Condition
from .private import input_structure

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

VARIES = ...
"""Stand-in for a number that may vary."""


@dataclass(frozen=True)
class Sizes:
    """Stand-in for a tensor: its sizes (None for each that may vary) and the kind of its entries."""

    sizes: tuple[int | None, ...]
    kind: str

    def __repr__(self) -> str:
        return f"({', '.join('any' if size is None else str(size) for size in self.sizes)})"


class AssumedInputs:
    """The call that a capture was made with, and the assumptions of its export.

    Args:
        graph_module: the exported module, which stores the structure and the examples of its inputs.
        signature: the signature of the captured forward, which names the arguments of a call.
        conditions: the conditions on the sizes of tensors.

    Attributes:
        arguments: name → argument, with `Sizes` in place of each tensor. The arguments for `*args` are one argument, a
            tuple.
        free_axes: each size that may vary, written as its first place (`x.shape[0]`) → all its places: the number of
            the input, which is a leaf of the arguments, and the axis.
    """

    def __init__(
        self, graph_module: fx.GraphModule, signature: inspect.Signature, conditions: Iterable[Condition]
    ) -> None:
        examples = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
        structure = input_structure(graph_module)
        args, kwargs = tree_unflatten(map(_leaf, examples), structure)
        self.conditions = tuple(conditions)
        self._defaults = {name: each.default for name, each in signature.parameters.items()}
        self._positional = [name for name, each in signature.parameters.items() if each.kind in _POSITIONAL]
        self._rest = _name_of(signature, inspect.Parameter.VAR_POSITIONAL)
        self._others = _name_of(signature, inspect.Parameter.VAR_KEYWORD)
        self._defaults |= {self._rest: ()}
        self._num_positional = len(args)
        self._keywords = tuple(kwargs)
        self.arguments = self.by_name(args, kwargs)
        numbers = self.by_name(*tree_unflatten(range(len(examples)), structure))
        names = {number: f"{name}{code}" for name, tree in numbers.items() for code, number in tree_code(tree)}
        self.free_axes = _free_axes(examples, names)

    def tensors(self) -> Iterator[tuple[str, Sizes]]:
        """Yields the arguments that are tensors, by name."""
        yield from ((name, each) for name, each in self.arguments.items() if isinstance(each, Sizes))

    def in_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a call as the graph takes them: by position if the example had them by position.

        Raises:
            TypeError: if an argument is missing, is passed twice, or is not an argument of the forward.
            MELoRAError: if an argument is not as the export assumed.
        """
        values = self.by_name(args, kwargs)
        for name, value in values.items():
            if name not in self.arguments and not _is_same(value, self._defaults.get(name)):
                raise MELoRAError(
                    f"the capture was made without `{name}`, so its graph ignores it: capture again with `{name}` in "
                    "`example_inputs`"
                )
        for name, argument in self.arguments.items():
            if name not in values:
                values[name] = self._default(name)
            _check(name, values[name], argument)
        for condition in self.conditions:
            if not condition.holds(values):
                raise MELoRAError(
                    f"the capture assumed that {condition.text}; here {_shapes(condition, values)}: capture again with "
                    "`example_inputs` of these sizes"
                )
        return self._as_in_example(values)

    def by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a call by their names in the signature, without defaults."""
        values: dict[str, Any] = dict(zip(self._positional, args, strict=False))
        rest = args[len(self._positional) :]
        if rest and not self._rest:
            raise TypeError(f"the forward takes {len(self._positional)} positional arguments, but got {len(args)}")
        if rest:
            values[self._rest] = tuple(rest)
        for name, value in kwargs.items():
            if name in values:
                raise TypeError(f"the argument `{name}` is passed both by position and by name")
            if name not in self._defaults and not self._others:
                raise TypeError(f"the forward takes no argument `{name}`")
            values[name] = value
        return values

    def _default(self, name: str) -> Any:
        default = self._defaults.get(name, inspect.Parameter.empty)
        if default is inspect.Parameter.empty:
            raise TypeError(f"the argument `{name}` is missing: the capture was made with it")
        return default

    def _as_in_example(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = [values[name] for name in self._positional[: self._num_positional]]
        if self._num_positional > len(args):
            args += values[self._rest]
        return tuple(args), {name: values[name] for name in self._keywords}


def _name_of(signature: inspect.Signature, kind: Any) -> str:
    """Returns the name of the parameter of this kind, or "" if there is none."""
    return next((name for name, each in signature.parameters.items() if each.kind is kind), "")


def _leaf(value: Any) -> Any:
    """Returns the stand-in for the example value of an input, or the value itself."""
    if isinstance(value, torch.Tensor):
        sizes = (size if isinstance(size, int) else size.node.maybe_as_int() for size in value.shape)
        return Sizes(tuple(sizes), _kind(value.dtype))
    return VARIES if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _kind(dtype: torch.dtype) -> str:
    """Returns the kind of a dtype, which a forward may ask for. All dtypes of one kind are accepted, since a model and
    its inputs may be cast.
    """
    if dtype is torch.bool:
        return "bool"
    return "floating point" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def _free_axes(examples: Iterable[Any], names: Mapping[int, str]) -> dict[str, list[tuple[int, int]]]:
    """Returns `AssumedInputs.free_axes`, taken from the export's own examples, whose sizes are symbols."""
    places: dict[Any, list[tuple[int, int]]] = {}
    for number, example in enumerate(examples):
        for axis, size in enumerate(example.shape if isinstance(example, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                places.setdefault(size.node.expr, []).append((number, axis))
    return {f"{names[found[0][0]]}.shape[{found[0][1]}]": found for found in places.values()}


def _check(name: str, value: Any, assumed: Any) -> None:
    """Raises MELoRAError if a value is not as the export assumed."""
    if isinstance(assumed, Sizes):
        _check_leaf(name, value, assumed)
        return
    leaves, structure = tree_flatten(value)
    assumed_leaves, assumed_structure = tree_flatten(assumed)
    if structure != assumed_structure:
        raise MELoRAError(
            f"`{name}` has another structure than in the example, which has {reprlib.repr(assumed)}: capture again "
            "with `example_inputs` of this structure"
        )
    for leaf, assumed_leaf in zip(leaves, assumed_leaves, strict=True):
        _check_leaf(name, leaf, assumed_leaf)


def _check_leaf(name: str, value: Any, assumed: Any) -> None:
    if isinstance(assumed, Sizes):
        if not isinstance(value, torch.Tensor):
            raise MELoRAError(
                f"the capture is for a tensor `{name}`, here it is {reprlib.repr(value)}: capture again with this "
                "value in `example_inputs`"
            )
        if not _fits(value, assumed.sizes):
            raise MELoRAError(
                f"input `{name}` has {_shape(value)}, but the capture is for {assumed}: capture again with "
                "`example_inputs` of that shape"
            )
        if _kind(value.dtype) != assumed.kind:
            raise MELoRAError(
                f"input `{name}` is of {value.dtype}, but the capture is for {assumed.kind} values: capture again with "
                "`example_inputs` of that dtype"
            )
    elif assumed is not VARIES and not _is_same(value, assumed):
        raise MELoRAError(
            f"the capture is for `{name}={assumed!r}`, here it is {reprlib.repr(value)}: capture again with this value "
            "in `example_inputs`"
        )


def _shape(value: torch.Tensor) -> str:
    return "another shape" if torch.compiler.is_compiling() else f"shape {tuple(value.shape)}"


def _fits(value: torch.Tensor, sizes: tuple[int | None, ...]) -> bool:
    if value.dim() != len(sizes):
        return False
    return all(want is None or want == got for want, got in zip(sizes, value.shape, strict=True))


def _is_same(value: Any, assumed: Any) -> bool:
    if value is assumed:
        return True
    return type(value) is type(assumed) and not isinstance(value, torch.Tensor) and bool(value == assumed)


def _shapes(condition: Condition, values: Mapping[str, Any]) -> str:
    """Returns the shapes that a condition depends on, for the arguments that are tensors, as text."""
    if torch.compiler.is_compiling():  # sizes that vary have no text there
        return "it is false"
    tensors = [name for name in condition.names if isinstance(values[name], torch.Tensor)]
    return ", ".join(f"`{name}` has shape {tuple(values[name].shape)}" for name in tensors) or "it is false"


def check_inputs(
    graph_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Calls `AssumedInputs.in_call` of a captured module, as a forward pre-hook."""
    if in_fx_trace():
        return args, kwargs
    assumed: AssumedInputs = vars(graph_module)["assumed_inputs"]
    return assumed.in_call(args, kwargs)
