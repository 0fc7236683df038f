"""Rounding explains an error if the last bits of the weights move the model's outputs by as much."""

from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from support.models import assert_equal, randn
from torch import Tensor, nn

from exporters import compare, export_onnx
from exporters.export_report import ExportReport
from exporters.measuring.rounding import rounding_allowance
from exporters.runtime.ort_runner import OrtRunner
from exporters.runtime.torch_runner import TorchRunner
from exporters.targets import PRECISIONS
from melora_fx import MELoRAError

FP32, FP16 = PRECISIONS


class Logistic(nn.Module):
    """A product, then a chaotic map: each step amplifies the rounding."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(256, 16)
        self.rate = nn.Parameter(torch.tensor(3.9))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.fc(x))
        for _ in range(self.steps):
            x = self.rate * x * (1 - x)
        return x


INPUTS = {"x": randn(8, 256)}


def allowance(model: nn.Module, precision=FP32, scales=MappingProxyType({})) -> float:
    return rounding_allowance(model, precision, lambda: [TorchRunner(model).run(INPUTS)], scales)


def test_a_well_conditioned_model_is_allowed_nothing_more() -> None:
    assert 0 < allowance(Logistic(1)) < FP32.tolerance_of_more


def test_an_ill_conditioned_model_is_allowed_more() -> None:
    assert allowance(Logistic(16)) > FP32.tolerance_of_more


def test_rounding_explains_ten_times_the_tolerance_at_most() -> None:
    assert allowance(Logistic(60)) == 10 * FP32.tolerance_of_more
    assert allowance(Logistic(60), FP16) == 10 * FP16.tolerance_of_more


def test_weights_are_as_before_also_after_an_error() -> None:
    model = Logistic(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory = [parameter.data_ptr() for parameter in model.parameters()]
    allowance(model)
    runs = iter([[{"y": np.zeros(1)}]])
    with pytest.raises(StopIteration):
        rounding_allowance(model, FP32, lambda: next(runs))
    assert_equal(model.state_dict(), before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == memory


def test_rounding_is_relative_to_what_the_error_is_relative_to() -> None:
    """A value that is small by chance would otherwise explain larger errors than it has."""
    model = Logistic(8)
    output, value = next(iter(TorchRunner(model).run(INPUTS).items()))
    scales = {output: 50 * float(np.abs(value).max())}
    assert allowance(model, scales=scales) == pytest.approx(allowance(model) / 50)


def exported(model: nn.Module, folder: Path) -> ExportReport:
    return export_onnx(model, INPUTS, folder / "model.onnx")


def test_an_ill_conditioned_model_is_exported(tmp_path: Path) -> None:
    """The graph is correct; its errors are above the tolerance."""
    report = exported(Logistic(13), tmp_path)
    assert FP32.tolerance < report.max_rel_error < 10 * FP32.tolerance
    well = exported(Logistic(1), tmp_path / "well")
    assert well.max_rel_error < FP32.tolerance / 10


def test_a_wrong_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs are wrong by one per cent, in a model that does not amplify its rounding."""
    run = OrtRunner.run
    monkeypatch.setattr(OrtRunner, "run", lambda *args: {name: 1.01 * value for name, value in run(*args).items()})
    with pytest.raises(MELoRAError, match="not equal to torch"):
        exported(Logistic(1), tmp_path)
    failed = OrtRunner(tmp_path / "model.failed" / "model.onnx")
    assert compare(failed, TorchRunner(Logistic(1)), INPUTS).max_rel_error == pytest.approx(0.01, rel=1e-3)
