"""Rows and what is derived from them: the declared schema, Parquet files, summaries, exports for other tools.

May import `scoring`.
"""
