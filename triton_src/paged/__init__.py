"""Attention to keys and values in pages, which a table finds for each sequence."""
