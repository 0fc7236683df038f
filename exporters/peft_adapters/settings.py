"""Parses a PEFT configuration: the rank and scaling of each module.

Methods other than LoRA are refused with an error that names the method.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from melora_fx import MELoRAError

from .bdlora import LISTS
from .names import CONFIG_FILE

_VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with biases (`lora_bias`)",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "Activated LoRA",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained embeddings of single tokens",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
}
"""Setting that turns PEFT's LoRA into another method → the name of the method."""
_HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config"),
    *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_bdlora", "use_rslora"),
}
_LONGEST_MATCH_S = 1.0
_INITS = {"gaussian", "eva", "orthogonal", "mica"}
"""Initialisations that leave the base unchanged; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it."""
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task type of a folder → the modules that PEFT trains for it, and expects among the trained ones."""


@dataclass(frozen=True)
class PeftSettings:
    """The checked settings of an ordinary or a block-diagonal LoRA.

    Attributes:
        rank, alpha: the values for modules that match no pattern; alpha may be negative.
        rank_pattern, alpha_pattern: pattern of module names → rank, alpha.
        use_rslora: whether the scaling is alpha / sqrt(rank).
        dropout: the dropout probability of the adapter's input.
        fan_in_fan_out: whether weights are stored as (I, O).
        modules_to_save: names of modules that were trained in full, or the ends of their names.
        target_parameters: paths of stacks, or the ends of their paths.
        num_blocks: n of a block-diagonal LoRA; 1 for an ordinary one.
        packed: "a" and "b" → parts of the names of modules that store this factor in blocks.
        ensure_weight_tying: whether modules that are tied to trained ones were trained with them, and saved too.
        class_name: the class of the model, or None if the folder does not say.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    dropout: float
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...]
    num_blocks: int
    packed: Mapping[str, tuple[str, ...]]
    ensure_weight_tying: bool
    class_name: str | None

    def rank_of(self, name: str) -> int:
        """Returns the rank of a module or a parameter."""
        return _matched(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """Returns the absolute value of its alpha."""
        return abs(_matched(self.alpha_pattern, name, self.alpha))

    def is_negative(self, name: str) -> bool:
        """Returns whether its alpha is negative."""
        return _matched(self.alpha_pattern, name, self.alpha) < 0

    def scaling_of(self, name: str) -> float:
        """Returns the absolute value of the factor of B A."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def factor_of(self, name: str) -> str | None:
        """Returns the factor of a module that is stored in blocks, "a" or "b", or None.

        Raises:
            ValueError: if the lists name both.
        """
        found = [factor for factor, parts in self.packed.items() if any(part in name for part in parts)]
        if len(found) > 1:
            raise ValueError("`use_bdlora` names both of its factors: PEFT would not load it either")
        return found[0] if found else None


def parse_settings(directory: Path, config: Mapping[str, Any]) -> PeftSettings:
    """Returns the settings of a configuration.

    Raises:
        MELoRAError: if the configuration is of another method, which the text names, or a value has the wrong type or
            is out of range.
    """
    try:
        _refuse_variants(config)
        return _parse(config)
    except (TypeError, ValueError, KeyError) as error:
        raise MELoRAError(f"`{directory / CONFIG_FILE}`: {error}") from error


def modules_to_save(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of trained modules: the listed ones and the task's heads, which old versions do not list.

    Raises:
        TypeError: if the listed ones are not a list of names.
    """
    task = config.get("task_type")
    heads = HEADS.get(task, ()) if isinstance(task, str) else ()
    return (*_names(config, "modules_to_save"), *heads)


def _parse(config: Mapping[str, Any]) -> PeftSettings:
    bdlora = config.get("use_bdlora") or {}
    if not isinstance(bdlora, dict):
        raise TypeError(f"`use_bdlora` must be a JSON object, got {bdlora!r}")
    mapping = config.get("auto_mapping") or {}
    class_name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return PeftSettings(
        rank=_positive_int("r", config.get("r", 8)),
        alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern=_pattern(config, "rank_pattern", _positive_int),
        alpha_pattern=_pattern(config, "alpha_pattern", _alpha),
        use_rslora=_bool(config, "use_rslora"),
        dropout=_share("lora_dropout", config.get("lora_dropout") or 0.0),
        fan_in_fan_out=_bool(config, "fan_in_fan_out"),
        modules_to_save=modules_to_save(config),
        target_parameters=_names(config, "target_parameters"),
        num_blocks=_positive_int("nblocks", bdlora.get("nblocks", 1)),
        packed={factor: _names(bdlora, key) for factor, key in LISTS.items()},
        ensure_weight_tying=_bool(config, "ensure_weight_tying"),
        class_name=class_name if isinstance(class_name, str) else None,
    )


def _refuse_variants(config: Mapping[str, Any]) -> None:
    """Raises ValueError if the method is not LoRA, or more than LoRA."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"its `peft_type` is {kind!r}, not LORA or MELORA: merge it into the base with PEFT")
    for setting, method in _VARIANTS.items():
        if config.get(setting):
            raise ValueError(f"the adapter uses {method}, which cannot be read: merge it into the base with PEFT")
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"it has trained biases (`bias` is {config['bias']!r}), which cannot be read: merge it into the base with "
            "PEFT"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS:
        raise ValueError(
            f"`init_lora_weights` is {init!r}, with which PEFT changes the base: save the adapter with PEFT's "
            "`path_initial_model_for_weight_conversion`"
        )
    unknown = [name for name, value in config.items() if value and name not in {*_HARMLESS, *_VARIANTS}]
    if unknown:
        raise ValueError(
            f"it has unknown settings, which may belong to another method: {', '.join(sorted(unknown))}; merge it "
            "into the base with PEFT"
        )


def _matched(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the whole name or its end, as in PEFT, or the default.

    Raises:
        ValueError: if an expression takes longer than `_LONGEST_MATCH_S` to match.
    """
    for key, value in pattern.items():
        try:
            if regex.match(rf"(.*\.)?({key})$", name, timeout=_LONGEST_MATCH_S):
                return value
        except TimeoutError:
            raise ValueError(f"the expression {key!r} takes too long to match") from None
    return default


def _pattern(config: Mapping[str, Any], name: str, check: Any) -> dict[str, Any]:
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        raise TypeError(f"`{name}` must be a JSON object, got {pattern!r}")
    for key in pattern:
        try:
            regex.compile(key)
        except regex.error as error:
            raise ValueError(f"`{name}` has {key!r}, which is not a regular expression: {error}") from error
    return {key: check(f"{name}[{key!r}]", value) for key, value in pattern.items()}


def _names(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    names = config.get(name) or []
    if not isinstance(names, list) or not all(isinstance(each, str) and each for each in names):
        raise TypeError(f"`{name}` must be a list of names, got {names!r}")
    return tuple(names)


def _bool(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be true or false, got {value!r}")
    return value


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"`{name}` (={value!r}) must be at least 0 and below 1")
    return float(value)


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise ValueError(f"`{name}` (={value!r}) must be an integer from 1 to 2^20")
    return value


def _alpha(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 <= abs(value) <= 1e30:
        shown = repr(value)[:40]
        raise ValueError(f"`{name}` (={shown}) must be a number of size 1e-30 to 1e30; with 0 it would adapt nothing")
    return float(value)
