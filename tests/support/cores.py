"""Gives torch one thread, here and in the processes that tests start; import it before torch.

Two pytest processes, and the processes that they start, share two cores: with more threads each waits for the others.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
