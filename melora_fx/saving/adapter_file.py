"""Adapter folders: `adapter.safetensors`, whose header holds the configuration that is read, and a readable copy.

`<site>.lora_a` (N, P·R, I/N) and `<site>.lora_b` (N, O/N, R), small ranks padded with zeros, and what was kept
trainable, the tensors of modules and single parameters, under their own names. A stack of E matrices has E·N blocks,
expert by expert. The header's `melora` entry is JSON: format_version, versions, and for each site its configuration and
how its base weight lies, with its fingerprint. One rename decides; nothing is ever unpickled.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from melora_fx.adapter.tensors import AdapterTensors, as_matrices, factor_names, num_matrices
from melora_fx.config import MELoRAConfig
from melora_fx.errors import MELoRAError
from melora_fx.files import made_folder, write_together
from melora_fx.versions import package_version

from .tensor_file import write_tensors

FORMAT_VERSION = 1
TENSORS_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
_HEADER_KEY = "melora"


@dataclass(frozen=True)
class Adapter:
    """An adapter folder as read: everything that any consumer of it needs, without a model.

    Attributes:
        directory: where it came from, for error texts.
        configs: configuration of each site.
        fingerprints: of each site's base weight; a site without one is not checked.
        transposed: whether each site's base weight is (I, O); a site without an entry was saved before this was.
        kept: names of the modules and parameters that were kept trainable.
        model: class of the model that it was trained in and its number of labels, as far as known.
        tensors: `<site>.lora_a`, `<site>.lora_b` and the kept tensors.
        row_dims: as in `as_matrices`, of the sites that have any.
    """

    directory: Path
    configs: dict[str, MELoRAConfig]
    fingerprints: dict[str, dict[str, Any]]
    transposed: dict[str, bool]
    kept: tuple[str, ...]
    model: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(repr=False)
    row_dims: dict[str, int] = field(default_factory=dict)

    @functools.cached_property
    def sha256(self) -> str:
        """The adapter's identity: see `hash_adapter`."""
        return hash_adapter(self.configs, self.tensors)

    def tensors_of(self, site: str) -> AdapterTensors:
        """A and B of a site, with its configuration."""
        return AdapterTensors.of(site, self.configs[site], self.tensors)

    def matrices_of(self, site: str, weight: torch.Tensor) -> torch.Tensor:
        """The base weight of a site as a matrix or a stack of such, which lie transposed or not: a view."""
        return as_matrices(weight, self.row_dims.get(site))

    def oriented(self, site: str, weight: torch.Tensor) -> torch.Tensor:
        """The base weight of a site as (O, I), or (E, O, I) for a stack, a view of the one given as it is stored.

        Raises:
            MELoRAError: for a square weight in an adapter that does not say which way it lies, and where what it says
                cannot be.
        """
        matrices = self.matrices_of(site, weight)
        is_transposed = self.transposed.get(site)
        is_square = matrices.size(-2) == matrices.size(-1)
        if is_transposed is None and is_square:
            raise MELoRAError(
                f"`{site}` of `{self.directory}`: its square weight may be (out, in) or (in, out), which an adapter "
                "saved by an early version does not say: load it into the model and save it again"
            )
        blocks, _, width = self.tensors_of(site).lora_a.shape
        is_wide = blocks // num_matrices(matrices) * width != matrices.size(-1)
        if is_transposed not in (None, is_wide) and not is_square:
            raise MELoRAError(f"`{site}` of `{self.directory}`: what its header says of its weight belies its tensors")
        lies_transposed = is_transposed if is_square else is_wide
        return matrices.mT if lies_transposed else matrices

    def kept_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are not an adapter's: trained heads."""
        own = {name for site in self.configs for name in factor_names(site)}
        return {name: tensor for name, tensor in self.tensors.items() if name not in own}


def hash_adapter(configs: Mapping[str, MELoRAConfig], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the sites' configurations and all tensors: the same for a model and for its adapter folder."""
    digest = hashlib.sha256()
    digest.update(json.dumps({name: configs[name].to_dict() for name in sorted(configs)}).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """An adapter folder, checked.

    Raises:
        MELoRAError: where the folder or its file is missing, truncated, corrupt, or of another format.
    """
    path = Path(directory) / TENSORS_FILE
    if not path.is_file():
        raise MELoRAError(f"`{directory}` is not an adapter folder: it has no {TENSORS_FILE}")
    text, tensors = _read_file(path)
    try:
        adapter = _parse(json.loads(text), tensors, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MELoRAError(f"the header of `{path}` cannot be read: {type(error).__name__}: {error}") from error
    needed = [name for site in adapter.configs for name in factor_names(site)]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise MELoRAError(f"`{path}` lacks the tensors {', '.join(map(repr, missing))}")
    return adapter


def _read_file(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The header's text and the tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise MELoRAError(f"`{path}` cannot be read, it is truncated or corrupt: {error}") from error
    if text is None:
        raise MELoRAError(f"`{path}` was not written by `save_adapter`: its header has no `{_HEADER_KEY}` entry")
    return text, tensors


def _parse(header: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path) -> Adapter:
    """The adapter of a header; what is wrong with the header shows as a KeyError, TypeError, … of its use."""
    version = header["format_version"]
    if version > FORMAT_VERSION:
        raise MELoRAError(f"`{path}` has format_version {version}; this melora_fx reads up to {FORMAT_VERSION}")
    entries = header["sites"].items()
    return Adapter(
        directory=path.parent,
        configs={name: MELoRAConfig.from_dict(entry["config"]) for name, entry in entries},
        fingerprints={name: entry["base"] for name, entry in entries if entry.get("base")},
        transposed={name: entry["is_transposed"] for name, entry in entries if "is_transposed" in entry},
        kept=tuple(header["kept"]),
        model=header["model"],
        tensors=tensors,
        row_dims={name: entry["row_dims"] for name, entry in entries if "row_dims" in entry},
    )


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    """Writes an adapter folder; made where there is none. A crash leaves the old adapter or the new one.

    One adapter gives the same bytes each time.

    Args:
        directory: the folder.
        tensors: as in `Adapter.tensors`.
        header: "sites", "kept" and "model"; format and versions are added.

    Raises:
        MELoRAError: for a folder that cannot be written.
    """
    versions = {"torch": torch.__version__, "melora_fx": package_version("melora_fx")}
    text = json.dumps({"format_version": FORMAT_VERSION, "versions": versions} | header, indent=2)
    metadata = {"format": "pt", _HEADER_KEY: text}
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    try:
        with made_folder(directory):
            write_together(
                directory,
                {
                    CONFIG_FILE: lambda path: path.write_text(text + "\n"),
                    TENSORS_FILE: lambda path: write_tensors(path, on_cpu, metadata),
                },
            )
    except OSError as error:
        raise MELoRAError(f"`{directory}` cannot be written: {error.strerror or error}") from error
