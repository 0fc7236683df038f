"""Models whose forward depends on more than the values of tensors, each with the outcome of its whole capture.

case       the class of a case, and its checks
sizes      sizes that decide what is computed
axes       which axes may vary
arguments  how a model is called, and arguments that are not tensors
state      state that a forward keeps, and weights in unusual places
"""

from support.whole_captures import arguments, axes, sizes, state
from support.whole_captures.case import CASES, WholeCase, check, check_onnx

__all__ = ["CASES", "WholeCase", "arguments", "axes", "check", "check_onnx", "sizes", "state"]
