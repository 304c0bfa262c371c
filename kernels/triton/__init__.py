"""Triton kernels: `@triton.jit`, launcher and `*_ref` oracle; imports torch and triton only."""
