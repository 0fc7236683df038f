"""Every way to write a linear: name → (options of `Form`, the form)."""

import operator

import torch
from torch.nn import functional as F

from support.models import (
    IN,
    OUT,
)

aten = torch.ops.aten


COLUMN = {"bias_shape": (OUT, 1)}


# x is (…, 24); the weight (36, 24), or (24, 36) if transposed
ROW_FORMS = {
    "linear": ({}, lambda x, w, b: F.linear(x, w, b)),
    "linear_no_bias": ({}, lambda x, w, b: F.linear(x, w)),
    "linear_keywords": ({}, lambda x, w, b: F.linear(input=x, weight=w, bias=b)),
    "linear_transposed_storage": ({"transposed": True}, lambda x, w, b: F.linear(x, w.t(), b)),
    "matmul_T": ({}, lambda x, w, b: x @ w.T + b),
    "matmul_mT": ({}, lambda x, w, b: x @ w.mT + b),
    "matmul_t": ({}, lambda x, w, b: torch.matmul(x, w.t()) + b),
    "matmul_torch_t": ({}, lambda x, w, b: torch.matmul(x, torch.t(w))),
    "matmul_transpose": ({}, lambda x, w, b: x.matmul(w.transpose(0, 1)) + b),
    "matmul_transpose_negative": ({}, lambda x, w, b: x @ torch.transpose(w, -1, -2)),
    "matmul_transpose_mixed": ({}, lambda x, w, b: x @ w.transpose(-1, 0)),
    "matmul_transpose_twice": ({"transposed": True}, lambda x, w, b: x @ w.t().t()),
    "matmul_transpose_nothing": ({"transposed": True}, lambda x, w, b: x @ w.transpose(1, -1)),
    "matmul_swapaxes": ({}, lambda x, w, b: x @ w.swapaxes(0, 1)),
    "matmul_permute": ({}, lambda x, w, b: x @ w.permute(1, 0)),
    "matmul_permute_tuple": ({}, lambda x, w, b: x @ torch.permute(w, (-1, 0))),
    "matmul_permute_nothing": ({"transposed": True}, lambda x, w, b: x @ w.permute(0, 1)),
    "matmul_plain": ({"transposed": True}, lambda x, w, b: x @ w + b),
    "matmul_keywords": ({"transposed": True}, lambda x, w, b: torch.matmul(input=x, other=w)),
    "matmul_method": ({"transposed": True}, lambda x, w, b: x.matmul(w)),
    "matmul_contiguous": ({}, lambda x, w, b: x @ w.t().contiguous()),
    "bias_in_place": ({}, lambda x, w, b: operator.iadd(F.linear(x, w), b)),
    "cast_weight": ({}, lambda x, w, b: F.linear(x, w.to(x.dtype), b)),
    "view_and_back": ({}, lambda x, w, b: x @ w.view(1, OUT, IN).transpose(1, 2).squeeze(0)),
    "aten_linear": ({}, lambda x, w, b: aten.linear.default(x, w, b)),
    "aten_matmul": ({}, lambda x, w, b: aten.matmul.default(x, aten.transpose.int(w, 0, 1))),
    "aten_matmul_numpy_T": ({}, lambda x, w, b: aten.matmul.default(x, aten.numpy_T.default(w))),
}


# x is (T, 24)
MATRIX_FORMS = {
    "mm": ({"transposed": True}, lambda x, w, b: torch.mm(x, w) + b),
    "mm_method": ({}, lambda x, w, b: x.mm(w.t())),
    "addmm_right": ({"transposed": True}, lambda x, w, b: torch.addmm(b, x, w)),
    "addmm_right_T": ({}, lambda x, w, b: torch.addmm(b, x, w.T)),
    "addmm_keywords": ({}, lambda x, w, b: torch.addmm(input=b, mat1=x, mat2=w.t())),
    "addmm_method": ({}, lambda x, w, b: b.addmm(x, w.t())),
    "addmm_beta": ({}, lambda x, w, b: torch.addmm(b, x, w.t(), beta=2.0)),
    "aten_mm_t": ({}, lambda x, w, b: aten.mm.default(x, aten.t.default(w))),
    "aten_addmm_permute": ({}, lambda x, w, b: aten.addmm.default(b, x, aten.permute.default(w, [1, 0]))),
}


# x is (B, T, 24)
BATCH_FORMS = {
    "bmm_expanded": ({}, lambda x, w, b: torch.bmm(x, w.t().expand(x.shape[0], IN, OUT))),
    "bmm_unsqueezed": ({"transposed": True}, lambda x, w, b: torch.bmm(x, w.unsqueeze(0).expand(x.shape[0], -1, -1))),
    "bmm_swapped_after": ({}, lambda x, w, b: torch.bmm(x, w[None].expand(2, OUT, IN).transpose(1, 2))),
    "baddbmm": ({}, lambda x, w, b: torch.baddbmm(b, x, w.t().expand(x.shape[0], IN, OUT))),
    "einsum": ({}, lambda x, w, b: torch.einsum("bti,oi->bto", x, w)),
    "einsum_transposed": ({"transposed": True}, lambda x, w, b: torch.einsum("bti,io->bto", x, w)),
    "einsum_weight_first": ({}, lambda x, w, b: torch.einsum("oi,bti->bto", w, x)),
    "einsum_of_transposed": ({}, lambda x, w, b: torch.einsum("b t i, i o -> b t o", x, w.T)),
}


# x is (24, T), y is (36, T)
LEFT_FORMS = {
    "weight_at": ({}, lambda x, w, b: w @ x),
    "weight_T_at": ({"transposed": True}, lambda x, w, b: w.T @ x),
    "weight_mm": ({}, lambda x, w, b: torch.mm(w, x)),
    "weight_method": ({}, lambda x, w, b: w.matmul(x)),
    "weight_addmm": (COLUMN, lambda x, w, b: torch.addmm(b, w, x)),
    "weight_addmm_T": ({"transposed": True, **COLUMN}, lambda x, w, b: torch.addmm(b, w.t(), x)),
    "weight_at_plus_bias": (COLUMN, lambda x, w, b: w @ x + b),
}


LEADING = {"vector": (), "matrix": (3,), "batch": (2, 5)}
