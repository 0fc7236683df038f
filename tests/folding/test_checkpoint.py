"""Checkpoints on disk: where each tensor is, headers that safetensors reads back, and keys by transformers' rules."""

import importlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.fold_folders import CONFIG, INDEX, SINGLE
from support.models import IN, OUT, assert_equal, bert, bert_classifier, gpt2, randn, tower
from support.zoo import HUGGING_FACE, SIX, build
from torch import nn
from transformers import BertModel, GPT2Model
from transformers.core_model_loading import GroupWeightRename, Transpose, WeightConverter, WeightRenaming

from melora_fx import MELoRAError
from melora_fx.folding.checkpoint import Checkpoint, open_checkpoint
from melora_fx.folding.checkpoint_keys import KeyMap, map_keys
from melora_fx.saving.fingerprint import fingerprint
from melora_fx.saving.tensor_file import Entry, make_header, serialise

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHAPES = [(), (0,), (1,), (3, 5), (2, 0, 4), (2, 3, 7)]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return randn(math.prod(shape), seed=len(shape)).mul(9).to(dtype).view(shape)


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    """Returns every dtype in every shape: scalars, empty tensors, and sizes that fit no alignment."""
    return {f"{name} {shape} ü": values(shape, dtype) for name, dtype in DTYPES.items() for shape in SHAPES}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_what_is_serialised_is_what_safetensors_reads_back(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    entries = {}
    data = b""
    for key, tensor in tensors.items():
        entries[key], own = serialise(tensor)
        data += own
    metadata = {"format": "pt", "note": 'quotes " and ümläuts'}
    (tmp_path / SINGLE).write_bytes(make_header(entries, metadata) + data)
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == metadata
        loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert set(loaded) == set(tensors)
    for key, tensor in tensors.items():
        assert (loaded[key].dtype, loaded[key].shape) == (tensor.dtype, tensor.shape), key
        assert bits(loaded[key]) == bits(tensor), key


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entry_of_a_tensor(name: str, shape: tuple[int, ...]) -> None:
    tensor = values(shape, DTYPES[name])
    entry, data = serialise(tensor)
    assert entry == Entry(name, shape, tensor.nbytes)
    assert data == bits(tensor)


def test_tensor_that_is_not_contiguous_is_written_in_its_own_order() -> None:
    tensor = randn(4, 6).t()[1:, ::2]
    assert serialise(tensor)[1] == bits(tensor)


@pytest.mark.parametrize("length", range(9))
def test_header_ends_where_any_dtype_is_aligned(length: int) -> None:
    """As safetensors writes it: programs that map the file use the numbers in place."""
    header = make_header({"k" * length: Entry("F64", (3,), 24)}, {})
    assert len(header) % 8 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert json.loads(header[8:])["k" * length]["data_offsets"] == [0, 24]


def test_header_without_tensors(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(make_header({}, {"format": "pt"}))
    assert load_file(tmp_path / SINGLE) == {}


def test_single_file(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    save_file(tensors, tmp_path / SINGLE, {"format": "pt", "mine": "yes"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == {SINGLE: {"format": "pt", "mine": "yes"}}
    assert (checkpoint.index, checkpoint.config) == (None, None)
    assert set(checkpoint.tensors) == set(tensors)
    data = (tmp_path / SINGLE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for key, stored in checkpoint.tensors.items():
        assert (stored.key, stored.file, stored.shape) == (key, tmp_path / SINGLE, tuple(tensors[key].shape))
        assert DTYPES[stored.dtype] == tensors[key].dtype
        assert data[stored.start : stored.stop] == bits(tensors[key])
        assert stored.start == end, "in the order of their bytes"
        end = stored.stop
    assert end == len(data)


def test_file_without_metadata(tmp_path: Path) -> None:
    save_file({"weight": randn(3)}, tmp_path / SINGLE)
    assert open_checkpoint(tmp_path).files == {SINGLE: {}}


def test_sharded_files(tmp_path: Path) -> None:
    model = bert_classifier()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) == 3
    assert checkpoint.config == json.loads((tmp_path / CONFIG).read_text())
    assert checkpoint.index == json.loads((tmp_path / INDEX).read_text())
    assert {key: stored.file.name for key, stored in checkpoint.tensors.items()} == checkpoint.index["weight_map"]
    for key, value in model.state_dict().items():
        stored = checkpoint.tensors[key]
        assert stored.file.read_bytes()[stored.start : stored.stop] == bits(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (OUT, IN)], ids=str)
def test_fingerprint_is_as_in_memory(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    weight = randn(*shape, dtype=dtype)
    save_file({"before": randn(3), "weight": weight, "after": randn(3)}, tmp_path / SINGLE)
    found = open_checkpoint(tmp_path).tensors["weight"].fingerprint()
    expected = fingerprint(weight)
    assert_equal(torch.tensor(found.pop("values")), torch.tensor(expected.pop("values")))
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_view_of_bytes_is_the_tensor_and_writes_to_them(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = randn(5, 7, dtype=dtype)
    save_file({"weight": weight}, tmp_path / SINGLE)
    data = bytearray(bits(weight))
    view = open_checkpoint(tmp_path).tensors["weight"].view(memoryview(data))
    assert_equal(view, weight)
    view.mul_(2)
    assert bytes(data) == bits(weight * 2)


def assert_refused(folder: Path, text: str) -> None:
    with pytest.raises(MELoRAError, match=text):
        open_checkpoint(folder)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / CONFIG).write_text("{}")
    assert_refused(tmp_path, f"has neither {SINGLE} nor {INDEX}: load the model and `save_pretrained` it")
    assert_refused(tmp_path / "nowhere", "nowhere` is not a folder: name that of a model")
    assert_refused(tmp_path / CONFIG, "config.json` is not a folder")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 1000, id="zeros"),
        pytest.param(bytes(range(256)) * 8, id="random"),
        pytest.param((2**62).to_bytes(8, "little") + b"{}", id="huge_header"),
        pytest.param(b"PK\x03\x04" + b"\x80\x04N." * 100, id="a_pickle"),
        pytest.param((4).to_bytes(8, "little") + b"null", id="header_null"),
        pytest.param((2).to_bytes(8, "little") + b"[]", id="header_list"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", id="a_git_lfs_pointer"),
    ],
)
def test_file_of_something_else(data: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(data)
    assert_refused(tmp_path, f"{SINGLE}` cannot be read, it is truncated or corrupt")


@pytest.mark.parametrize("change", [-1, -500, 1], ids=["a_byte_less", "half", "a_byte_more"])
def test_file_of_another_length(change: int, tmp_path: Path) -> None:
    save_file({"weight": randn(15, 17)}, tmp_path / SINGLE)
    os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size + change)
    assert_refused(tmp_path, f"{SINGLE}` cannot be read, it is truncated or corrupt")


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path, max_shard_size="20KB")
    for name in ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        (tmp_path / name).unlink()
    assert_refused(
        tmp_path, "lacks 'model-00001-of-00003.safetensors', 'model-00003-of-00003.safetensors', which its index names"
    )


def corrupted(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Returns a function that changes the JSON in a file."""

    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        replaced = change(content)
        path.write_text(json.dumps(content if replaced is None else replaced))

    return apply


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda path: path.write_text("{"), id="no_json"),
        pytest.param(lambda path: path.write_bytes(b"\xff\xfe\x00"), id="no_text"),
        pytest.param(corrupted(lambda index: ["list"]), id="list"),
        pytest.param(corrupted(lambda index: {"metadata": {}}), id="no_weight_map"),
        pytest.param(corrupted(lambda index: index.update(weight_map={})), id="empty_weight_map"),
        pytest.param(corrupted(lambda index: index.update(weight_map=["a"])), id="weight_map_list"),
        pytest.param(corrupted(lambda index: index["weight_map"].update(more=3)), id="file_number"),
        pytest.param(corrupted(lambda index: index["weight_map"].update(more=None)), id="file_null"),
        pytest.param(corrupted(lambda index: index["weight_map"].update(more=["a"])), id="file_list"),
        pytest.param(corrupted(lambda index: index["weight_map"].update(more="")), id="file_without_name"),
        pytest.param(corrupted(lambda index: index.update(metadata=[1])), id="metadata_list"),
        pytest.param(corrupted(lambda index: index.update(metadata=None)), id="metadata_null"),
    ],
)
def test_corrupt_index(corrupt: Callable[[Path], None], tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path, max_shard_size="20KB")
    corrupt(tmp_path / INDEX)
    with pytest.raises(MELoRAError) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("where", ["folder", "above", "absolute"])
def test_index_that_names_files_elsewhere(where: str, tmp_path: Path) -> None:
    """A fold writes files of the same names: outside its folder it would overwrite the base's own."""
    base = tmp_path / "base"
    bert().save_pretrained(base, max_shard_size="20KB")
    (base / "shards").mkdir()
    prefix = {"folder": "shards/", "above": "../base/", "absolute": f"{base}/"}[where]
    for file in base.glob("*.safetensors"):
        if where == "folder":
            file.rename(base / "shards" / file.name)
    corrupted(lambda index: index.update(weight_map={key: prefix + name for key, name in index["weight_map"].items()}))(
        base / INDEX
    )
    assert_refused(base, "model-00001-of-00003.safetensors")


@pytest.mark.parametrize("text", ["{", "[1]", "null", "\ud800"], ids=["no_json", "list", "null", "no_text"])
def test_corrupt_config(text: str, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode(errors="surrogatepass"))
    assert_refused(tmp_path, r"config\.json` cannot be read")


def saved(model: nn.Module, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)  # type: ignore[operator]
    return open_checkpoint(folder)


def test_keys_of_the_class_itself(tmp_path: Path) -> None:
    found = map_keys(saved(bert_classifier(), tmp_path), "BertForSequenceClassification", 3)
    assert found.keys == {name: name for name in bert_classifier().state_dict()}
    assert (found.converted, found.tied) == (frozenset(), {})
    assert found.tensors is not None
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tensor.shape for name, tensor in bert_classifier().state_dict().items()
    }


def test_checkpoint_without_the_prefix_that_the_class_has(tmp_path: Path) -> None:
    found = map_keys(saved(bert(), tmp_path), "BertForSequenceClassification", 5)
    assert found.keys == {f"bert.{name}": name for name in bert().state_dict()}


def test_checkpoint_with_a_prefix_that_the_class_lacks(tmp_path: Path) -> None:
    found = map_keys(saved(bert_classifier(), tmp_path), "BertModel", None)
    assert {name: found.keys[name] for name in bert().state_dict()} == {
        name: f"bert.{name}" for name in bert().state_dict()
    }
    assert set(found.keys) - set(bert().state_dict()) == {"classifier.weight", "classifier.bias"}


def test_renamed_and_converted_keys(tmp_path: Path) -> None:
    model, _ = build("Mixtral")
    found = map_keys(saved(model, tmp_path), "MixtralForCausalLM", None)
    assert found.keys["model.layers.1.mlp.gate.weight"] == "model.layers.1.block_sparse_moe.gate.weight"
    assert found.keys["model.layers.1.self_attn.q_proj.weight"] == "model.layers.1.self_attn.q_proj.weight"
    experts = ("gate_up_proj", "down_proj")
    assert found.converted == {f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in experts}
    assert set(found.keys) | found.converted == set(model.state_dict())


def test_one_key_that_becomes_several_parameters(tmp_path: Path) -> None:
    """DINOv2 stores gate and up as one matrix: both parameters are converted."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, use_swiglu_ffn=True))
    found = map_keys(saved(model, tmp_path), "Dinov2Model", None)
    names = {f"encoder.layer.0.mlp.{name}_proj.{kind}" for name in ("gate", "up") for kind in ("weight", "bias")}
    assert names <= set(model.state_dict())
    assert found.converted == names


def test_tied_parameters_name_each_other(tmp_path: Path) -> None:
    found = map_keys(saved(gpt2(), tmp_path / "gpt2"), "GPT2LMHeadModel", None)
    assert found.tied == {
        "lm_head.weight": ("transformer.wte.weight",),
        "transformer.wte.weight": ("lm_head.weight",),
    }
    model, _ = build("T5")
    found = map_keys(saved(model, tmp_path / "t5"), "T5ForConditionalGeneration", None)
    names = ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight", "shared.weight"]
    assert found.tied == {name: tuple(other for other in names if other != name) for name in names}


def test_untied_config_ties_nothing(tmp_path: Path) -> None:
    model = gpt2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    assert map_keys(saved(model, tmp_path), "GPT2LMHeadModel", None).tied == {}


def test_bare_gpt2_as_on_the_hub(tmp_path: Path) -> None:
    body = GPT2Model(gpt2().config)
    found = map_keys(saved(body, tmp_path), "GPT2LMHeadModel", None)
    assert found.keys["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    assert len(found.keys) == len(body.state_dict())


@pytest.mark.parametrize("class_name", [None, "", "Tower"])
def test_names_are_keys_where_transformers_does_not_know_the_class(class_name: str | None, tmp_path: Path) -> None:
    found = map_keys(saved(bert(), tmp_path), class_name, 3)
    assert found == KeyMap({name: name for name in bert().state_dict()}, frozenset(), {})


def test_names_are_keys_where_there_is_no_config(tmp_path: Path) -> None:
    save_file(tower().state_dict(), tmp_path / SINGLE)
    found = map_keys(open_checkpoint(tmp_path), "BertModel", 3)
    assert found.keys == {name: name for name in tower().state_dict()}


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match="holds a bert model, not the LlamaForCausalLM"):
        map_keys(saved(bert(), tmp_path), "LlamaForCausalLM", None)


@pytest.mark.default_cases(*(f"{name}-*" for name in SIX))
@pytest.mark.parametrize("stored_as", ["saved", "own_names"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_every_parameter_of_every_architecture_is_found(name: str, stored_as: str, tmp_path: Path) -> None:
    """Under the keys that `save_pretrained` writes, and under the model's own names, which transformers accepts too."""
    model, _ = build(name)
    checkpoint = saved(model, tmp_path)
    if stored_as == "own_names":
        own = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(own, tmp_path / SINGLE)
        checkpoint = open_checkpoint(tmp_path)
    found = map_keys(checkpoint, type(model).__name__, None)
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        owned = {parameter, *found.tied.get(parameter, ())}
        assert owned & (set(found.keys) | found.converted), parameter
    if stored_as == "own_names":
        assert found.keys == {key: key for key in checkpoint.tensors}


@pytest.fixture
def with_rules(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives every model these rules for the keys of its checkpoints."""
    module = importlib.import_module("transformers.conversion_mapping")
    return lambda *rules: monkeypatch.setattr(module, "get_model_conversion_mapping", lambda model: list(rules))


@pytest.mark.parametrize(
    "rule",
    [
        WeightRenaming("self.query", "self.elsewhere"),
        WeightConverter("self.query.weight", "self.elsewhere.weight", [Transpose()]),
    ],
    ids=["renaming", "conversion"],
)
def test_key_that_a_rule_would_lead_astray_stays(rule: Any, with_rules: Callable[..., None], tmp_path: Path) -> None:
    """As transformers loads it: a rule for older checkpoints may also match today's names."""
    checkpoint = saved(bert(), tmp_path)
    names = set(bert().state_dict())
    with_rules(rule)
    found = map_keys(checkpoint, "BertModel", None)
    assert (set(found.keys), found.converted) == (names, frozenset())


def test_rules_see_the_keys_in_transformers_order(with_rules: Callable[..., None], tmp_path: Path) -> None:
    """Some rules wait for a key that only older checkpoints have: it comes first by name, but not in the file."""
    stored = ["pooler.norm1", "pooler.norm0"]
    (tmp_path / SINGLE).write_bytes(make_header({key: Entry("F32", (2,), 8) for key in stored}, {}) + bytes(16))
    bert().config.save_pretrained(tmp_path)
    with_rules(GroupWeightRename(["pooler.norm0", "pooler.norm1"], ["pooler.norm1", "pooler.norm2"]))
    found = map_keys(open_checkpoint(tmp_path), "BertModel", None)
    assert found.keys == {"pooler.norm1": "pooler.norm0", "pooler.norm2": "pooler.norm1"}


def test_no_weight_is_read_or_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(bert(), tmp_path)
    made: list[nn.Module] = []
    init = BertModel.__init__

    def noted(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(BertModel, "__init__", noted)
    map_keys(checkpoint, "BertModel", None)
    assert len(made) == 1
    assert all(parameter.is_meta for parameter in made[0].parameters())
