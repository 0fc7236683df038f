"""Adapter folders of other programs as ours: PEFT's, those of the MELoRA authors' code, and mlx_lm's."""

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
    """Writes a PEFT adapter folder as one of ours: it loads, trains, folds, exports and swaps like any other.

    What it reads: LoRA, with patterns of ranks and alphas, rank-stabilised, on nn.Linear, Conv1D and stacks of experts
    (`target_parameters`), block-diagonal LoRA, and trained modules (`modules_to_save`). An update whose values lie in
    blocks is stored in blocks; others have `num_blocks=1`. Adapters that the MELoRA authors' code has saved
    (`peft_type` "MELORA") keep their blocks. A folder of mlx_lm's (`adapters.safetensors`) is read too, where its names
    of modules are transformers'.

    Such a folder does not say what its base's values are, nor how square weights lie: what PEFT says of Conv1D is
    believed where it is plain. Loading the adapter into its model and saving it puts both into the file.

    Args:
        peft_dir: a folder with adapter_config.json and adapter_model.safetensors or adapter_model.bin.
        out_dir: the adapter folder to write; not that of another program.

    Raises:
        MELoRAError: for a folder that cannot be read or is not sound; for other methods, by name: DoRA, trained
            biases, embeddings, QALoRA and the like; for a place that cannot be written.
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
    """A folder of mlx_lm's, of models whose modules it calls as transformers does: Llama and its like."""
    imported = Imported(directory)
    for name, found in read_mlx_folder(directory).items():
        try:
            imported.sites[name] = _mlx_site(found)
        except ValueError as error:
            raise MELoRAError(f"`{name}` in `{directory}`: {error}") from error
    return imported


def _mlx_site(found: MlxLora) -> AdapterTensors:
    if not found.lora_a.dim() == found.lora_b.dim() == 2:
        raise ValueError("it is of a stack of experts: of mlx_lm's adapters, those of linears alone are read")
    if not found.scale:
        raise ValueError("its scale is 0, so that it changes nothing")
    lora = Lora(found.lora_a, found.lora_b if found.scale > 0 else -found.lora_b)
    scale = abs(found.scale)
    config = MELoRAConfig(rank=lora.rank, num_blocks=1, alpha=alpha_for(scale, lora.rank))
    return in_blocks([lora], scale) or AdapterTensors(config, lora.lora_a[None], lora.lora_b[None])
