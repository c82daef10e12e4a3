"""What `tutelage train` can be told: one frozen model for a run, a student, its objective, and what it is connected to.

Importable without torch, Ray or vLLM, so that `--help` and `--dry-run` answer at once. From the rooms of the trainer
it imports the registry of `losses` alone.
"""
