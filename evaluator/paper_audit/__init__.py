"""The published study's statistics from its authors' released tables, and an audit of what they carry.

May import `statistics` and `report`.
"""
