"""Students on Ray: the supervisor of a run, one actor a student, its workers, run control, what the terminal shows.

The top room: it may import all others.
"""
