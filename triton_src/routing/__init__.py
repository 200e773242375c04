"""Which experts take which tokens, in which order: top-k, sorting, tiles, the sum over experts, gradients."""
