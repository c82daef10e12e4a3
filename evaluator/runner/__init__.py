"""One evaluation from its request to its frames, in durable batches; and watching a run's folder.

May import `protocols`, `models`, `tasks`, `scoring` and `results`.
"""
