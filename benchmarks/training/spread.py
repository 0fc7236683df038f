"""Spreads a Llama over processes with torch's own means: data, sharded data, tensor and sequence parallel.

The model can have our adapters, PEFT's, or none.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

BY_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BY_ROWS = ("self_attn.o_proj", "mlp.down_proj")


def make_mesh(*sizes: int) -> Any:
    """Returns a mesh of all processes with the dimension "tp", or with "dp" and "tp"."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])


def tensor_parallel(model: Any, mesh: Any, *, sequence: bool = False) -> nn.Module:
    """Shards linears by columns and by rows, with torch's styles; norms and what is between by tokens if `sequence`."""
    from torch.distributed.tensor.parallel import parallelize_module

    plan: dict[str, Any] = {}
    for layer in _layer_names(model):
        plan |= _layer_plan(model, layer, sequence=sequence)
    if sequence:
        plan |= _plan_around(next(_layer_names(model)), model)
    return parallelize_module(model, mesh, plan)


def _layer_names(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if _is_layer(module))


def _is_layer(module: nn.Module) -> bool:
    return type(module).__name__.endswith("DecoderLayer")


def _layer_plan(model: nn.Module, layer: str, *, sequence: bool) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel

    names = {name for name, _ in model.named_modules()}
    output: dict[str, Any] = {"output_layouts": Shard(1)} if sequence else {}
    plan: dict[str, Any] = {}
    for name in (f"{layer}.{name}" for name in BY_COLUMNS):
        if f"{name}.base_layer" in names:  # PEFT's LoRA: A is whole on each process
            plan |= {f"{name}.base_layer": ColwiseParallel(), f"{name}.lora_B.default": ColwiseParallel()}
        else:
            plan[name] = ColwiseParallel()
    for name in (f"{layer}.{name}" for name in BY_ROWS):
        if f"{name}.base_layer" in names:  # B is whole on each process; if `sequence`, it gets gradients of some tokens
            own = {f"{name}.base_layer": RowwiseParallel(**output), f"{name}.lora_A.default": RowwiseParallel(**output)}
            plan |= own | ({f"{name}.lora_B.default": SequenceParallel(use_local_output=True)} if sequence else {})
        else:
            plan[name] = RowwiseParallel(**output)
    if sequence:
        is_pefts = f"{layer}.{BY_ROWS[0]}.base_layer" in names  # PEFT's A accepts no DTensor
        plan |= {f"{layer}.{name}_layernorm": SequenceParallel() for name in ("input", "post_attention")}
        plan[f"{layer}.self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
            use_local_output=is_pefts,
        )
        plan[f"{layer}.mlp"] = PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=is_pefts
        )
    return plan


def _plan_around(first_layer: str, model: nn.Module) -> dict[str, Any]:
    """Returns the plan before and after the layers. The embedding's output stays whole: positions are made from it."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, SequenceParallel

    norm = first_layer.replace("layers.0", "norm")
    head = next(name for name, _ in model.named_modules() if name.endswith("lm_head"))
    split = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True)
    gathered = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return {first_layer: split, norm: SequenceParallel(), head: gathered}


def fully_sharded(model: Any, mesh: Any, *, each: str = "layer", **options: Any) -> Any:
    """Calls `fully_shard` on each layer, or on each of its linears, and then on the rest; passes `options` to it."""
    from torch.distributed.fsdp import fully_shard

    for name, module in model.named_modules():
        if name.endswith((*BY_COLUMNS, *BY_ROWS)) if each == "linear" else _is_layer(module):
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def spread(mode: str, model: Any) -> tuple[Any, int, int]:
    """Spreads the model; returns it, the index of the batch's part for this process, and the number of parts.

    `mode`: "DDP", "FSDP by layer", "FSDP by linear", "TP", "TP and sequence", "FSDP and TP".
    """
    number = dist.get_world_size()
    own = (dist.get_rank(), number)
    if mode == "DDP":
        is_trained = any(parameter.requires_grad for parameter in model.parameters())
        return (nn.parallel.DistributedDataParallel(model) if is_trained else model), *own
    if mode.startswith("FSDP by"):
        return fully_sharded(model, make_mesh(number), each=mode.rpartition(" ")[2]), *own
    if mode != "FSDP and TP":
        return tensor_parallel(model, make_mesh(number), sequence="sequence" in mode), 0, 1
    mesh = make_mesh(2, number // 2)
    tensor_parallel(model, mesh["tp"])
    return fully_sharded(model, mesh["dp"]), mesh["dp"].get_local_rank(), 2


MODES = ("DDP", "FSDP by layer", "FSDP by linear", "TP", "TP and sequence", "FSDP and TP")
