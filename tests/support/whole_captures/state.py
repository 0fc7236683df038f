"""State that a forward keeps, and weights in unusual places."""

import torch
from torch import nn

from support.models import IN
from support.whole_captures.case import Child, whole, x

AREA = "State, and weights in several places"


class Square(nn.Module):
    """Has one nn.Linear, 24 → 24."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(IN, IN)


@whole(AREA, "a buffer that is reassigned, `self.n = self.n + 1`", (x(2, 24),), right={"a second call": (x(2, 24),)})
class ExchangedBuffer(Child):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.n = self.n + 1
        return self.fc(x) * self.n, self.n


@whole(AREA, "a buffer that is changed in place, `self.n.add_(1)`", (x(2, 24),), right={"a second call": (x(2, 24),)})
class ChangedBuffer(Child):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.n.add_(1)
        return self.fc(x) * self.n, self.n.clone()


@whole(
    AREA,
    "a counter in Python, `self.calls += 1`",
    (x(2, 24),),
    warns="keeps `calls`",
)
class Counter(Child):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.fc(x)


@whole(
    AREA,
    "a tensor that is kept for the next call, `self.last = y`",
    (x(2, 24),),
    at_rewrite=r"\blast\b",  # if warnings are errors, torch's own names it
)
class KeepsTensor(Child):
    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(2, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x) + self.last.mean()
        self.last = y
        return y


@whole(
    AREA,
    "an input that is changed in place, `x.mul_(2)`",
    (x(2, 5, 24),),
    right={"7 tokens": (x(2, 7, 24),)},
    warns="changes the input `x`, and so does the capture",
)
class ChangesInput(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mul_(2))


@whole(AREA, "the weight in a plain list, and the module called too", (x(2, 24),), right={"a batch of 1": (x(1, 24),)})
class WeightInList(Square):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.fc.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) @ self.weights[0].T


@whole(AREA, "the weight in a plain list, and the module not called", (x(2, 24),))
class WeightInListAlone(Square):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.fc.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[0].T + self.fc.bias


@whole(AREA, "a view of the weight made in `__init__`", (x(2, 24),), at_rewrite="`fc.weight` is also read")
class ViewOfWeight(Square):
    def __init__(self) -> None:
        super().__init__()
        self.rows = [self.fc.weight.data[:12]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + (x @ self.rows[0].T).sum()


@whole(AREA, "`next(self.fc.parameters())`", (x(2, 24),), right={"a batch of 1": (x(1, 24),)})
class NextOfParameters(Square):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + x @ next(self.fc.parameters()).T


@whole(AREA, "one module called twice", (x(2, 24),), right={"a batch of 1": (x(1, 24),)})
class Twice(Square):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.fc(x)))


@whole(AREA, "batch norm in eval mode", (x(4, 24),), right={"a batch of 1": (x(1, 24),)})
class Normalised(Child):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc(x))


@whole(
    AREA, "`if self.training`, with a different result", (x(2, 24),), at_rewrite="differs between train and eval mode"
)
class OtherInTraining(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * 3 if self.training else self.fc(x)
