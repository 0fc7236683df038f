"""Sizes that decide what is computed: the capture has the example's branch."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from support.whole_captures.case import Child, whole, x

AREA = "Sizes"


@whole(
    AREA,
    "`if x.shape[1] > 9` takes the other branch",
    (x(2, 5, 24),),
    right={"9 tokens": (x(2, 9, 24),), "1 token": (x(2, 1, 24),), "a batch of 1": (x(1, 5, 24),)},
    refused={"10 tokens": ((x(2, 10, 24),), r"x\.shape\[1\] <= 9")},
    exported=True,
)
class LongInputs(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.fc(x) if x.shape[1] > 9 else self.fc(x)


@whole(
    AREA,
    "the same, captured in the longer branch",
    (x(2, 10, 24),),
    right={"99 tokens": (x(2, 99, 24),)},
    refused={"9 tokens": ((x(2, 9, 24),), r"x\.shape\[1\] > 9")},
    exported=True,
)
class CapturedLong(LongInputs):
    pass


@whole(
    AREA,
    "a sliding window, `x[:, -16:]`",
    (x(2, 8, 24),),
    right={"20 tokens": (x(2, 20, 24),), "99 tokens": (x(2, 99, 24),), "1 token": (x(2, 1, 24),)},
    exported=True,
)
class SlidingWindow(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x[:, -16:])


@whole(
    AREA,
    "`if x.shape[0] > 1` normalises over the batch",
    (x(3, 5, 24),),
    right={"a batch of 2": (x(2, 5, 24),)},
    refused={"a batch of 1": ((x(1, 5, 24),), r"x\.shape\[0\] > 1")},
    exported=True,
)
class OverTheBatch(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return y - y.mean(0) if x.shape[0] > 1 else y


@whole(
    AREA,
    "`y.squeeze(0)` of a batch",
    (x(3, 5, 24),),
    right={"a batch of 2": (x(2, 5, 24),), "a batch of 1": (x(1, 5, 24),)},
)
class Squeezed(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).squeeze(0)


@whole(
    AREA,
    "`y.squeeze()`",
    (x(3, 5, 24),),
    right={"9 tokens": (x(3, 9, 24),), "1 token": (x(3, 1, 24),), "a batch of 1": (x(1, 5, 24),)},
    exported=True,
)
class SqueezedAll(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).squeeze()


@whole(
    AREA,
    "a table of 12 positions, `self.table[: x.shape[1]]`",
    (x(2, 5, 24),),
    right={"12 tokens": (x(2, 12, 24),), "1 token": (x(2, 1, 24),)},
    refused={"13 tokens": ((x(2, 13, 24),), r"x\.shape\[1\] <=? 1[23]")},
    exported=True,
)
class Positions(Child):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x + self.table[: x.shape[1]])


@whole(
    AREA,
    "positions are an embedding of `torch.arange(x.shape[1])`",
    (x(2, 5, 24),),
    right={"12 tokens": (x(2, 12, 24),), "1 token": (x(2, 1, 24),)},
)
class EmbeddedPositions(Child):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x + self.embedding(torch.arange(x.shape[1], device=x.device)))


@whole(
    AREA,
    "blocks of 4 tokens, `x.view(b, s // 4, 4, -1)`",
    (x(2, 8, 24),),
    right={"12 tokens": (x(2, 12, 24),), "4 tokens": (x(2, 4, 24),)},
    refused={"10 tokens": ((x(2, 10, 24),), r"x\.shape\[1\]")},
    exported=True,
)
class Blocks(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        return self.fc(x.view(batch, length // 4, 4, width).mean(2))


@whole(
    AREA,
    "padded to a multiple of 4, `F.pad(x, (0, 0, 0, -s % 4))`",
    (x(2, 6, 24),),
    right={"7 tokens": (x(2, 7, 24),), "13 tokens": (x(2, 13, 24),)},
    exported=True,
)
class Padded(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        padded = F.pad(x, (0, 0, 0, -length % 4))
        return self.fc(padded.view(x.shape[0], -1, 4, 24).sum(2))


@whole(
    AREA,
    "padded only `if x.shape[1] % 4`",
    (x(2, 6, 24),),
    right={"7 tokens": (x(2, 7, 24),)},
    refused={"8 tokens": ((x(2, 8, 24),), r"x\.shape\[1\]")},
    exported=True,
)
class PaddedWhereNeeded(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        if length % 4:
            x = F.pad(x, (0, 0, 0, 4 - length % 4), value=1.0)
            return self.fc(x).sum(1)
        return self.fc(x).mean(1)


@whole(
    AREA,
    "a loop over the tokens, `for i in range(x.shape[1])`",
    (x(2, 5, 24),),
    right={"a batch of 1": (x(1, 5, 24),)},
    refused={"6 tokens": ((x(2, 6, 24),), r"`x` has shape \(2, 6, 24\), but the capture is for \(any, 5, 24\)")},
)
class Loop(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(x.shape[0], 36)
        for i in range(x.shape[1]):
            state = torch.tanh(state + self.fc(x[:, i]))
        return state


@whole(
    AREA,
    "two inputs that are assumed to be equally long, `x * y`",
    (x(2, 5, 24), x(2, 5, 24, seed=2)),
    right={"7 tokens of both": (x(2, 7, 24), x(2, 7, 24, seed=2))},
    refused={"7 and 5 tokens": ((x(2, 7, 24), x(2, 5, 24)), r"x\.shape\[1\]|y\.shape\[1\]|must match|expand")},
)
class TwoInputs(Child):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.fc(x * y)


@whole(
    AREA,
    "`if x.shape == y.shape`, with equal shapes",
    (x(2, 5, 24), x(2, 5, 24, seed=2)),
    right={"7 tokens of both": (x(2, 7, 24), x(2, 7, 24, seed=2))},
    refused={"7 and 5 tokens": ((x(2, 7, 24), x(2, 5, 24)), r"[xy]\.shape\[1\]")},
    exported=True,
)
class SameShapes(Child):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.fc(x + y) if x.shape == y.shape else self.fc(x)


@whole(
    AREA,
    "`if x.shape != y.shape`, with different lengths",
    (x(2, 5, 24), x(2, 7, 24, seed=2)),
    right={"4 and 9 tokens": (x(2, 4, 24), x(2, 9, 24, seed=2))},
    refused={"5 and 5 tokens": ((x(2, 5, 24), x(2, 5, 24)), r"[xy]\.shape\[1\]")},
    exported=True,
)
class OtherShapes(Child):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.fc(x).sum(1) - self.fc(y).sum(1) if x.shape != y.shape else self.fc(x + y).sum(1)


@whole(
    AREA,
    "`if x.numel() > 1000`",
    (x(2, 5, 24),),
    right={"10 tokens": (x(2, 10, 24),)},
    refused={"40 tokens": ((x(2, 40, 24),), r"x\.shape\[1\]"), "a batch of 16": ((x(16, 5, 24),), r"x\.shape\[0\]")},
    exported=True,
)
class ManyEntries(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.numel() <= 1000 else self.fc(x) * 0.5


@whole(
    AREA,
    "`min(x.shape[1], 8)` tokens",
    (x(2, 5, 24),),
    right={"7 tokens": (x(2, 7, 24),), "9 tokens": (x(2, 9, 24),)},
    exported=True,
)
class AtMostEight(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x[:, : min(x.shape[1], 8)])


@whole(
    AREA,
    "the side of a square of patches, `math.isqrt(x.shape[1])`",
    (x(2, 9, 24),),
    right={"a batch of 1": (x(1, 9, 24),)},
    refused={"16 patches": ((x(2, 16, 24),), r"`x` has shape|x\.shape\[1\]")},
)
class SquareOfPatches(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(x.shape[1])
        return self.fc(x.view(x.shape[0], side, side, 24).sum(1))


@whole(
    AREA,
    "a causal mask, `torch.tril(torch.ones(s, s))`",
    (x(2, 5, 24),),
    right={"9 tokens": (x(2, 9, 24),), "1 token": (x(2, 1, 24),), "1 token, a batch of 1": (x(1, 1, 24),)},
    exported=True,
)
class CausalMask(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        scores = x @ x.mT
        mask = torch.tril(torch.ones(length, length, dtype=torch.bool, device=x.device))
        return self.fc(scores.masked_fill(~mask, -1e4).softmax(-1) @ x)


@whole(
    AREA,
    "scores are scaled by `1 / math.sqrt(x.shape[1])`",
    (x(2, 5, 24),),
    right={"a batch of 1": (x(1, 5, 24),)},
    refused={"9 tokens": ((x(2, 9, 24),), r"`x` has shape \(2, 9, 24\), but the capture is for \(any, 5, 24\)")},
)
class ScaledByLength(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * (1 / math.sqrt(x.shape[1]))


@whole(
    AREA,
    "`x.expand(3, -1, -1)`, which accepts a batch of 1 or of 3",
    (x(3, 5, 24),),
    right={"9 tokens": (x(3, 9, 24),)},
    refused={"a batch of 1": ((x(1, 5, 24),), r"`x` has shape|x\.shape\[0\]")},
)
class Expanded(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.expand(3, -1, -1))


@whole(
    AREA,
    "an axis of length 1 that could be broadcast to the tokens of another input",
    (x(2, 5, 24), x(2, 5, 24, seed=2)),
    right={"7 tokens of both": (x(2, 7, 24), x(2, 7, 24, seed=2))},
    refused={"7 tokens and 1": ((x(2, 7, 24), x(2, 1, 24)), r"[xy]\.shape\[1\]")},
    exported=True,
    capture_alone=True,
)
class Broadcast(Child):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.fc(y)


@whole(
    AREA,
    "the batch is split with `x.chunk(2)`",
    (x(4, 5, 24),),
    right={"9 tokens": (x(4, 9, 24),)},
    refused={"a batch of 1": ((x(1, 5, 24),), r"`x` has shape|x\.shape\[0\]")},
)
class Chunked(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2)
        return self.fc(first - second)


@whole(
    AREA,
    "`if x.sum() > 0`: the values decide",
    (x(2, 5, 24),),
    at_rewrite="cannot capture",
)
class ValuesDecide(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else -self.fc(x)
