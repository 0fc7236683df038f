"""The bytes of a graph's weights, read and changed in the files that they lie in."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from melora_fx.folding.edited_copy import Stretch, write_edited

from .metadata import description_of
from .onnx_file import all_tensors, data_files
from .weight_place import WeightPlace

TORCH_DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
}


Change = Callable[[torch.Tensor], object]


@dataclass
class WeightBytes:
    """The initializers of a graph, and what is to be done to them."""

    path: Path
    graph: ModelProto
    changes: dict[str, list[tuple[WeightPlace, Change]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = {tensor.name: tensor for tensor in self.graph.graph.initializer}
        self.files = data_files(self.path, self.graph)

    def view(self, place: WeightPlace, data: memoryview) -> torch.Tensor:
        """The parameter at `place` as it lies in the model, a view of its initializer's bytes."""
        tensor = self.tensors[place.initializer]
        values = torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.data_type]).view(tuple(tensor.dims))
        values = values[:, slice(*place.columns)] if place.columns else values
        return values.mT if place.is_transposed else values

    def read(self, place: WeightPlace) -> torch.Tensor:
        """The parameter at `place`, memory-mapped where it is in a file of its own."""
        tensor = self.tensors[place.initializer]
        if not uses_external_data(tensor):
            return self.view(place, memoryview(bytearray(tensor.raw_data)))
        location, start, stop = span_of(tensor)
        with self.files[location].open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self.view(place, memoryview(mapped)[start:stop])

    def change(self, place: WeightPlace, change: Change) -> None:
        """Notes that the parameter at `place` is to be changed when the graph is written."""
        self.changes.setdefault(place.initializer, []).append((place, change))

    def write(self, path: Path, facts: str) -> None:
        """Writes the graph with its changed weights and its new description; its external data in one file."""
        names = {
            location: f"{path.name}.data" if not index else f"{path.name}.data.{index}"
            for index, location in enumerate(self.files)
        }
        stretches: dict[str, list[Stretch]] = {location: [] for location in self.files}
        for name, changes in self.changes.items():
            tensor = self.tensors[name]
            if uses_external_data(tensor):
                location, start, stop = span_of(tensor)
                edit = partial(self._apply, changes)
                stretches[location].append(Stretch(self.files[location], start, stop, edit))
            else:
                data = bytearray(tensor.raw_data)
                self._apply(changes, memoryview(data))
                tensor.raw_data = bytes(data)
        write_edited(
            {
                path.parent / names[location]: _with_the_rest(self.files[location], changing)
                for location, changing in stretches.items()
            },
            lambda _: None,
        )
        for tensor in all_tensors(self.graph.graph):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = names[entry.value]
        entry = description_of(self.graph)
        assert entry is not None
        entry.value = facts
        path.write_bytes(self.graph.SerializeToString())

    def _apply(self, changes: list[tuple[WeightPlace, Change]], data: memoryview) -> None:
        for place, change in changes:
            change(self.view(place, data))


def span_of(tensor: TensorProto) -> tuple[str, int, int]:
    """(location, first byte, end) of a tensor's external data."""
    info = ExternalDataInfo(tensor)
    start = info.offset or 0
    return info.location, start, start + (info.length or 0)


def _with_the_rest(file: Path, changing: list[Stretch]) -> list[Stretch | bytes]:
    """All of a file: the stretches that change, and those between them that do not."""
    pieces: list[Stretch | bytes] = []
    end = 0
    for stretch in sorted(changing, key=lambda stretch: stretch.start):
        pieces += [Stretch(file, end, stretch.start), stretch]
        end = stretch.stop
    return [*pieces, Stretch(file, end, file.stat().st_size)]
