"""A parsed adapter of another program, and the adapter folder that it becomes."""

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
"""Names of transformers' Conv1D modules, in GPT-2 and similar models; linears of other models have them too."""
_EMBEDDINGS = ("embed_tokens", "lm_head", "word_embeddings", "wte", "shared", "embed_in", "embed_out")


@dataclass
class Imported:
    """Known facts about an adapter of another program.

    Attributes:
        directory: its folder, for error texts.
        sites: name → tensors.
        stacks: the sites that are stacks of experts.
        parameters: site whose weight is not called `weight` → the name of the weight.
        fan_in_fan_out: PEFT's claim that weights are (I, O), not (O, I): one value for all, that of the last module.
        transposed: site → whether its weight is (I, O), if this is known.
        bases: site → the fingerprint of its base weight, if the file contains the weight.
        kept: names of modules that were trained in full.
        kept_tensors: the tensors of these modules.
        class_name: the class of the model, or None if the folder does not say.
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
        """Adds modules that were trained in full.

        A tensor belongs to a module if its name starts with a path that ends in one of `modules`.

        Args:
            tensors: the tensors by name.
            modules: names of modules, or the ends of their names.
            with_tied: whether tensors of other modules are added too if they equal a tensor of these modules.

        Raises:
            MELoRAError: if a tensor belongs to none of them.
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
            MELoRAError: if this is not a valid adapter, in which case nothing is written, or `out` cannot be written.
        """
        tensors = dict(self.kept_tensors)
        for name, own in self.sites.items():
            tensors |= own.named(name)
        entries = {name: self._entry(name, self.sites[name]) for name in sorted(self.sites)}
        model = {"class": self.class_name} if self.class_name else {}
        write_adapter(out, tensors, {"sites": entries, "kept": self.kept, "model": model}, is_foreign=True)

    def _entry(self, name: str, own: AdapterTensors) -> dict[str, Any]:
        """Returns the header's entry for a site."""
        in_features, out_features = own.in_features, sum(own.part_sizes)
        is_transposed = self._is_transposed(name, in_features == out_features)
        shape = [in_features, out_features] if is_transposed else [out_features, in_features]
        if name in self.stacks:
            shape = [own.num_experts, *shape]
        base = {"shape": shape, "dtype": str(own.lora_b.dtype).removeprefix("torch."), "without_values": "imported"}
        entry = {"config": own.config.to_dict(), "base": self.bases.get(name, base), "is_transposed": is_transposed}
        return entry | ({"parameter": self.parameters[name]} if name in self.parameters else {})

    def _is_transposed(self, name: str, is_square: bool) -> bool | None:
        """Returns whether a weight is (I, O), or None if this is not known.

        PEFT is believed for square matrices if the module's name agrees; the shapes of other matrices show it.
        """
        if name in self.transposed or not is_square or name in self.stacks:
            return self.transposed.get(name)
        is_named_so = last_name(name) in CONV1D
        return self.fan_in_fan_out if is_named_so == self.fan_in_fan_out else None


def _why_not(name: str) -> str:
    """Returns why a tensor that belongs to no LoRA and no trained module is refused, and the remedy."""
    merge = "merge the adapter into the base with PEFT"
    if "lora_" in name:
        return (
            f"part of an adapter other than lora_A and lora_B of a linear, such as of an embedding or of DoRA: {merge}"
        )
    if name.rpartition(".")[0].endswith(_EMBEDDINGS):
        return (
            "which PEFT saves if the vocabulary was resized, or with `save_embedding_layers=True`: save the adapter "
            "with `save_embedding_layers=False`, and the resized base next to it"
        )
    return f"which belongs to no adapted module and none of `modules_to_save` (trained biases cannot be read): {merge}"


def _path_of(module: str, name: str) -> str | None:
    """Returns the start of a tensor's name that ends in `module`, with or without a dot before it, as in PEFT."""
    match = re.match(rf"(.*?{re.escape(module)})\.", name)
    return match[1] if match else None
