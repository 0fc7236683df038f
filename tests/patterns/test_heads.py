"""One matrix that is stored in three dimensions, such as (in, heads, out of a head), as projections to heads are.

The oracle is the model's own forward in float64, on W + Δ.
"""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.fold_folders import Folders, bits
from support.models import (
    IN,
    OUT,
    Holder,
    as_stored,
    assert_equal,
    assert_near,
    assert_unchanged,
    dense_copy,
    dense_update,
    fill,
    randn,
)
from torch import nn
from transformers import XLNetConfig, XLNetModel

import melora_fx
from exporters import OrtRunner, export_onnx, fold_onnx
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.folding.site_weight import oriented_weight
from melora_fx.saving.model_adapter import site_entries

CONFIG = MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=5.0)
SPLIT = MELoRAConfig(rank=2, num_blocks=2, alpha=5.0, split=3)
"""An adapter for each of three heads."""

TO_HEADS = (IN, 3, OUT // 3)
FROM_HEADS = (2, 5, 3, IN // 3)
FORMS = {
    "to_heads": ("bti,ihd->bthd", (2, 5, IN), TO_HEADS, True),
    "to_heads_weight_first": ("xyz, abx -> abyz", (2, 5, IN), TO_HEADS, True),
    "to_heads_by_dots": ("...i,ihd->...hd", (2, 5, IN), TO_HEADS, True),
    "to_heads_in_another_order": ("bti,ihd->bdth", (2, 5, IN), TO_HEADS, True),
    "from_heads_in_another_order": ("dbht,ohd->tob", (IN // 3, 2, 3, 5), (OUT, 3, IN // 3), False),
    "from_heads": ("bthd,ohd->bto", FROM_HEADS, (OUT, 3, IN // 3), False),
    "from_heads_weight_first": ("hdo,bthd->bto", FROM_HEADS, (3, IN // 3, OUT), True),
}
"""Letters, shapes of input and weight, and whether the weight is stored as (in_features, out_features)."""

NO_LINEARS = {
    "one_matrix_for_each_head": ("bthd,shd->bths", (4, 3, 8)),
    "each_matrix_of_a_stack": ("bti,eoi->bteo", (3, 36, 24)),
    "heads_first": ("bti,hid->bthd", (3, 24, 12)),
    "sum_over_a_head": ("bti,ihd->bth", (24, 3, 12)),
}
"""Letters and shape of the weight."""


class Einsum(nn.Module):
    """`torch.einsum` of the input and one parameter, `w`, in the order of the letters."""

    def __init__(self, letters: str, w_shape: tuple[int, ...], *, weight_first: bool = False) -> None:
        super().__init__()
        self.letters = letters
        self.weight_first = weight_first
        self.w = nn.Parameter(randn(*w_shape, seed=11) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operands = (self.w, x) if self.weight_first else (x, self.w)
        return torch.einsum(self.letters, *operands)


class Heads(nn.Module):
    """Projections to heads and back in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(randn(*TO_HEADS, seed=11) / 5)
        self.o = nn.Parameter(randn(IN, 3, OUT // 3, seed=12) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = torch.tanh(torch.einsum("bti,ihd->bthd", x, self.q))
        return torch.einsum("ohd,bthd->bto", self.o, heads)


X = randn(2, 5, IN)


def heads() -> nn.Module:
    return Holder(Heads()).eval()


def xlnet() -> XLNetModel:
    torch.manual_seed(0)
    model = XLNetModel(XLNetConfig(vocab_size=50, d_model=24, n_layer=1, n_head=2, d_inner=48)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


XLNET_SITES = {
    **{f"layer.0.rel_attn.{name}": (24, 24, name != "o") for name in "qkvor"},
    "layer.0.ff.layer_1": (24, 48, False),
    "layer.0.ff.layer_2": (48, 24, False),
}
"""in_features, out_features, and whether the weight is stored in this order."""

IDS = {
    "input_ids": torch.tensor([[4, 9, 17, 30, 3], [8, 2, 41, 6, 6]]),
    "token_type_ids": torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]),
    "use_mems": False,
}

leaves_segments_alone = pytest.mark.filterwarnings("ignore:`rewrite` leaves 1 linears alone. `layer.0.rel_attn.seg_em")


def rewritten(model: Any, config: MELoRAConfig = CONFIG, **options: Any) -> Any:
    return melora_fx.rewrite(model, "all-linear", config, **options)


def described(model: nn.Module) -> dict[str, tuple[int, int, bool]]:
    found = melora_fx.sites(model).items()
    return {name: (site.in_features, site.out_features, site.weight_is_transposed) for name, site in found}


def assert_gradients(model: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    """Checks that the output and the gradients of input, A and B are those of the dense W + Δ."""
    dense = dense_copy(model, plain)
    given, wanted = x.clone().requires_grad_(), x.double().requires_grad_()
    assert_same_backward(model(given), dense(wanted))
    assert_near(given.grad, wanted.grad)
    assert_factor_gradients(model, dense)


def assert_same_backward(output: torch.Tensor, expected: torch.Tensor) -> None:
    assert_near(output, expected)
    weights = randn(*output.shape, seed=8)
    (output * weights).sum().backward()
    (expected * weights.double()).sum().backward()


def assert_factor_gradients(model: nn.Module, dense: nn.Module) -> None:
    parameters = dict(dense.named_parameters())
    for name, site in melora_fx.sites(model).items():
        factors = [factor.detach().double().requires_grad_() for factor in (site.lora_a, site.lora_b)]
        update = as_stored(site, dense_update(site.config, *factors))
        gradient = parameters[name if name in parameters else f"{name}.weight"].grad
        for factor, expected in zip(
            (site.lora_a, site.lora_b), torch.autograd.grad(update, factors, gradient), strict=True
        ):
            assert_near(factor.grad, expected)


@pytest.mark.default_cases("*-in_place", "to_heads-split-whole")
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
@pytest.mark.parametrize("config", [CONFIG, SPLIT], ids=["blocks", "split"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, config: MELoRAConfig, whole: bool) -> None:
    letters, x_shape, w_shape, is_transposed = FORMS[form]
    plain = Holder(Einsum(letters, w_shape, weight_first=form.endswith("weight_first")))
    x = randn(*x_shape)
    model = rewritten(copy.deepcopy(plain), config, **({"example_inputs": (x,)} if whole else {}))
    assert_equal(model(x), plain(x).detach())
    assert described(model) == {"inner.w": (IN, OUT, is_transposed)}
    (site,) = melora_fx.sites(model).values()
    assert (site.num_experts, site.lowering, site.weight.shape) == (1, "plain", w_shape)
    assert_gradients(fill(model), plain, x)


@pytest.mark.parametrize("form", NO_LINEARS)
def test_other_products_are_named(form: str) -> None:
    letters, shape = NO_LINEARS[form]
    ((name, reason),) = melora_fx.match(Holder(Einsum(letters, shape)), lambda *_: True).skipped
    assert (name, reason) == (
        "inner.w",
        f"a stack of matrices {shape} in a form that has no pattern, `einsum`: leave it out of `targets`",
    )


def test_folds() -> None:
    model = fill(rewritten(heads()))
    expected = dense_copy(model, heads())
    adapted = model(X).detach()
    report = melora_fx.check_fold(model)
    assert [site.name for site in report.sites] == ["inner.q", "inner.o"]
    folded = melora_fx.fold(copy.deepcopy(model))
    for name, weight in expected.named_parameters():
        assert_near(folded.get_parameter(name), weight)
    with melora_fx.folded(model):
        assert_equal(model(X), folded(X).detach())
    assert_equal(model(X).detach(), adapted)


def test_a_loaded_adapter_has_the_same_bits(tmp_path: Path) -> None:
    model = fill(rewritten(heads()))
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(heads(), tmp_path)
    assert_equal(loaded(X), model(X))
    assert_equal(melora_fx.load_adapter(fill(rewritten(heads()), seed=1), tmp_path)(X), model(X))


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies(make: Any) -> None:
    model = fill(rewritten(heads()))
    made = make(model)
    assert described(made) == described(model)
    assert_equal(made(X), model(X))
    melora_fx.fold(made)
    assert_equal(model(X), fill(rewritten(heads()))(X))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*lru_cache.*:UserWarning")
def test_compiled(fresh_dynamo: None) -> None:
    model = fill(rewritten(heads()))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_equal(compiled(X), model(X))
    with melora_fx.disabled(model):
        assert_equal(compiled(X), heads()(X).detach())


def test_from_the_meta_device() -> None:
    with torch.device("meta"):
        model = rewritten(heads())
    model.to_empty(device="cpu")
    model.load_state_dict(heads().state_dict(), strict=False)
    assert_equal(model(X), heads()(X).detach())
    assert_gradients(fill(model), heads(), X)


def test_files_and_records_of_other_sites_are_as_before() -> None:
    model = rewritten(nn.Sequential(nn.Linear(IN, OUT)))
    (site,) = melora_fx.sites(model).values()
    assert "row_dims" not in site_entries({"0": site})["0"]
    del vars(site.record)["row_dims"]  # like a record that an earlier version has pickled
    assert (site.num_experts, oriented_weight(site).shape) == (1, (OUT, IN))


def test_only_the_plain_lowering() -> None:
    model = heads()
    config = MELoRAConfig(rank=2, num_blocks=2, lowering="activation")
    with assert_unchanged(model), pytest.raises(ValueError, match=r"`inner.q`: `lowering` \(='activation'\) needs"):
        rewritten(model, config)


def test_one_weight_cut_in_two_ways() -> None:
    class Both(Heads):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = torch.einsum("bti,ihd->bthd", x, self.q)
            return torch.einsum("bth,ihd->btid", rows[..., 0], self.q.transpose(0, 1))

    class Twice(Heads):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = torch.einsum("bti,ihd->bthd", x, self.q)
            return rows + torch.einsum("btih,ihd->btd", x.unsqueeze(-1).expand(-1, -1, -1, 3), self.q).unsqueeze(2)

    reasons = dict(melora_fx.match(Holder(Twice()), lambda *_: True).skipped)
    assert "and by its transpose, or views it as matrices of different shapes" in reasons["inner.q"]
    reasons = dict(melora_fx.match(Holder(Both()), lambda *_: True).skipped)
    assert "its weight is also used by `einsum`" in reasons["inner.q"]


def test_a_weight_that_does_not_lie_side_by_side() -> None:
    model = heads()
    model.inner.q = nn.Parameter(model.inner.q.detach().transpose(1, 2).contiguous().transpose(1, 2))
    assert "in a form that has no pattern" in dict(melora_fx.match(model, "all-linear").skipped)["inner.q"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*lru_cache.*:UserWarning")
def test_onnx(tmp_path: Path) -> None:
    base, folded, adapter = tmp_path / "base.onnx", tmp_path / "folded.onnx", tmp_path / "adapter"
    model = fill(rewritten(heads()))
    melora_fx.save_adapter(model, adapter)
    export_onnx(heads(), {"x": X}, base)
    fold_onnx(base, adapter, folded)
    (output,) = OrtRunner(folded).run({"x": X.numpy()}).values()
    assert_near(torch.from_numpy(output), dense_copy(model, heads())(X.double()))
    facts = json.loads(onnx.load(folded, load_external_data=False).metadata_props[0].value)
    assert facts["sites"]["inner.q"]["row_dims"] == 1
    graph = onnx.load(base)
    facts = json.loads(graph.metadata_props[0].value)
    facts["weights"]["inner.q"]["is_transposed"] = True  # no view of such a weight is the matrix
    graph.metadata_props[0].value = json.dumps(facts)
    onnx.save(graph, base)
    with pytest.raises(MELoRAError, match=r"does not say where the weights of these sites .*\n`inner.q`; nearest"):
        fold_onnx(base, adapter, tmp_path / "other.onnx")


@pytest.mark.default_cases("4")
@pytest.mark.parametrize("num_blocks", [2, 4])
def test_xlnet(num_blocks: int) -> None:
    config = MELoRAConfig(rank=2, num_blocks=num_blocks)
    plain = xlnet()
    with pytest.warns(UserWarning, match="leaves 1 linears alone: `layer.0.rel_attn.seg_embed`"):
        model = rewritten(xlnet(), config)
    assert described(model) == XLNET_SITES
    assert_equal(model(**IDS)[0].detach(), plain(**IDS)[0].detach())
    dense = dense_copy(fill(model), plain)
    assert_same_backward(model(**IDS)[0], dense(**IDS)[0])
    assert_factor_gradients(model, dense)
    adapted = model(**IDS)[0].detach()
    torch.testing.assert_close(melora_fx.fold(model)(**IDS)[0], adapted, rtol=1e-5, atol=1e-5)


def test_what_is_mapped_to_none_is_not_missed() -> None:
    model = melora_fx.rewrite(xlnet(), {"seg_embed": None, "all-linear": CONFIG})
    assert described(model) == XLNET_SITES


@pytest.mark.slow
@leaves_segments_alone
def test_xlnet_whole() -> None:
    model = fill(rewritten(xlnet(), example_inputs=IDS))
    assert described(model) == XLNET_SITES
    in_place = fill(rewritten(xlnet()))
    torch.testing.assert_close(model(**IDS)[0], in_place(**IDS)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@leaves_segments_alone
def test_xlnet_on_disk(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    trained = folders.prepare(xlnet(), "all-linear", CONFIG)
    expected, checked = folders.in_memory(XLNetModel)
    report = folders.fold()
    assert bits(XLNetModel.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())
    assert {site.name: site for site in report.sites} == {site.name: site for site in checked.sites}
    assert {site.name for site in report.sites} == set(melora_fx.sites(trained)) == set(XLNET_SITES)
