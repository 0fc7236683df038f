"""Makes `transformers.Trainer` write checkpoints that contain what is trained, but not the base."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from melora_fx.distributed.agreement import mesh_of, on_one_process
from melora_fx.distributed.tensors import whole
from melora_fx.errors import MELoRAError
from melora_fx.files import write_atomically, writing
from melora_fx.names import unwrap
from melora_fx.rewriting.hugging_face import (
    attach,
    has_save_pretrained,
    leave_in,
    leave_out,
    save_and_warn,
    save_by,
    save_whole,
)
from melora_fx.rewriting.sites import adapter_parameters, require_sites, sites

from .model_adapter import kept_tensor_names, tensors_by_name
from .save import save_adapter
from .tensor_file import write_tensors

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_RESUMED = (
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
)
"""The files that a Trainer resumes from, in the order of their removal. The main process writes them after us."""


class AdapterCheckpointCallback(TrainerCallback):
    """Makes a `Trainer` write only what it trains into its checkpoints: pass an instance to `Trainer(callbacks=[…])`.

    `checkpoint-N/` is an adapter folder, which `load_adapter` accepts. It contains the same tensors a second time, in
    `model.safetensors` under the model's own names: `resume_from_checkpoint` and `load_best_model_at_end` read those.
    Optimizer, schedule and random states are written as usual, and so is what `save_model` writes elsewhere.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Makes the model save only its trained tensors if the folder is called checkpoint-N.

        Raises:
            MELoRAError: if the model is not rewritten, and under DeepSpeed's ZeRO-3.
        """
        model: nn.Module = kwargs["model"]
        if getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0) == 3:
            raise MELoRAError(
                "`AdapterCheckpointCallback`: ZeRO-3 leaves no process with the whole adapter to write: leave the "
                "callback out, and call `save_adapter` inside `with deepspeed.zero.GatheredParameters(…):` after the "
                "training"
            )
        require_sites(model, "AdapterCheckpointCallback")
        inner = unwrap(model)
        prefix = _prefix(model)
        save_by(inner, functools.partial(_save_checkpoint, prefix=prefix))
        trained = _trained_tensors(inner, prefix)
        leave_out(inner, [name for name in model.state_dict() if name not in trained])

    on_train_begin = on_init_end  # for a second training, or a model that the Trainer itself has created

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Replaces what the Trainer has written with what is trained if the model has no `save_pretrained`. Also writes
        it if the model is sharded, because the Trainer's main process cannot write it by itself.
        """
        model = kwargs["model"]
        directory = Path(args.output_dir or ".", f"checkpoint-{state.global_step}")
        inner = unwrap(model)
        is_written = not has_save_pretrained(inner) and (directory / SAFE_WEIGHTS_NAME).exists()
        if sites(inner) and (is_written or _is_sharded(inner)):
            _write_trained(inner, directory, prefix=_prefix(model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the model save as before the training."""
        inner = unwrap(kwargs["model"])
        leave_in(inner)
        attach(inner)


def _prefix(model: nn.Module) -> str:
    """Returns the prefix of the names in the state dict that `model` is loaded from: a compiled model has one."""
    return "" if unwrap(model) is model else "_orig_mod."


def _save_checkpoint(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    prefix: str,
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """Stands in for `save_pretrained` of a Trainer's model. Writes no config.json, so that nobody mistakes the folder
    for a model.
    """
    if not sites(model):  # the rewritten part of this model has been folded since
        save_whole(model, save_directory, is_main_process=is_main_process, **options)
    elif not _CHECKPOINT.fullmatch(Path(save_directory).name):
        save_and_warn(model, save_directory, is_main_process=is_main_process, **options)
    elif is_main_process:
        _remove_old(Path(save_directory))
        if not _is_sharded(model):  # otherwise `on_save` writes
            _write_trained(model, Path(save_directory), prefix=prefix)


def _remove_old(directory: Path) -> None:
    """Removes the files that an earlier run has left to resume from, so that a kill leaves no weights next to another
    adapter. The weights are removed first, because a Trainer refuses to resume without them.
    """
    with writing(directory):
        for name in _RESUMED:
            (directory / name).unlink(missing_ok=True)


def _write_trained(model: nn.Module, directory: Path, *, prefix: str) -> None:
    """Writes the adapter, and the same tensors under the model's own names."""
    save_adapter(model, directory)
    tensors = _trained_tensors(model, prefix)

    def write() -> None:
        with writing(directory):
            write_atomically(directory / SAFE_WEIGHTS_NAME, lambda path: write_tensors(path, tensors, {"format": "pt"}))

    on_one_process(mesh_of(model), write)


def _is_sharded(model: nn.Module) -> bool:
    return mesh_of(model) is not None


def _trained_tensors(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Returns copies of the tensors in `model.state_dict()` that belong to adapters or were kept trainable, each name
    with `prefix`.
    """
    named = tensors_by_name(model)
    trained = [*adapter_parameters(model).values(), *(named[name] for name in kept_tensor_names(model))]
    wanted = {id(tensor) for tensor in trained}
    return {
        f"{prefix}{name}": whole(tensor.detach()).clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in wanted
    }
