"""The command line, `melora-fx`."""
