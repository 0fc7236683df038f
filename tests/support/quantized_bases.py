"""Bases in every kind of quantisation, with their weights dequantised."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import melora_fx
from melora_fx import MELoRAConfig
from support.models import TOLERANCE, fill, randn

SIZES = (64, 96, 64)


CONFIG = MELoRAConfig(rank=2, num_blocks=4, alpha=3.0)


Base = tuple[nn.Sequential, list[torch.Tensor]]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.GELU(), nn.Linear(SIZES[1], SIZES[2]))


def torchao(name: str, dtype: torch.dtype = torch.float32) -> Base:
    quantization = pytest.importorskip("torchao.quantization")
    int4 = pytest.importorskip("torchao.prototype.quantization.int4") if name == "int4 kernel" else None
    configs = {
        "int4 kernel": lambda: int4.PrototypeInt4WeightOnlyConfig(group_size=32),
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int8 activations": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
        ),
    }
    model = plain().to(dtype)
    quantization.quantize_(model, configs[name]())
    if name == "int4 kernel":  # it exposes its values in no other way
        return model, [F.linear(torch.eye(model[index].in_features), model[index].weight).t() for index in (0, 2)]
    return model, [model[index].weight.dequantize() for index in (0, 2)]


def dynamic_int8() -> Base:
    model = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8)
    return model, [model[index].weight().dequantize() for index in (0, 2)]


def bitsandbytes(name: str) -> Base:
    library = pytest.importorskip("bitsandbytes")
    options = {"Linear8bitLt": {"has_fp16_weights": False}, "Linear4bit": {"quant_type": "nf4"}}[name]
    kind = getattr(library.nn, name)
    model = nn.Sequential(kind(*SIZES[:2], **options), nn.GELU(), kind(*SIZES[1:], **options))
    model.load_state_dict(plain().state_dict())
    model = model.to("cpu")  # at this point bitsandbytes quantises
    weights = [model[index].weight for index in (0, 2)]
    if name == "Linear4bit":
        return model, [library.functional.dequantize_4bit(weight.data, weight.quant_state) for weight in weights]
    return model, [weight.data.float() * weight.SCB.view(-1, 1) / 127 for weight in weights]


def half(dtype: torch.dtype) -> Base:
    model = plain().to(dtype)
    return model, [model[index].weight.detach() for index in (0, 2)]


EXACT = TOLERANCE[torch.float32]["rtol"] * 10
ROUNDED = 3e-2
"""Bounds relative to the largest value: for float32 kernels, and if activations have 8 bits or everything has 16."""


BASES: dict[str, tuple[Callable[[], Base], float]] = {
    "torchao int8 weights": (lambda: torchao("int8"), EXACT),
    "torchao int8 weights, bfloat16": (lambda: torchao("int8", torch.bfloat16), ROUNDED),
    "torchao int8 weights and activations": (lambda: torchao("int8 activations"), ROUNDED),
    "torchao 4-bit weights (`IntxWeightOnlyConfig`)": (lambda: torchao("int4"), EXACT),
    "torchao 4-bit kernel (`PrototypeInt4WeightOnlyConfig`)": (lambda: torchao("int4 kernel"), ROUNDED),
    "torch dynamic int8": (dynamic_int8, ROUNDED),
    "bitsandbytes 8 bits": (lambda: bitsandbytes("Linear8bitLt"), EXACT),
    "bitsandbytes 4 bits": (lambda: bitsandbytes("Linear4bit"), EXACT),
    "float16": (lambda: half(torch.float16), ROUNDED),
    "bfloat16": (lambda: half(torch.bfloat16), ROUNDED),
}


QUANTIZED = [name for name in BASES if "float16" not in name or "torchao" in name]


def rewritten(base: str, **options: Any) -> tuple[nn.Module, list[torch.Tensor]]:
    model, weights = BASES[base][0]()
    return fill(melora_fx.rewrite(model, "all-linear", CONFIG, **options)), weights


def inputs_of(base: str) -> torch.Tensor:
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(base.split()[-1], torch.float32)
    return randn(5, SIZES[0]).to(dtype)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())
