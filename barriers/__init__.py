"""Ranks of one node: how they meet, share memory, wait for each other, and name who is late.

Importing any module of it but the transports imports no torch, and none initialises CUDA.
"""
