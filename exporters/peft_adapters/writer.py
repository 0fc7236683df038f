"""Writes adapter folders for PEFT and the programs that read PEFT's: vLLM, transformers, text-generation servers."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from exporters.adapters.lora_form import all_loras
from melora_fx import MELoRAError
from melora_fx.files import new_folder, output_path, refuse_occupied, refuse_source
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.saving.tensor_file import write_tensors

from .bdlora import Packing, choose_packing, packed
from .names import CONFIG_FILE, METADATA_KEY, PREFIX, TENSORS_FILE, last_name, lora_keys
from .settings import HEADS
from .stacks import StackKey, by_module, is_parameter, nested, stacked

FORMS = ("lora", "bdlora")
_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM|LMHeadModel", "CAUSAL_LM"),
    ("T5ForConditionalGeneration|BartForConditionalGeneration|PegasusForConditionalGeneration", "SEQ_2_SEQ_LM"),
)
"""Pattern for the end of a class name of transformers → PEFT's task type, which selects a PEFT class for texts. Other
classes have no task type, and PEFT runs them unchanged."""
_MAMBA = re.compile("Mamba|FalconMamba|FalconH1|NemotronH")
_NOT_IN_MAMBA = {"dt_proj", "out_proj"}
"""PEFT refuses `out_proj` (`tuners_utils.py`), and would compute with the base's `dt_proj`, without the adapter."""


def write_peft_adapter(
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    form: str = "lora",
    base_model: str | os.PathLike[str] | None = None,
) -> None:
    """Writes an adapter folder in PEFT's format; the model computes the same with it.

    "lora" is an ordinary LoRA: A (R, I) and B (O, R) are written out with zeros outside the blocks, the scaling is in
    B, and all sites have one rank R, padded with zeros. "bdlora" is PEFT's block-diagonal LoRA (PEFT 0.19 or later),
    which stores one of the two factors in blocks: B if a linear has more outputs than inputs and no `split`, else A.
    Sites that do not fit its one number of blocks are written out. Modules that were trained in addition to the sites
    become `modules_to_save`.

    Args:
        adapter_dir: a folder written by `melora_fx.save_adapter`.
        out_dir: the folder to write; it must be new or empty.
        form: "lora" or "bdlora".
        base_model: path or name of the base, which PEFT's `Auto` classes load.

    Raises:
        ValueError: if `form` is another string, or `out_dir` is "".
        MELoRAError: if `adapter_dir` cannot be read; PEFT has no form for the adapter, such as for a single parameter
            that was kept trainable or a weight that is stored in three dimensions; `out_dir` is not empty, is inside
            `adapter_dir`, or cannot be written.
    """
    if form not in FORMS:
        raise ValueError(f"`form` (={form!r}) must be one of {', '.join(map(repr, FORMS))}")
    adapter = read_adapter(adapter_dir)
    out = output_path(out_dir)
    refuse_source(out, Path(adapter_dir))
    refuse_occupied(out)
    packing = choose_packing(adapter) if form == "bdlora" else None
    base = None if base_model is None else os.fspath(base_model)
    config, tensors, metadata = _content(adapter, packing, base)
    with new_folder(out) as made:
        write_tensors(made / TENSORS_FILE, tensors, metadata)
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _content(
    adapter: Adapter, packing: Packing | None, base_model: str | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """Returns the contents of the two files: the configuration, the tensors by key, and the tensors' metadata.

    Raises:
        MELoRAError: as for `write_peft_adapter`.
    """
    _refuse_unknown_forms(adapter)
    loras = all_loras(adapter)
    parameters = [name for name in loras if is_parameter(adapter, name)]
    modules = [name for name in loras if name not in parameters]
    rank = max(found[0].rank for found in loras.values())
    if packing is not None:
        rank = packing.rank_for(rank)
    tensors: dict[str, torch.Tensor] = {}
    for name in modules:
        lora = loras[name][0].padded(rank)
        if packing is not None:
            lora = packed(packing, name, adapter.tensors_of(name), lora)
        tensors |= dict(zip(lora_keys(name), lora.factors, strict=True))
    for module, names in by_module(parameters).items():
        for key in _nested(adapter, module, names):
            padded = [lora.padded(rank) for lora in loras[f"{module}.{key.parameter}"]]
            lies_transposed = len(padded) == 1 and adapter.transposed.get(f"{module}.{key.parameter}")
            tensors |= dict(zip(lora_keys(key.wrapper), stacked(padded, lies_transposed), strict=True))
    kept, kept_tensors = _kept(adapter)
    tensors |= {PREFIX + name: tensor for name, tensor in kept_tensors.items()}
    dropouts = {config.dropout for config in adapter.configs.values()}
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(adapter),
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 and not parameters else 0.0,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": _target_modules(modules),
        "target_parameters": parameters or None,
        "modules_to_save": kept or None,
        "fan_in_fan_out": any(adapter.transposed.get(name) for name in modules),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        **({} if packing is None else {"use_bdlora": packing.to_dict()}),
    }
    return config, tensors, {"format": "pt", METADATA_KEY: json.dumps({"sites": _described(adapter)})}


def _target_modules(names: list[str]) -> list[str] | str:
    """Returns PEFT's `target_modules`: a list, or an expression if a name has no dot and would match others' ends."""
    if all("." in name for name in names):
        return names
    return "|".join(map(re.escape, names))


def _kept(adapter: Adapter) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Returns the modules that were kept trainable and those tied to them in the model, and the tensors of both.

    PEFT trains tied modules separately.
    """
    tensors = adapter.kept_tensors()
    tied = {other: tensors[name] for name, others in adapter.model.get("tied", {}).items() for other in others}
    modules = [*adapter.kept, *dict.fromkeys(name.rpartition(".")[0] for name in tied)]
    return modules, tensors | {name: tensor.clone() for name, tensor in tied.items()}


def _refuse_unknown_forms(adapter: Adapter) -> None:
    """Raises MELoRAError if PEFT has no form for a part of the adapter."""
    if odd := sorted(adapter.row_dims):
        raise MELoRAError(
            f"`{adapter.directory}` adapts {', '.join(map(repr, odd))}, one matrix that is stored in three dimensions, "
            "which PEFT does not adapt: fold it into the base"
        )
    if shared := adapter.model.get("shared"):
        name, names = next(iter(shared.items()))
        raise MELoRAError(
            f"`{adapter.directory}` adapts `{name}`, one module of several names ({', '.join(names)}), and PEFT would "
            "adapt only the first: fold it into the base"
        )
    if _MAMBA.match(str(adapter.model.get("class"))):
        refused = [name for name in adapter.configs if last_name(name) in _NOT_IN_MAMBA]
        if refused:
            raise MELoRAError(
                f"`{adapter.directory}` adapts {', '.join(map(repr, refused))}, whose weights Mamba's layers read "
                "without PEFT's adapter: leave them out of `targets`, or fold the adapter into the base"
            )
    at_root = [
        name for name in adapter.configs if name == "weight" or ("." not in name and is_parameter(adapter, name))
    ]
    if at_root:
        raise MELoRAError(
            f"`{adapter.directory}` adapts {', '.join(map(repr, at_root))} of the model itself, and PEFT adapts "
            "only modules inside it: put the model into another module, or fold the adapter into the base"
        )
    single = [name for name in adapter.kept if name in adapter.tensors]
    if single:
        raise MELoRAError(
            f"`{adapter.directory}` keeps single parameters trainable ({', '.join(map(repr, single))}); PEFT's "
            "`modules_to_save` accepts only modules: keep the module trainable, or fold the adapter into the base"
        )


def _nested(adapter: Adapter, module: str, parameters: list[str]) -> list[StackKey]:
    try:
        return nested(module, parameters)
    except ValueError as error:
        raise MELoRAError(
            f"`{adapter.directory}` cannot be written for PEFT: {error}; fold it into the base"
        ) from error


def _described(adapter: Adapter) -> Mapping[str, Any]:
    """Returns how each site is cut, and the orientation of its weight, for the program that reads the LoRA back."""
    entries: dict[str, dict[str, Any]] = {}
    for name, config in adapter.configs.items():
        fields = config.to_dict()
        entries[name] = {key: fields[key] for key in ("rank", "num_blocks", "split")}
        if name in adapter.transposed:
            entries[name]["is_transposed"] = adapter.transposed[name]
    return entries


def _task_type(adapter: Adapter) -> str | None:
    """Returns PEFT's task type, or None if it has none or would need a head that the adapter has not trained."""
    import transformers  # slow to import, so only here

    name = adapter.model.get("class") or ""
    task = next((task for ending, task in _TASKS if re.search(f"({ending})$", name)), None)
    if task is None or name not in dir(transformers):
        return None
    heads = HEADS.get(task)
    return task if heads is None or {*heads} & {last_name(kept) for kept in adapter.kept} else None
