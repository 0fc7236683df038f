"""Every way to write a linear, lowered or left plain, against the same model with plain nodes."""

from dataclasses import replace

import pytest
import torch
from support.linear_forms import BATCH_FORMS, LEFT_FORMS, MATRIX_FORMS, ROW_FORMS
from support.lowered import (
    CONFIG,
    FEW,
    LOWERINGS,
    MANY,
    assert_close,
    num_calls,
    step,
)
from support.models import (
    IN,
    OUT,
    Form,
    Holder,
    Tied,
    assert_equal,
    fill,
    output_of,
    randn,
    tower,
)
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import melora_fx

PLAIN = {
    "matmul_swapaxes",
    "matmul_permute",
    "matmul_permute_tuple",
    "matmul_permute_nothing",
    "matmul_contiguous",
    "view_and_back",
    "matmul_transpose_twice",
    "addmm_beta",
    *BATCH_FORMS,
    *LEFT_FORMS,
}

SHAPES = {
    **{name: [(IN,), (*FEW, IN), (*MANY, IN)] for name in ROW_FORMS},
    **{name: [(5, IN), (120, IN)] for name in MATRIX_FORMS},
    **{name: [(2, 5, IN), (2, 60, IN)] for name in BATCH_FORMS},
    **{name: [(IN, 5), (IN, 120)] for name in LEFT_FORMS},
}

FORMS = {**ROW_FORMS, **MATRIX_FORMS, **BATCH_FORMS, **LEFT_FORMS, "conv1d": ({}, None)}

SHAPES["conv1d"] = [(*FEW, IN), (*MANY, IN)]

CAPTURES = {
    "in_place": lambda model, x: (model, {}),
    "example_inputs": lambda model, x: (model, {"example_inputs": (x,)}),
    "graph_module": lambda model, x: (fx.symbolic_trace(model), {}),
}

IN_EVERY_CAPTURE = (
    "linear",
    "linear_keywords",
    "linear_transposed_storage",
    "matmul_T",
    "matmul_plain",
    "matmul_permute",
    "bias_in_place",
    "cast_weight",
    "mm",
    "addmm_right_T",
    "addmm_keywords",
    "addmm_beta",
    "einsum",
    "weight_at",
    "conv1d",
)


def held_form(name: str) -> nn.Module:
    options, form = FORMS[name]
    if form is not None:
        return Holder(Form(form, **options))
    conv = Conv1D(OUT, IN)
    with torch.no_grad():
        conv.weight.copy_(randn(IN, OUT, seed=11) / 5), conv.bias.copy_(randn(OUT, seed=12))
    return Holder(conv)


@pytest.mark.default_cases(
    "in_place-*",
    "example_inputs-linear",
    "example_inputs-matmul_T",
    "example_inputs-conv1d",
    "example_inputs-mm",
    "example_inputs-weight_at",
    "graph_module-linear",
    "graph_module-matmul_plain",
    "graph_module-einsum",
    "graph_module-addmm_keywords",
)
@pytest.mark.parametrize(
    ("name", "capture"),
    [
        *(pytest.param(name, "in_place", id=f"in_place-{name}") for name in FORMS),
        *(pytest.param(n, c, id=f"{c}-{n}") for c in ("example_inputs", "graph_module") for n in IN_EVERY_CAPTURE),
    ],
)
def test_each_form_is_lowered_or_left_plain_and_gives_the_plain_nodes_numbers(name, capture, calls):
    for shape in SHAPES[name][1:] if capture == "example_inputs" else SHAPES[name]:
        x = randn(*shape, seed=3)
        base = output_of(held_form(name), x)
        made = []
        for lowering in ("auto", "plain"):
            model, options = CAPTURES[capture](held_form(name), x)
            made.append(
                melora_fx.rewrite(model, "inner", replace(CONFIG, split=(12, 24), lowering=lowering), **options)
            )
        model, plain = made
        (site,) = melora_fx.sites(model).values()
        if capture != "example_inputs":  # an export writes some forms differently
            assert site.lowering == ("plain" if name in PLAIN else "weight")
        assert num_calls(calls, model, x) == (site.lowering == "weight")
        assert_equal(output_of(model, x), base)
        fill(model), fill(plain)
        assert num_calls(calls, plain, x) == 0
        assert_close(step(model, x), step(plain, x))
        assert not torch.allclose(output_of(model, x), base, atol=0.1)


class Chain(nn.Module):
    """Linears that feed linears in one graph, the middle one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(randn(IN, IN, seed=seed) / 5) for seed in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.a) @ self.b.T
        return torch.relu_(F.linear(hidden @ self.b.T, self.c)) + hidden


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


def shared() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(IN, IN)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.default_cases(
    "weight-*-in_place-many", "activation-*-in_place-few", "weight-tower-*-few", "activation-chain-*-many"
)
@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("build", [Chain, tied, shared, tower], ids=["chain", "tied", "used_twice", "tower"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_sites_that_feed_each_other_share_weights_or_are_used_twice(lowering, build, capture, leading, calls):
    x = randn(*leading, IN)
    base = output_of(build(), x)
    made = []
    for chosen in (lowering, "plain"):
        model, options = CAPTURES[capture](build(), x)
        made.append(melora_fx.rewrite(model, "all-linear", replace(CONFIG, lowering=chosen), **options))
    assert_equal(output_of(made[0], x), base)
    fill(made[0]), fill(made[1])
    expected = {Chain: 4, tied: 2, shared: 2, tower: 5}[build]
    assert (num_calls(calls, made[0], x), num_calls(calls, made[1], x)) == (expected, 0)
    assert_close(step(made[0], x), step(made[1], x))
