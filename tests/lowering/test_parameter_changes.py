"""Parameters that change between two forwards, however they are changed."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.lowered import (
    CLOSE,
    CONFIG,
    MANY,
    lowered,
)
from support.models import (
    IN,
    assert_equal,
    dense_copy,
    fill,
    output_of,
    randn,
    tower,
)
from torch import Tensor, nn

import melora_fx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def optimizer_step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[..., None]:
    def change(model: nn.Module, run: Callable[..., Tensor], x: Tensor, folder: Any) -> None:
        optimizer = make(list(melora_fx.adapter_parameters(model).values()))
        for _ in range(2):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()

    return change


def in_place(operation: Callable[[nn.Parameter], Any]) -> Callable[..., None]:
    def change(model: nn.Module, run: Callable[..., Tensor], x: Tensor, folder: Any) -> None:
        with torch.no_grad():
            for parameter in melora_fx.adapter_parameters(model).values():
                operation(parameter)

    return change


def assign_data(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 1.5


def load_state(model: nn.Module, run: Any, x: Tensor, folder: Any) -> None:
    other = fill(copy.deepcopy(model), seed=8)
    model.load_state_dict(other.state_dict())


def swap_average(model: nn.Module, run: Any, x: Tensor, folder: Any) -> None:
    """Swaps in other values as exponential moving averages do."""
    average = fill(copy.deepcopy(model), seed=8)
    pairs = zip(model.parameters(), average.parameters(), strict=True)
    for own, other in pairs:
        own.data, other.data = other.data, own.data


def load_other_adapter(model: nn.Module, run: Any, x: Tensor, folder: Any) -> None:
    config = replace(CONFIG, rank=2, alpha=7.0)
    melora_fx.save_adapter(fill(melora_fx.rewrite(tower(), "all-linear", config), seed=8), folder)
    melora_fx.load_adapter(model, folder)


def replace_parameters(model: nn.Module, run: Any, x: Tensor, folder: Any) -> None:
    for site in melora_fx.sites(model).values():
        for kind in ("lora_a", "lora_b"):
            name = site.record.attribute(kind)
            setattr(site.owner, name, nn.Parameter(getattr(site.owner, name).detach() * 1.5))


def change_base(model: nn.Module, run: Any, x: Tensor, folder: Any) -> None:
    with torch.no_grad():
        model.get_submodule("up").weight.mul_(2)


SGD = torch.optim.SGD
ADAMW = torch.optim.AdamW

CHANGES = {
    **{
        f"{cls.__name__.lower()}_{name}": optimizer_step(lambda p, cls=cls, o=options: cls(p, lr=0.1, **o))
        for cls in (SGD, ADAMW)
        for name, options in {
            "loop": {"foreach": False},
            "foreach": {"foreach": True},
            "fused": {"fused": True},
        }.items()
    },
    "load_state_dict": load_state,
    "copy": in_place(lambda p: p.copy_(p * 1.5)),
    "zero": in_place(lambda p: p.zero_()),
    "data_is_assigned": in_place(assign_data),
    "data_is_copied_to": in_place(lambda p: p.data.copy_(p.data * 1.5)),
    "swapped_with_an_average": swap_average,
    "load_adapter": load_other_adapter,
    "parameters_are_replaced": replace_parameters,
    "base_is_changed": change_base,
}


@pytest.mark.default_cases("*-eager", "parameters_are_replaced-compiled", "adamw_fused-compiled")
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_next_forward_sees_the_change(change, mode, tmp_path):
    model = lowered(tower)
    x = randn(*MANY, IN)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if mode == "compiled" else model
    before = run(x).detach()
    change(model, run, x, tmp_path)
    plain = tower()
    with torch.no_grad():
        plain.up.weight.copy_(model.get_submodule("up").weight)
    expected = output_of(dense_copy(model, plain), x.double())
    assert not torch.allclose(before.double(), expected, atol=1e-3)
    output = run(x)
    torch.testing.assert_close(output.detach().double(), expected, **CLOSE)
    assert_equal(output_of(run, x), output.detach())
