"""Shared by the tests on a CUDA device: the device, the oracle on the CPU, and the bounds of sums.

They need no fixture of a conftest, so that they run if only torch, transformers, safetensors and pytest are installed.
A dry run puts everything on the CPU, to show that the tests themselves are correct.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support.interpreter  # noqa: F401 (before the imports of triton, as melora_fx's through torchao) # isort: skip
import melora_fx
from melora_fx import MELoRAConfig, config
from support.models import TOLERANCE, Holder, dense_update, fill, randn

IS_DRY_RUN = os.environ.get("MELORA_FX_DRY_RUN") == "1"
DEVICE = "cpu" if IS_DRY_RUN else "cuda"
if IS_DRY_RUN:
    torch.set_num_threads(1)  # as in the other tests: work this small is slower with more
ON_CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not IS_DRY_RUN and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
"""The `pytestmark` of every file with these tests."""
cuda_alone = pytest.mark.skipif(IS_DRY_RUN, reason="needs CUDA: skipped in a dry run")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NEEDS_TRITON = pytest.mark.skipif(
    not IS_DRY_RUN and importlib.util.find_spec("triton") is None, reason="needs the package triton"
)


def by_lowering(*without: str) -> Any:
    """Parametrizes `lowering` with all that a configuration can name, except those of `without`."""
    names = [name for name in config.LOWERINGS if name not in without]
    return pytest.mark.parametrize("lowering", [pytest.param(name, marks=_marks(name)) for name in names])


def by_lowering_and_dtype(*without: str) -> Any:
    """Parametrizes `lowering` and `dtype`, without "weight" in 16 bits: it would round W + Δ and is refused."""
    cells = [
        pytest.param(name, dtype, id=f"{name}-{label}", marks=_marks(name))
        for name in config.LOWERINGS
        for label, dtype in DTYPES.items()
        if name not in without and not (name == "weight" and label in HALF)
    ]
    return pytest.mark.parametrize(("lowering", "dtype"), cells)


def _marks(lowering: str) -> list[Any]:
    return [_NEEDS_TRITON] if lowering == "triton" else []


def by_dtype(dtypes: Mapping[str, torch.dtype] = DTYPES) -> Any:
    """Parametrizes `dtype`."""
    return pytest.mark.parametrize("dtype", dtypes.values(), ids=dtypes)


def to_device(values: Any, device: str = DEVICE) -> Any:
    """Returns a tensor, or a list or dict of tensors, on the device."""
    if isinstance(values, Mapping):
        return {name: to_device(value, device) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [to_device(value, device) for value in values]
    return values.to(device)


def on_cpu(values: Any) -> Any:
    """Returns the values on the CPU; a tensor is detached."""
    return to_device(values.detach() if isinstance(values, Tensor) else values, "cpu")


def assert_same(actual: Any, expected: Any) -> None:
    """Checks that the bits are the same, on any devices."""
    torch.testing.assert_close(on_cpu(actual), on_cpu(expected), rtol=0, atol=0, equal_nan=True)


def assert_sums_near(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Checks equality up to the rounding of sums in the dtype of `actual`, relative to the largest of `expected`."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    bound = factor * TOLERANCE[actual.dtype]["rtol"] * float(expected.detach().abs().max())
    torch.testing.assert_close(on_cpu(actual).double(), on_cpu(expected).double(), rtol=0, atol=bound)


def assert_all_near(actual: Iterable[Tensor], expected: Iterable[Tensor], factor: float = 1.0) -> None:
    """Calls `assert_sums_near` for each pair."""
    for one, other in zip(actual, expected, strict=True):
        assert_sums_near(one, other, factor)


def layer(
    build: Callable[[], nn.Module], config: MELoRAConfig, lowering: str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Returns a module with one linear, rewritten on the device, with a filled adapter; the site is called `inner`.

    Conv1D starts with small weights; here they are as large as those of a Linear.
    """
    torch.manual_seed(4)
    inner = build()
    inner.weight.data.copy_(randn(*inner.weight.shape, seed=23) / 5)
    model = Holder(inner).to(DEVICE, dtype)
    return fill(melora_fx.rewrite(model, "inner", replace(config, lowering=lowering)))


def parts_of(model: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns weight (O, I), bias, A and B of a `layer` as float64 leaves on the CPU."""
    (site,) = melora_fx.sites(model).values()
    weight = site.weight.mT if site.weight_is_transposed else site.weight
    bias = getattr(site.owner, "bias", None)
    tensors = (weight, bias, site.lora_a, site.lora_b)
    weight, bias, lora_a, lora_b = [None if each is None else on_cpu(each).double() for each in tensors]
    return weight, bias, lora_a.requires_grad_(), lora_b.requires_grad_()


def oracle(
    model: nn.Module, x: Tensor, upstream: Tensor, mask: Tensor | None = None, rate: float = 0.0
) -> list[Tensor]:
    """Returns the output of a `layer` and the gradients of x, A and B, from the dense update in float64 on the CPU.

    With a mask, the input of the update is masked and scaled.
    """
    weight, bias, lora_a, lora_b = parts_of(model)
    x = on_cpu(x).double().requires_grad_()
    (site,) = melora_fx.sites(model).values()
    update = dense_update(site.config, lora_a, lora_b)
    dropped = x if mask is None else x * on_cpu(mask).double() / (1 - rate)
    output = nn.functional.linear(x, weight, bias) + nn.functional.linear(dropped, update)
    gradients = torch.autograd.grad(output, [x, lora_a, lora_b], on_cpu(upstream).double())
    return [output.detach(), *gradients]


def run(model: nn.Module, x: Tensor, upstream: Tensor, forward: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Returns the same from the model itself, or from `forward`, on the device."""
    (site,) = melora_fx.sites(model).values()
    x = x.detach().requires_grad_()
    output = (forward or model)(x)
    gradients = torch.autograd.grad(output, [x, site.lora_a, site.lora_b], upstream.to(output.dtype))
    return [output.detach(), *gradients]


def inputs(leading: tuple[int, ...], in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns x (…, I) and a gradient of the output (…, O) on the device."""
    x = randn(*leading, in_features, seed=1, dtype=dtype)
    return x.to(DEVICE), randn(*leading, out_features, seed=9, dtype=dtype).to(DEVICE)
