"""The evaluation service: a durable queue, the workers that take from it, the RPCs around both.

May import `runner` and the rooms below it.
"""
