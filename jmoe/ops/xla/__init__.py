"""The layer by plain XLA operations, for every platform without kernels of its own: backend "xla"."""
