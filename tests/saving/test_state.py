"""Adapter folders: round trips bit for bit, swaps in place, and every file that must be refused without a trace."""

import copy
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_files import TENSORS, header_of, write_file
from support.models import (
    IN,
    OUT,
    TOWER_CONFIG,
    TOWER_SITES,
    Tower,
    assert_equal,
    assert_near,
    assert_unchanged,
    attempt,
    bert,
    bert_classifier,
    dense_copy,
    dense_update,
    fill,
    output_of,
    randn,
    rewritten_tower,
    tokens,
    tower,
)
from support.zoo import SelfAttention
from torch import nn
from torch._dynamo.testing import CompileCounter

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter_file import read_adapter

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CONFIG = "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    """A saved adapter of `rewritten_tower(0)`."""
    melora_fx.save_adapter(rewritten_tower(), tmp_path / "adapter")
    return tmp_path / "adapter"


def adapter_state(model):
    return {name: p.detach().clone() for name, p in melora_fx.adapter_parameters(model).items()}


def rewrite_file(folder, *, header=None, metadata=None, tensors=None):
    """Rewrites the folder's file with another header or other tensors, signed."""
    values = load_file(folder / TENSORS) if tensors is None else tensors
    if metadata is not None:
        save_file(values, folder / TENSORS, metadata)
    else:
        write_file(folder, header_of(folder) if header is None else header, values)


@pytest.mark.default_cases("tower-*", "*-in_place", "bert-whole")
def test_round_trip_on_a_plain_model(case, tmp_path):
    melora_fx.save_adapter(case.model, tmp_path)
    options = {}
    if case.captured:
        options["example_inputs"] = (case.inputs,) if isinstance(case.inputs, torch.Tensor) else case.inputs
    plain = case.build()
    loaded = melora_fx.load_adapter(plain, tmp_path, **options)
    if not case.captured:
        assert loaded is plain
    assert_equal(adapter_state(loaded), adapter_state(case.model))
    assert_equal(output_of(loaded, case.inputs), output_of(case.model, case.inputs))
    ours = melora_fx.sites(case.model)
    theirs = melora_fx.sites(loaded)
    assert {name: site.config for name, site in ours.items()} == {name: site.config for name, site in theirs.items()}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in case.model.named_parameters() if p.requires_grad
    }


def test_round_trip_between_the_captures(tmp_path):
    x = randn(2, 5, IN)
    in_place = rewritten_tower()
    melora_fx.save_adapter(in_place, tmp_path)
    captured = melora_fx.load_adapter(tower(), tmp_path, example_inputs=(x,))
    assert_equal(output_of(captured, x), output_of(in_place, x))
    melora_fx.save_adapter(fill(captured, seed=3), tmp_path)
    melora_fx.load_adapter(in_place, tmp_path)
    assert_equal(output_of(in_place, x), output_of(captured, x))


CONFIGS = {
    "ranks_alphas": MELoRAConfig(rank=(1, 4, 2), num_blocks=3, alpha=(1.0, 0.5, 4.0)),
    "rslora": MELoRAConfig(rank=3, num_blocks=2, alpha=1.0, use_rslora=True),
    "split_count": MELoRAConfig(rank=2, num_blocks=3, split=3),
    "split_sizes": MELoRAConfig(rank=(2, 1), num_blocks=2, split=(24, 12)),
    "dropout": MELoRAConfig(rank=2, num_blocks=1, dropout=0.25),
    "orthogonal": MELoRAConfig(rank=2, num_blocks=1, init="orthogonal"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_of_each_config(config, tmp_path):
    model = fill(melora_fx.rewrite(tower(), ["up", "own.projection"], config))
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(tower(), tmp_path)
    assert {name: site.config for name, site in melora_fx.sites(loaded).items()} == {
        "up": config,
        "own.projection": config,
    }
    x = randn(2, IN)
    assert_equal(output_of(loaded, x), output_of(model, x))
    assert_near(output_of(loaded, x), output_of(dense_copy(model, tower()), x.double()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_round_trip_of_other_base_dtypes(dtype, tmp_path):
    model = fill(melora_fx.rewrite(tower().to(dtype), "all-linear", TOWER_CONFIG))
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(tower().to(dtype), tmp_path)
    assert_equal(adapter_state(loaded), adapter_state(model))
    x = randn(2, IN, dtype=dtype)
    assert_equal(output_of(loaded, x), output_of(model, x))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param(torch.float32, torch.bfloat16, id="fp32_to_bf16"),
        pytest.param(torch.bfloat16, torch.float32, id="bf16_to_fp32"),
        pytest.param(torch.float32, torch.float16, id="fp32_to_fp16"),
        pytest.param(torch.float32, torch.float64, id="fp32_to_fp64"),
        pytest.param(torch.float64, torch.float32, id="fp64_to_fp32"),
    ],
)
def test_fingerprint_allows_the_rounding_of_the_coarser_dtype(saved, loaded, tmp_path):
    model = fill(melora_fx.rewrite(tower().to(saved), "all-linear", TOWER_CONFIG))
    melora_fx.save_adapter(model, tmp_path)
    other = melora_fx.load_adapter(tower().to(loaded), tmp_path)
    assert_equal(
        {name: value.float() for name, value in adapter_state(other).items()},
        {name: value.float() for name, value in adapter_state(model).items()},
    )


def test_module_that_is_the_root_itself(tmp_path):
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT)
    model = fill(melora_fx.rewrite(copy.deepcopy(plain), "all-linear", TOWER_CONFIG))
    melora_fx.save_adapter(model, tmp_path)
    x = randn(2, IN)
    assert_equal(output_of(melora_fx.load_adapter(copy.deepcopy(plain), tmp_path), x), output_of(model, x))


def test_save_of_a_compiled_wrapper(tmp_path):
    model = rewritten_tower()
    melora_fx.save_adapter(torch.compile(model, backend="eager"), tmp_path)
    assert_equal(adapter_state(melora_fx.load_adapter(tower(), tmp_path)), adapter_state(model))


def test_saving_inside_folded_is_refused(tmp_path):
    """The fingerprint would be that of the folded weights."""
    model = rewritten_tower()
    with melora_fx.folded(model), pytest.raises(MELoRAError, match="`save_adapter` inside `folded`"):
        melora_fx.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_file_holds_the_documented_tensors_and_header(folder):
    tensors = load_file(folder / TENSORS)
    header = header_of(folder)
    assert set(tensors) == {f"{name}.{kind}" for name in TOWER_SITES for kind in ("lora_a", "lora_b")}
    assert tensors["up.lora_a"].shape == (3, 2, IN // 3)
    assert tensors["up.lora_b"].shape == (3, OUT // 3, 2)
    assert header["format_version"] == 2
    assert list(header["sites"]) == list(TOWER_SITES)
    assert MELoRAConfig.from_dict(header["sites"]["up"]["config"]) == TOWER_CONFIG
    assert header["sites"]["up"]["base"]["shape"] == [OUT, IN]
    assert len(header["sites"]["up"]["base"]["values"]) == 64
    assert header["versions"]["torch"] == torch.__version__
    copied = json.loads((folder / CONFIG).read_text())
    assert "changes here have no effect" in copied.pop("about")
    assert copied == header
    assert sorted(path.name for path in folder.iterdir()) == [TENSORS, CONFIG]


def test_tensors_are_read_in_the_order_of_their_names(tmp_path):
    """A fold writes new tensors in this order, so that the bytes are the same each time."""
    model = fill(
        melora_fx.rewrite(
            bert_classifier(), "query", MELoRAConfig(rank=1, num_blocks=2), keep_trainable=["dense", "classifier"]
        )
    )
    melora_fx.save_adapter(model, tmp_path)
    names = list(read_adapter(tmp_path).tensors)
    assert len(names) > 10
    assert names == sorted(names)


def test_padding_is_zero_in_the_file(tmp_path):
    config = MELoRAConfig(rank=(1, 4, 2), num_blocks=3, split=(24, 12))
    melora_fx.save_adapter(fill(melora_fx.rewrite(tower(), "up", config)), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    assert tensors["up.lora_a"].shape == (3, 8, IN // 3)
    a = tensors["up.lora_a"].unflatten(1, (2, 4))
    for block, rank in enumerate(config.ranks):
        assert int(a[block, :, rank:].count_nonzero()) == 0
        assert int(tensors["up.lora_b"][block, :, rank:].count_nonzero()) == 0


def test_readable_copy_is_not_what_is_read(folder):
    expected = output_of(rewritten_tower(), randn(3, IN))
    (folder / CONFIG).write_text("not even JSON")
    assert_equal(output_of(melora_fx.load_adapter(tower(), folder), randn(3, IN)), expected)
    (folder / CONFIG).unlink()
    assert_equal(output_of(melora_fx.load_adapter(tower(), folder), randn(3, IN)), expected)


def test_folder_is_made_and_other_files_stay(tmp_path):
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("mine")
    melora_fx.save_adapter(rewritten_tower(), str(target))
    assert (target / "notes.txt").read_text() == "mine"
    melora_fx.save_adapter(rewritten_tower(), tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep" / TENSORS).is_file()


def test_swap_in_place_keeps_objects_and_compiled_code(tower_case, tmp_path):
    model = tower_case.model
    x = tower_case.inputs
    other = fill(melora_fx.rewrite(tower(), "all-linear", MELoRAConfig(rank=2, num_blocks=3, alpha=1.0)), seed=42)
    melora_fx.save_adapter(other, tmp_path)
    fewer = fill(melora_fx.rewrite(tower(), ["up", "head"], MELoRAConfig(rank=1, num_blocks=3)), seed=43)
    melora_fx.save_adapter(fewer, tmp_path / "fewer")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    before = output_of(compiled, x)
    identity = {name: id(p) for name, p in melora_fx.adapter_parameters(model).items()}
    scaling = melora_fx.sites(model)["up"].scaling
    assert melora_fx.load_adapter(compiled, tmp_path) is compiled
    assert {name: id(p) for name, p in melora_fx.adapter_parameters(model).items()} == identity
    assert melora_fx.sites(model)["up"].scaling is scaling
    assert_equal(scaling, torch.full((3, 1, 1), 0.5))
    assert_equal(output_of(compiled, x), output_of(other, x))
    assert not torch.equal(before, output_of(other, x))
    melora_fx.load_adapter(compiled, tmp_path / "fewer")
    assert_near(output_of(compiled, x), output_of(fewer, x).double())
    melora_fx.load_adapter(compiled, tmp_path)
    assert_equal(output_of(compiled, x), output_of(other, x))
    assert counter.frame_count == 1
    assert melora_fx.sites(model)["up"].config == melora_fx.sites(other)["up"].config
    assert_close_folded(melora_fx.fold(model), x, output_of(other, x))


@pytest.mark.parametrize(
    ("large", "small"),
    [
        pytest.param(MELoRAConfig(4, 3), MELoRAConfig(1, 3, alpha=2.0), id="rank"),
        pytest.param(MELoRAConfig(4, 3), MELoRAConfig((1, 3, 2), 3, alpha=(1.0, 2.0, 3.0)), id="rank_list"),
        pytest.param(MELoRAConfig((1, 2, 4), 3), MELoRAConfig((3, 3, 1), 3, use_rslora=True), id="both_lists"),
        pytest.param(MELoRAConfig(4, 3, split=(24, 12)), MELoRAConfig((1, 2, 1), 3, split=(24, 12)), id="split"),
    ],
)
def test_smaller_rank_is_padded_with_zeros(large, small, tmp_path):
    model = fill(melora_fx.rewrite(tower(), ["up", "own.projection"], large), seed=1)
    other = fill(melora_fx.rewrite(tower(), ["up", "own.projection"], small), seed=2)
    melora_fx.save_adapter(other, tmp_path / "small")
    melora_fx.save_adapter(model, tmp_path / "large")
    x = randn(3, IN)
    expected = output_of(model, randn(3, IN))
    melora_fx.load_adapter(model, tmp_path / "small")
    site = melora_fx.sites(model)["up"]
    source = melora_fx.sites(other)["up"]
    assert site.config == small
    assert site.lora_b.size(2) == max(large.ranks)
    assert_near(
        dense_update(small, site.lora_a, site.lora_b).detach(),
        dense_update(small, source.lora_a, source.lora_b).detach(),
    )
    assert_near(output_of(model, x), output_of(dense_copy(other, tower()), x.double()))
    melora_fx.save_adapter(model, tmp_path / "again")
    assert_equal(load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / "small" / TENSORS))
    assert_close_folded(melora_fx.fold(copy.deepcopy(model)), x, output_of(other, x))
    melora_fx.load_adapter(model, tmp_path / "large")
    assert_equal(output_of(model, x), expected)


def test_padding_of_a_swapped_smaller_rank_stays_zero_in_training(tmp_path):
    melora_fx.save_adapter(fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(1, 3))), tmp_path)
    model = fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(4, 3)))
    melora_fx.load_adapter(model, tmp_path)
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=0.1)
    for _ in range(3):
        model(randn(4, IN)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(model.up.lora_a[:, 1:].count_nonzero()) == 0
    assert int(model.up.lora_b[..., 1:].count_nonzero()) == 0
    assert int(model.up.lora_b[..., :1].count_nonzero()) == OUT


def test_dropout_of_the_loaded_adapter_is_used_or_refused(tmp_path):
    """The config that `sites` shows must be what the model computes."""
    melora_fx.save_adapter(fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(2, 3, dropout=0.5))), tmp_path)
    model = fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(2, 3)))
    loaded, refusal = attempt(melora_fx.load_adapter, model, tmp_path)
    if loaded is None:
        assert "dropout" in refusal
        return
    x = randn(3, IN)
    model.train()
    is_random = not torch.equal(output_of(model, x), output_of(model, x))
    assert is_random is (melora_fx.sites(model)["up"].config.dropout > 0)


@pytest.mark.default_cases("in_place")
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_kept_modules_travel_with_the_adapter(whole, tmp_path):
    options = {"example_inputs": tokens()} if whole else {}
    model = fill(melora_fx.rewrite(bert_classifier(), "query", TOWER_CONFIG, keep_trainable="classifier", **options))
    with torch.no_grad():
        model.get_submodule("classifier").weight.copy_(randn(3, IN, seed=77))
    melora_fx.save_adapter(model, tmp_path)
    assert {"classifier.weight", "classifier.bias"} <= set(load_file(tmp_path / TENSORS))
    loaded = melora_fx.load_adapter(bert_classifier(), tmp_path, **options)
    assert_equal(loaded.get_submodule("classifier").weight.detach(), randn(3, IN, seed=77))
    assert_equal(output_of(loaded, tokens()), output_of(model, tokens()))
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trainable


def test_kept_modules_are_swapped_in_a_rewritten_model(tmp_path):
    model = fill(melora_fx.rewrite(tower(), "up", TOWER_CONFIG, keep_trainable=["head", "norm"]))
    with torch.no_grad():
        model.head.bias.fill_(3.0)
    melora_fx.save_adapter(model, tmp_path)
    other = fill(melora_fx.rewrite(tower(), "up", TOWER_CONFIG, keep_trainable=["head", "norm"]), seed=9)
    melora_fx.load_adapter(other, tmp_path)
    x = randn(2, IN)
    assert_equal(output_of(other, x), output_of(model, x))


def test_buffers_of_a_kept_module_travel_too(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(IN, OUT), nn.BatchNorm1d(OUT))

    model = fill(melora_fx.rewrite(build(), "0", TOWER_CONFIG, keep_trainable="1"))
    model.train()(randn(8, IN))
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(build(), tmp_path)
    assert_equal(loaded[1].running_mean, model[1].running_mean)
    assert_equal(output_of(loaded.eval(), randn(2, IN)), output_of(model.eval(), randn(2, IN)))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(IN, IN)
        self.head = nn.Linear(IN, 3)
        self.aux = nn.ModuleDict({"head": nn.Linear(IN, 3)})

    def forward(self, x):
        hidden = self.body(x)
        return self.head(hidden) + self.aux["head"](hidden)


def test_kept_module_is_named_exactly_when_it_is_loaded(tmp_path):
    torch.manual_seed(0)
    plain = TwoHeads()
    model = melora_fx.rewrite(copy.deepcopy(plain), "body", TOWER_CONFIG, keep_trainable="re:head")
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(plain, tmp_path)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def test_kept_modules_that_do_not_fit_are_refused(tmp_path):
    model = melora_fx.rewrite(TwoHeads(), "body", TOWER_CONFIG, keep_trainable="re:head")
    melora_fx.save_adapter(model, tmp_path)
    other = TwoHeads()
    other.load_state_dict({name: value for name, value in model.state_dict().items() if "lora" not in name})
    other.head = nn.Linear(IN, 5)
    with (
        assert_unchanged(other),
        pytest.raises(MELoRAError, match=r"`head\.weight`: saved as \(3, 24\), the model's is \(5, 24\)"),
    ):
        melora_fx.load_adapter(other, tmp_path)
    del other.head
    with assert_unchanged(other), pytest.raises(MELoRAError, match=r"`head\.weight`: the model has no such tensor"):
        melora_fx.load_adapter(other, tmp_path)


def assert_refused(model, folder, text):
    """Checks that `load_adapter` refuses with this text and leaves the model unchanged."""
    with assert_unchanged(model), pytest.raises(MELoRAError, match=text):
        melora_fx.load_adapter(model, folder)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        pytest.param(MELoRAConfig(5, 3), "`up`: the adapter's rank 5 is above the 2", id="larger_rank"),
        pytest.param(MELoRAConfig((1, 1, 4), 3), "rank 4 is above the 2", id="larger_rank_in_a_list"),
        pytest.param(MELoRAConfig(2, 2), r"`up`: the adapter's `num_blocks` \(=2\) is not the model's \(=3\)", id="N"),
        pytest.param(MELoRAConfig(2, 3, split=3), r"`up`: the adapter's `split` \(=3\) is not .*None", id="split"),
    ],
)
def test_config_that_does_not_fit_a_rewritten_model(config, text, tmp_path):
    targets = {"up": config, "all-linear": TOWER_CONFIG}
    melora_fx.save_adapter(fill(melora_fx.rewrite(tower(), targets)), tmp_path)
    assert_refused(rewritten_tower(), tmp_path, text)


def test_other_sites_are_refused(folder):
    model = melora_fx.rewrite(tower(), ["up", "gate"], TOWER_CONFIG)
    assert_refused(model, folder, r"(?s)sites that this one lacks:.*`own\.projection`; nearest.*`conv`.*`head`")


def test_adapter_of_another_model_is_named_key_by_key(folder):
    model = bert()
    with assert_unchanged(model), pytest.raises(MELoRAError, match="is for another model") as caught:
        melora_fx.load_adapter(model, folder)
    assert [line.split(";")[0] for line in str(caught.value).splitlines()[1:]] == [f"`{name}`" for name in TOWER_SITES]
    assert str(folder) in str(caught.value)


def test_adapter_for_other_shapes_is_named_key_by_key(folder):
    class Wide(Tower):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(IN, 2 * OUT)
            self.gate = nn.Linear(IN, 2 * OUT, bias=False)

    assert_refused(Wide(), folder, r"(?s)does not fit the model:\n`up`: lora_a is \(3, 2, 8\).*\(72, 24\).*\n`gate`: ")


@pytest.mark.parametrize("rewritten", [False, True], ids=["plain", "rewritten"])
def test_wrong_base_is_refused_by_name(rewritten, folder):
    model = rewritten_tower() if rewritten else tower()
    with torch.no_grad():
        model.gate.weight.add_(0.01)
        model.conv.weight.mul_(1.001)
    text = r"(?s)was trained on another base model:\n`gate`: \d+ of 64 sampled values differ.*\n`conv`: "
    assert_refused(model, folder, text)


def test_base_with_nan_is_not_taken_for_the_right_one(folder):
    model = tower()
    with torch.no_grad():
        model.gate.weight.fill_(float("nan"))
    assert_refused(model, folder, "`gate`: 64 of 64 sampled values differ")


def test_whole_capture_only_adapter_on_a_plain_model_without_inputs(tmp_path):
    torch.manual_seed(0)
    plain = SelfAttention()
    x = randn(2, 3, IN)
    model = fill(melora_fx.rewrite(plain, "in_proj_weight", TOWER_CONFIG, example_inputs=(x,)))
    melora_fx.save_adapter(model, tmp_path)
    melora_fx.fold(model)
    torch.manual_seed(0)
    plain = SelfAttention()
    assert_refused(plain, tmp_path, r"`attention\.in_proj_weight`.*`example_inputs=`")
    assert list(melora_fx.sites(melora_fx.load_adapter(plain, tmp_path, example_inputs=(x,)))) == [
        "attention.in_proj_weight"
    ]


def test_compiled_plain_model_is_refused_for_what_it_is(folder):
    compiled = torch.compile(tower(), backend="eager")
    with assert_unchanged(compiled), pytest.raises(MELoRAError, match=r"compiled"):
        melora_fx.load_adapter(compiled, folder)


def test_refusal_of_the_last_site_leaves_the_first_alone(folder):
    """Nothing is partly loaded: every site is checked before the first value is written."""
    model = rewritten_tower(0)
    fill(model, seed=5)
    tensors = load_file(folder / TENSORS)
    tensors["head.lora_b"] = tensors["head.lora_b"][:, :-1].contiguous()
    rewrite_file(folder, tensors=tensors)
    assert_refused(model, folder, "`head`")


def test_missing_folder_and_folder_without_adapter(tmp_path):
    assert_refused(tower(), tmp_path / "nowhere", rf"nowhere` is not an adapter folder: it has no {TENSORS}")
    assert_refused(tower(), tmp_path, f"is not an adapter folder: it has no {TENSORS}")
    (tmp_path / "file").write_text("")
    assert_refused(tower(), tmp_path / "file", "is not an adapter folder")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99], ids=["empty", "4_bytes", "100_bytes", "half", "99_percent"])
def test_truncated_file(keep, folder):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    for model in (tower(), rewritten_tower(1)):
        assert_refused(model, folder, f"{TENSORS}` cannot be read, it is truncated or corrupt")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x00" * 1000, id="zeros"),
        pytest.param(bytes(range(256)) * 8, id="random"),
        pytest.param(struct.pack("<Q", 2**62) + b"{}", id="huge_header"),
        pytest.param(b"PK\x03\x04" + b"\x80\x04N." * 100, id="a_pickle"),
        pytest.param(struct.pack("<Q", 4) + b"null", id="header_null"),
    ],
)
def test_file_of_something_else(data, folder):
    (folder / TENSORS).write_bytes(data)
    assert_refused(tower(), folder, "cannot be read|was not written by")


def test_trailing_bytes(folder):
    with open(folder / TENSORS, "ab") as file:
        file.write(b"more")
    assert_refused(tower(), folder, "cannot be read, it is truncated or corrupt")


def test_file_of_another_program(folder):
    rewrite_file(folder, metadata={"format": "pt"})
    assert_refused(tower(), folder, "was not written by `save_adapter`: its header has no `melora` entry")
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    assert_refused(tower(), folder, "was not written by `save_adapter`")


def test_future_format(folder):
    rewrite_file(folder, header={"format_version": 3, "everything": "else"})
    assert_refused(tower(), folder, "has format_version 3; this melora_fx reads 1, 2")


@pytest.mark.parametrize(
    "header",
    [
        pytest.param([], id="list"),
        pytest.param(3, id="number"),
        pytest.param({}, id="empty"),
        pytest.param({"format_version": "1", "sites": {}, "kept": []}, id="version_str"),
        pytest.param({"format_version": 1, "kept": []}, id="no_sites"),
        pytest.param({"format_version": 1, "sites": [], "kept": []}, id="sites_list"),
        pytest.param({"format_version": 1, "sites": {}, "kept": []}, id="no_site"),
        pytest.param({"format_version": 1, "sites": {"up": 3}, "kept": []}, id="site_number"),
        pytest.param({"format_version": 1, "sites": {"up": {"config": {"rank": 0}}}, "kept": []}, id="bad_config"),
        pytest.param({"format_version": 1, "sites": {"up": {"config": {"r": 8}}}, "kept": []}, id="unknown_field"),
        pytest.param({"format_version": 1, "sites": {"up": {"config": []}}, "kept": []}, id="config_list"),
        pytest.param(
            {"format_version": 1, "sites": {"up": {"config": {}, "base": {"dtype": "no"}}}, "kept": []}, id="bad_base"
        ),
    ],
)
def test_header_of_another_shape(header, folder):
    rewrite_file(folder, header=header)
    assert_refused(tower(), folder, f"{TENSORS}`")


def test_header_that_is_not_json(folder):
    rewrite_file(folder, metadata={"melora": "{not json"})
    assert_refused(tower(), folder, "the header of .* cannot be read")


def test_missing_tensor(folder):
    tensors = load_file(folder / TENSORS)
    del tensors["gate.lora_b"]
    rewrite_file(folder, tensors=tensors)
    assert_refused(tower(), folder, r"lacks the tensors 'gate\.lora_b'")


@pytest.mark.parametrize("rewritten", [False, True], ids=["plain", "rewritten"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"gate.lora_a": lambda a: a[0]}, id="lora_a_2d"),
        pytest.param({"gate.lora_b": lambda b: b[0]}, id="lora_b_2d"),
        pytest.param({"gate.lora_a": lambda a: a[:, :1]}, id="lora_a_rank"),
        pytest.param({"gate.lora_b": lambda b: b[..., :1]}, id="lora_b_rank"),
        pytest.param({"gate.lora_a": lambda a: a[:, :1], "gate.lora_b": lambda b: b[..., :1]}, id="both_ranks"),
        pytest.param({"gate.lora_a": lambda a: a[..., :4]}, id="in_features"),
        pytest.param({"gate.lora_b": lambda b: b[:2]}, id="blocks"),
    ],
)
def test_tensors_of_another_shape_than_the_header_says(change, rewritten, folder):
    tensors = load_file(folder / TENSORS)
    for name, function in change.items():
        tensors[name] = function(tensors[name]).contiguous()
    rewrite_file(folder, tensors=tensors)
    assert_refused(rewritten_tower(1) if rewritten else tower(), folder, "`gate")


def test_plain_model_has_nothing_to_save(tmp_path):
    with pytest.raises(MELoRAError, match="`save_adapter` needs a rewritten model, but this Tower has no adapter"):
        melora_fx.save_adapter(tower(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the next test covers it")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MELoRAError, match="cannot be written: Permission denied"):
        melora_fx.save_adapter(rewritten_tower(), tmp_path)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MELoRAError, match=r"file.*` cannot be written: "):
            melora_fx.save_adapter(rewritten_tower(), target)
    assert (tmp_path / "file").read_text() == "mine"


class Crash(BaseException):
    """Ends the process, as a crash does."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()], ids=["disk_full", "crash"])
@pytest.mark.parametrize("survives", [0, 1], ids=["first_rename", "second_rename"])
def test_crash_while_writing_leaves_the_old_adapter(error, survives, folder, monkeypatch):
    before = adapter_state(melora_fx.load_adapter(tower(), folder))
    replace = os.replace
    calls = []

    def failing(source, target):
        calls.append(target)
        if len(calls) > survives:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    expected = MELoRAError if isinstance(error, OSError) else Crash
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        melora_fx.save_adapter(fill(rewritten_tower(), seed=8), folder)
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == [TENSORS, CONFIG]
    assert_equal(adapter_state(melora_fx.load_adapter(tower(), folder)), before)


def test_failing_write_of_the_tensors_leaves_the_old_adapter(folder, monkeypatch):
    before = (folder / TENSORS).read_bytes()

    def fails(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(MELoRAError, match="cannot be written: Input/output error"):
        melora_fx.save_adapter(fill(rewritten_tower(), seed=8), folder)
    assert (folder / TENSORS).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [TENSORS, CONFIG]


def test_saving_again_replaces_everything(folder):
    smaller = fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(1, 2)), seed=2)
    melora_fx.save_adapter(smaller, folder)
    loaded = melora_fx.load_adapter(tower(), folder)
    assert list(melora_fx.sites(loaded)) == ["up"]
    assert_equal(adapter_state(loaded), adapter_state(smaller))


def test_saving_changes_nothing_and_shares_nothing(tmp_path):
    model = rewritten_tower()
    with assert_unchanged(model):
        melora_fx.save_adapter(model, tmp_path)
    before = load_file(tmp_path / TENSORS)["up.lora_a"].clone()
    fill(model, seed=9)
    assert_equal(load_file(tmp_path / TENSORS)["up.lora_a"], before)


def test_shared_module_is_saved_once(tmp_path):
    shared = nn.Linear(IN, IN)
    model = fill(melora_fx.rewrite(nn.Sequential(shared, nn.Tanh(), shared), "all-linear", TOWER_CONFIG))
    melora_fx.save_adapter(model, tmp_path)
    assert set(load_file(tmp_path / TENSORS)) == {"0.lora_a", "0.lora_b"}


def test_tied_kept_tensors_are_saved(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Linear(IN, IN))
        model[2].weight = model[1].weight
        return model

    model = fill(melora_fx.rewrite(build(), "0", TOWER_CONFIG, keep_trainable=["1", "2"]))
    with torch.no_grad():
        model[1].weight.add_(1)
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(build(), tmp_path)
    assert loaded[2].weight is loaded[1].weight
    assert_equal(output_of(loaded, randn(2, IN)), output_of(model, randn(2, IN)))


def test_names_with_odd_characters(tmp_path):
    def named():
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("a+b [1]*", nn.Linear(IN, OUT))
        return model

    model = fill(melora_fx.rewrite(named(), "all-linear", TOWER_CONFIG))
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(named(), tmp_path)
    assert_equal(output_of(loaded, randn(2, IN)), output_of(model, randn(2, IN)))


def assert_close_folded(folded, x, expected):
    """Folding reorders float32 sums: checks equality up to their rounding."""
    torch.testing.assert_close(output_of(folded, x), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_trained_with_the_weight_lowering_loads_onto_a_bfloat16_base(tmp_path):
    config = MELoRAConfig(rank=2, num_blocks=3, lowering="weight")
    model = fill(melora_fx.rewrite(tower(), "up", config))
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(tower().to(torch.bfloat16), tmp_path)
    assert melora_fx.sites(loaded)["up"].lowering == "activation"
    assert_equal(loaded.up.lora_b, model.up.lora_b)


def test_a_loaded_adapter_leaves_the_lowering_of_the_model(tmp_path):
    saved = MELoRAConfig(rank=2, num_blocks=3, lowering="plain")
    melora_fx.save_adapter(fill(melora_fx.rewrite(tower(), "up", saved)), tmp_path)
    model = melora_fx.rewrite(tower(), "up", MELoRAConfig(rank=2, num_blocks=3, lowering="activation"))
    melora_fx.load_adapter(model, tmp_path)
    site = melora_fx.sites(model)["up"]
    assert (site.lowering, site.config.lowering) == ("activation", "activation")


def test_values_beyond_the_rank_of_a_block_are_not_saved(tmp_path):
    model = melora_fx.rewrite(tower(), ["up", "gate"], MELoRAConfig(rank=[1, 2, 2], num_blocks=3))
    for parameter in melora_fx.adapter_parameters(model).values():
        torch.nn.init.normal_(parameter)
    with pytest.raises(MELoRAError, match=r"`up`, `gate`: a block holds values beyond its own rank"):
        melora_fx.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
