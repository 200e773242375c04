"""Triton kernels and their launch plans. Imports triton and the standard library alone.

Letters in this room: T tokens, k experts a token, P = T * k pairs (token, expert), E experts, H hidden, I intermediate,
A adapters, R LoRA rank; M, N, K the rows, columns and contraction of one matrix product.

A pair has two numbers. Its *pair index* t * k + j says which token and which of the token's experts; its *position*
says where it stands once pairs are sorted by expert. `order` maps position -> pair index.

Numbers: products of bf16 (MXFP4 values are exact in bf16) are summed in float32; bias, SwiGLU, gate weights and
LoRA are applied in float32; a result is rounded once, when it is stored. No float atomics: equal inputs give equal
bits.
"""
