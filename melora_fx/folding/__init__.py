"""Merges adapters into weights, in memory and in checkpoints on disk, and reports what the rounding takes; or takes
adapters away and leaves the weights.

fold             `fold`, `folded`, `check_fold`: in the memory of a model
unload           `unload`: the model without its adapters
refusals         what a fold in memory must refuse
site_weight      a site's weight, and the blocks of it that a fold changes, as views
measured_fold    what the rounding of a fold takes, seen tile by tile
report           `FoldReport`: the measured sites as a table, with a remedy
fold_checkpoint  `fold_checkpoint`: on disk
checkpoint       where the tensors of a checkpoint lie
checkpoint_keys  the names of a model's parameters in a checkpoint
private          what is borrowed of transformers
checkpoint_plan  what a fold changes in a checkpoint, checked before anything is written
edited_copy      copies files and changes stretches of them on the way
other_files      what else of a checkpoint's folder is copied
"""
