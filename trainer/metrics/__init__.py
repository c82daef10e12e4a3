"""What a training says of itself: rows on disk, trackers, Prometheus gauges, progress.

May import `config` and `data`.
"""
