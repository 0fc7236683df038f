"""An adapter without a model: the contents of a folder, and the hash that identifies them."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from melora_fx.adapter.tensors import AdapterTensors, as_matrices, factor_names, num_matrices
from melora_fx.config import MELoRAConfig
from melora_fx.errors import MELoRAError
from melora_fx.matching.keep_trainable import is_within


@dataclass(frozen=True)
class Adapter:
    """The adapter folder as read from disk: everything that its consumers need, without a model.

    Attributes:
        directory: the folder that it was read from, for error texts.
        configs: the configuration of each site.
        fingerprints: the fingerprint of each site's base weight; a site without one is not checked.
        transposed: whether each site's base weight is stored as (I, O). Files of early versions have no entry.
        kept: names of the modules and parameters that were kept trainable.
        model: known facts about the model that it was trained in, such as its class, number of labels, and the tensors
            that are tied to kept ones.
        tensors: `<site>.lora_a` (N, P·R, I/N), `<site>.lora_b` (N, O/N, R), and the kept tensors.
        row_dims: as in `as_matrices`, for the sites that have it.
        parameters: the weight's name in its module, for the sites whose weight is not called `weight`.
        header: the whole header of its file.
    """

    directory: Path
    configs: dict[str, MELoRAConfig]
    fingerprints: dict[str, dict[str, Any]]
    transposed: dict[str, bool]
    kept: tuple[str, ...]
    model: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(repr=False)
    row_dims: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_foreign(self) -> bool:
        """Whether another program has trained the adapter, and it has not been saved from a model since."""
        return any(base.get("without_values") == "imported" for base in self.fingerprints.values())

    @functools.cached_property
    def sha256(self) -> str:
        """The adapter's identity: see `hash_adapter`."""
        return hash_adapter(self.configs, self.tensors)

    def tensors_of(self, site: str) -> AdapterTensors:
        """Returns A and B of a site, with its configuration."""
        return AdapterTensors.of(site, self.configs[site], self.tensors)

    def matrices_of(self, site: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns the base weight of a site as a matrix or a stack of matrices in its stored orientation: a view."""
        return as_matrices(weight, self.row_dims.get(site))

    def oriented(self, site: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns the base weight of a site as (O, I), or (E, O, I) for a stack: a view of `weight`, which is passed as
        it is stored.

        Raises:
            MELoRAError: if the weight is square and the adapter does not say its orientation, or if the orientation
                contradicts the shapes of the adapter's tensors.
        """
        matrices = self.matrices_of(site, weight)
        is_transposed = self.transposed.get(site)
        is_square = matrices.size(-2) == matrices.size(-1)
        if is_transposed is None and is_square:
            raise MELoRAError(
                f"`{site}` of `{self.directory}`: its square weight may be (out, in) or (in, out), and adapters of "
                "other programs or early versions do not say which: load it into the model and save it again"
            )
        blocks, _, width = self.tensors_of(site).lora_a.shape
        is_wide = blocks // num_matrices(matrices) * width != matrices.size(-1)
        if is_transposed not in (None, is_wide) and not is_square:
            raise MELoRAError(
                f"`{site}` of `{self.directory}`: the orientation in its header contradicts the shapes of its tensors"
            )
        lies_transposed = is_transposed if is_square else is_wide
        return matrices.mT if lies_transposed else matrices

    def tensors_kept_by(self, kept: str) -> list[str]:
        """Returns the names of the tensors that belong to the module or parameter `kept`."""
        return [name for name in self.kept_tensors() if is_within(name, kept)]

    def kept_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that belong to no site, such as those of a trained head."""
        own = {name for site in self.configs for name in factor_names(site)}
        return {name: tensor for name, tensor in self.tensors.items() if name not in own}


def hash_adapter(configs: Mapping[str, MELoRAConfig], tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the SHA-256 of the sites' configurations and all tensors, the same for a model and its adapter folder."""
    return _hash(json.dumps({name: configs[name].to_dict() for name in sorted(configs)}), tensors)


def hash_file(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the SHA-256 of all tensors and of the header without its entry `sha256`, which must be this hash."""
    rest = {name: value for name, value in header.items() if name != "sha256"}
    return _hash(json.dumps(rest, sort_keys=True), tensors)


def _hash(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
