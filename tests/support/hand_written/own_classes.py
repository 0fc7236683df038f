"""Classes with custom attribute access, operators or constructors."""

import dataclasses
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import EITHER, IN_FORWARD, LIMIT, Child, Own, case, matrix
from support.models import IN, Holder

AREA = "Custom classes"
T = TypeVar("T")


@case(AREA, "a custom `__getattr__` that looks into a config", "w")
class OwnGetattr(Own):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"scale": 3.0}

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("config", {})
        return config[name] if name in config else super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) * self.scale


@case(AREA, "a custom `__getattr__` that gives the weight another name", "w", IN_FORWARD)
class RenamedWeight(Own):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("w" if name == "matrix" else name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.matrix)


@case(AREA, "a wrapper that forwards unknown names to the module inside", "inner.fc", EITHER)
class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Child()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + F.linear(x, self.fc.weight)


@case(AREA, "a custom `__getattribute__`", "w")
class OwnGetattribute(Own):
    def __getattribute__(self, name: str) -> Any:
        return self.w if name == "matrix" else super().__getattribute__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.matrix)


@case(AREA, "a custom `__setattr__` that freezes the module after `__init__`", "inner.w", EITHER, inside=True)
class OwnSetattr(Own):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("frozen") and name != "training":
            raise AttributeError(f"{name}: this module is frozen")
        super().__setattr__(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


@case(AREA, "`__slots__`", "inner.w", inside=True)
class Slots(Own):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) * self.scale


@case(AREA, "a `__len__` of zero: the module is falsy", "inner.w", inside=True)
class Falsy(Own):
    def __len__(self) -> int:
        return 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


class ByValue(Own):
    """Compares equal to all others of its class."""

    def __init__(self, seed: int) -> None:
        super().__init__(IN)
        self.w = matrix(IN, IN, seed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByValue)

    def __hash__(self) -> int:
        return 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


@case(AREA, "two modules that compare equal", ("0.w", "1.w"), EITHER, dtype=torch.float32)
def equal_modules() -> nn.Module:
    return nn.Sequential(ByValue(11), ByValue(12))


@case(AREA, "a class that forbids subclasses", "inner.w", EITHER, inside=True)
class Final(Own):
    def __init_subclass__(cls, **options: Any) -> None:
        raise TypeError("no subclasses")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


@case(AREA, "an `__init_subclass__` that accepts each name once", "inner.w", EITHER, inside=True)
class Registers(Own):
    known: set[str] = set()  # noqa: RUF012

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__name__ in cls.known:
            raise ValueError(f"two classes are called {cls.__name__}")
        cls.known.add(cls.__name__)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


@case(AREA, "`type(self) is …` and `self.__class__.__name__` in the forward", "inner.w", LIMIT, inside=True)
class AsksItsType(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.w)
        if type(self) is AsksItsType:
            out = out * 2
        return out + len(self.__class__.__name__)


@case(AREA, "`super(Class, self)`, `__class__` and private names", "inner.w", inside=True)
class PrivateNames(Own):
    def __init__(self) -> None:
        super(PrivateNames, self).__init__()  # noqa: UP008
        self.__scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) * self.__scale + (__class__ is PrivateNames)  # type: ignore[name-defined]


@case(AREA, "a private matrix, `self.__w`", "_Hidden__w")
class _Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.__w = matrix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.__w)


@case(AREA, "a dataclass that is a module", "inner.w", inside=True)
@dataclasses.dataclass(eq=False)
class DataclassModule(nn.Module):
    scale: float = 2.0

    def __post_init__(self) -> None:
        super().__init__()
        self.w = matrix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) * self.scale


class _Projects:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)  # type: ignore[attr-defined]


@case(AREA, "the forward in a mixin", "inner.w", inside=True)
class Mixed(_Projects, Own):
    pass


@case(AREA, "a class with a metaclass", "inner.w", inside=True)
class WithMetaclass(Own, metaclass=type("Meta", (type,), {})):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


class _Generic(Own, Generic[T]):
    def forward(self, x: T) -> T:
        return F.linear(x, self.w)


@case(AREA, "a generic class, `Layer[torch.Tensor]()`", "inner.w")
def generic() -> nn.Module:
    return Holder(_Generic[torch.Tensor]())


@case(AREA, "a class defined in a function", "inner.w", inside=True)
def class_of_a_function() -> nn.Module:
    class Local(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w)

    return Local()


@case(AREA, "attributes with the adapter's names, `lora_a` and `w_lora_a`", "inner.w", EITHER, inside=True)
class NamedAsTheAdapter(Own):
    def __init__(self) -> None:
        super().__init__()
        self.lora_a = 2.0
        self.w_lora_a = 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) * self.lora_a * self.w_lora_a


@case(AREA, "a linear with attributes `weight_lora_a` and `lora_b`", "fc", EITHER)
class LinearWithAttribute(Child):
    def __init__(self) -> None:
        super().__init__()
        self.fc.weight_lora_a = 2.0
        self.fc.lora_b = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.fc.weight_lora_a * self.fc.lora_b


@case(AREA, "a child called `graph`, and attributes `code` and `meta`", "inner.w", EITHER, inside=True)
class NamedAsAGraph(Own):
    def __init__(self) -> None:
        super().__init__()
        self.graph = nn.Identity()
        self.code = 2.0
        self.meta = {"scale": 3.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.graph(F.linear(x, self.w)) * self.code * self.meta["scale"]
