"""PEFT's adapter folders: written, for all programs that read them, and read.

names           files and keys
stacks          stacks of experts, which PEFT wraps one around the other
bdlora          block-diagonal LoRA: one factor in blocks
writer          an adapter as a PEFT folder
folder          the two files of a folder, read
settings        what its configuration says
lora_format     LoRA and block-diagonal LoRA, taken apart
authors_format  the files of the MELoRA authors' own code, taken apart
imported        what was taken apart, and the adapter that it becomes
reader          a PEFT folder as an adapter
vllm            whether vLLM can serve an adapter, and with which flags
"""
