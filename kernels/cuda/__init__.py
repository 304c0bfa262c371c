"""CUDA C++ kernels for what Triton cannot say; launched like Triton's, compiled through NVRTC."""
