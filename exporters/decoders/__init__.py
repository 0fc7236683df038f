"""Prepares decoders with a key-value cache in torch, so that they can be translated into graphs.

flat_cache       gives a model a forward with the cache as named tensors
example_step     builds the step with a past with which a decoder is translated
encoder_decoder  splits the forward of an encoder-decoder model in two
parts            decides which graphs a model is exported as
step_conditions  states the conditions on the sizes of a step's inputs
"""
