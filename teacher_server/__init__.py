"""A vLLM teacher behind gRPC: the scoring engine, the signal head, the generating engine.

Rooms, each importing only those before it: `engine`, `admission`, `signals`, `model`, `server`, `jobs`; `config` is
below all of them and `cli`, the command, above. Nothing here imports another service, or Ray.
"""
