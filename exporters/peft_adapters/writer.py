"""Adapter folders for PEFT, and for all that reads PEFT's: vLLM, transformers, text-generation servers."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from exporters.adapters.lora_form import loras_of
from melora_fx import MELoRAError
from melora_fx.files import new_folder, refuse_occupied, refuse_source
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.saving.tensor_file import write_tensors

from .bdlora import Packing, choose_packing, packed
from .names import CONFIG_FILE, METADATA_KEY, PREFIX, TENSORS_FILE, last_name, lora_keys
from .stacks import StackKey, by_module, is_stack, nested, stacked

FORMS = ("lora", "bdlora")
_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM|LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration|ForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    ("Model", "FEATURE_EXTRACTION"),
)
"""What a class's name ends in → PEFT's task type. Others, such as masked language models, have none."""
_HEADS = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}
"""Modules that PEFT takes for trained ones where a folder names the task, and asks its file for."""


def write_peft_adapter(
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    form: str = "lora",
    base_model: str | None = None,
) -> None:
    """Writes an adapter folder as PEFT's; what the model computes with it is the same.

    "lora" is an ordinary LoRA: A and B written out with the zeros beside the blocks, the scaling in B, one rank for
    all sites, padded with zeros. "bdlora" is PEFT's block-diagonal LoRA (PEFT 0.19 or later), which stores one of the
    two factors in blocks: the B of linears that have more outputs than inputs, the A of others. What was trained
    beside the sites becomes `modules_to_save`.

    Args:
        adapter_dir: a folder written by `melora_fx.save_adapter`.
        out_dir: the folder to write: a new one, or an empty one.
        form: "lora" or "bdlora".
        base_model: path or name of the base, which PEFT's `Auto` classes load.

    Raises:
        MELoRAError: for an adapter folder that cannot be read, or that PEFT has no form for: a single parameter that
            was kept trainable, a weight that is stored in three dimensions; for a place that is taken, or cannot be
            written.
    """
    if form not in FORMS:
        raise ValueError(f"`form` (={form!r}) must be one of {', '.join(map(repr, FORMS))}")
    adapter = read_adapter(adapter_dir)
    out = Path(out_dir)
    refuse_source(out, Path(adapter_dir))
    refuse_occupied(out)
    packing = choose_packing(adapter) if form == "bdlora" else None
    config, tensors, metadata = peft_content(adapter, packing, base_model)
    with new_folder(out) as made:
        write_tensors(made / TENSORS_FILE, tensors, metadata)
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def peft_content(
    adapter: Adapter, packing: Packing | None, base_model: str | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """What the two files hold: the configuration, and tensors by key with their metadata.

    Raises:
        MELoRAError: see `write_peft_adapter`.
    """
    _refuse_unknown_forms(adapter)
    sites = {name: adapter.tensors_of(name) for name in adapter.configs}
    loras = {name: loras_of(own) for name, own in sites.items()}
    stacks = [name for name in sites if is_stack(adapter, name)]
    rank = max(found[0].rank for found in loras.values())
    if packing is not None:
        rank = packing.rank_for(rank)
    tensors: dict[str, torch.Tensor] = {}
    for name in sites:
        if name in stacks:
            continue
        dense = loras[name][0].padded(rank)
        factors = dense if packing is None else packed(packing, name, sites[name], dense)
        tensors |= dict(zip(lora_keys(name), (factors.lora_a, factors.lora_b), strict=True))
    for module, parameters in by_module(stacks).items():
        for key in _nested(adapter, module, parameters):
            padded = [lora.padded(rank) for lora in loras[f"{module}.{key.parameter}"]]
            tensors |= dict(zip(lora_keys(key.wrapper), stacked(padded), strict=True))
    tensors |= {PREFIX + name: tensor for name, tensor in adapter.kept_tensors().items()}
    dropouts = {config.dropout for config in adapter.configs.values()}
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(adapter),
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 and not stacks else 0.0,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": [name for name in sites if name not in stacks],
        "target_parameters": stacks or None,
        "modules_to_save": list(adapter.kept) or None,
        "fan_in_fan_out": any(adapter.transposed.get(name) for name in sites if name not in stacks),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        **({} if packing is None else {"use_bdlora": packing.to_dict()}),
    }
    return config, tensors, {"format": "pt", METADATA_KEY: json.dumps({"blocks": _blocks(adapter)})}


def _refuse_unknown_forms(adapter: Adapter) -> None:
    """Raises MELoRAError for what PEFT has no form for."""
    if odd := sorted(adapter.row_dims):
        raise MELoRAError(
            f"`{adapter.directory}` adapts {', '.join(map(repr, odd))}, one matrix that is stored in three dimensions, "
            "which PEFT does not adapt: fold it into the base"
        )
    single = [name for name in adapter.kept if name in adapter.tensors]
    if single:
        raise MELoRAError(
            f"`{adapter.directory}` keeps single parameters trainable ({', '.join(map(repr, single))}); PEFT's "
            "`modules_to_save` takes modules: keep the module trainable, or fold the adapter into the base"
        )


def _nested(adapter: Adapter, module: str, parameters: list[str]) -> list[StackKey]:
    try:
        return nested(module, parameters)
    except ValueError as error:
        raise MELoRAError(
            f"`{adapter.directory}` cannot be written for PEFT: {error}; fold it into the base"
        ) from error


def _blocks(adapter: Adapter) -> Mapping[str, Any]:
    """How each site is cut, for whoever reads the LoRA back."""
    entries = {}
    for name, config in adapter.configs.items():
        fields = config.to_dict()
        entries[name] = {key: fields[key] for key in ("rank", "num_blocks", "split")}
    return entries


def _task_type(adapter: Adapter) -> str | None:
    """PEFT's name of the task; none where its model would ask for a head that the adapter has not trained."""
    name = adapter.model.get("class") or ""
    task = next((task for ending, task in _TASKS if re.search(f"({ending})$", name)), None)
    heads = _HEADS.get(task or "")
    return task if heads is None or heads & {last_name(kept) for kept in adapter.kept} else None
