"""Rows and what is derived from them: the declared schema, Parquet files, summaries, exports for other tools.

May import `scoring`, and of `protocols` the kinds of items that are left out.
"""
