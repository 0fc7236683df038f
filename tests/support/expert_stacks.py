"""A stack of experts, in the forms that transformers uses, with its oracle."""

from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.integrations.moe import _batched_linear, _grouped_linear

import melora_fx
from melora_fx import MELoRAConfig
from support.models import (
    adapted_weight,
    dense_update,
    randn,
)

E = 4
IN = 24
OUT = 40


CONFIG = MELoRAConfig(rank=2, num_blocks=2, alpha=3.0)


FORMS = ("batched_mm", "grouped_mm")


CONFIGS = {
    "one block": MELoRAConfig(rank=3, num_blocks=1),
    "two": CONFIG,
    "ranks and alphas": MELoRAConfig(rank=(1, 3, 2, 1), num_blocks=4, alpha=(1.0, 2.0, 3.0, 4.0), use_rslora=True),
    "split": MELoRAConfig(rank=2, num_blocks=2, split=2),
    "uneven split": MELoRAConfig(rank=(1, 2), num_blocks=2, split=(8, 32)),
}


ROUTES = {
    "mixed": (2, 0, 1, 2, 3, 0, 2),
    "one without rows": (3, 1, 1, 3, 0),
    "one with all": (1, 1, 1),
}


class Experts(nn.Module):
    """A stack and its product with rows (S, IN), each by its expert in `ids` (S,), as transformers writes it."""

    def __init__(self, form: str, *, transposed: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.form = form
        self.transposed = transposed
        shape = (E, IN, OUT) if transposed else (E, OUT, IN)
        self.stack = nn.Parameter(randn(*shape, seed=5).mul(0.2).to(dtype))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if self.form == "batched_mm":
            return _batched_linear(x, self.stack[ids], is_transposed=self.transposed)
        sorted_ids, order = torch.sort(ids)
        offs = torch.histc(sorted_ids.float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
        out = _grouped_linear(x[order], self.stack, offs, is_transposed=self.transposed)
        return torch.zeros_like(out).index_copy(0, order, out)


def inputs(route: str = "mixed", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    ids = torch.tensor(ROUTES[route])
    return {"x": randn(len(ids), IN, seed=6, dtype=dtype), "ids": ids}


def rewritten(form: str, config: MELoRAConfig = CONFIG, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = Experts(form, dtype=dtype, **options).eval()
    return melora_fx.rewrite(model, "stack", config, example_inputs=inputs(dtype=dtype))


def the_site(model: nn.Module) -> melora_fx.AdapterSite:
    (site,) = melora_fx.sites(model).values()
    return site


def expected(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns each row times its expert's W + Δ, in float64."""
    weights = adapted_weight(the_site(model))
    rows = [weights[i] @ x.double() for i, x in zip(given["ids"].tolist(), given["x"], strict=True)]
    return torch.stack(rows)


def factor_gradients(site: melora_fx.AdapterSite, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of A and B, which autograd takes through the dense update of float64 copies."""
    a, b = (tensor.detach().double().requires_grad_() for tensor in (site.lora_a, site.lora_b))
    updates = [dense_update(site.config, *pair) for pair in zip(a.chunk(E), b.chunk(E), strict=True)]
    return torch.autograd.grad(torch.stack(updates), (a, b), gradient)


TARGETS = ["gate_up_proj", "down_proj"]


def mixtral(form: str = "grouped_mm", **sizes: int) -> Any:
    torch.manual_seed(0)
    return _spread(hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES | sizes, num_local_experts=4)), form)


SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 36,
    "max_position_embeddings": 40,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _spread(model: Any, form: str) -> Any:
    """Sets weights large enough that every site changes the output."""
    model.set_experts_implementation(form)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()
