"""Adapters seen from outside, and in other tools' formats.

summary      what an adapter folder holds, site by site
lora_form    its updates as ordinary LoRAs
find_blocks  ordinary LoRAs as block-diagonal adapters, where their values lie in blocks
arithmetic   sums, means and multiples of adapters
compress     adapters of smaller ranks
derived      the folders of adapters that are made of adapters
ort_adapter  ONNX Runtime's, for a graph whose adapters are optional inputs

PEFT's folders:
peft_names       keys and files
peft_writer      an adapter as PEFT's
bdlora           … as PEFT's block-diagonal LoRA
peft_reader      PEFT's as an adapter
peft_folder      … the two files
peft_settings    … what the configuration says
authors_format   … the files of the MELoRA authors' code
mlx_adapter  MLX's
mlx_names    what mlx_lm calls the modules of models
"""
