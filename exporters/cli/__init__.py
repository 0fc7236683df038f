"""The command line, `melora-fx`: the top layer, which nothing else imports.

commands    every command with an example, and `main`
options     options that several commands share, and the parsers of option values
training    train, demo, match
folding     fold, fold-onnx
exporting   export
generating  generate
adapters    adapter inspect, scale, add, average, compress, to-peft, from-peft, to-gguf, to-mlx, to-ort
timing      bench
terminal    how errors, warnings and logs reach the user
"""
