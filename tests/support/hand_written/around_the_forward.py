"""Uses of a rewritten model other than calling it, and contexts around a call."""

import contextlib
import copy
import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from support.hand_written.case import AT_REWRITE, EITHER, LIMIT, RIGHT, Child, Own, Run, call, case
from support.models import IN, OUT, Holder

_COMES_OUT_PLAIN = "an input of a subclass is returned as a plain tensor"
AREA = "Around the forward"


class _Matrix(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


class _Linear(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(x))


def _use(name: str, what: str, *calls: Run, outcome: str = RIGHT, build: Any = _Matrix, **options: Any) -> None:
    site = "w" if build is _Matrix else "fc"
    case(AREA, what, site, outcome, name=name, calls=calls, **options)(build)


def _facts(parameter: Any) -> Any:
    """Returns what the caller sees of a weight, which must be the parameter itself."""
    return type(parameter).__name__, isinstance(parameter, nn.Parameter), parameter.shape, parameter.is_leaf


def _inspected(model: Any, x: torch.Tensor) -> Any:
    out = model(x)
    return out, _facts(model.w), model.w is dict(model.named_parameters())["w"], model.w is model.w


def _inspected_linear(model: Any, x: torch.Tensor) -> Any:
    out = model(x)
    return out, _facts(model.fc.weight), model.fc.weight is model.get_parameter("fc.weight")


def _after_an_error(model: Any, x: torch.Tensor) -> Any:
    with contextlib.suppress(RuntimeError):
        model(x[:, :3])
    return _facts(model.w), model(x)


def _loaded(model: Any, x: torch.Tensor) -> Any:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    return model(x)


def _in_float64(model: Any, x: torch.Tensor) -> Any:
    return model.double()(x.double())


def _moved(model: Any, x: torch.Tensor) -> Any:
    return model.to("cpu").to(memory_format=torch.contiguous_format)(x)


def _printed(model: Any, x: torch.Tensor) -> Any:
    return model(x), bool(repr(model)), len(list(model.modules()))


def _of_a_wrapper(model: Any, x: torch.Tensor) -> Any:
    return Holder(model)(x)


class _ReadsInside(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) + F.linear(x, self.model.fc.weight)


def _of_a_reading_wrapper(model: Any, x: torch.Tensor) -> Any:
    return _ReadsInside(model)(x)


def _under_flop_counter(model: Any, x: torch.Tensor) -> Any:
    with FlopCounterMode(display=False):
        return model(x)


def _under_device(model: Any, x: torch.Tensor) -> Any:
    with torch.device("cpu"):
        return model(x)


class _Passes(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **kwargs or {})


def _under_a_mode(model: Any, x: torch.Tensor) -> Any:
    with _Passes():
        return model(x)


def _under_anomaly_mode(model: Any, x: torch.Tensor) -> Any:
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")
        return model(x)


class Marked(torch.Tensor):
    """A user-defined tensor class."""


def _of_a_subclass(model: Any, x: torch.Tensor) -> Any:
    return model(x.as_subclass(Marked))


def _vmapped(model: Any, x: torch.Tensor) -> Any:
    return torch.vmap(model)(x.unsqueeze(1))


def _jacobian(model: Any, x: torch.Tensor) -> Any:
    return torch.func.jacrev(lambda point: model(point).sum(0))(x)


_use("weight-inspected", "the caller inspects `model.w`: it is the parameter", _inspected)
_use("linear-inspected", "the caller inspects `model.fc.weight`: it is the parameter", _inspected_linear, build=_Linear)
_use("after-an-error", "the caller inspects `model.w` after a forward that raised", _after_an_error)
_use("state-loaded", "`load_state_dict` before the call", _loaded)
_use("made-float64", "`model.double()` before the call", _in_float64)
_use("moved", "`model.to(…)` between calls", call, _moved)
_use("printed", "`repr(model)`", _printed)
_use("wrapped-later", "wrapped in another module after `rewrite`", _of_a_wrapper)
_use(
    "read-by-a-later-wrapper",
    "a wrapper made after `rewrite` that reads the weight",
    _of_a_reading_wrapper,
    outcome=EITHER,
    build=_Linear,
)
_use("flop-counter", "under `FlopCounterMode`", _under_flop_counter)
_use("device-context", '`with torch.device("cpu")`', _under_device)
_use("function-mode", "under a `TorchFunctionMode`", _under_a_mode)
_use("anomaly-mode", "under `torch.autograd.set_detect_anomaly`", _under_anomaly_mode)
_use(
    "tensor-subclass",
    "an input of a subclass of torch.Tensor",
    _of_a_subclass,
    outcome=EITHER,
    compiled=_COMES_OUT_PLAIN,
)
_use("vmap-of-the-model", "`torch.vmap(model)`", _vmapped, outcome=EITHER)
_use("jacobian-of-the-model", "`torch.func.jacrev` of the model", _jacobian, outcome=EITHER)


@case(AREA, "a custom `train(mode)` that keeps a part in eval mode", "inner.w", inside=True)
class OwnTrain(Own):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.dropout.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.dropout(x), self.w)


@case(AREA, "a custom `named_parameters` that leaves some out", "inner.w", EITHER, inside=True)
class OwnNamedParameters(Own):
    def named_parameters(self, *args: Any, **options: Any) -> Any:
        return ((name, value) for name, value in super().named_parameters(*args, **options) if name != "w")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


@case(AREA, "an `extra_repr` that reads the weight, called in the forward", "w", EITHER)
class PrintsItself(Own):
    def extra_repr(self) -> str:
        return f"shape={tuple(self.w.shape)}, norm={float(self.w.detach().norm()):.2f}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) * bool(repr(self))


@case(AREA, "a copy of the linear in the forward, `copy.deepcopy(self.fc)`, inside `disabled`", "fc", LIMIT)
class CopiesInForward(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        teacher = copy.deepcopy(self.fc)
        return self.fc(x) - 2 * teacher(x).detach()


@case(AREA, "a shallow copy of the linear in the forward, `copy.copy(self.fc)`, inside `disabled`", "fc", LIMIT)
class ShallowCopy(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twin = copy.copy(self.fc)
        return twin(x) + F.linear(x, twin.weight)


@case(AREA, "a child that is a `GraphModule` traced by the user", "inner.w")
def traced_child() -> nn.Module:
    class Plain(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(F.linear(x, self.w))

    return Holder(fx.symbolic_trace(Plain()))


@case(AREA, "a child scripted with `torch.jit.script`", "inner.0", EITHER)
def scripted_child() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Holder(torch.jit.script(nn.Sequential(nn.Linear(IN, OUT), nn.Tanh())))


@case(AREA, "a weight in a plain dict, which PyTorch does not see", "w", AT_REWRITE)
class PlainDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = {"w": torch.randn(OUT, IN)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.own["w"])


@case(AREA, "children called `weight`, `lora_a` and `forward_`", ("weight", "lora_a", "forward_"))
class OddNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "lora_a", "forward_"):
            self.add_module(name, nn.Linear(IN, IN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_(self.lora_a(self.weight(x)).tanh())


class _Keys:
    """Not part of the compared state: an address differs from model to model."""

    last: int | None = None


@case(AREA, "a cache that is valid while `id(self.w)` stays the same", "w", LIMIT, calls=(call, call, call))
class CacheById(Own):
    def __init__(self) -> None:
        super().__init__()
        self.misses = 0
        self.keys = _Keys()

    def now(self) -> int:
        return id(self.w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.keys.last != self.now():
            self.keys.last, self.misses = self.now(), self.misses + 1
        return F.linear(x, self.w) * self.misses


case(
    AREA,
    "a cache that is valid while `self.w.data_ptr()` stays the same",
    "w",
    EITHER,
    name="cache-by-address",
    calls=(call, call),
)(type("CacheByAddress", (CacheById,), {"now": lambda self: self.w.data_ptr()}))
case(
    AREA,
    "a cache that is valid while `self.w._version` stays the same",
    "w",
    EITHER,
    name="cache-by-version",
    calls=(call, call),
)(type("CacheByVersion", (CacheById,), {"now": lambda self: self.w._version}))
