"""Parquet: texts of a column, chunk by chunk, and vectors beside the other columns.

It owns what pyarrow is imported for, which comes with the extra ``parquet``; importing this room loads none of it.
"""
