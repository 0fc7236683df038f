"""Arguments and outputs of a forward."""

import dataclasses
import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from support.hand_written.case import EITHER, Own, call, case
from support.models import IN, OUT

AREA = "Arguments and outputs"


@dataclasses.dataclass
class Outputs:
    hidden: torch.Tensor
    label: str
    extra: dict[str, torch.Tensor]


class Both(NamedTuple):
    hidden: torch.Tensor
    size: int


@case(AREA, "a dataclass as the output", "w")
class DataclassOutput(Own):
    def forward(self, x: torch.Tensor) -> Outputs:
        hidden = F.linear(x, self.w)
        return Outputs(hidden, "hidden", {"square": hidden**2})


@case(AREA, "a dict as the output, with values that are not tensors", "w")
class DictOutput(Own):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"hidden": F.linear(x, self.w), "size": len(x), "nothing": None, "names": ["a", "b"]}


@case(AREA, "a named tuple as the output", "w")
class NamedTupleOutput(Own):
    def forward(self, x: torch.Tensor) -> Both:
        return Both(F.linear(x, self.w), x.shape[0])


@case(AREA, "a `ModelOutput` of transformers", "w")
class ModelOutput(Own):
    def forward(self, x: torch.Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=F.linear(x, self.w))


@case(AREA, "the input returned with the product", "w")
class InputReturned(Own):
    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        return x, F.linear(x, self.w), x.shape


@case(AREA, "the weight returned with the product", "w", EITHER)
class WeightReturned(Own):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.linear(x, self.w), self.w


@case(AREA, "a part of the weight returned with the product", "w", EITHER)
class PartReturned(Own):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.linear(x, self.w), self.w[:3].T


@case(AREA, "a returned function that multiplies", "w", EITHER, calls=(lambda model, x: model(x)(2 * x),))
class FunctionReturned(Own):
    def forward(self, x: torch.Tensor) -> Any:
        return lambda y: F.linear(x + y, self.w)


def _keywords(model: Any, x: torch.Tensor) -> Any:
    return model(inputs=x, scale=3)


@case(AREA, "keyword-only arguments", "w", calls=(_keywords, lambda model, x: model(inputs=x)))
class KeywordOnly(Own):
    def forward(self, *, inputs: torch.Tensor, scale: float = 2) -> torch.Tensor:
        return F.linear(inputs, self.w) * scale


@case(AREA, "`*args`: any number of inputs", "w", calls=(call, lambda model, x: model(x, x + 1, 2 * x)))
class AnyNumber(Own):
    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [F.linear(x, self.w) for x in inputs]


@case(AREA, "`**kwargs` passed on", "w", calls=(call, lambda model, x: model(x, scale=2, power=3)))
class AnyKeywords(Own):
    def change(self, out: torch.Tensor, scale: float = 1, power: int = 1) -> torch.Tensor:
        return (out * scale) ** power

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.change(F.linear(x, self.w), **options)


@case(AREA, "positional-only arguments", "w", calls=(lambda model, x: model(x, 2),))
class PositionalOnly(Own):
    def forward(self, x: torch.Tensor, scale: float, /) -> torch.Tensor:
        return F.linear(x, self.w) * scale


@case(AREA, "a dict of tensors as the input", "w", calls=(lambda model, x: model({"a": x, "b": None}),))
class DictInput(Own):
    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return sum(F.linear(value, self.w) for value in batch.values() if value is not None)


def _written(model: Any, x: torch.Tensor) -> Any:
    batch = {"x": x}
    model(batch)
    return batch


@case(AREA, "a dict that the forward writes its output into", "w", calls=(_written,))
class DictWritten(Own):
    def forward(self, batch: dict[str, torch.Tensor]) -> None:
        batch["hidden"] = F.linear(batch["x"], self.w)


@case(AREA, "a default argument that the forward changes: `seen=[]`", "inner.w", calls=(call, call), copies=False)
class MutableDefault(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        class Counts(Own):
            def forward(self, x: torch.Tensor, seen: list[int] = []) -> torch.Tensor:  # noqa: B006
                seen.append(len(x))
                return F.linear(x, self.w) * len(seen)

        self.inner = Counts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def _with_signature(model: Any, x: torch.Tensor) -> Any:
    return model(x), list(inspect.signature(model.forward).parameters), model.forward.__doc__, type(model).__name__


@case(AREA, "signature and docstring of the forward, as a Trainer reads them", "w", calls=(_with_signature,))
class ReadByTrainer(Own):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The product."""
        return F.linear(x, self.w)


@case(AREA, "token ids as the input", "w", calls=(lambda model, x: model((x.detach().abs() * 9).long() % IN),))
class Ids(Own):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(F.one_hot(ids, IN).to(self.w.dtype), self.w)


@case(
    AREA,
    "token ids as the input, looked up in the transposed weight",
    "w",
    EITHER,
    calls=(lambda model, x: model((x.detach().abs() * 9).long() % OUT),),
)
class IdsLookedUp(Own):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.w[ids]


@case(
    AREA,
    "one vector, and inputs of four dimensions",
    "w",
    calls=(lambda model, x: model(x[0]), lambda model, x: model(x.view(1, 3, 1, IN))),
)
class AnyShape(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


@case(AREA, "no output: the product is stored on self", "w")
class NoOutput(Own):
    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> None:
        self.hidden = F.linear(x, self.w).detach()
