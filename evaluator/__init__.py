"""Scores checkpoints: tasks, protocols, one row an item, statistics, the report, the service around them.

Rooms, each importing only those before it: `scoring`, `tasks`, `models`, `protocols`, `results`, `runner`, `service`;
and beside the last two `statistics`, `report`, `paper_audit`. Nothing here imports another service, or Ray.
"""
