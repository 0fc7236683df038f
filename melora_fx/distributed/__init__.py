"""Models on several processes: which part of a tensor each process holds, and what all processes must do together.

`torch.distributed.tensor` takes half a second to import, so only functions that have received a DTensor import it.

tensors    gathers full tensors from sharded ones, and shards them again
placement  how A, B and the scaling are placed if tensor parallelism has sharded their weight
share      the part of one adapted linear that one process computes
wrappers   DDP, FSDP and DeepSpeed around a model
zero       parameters that DeepSpeed's ZeRO manages
private    undocumented functions of torch and transformers
agreement  lets one process write, and all processes fail together
"""
