"""Version 1 of the evaluator's contract: generated stubs."""
