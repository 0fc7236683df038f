"""Ways to multiply by a weight, or by a part of it."""

import torch
from torch.nn import functional as F

from support.hand_written.case import AT_REWRITE, EITHER, formed
from support.models import IN, OUT, randn

PRODUCTS = "Products"
PARTS = "Parts and views of the weight"
HALF = IN // 2


def _in_place(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = F.linear(x, w)
    out.mul_(2).add_(1)
    out[:, 0] = 1
    return out


def _input_overwritten(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        hidden = x.clone()
        out = F.linear(hidden, w)
        hidden.zero_()
    return out, hidden


def _into_a_buffer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = torch.empty(len(x), OUT, dtype=x.dtype)
        torch.mm(x, w.T, out=out)
    return out


def _assigned_matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = x
    out @= w.T
    return out


formed(PRODUCTS, "linear-by-keywords", "`F.linear(input=x, weight=w)`", lambda x, w: F.linear(input=x, weight=w))
formed(PRODUCTS, "matmul-right", "`x @ w.T`", lambda x, w: x @ w.T)
formed(PRODUCTS, "matmul-left", "`w @ x.T`", lambda x, w: (w @ x.T).T)
formed(PRODUCTS, "method-matmul", "`x.matmul(w.t())`", lambda x, w: x.matmul(w.t()))
formed(PRODUCTS, "assigned-matmul", "`x @= w.T`", _assigned_matmul, EITHER)
formed(PRODUCTS, "linear-swapped", "the weight as the input of `F.linear`", lambda x, w: F.linear(w, x).T, AT_REWRITE)
formed(
    PRODUCTS,
    "matrix-vector",
    "`torch.mv(w, vector)` in addition to `w @ vector`",
    lambda x, w: (w @ x[0], torch.mv(w, x[1])),
)
formed(PRODUCTS, "weight-and-vector", "`w @ vector`", lambda x, w: w @ x[0])
formed(PRODUCTS, "vector-matrix", "`vector @ w.T`", lambda x, w: x[0] @ w.T)
formed(
    PRODUCTS,
    "addmm",
    "`torch.addmm` with `beta` and `alpha`",
    lambda x, w: torch.addmm(x.mean(), x, w.T, beta=0.5, alpha=2),
)
formed(
    PRODUCTS,
    "addmm-left",
    "`torch.addmm` with the weight first and `alpha`",
    lambda x, w: torch.addmm(x.mean(), w, x.T, alpha=-0.5).T,
)
formed(
    PRODUCTS,
    "addmv",
    "`torch.addmv`",
    lambda x, w: torch.addmv(x.new_ones(OUT), w, x[0], alpha=3),
)
formed(
    PRODUCTS,
    "baddbmm",
    "`torch.baddbmm` with the weight expanded over a batch",
    lambda x, w: torch.baddbmm(x.new_ones(1), x, w.T.expand(2, -1, -1)),
    shape=(2, 3, IN),
)
formed(
    PRODUCTS,
    "bmm-expanded",
    "`torch.bmm` with the weight expanded over a batch",
    lambda x, w: torch.bmm(x, w.unsqueeze(0).expand(len(x), -1, -1).mT),
    shape=(2, 3, IN),
)
formed(
    PRODUCTS,
    "einsum",
    "`torch.einsum('bti,oi->bto', x, w)`",
    lambda x, w: torch.einsum("bti,oi->bto", x, w),
    shape=(2, 3, IN),
)
formed(
    PRODUCTS,
    "einsum-with-dots",
    "`torch.einsum('...i,oi->...o', x, w)`",
    lambda x, w: torch.einsum("...i,oi->...o", x, w),
    shape=(2, 3, IN),
)
formed(
    PRODUCTS,
    "einsum-with-another-order",
    "`torch.einsum('bti,oi->bot', x, w)`, `'oi,bti->otb'`, and `'bi,oi'`",
    lambda x, w: (
        torch.einsum("bti,oi->bot", x, w),
        torch.einsum("oi,bti->otb", w, x),
        torch.einsum("bi,oi", x[0], w),
    ),
    shape=(2, 3, IN),
)
formed(
    PRODUCTS,
    "einsum-of-other-features",
    "`torch.einsum('b...i,oi->o...b', x, w)`, and `'bit,oi->bto'`, whose features are not last",
    lambda x, w: (torch.einsum("b...i,oi->o...b", x, w), torch.einsum("bit,oi->bto", x.mT, w)),
    shape=(2, 3, IN),
)
formed(
    PRODUCTS,
    "einsum-by-numbers",
    "`torch.einsum(x, [0, 1], w, [2, 1], [2, 0])`",
    lambda x, w: torch.einsum(x, [0, 1], w, [2, 1], [2, 0]) + torch.einsum(x, [..., 1], w, [2, 1]).T,
)
formed(
    PRODUCTS,
    "einsum-of-heads",
    "`torch.einsum` with the weight viewed as heads",
    lambda x, w: torch.einsum("bi,hdi->bhd", x, w.view(3, -1, IN)),
    AT_REWRITE,
)
formed(
    PRODUCTS,
    "einsum-of-three",
    "`torch.einsum('bi,oi,bo->b', x, w, y)`",
    lambda x, w: torch.einsum("bi,oi,bo->b", x, w, x.repeat(1, 2)[:, :OUT]),
    EITHER,
)
formed(PRODUCTS, "tensordot", "`torch.tensordot`", lambda x, w: torch.tensordot(x, w, dims=([1], [1])), EITHER)
formed(PRODUCTS, "inner", "`torch.inner`", torch.inner)
formed(PRODUCTS, "aten", "`torch.ops.aten.linear`", lambda x, w: torch.ops.aten.linear(x, w), EITHER)
formed(PRODUCTS, "multi-dot", "`torch.linalg.multi_dot`", lambda x, w: torch.linalg.multi_dot([x, w.T, w]), EITHER)
formed(
    PRODUCTS,
    "pointwise-convolution",
    "`F.conv1d` with the weight as a kernel of size 1",
    lambda x, w: F.conv1d(x.mT, w.unsqueeze(-1)).mT,
    EITHER,
    shape=(2, 3, IN),
)
formed(
    PRODUCTS,
    "there-and-back",
    "an autoencoder with one weight, `tanh(x @ w.T) @ w`",
    lambda x, w: (x @ w.T).tanh() @ w,
    AT_REWRITE,
)
formed(PRODUCTS, "associated", "`x @ (w.T @ y)`", lambda x, w: x @ (w.T @ x.repeat(1, 2)[:, :OUT].T))
formed(
    PRODUCTS,
    "hypernetwork",
    "a hypernetwork: the product is the weight of the next product",
    lambda x, w: x[:, :5] @ F.linear(randn(5, IN, dtype=x.dtype), w),
)
formed(PRODUCTS, "output-in-place", "in-place operations on the output", _in_place)
formed(PRODUCTS, "input-overwritten", "the input is overwritten after the product", _input_overwritten)
formed(PRODUCTS, "into-a-buffer", "`torch.mm(x, w.T, out=buffer)`", _into_a_buffer, EITHER)
formed(PRODUCTS, "no-rows", "an empty batch", lambda x, w: F.linear(x[:0], w).sum() + F.linear(x, w))


def _heads(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    query, key, value = w.chunk(3)
    return (x @ query.T).softmax(-1) * (x @ key.T) + F.linear(x, value)


def _by_index(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[torch.tensor([0, 5, 5, 2])])


formed(PARTS, "columns", "columns, `x[:, :k] @ w[:, :k].T`", lambda x, w: x[:, :HALF] @ w[:, :HALF].T)
formed(PARTS, "columns-left", "columns, `w[:, k:] @ x`", lambda x, w: (w[:, HALF:] @ x[:, HALF:].T).T)
formed(
    PARTS,
    "rows-and-columns",
    "rows and columns, `w[:12, 4:9]`, and one column",
    lambda x, w: F.linear(x[:, 4:9], w[:12, 4:9]) + F.linear(x[:, :1], w.narrow(1, 3, 1)[:12]),
)
formed(
    PARTS,
    "columns-of-two-inputs",
    "columns for each half of the input",
    lambda x, w: x[:, :HALF] @ w[:, :HALF].T - x[:, HALF:] @ w[:, HALF:].T,
)
formed(
    PARTS,
    "every-second-column",
    "every second column, `w[:, ::2]`",
    lambda x, w: F.linear(x[:, ::2], w[:, ::2]),
    AT_REWRITE,
)
formed(PARTS, "rows-of-heads", "rows for q, k and v from `w.chunk(3)`", _heads)
formed(PARTS, "rows-by-slices", "rows, `w[:12]` and `w[12:]`", lambda x, w: (x @ w[:12].T, F.linear(x, w[12:])))
formed(PARTS, "rows-by-split", "`w.split([12, 24])`", lambda x, w: [F.linear(x, rows) for rows in w.split([12, 24])])
formed(
    PARTS,
    "rows-by-the-input",
    "a number of rows that depends on the input, `w[:x.shape[1]]`",
    lambda x, w: F.linear(x, w[: x.shape[1]]),
    AT_REWRITE,
)
formed(PARTS, "rows-by-an-index", "rows chosen by a tensor of indices", _by_index, EITHER)
formed(
    PARTS,
    "rows-by-a-mask",
    "rows chosen by a boolean mask",
    lambda x, w: F.linear(x, w[torch.arange(OUT) % 3 == 0]),
    EITHER,
)
formed(PARTS, "narrow", "`w.narrow(0, 6, 12)`", lambda x, w: F.linear(x, w.narrow(0, 6, 12)))
formed(PARTS, "one-row", "one row, `x @ w[3]`", lambda x, w: x @ w[3], AT_REWRITE)
formed(
    PARTS,
    "rows-one-by-one",
    "a loop over the rows of the weight",
    lambda x, w: torch.stack([x @ row for row in w], -1),
    AT_REWRITE,
)
formed(PARTS, "unbound", "`w.unbind()`", lambda x, w: torch.stack([x @ row for row in w.unbind()[:5]]), EITHER)
formed(PARTS, "permuted", "`w.permute(1, 0)`", lambda x, w: x @ w.permute(1, 0))
formed(
    PARTS,
    "transposed-twice",
    "transposed, sliced, and transposed back",
    lambda x, w: F.linear(x[:, 3:9], w.T[3:9].transpose(0, 1)),
)
formed(PARTS, "reshaped", "`w.reshape(2, -1, IN)`", lambda x, w: x @ w.reshape(2, -1, IN).mT, AT_REWRITE)
formed(
    PARTS,
    "flattened",
    "flattened, sliced and viewed again",
    lambda x, w: F.linear(x, w.flatten()[: 6 * IN].view(6, IN)),
    EITHER,
)
formed(
    PARTS,
    "folded-view",
    "viewed with other rows and columns, `w.view(72, 12)`",
    lambda x, w: F.linear(x[:, :12], w.view(72, 12)),
    EITHER,
)
formed(PARTS, "strided", "`w.as_strided`", lambda x, w: F.linear(x, w.as_strided((6, IN), (2 * IN, 1))), EITHER)
formed(PARTS, "flipped", "`w.flip(0)`", lambda x, w: F.linear(x, w.flip(0)), EITHER)
formed(PARTS, "diagonal", "the diagonal, `x * w.diagonal()`", lambda x, w: x * w.diagonal(), EITHER)
formed(
    PARTS,
    "concatenated",
    "two parts joined with `torch.cat`",
    lambda x, w: F.linear(x, torch.cat([w[6:], w[:6]])),
    EITHER,
)
formed(PARTS, "contiguous", "`w.T.contiguous()`", lambda x, w: x @ w.T.contiguous(), EITHER)
formed(PARTS, "cloned", "`w.clone()`", lambda x, w: F.linear(x, w.clone()), EITHER)
formed(PARTS, "detached", "`w.detach()`", lambda x, w: F.linear(x, w.detach()) + F.linear(x, w).tanh(), EITHER)
formed(PARTS, "data", "`w.data`", lambda x, w: F.linear(x, w.data), EITHER)
formed(PARTS, "same-dtype", "`w.to(x.dtype)`, which is the same dtype", lambda x, w: F.linear(x, w.to(x.dtype)), EITHER)
formed(
    PARTS,
    "cast-to-bfloat16",
    "cast to bfloat16 in the forward",
    lambda x, w: F.linear(x.bfloat16(), w.bfloat16()),
    EITHER,
    dtype=torch.float32,
    tolerance=0.1,
)
formed(
    PARTS,
    "cast-to-float64",
    "cast to float64 in the forward",
    lambda x, w: F.linear(x.double(), w.double()).to(x.dtype),
    EITHER,
)
formed(PARTS, "cast-to-input", "`w.type_as(x)`", lambda x, w: F.linear(x, w.type_as(x)), EITHER)
