"""Defines the stand-ins for an adapted weight in a forward of the user's own Python.

On a module whose weight is adapted, a property replaces the weight (`weight_property.py`). Inside a forward the
property returns a stand-in, which knows the weight and the views of it. A product with the stand-in becomes the site's,
with the adapter. A view of it is a stand-in again. Its dtype, device and shape are the weight's. Any other use would
see a weight that a fold changes, and raises.

There are three kinds, and each works in places that the others do not:

    TensorStandIn  a tensor; in eager mode it also refuses the operators of code that does not call
                   `__torch_function__`: TorchScript, C extensions
    StandIn        not a tensor: for `torch.export`, `torch.func`, and weights that are tensor subclasses
    TracedStandIn  a proxy: for `fx.Tracer`, whose own proxies would otherwise be asked first
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from melora_fx.patterns.views import CASTS, COPIES, HARMLESS_PROPERTIES, VIEWS, is_harmless
from melora_fx.torch_private import in_functorch, in_fx_trace, in_one_storage

from .arguments import name_of, stand_ins, value_of, values
from .offsets import first_elements
from .products import call_again, call_product
from .reader import is_adapted
from .refusals import refuse_keeping, refuse_unasked, refuse_use
from .shown import PLAIN, Shown, Standing, twin_of

_SHOWING = {"T", "mT", "H", "mH", "data", "real", "imag"}
"""Properties that return a tensor's values; all other properties reveal nothing about the values."""

_VIEWS = VIEWS | COPIES | CASTS
_FLIPS = {"t", "T", "mT", "numpy_T"}
_RESHAPES = ("reshape", "flatten")
"""Names of views: `_FLIPS` transpose a matrix, `_RESHAPES` make a copy if a view is impossible."""


def stand_in(owner: nn.Module, parameter: str, weight: Tensor) -> Any:
    """Returns a stand-in for `weight`, the parameter of that name of `owner`, of the kind that works in the caller."""
    return _showing(Shown(owner, parameter, weight, weight, parameter, torch.is_grad_enabled()))


def _showing(shown: Shown) -> Any:
    if in_fx_trace():
        return TracedStandIn(shown)
    is_compiled = torch.compiler.is_dynamo_compiling()
    if not is_compiled and (type(shown.value) not in PLAIN or in_functorch()):
        return StandIn(shown)
    # if the stand-in were the weight under another type, Dynamo would load the weight itself after a graph break
    held: Any = shown.value.detach() if is_compiled else shown.value
    tensor: Any = held.as_subclass(_KINDS[is_compiled, shown.value is shown.weight])
    tensor.shown = shown
    return tensor


def _use(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the result of a function of torch for arguments that contain a stand-in."""
    name = name_of(function)
    found = stand_ins(args, kwargs)
    shown: Shown = found[0].shown
    if name == "grad_fn" and is_adapted(shown.owner):  # only `nn.Module.register_parameter` reads it
        return refuse_keeping(shown.owner, shown.parameter)
    is_property = str(function.__name__) == "__get__" and name not in _SHOWING
    tells_nothing = is_property or is_harmless(name, is_first=bool(args) and isinstance(args[0], Standing))
    if tells_nothing or not is_adapted(shown.owner):  # a forward may have kept a stand-in until after a fold
        return function(*values(args), **{key: value_of(value) for key, value in kwargs.items()})
    if len(found) > 1:
        return refuse_use(shown.owner, shown.parameter, name)
    if name in _VIEWS and isinstance(args[0], Standing):
        return _view(shown, name, function, args, kwargs)
    return call_product(shown, name, function, args, kwargs)


def _view(shown: Shown, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the stand-in for a view, a copy or a cast of the value of `shown`; a tuple of them for several views."""
    rest = args[1:]
    value = function(shown.value, *rest, **kwargs)
    if name in _FLIPS and shown.twin is None and shown.weight.dim() == 2:
        return _showing(_flipped(shown, value))
    if name in CASTS:
        return _showing(shown._replace(value=value, is_cast=True, plain=None))
    if name in COPIES:
        return _showing(shown._replace(value=value, is_copy=True, plain=None))
    choice = _choice(name, rest)
    if choice is not None:
        return _gathered(shown, name, value, choice)
    twin = _twin_view(shown, name, function, value, rest, kwargs)
    if twin is None:
        return refuse_use(shown.owner, shown.parameter, name)
    is_tuple = isinstance(value, tuple | list)
    twins = twin if is_tuple else [twin]
    try:
        starts = first_elements(name, twin_of(shown), rest, kwargs, twins)
    except NotImplementedError:
        return refuse_use(shown.owner, shown.parameter, f"{name} of rows that are chosen in the forward")
    parts = [
        _showing(shown._replace(value=item, twin=of_item, offset=shown.offset + start, plain=None))
        for item, of_item, start in zip(value if is_tuple else [value], twins, starts, strict=True)
    ]
    return tuple(parts) if is_tuple else parts[0]


def _flipped(shown: Shown, value: Any) -> Shown:
    owner, parameter, weight, _, plain, recorded, _, _, is_flipped, _, is_cast, is_copy = shown
    if plain is not None:
        plain = parameter if is_flipped else f"{parameter} flipped"
    return Shown(owner, parameter, weight, value, plain, recorded, None, 0, not is_flipped, None, is_cast, is_copy)


def _choice(name: str, rest: tuple[Any, ...]) -> Any:
    """Returns the indices by which rows are gathered, or None."""
    index = rest[0] if name in ("getitem", "index") and rest else None
    if isinstance(index, list | tuple) and len(index) == 1:
        index = index[0]
    return index if isinstance(index, Tensor | fx.Proxy) else None


def _gathered(shown: Shown, name: str, value: Any, choice: Any) -> Any:
    """Returns the stand-in for one matrix of a stack for each row."""
    if shown.value.dim() != 3 or shown.choice is not None:
        return refuse_use(shown.owner, shown.parameter, name)
    return _showing(shown._replace(value=value, choice=choice, twin=twin_of(shown), plain=None))


def _twin_view(shown: Shown, name: str, function: Any, value: Any, rest: Any, kwargs: Any) -> Any:
    """Returns the same view of the twin, or None if it would not be a view."""
    twin = twin_of(shown)
    if torch.compiler.is_dynamo_compiling():
        return twin.view(value.shape) if name in _RESHAPES else function(twin, *rest, **kwargs)
    rest, kwargs = fx.node.map_aggregate((rest, kwargs), lambda item: 1 if isinstance(item, fx.Proxy) else item)
    moved = function(twin, *rest, **kwargs)
    first = moved[0] if isinstance(moved, tuple | list) else moved
    return moved if in_one_storage(first, twin) else None


_FORWARDED = [name for name in dir(Tensor) if callable(getattr(Tensor, name)) and name not in dir(object)]
"""Methods of tensors, which a stand-in that is not a tensor has too."""


class StandIn(Standing):
    """Passes `isinstance` checks as the tensor that it shows. It must not be passed to C functions that do not call
    `__torch_function__`.
    """

    def __init__(self, shown: Shown) -> None:
        self.shown = shown

    @property  # type: ignore[misc]  # `isinstance` reads it
    def __class__(self) -> type:
        return nn.Parameter if isinstance(self.shown.value, nn.Parameter) else Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _use(func, tuple(args), kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name == "shown":  # not set yet
            raise AttributeError(name)
        own = getattr(Tensor, name, None)
        if own is None:  # an attribute that someone has put on the parameter
            return getattr(self.shown.value, name)
        return _use(own.__get__, (self,), {})

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(copy.deepcopy(self.shown, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.shown,)

    def __repr__(self) -> str:
        return f"the adapted weight `{self.shown.parameter}` of shape {tuple(self.shown.value.shape)}"


class TracedStandIn(StandIn, fx.Proxy):
    """A proxy that torch asks before other proxies, since its class is a subclass of theirs."""


class TensorStandIn(Tensor, Standing):
    """A tensor subclass: torch calls its `__torch_function__`."""

    def __deepcopy__(self, memo: Any) -> Any:
        return _showing(copy.deepcopy(self.shown, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _showing, (self.shown,)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _use(func, tuple(args), kwargs or {})

    def t(self) -> Any:
        shown = self.shown
        if shown.plain is None or shown.weight.dim() != 2:
            return _view(shown, "t", Tensor.t, (None,), {})
        return _showing(_flipped(shown, shown.value.t()))

    def _last_two_flipped(self) -> Any:
        return _view(self.shown, "transpose", Tensor.transpose, (None, -2, -1), {})

    def _refuse_values(self) -> Any:
        return refuse_use(self.shown.owner, self.shown.parameter, "data, real or imag")

    def split(self, split_size: Any, dim: int = 0) -> Any:  # torch's is Python code, for which Dynamo asks otherwise
        return _use(Tensor.split, (self, split_size, dim), {})


for _names, _read in (
    (("T", "H"), TensorStandIn.t),
    (("mT", "mH"), TensorStandIn._last_two_flipped),
    (("data", "real", "imag"), TensorStandIn._refuse_values),
):
    for _name in _names:
        setattr(TensorStandIn, _name, property(_read))


class ParameterStandIn(TensorStandIn, nn.Parameter):
    """A stand-in for the weight itself."""


class EagerTensorStandIn(TensorStandIn):
    """A stand-in for eager mode, with a shorter way for products that were computed before."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = NotImplemented if kwargs else call_again(func, args)
        return _use(func, tuple(args), kwargs or {}) if product is NotImplemented else product

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuses the operator: only code that skips `__torch_function__` gets here, of TorchScript or C extensions."""
        shown: Shown = stand_ins(args, kwargs or {})[0].shown
        return refuse_unasked(shown.owner, shown.parameter, str(func))


class EagerParameterStandIn(EagerTensorStandIn, ParameterStandIn):
    """A stand-in for the weight itself, in eager mode."""


_KINDS = {
    (False, False): EagerTensorStandIn,
    (False, True): EagerParameterStandIn,
    (True, False): TensorStandIn,
    (True, True): ParameterStandIn,
}
"""(whether Dynamo compiles, whether the stand-in is for the weight itself) → class."""


def _method(name: str) -> Any:
    function = getattr(Tensor, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _use(function, (self, *args), kwargs)

    return method


def _property(name: str) -> Any:
    return property(lambda self: getattr(self.shown.value, name))


for _name in _FORWARDED:
    if _name not in vars(StandIn):
        setattr(StandIn, _name, _method(_name))
for _name in sorted(HARMLESS_PROPERTIES):
    setattr(StandIn, _name, _property(_name))
