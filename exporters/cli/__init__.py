"""The command line, `melora-fx`: the one room above both packages.

commands.py   every command with an example, and `main`
options.py    options that several commands have, and how repeated ones are read
training.py   demo, match
folding.py    fold, fold-onnx
exporting.py  export
adapters.py   adapter to-ort
timing.py     bench
"""
