"""`transformers.Trainer` writes checkpoints of what is trained, and not of the base beside it."""

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
"""What a Trainer resumes from, in the order in which it is removed; the main process writes all of it after us."""


class AdapterCheckpointCallback(TrainerCallback):
    """Lets a `Trainer` write only what it trains into its checkpoints: `Trainer(…, callbacks=[this])`.

    `checkpoint-N/` is an adapter folder, which `load_adapter` takes. It has the same tensors a second time, in
    `model.safetensors` under the model's own names: from those `resume_from_checkpoint` and `load_best_model_at_end` go
    on. Optimizer, schedule and random states are written as ever, and so is what `save_model` writes elsewhere.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """From here on the model saves its trained tensors alone, in folders called checkpoint-N.

        Raises:
            MELoRAError: for a model that is not rewritten, and under DeepSpeed's ZeRO-3.
        """
        model: nn.Module = kwargs["model"]
        if getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0) == 3:
            raise MELoRAError(
                "`AdapterCheckpointCallback`: ZeRO-3 leaves no process the whole adapter to write: leave the callback "
                "out, and call `save_adapter` inside `with deepspeed.zero.GatheredParameters(…):` after the training"
            )
        require_sites(model, "AdapterCheckpointCallback")
        inner = unwrap(model)
        prefix = _prefix(model)
        save_by(inner, functools.partial(_save_checkpoint, prefix=prefix))
        trained = _trained_tensors(inner, prefix)
        leave_out(inner, [name for name in model.state_dict() if name not in trained])

    on_train_begin = on_init_end  # a second training, or a model that the Trainer has made itself

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Replaces what the Trainer has written of a model that has no `save_pretrained`; writes what is trained of one
        that is sharded, which the Trainer's main process could not do alone.
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
        """The model saves as before."""
        inner = unwrap(kwargs["model"])
        leave_in(inner)
        attach(inner)


def _prefix(model: nn.Module) -> str:
    """What stands before the names in the state that `model` is loaded from: a compiled one's have one."""
    return "" if unwrap(model) is model else "_orig_mod."


def _save_checkpoint(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    prefix: str,
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """`save_pretrained` of a Trainer's model; without a config.json, so that no one takes the folder for a model."""
    if not sites(model):  # folded since, as a part of this model
        save_whole(model, save_directory, is_main_process=is_main_process, **options)
    elif not _CHECKPOINT.fullmatch(Path(save_directory).name):
        save_and_warn(model, save_directory, is_main_process=is_main_process, **options)
    elif is_main_process:
        _remove_old(Path(save_directory))
        if not _is_sharded(model):  # else `on_save` does
            _write_trained(model, Path(save_directory), prefix=prefix)


def _remove_old(directory: Path) -> None:
    """Removes what an earlier run has left here to be resumed from: a kill leaves no weights beside another adapter.

    The weights go first, without which a Trainer refuses to resume.
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
    """What `model.state_dict()` has of the adapters and of the modules kept trainable, `prefix` before each name;
    copies.
    """
    named = tensors_by_name(model)
    trained = [*adapter_parameters(model).values(), *(named[name] for name in kept_tensor_names(model))]
    wanted = {id(tensor) for tensor in trained}
    return {
        f"{prefix}{name}": whole(tensor.detach()).clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in wanted
    }
