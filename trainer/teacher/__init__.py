"""A student's teacher: asked over gRPC or read from stored signals, its answer checked and turned into tensors.

May import `data`. Knows nothing of losses, models or training.
"""
