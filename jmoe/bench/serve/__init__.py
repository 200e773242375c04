"""A server measured from outside: many requests at once, and how long each token took."""
