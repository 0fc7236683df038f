"""Model repositories for the Triton Inference Server.

config      config.pbtxt: inputs, outputs, batching and the provider of one model
repository  `write_triton_repository`: checks a graph and adds it to a repository
"""
