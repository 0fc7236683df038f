"""Loads an adapter folder into vLLM, in vLLM's environment, without a GPU and without vLLM's compiled parts.

    python -P vllm_reader.py MODEL ADAPTER OUT [--runner pooling] [--max-lora-rank N] [--model-impl transformers]
                             [--stacked]

builds vLLM's own model from the configuration in MODEL (no weights are read) and its LoRA manager, loads and activates
ADAPTER, and writes the updates B A in vLLM's layers to OUT, as `LAYER.SLICE` (O, I). The last line of standard output
is JSON: `{"ranks": [1, 8, …], "class": …, "error": …, "updates": {name: shape}}`.

The environment needs vLLM's Python files (its wheel installed with `--no-deps`, or unpacked), torch 2.13 or later,
transformers, and the packages that `vllm.lora.worker_manager` imports.
"""

import argparse
import json
import socket
from typing import Any, get_args

import torch
import vllm.platforms
from safetensors.torch import save_file
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()

from vllm.config import (  # noqa: E402
    CacheConfig,
    DeviceConfig,
    LoRAConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.config.lora import MaxLoRARanks  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.lora.worker_manager import WorkerLoRAManager  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402


def configuration(options: argparse.Namespace) -> VllmConfig:
    model = ModelConfig(
        model=options.model,
        tokenizer=options.model,
        skip_tokenizer_init=True,
        dtype="float32",
        runner=options.runner,
        model_impl=options.model_impl,
        enforce_eager=True,
    )
    return VllmConfig(
        model_config=model,
        lora_config=LoRAConfig(max_lora_rank=options.max_lora_rank, max_loras=1, max_cpu_loras=1),
        device_config=DeviceConfig("cpu"),
        cache_config=CacheConfig(block_size=16),
    )


def manager_of(config: VllmConfig) -> Any:
    """Returns vLLM's manager of adapters, around its own model, whose weights are not set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    initialize_model_parallel(1, 1)
    model = initialize_model(config)
    worker = WorkerLoRAManager(config, torch.device("cpu"), getattr(model, "embedding_modules", {}))
    worker.create_lora_manager(model, config)
    return worker


def updates(worker: Any) -> dict[str, torch.Tensor]:
    """Returns B A of each slice of each layer, if it is not zero."""
    found = {}
    for name, layer in worker._adapter_manager.modules.items():
        pairs = zip(getattr(layer, "lora_a_stacked", ()), getattr(layer, "lora_b_stacked", ()), strict=True)
        for index, (lora_a, lora_b) in enumerate(pairs):
            update = (lora_b[0] @ lora_a[0]).squeeze(0)
            if update.any():
                found[f"{name}.{index}"] = update.contiguous()
    return found


def load(worker: Any, adapter: str, is_stacked: bool) -> None:
    request = LoRARequest("adapter", 1, adapter, is_3d_lora_weight=is_stacked)
    lora = worker._load_adapter(request)
    worker._adapter_manager.add_adapter(lora)
    worker._adapter_manager.activate_adapter(lora.id)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("out")
    parser.add_argument("--runner", default="generate")
    parser.add_argument("--max-lora-rank", type=int, default=8)
    parser.add_argument("--model-impl", default="auto")
    parser.add_argument("--stacked", action="store_true")
    options = parser.parse_args()
    result: dict[str, Any] = {"ranks": get_args(MaxLoRARanks), "class": None, "error": None, "updates": {}}
    try:
        config = configuration(options)
        with set_current_vllm_config(config):
            worker = manager_of(config)
            result["class"] = type(worker._adapter_manager.model).__name__
            load(worker, options.adapter, options.stacked)
            tensors = updates(worker)
        save_file(tensors, options.out)
        result["updates"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
