"""Python that decides what is computed."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import AT_REWRITE, EITHER, TWICE, Own, call, case, matrix
from support.models import IN, OUT

AREA = "Control flow"


@case(AREA, "`isinstance(x, torch.Tensor)`", "w", calls=(call, lambda model, x: model([x, 2 * x])))
class TensorOrList(Own):
    def forward(self, x: Any) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return F.linear(x, self.w)
        return F.linear(sum(x), self.w) * 3


@case(AREA, "`if flag is True`", "w", calls=(call, lambda model, x: model(x, True), lambda model, x: model(x, 1)))
class FlagIsTrue(Own):
    def forward(self, x: torch.Tensor, flag: Any = False) -> torch.Tensor:
        out = F.linear(x, self.w)
        return out.relu() if flag is True else out * 2


@case(AREA, "a dict of functions, `functions.get(mode)`", "w", calls=(call, lambda model, x: model(x, "tanh")))
class DictOfFunctions(Own):
    def forward(self, x: torch.Tensor, mode: str = "none") -> torch.Tensor:
        function = {"tanh": torch.tanh, "relu": torch.relu}.get(mode)
        out = F.linear(x, self.w)
        return out if function is None else function(out)


@case(AREA, "`try` and `except` around a key that the input lacks", "w", calls=(call, lambda model, x: model({"x": x})))
class TryExcept(Own):
    def forward(self, x: Any) -> torch.Tensor:
        try:
            x = x["x"] * 2
        except (IndexError, TypeError, KeyError):
            x = x - 1
        return F.linear(x, self.w)


@case(AREA, "`random.random()`: a layer is sometimes skipped", "w", calls=TWICE * 3)
class LayerDrop(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.w)
        return out if random.random() < 0.5 else torch.tanh(out)


@case(AREA, "`torch.rand(())` decides", "w", calls=TWICE * 2, dtype=torch.float32)
class RandomBranch(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) * (2 if torch.rand(()) < 0.5 else -1)


@case(AREA, "noise from `torch.rand`", "w", calls=TWICE, dtype=torch.float32)
class Noise(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x + torch.rand(x.shape), self.w) + torch.randn(OUT)


@case(AREA, "dropout with `F.dropout(x, 0.5, self.training)`", "w", calls=TWICE, dtype=torch.float32)
class FunctionalDropout(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(F.linear(F.dropout(x, 0.5, self.training), self.w), 0.5, self.training)


@case(AREA, "dropout that is never off, `F.dropout(x, 0.5)`", "w", calls=TWICE, dtype=torch.float32)
class AlwaysDropout(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.dropout(x, 0.5), self.w)


@case(AREA, "an optional argument, passed or None", "w", calls=(call, lambda model, x: model(x, x.mean())))
class OptionalArgument(Own):
    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        out = F.linear(x, self.w)
        if shift is not None:
            out = out * shift
        return out


@case(AREA, "`if self.training`", "w")
class TrainOrEval(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.w)
        if self.training:
            return out + out.detach().std()
        return torch.tanh(out)


@case(AREA, "`if self.training`, with the product in only one branch", "w")
class ProductInTraining(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) if self.training else x


@case(AREA, "`if torch.is_grad_enabled()`", "w")
class GradEnabled(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.w)
        return out * 2 if torch.is_grad_enabled() else out - 1


@case(AREA, "`if x.requires_grad`", "w", calls=(call, lambda model, x: model(x.detach())))
class InputWantsGradient(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) * (2 if x.requires_grad else 1)


@case(AREA, "`if torch.compiler.is_compiling()`", "w", breaks_graph=True)
class IsCompiling(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_scripting() or torch.jit.is_tracing():
            return F.linear(x, self.w)
        return torch.matmul(x, self.w.t())


@case(AREA, "`if x.sum() > 0`", "w", calls=(call, lambda model, x: model(-x)))
class DataDependent(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return F.linear(x, self.w)
        return F.linear(-x, self.w).tanh()


@case(AREA, "a branch on the product itself", "w", calls=(call, lambda model, x: model(-x)))
class BranchOnOutput(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.w)
        return out if out.mean().item() > 0 else out.exp().log1p()


@case(AREA, "a branch on the shape", "w", calls=(call, lambda model, x: model(x[:1]), lambda model, x: model(x[0])))
class BranchOnShape(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 1:
            return self.w @ x
        return F.linear(x, self.w) * (len(x) if x.shape[0] > 1 else -1)


@case(
    AREA,
    "an early return before the transposed product",
    "w",
    AT_REWRITE,
    calls=(call, lambda model, x: model(x, stop=True)),
)
class EarlyReturn(Own):
    def forward(self, x: torch.Tensor, stop: bool = False) -> torch.Tensor:
        hidden = F.linear(x, self.w)
        if stop:
            return hidden
        return hidden.softmax(-1) @ self.w


@case(AREA, "a loop until the values converge", "w")
class UntilItSettles(Own):
    def __init__(self) -> None:
        super().__init__(IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x
        for _ in range(20):
            x = torch.tanh(F.linear(last, self.w) + 0.1)
            if (x - last).norm() < 0.5:
                break
            last = x
        return x


@case(AREA, "a loop with a number of steps that is an argument", "w", calls=(call, lambda model, x: model(x, steps=3)))
class StepsByArgument(Own):
    def __init__(self) -> None:
        super().__init__(IN)

    def forward(self, x: torch.Tensor, steps: int = 1) -> torch.Tensor:
        while steps:
            x = torch.tanh(F.linear(x, self.w))
            steps -= 1
        return x


@case(AREA, "a list comprehension of products with an nn.ParameterList", ("ws.0", "ws.1"), AT_REWRITE)
class Comprehension(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([matrix(), matrix(seed=12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([F.linear(x, w) for w in self.ws]).prod(0)


@case(AREA, "a generator of products", "w")
class Generator(Own):
    def products(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for scale in (1, 2):
            yield F.linear(x * scale, self.w).tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.products(x))


def _consumed(model: Any, x: torch.Tensor) -> Any:
    return list(model(x))


@case(AREA, "a forward that is a generator, consumed by the caller", "w", EITHER, calls=(_consumed,))
class GeneratorForward(Own):
    def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for row in x:
            yield F.linear(row, self.w)


@case(AREA, "recursion", "w")
class Recursive(Own):
    def __init__(self) -> None:
        super().__init__(IN)

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        out = torch.tanh(F.linear(x, self.w))
        return out if depth == 0 else self(out, depth - 1)


@case(AREA, "a method chosen by a name, `getattr(self, f'_{self.mode}')`", "w")
class ByName(Own):
    mode = "slow"

    def _slow(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) / 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"_{self.mode}")(x)


def _bad_then_good(model: Any, x: torch.Tensor) -> Any:
    with contextlib.suppress(RuntimeError):
        model(x[:, :3])
    return model(x)


@case(AREA, "an input of the wrong size, then a good one", "w", calls=(_bad_then_good,))
class BadInput(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


def _raised(model: Any, x: torch.Tensor) -> Any:
    try:
        return model(x * torch.nan)
    except ValueError as error:
        return str(error)


@case(AREA, "an error that the forward raises after the product", "w", calls=(_raised, call))
class RaisesItsOwn(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.w)
        if out.isnan().any():
            raise ValueError("not a number")
        return out


@case(
    AREA,
    "experts in an nn.ParameterList: each row goes to the chosen one",
    ("router", "ws.0", "ws.1"),
    AT_REWRITE,
    match="ws.0",
)
class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(IN, 6)
        self.ws = nn.ParameterList([matrix(), matrix(seed=12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x)[:, :2].softmax(-1)
        out = x.new_zeros(len(x), OUT)
        for number, w in enumerate(self.ws):
            rows = (chosen.argmax(-1) == number).nonzero()[:, 0]
            out = out.index_add(0, rows, F.linear(x[rows], w) * chosen[rows, number, None])
        return out
