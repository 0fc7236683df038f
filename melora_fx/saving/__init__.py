"""Adapters in files: writes them from a model, and loads them into one.

adapter        an adapter without a model
header         what a file says about an adapter, value by value
well_formed    checks that an adapter's tensors are those that its header describes
adapter_file   an adapter folder: its format, `read_adapter` and `write_adapter`
tensor_file    safetensors files with the same bytes each time
fingerprint    recognises base weights
model_adapter  the parts of a rewritten model that belong to its adapter
checks         refuses adapters that do not belong to a model
save           `save_adapter`
load           `load_adapter`
trainer        `AdapterCheckpointCallback`: a Trainer's checkpoints contain only what is trained
"""
