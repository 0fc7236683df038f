"""An adapter of another program's, taken apart, and the folder that it becomes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from exporters.adapters.derived import are_equal
from melora_fx import MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.saving.adapter_file import write_adapter

from .names import last_name

CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}
"""Names of transformers' Conv1D, of GPT-2 and its like; in other models linears have them too."""
_EMBEDDINGS = ("embed_tokens", "lm_head", "word_embeddings", "wte", "shared", "embed_in", "embed_out")


@dataclass
class Imported:
    """What is known of it.

    Attributes:
        directory: where it was, for error texts.
        sites: name → tensors.
        stacks: those of the sites that are stacks of experts.
        parameters: those of the sites whose weight is not called `weight` → its name.
        fan_in_fan_out: PEFT's word on how weights lie, (I, O) or (O, I): one for all, and that of the last module.
        transposed: the truth, of sites where it is known.
        bases: fingerprints of base weights, where the file has these too.
        kept: names of modules that were trained whole.
        kept_tensors: their tensors.
        class_name: of the model, where it is said.
    """

    directory: Path
    sites: dict[str, AdapterTensors] = field(default_factory=dict)
    stacks: set[str] = field(default_factory=set)
    parameters: dict[str, str] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    transposed: dict[str, bool] = field(default_factory=dict)
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    kept_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    class_name: str | None = None

    def add_kept(self, tensors: Mapping[str, torch.Tensor], modules: Iterable[str], *, with_tied: bool = False) -> None:
        """Adds modules that were trained whole: tensors whose path has a name of `modules`, or the end of one, in it.

        `with_tied`: also those that are equal to one of these.

        Raises:
            MELoRAError: for tensors that belong to none of them.
        """
        modules = list(modules)
        owners = {
            name: next((path for module in modules if (path := _path_of(module, name))), None) for name in tensors
        }
        trained = [tensors[name] for name, owner in owners.items() if owner is not None]
        for name in [name for name, owner in owners.items() if owner is None]:
            if not (with_tied and any(are_equal(tensors[name], each) for each in trained)):
                raise MELoRAError(f"`{self.directory}` holds `{name}`, {_why_not(name)}")
            owners[name] = name.rpartition(".")[0]
        self.kept_tensors = dict(tensors)
        self.kept = sorted({owner for owner in owners.values() if owner is not None})

    def write(self, out: Path) -> None:
        """Writes the adapter folder.

        Raises:
            MELoRAError: for what no adapter is made of, before anything is written, and a place that cannot be written.
        """
        tensors = dict(self.kept_tensors)
        for name, own in self.sites.items():
            tensors |= own.named(name)
        entries = {name: self._entry(name, self.sites[name]) for name in sorted(self.sites)}
        model = {"class": self.class_name} if self.class_name else {}
        write_adapter(out, tensors, {"sites": entries, "kept": self.kept, "model": model}, is_foreign=True)

    def _entry(self, name: str, own: AdapterTensors) -> dict[str, Any]:
        """What the header says of a site."""
        in_features, out_features = own.in_features, sum(own.part_sizes)
        is_transposed = self._is_transposed(name, in_features == out_features)
        shape = [in_features, out_features] if is_transposed else [out_features, in_features]
        if name in self.stacks:
            shape = [own.num_experts, *shape]
        base = {"shape": shape, "dtype": str(own.lora_b.dtype).removeprefix("torch."), "without_values": "imported"}
        entry = {"config": own.config.to_dict(), "base": self.bases.get(name, base), "is_transposed": is_transposed}
        return entry | ({"parameter": self.parameters[name]} if name in self.parameters else {})

    def _is_transposed(self, name: str, is_square: bool) -> bool | None:
        """How the weight lies: as is known, or as PEFT says where it can be believed; of others their shape tells."""
        if name in self.transposed or not is_square or name in self.stacks:
            return self.transposed.get(name)
        is_named_so = last_name(name) in CONV1D
        return self.fan_in_fan_out if is_named_so == self.fan_in_fan_out else None


def _why_not(name: str) -> str:
    """Why a tensor that belongs to no LoRA and to no trained module is not read, and what to do."""
    merge = "merge the adapter into the base with PEFT"
    if "lora_" in name:
        return f"a part of an adapter that is no lora_A or lora_B of a linear, as of an embedding or of DoRA: {merge}"
    if name.rpartition(".")[0].endswith(_EMBEDDINGS):
        return (
            "which PEFT saves of its own where the vocabulary was resized, and by `save_embedding_layers=True`: save "
            "the adapter with `save_embedding_layers=False`, and the resized base beside it"
        )
    return f"which is of no adapted module and of none of `modules_to_save` (trained biases are not read): {merge}"


def _path_of(module: str, name: str) -> str | None:
    """The path at the beginning of a tensor's name that ends in `module`, without a dot before it too, as in PEFT."""
    match = re.match(rf"(.*?{re.escape(module)})\.", name)
    return match[1] if match else None
