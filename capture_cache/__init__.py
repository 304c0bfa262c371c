"""What outlives a process: arena layout, compiled kernels, the store, and their driver calls.

Imports nothing but the standard library, numpy and cuda-python, and initialises no CUDA: the player
restores a bundle with this package alone.
"""
