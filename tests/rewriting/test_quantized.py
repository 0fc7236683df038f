"""Quantised and half-precision bases: the base stays unchanged, its adapter trains, and a fold is refused."""

import copy
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import (
    assert_equal,
    assert_unchanged,
    dense_update,
    fill,
    in_situations,
    output_of,
    randn,
    site_update,
)
from support.quantized_bases import (
    BASES,
    CONFIG,
    EXACT,
    QUANTIZED,
    SIZES,
    difference,
    inputs_of,
    plain,
    rewritten,
)
from support.training import trainer_of
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import melora_fx
from melora_fx import AdapterCheckpointCallback, MELoRAConfig, MELoRAError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.ao's, and of imports in torchao, bitsandbytes
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


def each(names: Iterable[str], area: str, result: str) -> Any:
    """Parametrizes `base` with `names`."""
    return in_situations("base", area, result, {name: name for name in names})


@each(BASES, "Quantised and half-precision bases", "base unchanged; output and gradients of the dequantised W + Δ")
def test_a_base_trains_as_its_dequantised_weights_would(base: str) -> None:
    x = inputs_of(base).requires_grad_()
    plain_model, _ = BASES[base][0]()
    start = melora_fx.rewrite(BASES[base][0]()[0], "all-linear", CONFIG)
    assert_equal(start(x), plain_model(x))
    model, weights = rewritten(base)
    with melora_fx.disabled(model):
        assert_equal(model(x), plain_model(x))
    output = model.train()(x)
    output.float().square().sum().backward()

    found = melora_fx.sites(model)
    exact = x.detach().double().requires_grad_()
    factors = {
        name: [value.detach().double().requires_grad_() for value in (site.lora_a, site.lora_b)]
        for name, site in found.items()
    }
    hidden = exact
    for (name, (lora_a, lora_b)), weight in zip(factors.items(), weights, strict=True):
        bias = found[name].owner.bias
        bias = bias() if callable(bias) else bias
        total = weight.double() + _update(lora_a, lora_b)
        hidden = F.linear(hidden, total, bias.double())
        hidden = F.gelu(hidden) if name == "0" else hidden
    hidden.square().sum().backward()
    tolerance = BASES[base][1]
    assert difference(output.detach(), hidden.detach()) < tolerance
    assert difference(x.grad, exact.grad) < tolerance
    for name, site in found.items():
        assert difference(site.lora_a.grad, factors[name][0].grad) < tolerance
        assert difference(site.lora_b.grad, factors[name][1].grad) < tolerance
        assert site.lora_a.dtype == site.lora_b.dtype == torch.float32


def _update(lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    blocks = [CONFIG.scalings[index] * lora_b[index] @ lora_a[index] for index in range(CONFIG.num_blocks)]
    update = torch.block_diag(*blocks)
    assert_equal(update.detach(), dense_update(CONFIG, lora_a.detach(), lora_b.detach()))
    return update


@each(QUANTIZED, "Folding a quantised base", "refused with a remedy that works")
def test_fold_refuses_and_its_remedy_works(base: str, tmp_path) -> None:
    model, weights = rewritten(base)
    x = inputs_of(base)
    before = copy.deepcopy(model.state_dict())
    for action in (melora_fx.fold, melora_fx.check_fold):
        with pytest.raises(MELoRAError, match="load it into the dequantised base, fold, and quantise again") as caught:
            action(model)
        assert all(f"`{name}`" in str(caught.value) for name in melora_fx.sites(model))
    with pytest.raises(MELoRAError, match="dequantised base"), melora_fx.folded(model):
        pass
    assert list(before) == list(model.state_dict()), "nothing is changed"

    with pytest.warns(UserWarning, match="base weights of 2 sites are quantised .*records only their shapes"):
        melora_fx.save_adapter(model, tmp_path)
    dequantised = plain()
    with torch.no_grad():
        for index, weight in zip((0, 2), weights, strict=True):
            dequantised[index].weight.copy_(weight)
    folded = melora_fx.fold(melora_fx.load_adapter(dequantised, tmp_path))
    assert difference(folded(x.float()).detach(), model(x).detach().double()) < BASES[base][1]
    assert not melora_fx.sites(_quantised_again(base, folded))


def _quantised_again(base: str, folded: nn.Sequential) -> nn.Module:
    if "torchao" in base:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(folded, quantization.Int8WeightOnlyConfig())
    elif "dynamic" in base:
        folded = torch.ao.quantization.quantize_dynamic(folded, {nn.Linear}, dtype=torch.qint8)
    assert torch.isfinite(folded(randn(2, SIZES[0]))).all()
    return folded


@each(QUANTIZED, "Copying, saving and loading with a quantised base", "the same bits")
@pytest.mark.filterwarnings("ignore:the base weights of")
def test_an_adapter_of_a_quantised_base_is_copied_saved_and_loaded(base: str, tmp_path) -> None:
    model, _ = rewritten(base)
    x = inputs_of(base)
    copied = copy.deepcopy(model)
    assert_equal(copied(x), model(x))
    assert list(melora_fx.sites(copied)) == ["0", "2"]
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(BASES[base][0]()[0], tmp_path)
    assert_equal(loaded(x), model(x))
    fill(loaded, seed=5)
    melora_fx.load_adapter(loaded, tmp_path)
    assert_equal(loaded(x), model(x))


@pytest.mark.parametrize("base", ["torch dynamic int8", "bitsandbytes 8 bits", "bitsandbytes 4 bits"])
def test_a_packed_base_is_a_module_that_still_packs(base: str) -> None:
    plain_model, _ = BASES[base][0]()
    report = melora_fx.match(plain_model, "all-linear", CONFIG)
    model, _ = rewritten(base)
    assert [(site.in_features, site.out_features) for site in report.sites] == [(64, 96), (96, 64)]
    assert {site.pattern for site in report.sites} == {type(plain_model[0]).__name__}
    assert isinstance(model[0], type(plain_model[0]))
    own = [name for name in model.state_dict() if "lora_" not in name]
    assert own == list(plain_model.state_dict())


@pytest.mark.default_cases("torchao int8 weights")
@each(QUANTIZED, "Compiling a quantised base", "output and gradients of eager mode; one graph if the base is one")
def test_a_quantised_base_compiles(base: str) -> None:
    model, _ = rewritten(base)

    def step(run: nn.Module) -> tuple[torch.Tensor, ...]:
        x = inputs_of(base).requires_grad_()
        output = run(x)
        output.float().square().sum().backward()
        found = [x.grad, *(value.grad for value in melora_fx.adapter_parameters(model).values())]
        model.zero_grad()
        return output.detach(), *found

    whole = "dynamic" not in base  # Dynamo does not support the operator of `torch.ao`
    for compiled, eager in zip(
        step(torch.compile(model, backend="aot_eager", fullgraph=whole)), step(model), strict=True
    ):
        assert difference(compiled, eager.double()) < 1e-2 if "float" in base else 1e-5


def test_torchao_after_the_rewrite() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = fill(melora_fx.rewrite(plain(), "all-linear", CONFIG))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    before, _ = BASES["torchao int8 weights"][0]()
    expected = fill(melora_fx.rewrite(before, "all-linear", CONFIG))
    assert_equal(model(randn(3, 64)), expected(randn(3, 64)))


def test_plain_nodes_where_no_gradient_passes_are_refused() -> None:
    model, _ = BASES["torchao int8 weights and activations"][0]()
    config = MELoRAConfig(rank=2, num_blocks=4, lowering="plain")
    with (
        assert_unchanged(model),
        pytest.raises(ValueError, match="passes no gradient through this Int8Tensor: use 'auto'"),
    ):
        melora_fx.rewrite(model, "all-linear", config)


class Rows(nn.Linear):
    """Multiplies by its rows in two calls, which no lowering can replace."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(x, self.weight[:48]), F.linear(x, self.weight[48:])], -1)


def test_rows_of_a_base_without_gradients_are_refused() -> None:
    """Layers before it would be trained with only the adapter's gradient."""
    model, _ = BASES["torchao int8 weights and activations"][0]()
    model[0].__class__ = Rows
    with (
        assert_unchanged(model),
        pytest.raises(ValueError, match=r"`0`: .* passes no gradient .* this Int8Tensor, and the other lowerings need"),
    ):
        melora_fx.rewrite(model, "all-linear", CONFIG)


class Packed(nn.Module):
    """A linear as in packed formats: bytes and scales in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8).t().contiguous())
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight * self.scale)


def test_a_packed_format_is_adapted_in_place_only() -> None:
    model = nn.Sequential(Packed(nn.Linear(64, 96)), nn.Linear(96, 64))
    x = randn(2, 64)
    report = melora_fx.match(model, "all-linear", CONFIG, example_inputs=(x,))
    assert [site.name for site in report.sites] == ["1"]
    assert dict(report.skipped)["0"] == "its weight is packed: adapt it in place, without `example_inputs=`"
    expected = model(x)
    rewritten = melora_fx.rewrite(model, "all-linear", CONFIG)
    assert_equal(rewritten(x), expected)
    site = melora_fx.sites(fill(rewritten))["0"]
    dense = x.double() @ ((model[0].qweight * model[0].scale).double() + site_update(site).t())
    assert difference(rewritten[0](x).detach(), dense.detach()) < EXACT


def test_what_only_looks_like_a_packed_linear_is_none() -> None:
    class Sized(nn.Module):
        def __init__(self, inner: nn.Module | None = None) -> None:
            super().__init__()
            self.in_features = 64
            self.out_features = 96
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.inner is None else self.inner(x)

    model = nn.Sequential(Sized(), Sized(Packed(nn.Linear(64, 96))), Sized(nn.Linear(96, 64)))
    assert [site.name for site in melora_fx.match(model, "all-linear", CONFIG).sites] == ["1.inner", "2.inner"]


def test_a_packed_forward_without_a_gradient_gets_one() -> None:
    class NoGradient(Packed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.detach()) + 1.0

    def gradient(kind: type[Packed]) -> torch.Tensor:
        torch.manual_seed(0)
        model = fill(melora_fx.rewrite(nn.Sequential(kind(nn.Linear(64, 96))), "all-linear", CONFIG))
        x = randn(3, 2, 64).requires_grad_()
        (model(x) * randn(3, 2, 96, seed=5)).sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(NoGradient), gradient(Packed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["torchao int8", "bitsandbytes 4 bits"])
@pytest.mark.filterwarnings("ignore:.*(8bit|4bit|quantiz)")
def test_a_quantised_head_cannot_be_kept_trainable(base: str, tmp_path) -> None:
    model = _from_pretrained(base, tmp_path, skipped=("nothing",))
    with assert_unchanged(model), pytest.raises(ValueError, match="'classifier' is quantised and cannot be trained"):
        melora_fx.rewrite(model, ["query"], CONFIG, keep_trainable="classifier")


def _from_pretrained(kind: str, directory: Path, skipped: tuple[str, ...] = ("classifier",)) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)  # bitsandbytes multiplies in blocks of 32
    BertForSequenceClassification(BertConfig(**sizes, vocab_size=50)).save_pretrained(directory)
    if kind == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization")
        config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=[*skipped])
    else:
        pytest.importorskip("bitsandbytes")
        bits = {"bitsandbytes 8 bits": {"load_in_8bit": True}, "bitsandbytes 4 bits": {"load_in_4bit": True}}[kind]
        config = transformers.BitsAndBytesConfig(**bits, llm_int8_skip_modules=[*skipped])
    return BertForSequenceClassification.from_pretrained(directory, quantization_config=config, device_map="cpu")


@pytest.mark.slow
@each(
    ["torchao int8", "bitsandbytes 8 bits", "bitsandbytes 4 bits"], "A quantised base in a Trainer", "trains, resumes"
)
@pytest.mark.filterwarnings("ignore:the base weights of", "ignore:.*(8bit|4bit|quantiz)")
def test_a_trainer_trains_a_quantised_model(base: str, tmp_path) -> None:
    model = _from_pretrained(base, tmp_path / "model")
    with pytest.raises(ValueError, match="purely quantized"):  # a Trainer's error for a model without adapters
        trainer_of(model, tmp_path / "refused")
    model = melora_fx.rewrite(model, ["query", "value"], CONFIG, keep_trainable=["classifier"])
    before = {name: value.clone() for name, value in melora_fx.adapter_parameters(model).items()}
    trainer, losses = trainer_of(model, tmp_path / "run", AdapterCheckpointCallback())
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses.by_step.values())
    assert not any(torch.equal(value, before[name]) for name, value in melora_fx.adapter_parameters(model).items())

    again = _from_pretrained(base, tmp_path / "model")
    again = melora_fx.rewrite(again, ["query", "value"], CONFIG, keep_trainable=["classifier"])
    resumed, second = trainer_of(again, tmp_path / "run", AdapterCheckpointCallback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert second.by_step == {step: loss for step, loss in losses.by_step.items() if step > 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = melora_fx.load_adapter(_from_pretrained(base, tmp_path / "model"), tmp_path / "run" / "checkpoint-6")
    inputs = {"input_ids": torch.arange(10).view(2, 5)}
    assert_equal(output_of(loaded.eval(), inputs), output_of(model.eval(), inputs))
