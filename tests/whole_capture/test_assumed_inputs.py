"""A whole capture keeps its assumptions when it is copied, saved, compiled or folded; so does a user's own export."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import assert_unchanged, by_torch_save, fill, randn, tower
from support.whole_captures.case import CONFIG
from support.whole_captures.sizes import LongInputs, Positions
from torch import nn
from torch.export import Dim
from transformers import SwinConfig, SwinForImageClassification

import melora_fx
from melora_fx import MELoRAError

REFUSED = r"the capture assumed that x\.shape\[1\] <= 9; here `x` has shape \(2, 10, 24\)"
LONG = randn(2, 10, 24)
SIDES = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}


def captured(model: nn.Module | None = None, **options: Any) -> nn.Module:
    return melora_fx.rewrite(
        model or LongInputs().eval(), "all-linear", CONFIG, example_inputs=(randn(2, 5, 24),), **options
    )


@pytest.mark.parametrize("remade", [copy.deepcopy, by_torch_save, melora_fx.fold], ids=["copied", "saved", "folded"])
def test_it_is_checked_in(remade: Any) -> None:
    model = remade(fill(captured()))
    assert model(randn(2, 9, 24)).shape == (2, 9, 36)
    with pytest.raises(MELoRAError, match=REFUSED):
        model(LONG)


@pytest.mark.slow
def test_it_is_checked_when_compiled(fresh_dynamo: None) -> None:
    compiled = torch.compile(captured(), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 1):
        assert compiled(randn(2, length, 24)).shape == (2, length, 36)
    with pytest.raises(Exception, match="the capture assumed that"):
        compiled(LONG)


def test_an_adapter_is_loaded_for_the_axes_asked_for(tmp_path: Path) -> None:
    plain = LongInputs().eval()
    melora_fx.save_adapter(captured(copy.deepcopy(plain)), tmp_path)
    options: dict[str, Any] = {"example_inputs": (randn(2, 5, 24),), "dynamic_axes": {"x": {0: "batch"}}}
    model = melora_fx.load_adapter(plain, tmp_path, **options)
    assert model(randn(7, 5, 24)).shape == (7, 5, 36)
    with pytest.raises(MELoRAError, match=r"but the capture is for \(any, 5, 24\)"):
        model(randn(2, 6, 24))


def test_the_ranges_of_an_exported_program_are_checked() -> None:
    shapes = {"x": {0: Dim("batch", max=16), 1: Dim("tokens", min=3, max=12)}}
    program = torch.export.export(Positions().eval(), (randn(2, 5, 24),), dynamic_shapes=shapes)
    model = melora_fx.rewrite(program, "all-linear", CONFIG)
    assert model(randn(1, 12, 24)).shape == (1, 12, 36)
    for wrong, text in ((randn(17, 5, 24), r"shape\[0\] <= 16"), (randn(2, 2, 24), r"shape\[1\] >= 3")):
        with pytest.raises(MELoRAError, match=f"the capture assumed that x.{text}"):
            model(wrong)


@pytest.mark.parametrize(
    ("axes", "error", "text"),
    [
        ("all", ValueError, r"`dynamic_axes` \(='all'\) must be \"auto\" or"),
        ({"y": {0: "batch"}}, ValueError, "names the input `y`; the inputs are x"),
        ({"x": {2: "depth"}}, ValueError, r"of `x`, of shape \(2, 24\): it has no axis 2"),
        ({"x": {1: "width"}}, MELoRAError, r"`x` axis 1 \(`width`\): the model fixes it to 24"),
    ],
)
def test_axes_that_cannot_vary_are_named(axes: Any, error: type[Exception], text: str) -> None:
    model = tower()
    with assert_unchanged(model), pytest.raises(error, match=text):
        melora_fx.rewrite(model, "up", CONFIG, example_inputs=(randn(2, 24),), dynamic_axes=axes)
    with pytest.raises(error, match=text):
        melora_fx.match(model, "up", CONFIG, example_inputs=(randn(2, 24),), dynamic_axes=axes)


def test_axes_are_for_whole_captures() -> None:
    with pytest.raises(ValueError, match="`dynamic_axes` is for whole captures"):
        melora_fx.match(tower(), "up", CONFIG, dynamic_axes={"x": {0: "batch"}})


@pytest.mark.slow
def test_an_axis_that_would_keep_the_export_busy_is_named() -> None:
    """Both sides of Swin's images: sympy would take minutes."""
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 12, "window_size": 4}
    config = SwinConfig(**sizes, depths=[2, 2], num_heads=[2, 2], drop_path_rate=0.0)
    model, pixels = SwinForImageClassification(config).eval(), randn(2, 3, 32, 32)
    with assert_unchanged(model), pytest.raises(MELoRAError, match=r"the axis pixel_values\.shape\[[23]\] cannot vary"):
        melora_fx.match(model, "all-linear", CONFIG, example_inputs={"pixel_values": pixels}, dynamic_axes=SIDES)
    options: dict[str, Any] = {"example_inputs": {"pixel_values": pixels}, "dynamic_axes": {"pixel_values": {0: "n"}}}
    rewritten = melora_fx.rewrite(model, "q_proj", CONFIG, **options)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(pixels[:1]).logits, model(pixels[:1]).logits)


def test_on_meta_more_is_refused() -> None:
    """Nothing can be tried on meta."""
    with torch.device("meta"):
        model = captured(Positions().eval())
    assert [each.text for each in model.assumed_inputs.conditions] == ["x.shape[1] <= 12"]
