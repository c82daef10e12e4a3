"""A student's weights: forward, backward, optimizer, LoRA adapters, sharding, attention on a CPU, pruned layers.

May import `config`, `losses`, `teacher` and `data`.
"""
