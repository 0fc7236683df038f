"""How PEFT names what an adapter folder holds.

The LoRA of a module has the keys `base_model.model.MODULE.lora_A.weight` (R, I) and `….lora_B.weight` (O, R).
"""

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
"""Of all keys: the path of the model in PEFT's own."""
BASE_LAYER = ".base_layer"
"""Ends the path of a module, or a wrapper, that another is wrapped around."""
METADATA_KEY = "melora"
"""Entry of a file's metadata, which PEFT does not look at, with the blocks that a LoRA was written from."""


def lora_keys(module: str) -> tuple[str, str]:
    """The keys of A and B of a module, or of a wrapper."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def last_name(module: str) -> str:
    """A module's own name, behind those of its parents."""
    return module.rpartition(".")[2]
