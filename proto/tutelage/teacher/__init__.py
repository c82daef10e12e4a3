"""The teacher's contract."""
