"""Writes and reads adapters for MLX: the folders that `mlx_lm.load(model, adapter_path=…)` reads.

mlx_lm adapts the modules that `keys` names, by their paths in each of the last `num_layers` layers or by their full
names in the model. All of them have one rank, scale and dropout. Full names fit any choice of modules and need no
knowledge of the base, so full names are written, with the scalings in B and ranks padded with zeros.

I in_features, O out_features, R rank, E experts of a stack.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melora_fx.errors import MELoRAError
from melora_fx.files import new_folder, output_path, read_bytes, refuse_link, refuse_occupied, refuse_source
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.saving.header import parse_json
from melora_fx.saving.tensor_file import read_tensors, write_tensors
from melora_fx.saving.well_formed import FLOATS, non_finite_names

from .lora_form import Lora, all_loras
from .mlx_names import ARCHITECTURES, EXPERTS, Architecture

TENSORS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"
_KIND = "an adapter folder of mlx_lm"
_FOLD = "fold it into the base (`melora-fx fold`), and convert the result with `mlx_lm.convert`"


def write_mlx_adapter(adapter_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> None:
    """Writes an adapter folder for MLX: for `mlx_lm.load`, `mlx_lm.generate`, `mlx_lm.fuse` and mlx_lm's other tools.

    mlx_lm computes the same updates with it, on a plain or a quantised base. The folder stores A (I, R) and B (R, O) of
    a linear, and A (E, R, I) and B (E, O, R) of a stack of E experts; float64 becomes float32. MLX need not be
    installed. The folder has one dropout, for further training: the largest of all sites. An adapter on `lm_head` needs
    a base whose head has its own weight: mlx_lm refuses it on other bases.

    Args:
        adapter_dir: a folder written by `melora_fx.save_adapter`.
        out_dir: the folder to write; it must be new or empty.

    Raises:
        ValueError: if `out_dir` is "".
        MELoRAError: if `adapter_dir` cannot be read; the names of the model in mlx_lm are not known; mlx_lm has no
            module for a site; a head or other parameters were trained in addition to the sites; a value is not finite
            in float32; `out_dir` is not empty, is inside `adapter_dir`, or cannot be written.
    """
    out = output_path(out_dir)
    adapter = read_adapter(adapter_dir)
    refuse_source(out, adapter.directory)
    refuse_occupied(out)
    _refuse_kept(adapter)
    loras = _mlx_loras(adapter, _architecture_of(adapter))
    rank = max(lora.rank for matrices in loras.values() for lora in matrices)
    tensors: dict[str, torch.Tensor] = {}
    for name, matrices in loras.items():
        tensors |= _mlx_tensors(name, [lora.padded(rank) for lora in matrices])
    if wrong := non_finite_names(tensors):
        listed = ", ".join(map(repr, wrong))
        raise MELoRAError(f"`{adapter.directory}`: {listed} are not finite in float32: train with a smaller alpha")
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": max(config.dropout for config in adapter.configs.values()),
            "keys": sorted(loras),
            "rank": rank,
            "scale": 1.0,
        },
        "num_layers": len({name.split(".")[2] for name in loras if name.count(".") > 1}),
    }
    with new_folder(out) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=4) + "\n")
        write_tensors(folder / TENSORS_FILE, tensors, {"format": "mlx"})


def _refuse_kept(adapter: Adapter) -> None:
    if adapter.kept:
        kept = ", ".join(f"`{name}`" for name in adapter.kept)
        raise MELoRAError(
            f"`{adapter.directory}` has trained {kept} in addition to its sites, which MLX cannot store: {_FOLD}"
        )


def _architecture_of(adapter: Adapter) -> Architecture:
    name = adapter.model.get("class")
    if name not in ARCHITECTURES:
        if not name:
            raise MELoRAError(
                f"`{adapter.directory}` does not say in which class of models it was trained: load it into its model "
                "with `load_adapter` and save it again"
            )
        raise MELoRAError(
            f"`{adapter.directory}` was trained in `{name}`, whose names in mlx_lm are not known; known classes are "
            f"{', '.join(sorted(ARCHITECTURES))}. If mlx_lm has the model, {_FOLD}"
        )
    return ARCHITECTURES[name]


def _mlx_loras(adapter: Adapter, architecture: Architecture) -> dict[str, list[Lora]]:
    """Maps the names of mlx_lm's modules to their updates, one for each expert of a stack."""
    loras: dict[str, list[Lora]] = {}
    without_module = []
    for site, own_loras in all_loras(adapter).items():
        own = list(_mlx_modules(site, own_loras, architecture))
        loras |= dict(own)
        without_module += [] if own else [f"`{site}`"]
    if without_module:
        raise MELoRAError(
            f"`{adapter.directory}` has adapters on {', '.join(without_module)}, which are not modules of mlx_lm's "
            f"`{adapter.model['class']}`: leave them out of `targets`, or {_FOLD}"
        )
    return loras


def _mlx_modules(site: str, loras: list[Lora], architecture: Architecture) -> Iterator[tuple[str, list[Lora]]]:
    """Yields mlx_lm's modules for a site, with their updates; nothing if mlx_lm has none."""
    found = EXPERTS.fullmatch(site) if architecture.experts else None
    name = architecture.name_of(site)
    if name is None or (found is None and len(loras) > 1):
        return
    if found is None:
        yield name, loras
        return
    block = name.removesuffix(f".experts.{found['stack']}") + ".switch_mlp"
    if found["stack"] == "down_proj":
        yield f"{block}.down_proj", loras
        return
    halves = [lora.lora_b.chunk(2) for lora in loras]
    for index, projection in enumerate(("gate_proj", "up_proj")):
        yield (
            f"{block}.{projection}",
            [Lora(lora.lora_a, half[index]) for lora, half in zip(loras, halves, strict=True)],
        )


def _mlx_tensors(name: str, loras: list[Lora]) -> dict[str, torch.Tensor]:
    """Returns A and B in mlx_lm's layout: (I, R) and (R, O) for a matrix, (E, R, I) and (E, O, R) for a stack."""
    is_stack = ".switch_mlp." in name
    lora_a = torch.stack([lora.lora_a for lora in loras]) if is_stack else loras[0].lora_a.T
    lora_b = torch.stack([lora.lora_b for lora in loras]) if is_stack else loras[0].lora_b.T
    dtype = torch.float32 if lora_a.dtype == torch.float64 else lora_a.dtype
    return {f"{name}.lora_a": lora_a.to(dtype).contiguous(), f"{name}.lora_b": lora_b.to(dtype).contiguous()}


@dataclass(frozen=True, eq=False)
class MlxLora:
    """The update of one of mlx_lm's modules: scale · B A.

    Attributes:
        lora_a: A (R, I), or (E, R, I) for a stack of experts.
        lora_b: B (O, R), or (E, O, R).
        scale: the factor of B A.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: float


def read_mlx_folder(mlx_dir: str | os.PathLike[str]) -> dict[str, MlxLora]:
    """Returns the LoRAs in a folder written by mlx_lm or `write_mlx_adapter`, by mlx_lm's names of modules.

    Raises:
        MELoRAError: if the folder is not an adapter of mlx_lm; its files are truncated, corrupt or do not belong
            together; it contains DoRA, full fine-tuning or an adapter of an embedding.
    """
    folder = Path(mlx_dir)
    rank, scale = _read_config(folder / CONFIG_FILE)
    path = folder / TENSORS_FILE
    refuse_link(path)
    tensors, _ = read_tensors(path, _KIND)
    if lines := [*_wrong_names(tensors)] or [*_wrong_tensors(tensors, rank)]:
        raise MELoRAError(f"`{path}` is not a LoRA as mlx_lm writes it:\n" + "\n".join(lines))
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    return {name: _lora(tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], scale) for name in modules}


def _lora(lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> MlxLora:
    is_stack = lora_a.dim() == 3
    return MlxLora(lora_a, lora_b, scale) if is_stack else MlxLora(lora_a.T.contiguous(), lora_b.T.contiguous(), scale)


def _read_config(path: Path) -> tuple[int, float]:
    """Returns rank and scale."""
    try:
        refuse_link(path)
        content: Any = parse_json(read_bytes(path, _KIND).decode())
    except ValueError as error:
        raise MELoRAError(f"`{path}` is not JSON, it is truncated or corrupt: {error}") from None
    kind = content.get("fine_tune_type", "lora") if isinstance(content, dict) else None
    if kind in ("dora", "full"):
        what = "DoRA, which scales the weights" if kind == "dora" else "full fine-tuning, without adapters"
        raise MELoRAError(f"`{path.parent}` is {what}, not LoRA: fuse it into its base with `mlx_lm.fuse`")
    parameters = content.get("lora_parameters") if kind == "lora" else None
    own: dict[str, Any] = parameters if isinstance(parameters, dict) else {}
    rank, scale = own.get("rank"), own.get("scale", math.nan)
    if type(rank) is not int or rank < 1 or type(scale) not in (int, float) or not _is_float32(scale):
        raise MELoRAError(
            f"`{path}` is not mlx_lm's configuration of a LoRA: it must have `fine_tune_type` 'lora' and "
            "`lora_parameters` with a `rank` of at least 1 and a finite `scale`; copy it again"
        )
    return rank, float(scale)


def _is_float32(scale: Any) -> bool:
    """Returns whether a scale is finite in float32."""
    return abs(scale) <= torch.finfo(torch.float32).max


def _wrong_names(tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """Yields a line for each module with a missing tensor, or a tensor that is not part of a LoRA of linears."""
    if not tensors:
        yield "it is empty"
    modules = {name.rpartition(".")[0] for name in tensors}
    for module in sorted(modules):
        own = {name for name in tensors if name.rpartition(".")[0] == module}
        expected = {f"{module}.lora_a", f"{module}.lora_b"}
        if f"{module}.m" in own:
            yield f"`{module}` is DoRA: fuse it into its base with `mlx_lm.fuse`"
        elif unknown := sorted(own - expected):
            yield f"`{unknown[0]}` is not part of a LoRA: fuse a trained or quantised base with `mlx_lm.fuse`"
        elif missing := sorted(expected - own):
            yield f"`{missing[0]}` is missing: copy the file again"
        elif _is_embedding(module):
            yield f"`{module}` is an embedding, which cannot be adapted here: fuse it into its base with `mlx_lm.fuse`"


def _is_embedding(module: str) -> bool:
    name = module.rpartition(".")[2]
    return name in ("wte", "wpe") or ("embed" in name and name != "embed_out")


def _fit(lora_a: torch.Tensor, lora_b: torch.Tensor, rank: int) -> bool:
    """Returns whether A and B are (I, R) and (R, O), or (E, R, I) and (E, O, R), with this rank R."""
    if lora_a.dim() == lora_b.dim() == 2:
        return lora_a.size(1) == lora_b.size(0) == rank
    is_stack = lora_a.dim() == lora_b.dim() == 3 and lora_a.size(0) == lora_b.size(0)
    return is_stack and lora_a.size(1) == lora_b.size(2) == rank


def _wrong_tensors(tensors: dict[str, torch.Tensor], rank: int) -> Iterator[str]:
    """Yields a line for each module whose tensors do not fit the rank or each other, or are not finite floats."""
    for name_a in (name for name in tensors if name.endswith(".lora_a")):
        module = name_a.rpartition(".")[0]
        a, b = tensors[name_a], tensors[f"{module}.lora_b"]
        if not _fit(a, b, rank):
            yield (
                f"`{module}`: lora_a is {tuple(a.shape)} and lora_b {tuple(b.shape)}, which does not fit the "
                f"rank {rank} of {CONFIG_FILE}: copy both files again"
            )
        elif not a.numel() or not b.numel() or not {a.dtype, b.dtype} <= {*FLOATS}:
            yield f"`{module}` holds {a.dtype} and {b.dtype}, or nothing: a LoRA holds floating point numbers"
        elif not (a.isfinite().all() and b.isfinite().all()):
            yield f"`{module}` holds NaN or infinity: take an earlier checkpoint"
