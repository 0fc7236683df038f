"""`python -m exporters.cli` is `melora-fx`."""

from .commands import main

main()
