"""Log probabilities of the next token in llama.cpp, which the package xllamacpp runs."""

import json
from pathlib import Path
from typing import Any

import torch


def next_log_probabilities(
    model: Path, prompts: list[list[int]], num_tokens: int, adapter: Path | None = None
) -> list[dict[int, float]]:
    """Returns, for each prompt, the `num_tokens` likeliest tokens and their log probabilities, all in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 256
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.fit_params = False
    params.cache_ram_mib = 0
    params.verbosity = 0
    params.port = 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    return [_next(server, prompt, num_tokens) for prompt in prompts]


def _next(server: Any, prompt: list[int], num_tokens: int) -> dict[int, float]:
    request = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": num_tokens,
        "temperature": -1.0,
        "cache_prompt": False,
        "samplers": [],  # so that the token is drawn at random: one that ends the text would come without probabilities
        "seed": 0,
        "ignore_eos": True,
    }
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    assert "choices" in answer, answer
    (choices,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in choices["top_logprobs"]}


def worst_difference(found: list[dict[int, float]], model: Any, prompts: list[list[int]]) -> float:
    """Returns the largest difference from the log probabilities of a torch model."""
    worst = 0.0
    for by_token, prompt in zip(found, prompts, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        expected = logits.double().log_softmax(-1)
        worst = max([worst, *(abs(value - float(expected[token])) for token, value in by_token.items())])
    return worst
