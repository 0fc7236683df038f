"""Adapter folders: `adapter.safetensors`, whose header contains the configuration in use, and a readable copy of it.

The tensors are `<site>.lora_a` (N, P·R, I/N) and `<site>.lora_b` (N, O/N, R), with small ranks padded with zeros, and
the tensors of modules and single parameters kept trainable, under their own names. A stack of E matrices has E·N
blocks, expert by expert. The header's `melora` entry is JSON, see `header`. A single rename replaces the old adapter.
Nothing is ever unpickled.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from melora_fx.errors import MELoRAError
from melora_fx.files import made_folder, write_together, writing
from melora_fx.versions import package_version

from .adapter import Adapter, hash_file
from .header import FORMAT_VERSION, parse_header
from .tensor_file import read_tensors, write_tensors
from .well_formed import refuse_malformed

TENSORS_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
_HEADER_KEY = "melora"
_COPY = {"about": f"a copy to read, of the header of {TENSORS_FILE}: changes here have no effect"}


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter folder and checks it. Every consumer of adapters reads them here.

    The tensors are copies, so later changes of the file do not affect them.

    Raises:
        MELoRAError: if the folder or its file is missing, truncated, corrupt, changed since it was written, of another
            format, or not what `save_adapter` writes, or if a value is NaN or infinite.
    """
    path = Path(directory) / TENSORS_FILE
    tensors, metadata = read_tensors(path, "an adapter folder")
    if _HEADER_KEY not in metadata:
        raise MELoRAError(f"`{path}` was not written by `save_adapter`: its header has no `{_HEADER_KEY}` entry")
    return _checked(path, metadata[_HEADER_KEY], tensors)


def _checked(path: Path, text: str, tensors: dict[str, torch.Tensor]) -> Adapter:
    """Returns the adapter of a header and tensors after all checks; `path` names it in error texts."""
    try:
        header = parse_header(text)
    except (ValueError, TypeError) as error:
        raise MELoRAError(f"the header of `{path}` cannot be read: {error}") from error
    adapter = Adapter(
        directory=path.parent,
        configs={name: site.config for name, site in header.sites.items()},
        fingerprints={name: site.base for name, site in header.sites.items() if site.base},
        transposed={name: site.is_transposed for name, site in header.sites.items() if site.is_transposed is not None},
        kept=header.kept,
        model=header.model,
        tensors=tensors,
        row_dims={name: site.row_dims for name, site in header.sites.items() if site.row_dims is not None},
        parameters={name: site.parameter for name, site in header.sites.items() if site.parameter is not None},
        header=header.content,
    )
    refuse_malformed(adapter)
    if header.sha256 is not None and header.sha256 != hash_file(header.content, tensors):
        raise MELoRAError(
            f"`{path}` has changed since it was written: its SHA-256 is not the one in its header; copy or download "
            "the adapter again"
        )
    return adapter


def write_adapter(
    directory: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any], *, is_foreign: bool = False
) -> None:
    """Writes an adapter folder, and creates it if it is missing.

    After a crash the folder holds either the old adapter or the new one. An adapter has the same bytes each time.

    Args:
        directory: the folder.
        tensors: as in `Adapter.tensors`.
        header: "sites", "kept" and "model"; the format, versions and SHA-256 are added.
        is_foreign: whether another program has made the adapter, which is then checked first, as in `read_adapter`.

    Raises:
        MELoRAError: if the folder cannot be written, or the adapter is foreign and malformed.
    """
    versions = {"torch": torch.__version__, "melora_fx": package_version("melora_fx")}
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    content = {"format_version": FORMAT_VERSION, "versions": versions} | header
    content |= {"sha256": hash_file(content, on_cpu)}
    text = json.dumps(content)
    if is_foreign:
        _checked(directory / TENSORS_FILE, text, on_cpu)
    metadata = {"format": "pt", _HEADER_KEY: text}
    with writing(directory), made_folder(directory):
        write_together(
            directory,
            {
                CONFIG_FILE: lambda path: path.write_text(json.dumps(_COPY | content, indent=2) + "\n"),
                TENSORS_FILE: lambda path: write_tensors(path, on_cpu, metadata),
            },
        )
