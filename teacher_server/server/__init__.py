"""The gRPC service: its life, its RPCs, its streams, what it counts and logs.

May import every room but `jobs`.
"""
