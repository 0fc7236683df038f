"""Shared by the tests: the oracle, the table of tolerances, and models that are too small to hide anything.

The oracle is the dense update in float64 through `torch.block_diag`, written from the paper's equations and not from
the code under test. Sizes are odd on purpose: 24 → 36.
"""

import copy
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError
from support.recorded_state import assert_recorded, recorded_state

IN = 24
OUT = 36

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 4e-3},  # eps 2^-11
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 3e-2},  # eps 2^-8; base, adapter and their sum are each rounded once
}
"""Keyed by the dtype in which the code under test computes its output."""


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Checks that `actual` equals the float64 `expected` up to the rounding of its own dtype."""
    assert expected.dtype == torch.float64, "the oracle is float64"
    torch.testing.assert_close(actual.detach().double(), expected.detach(), **TOLERANCE[actual.dtype])


def assert_equal(actual: Any, expected: Any) -> None:
    """Checks that the bits are the same."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@contextmanager
def kept_for_backward(held: Iterable[torch.Tensor]) -> Iterator[dict[int, int]]:
    """Yields a dict of the address and bytes of each storage that autograd saves in the block, except `held`'s."""
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept = dict[int, int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def in_situations(argument: str, area: str, result: str, cases: Mapping[str, Any]) -> Any:
    """Parametrizes `argument` with the values of `cases`; each key is a row of docs/SITUATIONS.md."""
    rows = [
        pytest.param(value, marks=pytest.mark.situation(area, what, result), id=what.replace("`", ""))
        for what, value in cases.items()
    ]
    return pytest.mark.parametrize(argument, rows)


def scalings(config: MELoRAConfig) -> list[float]:
    """Returns each s_i, computed only from the public fields."""
    ranks = config.rank if isinstance(config.rank, tuple) else (config.rank,) * config.num_blocks
    alphas = config.alpha if isinstance(config.alpha, tuple) else (config.alpha,) * config.num_blocks
    return [
        alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        for alpha, rank in zip(alphas, ranks, strict=True)
    ]


def dense_update(config: MELoRAConfig, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    """Returns blockdiag(s_i B_i A_i) as one (O, I) matrix in float64, one block diagonal for each part of `split`."""
    a = lora_a.double()
    b = lora_b.double()
    num_blocks = b.size(0)
    out_features = b.size(0) * b.size(1)
    rank = b.size(2)
    sizes = [out_features]
    if isinstance(config.split, int):
        sizes = [out_features // config.split] * config.split
    elif config.split is not None:
        sizes = list(config.split)
    rows = []
    start = 0
    for part, size in enumerate(sizes):
        height = size // num_blocks
        blocks = [
            scaling * b[i, start : start + height] @ a[i, part * rank : (part + 1) * rank]
            for i, scaling in enumerate(scalings(config))
        ]
        rows.append(torch.block_diag(*blocks))
        start += height
    return torch.cat(rows)


def matrix_of(site: melora_fx.AdapterSite) -> torch.Tensor:
    """Returns the weight as a matrix (O, I) or (I, O), or a stack of them; heads and their features form one side."""
    row_dims = site.record.row_dims
    return site.weight if row_dims is None else site.weight.flatten(0, row_dims - 1).flatten(1)


def as_stored(site: melora_fx.AdapterSite, matrix: torch.Tensor) -> torch.Tensor:
    """Returns a matrix (O, I), or a stack of them, in the shape in which the parameter of `site` is stored."""
    return (matrix.mT if site.weight_is_transposed else matrix).reshape(site.weight.shape)


def site_update(site: melora_fx.AdapterSite) -> torch.Tensor:
    """Returns the dense update of a site in float64: (O, I), or (E, O, I) for a stack."""
    if matrix_of(site).dim() == 2:
        return dense_update(site.config, site.lora_a, site.lora_b)
    adapters = zip(site.lora_a.chunk(len(site.weight)), site.lora_b.chunk(len(site.weight)), strict=True)
    return torch.stack([dense_update(site.config, a, b) for a, b in adapters])


def adapted_weight(site: melora_fx.AdapterSite) -> torch.Tensor:
    """Returns W + ΔW as (O, I), or (E, O, I), in float64, however the parameter is stored."""
    weight = matrix_of(site).detach().double()
    return (weight.mT if site.weight_is_transposed else weight) + site_update(site).detach()


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fills every adapter of `model` with random values; rows and columns above a block's own rank stay zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, site in sorted(melora_fx.sites(model).items()):
            a = torch.randn(site.lora_a.shape, generator=generator) / math.sqrt(site.lora_a.size(2))
            b = torch.randn(site.lora_b.shape, generator=generator) * 0.3
            rank = b.size(2)
            for block, own in enumerate(site.config.ranks * site.num_experts):
                a[block].unflatten(0, (-1, rank))[:, own:] = 0
                b[block, :, own:] = 0
            site.lora_a.copy_(a)
            site.lora_b.copy_(b)
    return model


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns reproducible normal values, the same for each dtype up to rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_torch_save(model: nn.Module) -> nn.Module:
    """Returns a copy made with `torch.save` and `torch.load`."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@contextmanager
def assert_unchanged(model: nn.Module, also: Iterable[Any] = ()) -> Iterator[None]:
    """Checks that the block leaves `model`, the containers `also` and the process unchanged (`recorded_state`)."""
    before = recorded_state(model, also)
    yield
    assert_recorded(before, recorded_state(model, also))


def attempt(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, str]:
    """Returns (result, "") of the call, or (None, text) of its MELoRAError, for calls that may succeed or be refused.

    Checks that a model, if it is the first argument, is unchanged after a refusal.
    """
    model = args[0] if args and isinstance(args[0], nn.Module) else nn.Module()
    before = recorded_state(model)
    try:
        return function(*args, **options), ""
    except MELoRAError as error:
        assert_recorded(before, recorded_state(model))
        return None, str(error)


class Functional(nn.Module):
    """Owns a matrix called `projection` and multiplies by it: the site is `….projection`."""

    def __init__(self, in_features: int = IN, out_features: int = OUT) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.projection, std=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.projection)


class Tower(nn.Module):
    """A hand-written model with a Linear with and without bias, a Conv1D, a matrix of its own and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(IN, OUT)
        self.gate = nn.Linear(IN, OUT, bias=False)
        self.own = Functional()
        self.norm = nn.LayerNorm(OUT)
        self.drop = nn.Dropout(dropout)
        self.conv = Conv1D(IN, OUT)
        self.head = nn.Linear(IN, 6)
        nn.init.normal_(self.conv.weight, std=0.2)
        nn.init.normal_(self.conv.bias, std=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x)) * self.gate(x) + self.own(x)
        return self.head(torch.relu(self.conv(self.drop(self.norm(hidden)))))


TOWER_SITES = ("up", "gate", "own.projection", "conv", "head")
TOWER_CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=5.0)


class Tied(nn.Module):
    """Two linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(IN, IN)
        self.b = nn.Linear(IN, IN)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Form(nn.Module):
    """One way to write a linear: `form(x, weight, bias)`. The weight is (O, I), or (I, O) if `transposed`."""

    def __init__(
        self,
        form: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        transposed: bool = False,
        bias_shape: tuple[int, ...] = (OUT,),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.form = form
        shape = (IN, OUT) if transposed else (OUT, IN)
        self.weight = nn.Parameter(randn(*shape, seed=11).mul(0.2).to(dtype))
        self.bias = nn.Parameter(randn(*bias_shape, seed=12).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form(x, self.weight, self.bias)


class Holder(nn.Module):
    """Has one child, so that the child's site has a name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def tower(seed: int = 0, dropout: float = 0.0) -> Tower:
    torch.manual_seed(seed)
    return Tower(dropout).eval()


def rewritten_tower(seed: int = 0, config: MELoRAConfig = TOWER_CONFIG, **options: Any) -> nn.Module:
    """Returns a tower with filled adapters on all of its linears."""
    return fill(melora_fx.rewrite(tower(seed), "all-linear", config, **options), seed=seed + 100)


def kept_tower() -> nn.Module:
    """Returns a tower whose norm has unique values, so that no exporter confuses them with others."""
    model = tower()
    with torch.no_grad():
        model.norm.weight.add_(0.1 * randn(OUT, seed=1))
        model.norm.bias.add_(0.1 * randn(OUT, seed=2))
    return model


def adapted_kept_tower(seed: int = 0) -> nn.Module:
    """Returns `kept_tower` with adapters of unequal ranks on some linears, and its norm kept trainable and changed."""
    config = MELoRAConfig(rank=(1, 2, 2), num_blocks=3, alpha=5.0)
    model = fill(melora_fx.rewrite(kept_tower(), ["up", "gate", "conv"], config, keep_trainable="norm"), seed)
    with torch.no_grad():
        model.norm.bias.add_(0.1 * randn(OUT, seed=seed + 3))
    return model


_BERT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 36,
    "max_position_embeddings": 32,
}


def bert(seed: int = 0, num_layers: int = 2) -> BertModel:
    torch.manual_seed(seed)
    return _spread(BertModel(BertConfig(**_BERT | {"num_hidden_layers": num_layers})).eval())


def bert_classifier(seed: int = 0, num_layers: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(**_BERT | {"num_hidden_layers": num_layers}, num_labels=3)
    return _spread(BertForSequenceClassification(config).eval())


def gpt2(seed: int = 0, num_layers: int = 2) -> GPT2LMHeadModel:
    """Returns a GPT-2 whose lm_head shares the embedding's weight, (51, 24): three blocks fit."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=51,
        n_positions=32,
        n_embd=24,
        n_layer=num_layers,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _spread(GPT2LMHeadModel(config).eval())


def _spread(model: Any) -> Any:
    """Scales the matrices up from Hugging Face's 0.02, so that an error in one of them shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def tokens(batch: int = 2, length: int = 5, seed: int = 3) -> dict[str, torch.Tensor]:
    """Returns model inputs with a padded last row."""
    ids = torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output_of(model: nn.Module, inputs: Any) -> torch.Tensor:
    """Returns the main output of a Hugging Face or hand-written model, without gradients."""
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(result, torch.Tensor):
        return result
    return result[0]


def dense_copy(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Returns a float64 copy of `plain` whose weights are the oracle's W + ΔW of the rewritten `model`."""
    dense = copy.deepcopy(plain).double()
    weights = dict(dense.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, site in melora_fx.sites(model).items():
            key = name if site.record.parameter_name != "weight" else f"{name}.weight"
            weights[key].copy_(as_stored(site, adapted_weight(site)))
    return dense
