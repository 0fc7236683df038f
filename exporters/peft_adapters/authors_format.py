"""Parses adapter files of the MELoRA authors' code, a fork of PEFT 0.5: a list of mini LoRAs for each module.

The keys are `base_model.model.MODULE.lora_A.BLOCK.weight` (r_i, I/n) and `….lora_B.BLOCK.weight` (O/n, r_i); `r` and
`lora_alpha` are lists with one number per block. Source: github.com/ChasonShi/MELoRA, `tuners/melora.py` and
`utils/save_and_load.py`.
"""

import functools
import re

import torch

from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.config import one_or_each

from .folder import PeftFolder
from .imported import Imported
from .names import CONFIG_FILE, PREFIX
from .settings import modules_to_save

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.(?P<block>\d{1,7})\.weight")
_ORIGINAL = ".original_module."
"""Part of the keys of a trained module's original weights, which the authors' code saves alongside the trained ones."""


def read_authors(folder: PeftFolder) -> Imported:
    """Returns the adapter in a folder.

    Raises:
        MELoRAError: if settings or tensors do not fit together, or a rank is 0, which the authors' code cannot run.
    """
    config = _config(folder)
    found: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
    others = {}
    for key, tensor in folder.tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match:
            found.setdefault(match["module"], {})[match["factor"], int(match["block"])] = tensor
        elif _ORIGINAL not in key:
            others[key.removeprefix(PREFIX)] = tensor
    imported = Imported(folder.directory, fan_in_fan_out=bool(folder.config.get("fan_in_fan_out")))
    imported.sites = {module: _site(folder, module, config, factors) for module, factors in found.items()}
    imported.add_kept(others, modules_to_save(folder.config))
    return imported


def _config(folder: PeftFolder) -> MELoRAConfig:
    ranks, alphas = folder.config.get("r"), folder.config.get("lora_alpha")
    try:
        if not isinstance(ranks, list) or not isinstance(alphas, list) or not ranks or len(ranks) != len(alphas):
            raise ValueError(f"`r` (={ranks!r}) and `lora_alpha` (={alphas!r}) must be lists with one number per block")
        if folder.config.get("bias", "none") != "none":
            raise ValueError(f"it has trained biases (`bias` is {folder.config['bias']!r}), which cannot be read")
        return MELoRAConfig(
            rank=one_or_each(ranks),
            num_blocks=len(ranks),
            alpha=one_or_each(alphas),
            dropout=folder.config.get("lora_dropout") or 0.0,
        )
    except (TypeError, ValueError) as error:
        raise MELoRAError(f"`{folder.directory / CONFIG_FILE}`: {error}") from error


def _site(
    folder: PeftFolder, module: str, config: MELoRAConfig, factors: dict[tuple[str, int], torch.Tensor]
) -> AdapterTensors:
    blocks = range(config.num_blocks)
    where = f"`{module}` in `{folder.directory}`"
    if factors.keys() != {(factor, block) for factor in "AB" for block in blocks}:
        raise MELoRAError(f"{where} must have lora_A and lora_B of exactly the {config.num_blocks} blocks in `r`")
    first_a, first_b = factors["A", 0], factors["B", 0]
    if not first_a.dim() == first_b.dim() == 2 or not all(tensor.is_floating_point() for tensor in factors.values()):
        raise MELoRAError(f"{where}: blocks must be matrices of floating point numbers")
    width, height = first_a.size(1), first_b.size(0)
    for block, rank in enumerate(config.ranks):
        shapes = tuple(factors["A", block].shape), tuple(factors["B", block].shape)
        if shapes != ((rank, width), (height, rank)):
            raise MELoRAError(f"{where}: block {block} has the shapes {shapes}, not {((rank, width), (height, rank))}")
    if not width or not height:
        raise MELoRAError(f"{where}: its blocks are empty")
    number = config.num_blocks
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in factors.values()))
    own = AdapterTensors.zeros(config, number * width, number * height, dtype=dtype)
    for block, rank in enumerate(config.ranks):
        own.lora_a[block, :rank] = factors["A", block]
        own.lora_b[block, :, :rank] = factors["B", block]
    return own
