"""Commands of `jmoe` that have a file of their own; jmoe.cli registers them."""
