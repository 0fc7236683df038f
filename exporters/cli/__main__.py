"""Runs `melora-fx` as `python -m exporters.cli`."""

from .commands import main

main()
