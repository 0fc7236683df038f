"""Makes benchmarks/ importable: it is not installed, but is in the root of the checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
