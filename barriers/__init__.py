"""Ranks of one node: how they find each other, share memory, wait for each other, and name who is late.

Importing this package, or any module of it but the transports, imports no torch and initialises no CUDA.
"""
