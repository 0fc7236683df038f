"""Triton's interpreter in the place of its compiler, where there is no GPU.

Triton reads the variable when it is imported, as torch's compiler, torchao and others do by themselves: this file has
to be imported before them.
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the tests of kernels run."""

if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
