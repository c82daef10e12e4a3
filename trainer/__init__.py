"""Students that learn from a served teacher: their configuration, data, losses, training, and their place on Ray.

Rooms, each importing only those before it: `data`, `teacher`, `losses`, `config`, `model`, `rollout`, `checkpoint`,
`metrics`, `training`, `cluster`; `cli` is the command. Nothing here imports another service.
"""
