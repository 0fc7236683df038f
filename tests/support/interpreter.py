"""Selects Triton's interpreter instead of its compiler if there is no GPU.

Triton reads the variable when it is imported. torch's compiler, torchao and others import it: import this file before
them.
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""The device on which the tests of kernels run."""

if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
