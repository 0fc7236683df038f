"""What a training step costs: the step to time, what autograd saves for its backward pass, and its peak memory."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Step = Callable[[], None]


def make_step(model: nn.Module, embeddings: torch.Tensor, run: Callable[..., Any] | None = None) -> tuple[Step, int]:
    """Returns the training step of a model, and the number of parameters that it trains.

    Args:
        model: its parameters that require gradients are trained.
        embeddings: require a gradient, so that the backward pass reaches the first layer even if nothing is trained.
        run: called instead of the model, such as the compiled model.
    """
    run = model if run is None else run
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

    def step() -> None:
        run(inputs_embeds=embeddings).last_hidden_state.float().square().mean().backward()
        embeddings.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if embeddings.is_cuda:
            torch.cuda.synchronize()

    return step, sum(parameter.numel() for parameter in parameters)


def saved_mib(model: nn.Module, embeddings: torch.Tensor) -> float:
    """Returns the size of the distinct storages that autograd saves for the backward pass, without model and input."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), embeddings]}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=embeddings)
    return round(sum(storage.nbytes() for storage in saved.values()) / 2**20, 4)


def peak_memory_mib(step: Step, device: str) -> float | None:
    """Returns what one step adds to the memory in use at its peak: resident memory on the CPU (Linux), or the GPU's.

    Returns None if the CPU's cannot be measured.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except (OSError, AttributeError):
        return None
    before = resident_kib("VmRSS")
    step()
    return round((resident_kib("VmHWM") - before) / 1024, 1)


def resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
