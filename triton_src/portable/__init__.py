"""Grouped products from weights as checkpoints hold them, MXFP4 or bf16, in plain Triton for any GPU."""
