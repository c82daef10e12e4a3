"""Scores checkpoints: tasks, protocols, frames, agreement and fidelity, the report, the service around them."""
