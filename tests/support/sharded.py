"""A small Llama, ways to spread it over processes, and its training."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import melora_fx
from melora_fx import MELoRAConfig
from melora_fx.distributed.tensors import put, whole

CONFIG = MELoRAConfig(rank=[1, 2, 3, 2], num_blocks=4, alpha=8.0)
BY_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BY_ROWS = ("self_attn.o_proj", "mlp.down_proj")
VOCABULARY = 96


def llama(**settings: Any) -> LlamaForCausalLM:
    """Two layers with grouped queries, and random weights that are the same in each process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | settings)))


def adapted(config: MELoRAConfig = CONFIG, **settings: Any) -> LlamaForCausalLM:
    """`llama`, rewritten, with values in B."""
    return fill(melora_fx.rewrite(llama(**settings), "all-linear", config))


def fill(model: Any, seed: int = 1) -> Any:
    """Values in A and B, as many as the ranks say, that are the same in each process."""
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
    """The losses of some steps, by AdamW with an eps that does not make steps of the noise of small gradients."""
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
    """The rows of a batch that this process trains on."""
    return ids.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def averaged(losses: list[float], group: Any = None) -> list[float]:
    """The mean over the processes of what each has lost on rows of its own, which are as many on each."""
    values = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(values, group=group)
    return (values / dist.get_world_size(group)).tolist()


def mesh(*sizes: int, names: tuple[str, ...] = ("dp", "tp")) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names[-len(sizes) :])


def tensor_parallel(model: nn.Module, tp_mesh: Any, *, sequence: bool = False) -> nn.Module:
    """By torch's own styles: by columns and by rows, and the norms and what is between by tokens if `sequence`."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {}
    layout = {"output_layouts": Shard(1)} if sequence else {}
    for index in range(model.config.num_hidden_layers):
        layer = f"model.layers.{index}"
        plan |= {f"{layer}.{name}": ColwiseParallel() for name in BY_COLUMNS}
        plan |= {f"{layer}.{name}": RowwiseParallel(**layout) for name in BY_ROWS}
        if sequence:
            plan |= {f"{layer}.{name}_layernorm": SequenceParallel() for name in ("input", "post_attention")}
            plan[f"{layer}.self_attn"] = PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            )
            plan[f"{layer}.mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    if sequence:  # the model makes its positions of what the embedding gives, which stays whole
        plan["model.layers.0"] = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
        )
        plan["model.norm"] = SequenceParallel()
        plan["lm_head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return parallelize_module(model, tp_mesh, plan)


def fully_sharded(model: nn.Module, dp_mesh: Any, *, each: str = "layer", **options: Any) -> nn.Module:
    """By `fully_shard`: each layer or each linear, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        is_linear = hasattr(module, "lora_a")
        if is_linear if each == "linear" else type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module, mesh=dp_mesh, **options)
    fully_shard(model, mesh=dp_mesh, **options)
    return model


def distributed_data_parallel(model: nn.Module, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of the adapter's parameters, whole."""
    return {
        name: whole(parameter.grad).clone()
        for name, parameter in melora_fx.adapter_parameters(model).items()
        if parameter.grad is not None
    }


def with_config(**changes: Any) -> MELoRAConfig:
    return replace(CONFIG, **changes)


def put_adapter(model: Any, config: MELoRAConfig = CONFIG) -> Any:
    """The values of `adapted(config)` in a model that may be sharded: no collective."""
    for name, site in melora_fx.sites(adapted(config)).items():
        own = melora_fx.sites(model)[name]
        put(own.lora_a, site.lora_a.detach())
        put(own.lora_b, site.lora_b.detach())
    return model


def by_data(model: Any, ids: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    return distributed_data_parallel(model), own_rows(ids)


def by_layer(model: Any, ids: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    return fully_sharded(model, mesh(dist.get_world_size())), own_rows(ids)


def by_linear(model: Any, ids: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    return fully_sharded(model, mesh(dist.get_world_size()), each="linear"), own_rows(ids)


def by_tensor(model: Any, ids: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    return tensor_parallel(model, mesh(dist.get_world_size())), ids


def by_sequence(model: Any, ids: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    return tensor_parallel(model, mesh(dist.get_world_size()), sequence=True), ids


def in_two_dimensions(model: Any, ids: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    both = mesh(2, dist.get_world_size() // 2)
    tensor_parallel(model, both["tp"])
    return fully_sharded(model, both["dp"]), own_rows(ids, both["dp"].get_group())


MODES: dict[str, Callable[[Any, torch.Tensor], tuple[nn.Module, torch.Tensor]]] = {
    "DDP": by_data,
    "FSDP by layer": by_layer,
    "FSDP by linear": by_linear,
    "TP": by_tensor,
    "TP and sequence": by_sequence,
    "FSDP and TP": in_two_dimensions,
}
"""Ways to spread a model over all processes: each gives it with the rows of the batch that a process trains on."""
