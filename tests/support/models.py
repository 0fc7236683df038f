"""What the tests share: the oracle, the one tolerance table, and the models that are too small to hide anything.

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
"""By the dtype that the code under test computes its output in."""


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """`actual` equals the float64 `expected` up to the rounding of its own dtype."""
    assert expected.dtype == torch.float64, "the oracle is float64"
    torch.testing.assert_close(actual.detach().double(), expected.detach(), **TOLERANCE[actual.dtype])


def assert_equal(actual: Any, expected: Any) -> None:
    """The same bits."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@contextmanager
def kept_for_backward(held: Iterable[torch.Tensor]) -> Iterator[dict[int, int]]:
    """Address and bytes of each storage that autograd saves inside the block, those of `held` left out."""
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
    """Parametrizes `argument` by the values of `cases`; each key is a row of docs/SITUATIONS.md."""
    rows = [
        pytest.param(value, marks=pytest.mark.situation(area, what, result), id=what.replace("`", ""))
        for what, value in cases.items()
    ]
    return pytest.mark.parametrize(argument, rows)


def scalings(config: MELoRAConfig) -> list[float]:
    """s_i from the public fields alone."""
    ranks = config.rank if isinstance(config.rank, tuple) else (config.rank,) * config.num_blocks
    alphas = config.alpha if isinstance(config.alpha, tuple) else (config.alpha,) * config.num_blocks
    return [
        alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        for alpha, rank in zip(alphas, ranks, strict=True)
    ]


def dense_update(config: MELoRAConfig, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    """blockdiag(s_i B_i A_i) as a whole (O, I) matrix in float64, one block diagonal for each part of `split`."""
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
    """The weight as (O, I) or (I, O), or a stack of such; heads and the features of one are one side."""
    row_dims = site.record.row_dims
    return site.weight if row_dims is None else site.weight.flatten(0, row_dims - 1).flatten(1)


def as_stored(site: melora_fx.AdapterSite, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix (O, I), or a stack of such, as the parameter of `site` is stored."""
    return (matrix.mT if site.weight_is_transposed else matrix).reshape(site.weight.shape)


def site_update(site: melora_fx.AdapterSite) -> torch.Tensor:
    """The dense update of a site, (O, I) in float64; (E, O, I) of a stack."""
    if matrix_of(site).dim() == 2:
        return dense_update(site.config, site.lora_a, site.lora_b)
    adapters = zip(site.lora_a.chunk(len(site.weight)), site.lora_b.chunk(len(site.weight)), strict=True)
    return torch.stack([dense_update(site.config, a, b) for a, b in adapters])


def adapted_weight(site: melora_fx.AdapterSite) -> torch.Tensor:
    """W + ΔW as (O, I), or (E, O, I), in float64, however the parameter is stored."""
    weight = matrix_of(site).detach().double()
    return (weight.mT if site.weight_is_transposed else weight) + site_update(site).detach()


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every adapter of `model`; rows and columns above a block's own rank stay zero."""
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
    """Reproducible normal values, the same for each dtype up to rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_torch_save(model: nn.Module) -> nn.Module:
    """A copy by way of a file."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@contextmanager
def assert_unchanged(model: nn.Module, also: Iterable[Any] = ()) -> Iterator[None]:
    """The block leaves `model`, the containers `also` and the state of the process alone (`recorded_state`)."""
    before = recorded_state(model, also)
    yield
    assert_recorded(before, recorded_state(model, also))


def attempt(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, str]:
    """(result, "") of the call, or (None, text) of its MELoRAError: where both being right and refusing are correct.

    A model, the first argument then, is unchanged where it is refused.
    """
    model = args[0] if args and isinstance(args[0], nn.Module) else nn.Module()
    before = recorded_state(model)
    try:
        return function(*args, **options), ""
    except MELoRAError as error:
        assert_recorded(before, recorded_state(model))
        return None, str(error)


class Functional(nn.Module):
    """Owns a matrix under a name of its own and multiplies by it: the site is `….projection`."""

    def __init__(self, in_features: int = IN, out_features: int = OUT) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.projection, std=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.projection)


class Tower(nn.Module):
    """A hand-written model with a Linear with and without bias, a Conv1D, an own matrix and a head."""

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
    """Two linears on one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(IN, IN)
        self.b = nn.Linear(IN, IN)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Form(nn.Module):
    """One way to write a linear: `form(x, weight, bias)`. The weight is (O, I), or (I, O) when `transposed`."""

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
    """One child, so that its site has a name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def tower(seed: int = 0, dropout: float = 0.0) -> Tower:
    torch.manual_seed(seed)
    return Tower(dropout).eval()


def rewritten_tower(seed: int = 0, config: MELoRAConfig = TOWER_CONFIG, **options: Any) -> nn.Module:
    """A tower with filled adapters everywhere."""
    return fill(melora_fx.rewrite(tower(seed), "all-linear", config, **options), seed=seed + 100)


def kept_tower() -> nn.Module:
    """A tower whose norm has values of its own, which no exporter takes for those of another."""
    model = tower()
    with torch.no_grad():
        model.norm.weight.add_(0.1 * randn(OUT, seed=1))
        model.norm.bias.add_(0.1 * randn(OUT, seed=2))
    return model


def adapted_kept_tower(seed: int = 0) -> nn.Module:
    """With adapters of unequal ranks on some of its linears, and its norm kept trainable and trained."""
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
    """Its lm_head shares the embedding's weight, (51, 24): three blocks fit."""
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
    """Larger matrices than the 0.02 of Hugging Face, so that an error in one of them shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def tokens(batch: int = 2, length: int = 5, seed: int = 3) -> dict[str, torch.Tensor]:
    """Model inputs with a padded last row."""
    ids = torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output_of(model: nn.Module, inputs: Any) -> torch.Tensor:
    """The main output of a Hugging Face or hand-written model, without gradients."""
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(result, torch.Tensor):
        return result
    return result[0]


def dense_copy(model: nn.Module, plain: nn.Module) -> nn.Module:
    """A float64 copy of the `plain` model with the oracle's W + ΔW of the rewritten `model` in its weights."""
    dense = copy.deepcopy(plain).double()
    weights = dict(dense.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, site in melora_fx.sites(model).items():
            key = name if site.record.parameter_name != "weight" else f"{name}.weight"
            weights[key].copy_(as_stored(site, adapted_weight(site)))
    return dense
