"""How a module stores its matrix."""

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import AT_REWRITE, EITHER, Own, case, matrix
from support.models import IN, OUT

AREA = "Kinds of matrices"


@case(AREA, "two matrices, `weight` and `weight_2`, the second one adapted", ("inner.weight_2",), inside=True)
class TwoMatrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = matrix()
        self.weight_2 = matrix(seed=12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) * torch.tanh(F.linear(x, self.weight_2))


@case(AREA, "a frozen matrix, `requires_grad=False`", "inner.w", inside=True)
class Frozen(Own):
    def __init__(self) -> None:
        super().__init__()
        self.w.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


@case(AREA, "a matrix in a buffer, not a parameter", "inner.w", AT_REWRITE, inside=True, match="w")
class InABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", matrix().detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


@case(AREA, "a complex matrix", "inner.w", AT_REWRITE, inside=True)
class ComplexMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.complex(matrix().detach(), matrix(seed=12).detach()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.complex(x, x), self.w).real


@case(
    AREA,
    "a bfloat16 matrix with float32 inputs",
    "inner.w",
    EITHER,
    inside=True,
    dtype=torch.float32,
    tolerance=0.1,
)
class StoredInBfloat16(Own):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(matrix().detach().bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.w.dtype), self.w).to(x.dtype)


@case(
    AREA,
    "a projection to heads and one back, `einsum` with matrices (in, heads, out) and (out, heads, in)",
    ("inner.to_heads", "inner.back"),
    inside=True,
    shape=(2, 3, IN),
)
class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_heads = nn.Parameter(matrix(IN, OUT).detach().view(IN, 3, -1))
        self.back = nn.Parameter(matrix(IN, OUT, seed=12).detach().view(IN, 3, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = torch.einsum("bti,ihd->bthd", x, self.to_heads)
        return torch.einsum("ohd, bthd -> bto", self.back, heads.tanh())


@case(
    AREA,
    "the same with `x @ w.flatten(1)` and `F.linear(x, w.flatten(1))`",
    ("inner.to_heads", "inner.back"),
    inside=True,
)
class FlattenedHeads(Heads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear((x @ self.to_heads.flatten(1)).tanh(), self.back.flatten(1))


@case(AREA, "a stack of matrices in one product", "inner.w", EITHER, inside=True)
class StackOfMatrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, OUT, IN) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,koi->bko", x, self.w)
