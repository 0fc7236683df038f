"""`adapted_linear` and its operators: numbers, derivatives, masks, and what is kept for the backward and how long."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.coarse import Coarse, rounded
from support.models import IN, OUT, TOLERANCE, assert_equal, assert_near, dense_update, kept_for_backward, randn
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import melora_fx.lowering.forward_backward as implementation
from melora_fx import MELoRAConfig
from melora_fx.lowering.adapted_linear import _AdaptedLinear, adapted_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CONFIGS = {
    "n1_r1": MELoRAConfig(rank=1, num_blocks=1, alpha=1.0),
    "n3_r1": MELoRAConfig(rank=1, num_blocks=3, alpha=2.0),
    "n2_r5_rslora": MELoRAConfig(rank=5, num_blocks=2, alpha=3.0, use_rslora=True),
    "n3_r40": MELoRAConfig(rank=40, num_blocks=3, alpha=20.0),
    "n3_ranks_alphas": MELoRAConfig(rank=(1, 4, 2), num_blocks=3, alpha=(1.0, 0.5, 4.0)),
    "split_sizes": MELoRAConfig(rank=1, num_blocks=2, alpha=3.0, split=(12, 24)),
    "split_3": MELoRAConfig(rank=5, num_blocks=3, alpha=5.0, split=3),
    "split_ranks": MELoRAConfig(rank=(1, 5), num_blocks=2, alpha=(2.0, 5.0), split=(12, 24)),
}
FEW = {key: CONFIGS[key] for key in ("n3_r1", "n3_r40", "split_ranks")}
LEADING = {"vector": (), "matrix": (3,), "batch": (2, 5), "many": (4, 30)}
BOTH_FORMS = ("weight", "activation")
WIDE = {"fp32": torch.float32, "fp64": torch.float64}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Operands:
    """The random operands of one call; the padding of small ranks is zero."""

    config: MELoRAConfig
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    form: str = "weight"
    dropout: nn.Dropout | None = None

    @property
    def parts(self) -> tuple[int, ...]:
        return self.config.parts(OUT)

    @property
    def scaling(self) -> Tensor:
        return torch.tensor(self.config.scalings, dtype=self.lora_a.dtype).view(-1, 1, 1)

    @property
    def is_merged(self) -> bool:
        return self.form == "weight" and implementation.is_merged(self.x, self.weight, self.lora_a, self.lora_b, 0.0)

    @property
    def is_by_blocks(self) -> bool:
        of_y = self.weight.new_empty(1, len(self.weight))
        return self.is_merged and implementation.is_by_blocks(self.x, of_y, self.lora_a)

    def __call__(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        tensors = (self.weight, self.bias, self.lora_a, self.lora_b, self.scaling)
        return adapted_linear(x, *tensors, self.dropout, self.parts, self.form)

    def operator_arguments(self, **given: Any) -> tuple[Any, ...]:
        """Returns the arguments of `torch.ops.melora.adapted_linear_v3`."""
        values = {
            "x": self.x,
            "base": None,
            "weight": self.weight,
            "bias": self.bias,
            "lora_a": self.lora_a,
            "lora_b": self.lora_b,
            "scaling": self.scaling,
            "seed": None,
            "rate": 0.0,
            "parts": list(self.parts),
            "form": self.form,
            "dtype": None,
            "starts": (),
        }
        return tuple((values | given).values())

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.lora_a, self.lora_b) if t is not None]

    def wide(self) -> "Operands":
        """Returns the same operands in float64, as separate leaves."""
        tensors = {
            name: value.detach().double().requires_grad_(value.requires_grad)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def dense(self, mask: Tensor | None = None, rate: float = 0.0) -> Tensor:
        """Returns the oracle's output; with a mask, the input of the update is masked and scaled."""
        update = dense_update(self.config, self.lora_a, self.lora_b)
        dropped = self.x if mask is None else self.x * mask.double() / (1 - rate)
        return F.linear(self.x, self.weight, self.bias) + F.linear(dropped, update)


def operands(
    config: MELoRAConfig = CONFIGS["n3_ranks_alphas"],
    leading: tuple[int, ...] = (2, 5),
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    transposed: bool = False,
    form: str = "weight",
    trained_base: bool = False,
    rate: float = 0.0,
) -> Operands:
    adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    a_shape, b_shape = config.adapter_shapes(IN, OUT)
    lora_a = randn(*a_shape, seed=21, dtype=adapter_dtype) / 3
    lora_b = randn(*b_shape, seed=22, dtype=adapter_dtype)
    for block, own in enumerate(config.ranks):
        lora_a[block].unflatten(0, (-1, lora_b.size(2)))[:, own:] = 0
        lora_b[block, :, own:] = 0
    stored = (randn(IN, OUT, seed=23) if transposed else randn(OUT, IN, seed=23)).div(5).to(dtype)
    stored.requires_grad_(trained_base)
    return Operands(
        config,
        randn(*leading, IN, dtype=dtype).requires_grad_(),
        stored.t() if transposed else stored,
        randn(OUT, seed=24, dtype=dtype).requires_grad_(trained_base) if bias else None,
        lora_a.requires_grad_(),
        lora_b.requires_grad_(),
        form,
        nn.Dropout(rate) if rate else None,
    )


def assert_sums_near(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Checks equality up to the rounding of sums, relative to the largest value: terms may exceed their sum."""
    assert actual.shape == expected.shape
    bound = factor * TOLERANCE[actual.dtype]["rtol"] * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual.detach().double(), expected.detach(), rtol=0, atol=bound)


def gradients(output: Tensor, leaves: list[Tensor], upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    upstream = randn(*output.shape, seed=9) if upstream is None else upstream
    return list(torch.autograd.grad(output, leaves, upstream.to(output.dtype), **options))


def check_against_oracle(given: Operands, factor: float = 1.0) -> list[Tensor]:
    """Checks the output and all required gradients against the oracle; returns the gradients."""
    output = given()
    wide = given.wide()
    expected = wide.dense()
    assert output.dtype == given.x.dtype
    assert output.is_contiguous()
    assert_sums_near(output, expected, factor)
    wanted = [leaf.requires_grad for leaf in given.leaves()]
    ours = gradients(output, [leaf for leaf in given.leaves() if leaf.requires_grad])
    theirs = gradients(expected, [leaf for leaf, need in zip(wide.leaves(), wanted, strict=True) if need])
    for actual, oracle in zip(ours, theirs, strict=True):
        assert_sums_near(actual, oracle, factor)
        assert float(oracle.abs().max()) > 0.1
    return ours


def test_the_cases_take_every_branch():
    cases = [operands(config, leading) for config in CONFIGS.values() for leading in LEADING.values()]
    assert {(case.is_merged, case.is_by_blocks) for case in cases} == {(True, True), (True, False), (False, False)}
    few = [operands(config, leading) for config in FEW.values() for leading in ((2, 5), (4, 30))]
    assert {(case.is_merged, case.is_by_blocks) for case in few} == {(True, True), (True, False), (False, False)}
    assert len({len(config.parts(OUT)) for config in CONFIGS.values()}) == 3


@pytest.mark.parametrize("dtype", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_output_and_gradients_are_those_of_the_dense_update(config, leading, bias, form, dtype):
    ours = check_against_oracle(operands(config, leading, bias=bias, form=form, dtype=dtype))
    assert len(ours) == 3
    assert all(gradient.is_contiguous() for gradient in ours)


@pytest.mark.parametrize("transposed", [False, True], ids=["stored_out_in", "stored_in_out"])
@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
def test_a_base_that_is_trained_gets_its_gradients_too(config, leading, form, transposed):
    given = operands(config, leading, form=form, transposed=transposed, trained_base=True)
    assert len(check_against_oracle(given)) == 5


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("config", [CONFIGS["n3_ranks_alphas"], CONFIGS["split_ranks"]], ids=["ranks", "split_ranks"])
def test_padding_of_small_ranks_gets_no_gradient(config, leading):
    given = operands(config, leading)
    _, of_a, of_b = gradients(given(), [given.x, given.lora_a, given.lora_b])
    rank = of_b.size(2)
    for block, own in enumerate(config.ranks):
        rows = of_a[block].unflatten(0, (-1, rank))
        assert int(rows[:, own:].count_nonzero()) == int(of_b[block, :, own:].count_nonzero()) == 0
        assert int(rows[:, :own].count_nonzero()) == rows[:, :own].numel()


@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("leading", [(), (2, 5), (4, 30)], ids=["vector", "batch", "many"])
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
def test_second_derivatives_are_those_of_the_dense_update(config, leading, form):
    given = operands(config, leading, dtype=torch.float64, form=form, trained_base=True)
    found = []
    for each, call in ((given, given), (wide := given.wide(), wide.dense)):
        upstream = randn(*leading, OUT, seed=9, dtype=torch.float64).requires_grad_()
        first = gradients(call(), each.leaves(), upstream, create_graph=True)
        total = sum((g * randn(*g.shape, seed=30 + i, dtype=torch.float64)).sum() for i, g in enumerate(first))
        found.append(torch.autograd.grad(total, [upstream, each.x, each.weight, each.lora_a, each.lora_b]))
    for actual, expected in zip(*found, strict=True):
        assert_sums_near(actual, expected, 10)  # sums of sums
        assert float(expected.abs().max()) > 0.1


@pytest.mark.parametrize(
    ("config", "tokens", "form"),
    [
        pytest.param(CONFIGS["n3_r40"], 12, "weight", id="merged_by_blocks"),
        pytest.param(MELoRAConfig(rank=1, num_blocks=1), 90, "weight", id="merged_by_factors"),
        pytest.param(CONFIGS["split_ranks"], 3, "activation", id="split_by_slices"),
    ],
)
def test_gradcheck_and_gradgradcheck(config, tokens, form):
    given = operands(config, (tokens,), dtype=torch.float64, form=form, trained_base=True)
    assert given.is_merged is (form == "weight")

    def call(x, weight, bias, lora_a, lora_b):
        return adapted_linear(x, weight, bias, lora_a, lora_b, given.scaling, None, given.parts, form)

    assert torch.autograd.gradcheck(call, given.leaves(), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given.leaves(), fast_mode=True)


STRIDED = {
    "swapped_tokens": lambda x: x.transpose(0, 1),
    "every_second": lambda x: torch.stack([x, -x], -1)[..., 0],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1),
    "features_first": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("leading", [(2, 5), (4, 30)], ids=["few", "many"])
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_input_that_is_not_contiguous(strided, config, leading):
    given = operands(config, leading)
    given.x = strided(given.x.detach()).requires_grad_()
    assert not given.x.is_contiguous()
    check_against_oracle(given)


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
def test_gradient_that_is_one_number_in_all_places(config, leading):
    given = operands(config, leading)
    wide = given.wide()
    given().sum().backward()
    wide.dense().sum().backward()
    for name in ("x", "lora_a", "lora_b"):
        assert_sums_near(getattr(given, name).grad, getattr(wide, name).grad)


@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("leading", [(2, 5), (4, 30)], ids=["few", "many"])
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
def test_gradient_that_is_not_contiguous(config, leading, form):
    given = operands(config, leading, form=form, trained_base=True)
    wide = given.wide()
    for upstream in (randn(*leading[::-1], OUT, seed=9).transpose(0, 1), randn(leading[0], OUT, leading[1]).mT):
        assert not upstream.is_contiguous()
        ours = gradients(given(), given.leaves(), upstream)
        for actual, expected in zip(ours, gradients(wide.dense(), wide.leaves(), upstream), strict=True):
            assert_sums_near(actual, expected)
            assert actual.is_contiguous()


@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["no_dropout", "dropout"])
def test_no_tokens(config, leading, form, rate):
    given = operands(config, leading, form=form, rate=rate, trained_base=True)
    output = given()
    assert output.shape == (*leading, OUT)
    found = gradients(output, given.leaves())
    assert [gradient.shape for gradient in found] == [leaf.shape for leaf in given.leaves()]
    assert all(int(gradient.count_nonzero()) == 0 for gradient in found)


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
@pytest.mark.parametrize("asked", [["x"], ["lora_a"], ["lora_b"], ["bias"], ["weight"], ["x", "lora_b"]], ids=str)
def test_each_gradient_alone(asked, config, leading):
    given = operands(config, leading, trained_base=True)
    for name in ("x", "weight", "bias", "lora_a", "lora_b"):
        getattr(given, name).requires_grad_(name in asked)
    check_against_oracle(given)
    given().sum().backward()
    for name in ("x", "weight", "bias", "lora_a", "lora_b"):
        assert (getattr(given, name).grad is not None) is (name in asked)


def test_nothing_to_differentiate():
    given = operands()
    with torch.no_grad():
        assert not given().requires_grad
    with torch.inference_mode():
        assert_near(given(), given.wide().dense())


def test_a_change_of_the_input_before_the_backward_raises():
    given = operands()
    x = given.x.detach().clone()
    output = given(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_output_may_be_changed_in_place(leading, bias, form):
    """As `nn.ReLU(inplace=True)` after a linear does."""
    given = operands(leading=leading, bias=bias, form=form)
    wide = given.wide()
    ours = torch.relu_(given())
    theirs = torch.relu(wide.dense())
    assert_sums_near(ours, theirs)
    for actual, expected in zip(
        gradients(ours, [given.x, given.lora_b]), gradients(theirs, [wide.x, wide.lora_b]), strict=True
    ):
        assert_sums_near(actual, expected)


@pytest.mark.parametrize("leading", [(2, 5), (4, 30)], ids=["few", "many"])
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
def test_batched_gradients(config, leading):
    given = operands(config, leading)
    upstream = randn(3, *leading, OUT, seed=9)
    leaves = [given.x, given.lora_a, given.lora_b]
    output = given()
    together = gradients(output, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for index, single in enumerate(upstream):
        for all_of, one in zip(together, gradients(output, leaves, single, retain_graph=True), strict=True):
            torch.testing.assert_close(all_of[index], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
def test_half_base_with_an_adapter_in_float32(config, leading, form, dtype):
    given = operands(config, leading, dtype=dtype, form=form)
    assert given.lora_a.dtype == torch.float32
    assert not given.is_merged
    output = given()
    wide = given.wide()
    assert output.dtype == dtype
    assert_sums_near(output, wide.dense())
    ours = gradients(output, [given.x, given.lora_a, given.lora_b])
    assert [gradient.dtype for gradient in ours] == [dtype, torch.float32, torch.float32]
    theirs = gradients(wide.dense(), [wide.x, wide.lora_a, wide.lora_b])
    for actual, expected in zip(ours, theirs, strict=True):
        assert_sums_near(actual.to(dtype), expected, 2)  # h or g is rounded, and then the product


@pytest.mark.parametrize("dtype", [*WIDE.values(), *HALF.values()], ids=[*WIDE, *HALF])
@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_untrained_output_is_that_of_the_base_bit_for_bit(leading, form, dtype):
    for config in CONFIGS.values():
        given = operands(config, leading, dtype=dtype, form=form)
        given.lora_b.detach().zero_()
        assert_equal(given().detach(), F.linear(given.x, given.weight, given.bias).detach())


@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_autocast_computes_as_a_half_base_does(leading, config):
    given = operands(config, leading)
    half = operands(config, leading, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = given()
    assert_equal(output.detach(), half().detach())
    ours = gradients(output, [given.x, given.lora_a, given.lora_b])
    theirs = gradients(half(), [half.x, half.lora_a, half.lora_b])
    assert [gradient.dtype for gradient in ours] == [torch.float32] * 3
    assert_equal([ours[0].bfloat16(), *ours[1:]], theirs)


def test_autocast_leaves_float64_alone():
    given = operands(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(given(), given.dense())


@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_backward_inside_autocast_of_a_forward_outside(leading, form, rate):
    given = operands(leading=leading, form=form, rate=rate)
    output = given()
    expected = gradients(output, [given.x, given.lora_a, given.lora_b], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(output, [given.x, given.lora_a, given.lora_b])
    for actual, wide in zip(found, expected, strict=True):
        assert_sums_near(actual.bfloat16(), wide.double(), 2)


@pytest.mark.parametrize("dtype", [*WIDE.values(), *HALF.values()], ids=[*WIDE, *HALF])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
def test_weight_of_another_tensor_type_is_left_to_linear(config, leading, bias, dtype):
    given = operands(config, leading, dtype=dtype, bias=bias)
    wide = given.wide()
    wide.weight = rounded(given.weight).double()
    given.weight = given.weight.as_subclass(Coarse)
    output = given()
    expected = wide.dense()
    assert type(output) is Tensor
    assert_sums_near(output, expected)
    ours = gradients(output, [given.x, given.lora_a, given.lora_b])
    theirs = gradients(expected, [wide.x, wide.lora_a, wide.lora_b])
    for actual, oracle in zip(ours, theirs, strict=True):
        assert_sums_near(actual.to(dtype), oracle, 2)


def test_bias_beside_such_a_weight_is_added_once_and_gets_its_gradient():
    given = operands()
    wide = given.wide()
    wide.weight = rounded(given.weight).double()
    given.weight = given.weight.as_subclass(Coarse)
    given.bias.requires_grad_(), wide.bias.requires_grad_()
    (ours,) = gradients(given(), [given.bias])
    (theirs,) = gradients(wide.dense(), [wide.bias])
    assert_sums_near(ours, theirs)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the masks that are used, in order."""
    used: list[Tensor] = []
    original = implementation.dropout_mask

    def recording(*args: Any) -> Tensor:
        used.append(original(*args))
        return used[-1]

    monkeypatch.setattr(implementation, "dropout_mask", recording)
    return used


@pytest.mark.parametrize("dtype", [*WIDE.values(), torch.bfloat16], ids=[*WIDE, "bf16"])
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
def test_dropout_masks_the_adapters_input_alike_in_forward_and_backward(config, leading, dtype, masks):
    given = operands(config, leading, rate=0.25, dtype=dtype)
    output = given()
    ours = gradients(output, [given.x, given.lora_a, given.lora_b])
    forward, backward = masks
    assert_equal(forward, backward)
    assert set(forward.unique().tolist()) == {0.0, 1.0}
    wide = given.wide()
    expected = wide.dense(forward.view_as(wide.x), 0.25)
    assert_sums_near(output, expected)
    for actual, oracle in zip(ours, gradients(expected, [wide.x, wide.lora_a, wide.lora_b]), strict=True):
        assert_sums_near(actual.to(dtype), oracle, 2)


@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_dropout_of_input_that_is_not_contiguous(strided, masks):
    given = operands(rate=0.25)
    given.x = strided(given.x.detach()).requires_grad_()
    ours = gradients(given(), [given.x, given.lora_a, given.lora_b])
    wide = given.wide()
    expected = wide.dense(masks[0].reshape(wide.x.shape), 0.25)
    for actual, oracle in zip(ours, gradients(expected, [wide.x, wide.lora_a, wide.lora_b]), strict=True):
        assert_sums_near(actual, oracle, 2)


def test_second_derivatives_under_dropout(masks):
    given = operands(dtype=torch.float64, rate=0.25)
    (of_x,) = gradients(given(), [given.x], create_graph=True)
    ours = gradients(of_x, [given.lora_a, given.lora_b])
    wide = given.wide()
    (of_x,) = gradients(wide.dense(masks[0].view_as(wide.x), 0.25), [wide.x], create_graph=True)
    for actual, expected in zip(ours, gradients(of_x, [wide.lora_a, wide.lora_b]), strict=True):
        assert_sums_near(actual, expected, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.9, 0.999])
def test_mask_drops_the_given_share_of_every_column(rate, dtype):
    num_tokens = 40_001
    mask = implementation.dropout_mask(torch.empty(num_tokens, IN, dtype=dtype), torch.tensor(7), rate).double()
    assert mask.shape == (num_tokens, IN)
    sigma = math.sqrt(rate * (1 - rate))
    assert abs(float(mask.mean()) - (1 - rate)) < 5 * sigma / math.sqrt(mask.numel())
    assert float((mask.mean(0) - (1 - rate)).abs().max()) < 5 * sigma / math.sqrt(num_tokens)


def test_mask_is_independent_between_blocks_columns_and_tokens():
    mask = implementation.dropout_mask(torch.empty(40_000, IN), torch.tensor(7), 0.5).double() * 2 - 1
    sigma = 1 / math.sqrt(len(mask))
    correlation = mask.T @ mask / len(mask) - torch.eye(IN)
    assert float(correlation.abs().max()) < 5 * sigma
    assert float((mask[1:].T @ mask[:-1] / len(mask)).abs().max()) < 5 * sigma
    assert len({tuple(block.flatten().tolist()) for block in mask[:50].chunk(3, 1)}) == 3


def test_mask_is_another_for_another_seed():
    first, second = (implementation.dropout_mask(torch.empty(1000, IN), torch.tensor(seed), 0.5) for seed in (1, 2))
    assert abs(float((first == second).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(first.numel())


@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_dropout_keeps_the_mean(rate):
    given = operands(leading=(20_000,), rate=rate)
    given.x = randn(1, IN).expand(20_000, IN)
    wide = given.wide()
    errors = given().double().detach() - wide.dense().detach()
    update = dense_update(given.config, given.lora_a, given.lora_b).detach()
    spread = ((wide.x[0] * update).square().sum(1) * rate / (1 - rate)).sqrt()
    assert float((errors.mean(0) * math.sqrt(len(errors)) / spread).abs().max()) < 5
    torch.testing.assert_close(errors.std(0), spread, rtol=0.1, atol=0)


def test_dropout_follows_the_mode_and_the_global_seed():
    given = operands(rate=0.5)
    torch.manual_seed(3)
    first = given()
    second = given()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert_equal([given(), given()], [first, second])
    given.dropout.eval()
    assert_near(given(), given.wide().dense())


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_rate_that_is_almost_nothing_drops_nothing(leading):
    given = operands(leading=leading, rate=1e-9)
    check_against_oracle(given)


def test_rate_that_is_almost_all(masks):
    given = operands(leading=(4, 30), rate=0.999999)
    output = given()
    found = gradients(output, [given.x, given.lora_a, given.lora_b])
    assert all(bool(tensor.isfinite().all()) for tensor in (output, *found))
    assert float(masks[0].mean()) < 0.01


def test_rate_of_one_is_the_base():
    """`MELoRAConfig` refuses it, but `nn.Dropout.p` can be set later."""
    given = operands(leading=(20_000,), rate=1.0)
    assert_near(given(), F.linear(given.x.double(), given.weight.double(), given.bias.double()))


def strided_x() -> Operands:
    given = operands()
    given.x = randn(5, 2, IN).transpose(0, 1).requires_grad_()
    return given


def trained_in_out() -> Operands:
    given = operands(transposed=True)
    given.weight.requires_grad_()
    return given


BASE = {"base": randn(2, 5, OUT, seed=5), "weight": None, "bias": None}
FORMS = {
    "by_slices": (operands(), {}),
    "merged_by_factors": (operands(CONFIGS["n3_r1"], (4, 30)), {}),
    "merged_by_blocks": (operands(CONFIGS["n3_r40"], (4, 30)), {}),
    "no_merge": (operands(leading=(4, 30), form="activation"), {}),
    "triton": (operands(leading=(4, 30), form="triton"), {}),
    "triton_split_dropout": (operands(CONFIGS["split_ranks"], form="triton"), {"seed": torch.tensor(7), "rate": 0.25}),
    "triton_base": (operands(form="triton"), BASE),
    "split": (operands(CONFIGS["split_ranks"], (4, 30)), {}),
    "split_by_slices": (operands(CONFIGS["split_3"], (3,)), {}),
    "vector": (operands(leading=()), {}),
    "no_bias": (operands(bias=False), {}),
    "base": (operands(), BASE),
    "base_and_dropout": (operands(), BASE | {"seed": torch.tensor(7), "rate": 0.25}),
    "dropout": (operands(), {"seed": torch.tensor(7), "rate": 0.25}),
    "bf16": (operands(dtype=torch.bfloat16), {}),
    "fp64": (operands(dtype=torch.float64), {}),
    "autocast": (operands(), {"dtype": torch.bfloat16}),
    "autocast_trained_base": (operands(trained_base=True), {"dtype": torch.bfloat16}),
    "strided_input": (strided_x(), {}),
    "stored_in_out": (operands(transposed=True), {}),
    "stored_in_out_merged": (operands(CONFIGS["n3_r40"], (4, 30), transposed=True), {}),
    "no_tokens": (operands(leading=(0,)), {}),
    "trained_base": (operands(trained_base=True), {}),
    "trained_base_stored_in_out": (trained_in_out(), {}),
}


@pytest.mark.default_cases(
    "by_slices", "merged_by_*", "triton", "split", "dropout", "bf16", "autocast", "base", "trained_base"
)
@pytest.mark.parametrize(("given", "options"), FORMS.values(), ids=FORMS)
def test_opcheck_of_the_operator(given, options):
    torch.library.opcheck(torch.ops.melora.adapted_linear_v3.default, given.operator_arguments(**options))


@pytest.mark.default_cases("all-base_and_dropout", "all-split", "all-no_tokens", "all-triton")
@pytest.mark.parametrize(("given", "options"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("asked", [[True] * 5, [False, False, False, True, True]], ids=["all", "adapter_only"])
def test_opcheck_of_the_operator_of_the_backward(asked, given, options):
    x, base, weight, _, lora_a, lora_b, scaling, seed, rate, parts, form, dtype, _ = given.operator_arguments(**options)
    asked = [need and not (index in (1, 2) and base is not None) for index, need in enumerate(asked)]
    gradient = randn(*x.shape[:-1], OUT, seed=9).to(dtype or x.dtype)
    tensors = (gradient, x, weight, lora_a, lora_b, scaling, seed)
    detached = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    arguments = (*detached, rate, parts, form, asked, ())
    torch.library.opcheck(torch.ops.melora.adapted_linear_backward_v3.default, arguments)
    assert len(torch.ops.melora.adapted_linear_backward_v3.default(*arguments)) == sum(asked)


def test_operators_with_dropout_stay_out_of_cuda_graphs():
    arguments = operands().operator_arguments(seed=torch.tensor(7), rate=0.25)
    torch.library.opcheck(torch.ops.melora.adapted_linear_dropout_v2.default, arguments)
    for name in ("adapted_linear_v3", "adapted_linear_backward_v3"):
        assert torch.Tag.cudagraph_unsafe not in getattr(torch.ops.melora, name).default.tags
    for name in ("adapted_linear_dropout_v2", "adapted_linear_dropout_backward_v2"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.melora, name).default.tags


@pytest.mark.parametrize(("given", "options"), FORMS.values(), ids=FORMS)
def test_operator_and_function_give_the_same_bits(given, options):
    arguments = given.operator_arguments(**options)
    leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
    found = [
        [output.detach(), *gradients(output, leaves)]
        for output in (
            torch.ops.melora.adapted_linear_v3.default(*arguments),
            _AdaptedLinear.apply(*arguments),
        )
    ]
    assert_equal(*found)


@pytest.mark.parametrize(
    ("options", "seed_bytes"),
    [
        pytest.param({"config": CONFIGS["n3_r40"]}, 0, id="merged"),
        pytest.param({"form": "activation"}, 0, id="activation"),
        pytest.param({"config": CONFIGS["split_ranks"]}, 0, id="split"),
        pytest.param({"transposed": True}, 0, id="stored_in_out"),
        pytest.param({"dtype": torch.bfloat16}, 0, id="bf16"),
        pytest.param({"autocast": True}, 0, id="autocast"),
        pytest.param({"rate": 0.5}, 8, id="dropout"),
        pytest.param({"rate": 0.5, "dtype": torch.bfloat16}, 8, id="dropout_bf16"),
        pytest.param({"rate": 0.5, "autocast": True}, 8, id="dropout_autocast"),
    ],
)
def test_input_alone_is_kept_for_the_backward(options, seed_bytes):
    autocast = options.pop("autocast", False)
    given = operands(leading=(4, 30), **options)
    tensors = (given.weight, given.bias, given.lora_a, given.lora_b, given.scaling)
    with kept_for_backward(tensors) as kept, torch.autocast("cpu", enabled=autocast):
        output = adapted_linear(given.x, *tensors, given.dropout, given.parts, given.form)
    assert kept.pop(given.x.untyped_storage().data_ptr()) == given.x.untyped_storage().nbytes()
    assert sum(kept.values()) == seed_bytes
    output.sum().backward()
    assert bool(given.lora_b.grad.any())


@pytest.mark.default_cases("eager")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_one_merged_weight_lives_at_a_time(compiled, monkeypatch):
    merged: list[StorageWeakRef] = []
    alive: list[int] = []
    original = implementation._merged

    def recording(*args: Any) -> Tensor:
        weight = original(*args)
        merged.append(StorageWeakRef(weight.untyped_storage()))
        alive.append(sum(not each.expired() for each in merged))
        return weight

    monkeypatch.setattr(implementation, "_merged", recording)
    config = CONFIGS["n3_r40"]
    layers = [operands(config, (4, 30)) for _ in range(4)]
    for layer in layers:
        layer.x = None

    def network(x: Tensor) -> Tensor:
        for layer in layers:
            tensors = (layer.weight, layer.bias, layer.lora_a, layer.lora_b, scaling)
            x = torch.tanh(adapted_linear(x, *tensors, None, layer.parts, layer.form))[..., :IN]
        return x

    scaling = layers[0].scaling
    run = torch.compile(network, backend="aot_eager", fullgraph=True) if compiled else network
    x = randn(4, 30, IN).requires_grad_()
    output = run(x)
    assert len(alive) == 4
    output.sum().backward()
    assert alive == [1] * 8
    assert all(each.expired() for each in merged)
