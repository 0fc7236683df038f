"""`transformers.Trainer` writes checkpoints of what is trained, and not of the base beside it."""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from .adapter import adapter_parameters, require_sites
from .rewrite import warn_on_save_pretrained
from .rewritten import unwrap
from .state import kept_names, save_adapter

_UNSAVED = "_keys_to_ignore_on_save"
"""Attribute of a Hugging Face model: keys that a Trainer does not miss in a checkpoint."""


class AdapterCheckpointCallback(TrainerCallback):
    """Lets a `Trainer` write only what it trains into its checkpoints: `Trainer(…, callbacks=[this])`.

    `checkpoint-N/` is an adapter folder, which `load_adapter` takes. It has the same tensors a second time, in
    `model.safetensors` under the model's own names: from those `resume_from_checkpoint` and `load_best_model_at_end` go
    on. Optimizer, schedule and random states are written as ever. After the training `save_model` is again what it was.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """From here on the model saves its trained tensors alone.

        Raises:
            MELoRAError: for a model that is not rewritten.
        """
        model: nn.Module = kwargs["model"]
        require_sites(model, "AdapterCheckpointCallback")
        inner = unwrap(model)
        if not hasattr(type(inner), "save_pretrained"):
            return
        vars(inner)["save_pretrained"] = functools.partial(_save_trained, model)
        trained = _trained_tensors(model)
        vars(inner)[_UNSAVED] = [name for name in model.state_dict() if name not in trained]

    on_train_begin = on_init_end  # a second training, or a model that the Trainer has made itself

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Replaces what the Trainer has written of a model that has no `save_pretrained`."""
        model, directory = kwargs["model"], Path(args.output_dir or ".", f"checkpoint-{state.global_step}")
        if not hasattr(type(unwrap(model)), "save_pretrained") and (directory / SAFE_WEIGHTS_NAME).exists():
            _save_trained(model, directory)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model saves as before."""
        inner = unwrap(kwargs["model"])
        vars(inner).pop(_UNSAVED, None)
        warn_on_save_pretrained(inner)


def _save_trained(
    model: nn.Module, save_directory: str | os.PathLike[str], *, is_main_process: bool = True, **_: Any
) -> None:
    """`save_pretrained` during a training; without a config.json, so that no one takes the folder for a model."""
    if is_main_process:
        save_adapter(model, save_directory)
        save_file(_trained_tensors(model), Path(save_directory, SAFE_WEIGHTS_NAME), {"format": "pt"})


def _trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What `model.state_dict()` has of the adapters and of the modules kept trainable; copies."""
    inner = unwrap(model)
    own = inner.state_dict(keep_vars=True)
    wanted = {id(tensor) for tensor in adapter_parameters(inner).values()} | {
        id(own[name]) for name in kept_names(inner)
    }
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in wanted
    }
