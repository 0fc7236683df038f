"""Merges adapters into weights, in memory and in checkpoints on disk, and reports what is lost to rounding; or removes
adapters without merging them.

fold             `fold`, `folded`, `check_fold`: in the memory of a model
unload           `unload`: removes the adapters of a model
refusals         cases that a fold in memory must refuse
site_weight      a site's weight, and the blocks of it that a fold changes, as views
measured_fold    measures what a fold loses to rounding, tile by tile
report           `FoldReport`: the measured sites as a table, with a remedy
fold_checkpoint  `fold_checkpoint`: on disk
checkpoint       where the tensors of a checkpoint are stored
checkpoint_keys  the names of a model's parameters in a checkpoint
private          undocumented functions of transformers
checkpoint_plan  decides and checks what a fold changes in a checkpoint, before anything is written
edited_copy      copies files and changes byte ranges on the way
other_files      finds and copies the other files of a checkpoint's folder
"""
