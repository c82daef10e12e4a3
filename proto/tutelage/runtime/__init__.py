"""Processes: children that never outlive their parent, and what ends the orphans of one that was killed.

For every service that starts programs. May import errors alone.
"""
