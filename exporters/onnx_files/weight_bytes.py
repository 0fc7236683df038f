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
"""Changes a parameter in place."""


@dataclass
class WeightBytes:
    """The initializers of a graph, and what is to be done to them.

    Attributes:
        path: the graph's file.
        graph: the graph without its external data.
        changes: initializer → the places in it that change, each with its change, in the order in which they were
            asked for.
    """

    path: Path
    graph: ModelProto
    changes: dict[str, list[tuple[WeightPlace, Change]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = {tensor.name: tensor for tensor in self.graph.graph.initializer}
        self.files = data_files(self.path, self.graph)

    def read(self, place: WeightPlace) -> torch.Tensor:
        """The parameter at `place`, memory-mapped where it is in a file of its own."""
        tensor = self.tensors[place.initializer]
        if not uses_external_data(tensor):
            return self._view(place, memoryview(bytearray(tensor.raw_data)))
        location, start, stop = span_of(tensor)
        with self.files[location].open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._view(place, memoryview(mapped)[start:stop])

    def change(self, place: WeightPlace, change: Change) -> None:
        """Notes that the parameter at `place` is to be changed when the graph is written."""
        self.changes.setdefault(place.initializer, []).append((place, change))

    def write(self, path: Path, facts: str) -> None:
        """Writes the graph with its changed weights and `facts` as its new description; every file of external data is
        written anew beside `path`.
        """
        names = _data_names(path, self.files)
        self._change_stored_in_graph()
        changing = self._changing_stretches()
        write_edited(
            {
                path.parent / names[location]: _with_the_rest(file, changing[location])
                for location, file in self.files.items()
            },
            lambda _: None,
        )
        self._refer_to(names)
        entry = description_of(self.graph)
        assert entry is not None
        entry.value = facts
        path.write_bytes(self.graph.SerializeToString())

    def _view(self, place: WeightPlace, data: memoryview) -> torch.Tensor:
        """The parameter at `place` as it lies in the model, a view of its initializer's bytes."""
        tensor = self.tensors[place.initializer]
        values = torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.data_type]).view(tuple(tensor.dims))
        values = values[:, slice(*place.columns)] if place.columns else values
        return values.mT if place.is_transposed else values

    def _change_stored_in_graph(self) -> None:
        """Changes the weights that the graph's own file holds."""
        for name, changes in self.changes.items():
            tensor = self.tensors[name]
            if not uses_external_data(tensor):
                data = bytearray(tensor.raw_data)
                self._apply(changes, memoryview(data))
                tensor.raw_data = bytes(data)

    def _changing_stretches(self) -> dict[str, list[Stretch]]:
        """The stretches that change of each file of external data."""
        stretches: dict[str, list[Stretch]] = {location: [] for location in self.files}
        for name, changes in self.changes.items():
            tensor = self.tensors[name]
            if uses_external_data(tensor):
                location, start, stop = span_of(tensor)
                edit = partial(self._apply, changes)
                stretches[location].append(Stretch(self.files[location], start, stop, edit))
        return stretches

    def _apply(self, changes: list[tuple[WeightPlace, Change]], data: memoryview) -> None:
        for place, change in changes:
            change(self._view(place, data))

    def _refer_to(self, names: dict[str, str]) -> None:
        """Renames the files that the graph's tensors refer to."""
        for tensor in all_tensors(self.graph.graph):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = names[entry.value]


def span_of(tensor: TensorProto) -> tuple[str, int, int]:
    """(location, first byte, end) of a tensor's external data."""
    info = ExternalDataInfo(tensor)
    start = info.offset or 0
    return info.location, start, start + (info.length or 0)


def _data_names(path: Path, locations: dict[str, Path]) -> dict[str, str]:
    """The new name of each file of external data: NAME.onnx.data, and NAME.onnx.data.1, … after the first."""
    return {
        location: f"{path.name}.data" if not index else f"{path.name}.data.{index}"
        for index, location in enumerate(locations)
    }


def _with_the_rest(file: Path, changing: list[Stretch]) -> list[Stretch | bytes]:
    """All of a file: the stretches that change, and those between them that do not."""
    pieces: list[Stretch | bytes] = []
    end = 0
    for stretch in sorted(changing, key=lambda stretch: stretch.start):
        pieces += [Stretch(file, end, stretch.start), stretch]
        end = stretch.stop
    return [*pieces, Stretch(file, end, file.stat().st_size)]
