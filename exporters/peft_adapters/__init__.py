"""Writes adapter folders for PEFT and the programs that read PEFT's, and reads PEFT's.

names           files and keys
stacks          stacks of experts, for which PEFT nests its wrappers
bdlora          block-diagonal LoRA: one factor in blocks
writer          writes an adapter as a PEFT folder
folder          reads the two files of a folder
settings        parses the configuration
lora_format     parses LoRA and block-diagonal LoRA
authors_format  parses the files of the MELoRA authors' code
imported        a parsed adapter, and the adapter folder that it becomes
reader          reads a PEFT folder as an adapter
vllm            whether vLLM can serve an adapter, and with which flags
"""
