"""Writes adapters for llama.cpp as GGUF files, for bases converted with llama.cpp's convert_hf_to_gguf.py.

The file stores `<weight>.lora_a` (R, I) and `<weight>.lora_b` (O, R), or (E, R, I) and (E, O, R) for E experts, under
llama.cpp's names of the weights, with the scaling in B. llama.cpp scales by alpha / R, but not at all if alpha is 0, as
it is here. The tensors are float32: llama.cpp rounds the values that it multiplies by narrower tensors.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melora_fx import MELoRAError
from melora_fx.files import made_folder, output_path, refuse_source, write_atomically, writing
from melora_fx.folding.checkpoint import CONFIG_FILE, DTYPES, Checkpoint, open_checkpoint
from melora_fx.folding.checkpoint_keys import KeyMap, map_keys
from melora_fx.matching.targets import nearest
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.saving.checks import check_fingerprints, check_shapes

from .gguf_names import REMEDY, Conversion, conversion_of, places_of
from .lora_form import all_loras


def write_gguf_adapter(
    adapter_dir: str | os.PathLike[str], base_dir: str | os.PathLike[str], out_path: str | os.PathLike[str]
) -> None:
    """Writes an adapter folder as a GGUF file for llama.cpp and one base.

    The same adapter always yields the same bytes. The tensors are float32: A (R, I) and B (O, R), which includes the
    scaling, or (E, R, I) and (E, O, R) for a stack of E experts. Only headers and a few values of the base are read.
    Weights that the base stores quantised, or as single experts, are checked only by their shapes.

    Args:
        adapter_dir: a folder written by `melora_fx.save_adapter`.
        base_dir: the Hugging Face folder of the adapter's base. llama.cpp's GGUF file of the base must be converted
            from it, without fusing q, k and v, or gates and ups.
        out_path: the file to write; a GGUF adapter that is already there is replaced.

    Raises:
        ValueError: if `out_path` is "".
        MELoRAError: if the package gguf is missing; a folder cannot be read; the adapter has another base, or trained
            modules in addition to its sites; how llama.cpp converts the architecture or a weight is not known;
            `out_path` cannot be written, is inside one of the folders, or is another file.
    """
    gguf = _import_gguf()
    adapter_dir, base_dir, out_path = Path(adapter_dir), Path(base_dir), output_path(out_path)
    adapter = read_adapter(adapter_dir)
    base = open_checkpoint(base_dir)
    for source in (adapter_dir, base_dir):
        refuse_source(out_path, source)
    if os.path.isfile(out_path) and not _is_adapter_file(gguf, out_path):
        raise MELoRAError(f"`{out_path}` already exists and is not a GGUF adapter: name another place")
    if base.config is None:
        raise MELoRAError(f"`{base_dir}` has no {CONFIG_FILE}, which decides how llama.cpp converts its weights")
    conversion = conversion_of(base.config, base_dir)
    _refuse_kept(adapter)
    tensors = _gguf_tensors(adapter, _find_weights(adapter, base), conversion, base.config)
    with writing(out_path), made_folder(out_path.parent):
        write_atomically(out_path, lambda path: _write(gguf, path, conversion.architecture, tensors))


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MELoRAError("llama.cpp's file format needs the package gguf: pip install gguf") from error
    return gguf


def _is_adapter_file(gguf: Any, path: Path) -> bool:
    try:
        kind = gguf.GGUFReader(path).get_field(gguf.Keys.General.TYPE)
    except (ValueError, IndexError, OSError):  # not a GGUF file
        return False
    return kind is not None and kind.contents() == gguf.GGUFType.ADAPTER


def _refuse_kept(adapter: Adapter) -> None:
    if kept := list(adapter.kept_tensors()):
        raise MELoRAError(
            f"`{adapter.directory}` has trained {', '.join(map(repr, kept[:5]))} in addition to its sites, which an "
            f"adapter for llama.cpp cannot store: {REMEDY}"
        )


def _find_weights(adapter: Adapter, base: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns the name of each site's weight in the checkpoint and its shape in the model; checks the adapter's base.

    A stack of experts that the checkpoint stores in another form keeps its name in the model.
    """
    names = map_keys(base, adapter.model.get("class"), adapter.model.get("num_labels"))
    found: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    lines: list[str] = []
    for site in adapter.configs:
        parameter = site if site in names.keys or site in names.converted else f"{site}.weight"
        if others := names.tied.get(parameter):
            lines.append(
                f"`{site}` shares its weight with {', '.join(map(repr, others))}, and llama.cpp stores it once: "
                "call `fold(model, untie=True)`, save the model and convert it"
            )
        elif names.tensors is not None and parameter not in names.tensors:
            lines.append(f"`{site}`: the base's {CONFIG_FILE} describes a model without it")
        elif parameter not in names.keys and parameter not in names.converted:
            lines.append(f"`{site}`: the base has no such weight; nearest: {nearest(site, list(names.keys))}")
        else:
            found[site] = names.keys.get(parameter, parameter)
            shapes[site] = _shape(parameter, base, names)
    if lines:
        raise MELoRAError(f"`{adapter.directory}` does not fit `{base.directory}`:\n" + "\n".join(lines))
    check_shapes(adapter, {site: torch.empty(shape, device="meta") for site, shape in shapes.items()})
    _check_values(adapter, base, found, shapes)
    return {site: (name, shapes[site]) for site, name in found.items()}


def _shape(parameter: str, base: Checkpoint, names: KeyMap) -> tuple[int, ...]:
    """Returns a parameter's shape in the model; a quantised checkpoint may store it in another shape."""
    if names.tensors is not None:
        return tuple(names.tensors[parameter].shape)
    return base.tensors[names.keys[parameter]].shape


def _check_values(
    adapter: Adapter, base: Checkpoint, found: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises MELoRAError if the adapter has another base; checks the weights that are stored as the model has them."""
    stored = {site: base.tensors[name] for site, name in found.items() if name in base.tensors}
    is_as_it_is = {site: tensor.dtype in DTYPES and tensor.shape == shapes[site] for site, tensor in stored.items()}
    check_fingerprints(
        adapter,
        {
            site: stored[site].fingerprint() if is_as_it_is.get(site) else adapter.fingerprints.get(site, {})
            for site in adapter.configs
        },
    )


def _gguf_tensors(
    adapter: Adapter,
    weights: Mapping[str, tuple[str, tuple[int, ...]]],
    conversion: Conversion,
    config: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Returns A and B of every adapted weight of llama.cpp, by their names in the file."""
    tensors: dict[str, np.ndarray] = {}
    lines: list[str] = []
    loras_by_site = all_loras(adapter)
    for site in sorted(weights):
        name, shape = weights[site]
        is_stack = adapter.matrices_of(site, torch.empty(shape, device="meta")).dim() == 3
        loras = loras_by_site[site]
        lora_a = torch.stack([lora.lora_a for lora in loras]).float()
        lora_b = torch.stack([lora.lora_b for lora in loras]).float()
        try:
            places = places_of(name, lora_b.size(1), conversion, config, is_stack=is_stack)
        except MELoRAError as error:
            lines.append(f"`{site}`: {error}")
            continue
        for place in places:
            factors = {"lora_a": lora_a, "lora_b": lora_b[:, place.rows]}
            for factor, values in factors.items():
                tensors[f"{place.name}.{factor}"] = np.ascontiguousarray((values if is_stack else values[0]).numpy())
    if lines:
        raise MELoRAError(
            f"`{adapter.directory}` has updates that llama.cpp cannot add: {REMEDY}:\n" + "\n".join(lines)
        )
    return tensors


def _write(gguf: Any, path: Path, architecture: str, tensors: Mapping[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    if not _is_whole(gguf, path, tensors):
        raise OSError("not all of its values reached the disk, which may be full")


def _is_whole(gguf: Any, path: Path, tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns whether a file contains these tensors; numpy reports no error if the disk is full at the last bytes."""
    try:
        written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    except (ValueError, IndexError):  # the file ends early
        return False
    return written.keys() == tensors.keys() and all(np.array_equal(written[name], tensors[name]) for name in tensors)
