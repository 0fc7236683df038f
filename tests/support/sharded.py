"""A small Llama, ways to spread it over processes, and its training."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import melora_fx
from benchmarks.training.spread import spread
from melora_fx import MELoRAConfig
from melora_fx.distributed.tensors import put, whole

CONFIG = MELoRAConfig(rank=[1, 2, 3, 2], num_blocks=4, alpha=8.0)
VOCABULARY = 96


def llama(**settings: Any) -> LlamaForCausalLM:
    """Returns a Llama of two layers with grouped queries, whose random weights are the same in each process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | settings)))


def adapted(config: MELoRAConfig = CONFIG, **settings: Any) -> LlamaForCausalLM:
    """Returns `llama`, rewritten, with filled A and B."""
    return fill(melora_fx.rewrite(llama(**settings), "all-linear", config))


def fill(model: Any, seed: int = 1) -> Any:
    """Fills A and B up to their ranks, with values that are the same in each process."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in melora_fx.sites(model).values():
            for block, rank in enumerate(site.config.ranks):
                size = (site.lora_a.size(2), rank)
                site.lora_a[block, :rank] = torch.randn(size, generator=generator).T * 0.1
                site.lora_b[block, :, :rank] = torch.randn(site.lora_b.size(1), rank, generator=generator) * 0.05
    return model


def token_ids(rows: int = 4, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(seed))


def train(
    model: nn.Module, ids: torch.Tensor, steps: int = 3, *, parameters: Iterable[nn.Parameter] | None = None
) -> list[float]:
    """Returns the losses of some steps of AdamW, with an eps so large that noise in small gradients makes no steps."""
    trained = list(melora_fx.adapter_parameters(model).values() if parameters is None else parameters)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def own_rows(ids: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Returns the rows of a batch that this process trains on."""
    return ids.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def averaged(losses: list[float], group: Any = None) -> list[float]:
    """Returns the mean over the processes of their losses; each process has equally many rows."""
    values = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(values, group=group)
    return (values / dist.get_world_size(group)).tolist()


def distributed_data_parallel(model: nn.Module, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the gradients of the adapter's parameters as whole tensors."""
    return {
        name: whole(parameter.grad).clone()
        for name, parameter in melora_fx.adapter_parameters(model).items()
        if parameter.grad is not None
    }


def with_config(**changes: Any) -> MELoRAConfig:
    return replace(CONFIG, **changes)


def put_adapter(model: Any, config: MELoRAConfig = CONFIG) -> Any:
    """Copies the values of `adapted(config)` into a model that may be sharded, without a collective."""
    for name, site in melora_fx.sites(adapted(config)).items():
        own = melora_fx.sites(model)[name]
        put(own.lora_a, site.lora_a.detach())
        put(own.lora_b, site.lora_b.detach())
    return model


def spread_with(mode: str, model: Any, ids: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """Spreads the model over all processes; returns it and the rows of the batch that this process trains on."""
    spread_model, index, number = spread(mode, model)
    return spread_model, ids.chunk(number)[index]
