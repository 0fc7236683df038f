"""Products with a part of a weight, with `alpha`, and with features that are not last: whole and in place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Holder, assert_equal, assert_near, dense_copy, fill, randn
from torch import nn
from torch.nn import functional as F

import melora_fx
from exporters import OrtRunner, export_onnx, fold_onnx
from melora_fx import MELoRAConfig, MELoRAError

CONFIG = MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=5.0)
SPLIT = MELoRAConfig(rank=2, num_blocks=2, alpha=5.0, split=3)
X = randn(2, 5, 24)
SITES = ["inner.columns", "inner.stored_across", "inner.ordered", "inner.scaled", "inner.left"]


class Forms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Parameter(randn(12, 36, seed=1) / 5)
        self.stored_across = nn.Parameter(randn(36, 12, seed=2) / 5)
        self.ordered = nn.Parameter(randn(12, 24, seed=3) / 5)
        self.scaled = nn.Parameter(randn(24, 12, seed=4) / 5)
        self.left = nn.Parameter(randn(12, 48, seed=5) / 5)
        self.register_buffer("offset", torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.columns[:, 7:31]) - F.linear(x[..., :5], self.columns[:, 31:])
        out = out + x @ self.stored_across[12:]
        out = out + torch.einsum("bti,oi->obt", x, self.ordered).permute(1, 2, 0)
        rows = torch.addmm(self.offset, x.flatten(0, 1), self.scaled, alpha=-0.5)
        return out + rows.unflatten(0, (-1, 5)) + (self.left[:, 3:27] @ x.mT).mT


def plain() -> nn.Module:
    return Holder(Forms()).eval()


def rewritten(targets: Any = "all-linear", config: MELoRAConfig = CONFIG, *, whole: bool = False) -> nn.Module:
    return melora_fx.rewrite(plain(), targets, config, **({"example_inputs": (X,)} if whole else {}))


@pytest.mark.default_cases("*-in_place")
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
@pytest.mark.parametrize("config", [CONFIG, SPLIT], ids=["blocks", "split"])
def test_forms(config: MELoRAConfig, whole: bool) -> None:
    """Output, gradient of the input and the fold are those of W + Δ."""
    model = rewritten(config=config, whole=whole)
    assert list(melora_fx.sites(model)) == SITES
    assert_equal(model(X).detach(), plain().requires_grad_(False)(X))
    dense = dense_copy(fill(model), plain())
    given, wanted = X.clone().requires_grad_(), X.double().requires_grad_()
    output, expected = model(given), dense(wanted)
    assert_near(output, expected.detach())
    output.square().sum().backward(), expected.square().sum().backward()
    torch.testing.assert_close(given.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)
    melora_fx.fold(model)
    for name, weight in dense.named_parameters():
        assert_near(model.get_parameter(name), weight)
    assert_near(model(X), expected.detach())


def test_a_loaded_adapter_has_the_same_bits(tmp_path: Path) -> None:
    model = fill(rewritten())
    melora_fx.save_adapter(model, tmp_path)
    assert_equal(melora_fx.load_adapter(plain(), tmp_path)(X), model(X))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*lru_cache.*:UserWarning")
@pytest.mark.parametrize("adapter", ["fold", "keep", "swap"])
def test_onnx(adapter: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    is_swap = adapter == "swap"  # W x builds Δ from pieces, which cannot be inputs
    model = fill(rewritten(SITES[:-1] if is_swap else "all-linear"))
    expected = dense_copy(model, plain())(X.double())
    export_onnx(model, {"x": X}, path, adapter=adapter)
    if not is_swap:
        (output,) = OrtRunner(path).run({"x": X.numpy()}).values()
        assert_near(torch.from_numpy(output), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*lru_cache.*:UserWarning")
def test_fold_into_a_base_graph(tmp_path: Path) -> None:
    """The exporter stores copies of columns, so these are refused."""
    base, folded = tmp_path / "base.onnx", tmp_path / "folded.onnx"
    export_onnx(plain(), {"x": X}, base)
    model = fill(rewritten(["ordered", "scaled"]))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    fold_onnx(base, tmp_path / "adapter", folded)
    (output,) = OrtRunner(folded).run({"x": X.numpy()}).values()
    assert_near(torch.from_numpy(output), dense_copy(model, plain())(X.double()))
    melora_fx.save_adapter(rewritten(["columns"]), tmp_path / "columns")
    with pytest.raises(MELoRAError, match=r"fold in memory and export:\n`inner.columns`"):
        fold_onnx(base, tmp_path / "columns", tmp_path / "other.onnx")
