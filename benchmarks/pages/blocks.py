"""The list of all blocks."""

from . import commands, folding, inference, quality, spread, training
from .block import Block
from .results import RESULT_BLOCKS

README, EXPORT, FOLD = "README.md", "docs/EXPORT.md", "docs/FOLD.md"
SCALE, TRAINING = "docs/SCALE.md", "docs/TRAINING.md"

BLOCKS = (
    Block(README, "demo", "demo", commands.demo),
    Block(README, "glue", "glue_study", quality.studies),
    Block(README, "language", "language_study", quality.studies),
    Block(README, "end-to-end", "end_to_end", quality.end_to_end),
    Block(README, "steps", "train_step", training.steps),
    Block(README, "backward", "train_step", training.kept_for_backward),
    Block(README, "folds", "fold_speed", folding.short),
    Block(README, "peers", "peers", inference.peers_in_short),
    Block(README, "latency", "latency", inference.latency),
    Block(README, "tokens", "decoding", inference.decoding),
    Block(README, "rewriting", "rewrite_speed", training.rewriting),
    Block(EXPORT, "texts", "generation", inference.texts),
    Block(EXPORT, "peers", "peers", inference.peers),
    Block(FOLD, "rounding", "fold_rounding", folding.rounding),
    Block(FOLD, "folds", "fold_speed", folding.table),
    Block(SCALE, "measured", "processes", spread.measured),
    Block(SCALE, "on-paper", "", spread.on_paper),
    Block(TRAINING, "experts", "experts", training.experts),
    Block(TRAINING, "train-command", "train_command", commands.train),
    Block(TRAINING, "tuning", "instruction_tuning", commands.tuning),
    Block(TRAINING, "swaps", "swap_speed", training.swaps),
    Block(TRAINING, "allocators", "train_step", training.allocators),
    *RESULT_BLOCKS,
)
"""One more is a line here, its function, and the two comments in the page."""
