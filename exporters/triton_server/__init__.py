"""Model repositories for the Triton Inference Server.

config.py      config.pbtxt: inputs, outputs, batching and the provider of one model
repository.py  `write_triton_repository`: checks a graph and adds it to a repository
"""
