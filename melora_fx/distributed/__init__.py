"""Models on several processes: what of a tensor each holds, and what all must do alike.

`torch.distributed.tensor` takes half a second to import: only functions that have met a DTensor import it.

tensors    whole tensors from sharded ones, and back
placement  how A, B and the scaling lie beside a weight that tensor parallelism has sharded
share      the part of one adapted linear that one process computes
wrappers   DDP, FSDP and DeepSpeed around a model
zero       parameters that DeepSpeed's ZeRO manages
private    what is borrowed of torch and transformers for them
agreement  one process writes, and all fail alike
"""
