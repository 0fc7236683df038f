"""The torch side of decoders with a key-value cache: what their graphs are made of.

flat_cache       a model whose forward takes and gives the cache as tensors by name
example_step     a step with a past to translate a decoder with
encoder_decoder  the forward of an encoder-decoder model in two
parts            the graphs that a model becomes
step_conditions  what holds of the sizes of a step's inputs
"""
