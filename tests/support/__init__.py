"""What several test files share: models, the oracle, and the tables that tests fill."""
