"""Measures one case of `processes`: starts the processes, and prints the results of the first one."""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaForCausalLM

import melora_fx
from benchmarks.common.cases import Row, timed_rows
from benchmarks.common.random_models import llama_config
from exporters.measuring.timing import time_in_turn
from melora_fx import MELoRAConfig
from melora_fx.distributed.tensors import own_part, whole

from .spread import BY_COLUMNS, BY_ROWS, spread
from .step_cost import peak_memory_mib
from .traffic import Traffic

FROZEN = "frozen"
SIDES: dict[str, MELoRAConfig | int | None] = {
    FROZEN: None,
    "ours, 8 blocks of rank 8": MELoRAConfig(rank=8, num_blocks=8, alpha=16.0),
    "ours, 2 blocks of rank 8": MELoRAConfig(rank=8, num_blocks=2, alpha=16.0),
    "PEFT LoRA, rank 64": 64,
    "PEFT LoRA, rank 8": 8,
}
"""Our configuration or the rank of PEFT's LoRA, by name. Eight blocks of rank 8 have the rank of the first LoRA and as
many parameters as the second."""

_LINEARS = [name.rpartition(".")[2] for name in (*BY_COLUMNS, *BY_ROWS)]
_VOCABULARY, _BATCH, _SEQUENCE = 512, 8, 64
_TIMEOUT = timedelta(seconds=120)


class Alone(NamedTuple):
    """Results of one process with the whole batch: three losses, and the gradients of a fourth step by name."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]


def make_side(name: str, sizes: str) -> Any:
    """Returns a random Llama with the adapters of a side, with random values in B; the same in each process.

    `sizes`: hidden size, intermediate size, layers and heads, separated by commas.
    """
    hidden, intermediate, layers, heads = map(int, sizes.split(","))
    numbers = {"num_key_value_heads": heads // 2, "vocab_size": _VOCABULARY, "use_cache": False}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(llama_config(hidden, intermediate, layers, heads, **numbers))
    config = SIDES[name]
    if config is None:
        model.requires_grad_(False)
    elif isinstance(config, MELoRAConfig):
        melora_fx.rewrite(model, _LINEARS, config)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=config, lora_alpha=2 * config, target_modules=_LINEARS))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in trained(model).items():
            if "lora_b" in parameter_name.lower():
                parameter.normal_(std=0.02)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the adapters' parameters by their names without DDP's prefix."""
    named = ((name.removeprefix("module."), parameter) for name, parameter in model.named_parameters())
    return {name: parameter for name, parameter in named if "lora_" in name}


def make_batch(hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns embeddings and labels, the same in each process."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, _VOCABULARY, (_BATCH, _SEQUENCE), generator=generator)
    return torch.randn(_BATCH, _SEQUENCE, hidden, generator=generator), labels


class Training:
    """The training of one side in one process."""

    def __init__(self, model: nn.Module, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        self.model = model
        self.embeddings = embeddings.clone().requires_grad_()  # so that the backward pass reaches the first layer
        self.labels = labels
        own = list(trained(model).values())
        self.optimizer = torch.optim.AdamW(own, lr=1e-3, eps=1e-3) if own else None

    def backward(self) -> float:
        """Computes the loss and its gradients; returns the loss."""
        self.embeddings.grad = None
        loss = self.model(inputs_embeds=self.embeddings, labels=self.labels).loss
        loss.backward()
        return float(loss.detach())

    def step(self) -> float:
        loss = self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    def held_bytes(self) -> int:
        """Returns the bytes of parameters, buffers and optimizer states in this process."""
        states = (
            [value for state in self.optimizer.state.values() for value in state.values()] if self.optimizer else []
        )
        tensors = [*self.model.parameters(), *self.model.buffers(), *states]
        return sum(own_part(tensor).nbytes for tensor in tensors)


def alone(name: str, sizes: str) -> Alone:
    training = Training(make_side(name, sizes), *make_batch(int(sizes.partition(",")[0])))
    losses = [training.step() for _ in range(3)]
    training.backward()
    return Alone(losses, {name: _gradient(parameter) for name, parameter in trained(training.model).items()})


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "a trained parameter has a gradient"
    return whole(parameter.grad).clone()


def measure(mode: str, rounds: int, sizes: str, expected: Mapping[str, Alone]) -> list[Row]:
    """Measures all sides and returns their rows; runs in each process."""
    torch.set_num_threads(1)
    embeddings, labels = make_batch(int(sizes.partition(",")[0]))
    steps: dict[str, Callable[[], float]] = {}
    facts: dict[str, Row] = {}
    for name in SIDES:
        model, index, number = spread(mode, make_side(name, sizes))
        training = Training(model, embeddings.chunk(number)[index], labels.chunk(number)[index])
        facts[name] = {"mode": mode, "processes": dist.get_world_size()} | _facts(training, expected[name])
        steps[name] = training.step
    seconds = time_in_turn(steps, rounds=rounds)
    for name, step in steps.items():
        facts[name]["peak_memory_mib"] = peak_memory_mib(step, "cpu")
    return timed_rows(seconds, FROZEN, facts)


def _facts(training: Training, expected: Alone) -> Row:
    losses = [_mean(training.step()) for _ in range(3)]
    traffic = Traffic()
    if isinstance(training.model, nn.parallel.DistributedDataParallel):
        traffic.count_ddp(training.model)
    with traffic:
        training.backward()
    gradients = {name: _gradient(parameter) for name, parameter in trained(training.model).items()}
    for parameter in trained(training.model).values():
        parameter.grad = None
    largest = max((float(other.abs().max()) for other in expected.gradients.values()), default=1.0)
    differences = [float((gradients[name] - other).abs().max()) for name, other in expected.gradients.items()]
    return {
        "loss_difference": max(abs(own - other) for own, other in zip(losses, expected.losses, strict=True)),
        "gradient_difference": max(differences, default=0.0) / largest,
        "collectives": traffic.collectives,
        "bytes": traffic.num_bytes,
        "held_mib": round(training.held_bytes() / 2**20, 2),
    }


def _mean(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _work(rank: int, number: int, folder: str, mode: str, rounds: int, sizes: str) -> None:
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", number)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=_TIMEOUT)
    rows = measure(mode, rounds, sizes, torch.load(f"{folder}/alone.pt", weights_only=False))
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main(mode: str, number: int, rounds: int, sizes: str) -> list[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({name: alone(name, sizes) for name in SIDES}, f"{folder}/alone.pt")
        torch.multiprocessing.start_processes(
            _work, (number, folder, mode, rounds, sizes), nprocs=number, start_method="spawn"
        )
        return json.loads(Path(folder, "rows.json").read_text())


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    print(json.dumps(main(*json.loads(sys.argv[1]))))
