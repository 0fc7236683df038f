"""One thread for torch here and in the processes that tests start; imported above torch.

Two of pytest's processes, and what they start, share two cores: with more threads each waits for the others.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
