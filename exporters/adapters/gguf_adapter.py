"""Adapters for llama.cpp: a GGUF file, for the base converted by llama.cpp's convert_hf_to_gguf.py.

The file holds `<weight>.lora_a` (R, I) and `<weight>.lora_b` (O, R), or (E, R, I) and (E, O, R) of E experts, under
llama.cpp's own names of the weights, with the scaling in B. llama.cpp scales by alpha / R, and not at all where alpha
is 0, as it is here. The tensors are float32: it rounds what it multiplies by narrower ones.
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
    """Writes an adapter folder as a GGUF file for llama.cpp, for one base.

    One adapter gives the same bytes each time. Of the base only headers and a few values are read; one that is
    quantised, or stores its experts one by one, is checked by shapes alone where it is.

    Args:
        adapter_dir: a folder written by `melora_fx.save_adapter`.
        base_dir: the Hugging Face folder of its base, from which llama.cpp's GGUF file of the base was converted,
            without fusing q, k and v, or gates and ups.
        out_path: the file to write; a GGUF adapter that is there is replaced.

    Raises:
        MELoRAError: for an adapter of another base, or with trained modules beside its sites, an architecture or a
            weight of which it is not known what llama.cpp makes of it, or a file that cannot be written.
    """
    gguf = _import_gguf()
    adapter_dir, base_dir, out_path = Path(adapter_dir), Path(base_dir), output_path(out_path)
    adapter = read_adapter(adapter_dir)
    base = open_checkpoint(base_dir)
    for source in (adapter_dir, base_dir):
        refuse_source(out_path, source)
    if os.path.isfile(out_path) and not _is_adapter_file(gguf, out_path):
        raise MELoRAError(f"`{out_path}` is there already, and no GGUF adapter: name another place")
    if base.config is None:
        raise MELoRAError(f"`{base_dir}` has no {CONFIG_FILE}, which says what llama.cpp makes of its weights")
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
    except (ValueError, IndexError, OSError):  # of no GGUF file
        return False
    return kind is not None and kind.contents() == gguf.GGUFType.ADAPTER


def _refuse_kept(adapter: Adapter) -> None:
    if kept := list(adapter.kept_tensors()):
        raise MELoRAError(
            f"`{adapter.directory}` has trained {', '.join(map(repr, kept[:5]))} beside its sites, for which llama.cpp "
            f"has no place in an adapter: {REMEDY}"
        )


def _find_weights(adapter: Adapter, base: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of each site's weight in the checkpoint, and its shape in the model; checked to be those of its base.

    A stack of experts that the checkpoint stores in other forms has its own name.
    """
    names = map_keys(base, adapter.model.get("class"), adapter.model.get("num_labels"))
    found: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    lines: list[str] = []
    for site in adapter.configs:
        parameter = site if site in names.keys or site in names.converted else f"{site}.weight"
        if others := names.tied.get(parameter):
            lines.append(
                f"`{site}` shares its weight with {', '.join(map(repr, others))}, which llama.cpp has once: "
                "`fold(model, untie=True)`, save, and convert that"
            )
        elif names.tensors is not None and parameter not in names.tensors:
            lines.append(f"`{site}`: its {CONFIG_FILE} describes a model without it")
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
    """A parameter's shape in the model: a quantised checkpoint may store it in another one."""
    if names.tensors is not None:
        return tuple(names.tensors[parameter].shape)
    return base.tensors[names.keys[parameter]].shape


def _check_values(
    adapter: Adapter, base: Checkpoint, found: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses an adapter of another base, by those weights that the checkpoint stores as they are in the model."""
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
    """A and B of every weight that llama.cpp has, by their names in the file."""
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
        raise OSError("its values are not all on the disk, which may be full")


def _is_whole(gguf: Any, path: Path, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a file holds these tensors: numpy, which writes them, does not say when its last bytes find no room."""
    try:
        written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    except (ValueError, IndexError):  # of a file that ends early
        return False
    return written.keys() == tensors.keys() and all(np.array_equal(written[name], tensors[name]) for name in tensors)
