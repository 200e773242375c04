"""Serving: many requests at once, over HTTP."""
