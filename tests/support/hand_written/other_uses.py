"""Other uses of a weight in a forward, in addition to the product or instead of it."""

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import EITHER, LIMIT, REFUSED, formed
from support.models import IN, OUT

AREA = "Other uses of the weight"


def _shapes(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    rows, columns = w.shape
    facts = (w.size(1), w.dim(), w.numel(), len(w), w.stride(0), w.element_size() > 1, w.is_floating_point())
    return F.linear(x.to(w.device), w) * sum(facts) / rows / columns


def _kinds(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = F.linear(x, w)
    if isinstance(w, torch.Tensor):
        out = out * 2
    if isinstance(w, nn.Parameter):
        out = out + 3
    return out


formed(AREA, "shapes", "its shape, stride, dtype and device", _shapes)
formed(AREA, "kinds", "`isinstance(w, nn.Parameter)`", _kinds, EITHER)
formed(
    AREA,
    "exact-type",
    "`type(w) is nn.Parameter`",
    lambda x, w: F.linear(x, w) * (2 if type(w) is nn.Parameter else 1),
    LIMIT,
)
formed(AREA, "as-a-key", "as the key of a dict", lambda x, w: F.linear(x, w) * {w: 3.0}.get(w, 1.0), EITHER)
formed(
    AREA,
    "in-a-message",
    "in a string, `f'{w}'`",
    lambda x, w: (F.linear(x, w), len(f"{w.shape}") + bool(f"{w}")),
    EITHER,
)
formed(
    AREA, "zeros-like", "`torch.zeros_like(w)`", lambda x, w: F.linear(x, torch.zeros_like(w)) + F.linear(x, w), EITHER
)
formed(
    AREA,
    "as-bias",
    "a column of it as the bias, `F.linear(x, w, w[:, 0])`",
    lambda x, w: F.linear(x, w, w[:, 0]),
    EITHER,
)
formed(
    AREA,
    "penalty",
    "a penalty in addition to the product, `(w @ w.T).sum()`",
    lambda x, w: (F.linear(x, w), (w @ w.T).sum()),
    REFUSED,
)
formed(AREA, "mean", "its mean in addition to the product", lambda x, w: (F.linear(x, w), w.mean()), REFUSED)
formed(AREA, "norm", "divided by its norm", lambda x, w: F.linear(x, w) / w.norm(), REFUSED)
formed(
    AREA,
    "normalised-weight",
    "`F.normalize(w)` in the forward",
    lambda x, w: F.linear(F.normalize(x), F.normalize(w)),
    REFUSED,
)
formed(
    AREA,
    "scaled-weight",
    "`w * scale` in the forward (equalised learning rate)",
    lambda x, w: F.linear(x, w * 0.3),
    REFUSED,
)
formed(
    AREA,
    "masked-weight",
    "`w * mask` in the forward",
    lambda x, w: F.linear(x, w * (torch.arange(IN) % 2)),
    REFUSED,
)
formed(AREA, "triangular-weight", "`w.tril()` in the forward", lambda x, w: F.linear(x, w.tril()), REFUSED)
formed(
    AREA,
    "softmax-of-the-weight",
    "`w.softmax(-1)` in the forward",
    lambda x, w: F.linear(x, w.softmax(-1)),
    REFUSED,
)
formed(
    AREA,
    "weight-standardised",
    "`w - w.mean()` in the forward",
    lambda x, w: F.linear(x, w - w.mean(1, keepdim=True)),
    REFUSED,
)
formed(
    AREA,
    "rounded-weight",
    "rounded in the forward (fake quantisation)",
    lambda x, w: F.linear(x, w + (w.round(decimals=1) - w).detach()),
    REFUSED,
)
formed(AREA, "drop-connect", "`F.dropout(w)` in the forward", lambda x, w: F.linear(x, F.dropout(w, 0.5)), REFUSED)
formed(AREA, "gate-by-a-row", "a row as a gate, `x * w[0]`", lambda x, w: F.linear(x * w[0], w), REFUSED)
formed(
    AREA,
    "looked-up",
    "rows looked up in addition to the product, `F.embedding(ids, w)`",
    lambda x, w: F.linear(x, w) @ F.embedding(torch.arange(OUT), w),
    REFUSED,
)
formed(AREA, "distance", "distances to its rows, `torch.cdist(x, w)`", torch.cdist, REFUSED)
formed(AREA, "compared", "`if w[0, 0] > 0`", lambda x, w: F.linear(x, w) if w[0, 0] > 0 else x, REFUSED)
formed(
    AREA, "number-of-it", "`float(w.detach()[0, 0])`", lambda x, w: F.linear(x, w) * float(w.detach()[0, 0]), REFUSED
)
formed(AREA, "as-an-array", "`w.detach().numpy()`", lambda x, w: x @ torch.from_numpy(w.detach().numpy()).T, REFUSED)
formed(AREA, "as-a-list", "`w.tolist()`", lambda x, w: F.linear(x, torch.tensor(w.tolist(), dtype=x.dtype)), REFUSED)
formed(
    AREA,
    "chosen",
    "`torch.where(mask, w, 0)`",
    lambda x, w: F.linear(x, torch.where(torch.arange(IN) > 4, w, 0)),
    REFUSED,
)
formed(
    AREA,
    "prototypes",
    "as keys and values of attention",
    lambda x, w: F.scaled_dot_product_attention(x[None], w[None], w[None]),
    REFUSED,
)
formed(
    AREA,
    "sparse-input",
    "a sparse input, `torch.sparse.mm`",
    lambda x, w: torch.sparse.mm(x.relu().to_sparse(), w.T),
    EITHER,
)
formed(
    AREA,
    "gathered",
    "`torch.gather` of its values",
    lambda x, w: F.linear(x, w) + w.gather(1, torch.zeros(OUT, 1).long())[:, 0],
    REFUSED,
)
