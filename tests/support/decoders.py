"""Small decoders with every part: grouped heads, a tokenizer, and an adapter that changes the generated tokens."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import melora_fx
from melora_fx import MELoRAConfig
from support.models import fill

VOCABULARY = 51
CONFIG = MELoRAConfig(rank=2, num_blocks=2, alpha=8)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(seed: int = 0, **settings: Any) -> hf.LlamaForCausalLM:
    """Returns a Llama with weights large enough that tokens depend on each other."""
    torch.manual_seed(seed)
    return spread(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | settings)))


def spread(model: Any) -> Any:
    """Enlarges the weights: a new model's are so small that all logits are alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.eval()


def adapted_llama(targets: Any = "all-linear", seed: int = 0) -> Any:
    return fill(melora_fx.rewrite(llama(), targets, CONFIG), seed)


def example() -> dict[str, torch.Tensor]:
    tokens = torch.arange(14).view(2, 7) % (VOCABULARY - 3) + 3
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def logits_after(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Returns torch's logits of the token after `ids`, without a cache and in a batch of one."""
    with torch.no_grad():
        outputs = model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return outputs.logits[0, -1].numpy()


def greedy_tokens(model: Any, ids: Sequence[int], steps: int) -> list[int]:
    """Returns the tokens that torch generates, without a cache; the model's end token is a token like any other."""
    written = list(ids)
    for _ in range(steps):
        written.append(int(logits_after(model, written).argmax()))
    return written[len(ids) :]


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with a word for each id, as in "w3 w4"; ids 0 to 2 are special."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def read_by(tokenizer: Any, prompt: Sequence[int], written: Sequence[int]) -> str:
    """Returns the text after a prompt, as it is in the whole text."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *written]))
    assert whole.startswith(before)
    return whole.removeprefix(before)


def text_folder(
    graph: str | Path, folder: Path, write: Callable[[Path], None] = write_tokenizer, **settings: Any
) -> Path:
    """Copies an export, adds a tokenizer, and puts the settings into its generation_config.json."""
    shutil.copytree(Path(graph).parent, folder)
    write(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder
