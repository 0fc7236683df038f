"""Calculates what one of several GPUs stores, sends and receives in a training step, with and without adapters.

Nothing is measured here. The model is a Llama with adapters in all linears, on D_f × D_t GPUs: FSDP over D_f, and
tensor parallelism over D_t with torch's styles, which shard as Megatron does. I and O are the features of a linear, T
the tokens of one GPU, h the hidden size.

    python -m benchmarks.training.scale_model      prints the table of docs/SCALE.md
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from exporters.measuring.tables import markdown_table

_BF16, _FP32 = 2, 4
_TRAINED = 4 * _FP32
"""Bytes of a trained value: itself, its gradient and AdamW's two averages, in float32."""


@dataclass(frozen=True)
class Llama:
    """Sizes of a model. `key_value`: output features of k and of v."""

    hidden: int
    intermediate: int
    key_value: int
    layers: int
    vocabulary: int

    def by_columns(self) -> list[tuple[int, int]]:
        """Returns (I, O) of q, k, v, gate and up."""
        outputs = (self.hidden, self.key_value, self.key_value, self.intermediate, self.intermediate)
        return [(self.hidden, output) for output in outputs]

    def by_rows(self) -> list[tuple[int, int]]:
        """Returns (I, O) of o and down."""
        return [(self.hidden, self.hidden), (self.intermediate, self.hidden)]

    @property
    def num_parameters(self) -> int:
        """The number of parameters of all linears, the embedding and the head."""
        of_layer = sum(math.prod(shape) for shape in (*self.by_columns(), *self.by_rows()))
        return self.layers * of_layer + 2 * self.vocabulary * self.hidden


MODELS = {
    "Llama 2 7B": Llama(4096, 11008, 4096, 32, 32000),
    "Llama 3 70B": Llama(8192, 28672, 1024, 80, 128256),
}


class Layout(NamedTuple):
    """The number of GPUs for FSDP and for tensor parallelism, and the tokens of one GPU's batch."""

    fsdp: int
    tensor: int
    tokens: int = 4096


class Adapter(NamedTuple):
    """The trained values of one linear.

    Attributes:
        total: all values, given (I, O, whether the linear is sharded by columns, D_t).
        held: those that one of the D_t GPUs trains, given the same arguments.
        sent: values per token that the D_t GPUs sum up in a forward and backward pass.
    """

    total: Callable[[int, int, bool, int], float]
    held: Callable[[int, int, bool, int], float]
    sent: float = 0


def melora(num_blocks: int, rank: int) -> Adapter:
    """Returns a MELoRA adapter; `num_blocks` must be a multiple of D_t."""
    return Adapter(
        total=lambda inputs, outputs, columns, degree: rank * (inputs + outputs),
        held=lambda inputs, outputs, columns, degree: rank * (inputs + outputs) / degree,
    )


def lora(rank: int) -> Adapter:
    """Returns a LoRA: A is whole at a linear that is sharded by columns, B at one that is sharded by rows."""

    def held(inputs: int, outputs: int, columns: bool, degree: int) -> float:
        return rank * (inputs + outputs / degree if columns else inputs / degree + outputs)

    return Adapter(lambda inputs, outputs, columns, degree: rank * (inputs + outputs), held, sent=rank)


def bd_lora(rank: int) -> Adapter:
    """Returns a BD-LoRA: at a linear that is sharded by columns B has D_t diagonal blocks, by rows A has them."""

    def total(inputs: int, outputs: int, columns: bool, degree: int) -> float:
        return rank * (inputs + outputs / degree if columns else inputs / degree + outputs)

    return Adapter(total, lambda inputs, outputs, columns, degree: total(inputs, outputs, columns, degree) / degree)


FULL = Adapter(
    total=lambda inputs, outputs, columns, degree: inputs * outputs,
    held=lambda inputs, outputs, columns, degree: inputs * outputs / degree,
)
SIDES = {
    "MELoRA, 8 blocks of rank 8": melora(8, 8),
    "LoRA, rank 64 (equal rank)": lora(64),
    "LoRA, rank 8 (equal parameters)": lora(8),
    "BD-LoRA, rank 64": bd_lora(64),
    "full fine-tuning": FULL,
}


class Cost(NamedTuple):
    """The cost of one GPU, in bytes: weights, trained values, and the traffic of a step.

    The traffic is that of FSDP and of tensor parallelism, each also as what the adapter adds. `trained_values` is their
    number in the whole model.
    """

    trained_values: float
    weights: float
    trained: float
    fsdp: float
    fsdp_added: float
    tensor: float
    tensor_added: float


def cost(model: Llama, layout: Layout, adapter: Adapter) -> Cost:
    """Returns what one GPU stores and exchanges, with weights in bfloat16 and trained values in float32.

    FSDP gathers the layers' weights in bfloat16, in the forward and in the backward pass, and reduces gradients in
    float32. Tensor parallelism with torch's styles sums T·h values for each linear: in the forward pass for linears
    that are sharded by rows, in the backward pass for those that are sharded by columns.
    """
    is_full = adapter is FULL
    linears = [(*shape, True) for shape in model.by_columns()] + [(*shape, False) for shape in model.by_rows()]
    total = model.layers * sum(adapter.total(*linear, layout.tensor) for linear in linears)
    held = model.layers * sum(adapter.held(*linear, layout.tensor) for linear in linears)
    if is_full:
        rest = 2 * model.vocabulary * model.hidden
        total, held = total + rest, held + rest / layout.tensor
    per_tensor = model.num_parameters / layout.tensor
    moved = 1 - 1 / layout.fsdp  # the share of other GPUs in what is gathered or reduced
    gathered = 2 * _BF16 * moved
    of_base = per_tensor * gathered
    of_adapter = held * _FP32 * moved if is_full else held * (gathered + _FP32 * moved)
    sums = 0 if layout.tensor == 1 else 1
    of_tokens = layout.tokens * _BF16 * sums
    return Cost(
        trained_values=total,
        weights=_BF16 * per_tensor / layout.fsdp,
        trained=_TRAINED * held / layout.fsdp,
        fsdp=of_base + of_adapter,
        fsdp_added=of_adapter,
        tensor=of_tokens * model.layers * len(linears) * (model.hidden + adapter.sent),
        tensor_added=of_tokens * model.layers * len(linears) * adapter.sent,
    )


LAYOUTS = {"Llama 2 7B": (Layout(8, 1), Layout(1, 8)), "Llama 3 70B": (Layout(64, 1), Layout(8, 8))}
_HEADINGS = (
    *("model", "GPUs: FSDP × TP", "trained", "million values", "weights, GB", "trained, GB"),
    *("FSDP per step, GB", "added", "TP per step, GB", "added"),
)


def scale_table() -> list[str]:
    """Returns the lines of a Markdown table."""
    return markdown_table(_HEADINGS, list(_rows()), text_columns=3)


def _rows() -> Iterator[list[str]]:
    for name, layouts in LAYOUTS.items():
        for layout in layouts:
            for side, adapter in SIDES.items():
                found = cost(MODELS[name], layout, adapter)
                numbers = [found.weights, found.trained, found.fsdp, found.fsdp_added, found.tensor, found.tensor_added]
                gigabytes = [f"{number / 1e9:.2f}" for number in numbers]
                million = f"{found.trained_values / 1e6:,.0f}"
                yield [name, f"{layout.fsdp} × {layout.tensor}", side, million, *gigabytes]


if __name__ == "__main__":
    print("\n".join(scale_table()))
