"""Checkpoints of a training: the trained tensors and everything that the next step depends on, without base weights.

`checkpoints/step-N/` is an adapter folder that also contains `state.pt`: optimizer, schedule, torch's random state and
the history. It gets this name once it is complete, so that a run can be killed at any time. `run.json` contains the
arguments of the run: a run with other arguments does not resume from its checkpoints.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import melora_fx
from melora_fx import MELoRAError
from melora_fx.files import new_folder, write_atomically, writing
from melora_fx.names import without_wrappers
from melora_fx.saving.fingerprint import fingerprint

_KEPT = 2
_RUN_FILE = "run.json"
_STATE_FILE = "state.pt"


@dataclass
class History:
    """The losses and evaluations of a training so far.

    Attributes:
        losses: the loss of each step, a mean over its batch.
        evaluations: (steps done, held-out accuracy between 0 and 1); the first is before any step.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Checkpoints:
    """The checkpoints of a run with these arguments, in a folder.

    Attributes:
        folder: the folder of the checkpoints; created by `open`.
        arguments: everything that the result depends on, as JSON-ready values.
        every_s: seconds after which the next checkpoint is due.
    """

    folder: Path
    arguments: Mapping[str, Any]
    every_s: float = 180.0

    def __post_init__(self) -> None:
        self._last = time.monotonic()

    @property
    def are_due(self) -> bool:
        """Whether `every_s` seconds have passed since the last checkpoint, or since the start."""
        return time.monotonic() - self._last >= self.every_s

    def refuse_others(self) -> None:
        """Raises MELoRAError if the folder belongs to a run with other arguments; names the differences."""
        before = self._arguments_before()
        if before is None:
            return
        now = json.loads(json.dumps(self.arguments))
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            changes = ", ".join(f"{name} (={now.get(name)!r}, there {before.get(name)!r})" for name in names)
            raise MELoRAError(
                f"`{self.folder.parent}` has the checkpoints of another training: {changes}. Pass another `--out`, the "
                "same arguments to resume it, or `--restart` to start over"
            )

    def open(self, *, restart: bool) -> None:
        """Creates the folder with its run.json, and removes what a killed run left incomplete.

        Removes everything in it if `restart` is set, or if it has no run.json.
        """
        with writing(self.folder):
            if restart or self._arguments_before() is None:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".*"):
                shutil.rmtree(left, ignore_errors=True)
            text = json.dumps(self.arguments, indent=2)
            write_atomically(self.folder / _RUN_FILE, lambda path: path.write_text(text + "\n"))

    def save(self, model: nn.Module, optimizer: Any, scheduler: Any, history: History) -> None:
        """Writes a checkpoint of the current state, and removes all but the last two."""
        state = {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all(),  # empty without CUDA
            "history": dataclasses.asdict(history),
        }
        path = self.folder / f"step-{len(history.losses):08d}"
        if not path.exists():
            with new_folder(path) as made:
                melora_fx.save_adapter(model, made)
                write_atomically(made / _STATE_FILE, lambda file: torch.save(state, file))
        for old in self._paths()[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        self._last = time.monotonic()

    def load(self, model: nn.Module, optimizer: Any, scheduler: Any) -> History:
        """Restores model, optimizer, scheduler and random state from the last checkpoint, and returns its history.

        Without a checkpoint it changes nothing and returns an empty history.

        Raises:
            MELoRAError: if the checkpoint cannot be read, or is of another base.
        """
        paths = self._paths()
        if not paths:
            return History()
        melora_fx.load_adapter(model, paths[-1])
        try:
            state = torch.load(paths[-1] / _STATE_FILE, weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["random"])
            torch.cuda.set_rng_state_all(state["cuda_random"])
            losses, evaluations = (list(state["history"][name]) for name in ("losses", "evaluations"))
        except Exception as error:  # pickle and torch raise many kinds
            raise MELoRAError(
                f"`{paths[-1]}` cannot be read ({type(error).__name__}): remove it to resume from the one before it"
            ) from error
        return History(losses, [(int(step), float(accuracy)) for step, accuracy in evaluations])

    def _paths(self) -> list[Path]:
        """Returns the folders of the checkpoints in the order of their steps."""
        return sorted(path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))

    def _arguments_before(self) -> dict[str, Any] | None:
        file = self.folder / _RUN_FILE
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError) as error:
            raise MELoRAError(f"`{file}` cannot be read: {error}; use `--restart` to start over") from error
        return found if found is None or isinstance(found, dict) else {}


def hash_base(model: nn.Module, new: Collection[str]) -> str:
    """Returns the start of the SHA-256 over the fingerprints of a plain model's weights, except its `new` parts."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        own = without_wrappers(name)
        if not any(own == each or own.startswith(f"{each}.") for each in new):
            digest.update(f"{own} {json.dumps(fingerprint(parameter))}".encode())
    return digest.hexdigest()[:16]


def hash_texts(*parts: tuple[tuple[str, int], ...]) -> str:
    """Returns the start of the SHA-256 over labelled texts in their order."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
