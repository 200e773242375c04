"""A model on the tasks of the lm-evaluation-harness."""
