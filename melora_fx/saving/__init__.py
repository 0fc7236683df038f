"""Adapters in files, from a model and back into one.

adapter        an adapter apart from models
header         what a file says of an adapter, value by value
well_formed    whether an adapter's tensors are those that its header describes
adapter_file   an adapter folder: its format, `read_adapter` and `write_adapter`
tensor_file    safetensors files that are the same each time
fingerprint    what a base weight is recognised by
model_adapter  what of a rewritten model belongs to its adapter
checks         refuses adapters that do not belong to a model
save           `save_adapter`
load           `load_adapter`
trainer        `AdapterCheckpointCallback`: a Trainer's checkpoints hold what is trained
"""
