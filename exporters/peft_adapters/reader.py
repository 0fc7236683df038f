"""Converts adapter folders of PEFT, of the MELoRA authors' code and of mlx_lm to ours."""

import os
from pathlib import Path

from exporters.adapters.find_blocks import in_blocks
from exporters.adapters.lora_form import Lora
from exporters.adapters.mlx_adapter import TENSORS_FILE as MLX_FILE
from exporters.adapters.mlx_adapter import MlxLora, read_mlx_folder
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.config import alpha_for
from melora_fx.files import output_path, refuse_source

from .authors_format import read_authors
from .folder import read_folder
from .imported import Imported
from .lora_format import read_lora
from .names import PICKLE_FILE, TENSORS_FILE


def read_peft_adapter(peft_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> None:
    """Converts a PEFT adapter folder to one of ours, which loads, trains, folds, exports and swaps like any other.

    It reads LoRA on nn.Linear, Conv1D and stacks of experts (`target_parameters`), with patterns of ranks and alphas
    and rank-stabilised; block-diagonal LoRA; and trained modules (`modules_to_save`). An update whose values lie in
    blocks is stored in blocks; other updates have `num_blocks=1`. Adapters of the MELoRA authors' code (`peft_type`
    "MELORA") keep their blocks. A folder of mlx_lm (`adapters.safetensors`) is read too, if its names of modules are
    those of transformers.

    Such a folder contains neither the values of its base nor the orientation of square weights. PEFT's claim about
    Conv1D (`fan_in_fan_out`) is believed if the name of the module agrees with it. Load the adapter into its model and
    save it to store both in the file.

    Args:
        peft_dir: a folder with adapter_config.json and adapter_model.safetensors or adapter_model.bin.
        out_dir: the adapter folder to write, which must not be one of another program; our own adapter there is
            replaced.

    Raises:
        ValueError: if `out_dir` is "".
        MELoRAError: if `peft_dir` cannot be read, is damaged or adapts no module; it is of another method, which the
            text names (DoRA, trained biases, embeddings, QALoRA, etc.); `out_dir` cannot be written, is inside
            `peft_dir`, or is a folder of another program.
    """
    directory, out = Path(peft_dir), output_path(out_dir)
    imported = _take_apart(directory)
    refuse_source(out, directory)
    for name in (TENSORS_FILE, PICKLE_FILE, MLX_FILE):
        if os.path.exists(out / name):
            raise MELoRAError(f"`{out}` is an adapter folder of another program, with {name}: name another place")
    imported.write(out)


def _take_apart(directory: Path) -> Imported:
    if os.path.exists(directory / MLX_FILE):
        return _read_mlx(directory)
    folder = read_folder(directory)
    imported = read_authors(folder) if folder.config.get("peft_type") == "MELORA" else read_lora(folder)
    if not imported.sites:
        raise MELoRAError(f"`{directory}` adapts no module: it has no lora_A and lora_B")
    return imported


def _read_mlx(directory: Path) -> Imported:
    """Returns the adapter in a folder of mlx_lm, for models whose modules have transformers' names, such as Llama."""
    imported = Imported(directory)
    for name, found in read_mlx_folder(directory).items():
        try:
            imported.sites[name] = _mlx_site(found)
        except ValueError as error:
            raise MELoRAError(f"`{name}` in `{directory}`: {error}") from error
    return imported


def _mlx_site(found: MlxLora) -> AdapterTensors:
    if not found.lora_a.dim() == found.lora_b.dim() == 2:
        raise ValueError("it adapts a stack of experts: only linears can be read from mlx_lm's adapters")
    if not found.scale:
        raise ValueError("its scale is 0, so it changes nothing")
    lora = Lora(found.lora_a, found.lora_b if found.scale > 0 else -found.lora_b)
    scale = abs(found.scale)
    config = MELoRAConfig(rank=lora.rank, num_blocks=1, alpha=alpha_for(scale, lora.rank))
    return in_blocks([lora], scale) or AdapterTensors(config, lora.lora_a[None], lora.lora_b[None])
