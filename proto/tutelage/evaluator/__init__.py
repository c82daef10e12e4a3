"""The evaluator's contract."""
