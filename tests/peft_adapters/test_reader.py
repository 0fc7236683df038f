"""Adapters that PEFT has trained, or the MELoRA authors' code has saved: read, and compared on logits."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BdLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.fold_folders import llama
from support.gguf_models import mixtral
from support.models import bert_classifier, fill, gpt2, randn
from support.travelling import logits_of, worst_error
from torch import nn

import melora_fx
from exporters import read_peft_adapter, write_peft_adapter
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter_file import read_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # PEFT 0.19
]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "bert.encoder.layer.0.attention.self.query"
PATTERNS: dict[str, Any] = {"rank_pattern": {"query": 2}, "alpha_pattern": {r"layer\.0\.attention\.self\.query": 5}}
_BD = BdLoraConfig(target_modules_bd_a=["o_proj", "down"], target_modules_bd_b=["q_proj"], nblocks=2)
_STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Trained:
    """A PEFT configuration for a model."""

    build: Any
    targets: Any
    more: dict[str, Any] = field(default_factory=dict)

    def model(self) -> PeftModel:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=self.targets, **self.more)
        model = get_peft_model(self.build(), config).eval()
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                if parameter.requires_grad:
                    parameter.add_(randn(*parameter.shape, seed=index) * 0.3)
        return model


TRAINED = {
    "patterns": Trained(bert_classifier, ["query", "value", "dense"], {"task_type": "SEQ_CLS", **PATTERNS}),
    "rank-stabilised, a head": Trained(
        bert_classifier, ["query"], {"use_rslora": True, "modules_to_save": ["classifier", "pooler"]}
    ),
    "Conv1D": Trained(gpt2, ["c_attn", "c_proj"], {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}),
    "all of a Llama": Trained(llama, "all-linear", {"task_type": "CAUSAL_LM"}),
    "a head of a language model": Trained(llama, ["q_proj", "lm_head"], {"task_type": "CAUSAL_LM"}),
    "block-diagonal": Trained(llama, ["q_proj", "o_proj", "down_proj"], {"use_bdlora": _BD}),
    "experts": Trained(mixtral, ["q_proj"], {"target_parameters": _STACKS}),
    "one stack of experts": Trained(mixtral, [], {"target_parameters": _STACKS[1:], "rank_pattern": {_STACKS[1]: 2}}),
}


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    """A LoRA of rank 4 on the query and value of BERT, with a trained head, as PEFT saves it."""
    trained = Trained(bert_classifier, ["query", "value"], {"modules_to_save": ["classifier"]})
    trained.model().save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # but PEFT applies them
@pytest.mark.default_cases("patterns", "rank-stabilised, a head", "block-diagonal", "one stack of experts")
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_the_same_is_computed(trained: Trained, tmp_path: Path) -> None:
    model = trained.model()
    model.save_pretrained(tmp_path / "peft")
    expected = logits_of(model)
    read_peft_adapter(tmp_path / "peft", tmp_path / "ours")
    plain = trained.build()
    assert worst_error(logits_of(plain), expected) > 0.1
    loaded = melora_fx.load_adapter(plain, tmp_path / "ours").eval()
    assert worst_error(logits_of(loaded), expected) < 1e-5
    assert {site.config.num_blocks for site in melora_fx.sites(loaded).values()} == {1}
    assert worst_error(logits_of(melora_fx.fold(loaded)), expected) < 1e-5


def test_it_folds_on_disk_and_trains(peft_folder: Path, tmp_path: Path) -> None:
    read_peft_adapter(peft_folder, tmp_path / "ours")
    base = bert_classifier()
    base.save_pretrained(tmp_path / "base")
    melora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "ours", tmp_path / "folded")
    loaded = melora_fx.load_adapter(base, tmp_path / "ours").eval()
    folded = type(base).from_pretrained(tmp_path / "folded").eval()
    assert worst_error(logits_of(folded), logits_of(loaded)) < 1e-5
    optimizer = torch.optim.SGD(melora_fx.adapter_parameters(loaded).values(), lr=0.1)
    before = logits_of(loaded)
    loaded(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    assert worst_error(logits_of(loaded), before) > 1e-4


def test_the_configuration_of_a_site_is_pefts(tmp_path: Path) -> None:
    TRAINED["patterns"].model().save_pretrained(tmp_path / "peft")
    edit_config(tmp_path / "peft", lora_dropout=0.25)
    read_peft_adapter(tmp_path / "peft", tmp_path / "ours")
    configs = read_adapter(tmp_path / "ours").configs
    assert configs[QUERY] == MELoRAConfig(rank=2, num_blocks=1, alpha=5.0, dropout=0.25)
    assert configs[QUERY.replace("0", "1")] == MELoRAConfig(rank=2, num_blocks=1, alpha=8.0, dropout=0.25)
    assert configs[QUERY.replace("query", "value")] == MELoRAConfig(rank=4, num_blocks=1, alpha=8.0, dropout=0.25)


def test_values_in_blocks_are_stored_in_blocks(peft_folder: Path, tmp_path: Path) -> None:
    """24 features in four blocks of six; the ranks of a block are in any order, and one is empty."""
    tensors = load_file(peft_folder / TENSORS)
    a_key, b_key = (f"base_model.model.{QUERY}.lora_{factor}.weight" for factor in "AB")
    lora_a, lora_b = torch.zeros(6, 24), torch.zeros(24, 6)
    for rank, block in enumerate((2, 0, 1, 3, 0)):
        rows = slice(6 * block, 6 * block + 6)
        lora_a[rank, rows], lora_b[rows, rank] = randn(6, seed=rank), randn(6, seed=10 + rank)
    save_file(tensors | {a_key: lora_a, b_key: lora_b}, peft_folder / TENSORS)
    edit_config(peft_folder, rank_pattern={r"layer\.0.*query": 6})
    read_peft_adapter(peft_folder, tmp_path / "ours")
    own = read_adapter(tmp_path / "ours").tensors_of(QUERY)
    assert (own.config.num_blocks, own.config.ranks) == (4, (2, 1, 1, 1))
    blocks = [own.scaled_b()[block] @ own.lora_a[block] for block in range(4)]
    torch.testing.assert_close(torch.block_diag(*blocks), lora_b @ lora_a * (8 / 6))


def test_one_block_among_zeros_is_no_block_diagonal_adapter(peft_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(peft_folder / TENSORS)
    for factor, area in (("A", (slice(None), slice(6, None))), ("B", (slice(6, None), slice(None)))):
        tensors[f"base_model.model.{QUERY}.lora_{factor}.weight"][area] = 0
    save_file(tensors, peft_folder / TENSORS)
    read_peft_adapter(peft_folder, tmp_path / "ours")
    assert read_adapter(tmp_path / "ours").configs[QUERY] == MELoRAConfig(rank=4, num_blocks=1, alpha=8.0)


def test_what_peft_has_trained_on_from_ours_is_a_lora(tmp_path: Path) -> None:
    """The zeros outside the blocks are trained too: it is no longer in blocks, whatever the file says."""
    model = fill(melora_fx.rewrite(bert_classifier(), {"query": MELoRAConfig(rank=2, num_blocks=2, alpha=2.0)}))
    melora_fx.save_adapter(model, tmp_path / "first")
    write_peft_adapter(tmp_path / "first", tmp_path / "peft")
    file = tmp_path / "peft" / TENSORS
    tensors = {key: tensor + 0.01 for key, tensor in load_file(file).items()}
    metadata = {"format": "pt", "melora": json.dumps({"blocks": {QUERY: {"rank": 2, "num_blocks": 2, "split": None}}})}
    save_file(tensors, file, metadata)
    read_peft_adapter(tmp_path / "peft", tmp_path / "ours")
    assert {config.num_blocks for config in read_adapter(tmp_path / "ours").configs.values()} == {1}


AUTHORS = {"peft_type": "MELORA", "r": [2, 1], "lora_alpha": [4, 3], "mode": "me", "bias": "none", "lora_dropout": 0.0}


@pytest.fixture
def authors_folder(tmp_path: Path) -> Path:
    """What the authors' code saves for a BERT with two blocks on the queries, with a trained and an original head."""
    folder = tmp_path / "authors"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(AUTHORS | {"modules_to_save": None, "task_type": "SEQ_CLS"}))
    tensors = {}
    for layer in range(2):
        for block, rank in enumerate(AUTHORS["r"]):
            path = f"base_model.model.{QUERY.replace('0', str(layer))}"
            tensors[f"{path}.lora_A.{block}.weight"] = randn(rank, 12, seed=layer) * 0.3
            tensors[f"{path}.lora_B.{block}.weight"] = randn(12, rank, seed=10 + block) * 0.3
    for name, scale in (("", 0.1), ("original_module.", 1.0)):
        tensors[f"base_model.model.classifier.{name}weight"] = randn(3, 24) * scale
        tensors[f"base_model.model.classifier.{name}bias"] = randn(3) * scale
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


def test_the_authors_blocks_stay_blocks(authors_folder: Path, tmp_path: Path) -> None:
    read_peft_adapter(authors_folder, tmp_path / "ours")
    base = bert_classifier()
    expected = copy.deepcopy(base)
    tensors = torch.load(authors_folder / "adapter_model.bin", weights_only=True)
    with torch.no_grad():
        for layer in range(2):
            path = QUERY.replace("0", str(layer))
            factors = [[tensors[f"base_model.model.{path}.lora_{f}.{block}.weight"] for f in "BA"] for block in (0, 1)]
            update = torch.block_diag(*[s * b @ a for s, (b, a) in zip((4 / 2, 3 / 1), factors, strict=True)])
            expected.get_submodule(path).weight.add_(update)
        expected.classifier.weight.copy_(tensors["base_model.model.classifier.weight"])
        expected.classifier.bias.copy_(tensors["base_model.model.classifier.bias"])
    loaded = melora_fx.load_adapter(base, tmp_path / "ours").eval()
    assert worst_error(logits_of(loaded), logits_of(expected)) < 1e-6
    assert melora_fx.sites(loaded)[QUERY].config == MELoRAConfig(rank=(2, 1), num_blocks=2, alpha=(4.0, 3.0))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": 2}, "must be lists with one number per block"),
        ({"r": [2, 0]}, r"`rank\[1\]`"),
        ({"lora_alpha": [4]}, "must be lists with one number per block"),
        ({"bias": "all"}, "trained biases"),
        ({"r": [2, 2]}, "block 1 has the shapes"),
        ({"r": [2, 1, 1], "lora_alpha": [1, 1, 1]}, "exactly the 3 blocks"),
        ({"task_type": None}, "holds `classifier.bias`, which belongs to no adapted module"),
    ],
)
def test_settings_of_the_authors_that_do_not_fit(changes: Any, text: str, authors_folder: Path, tmp_path: Path) -> None:
    edit_config(authors_folder, **changes)
    with pytest.raises(MELoRAError, match=text):
        read_peft_adapter(authors_folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


VARIANTS = {
    "DoRA": {"use_dora": True},
    "LoRA with biases": {"lora_bias": True},
    "QALoRA": {"use_qalora": True},
    "Activated LoRA": {"alora_invocation_tokens": [1]},
    "replicated layers": {"layer_replication": [[0, 1]]},
    "embeddings of single tokens": {"trainable_token_indices": [1]},
    "VeLoRA": {"velora_config": {"a": 1}},
    "MonteCLoRA": {"monteclora_config": {"a": 1}},
    "KaSA": {"kasa_config": {"a": 1}},
    "Arrow": {"arrow_config": {"a": 1}},
    "trained biases": {"bias": "lora_only"},
    "path_initial_model_for_weight_conversion": {"init_lora_weights": "pissa"},
    "its `peft_type` is 'LOHA'": {"peft_type": "LOHA"},
    "unknown settings, which may belong to another method: use_nova": {"use_nova": 3},
}


@pytest.mark.parametrize("text", VARIANTS)
def test_another_method_is_refused_by_its_name(text: str, peft_folder: Path, tmp_path: Path) -> None:
    edit_config(peft_folder, **VARIANTS[text])
    with pytest.raises(MELoRAError, match=text):
        read_peft_adapter(peft_folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_embeddings_and_convolutions_are_refused(tmp_path: Path) -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    for name, model, target, text in (
        ("words", bert_classifier(), "word_embeddings", "lora_A and lora_B of a linear, such as of an embedding"),
        ("conv", Convolution(), "conv", "convolutions and embeddings are not adapted"),
    ):
        peft_model = get_peft_model(model, LoraConfig(target_modules=[target]))
        peft_model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        with pytest.raises(MELoRAError, match=text):
            read_peft_adapter(tmp_path / name, tmp_path / "ours")
