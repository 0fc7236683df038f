"""The list of all blocks."""

from . import commands, folding, inference, overview, quality, spread, training
from .block import Block
from .results import RESULT_BLOCKS

README, QUICKSTART, REWRITE, TRAINING = "README.md", "docs/QUICKSTART.md", "docs/REWRITE.md", "docs/TRAINING.md"
FOLD, EXPORT, DECODERS, SERVE = "docs/FOLD.md", "docs/EXPORT.md", "docs/DECODERS.md", "docs/SERVE.md"
FROM_PEFT, LOWERINGS, SCALE = "docs/FROM_PEFT.md", "docs/LOWERINGS.md", "docs/SCALE.md"

BLOCKS = (
    Block(README, "numbers", "", overview.numbers),
    Block(QUICKSTART, "demo", "demo", commands.demo),
    Block(FROM_PEFT, "glue", "glue_study", quality.studies),
    Block(FROM_PEFT, "language", "language_study", quality.studies),
    Block(FROM_PEFT, "end-to-end", "end_to_end", quality.end_to_end),
    Block(REWRITE, "rewriting", "rewrite_speed", training.rewriting),
    Block(TRAINING, "train-command", "train_command", commands.train),
    Block(TRAINING, "swaps", "swap_speed", training.swaps),
    Block(TRAINING, "tuning", "instruction_tuning", commands.tuning),
    Block(LOWERINGS, "steps", "train_step", training.steps),
    Block(LOWERINGS, "backward", "train_step", training.kept_for_backward),
    Block(LOWERINGS, "allocators", "train_step", training.allocators),
    Block(LOWERINGS, "experts", "experts", training.experts),
    Block(FOLD, "rounding", "fold_rounding", folding.rounding),
    Block(FOLD, "folds-in-short", "fold_speed", folding.short),
    Block(FOLD, "folds", "fold_speed", folding.table),
    Block(EXPORT, "peers", "peers", inference.peers),
    Block(DECODERS, "texts", "generation", inference.texts),
    Block(DECODERS, "tokens", "decoding", inference.decoding),
    Block(SERVE, "latency", "latency", inference.latency),
    Block(SCALE, "measured", "processes", spread.measured),
    Block(SCALE, "on-paper", "", spread.on_paper),
    *RESULT_BLOCKS,
)
"""A new block needs a line here, its function, and the two comments in the page."""
