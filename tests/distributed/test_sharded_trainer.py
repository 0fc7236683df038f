"""`AdapterCheckpointCallback` in several processes: under DDP, and sharded by accelerate's FSDP2 plugin."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import run_processes
from support.sharded import adapted, token_ids
from torch.utils.data import Dataset

import melora_fx
from melora_fx import AdapterCheckpointCallback


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Texts that are their own labels."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = token_ids(1, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def _trained(folder: str, number: int, is_sharded: bool, resumed: str | None = None) -> list[float]:
    """Returns the losses of a Trainer's steps."""
    from transformers import Trainer, TrainingArguments

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    settings = TrainingArguments(
        folder,
        per_device_train_batch_size=4 // number,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(adapted(), settings, train_dataset=Rows(), callbacks=[AdapterCheckpointCallback()])
    if is_sharded:
        _shard(trainer)
    trainer.train(resume_from_checkpoint=resumed)
    wrapper = type(trainer.model_wrapped).__name__
    assert wrapper == ("FSDPLlamaForCausalLM" if is_sharded else "DistributedDataParallel")
    melora_fx.save_adapter(trainer.model, f"{folder}/final")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _shard(trainer: Any) -> None:
    """Does what `accelerate launch --use_fsdp --fsdp_version 2` does on GPUs: on CPUs accelerate chooses DDP."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=True,
    )
    trainer.is_fsdp_enabled = True


@pytest.mark.situation(
    "Several processes",
    "`AdapterCheckpointCallback` under DDP and accelerate's FSDP2",
    "resumes with the same losses and adapter",
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_sharded", [False, True], ids=["DDP", "FSDP2"])
def test_a_trainer_writes_adapters_and_resumes(is_sharded: bool, tmp_path: Path) -> None:
    whole, other = run_processes(2, _trained, str(tmp_path / "whole"), 2, is_sharded)
    assert whole == other
    last, final = (tmp_path / "whole" / name / "adapter.safetensors" for name in ("checkpoint-4", "final"))
    assert last.read_bytes() == final.read_bytes()
    trained = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert all(name.endswith((".lora_a", ".lora_b")) for name in trained)
    melora_fx.load_adapter(adapted(), final.parent)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed, _ = run_processes(2, _trained, str(tmp_path / "resumed"), 2, is_sharded, checkpoint)
    assert resumed == pytest.approx(whole, abs=1e-5)
    first = (tmp_path / "resumed" / "final" / "adapter.safetensors").read_bytes()
    assert first == final.read_bytes()
