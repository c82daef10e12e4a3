"""Checkpoints that are there completely or not at all, and what a training remembers beside its tensors.

May import `config` and `data`.
"""
