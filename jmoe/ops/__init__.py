"""Arrays in, arrays out: the mixture-of-experts operations and their containers."""
