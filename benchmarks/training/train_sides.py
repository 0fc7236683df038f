"""The sides that train_step times: a model, and the ways to train it.

Every side is a separate copy of the same model, with the same sites. The input is a batch of embeddings that requires a
gradient, so that the backward pass of every side, even the frozen model's, reaches the first layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import peft
import torch
from torch import nn
from transformers import AutoModel, LlamaModel

import melora_fx
from benchmarks.common.models import fill, load_smollm2, minilm_folder
from benchmarks.common.random_models import SHAPES, SMALL, llama_config, random_model
from melora_fx import MELoRAConfig

SEQUENCE = {"MiniLM-L6": 64, "SmolLM2-135M": 128, "Llama": 128, "Tiny": 16}
SEQUENCE |= {"MiniLM-shaped": 128, "SmolLM2-shaped": 512, "Llama-shaped, 1B": 2048}
SEQUENCE |= {name: 16 for name in SHAPES if name.endswith(SMALL)}
"""Tokens per text, by model."""


@dataclass(frozen=True)
class Setting:
    """A model and its adapters.

    `targets`: "centre" (the attention's projections; in MiniLM every dense layer too), "q,v" or "all-linear". `llama`:
    hidden size, intermediate size, layers and heads of the random Llama; "Tiny" is a Llama too, of fixed sizes.
    """

    model: str
    targets: str
    rank: int
    dtype: str
    dropout: float = 0.0
    num_blocks: int = 8
    llama: tuple[int, int, int, int] = (1024, 2816, 2, 16)

    @property
    def is_bert(self) -> bool:
        return self.model.startswith("MiniLM")

    @property
    def config(self) -> MELoRAConfig:
        return MELoRAConfig(rank=self.rank, num_blocks=self.num_blocks, alpha=2.0 * self.rank, dropout=self.dropout)


def base_model(setting: Setting) -> nn.Module:
    """Returns the model without a head, in training mode, with its own dropout at 0 and all parameters frozen."""
    if setting.model == "MiniLM-L6":
        model = AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False, hidden_dropout_prob=0.0)
        model.config.attention_probs_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    elif setting.model == "SmolLM2-135M":
        model = load_smollm2()[0].get_submodule("model")
    elif setting.model in SHAPES:
        model = random_model(SHAPES[setting.model])
    else:
        sizes = (64, 128, 4, 4) if setting.model == "Tiny" else setting.llama
        torch.manual_seed(0)
        model = LlamaModel(llama_config(*sizes, vocab_size=128))
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.to(getattr(torch, setting.dtype)).train().requires_grad_(False)


def site_names(model: nn.Module, setting: Setting) -> list[str]:
    """Returns the names of the linears that every side adapts."""
    targets: str | Sequence[str] = {
        "centre": ["query", "key", "value", "dense"] if setting.is_bert else ["q_proj", "k_proj", "v_proj", "o_proj"],
        "q,v": ["query", "value"] if setting.is_bert else ["q_proj", "v_proj"],
        "all-linear": "all-linear",
    }[setting.targets]
    return [site.name for site in melora_fx.match(model, targets, setting.config).sites]


def ours(model: nn.Module, setting: Setting, lowering: str = "auto") -> nn.Module:
    config = MELoRAConfig(**{**setting.config.to_dict(), "lowering": lowering})
    return melora_fx.rewrite(model, site_names(model, setting), config)


def peft_lora(model: nn.Module, setting: Setting, rank: int, *, is_bdlora: bool = False) -> nn.Module:
    """Adds PEFT's LoRA; a BD-LoRA has a block-diagonal B and an ordinary A."""
    names = site_names(model, setting)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=setting.dropout)
    if is_bdlora:
        config.use_bdlora = peft.BdLoraConfig(
            target_modules_bd_a=[], target_modules_bd_b=names, nblocks=setting.num_blocks
        )
    return peft.get_peft_model(model, config).train()  # type: ignore[arg-type]


class LoopLinear(nn.Module):
    """The forward of the MELoRA authors' code, reimplemented: a loop over the blocks (arXiv 2402.17263, figure 2)."""

    def __init__(self, base: nn.Linear, config: MELoRAConfig) -> None:
        super().__init__()
        self.base = base
        self.scaling = config.scalings[0]
        self.size = base.in_features // config.num_blocks
        rank = max(config.ranks)
        out_features = base.out_features // config.num_blocks
        self.dropouts = nn.ModuleList(nn.Dropout(config.dropout) for _ in range(config.num_blocks))
        self.lora_a = nn.ModuleList(nn.Linear(self.size, rank, bias=False) for _ in range(config.num_blocks))
        self.lora_b = nn.ModuleList(nn.Linear(rank, out_features, bias=False) for _ in range(config.num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.base(x)
        wide = x.to(self.lora_a[0].weight.dtype)  # type: ignore[arg-type]
        updates = []
        for index, (dropout, lora_a, lora_b) in enumerate(zip(self.dropouts, self.lora_a, self.lora_b, strict=True)):
            part = wide[..., index * self.size : (index + 1) * self.size]
            updates.append(lora_b(lora_a(dropout(part))) * self.scaling)
        return output + torch.cat(updates, dim=-1).to(output.dtype)


def authors_loop(model: nn.Module, setting: Setting) -> nn.Module:
    for name in site_names(model, setting):
        model.set_submodule(name, LoopLinear(model.get_submodule(name), setting.config))  # type: ignore[arg-type]
    return model


def full_fine_tuning(model: nn.Module, setting: Setting) -> nn.Module:
    """Trains every parameter except those of embeddings: the input replaces the word embeddings."""
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    return model


SIDES: Mapping[str, Callable[[nn.Module, Setting], nn.Module]] = {
    "frozen": lambda model, _: model,
    "ours": ours,
    "ours, plain nodes": lambda model, setting: ours(model, setting, "plain"),
    "ours, Triton": lambda model, setting: ours(model, setting, "triton"),
    "PEFT LoRA, equal rank": lambda model, setting: peft_lora(model, setting, setting.config.total_rank),
    "PEFT LoRA, equal parameters": lambda model, setting: peft_lora(model, setting, setting.rank),
    "PEFT BD-LoRA": lambda model, setting: peft_lora(model, setting, setting.config.total_rank, is_bdlora=True),
    "authors' loop": authors_loop,
    "full fine-tuning": full_fine_tuning,
}
ON_A_CPU = tuple(name for name in SIDES if name != "ours, Triton")
FEW_SIDES = ("frozen", "ours", "PEFT LoRA, equal rank")


def make_side(name: str, setting: Setting) -> nn.Module:
    """Returns a separate model for one side, with values in every adapter's B."""
    torch.manual_seed(0)
    return fill(SIDES[name](base_model(setting), setting))
