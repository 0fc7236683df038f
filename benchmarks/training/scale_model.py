"""A paper model of several GPUs: what one holds, sends and receives in a training step, for adapters and without.

Nothing is measured here. Of a Llama whose linears are all adapted, on D_f × D_t GPUs: FSDP over D_f, tensor parallelism
over D_t by torch's styles, which cut as Megatron does. I and O are the features of a linear, T tokens of one GPU, h the
hidden size.

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
    """Sizes of a model. `key_value`: features of k and of v."""

    hidden: int
    intermediate: int
    key_value: int
    layers: int
    vocabulary: int

    def by_columns(self) -> list[tuple[int, int]]:
        """(I, O) of q, k, v, gate and up."""
        outputs = (self.hidden, self.key_value, self.key_value, self.intermediate, self.intermediate)
        return [(self.hidden, output) for output in outputs]

    def by_rows(self) -> list[tuple[int, int]]:
        """(I, O) of o and down."""
        return [(self.hidden, self.hidden), (self.intermediate, self.hidden)]

    @property
    def num_parameters(self) -> int:
        """Of all linears, the embedding and the head."""
        of_layer = sum(math.prod(shape) for shape in (*self.by_columns(), *self.by_rows()))
        return self.layers * of_layer + 2 * self.vocabulary * self.hidden


MODELS = {
    "Llama 2 7B": Llama(4096, 11008, 4096, 32, 32000),
    "Llama 3 70B": Llama(8192, 28672, 1024, 80, 128256),
}


class Layout(NamedTuple):
    """How many GPUs share the layers' weights by FSDP and by tensor parallelism, and tokens of one GPU's batch."""

    fsdp: int
    tensor: int
    tokens: int = 4096


class Adapter(NamedTuple):
    """What is trained of one linear.

    Attributes:
        total: values in all, of (I, O, whether it is cut by columns, D_t).
        held: those that one of the D_t GPUs trains.
        sent: values that the D_t GPUs add up over T tokens in a forward and its backward.
    """

    total: Callable[[int, int, bool, int], float]
    held: Callable[[int, int, bool, int], float]
    sent: float = 0


def melora(num_blocks: int, rank: int) -> Adapter:
    """n blocks of rank r; n a multiple of D_t."""
    return Adapter(
        total=lambda inputs, outputs, columns, degree: rank * (inputs + outputs),
        held=lambda inputs, outputs, columns, degree: rank * (inputs + outputs) / degree,
    )


def lora(rank: int) -> Adapter:
    """A is whole beside a linear that is cut by columns, B beside one that is cut by rows."""

    def held(inputs: int, outputs: int, columns: bool, degree: int) -> float:
        return rank * (inputs + outputs / degree if columns else inputs / degree + outputs)

    return Adapter(lambda inputs, outputs, columns, degree: rank * (inputs + outputs), held, sent=rank)


def bd_lora(rank: int) -> Adapter:
    """B is block-diagonal with D_t blocks beside a linear that is cut by columns, A beside one that is cut by rows."""

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
    """Of one GPU: bytes of weights and of what is trained, and bytes a step by FSDP and by tensor parallelism; of the
    last two, what the adapter adds.
    """

    trained_values: float
    weights: float
    trained: float
    fsdp: float
    fsdp_added: float
    tensor: float
    tensor_added: float


def cost(model: Llama, layout: Layout, adapter: Adapter) -> Cost:
    """What one GPU holds and exchanges; weights in bfloat16, what is trained in float32.

    FSDP gathers the layers' weights in the forward and in the backward, in bfloat16, and reduces gradients in float32.
    Tensor parallelism by torch's styles sums up T·h values for each linear: by rows in the forward, by columns in the
    backward.
    """
    is_full = adapter is FULL
    linears = [(*shape, True) for shape in model.by_columns()] + [(*shape, False) for shape in model.by_rows()]
    total = model.layers * sum(adapter.total(*linear, layout.tensor) for linear in linears)
    held = model.layers * sum(adapter.held(*linear, layout.tensor) for linear in linears)
    if is_full:
        rest = 2 * model.vocabulary * model.hidden
        total, held = total + rest, held + rest / layout.tensor
    per_tensor = model.num_parameters / layout.tensor
    moved = 1 - 1 / layout.fsdp  # of what is gathered or reduced, the part of others
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
    *("FSDP a step, GB", "added", "TP a step, GB", "added"),
)


def scale_table() -> list[str]:
    """The lines of a Markdown table."""
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
