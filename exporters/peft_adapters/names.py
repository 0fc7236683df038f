"""PEFT's names of the files and keys in an adapter folder.

The LoRA of a module has the keys `base_model.model.MODULE.lora_A.weight` (R, I) and `….lora_B.weight` (O, R).
"""

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
"""The start of all keys: the path of the model in PEFT's model."""
BASE_LAYER = ".base_layer"
"""The end of the path of a module or a wrapper that is inside another wrapper."""
METADATA_KEY = "melora"
"""Key of a file's metadata entry with the blocks from which a LoRA was written; PEFT ignores it."""


def lora_keys(module: str) -> tuple[str, str]:
    """Returns the keys of A and B of a module or a wrapper."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def last_name(module: str) -> str:
    """Returns the last part of a module's path."""
    return module.rpartition(".")[2]
