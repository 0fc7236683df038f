"""How PEFT names what an adapter folder holds: files, keys, and the nesting of expert stacks.

A module's LoRA has the keys `base_model.model.MODULE.lora_A.weight` and `….lora_B.weight`. Stacks of expert matrices
are parameters; PEFT wraps their module once for each, the first parameter innermost: of two,
`experts.base_layer.lora_A` is the first's and `experts.lora_A` the last's. Source: PEFT 0.21, `tuners/lora/layer.py`
(ParamWrapper).
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from melora_fx.saving.adapter import Adapter

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
"""Of all keys: the path of the model in PEFT's own."""
METADATA_KEY = "melora"
"""Entry of a file's metadata, which PEFT does not look at, with the blocks that a LoRA was written from."""
BASE_LAYER = ".base_layer"
_STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""Names of expert stacks in the order in which transformers' modules have them."""


class StackKey(NamedTuple):
    """One stack of a module: the parameter's name, and the path of PEFT's wrapper around it."""

    parameter: str
    wrapper: str


def lora_keys(module: str) -> tuple[str, str]:
    """The keys of A and B of a module, or of a wrapper."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def last_name(module: str) -> str:
    """The name that PEFT's lists of module names are matched with."""
    return module.rpartition(".")[2]


def nested(module: str, parameters: Iterable[str]) -> list[StackKey]:
    """The wrappers around a module whose `parameters` are adapted.

    Raises:
        ValueError: for names of which nobody knows which is the first.
    """
    names = list(parameters)
    if len(names) > 1:
        if unknown := [name for name in names if name not in _STACKS]:
            raise ValueError(f"`{module}` has several stacks, and in which order is known of {_STACKS}, not {unknown}")
        names.sort(key=_STACKS.index)
    return [StackKey(name, module + BASE_LAYER * (len(names) - 1 - index)) for index, name in enumerate(names)]


def by_module(parameters: Iterable[str]) -> Mapping[str, list[str]]:
    """Paths of parameters as module → names."""
    found: dict[str, list[str]] = {}
    for path in parameters:
        module, _, name = path.rpartition(".")
        found.setdefault(module, []).append(name)
    return found


def is_stack(adapter: Adapter, site: str) -> bool:
    """Whether a site is a stack of matrices, for which PEFT has `target_parameters`."""
    shape = adapter.fingerprints.get(site, {}).get("shape", ())
    return adapter.tensors_of(site).num_experts > 1 or (len(shape) == 3 and site not in adapter.row_dims)
