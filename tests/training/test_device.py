"""The device of a training."""

import pytest
import torch

from exporters.training.device import find_device
from melora_fx import MELoRAError


def test_devices_by_name() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_names_that_torch_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"`device` \(='gpu'\) must be auto, cpu, cuda"):
        find_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there() -> None:
    with pytest.raises(MELoRAError, match=r"finds 0 CUDA devices"):
        find_device("cuda")
