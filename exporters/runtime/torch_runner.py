"""The interface of everything that computes a model: `run(inputs) -> outputs`, both dicts of arrays by name."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from exporters.graph.named_tensors import named_outputs
from exporters.onnx_runtime import Arrays


class Runner(Protocol):
    """The interface that `compare` and `measure_latency` need. `threads`: intra-operator threads; None: the default."""

    threads: int | None

    def run(self, inputs: Mapping[str, Any]) -> Arrays: ...


class TorchRunner:
    """Runs a torch module unchanged, in its current mode, without gradients.

    Args:
        model: the module, or a function that computes it; called with the inputs as keyword arguments, on the module's
            device.
        threads: number of torch's intra-operator threads, set during a run for the whole process; None keeps torch's.
    """

    def __init__(self, model: Callable[..., Any], *, threads: int | None = None) -> None:
        self.model = model
        self.threads = threads

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Returns the outputs as NumPy arrays by name.

        Args:
            inputs: arrays or tensors by name.

        Raises:
            MELoRAError: if the model returns no tensor.
        """
        tensors = {name: torch.as_tensor(value, device=self._device()) for name, value in inputs.items()}
        before = torch.get_num_threads()
        if self.threads is not None and self.threads != before:
            torch.set_num_threads(self.threads)
        try:
            with torch.no_grad():
                outputs = named_outputs(self.model(**tensors))
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)
        return {name: output.detach().cpu().numpy() for name, output in outputs.items()}

    def _device(self) -> torch.device | None:
        """Returns the device of the module's parameters; for a function None, which leaves tensors on their device."""
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        return next((parameter.device for parameter in parameters if not parameter.is_meta), None)
