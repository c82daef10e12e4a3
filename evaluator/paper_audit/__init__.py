"""The published study's statistics from its authors' released tables, and an audit of what they carry.

`published_tests` repeats the paper's own; `temperature_selection`, `correlations` and `single_scores` look at what
those rest on, and `conclusions` says what survives. `audit` is where it starts. May import `statistics` and `report`.
"""
