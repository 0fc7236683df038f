"""Shared by several test files: models, the oracle, and the tables that tests fill."""
