"""The small launches of a decoding step outside the experts: products of few rows, norms, attention to a cache."""
