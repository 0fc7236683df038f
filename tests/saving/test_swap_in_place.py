"""`load_adapter` into a rewritten model with more sites and larger ranks than the adapter's, and back: no recompile."""

import copy

import pytest
import torch
from support.expert_stacks import Experts
from support.expert_stacks import inputs as routed
from support.models import (
    IN,
    OUT,
    TOWER_CONFIG,
    Functional,
    Holder,
    assert_equal,
    assert_near,
    assert_unchanged,
    by_torch_save,
    fill,
    output_of,
    randn,
    rewritten_tower,
    tower,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter_file import read_adapter

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Pair(nn.Module):
    """The sum of two modules with one site each."""

    def __init__(self, first, second):
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, *inputs):
        return self.first(*inputs) + self.second(*inputs)


class Written(Holder):
    """Multiplies by the weight of a module that it never calls: no graph of that module contains the product."""

    def forward(self, x):
        return x @ self.inner.projection.T


class Swap:
    """A model with a pair of sites, an adapter of both at rank 3, and one of only the first at rank 2."""

    def __init__(self, build, inputs, lowering="auto", num_blocks=3, whole=False):
        self.build = build
        self.inputs = inputs
        self.options = {"example_inputs": inputs} if whole else {}
        self.lowering = lowering
        self.num_blocks = num_blocks

    def rewritten(self, targets, rank, seed):
        torch.manual_seed(0)
        config = MELoRAConfig(rank=rank, num_blocks=self.num_blocks, alpha=3.0 * rank + 1, lowering=self.lowering)
        return fill(melora_fx.rewrite(self.build().eval(), targets, config, **self.options), seed)

    def large(self):
        return self.rewritten(["re:first.*", "re:second.*"], 3, seed=1)

    def small(self):
        return self.rewritten("re:first.*", 2, seed=2)

    def output(self, model):
        with torch.no_grad():
            return model(*self.inputs)


def linears():
    return Pair(nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False))


def written():
    return Pair(Written(Functional()), Written(Functional()))


def experts(form):
    pair = Pair(Experts(form), Experts(form))
    with torch.no_grad():
        pair.second.stack.mul_(-0.5)
    return pair


X = (randn(4, IN),)
ROUTED = tuple(routed().values())
SWAPS = {"written": Swap(written, X)}
for _capture in ("in_place", "whole"):
    for _lowering in ("weight", "activation", "plain", "triton"):
        SWAPS[f"{_lowering}-{_capture}"] = Swap(linears, X, _lowering, whole=_capture == "whole")
    for _form in ("batched_mm", "grouped_mm"):
        SWAPS[f"{_form}-{_capture}"] = Swap(
            lambda form=_form: experts(form), ROUTED, num_blocks=2, whole=_capture == "whole"
        )
each_swap = pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)


@pytest.fixture
def folders(tmp_path):
    """Adapters of towers: of all sites, and of two of them at a smaller rank, from another model."""
    melora_fx.save_adapter(rewritten_tower(), tmp_path / "large")
    melora_fx.save_adapter(two_sites(), tmp_path / "small")
    return tmp_path


def two_sites():
    return fill(melora_fx.rewrite(tower(), ["up", "conv"], MELoRAConfig((1, 1, 1), 3, alpha=(2.0, 1.0, 3.0))), seed=7)


def swapped_tower(folders):
    return melora_fx.load_adapter(rewritten_tower(), folders / "small")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.default_cases("weight-in_place", "activation-in_place", "grouped_mm-in_place")
@each_swap
def test_fewer_sites_and_smaller_ranks_and_back(swap, tmp_path):
    model, small = swap.large(), swap.small()
    first, expected = swap.output(model), swap.output(small)
    held = [*model.named_parameters(), *model.named_buffers()]
    melora_fx.save_adapter(model, tmp_path / "large")
    melora_fx.save_adapter(small, tmp_path / "small")
    melora_fx.load_adapter(model, tmp_path / "small")
    assert_equal(swap.output(model), expected)
    stays, goes = melora_fx.sites(model).values()
    assert (stays.is_absent, goes.is_absent) == (False, True)
    assert not goes.lora_a.any()
    assert not goes.lora_b.any()
    melora_fx.save_adapter(model, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "small")
    melora_fx.load_adapter(model, tmp_path / "large")
    assert_equal(swap.output(model), first)
    assert not any(site.is_absent for site in melora_fx.sites(model).values())
    melora_fx.save_adapter(model, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "large")
    now = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, _ in now] == [name for name, _ in held]
    assert all(tensor is before for (_, tensor), (_, before) in zip(now, held, strict=True))


@pytest.mark.slow  # the default one is in test_state.py
@each_swap
def test_compiled_code_stays(swap, tmp_path):
    model, small = swap.large(), swap.small()
    melora_fx.save_adapter(model, tmp_path / "large")
    melora_fx.save_adapter(small, tmp_path / "small")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    first = swap.output(compiled)
    compiled_once = counter.frame_count
    assert compiled_once
    melora_fx.load_adapter(compiled, tmp_path / "small")
    assert_equal(swap.output(compiled), swap.output(small))
    melora_fx.load_adapter(compiled, tmp_path / "large")
    assert_equal(swap.output(compiled), first)
    assert counter.frame_count == compiled_once


@pytest.mark.default_cases("weight-in_place", "activation-in_place", "written")
@each_swap
def test_a_swapped_model_trains_as_the_adapter_that_it_loaded(swap, tmp_path):
    model, small = swap.large(), swap.small()
    melora_fx.save_adapter(small, tmp_path / "small")
    swap.output(model)
    melora_fx.load_adapter(model, tmp_path / "small")
    for trained in (model, small):
        optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(trained).values(), lr=0.01, weight_decay=0.1)
        for _ in range(3):
            trained(*swap.inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    _, goes = melora_fx.sites(model).values()
    assert goes.lora_a.requires_grad
    assert not goes.lora_a.any()
    assert not goes.lora_b.any()
    melora_fx.save_adapter(model, tmp_path / "swapped")
    melora_fx.save_adapter(small, tmp_path / "small")
    ours, theirs = read_adapter(tmp_path / "swapped"), read_adapter(tmp_path / "small")
    assert ours.configs == theirs.configs
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_swap_inside_a_mode(mode, folders):
    model = rewritten_tower()
    first = output_of(model, X[0])
    with mode():
        melora_fx.load_adapter(model, folders / "small")
    assert_equal(output_of(model, X[0]), output_of(two_sites(), X[0]))
    model(X[0]).sum().backward()
    with mode():
        melora_fx.load_adapter(model, folders / "large")
    assert_equal(output_of(model, X[0]), first)


def test_what_the_graph_does_not_compute_with_is_saved_all_the_same(tmp_path):
    theirs = MELoRAConfig(rank=2, num_blocks=3, alpha=5.0, dropout=0.25, lowering="activation")
    melora_fx.save_adapter(fill(melora_fx.rewrite(tower(), "up", theirs)), tmp_path / "theirs")
    model = melora_fx.rewrite(tower(), "up", MELoRAConfig(rank=2, num_blocks=3, lowering="plain"))
    melora_fx.load_adapter(model, tmp_path / "theirs")
    config = melora_fx.sites(model)["up"].config
    assert (config.alpha, config.dropout, config.lowering) == (5.0, 0.0, "plain")
    melora_fx.save_adapter(model, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "theirs")
    assert melora_fx.check_fold(model).adapter_sha256 == read_adapter(tmp_path / "theirs").sha256


def test_an_absent_site_computes_the_base(folders):
    """Bit for bit. A graph that was recorded before the swap is refused."""
    model = rewritten_tower()
    loss = model(X[0]).sum()
    melora_fx.load_adapter(model, folders / "small")
    assert_equal(output_of(model.gate, X[0]), output_of(tower().gate, X[0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, by_torch_save], ids=["deepcopy", "torch.save"])
def test_copies_know_what_is_absent(copied, folders):
    model = swapped_tower(folders)
    other = copied(model)
    melora_fx.save_adapter(other, folders / "again")
    assert contents(folders / "again") == contents(folders / "small")
    melora_fx.load_adapter(model, folders / "large")
    assert melora_fx.sites(other)["gate"].is_absent
    assert not melora_fx.sites(model)["gate"].is_absent


def test_a_fresh_adapter_has_all_sites(folders):
    """A model gets a fresh adapter if it leaves the meta device."""
    model = swapped_tower(folders).to("meta").to_empty(device="cpu")
    model.load_state_dict(tower().state_dict(), strict=False)
    melora_fx.save_adapter(model, folders / "again")
    assert list(read_adapter(folders / "again").configs) == list(melora_fx.sites(model))


def test_fold_leaves_the_weight_of_an_absent_site(folders):
    def base():
        model = tower()
        with torch.no_grad():
            model.gate.weight[3] = -0.0
        return model

    model = fill(melora_fx.rewrite(base(), "all-linear", TOWER_CONFIG))
    loaded = melora_fx.load_adapter(base(), folders / "small")
    melora_fx.load_adapter(model, folders / "small")
    with melora_fx.folded(model):
        assert_equal(model.gate.weight.view(torch.int32), base().gate.weight.view(torch.int32))
    report = melora_fx.check_fold(model)
    assert report == melora_fx.check_fold(loaded)
    assert [site.name for site in report.sites] == ["conv", "up"]
    assert report.adapter_sha256 == read_adapter(folders / "small").sha256
    folded, expected = (dict(melora_fx.fold(each).named_parameters()) for each in (model, loaded))
    for name, tensor in expected.items():
        assert_equal(folded[name].view(torch.int32), tensor.view(torch.int32))


@pytest.mark.parametrize("action", ["save_adapter", "check_fold"])
def test_what_a_stale_optimizer_writes_is_not_lost(action, folders):
    model = rewritten_tower()
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=0.1)
    model(X[0]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    melora_fx.load_adapter(model, folders / "small")
    model(X[0]).sum().backward()
    optimizer.step()
    arguments = [folders / "again"] if action == "save_adapter" else []
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match=r"`gate` holds values, but the adapter .* lacks it: .* make a new optimizer"),
    ):
        getattr(melora_fx, action)(model, *arguments)
    assert not (folders / "again").exists()
    expected = output_of(model, X[0])
    assert_near(output_of(melora_fx.fold(model), X[0]), expected.double())


def test_an_adapter_without_a_common_site_is_of_another_model(folders):
    model = fill(melora_fx.rewrite(tower(), "head", TOWER_CONFIG))
    with assert_unchanged(model), pytest.raises(MELoRAError, match=r"(?s)sites that this one lacks:.*`up`.*`conv`"):
        melora_fx.load_adapter(model, folders / "small")


@pytest.mark.parametrize("kept", [True, False], ids=["the model's head", "the adapter's head"])
def test_other_heads_are_refused_with_fewer_sites(kept, tmp_path):
    options = {"keep_trainable": "norm"}
    saved = melora_fx.rewrite(tower(), "up", TOWER_CONFIG, **({} if kept else options))
    melora_fx.save_adapter(saved, tmp_path)
    model = rewritten_tower(**(options if kept else {}))
    with assert_unchanged(model), pytest.raises(MELoRAError, match="one head would stay where another belongs"):
        melora_fx.load_adapter(model, tmp_path)


def test_a_base_that_no_site_of_the_adapter_has_is_not_compared(folders):
    """Like a plain model, whose other weights may differ."""
    model = rewritten_tower()
    with torch.no_grad():
        model.gate.weight.add_(0.5)
    melora_fx.load_adapter(model, folders / "small")
    with torch.no_grad():
        model.up.weight.add_(0.5)
    with assert_unchanged(model), pytest.raises(MELoRAError, match=r"(?s)another base model:.*`up`"):
        melora_fx.load_adapter(model, folders / "small")
