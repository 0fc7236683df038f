"""Adapters in other tools' formats."""
