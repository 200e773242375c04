"""Attention to keys and values that lie in pages: one query of each sequence, or chunks of prompts."""
