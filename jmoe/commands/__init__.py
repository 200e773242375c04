"""The commands of `jmoe`, one a file."""
