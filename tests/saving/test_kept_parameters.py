"""`keep_trainable` names parameters too: a bias next to an adapter is trained, saved, loaded, folded and exported."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import Exports
from support.models import (
    IN,
    TOWER_CONFIG,
    Tied,
    assert_equal,
    assert_near,
    assert_unchanged,
    bert_classifier,
    by_torch_save,
    dense_copy,
    fill,
    gpt2,
    output_of,
    randn,
    tower,
)
from torch import nn

import melora_fx
from exporters import OrtRunner, export_onnx, fold_onnx
from melora_fx import MELoRAConfig, MELoRAError

X = randn(3, IN)
KEPT = ["up.bias", "norm.weight", "conv.bias"]
"""Parameters of a site, of another module, and of a site that is a Conv1D."""


def rewritten(config: MELoRAConfig = TOWER_CONFIG, *, whole: bool = False, kept: Any = KEPT) -> nn.Module:
    """Returns a tower with filled adapters and other values in the kept parameters."""
    options: dict[str, Any] = {"example_inputs": (X,)} if whole else {}
    model = fill(melora_fx.rewrite(tower(), ["up", "conv"], config, keep_trainable=kept, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in KEPT and parameter.requires_grad:
                parameter.add_(randn(*parameter.shape))
    return model


def oracle_of(model: nn.Module) -> nn.Module:
    """Returns a plain tower in float64 with W + Δ and with the parameters that were kept trainable."""
    oracle = dense_copy(model, tower())
    with torch.no_grad():
        for name in KEPT:
            oracle.get_parameter(name).copy_(model.get_parameter(name))
    return oracle


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


captures = pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])


@pytest.mark.default_cases("in_place-*", "whole-weight")
@pytest.mark.parametrize("lowering", ["weight", "activation", "plain"])
@captures
def test_they_alone_are_trained_beside_the_adapters(whole: bool, lowering: Any) -> None:
    model = rewritten(MELoRAConfig(2, 3, 5.0, lowering=lowering), whole=whole)
    factors = {f"{site}.lora_{kind}" for site in ("up", "conv") for kind in "ab"}
    assert trainable(model) == factors | set(KEPT)
    model(X).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable(model)
    oracle = oracle_of(model)
    oracle(X.double()).square().sum().backward()
    for name in KEPT:
        assert_near(model.get_parameter(name).grad, oracle.get_parameter(name).grad)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("up.bias", {"up.bias"}),
        ("bias", {"up.bias", "norm.bias", "conv.bias", "head.bias"}),
        ("*.bias", {"up.bias", "norm.bias", "conv.bias", "head.bias"}),
        ("re:(up|conv)\\.bias", {"up.bias", "conv.bias"}),
        (["head", "head.bias", "norm.weight"], {"head.weight", "head.bias", "norm.weight"}),
    ],
    ids=["name", "suffix", "glob", "expression", "within a module"],
)
def test_they_are_named_as_modules_are(patterns: Any, expected: set[str]) -> None:
    model = melora_fx.rewrite(tower(), "up", TOWER_CONFIG, keep_trainable=patterns)
    assert trainable(model) == expected | {"up.lora_a", "up.lora_b"}


def test_a_typing_error_is_named() -> None:
    model = tower()
    with assert_unchanged(model), pytest.raises(ValueError, match=r"'up\.bais' matches nothing; nearest: up\.bias"):
        melora_fx.rewrite(model, "up", TOWER_CONFIG, keep_trainable=["head", "up.bais"])


@pytest.mark.parametrize(
    ("targets", "kept", "site"),
    [("up", "up.weight", "up"), ("projection", "projection", "own.projection"), (["up", "conv"], "weight", "up")],
)
def test_the_base_of_a_site_is_refused(targets: Any, kept: str, site: str) -> None:
    model = tower()
    with assert_unchanged(model), pytest.raises(ValueError, match=f"`keep_trainable` and `targets` both name '{site}'"):
        melora_fx.rewrite(model, targets, TOWER_CONFIG, keep_trainable=kept)


@pytest.mark.default_cases("in_place")
@captures
def test_they_travel_with_the_adapter(whole: bool, tmp_path: Path) -> None:
    model = rewritten(whole=whole)
    melora_fx.save_adapter(model, tmp_path)
    assert {name for name in load_file(tmp_path / "adapter.safetensors") if "lora" not in name} == set(KEPT)
    options: dict[str, Any] = {"example_inputs": (X,)} if whole else {}
    loaded = melora_fx.load_adapter(tower(), tmp_path, **options)
    assert trainable(loaded) == trainable(model)
    swapped = melora_fx.load_adapter(fill(rewritten(), 7), tmp_path)
    for other in (loaded, swapped, by_torch_save(loaded)):
        assert_equal(output_of(other, X), output_of(model, X))
    with pytest.raises(MELoRAError, match=r"keeps \['conv.bias', 'norm.weight', 'up.bias'\] trainable that the model"):
        melora_fx.load_adapter(rewritten(kept=()), tmp_path)


@pytest.mark.default_cases("in_place")
@captures
def test_a_fold_leaves_them_as_they_were_trained(whole: bool) -> None:
    model = rewritten(whole=whole)
    trained = {name: model.get_parameter(name).detach().clone() for name in KEPT}
    expected = output_of(oracle_of(model), X.double())
    melora_fx.fold(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in trained.items():
        assert_equal(model.get_parameter(name).detach(), value)
    assert_near(output_of(model, X), expected)


def test_a_fold_on_disk_writes_them(tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    save_file(tower().state_dict(), tmp_path / "base" / "model.safetensors")
    model = rewritten()
    melora_fx.save_adapter(model, tmp_path / "adapter")
    melora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), dict(melora_fx.fold(model).state_dict()))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_fold_of_a_graph_writes_them(target: Any, exports: Exports, tmp_path: Path) -> None:
    shutil.copytree(Path(exports("tower", target=target).path).parent, tmp_path / "base")
    model = rewritten()
    melora_fx.save_adapter(model, tmp_path / "adapter")
    fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    actual = OrtRunner(tmp_path / "folded" / "model.onnx").run({"x": X})["output"]
    np.testing.assert_allclose(actual, output_of(model, X), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_swappable_graphs_take_them(target: Any, tmp_path: Path) -> None:
    report = export_onnx(rewritten(), {"x": X}, tmp_path / "swap.onnx", adapter="swap", target=target)
    other = fill(rewritten(), 7)
    with torch.no_grad():
        other.get_parameter("up.bias").mul_(-2)
    melora_fx.save_adapter(other, tmp_path / "adapter")
    actual = OrtRunner(report.path).run({"x": X}, adapter=tmp_path / "adapter")["output"]
    np.testing.assert_allclose(actual, output_of(other, X), rtol=1e-4, atol=1e-5)


TIED = {
    "a head and its embedding": (gpt2, "lm_head", "wte", "lm_head", "transformer.wte.weight"),
    "an embedding by its parameter": (gpt2, "lm_head", "wte.weight", "lm_head", "transformer.wte.weight"),
    "two linears": (Tied, "a", "b", "a", "b.weight"),
}


@pytest.mark.parametrize(("build", "target", "kept", "site", "name"), TIED.values(), ids=TIED)
def test_what_is_tied_to_a_base_is_refused(build: Any, target: str, kept: str, site: str, name: str) -> None:
    model = build()
    text = f"`{name}` is kept trainable and shares its weight with `{site}`.*\n.*a copy of the weight before `rewrite`"
    with assert_unchanged(model), pytest.raises(ValueError, match=text):
        melora_fx.rewrite(model, target, TOWER_CONFIG, keep_trainable=kept)


def test_a_folder_that_trains_what_is_tied_to_a_base_is_refused(tmp_path: Path) -> None:
    model = gpt2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    melora_fx.save_adapter(melora_fx.rewrite(model, "lm_head", TOWER_CONFIG, keep_trainable="wte"), tmp_path)
    tied = gpt2()
    text = "`transformer.wte.weight` is kept trainable and shares its weight with `lm_head`"
    with assert_unchanged(tied), pytest.raises(MELoRAError, match=text):
        melora_fx.load_adapter(tied, tmp_path)


def test_a_quantised_parameter_is_not_trained() -> None:
    model = bert_classifier(num_layers=1)
    model.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    with assert_unchanged(model), pytest.raises(ValueError, match="'codes' is quantised and cannot be trained"):
        melora_fx.rewrite(model, "query", TOWER_CONFIG, keep_trainable="codes")
