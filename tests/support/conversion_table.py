"""Writes the table in docs/ADAPTERS.md: what other programs compute with our adapters, and we with theirs.

PYTHONPATH=tests python -m support.conversion_table

It runs PEFT, vLLM's models (see `vllm_runs`), llama.cpp, MLX and ONNX Runtime, and stops if one is missing.
"""

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import PeftModel
from torch import nn

import melora_fx
from exporters import (
    OrtRunner,
    export_onnx,
    read_peft_adapter,
    write_gguf_adapter,
    write_mlx_adapter,
    write_ort_adapter,
    write_peft_adapter,
)
from exporters.adapters.lora_form import loras_of
from exporters.peft_adapters.vllm import check_for_vllm
from melora_fx import MELoRAError
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.saving.model_adapter import adapter_of
from support import gguf_models, mlx_models
from support.llama_cpp import next_log_probabilities, worst_difference
from support.models import fill, tokens
from support.pages import lines_between, replace_between
from support.travelling import CASES, UNEVEN, Case, assert_same_blocks, logits_of, merged, worst_error
from support.vllm_runs import read_by_vllm

PAGE = Path(__file__).parents[2] / "docs" / "ADAPTERS.md"
_START = "<!-- table: PYTHONPATH=tests python -m support.conversion_table -->"
_END = "<!-- end of table -->"
_PROMPTS = [[1, 5, 9, 60, 33, 70, 12], [1, 80]]
_PACKED = {
    **{name: ("qkv_proj", index) for index, name in enumerate(("q_proj", "k_proj", "v_proj"))},
    **{name: ("qkv_proj", index) for index, name in enumerate(("query", "key", "value"))},
    **{name: ("gate_up_proj", index) for index, name in enumerate(("gate_proj", "up_proj"))},
}
"""The modules that vLLM packs: the packed module, and the index of each in it."""


class Trip(NamedTuple):
    """A case's model with a filled adapter, which is saved in `folder / "ours"`; other files go into `folder` too."""

    case: Case
    folder: Path
    model: nn.Module

    @property
    def ours(self) -> Path:
        return self.folder / "ours"

    @property
    def logits(self) -> torch.Tensor:
        return logits_of(self.model)


def begin(case: Case, folder: Path) -> Trip:
    model = case.adapted()
    melora_fx.save_adapter(model, folder / "ours")
    return Trip(case, folder, model)


def to_peft(trip: Trip, form: str = "lora") -> float:
    """Compares PEFT's logits with our folder, unmerged and merged, to ours."""
    write_peft_adapter(trip.ours, trip.folder / "peft", form=form)
    model = PeftModel.from_pretrained(trip.case.build(), trip.folder / "peft").eval()
    return max(worst_error(logits_of(each), trip.logits) for each in (model, merged(model)))


def from_peft(trip: Trip, form: str = "lora") -> float:
    """Compares our logits with a folder that PEFT has saved to PEFT's."""
    write_peft_adapter(trip.ours, trip.folder / "peft", form=form)
    model = PeftModel.from_pretrained(trip.case.build(), trip.folder / "peft").eval()
    model.save_pretrained(trip.folder / "saved", save_embedding_layers=False)
    read_peft_adapter(trip.folder / "saved", trip.folder / "back")
    read_peft_adapter(trip.folder / "peft", trip.folder / "same")
    assert_same_blocks(trip.ours, trip.folder / "same")
    loaded = melora_fx.load_adapter(trip.case.build(), trip.folder / "back").eval()
    return worst_error(logits_of(loaded), logits_of(model))


def to_vllm(trip: Trip) -> float:
    """Compares the updates in vLLM's own layers, since its kernels need a GPU."""
    adapter = read_adapter(trip.ours)
    needs = check_for_vllm(adapter)
    write_peft_adapter(trip.ours, trip.folder / "peft")
    trip.case.build().save_pretrained(trip.folder / "model")
    runner = ["--runner", "pooling"] if "Classification" in str(adapter.model["class"]) else []
    options = [*runner, "--max-lora-rank", str(needs.max_lora_rank)]
    result = read_by_vllm(trip.folder / "model", trip.folder / "peft", *options)
    assert result["error"] is None, result["error"]
    worst = 0.0
    for site in adapter.configs:
        (lora,) = loras_of(adapter.tensors_of(site))
        owner, _, name = site.rpartition(".")
        layer, part = _PACKED.get(name, (name, 0))
        found = result["updates"].pop(f"{owner}.{layer}.{part}")
        worst = max(worst, worst_error(found, lora.lora_b @ lora.lora_a))
    assert not result["updates"]
    return worst


def to_gguf(trip: Trip) -> float:
    """Compares llama.cpp's log probabilities to the folded model's, relative to the largest logit."""
    trip.case.build().save_pretrained(trip.folder / "base")
    write_gguf_adapter(trip.ours, trip.folder / "base", trip.folder / "adapter.gguf")
    gguf_models.write_gguf(trip.case.build(), trip.folder / "base.gguf")
    folded = melora_fx.fold(melora_fx.load_adapter(trip.case.build(), trip.ours)).eval()
    number = gguf_models.VOCABULARY
    found = next_log_probabilities(trip.folder / "base.gguf", _PROMPTS, number, trip.folder / "adapter.gguf")
    return worst_difference(found, folded, _PROMPTS) / trip.logits.abs().max().item()


def to_mlx(trip: Trip) -> float:
    """Compares mlx_lm's logits to ours."""
    write_mlx_adapter(trip.ours, trip.folder / "mlx")
    mlx_models.save_base(trip.case.build(), trip.folder / "base")
    found = mlx_models.mlx_logits(trip.folder / "base", trip.folder / "mlx")
    return mlx_models.error_of(found, mlx_models.torch_logits(trip.model))


def from_mlx(trip: Trip) -> float:
    """Compares our logits, with the folder that we wrote for mlx_lm read back, to the original ones."""
    write_mlx_adapter(trip.ours, trip.folder / "mlx")
    read_peft_adapter(trip.folder / "mlx", trip.folder / "back")
    if read_adapter(trip.folder / "back").configs.keys() != read_adapter(trip.ours).configs.keys():
        raise MELoRAError("mlx_lm's names are not those of transformers")
    loaded = melora_fx.load_adapter(trip.case.build(), trip.folder / "back").eval()
    assert_same_blocks(trip.ours, trip.folder / "back")
    return worst_error(logits_of(loaded), trip.logits)


def to_ort(trip: Trip) -> float:
    """Compares ONNX Runtime's logits to ours: it runs the file on a graph that was exported with another adapter."""
    other = fill(trip.case.adapted(), seed=5)
    export_onnx(other, tokens(), trip.folder / "swap.onnx", adapter="swap", use_cache=False, verify=False)
    write_ort_adapter(trip.ours, trip.folder / "swap.onnx", trip.folder / "ours.onnx_adapter")
    runner = OrtRunner(trip.folder / "swap.onnx")
    inputs = {name: tensor for name, tensor in tokens().items() if name in runner.describe()}
    found = runner.run(inputs or tokens(), adapter=trip.folder / "ours.onnx_adapter")
    return worst_error(torch.from_numpy(next(iter(found.values()))), trip.logits)


def from_authors(trip: Trip) -> float:
    """Compares our logits with a folder as the authors' code saves it; there all linears have the same ranks."""
    names = [name for name, site in melora_fx.sites(trip.model).items() if site.num_experts == 1]
    model = fill(melora_fx.rewrite(trip.case.build(), names, UNEVEN, keep_trainable=trip.case.kept)).eval()
    tensors = dict(adapter_of(model).kept_tensors())
    for site in adapter_of(model).configs:
        own = adapter_of(model).tensors_of(site)
        for block, rank in enumerate(own.config.ranks):
            tensors[f"{site}.lora_A.{block}.weight"] = own.lora_a[block, :rank]
            tensors[f"{site}.lora_B.{block}.weight"] = own.lora_b[block, :, :rank]
    theirs = trip.folder / "theirs"
    theirs.mkdir()
    torch.save(
        {f"base_model.model.{key}": tensor.detach() for key, tensor in tensors.items()}, theirs / "adapter_model.bin"
    )
    config = {"peft_type": "MELORA", "r": UNEVEN.rank, "lora_alpha": UNEVEN.alpha, "mode": "me"}
    (theirs / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": list(trip.case.kept) or None}))
    read_peft_adapter(theirs, trip.folder / "back")
    return worst_error(logits_of(melora_fx.load_adapter(trip.case.build(), trip.folder / "back")), logits_of(model))


NOT_READ = "not read: an `.onnx_adapter` file contains only the tensors of a graph's inputs; keep the folder"
NO_GGUF = "not read: its names and rows are those of a converted base; keep the folder"
NOT_WRITTEN = "not written: more programs read PEFT's folder"
FORMS: dict[tuple[str, str], Callable[[Trip], float] | str] = {
    ("PEFT, LoRA", "out"): to_peft,
    ("PEFT, LoRA", "in"): from_peft,
    ("PEFT, block-diagonal", "out"): lambda trip: to_peft(trip, "bdlora"),
    ("PEFT, block-diagonal", "in"): lambda trip: from_peft(trip, "bdlora"),
    ("vLLM", "out"): to_vllm,
    ("llama.cpp", "out"): to_gguf,
    ("llama.cpp", "in"): NO_GGUF,
    ("MLX", "out"): to_mlx,
    ("MLX", "in"): from_mlx,
    ("ONNX Runtime", "out"): to_ort,
    ("ONNX Runtime", "in"): NOT_READ,
    ("the MELoRA authors' code", "out"): NOT_WRITTEN,
    ("the MELoRA authors' code", "in"): from_authors,
}
"""Maps a program and a direction to the function that measures it, or to the reason why there is none."""


def measure(form: tuple[str, str], name: str) -> str:
    """Returns a cell of the table: a relative error, or the reason why there is none."""
    run = FORMS[form]
    if isinstance(run, str):
        return run
    with tempfile.TemporaryDirectory() as folder:
        try:
            error = run(begin(CASES[name], Path(folder)))
        except MELoRAError as refusal:
            return _reason(str(refusal), folder)
    return f"{error:.0e}{'†' if run is to_vllm else ''}"


def _reason(text: str, folder: str) -> str:
    """Returns the reason from the text of an error, without the place and the remedy."""
    line = text.replace(folder, "").splitlines()[0]
    while (short := re.sub(r" \([^()]*\)", "", line)) != line:
        line = short
    line = re.sub(r"^`[^`]*`(,? (in )?`[^`]*`)*:? ", "", line.removeprefix("`/ours` cannot be served by vLLM: "))
    return re.split(r"[:;] ", line)[0].replace("|", "/")


def rows() -> Iterator[list[str]]:
    for form in FORMS:
        cells = [measure(form, name) for name in CASES]
        yield [*form, *(cells if len({*cells}) > 1 or not isinstance(FORMS[form], str) else [cells[0]])]


def documented() -> dict[tuple[str, str], list[str]]:
    """Maps (program, direction) to the cells, as they are in the page."""
    lines = [line for line in lines_between(PAGE, _START, _END) if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {(row[0], row[1]): row[2:] for row in cells}


def main() -> None:
    lines = [f"| {' | '.join(['program', '', *CASES])} |", "|" + "---|" * (2 + len(CASES))]
    for row in rows():
        lines.append(f"| {' | '.join([*row, *[''] * (2 + len(CASES) - len(row))])} |")
        print(lines[-1], file=sys.stderr, flush=True)
    replace_between(PAGE, _START, lines, _END)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    main()
