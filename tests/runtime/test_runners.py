"""`TorchRunner`: the model's outputs by name."""

import pytest
import torch
from support.models import assert_equal, bert, output_of, randn, tokens, tower

from exporters import TorchRunner


def test_torch_runner_returns_the_models_outputs() -> None:
    outputs = TorchRunner(bert()).run({name: value.numpy() for name, value in tokens().items()})
    assert set(outputs) == {"last_hidden_state", "pooler_output"}
    assert_equal(torch.from_numpy(outputs["last_hidden_state"]), output_of(bert(), tokens()))


def test_torch_runner_puts_the_number_of_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    TorchRunner(model, threads=2).run({"x": randn(2, 24)})
    assert seen == [2]
    assert torch.get_num_threads() == before
