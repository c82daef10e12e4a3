"""A vLLM teacher behind gRPC: the scoring engine, the signal head, the generating engine.

Rooms, each importing only those before it: `engine`, `signals`, `admission`, `model`, `server`, `jobs`; `cli` is the
command. Nothing here imports another service, or Ray.
"""
