"""`save_adapter` warns about tensors that it leaves out although they are trained or changed, and about no others."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import IN, OUT, TOWER_CONFIG, assert_equal, by_torch_save, output_of, randn, rewritten_tower, tower
from torch import nn

import melora_fx

X = randn(8, IN)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

captures = pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])


class Normed(nn.Module):
    """A linear, a BatchNorm, and constant buffers: one of large values, one that is not saved."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.lin = nn.Linear(IN, OUT)
        self.norm = nn.BatchNorm1d(OUT, affine=affine)
        self.register_buffer("mask", torch.full((4,), -1e9))
        self.register_buffer("frequencies", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.lin(x))


def normed(*, whole: bool = False, affine: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options |= {"example_inputs": (X,)} if whole else {}
    return melora_fx.rewrite(Normed(affine), "lin", TOWER_CONFIG, **options)


def assert_silent(model: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        melora_fx.save_adapter(model, folder)


def test_a_parameter_that_was_trained_and_frozen_again_is_named(tmp_path: Path) -> None:
    model = normed()
    with torch.no_grad():
        model.lin.bias.mul_(1.01)
    with pytest.warns(UserWarning, match=r"does not save `lin.bias`, which"):
        melora_fx.save_adapter(model, tmp_path)
    assert_silent(melora_fx.rewrite(Normed(), "lin", TOWER_CONFIG).to(torch.bfloat16), tmp_path)


@pytest.mark.default_cases("in_place")
@captures
def test_statistics_that_have_changed_are_named(whole: bool, tmp_path: Path) -> None:
    model = normed(whole=whole)
    assert_silent(model.eval(), tmp_path)
    model.eval()(X)
    assert_silent(model, tmp_path)
    model.train()(X)
    with pytest.warns(UserWarning, match=r"does not save `norm.running_mean`, `norm.running_var`, which .*keep_train"):
        melora_fx.save_adapter(model, tmp_path)


@pytest.mark.default_cases("affine-in_place", "no_weights-in_place")
@captures
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no_weights"])
def test_a_norm_that_is_kept_trainable_travels_with_its_statistics(affine: bool, whole: bool, tmp_path: Path) -> None:
    model = normed(whole=whole, affine=affine, keep_trainable=["norm"])
    model.train()(X)
    assert_silent(model.eval(), tmp_path)
    torch.manual_seed(0)
    options: dict[str, Any] = {"example_inputs": (X,)} if whole else {}
    loaded = melora_fx.load_adapter(Normed(affine), tmp_path, **options)
    assert_equal(output_of(loaded.eval(), X), output_of(model, X))


def loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


def compiled(model: nn.Module) -> nn.Module:
    return model if hasattr(model, "_orig_mod") else torch.compile(model, backend="eager")


SAME: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copied": copy.deepcopy,
    "pickled": by_torch_save,
    "cast to fp16": lambda model: model.half(),
    "cast to bf16": lambda model: model.bfloat16(),
    "cast there and back": lambda model: model.double().float(),
    "loaded": loaded,
    "compiled": compiled,
}


@pytest.mark.default_cases("copied", "pickled", "cast to fp16", "loaded")
@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_leaves_the_values_is_no_change_and_hides_none(change: Any, tmp_path: Path) -> None:
    model = change(normed())
    assert_silent(model, tmp_path)
    dtype = next(model.parameters()).dtype
    model.train()(X.to(dtype))
    with pytest.warns(UserWarning, match="running_mean"):
        melora_fx.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="running_mean"):
        melora_fx.save_adapter(change(model), tmp_path)


def test_weights_that_come_after_the_rewrite_are_no_change(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Normed()
    model = melora_fx.rewrite(model, "lin", TOWER_CONFIG).to_empty(device="cpu")
    model.load_state_dict(Normed().state_dict(), strict=False)
    assert_silent(model, tmp_path)


def test_a_parameter_that_can_be_trained_is_named(tmp_path: Path) -> None:
    model = rewritten_tower()
    assert_silent(model, tmp_path)
    model.up.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match="does not save `up.bias`, which can be trained or have changed"):
        melora_fx.save_adapter(model, tmp_path)
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"`up.weight`, `up.bias`, .*, … \(\d+ more\), which"):
        melora_fx.save_adapter(model, tmp_path)


def test_a_module_that_came_later_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(rewritten_tower(), nn.Linear(6, 2))
    with pytest.warns(UserWarning, match=r"does not save `1\.weight`, `1\.bias`, which"):
        melora_fx.save_adapter(model, tmp_path)


def test_of_a_part_nothing_beside_it_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(rewritten_tower(), nn.Linear(6, 2))
    assert_silent(model[0], tmp_path)


def test_what_is_kept_or_loaded_is_not_named(tmp_path: Path) -> None:
    model = melora_fx.rewrite(tower(), "up", TOWER_CONFIG, keep_trainable=["up.bias", "head"])
    assert_silent(model, tmp_path)
    assert_silent(melora_fx.load_adapter(tower(), tmp_path), tmp_path)
