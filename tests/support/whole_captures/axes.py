"""Which axes may vary."""

import torch
from torch import nn
from torch.nn import functional as F

from support.whole_captures.case import Child, whole, x

AREA = "Axes"


class Image(nn.Module):
    """A convolution, and a linear over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 24, 3, padding=1)
        self.fc = nn.Linear(24, 36)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.fc(self.convolution(pixels).mean((2, 3)))


@whole(
    AREA,
    "an image: height and width are fixed to the example's",
    (x(2, 3, 8, 8),),
    right={"a batch of 1": (x(1, 3, 8, 8),), "a batch of 5": (x(5, 3, 8, 8),)},
    refused={
        "9 × 8": ((x(2, 3, 9, 8),), r"`pixels` has shape \(2, 3, 9, 8\), but the capture is for \(any, 3, 8, 8\)")
    },
)
class FixedImage(Image):
    pass


@whole(
    AREA,
    'an image with `dynamic_axes={"pixels": {0: "batch", 2: "height", 3: "width"}}`',
    (x(2, 3, 8, 10),),
    right={"9 × 7": (x(2, 3, 9, 7),), "1 × 1": (x(1, 3, 1, 1),)},
    refused={
        "4 channels": ((x(2, 4, 8, 10),), r"`pixels` has shape \(2, 4, 8, 10\), but the capture is for \(any, 3, ")
    },
    dynamic_axes={"pixels": {0: "batch", 2: "height", 3: "width"}},
    exported=False,
)
class FreeImage(Image):
    pass


@whole(
    AREA,
    "`dynamic_axes={}`: nothing may vary",
    (x(1, 5, 24),),
    right={},
    refused={
        "6 tokens": ((x(1, 6, 24),), r"the capture is for \(1, 5, 24\)"),
        "a batch of 2": ((x(2, 5, 24),), r"for \(1, 5, 24\)"),
    },
    dynamic_axes={},
)
class NothingVaries(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@whole(
    AREA,
    "a mask of pairs of tokens, (batch, 1, tokens, tokens)",
    (x(2, 5, 24), x(2, 1, 5, 5)),
    right={"7 tokens": (x(2, 7, 24), x(2, 1, 7, 7)), "a batch of 1": (x(1, 5, 24), x(1, 1, 5, 5))},
    refused={"2 masks each": ((x(2, 5, 24), x(2, 2, 5, 5)), r"`mask` has shape|mask\.shape\[1\]")},
)
class PairMask(Child):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = x.unsqueeze(1)
        return self.fc(F.scaled_dot_product_attention(q, q, q, attn_mask=mask).squeeze(1))


@whole(
    AREA,
    "sound of any length, a named axis, halved by a convolution",
    (x(2, 1, 40),),
    right={"33 samples": (x(2, 1, 33),), "a batch of 1": (x(1, 1, 40),)},
    dynamic_axes={"sound": {0: "batch", 2: "samples"}},
)
class Sound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 24, 4, stride=2)
        self.fc = nn.Linear(24, 36)

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        return self.fc(self.convolution(sound).mT)
