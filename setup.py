"""Packaging: `pip install .` installs the runtime; extras add what tests and GPU machines need."""

from setuptools import find_namespace_packages, setup

setup(
    name="lockstep-runtime",
    version="0.1.0",
    description="Ahead-of-time captured decode runtime for DeepSeek-V3-style MoE models",
    python_requires=">=3.11",
    packages=find_namespace_packages(
        include=[
            f"{name}{tail}"
            for name in ("runtime", "graphs", "kernels", "barriers", "capture_cache", "bench")
            for tail in ("", ".*")
        ],
        exclude=["bench.results*"],
    ),
    package_data={"barriers": ["cuda/*"], "kernels": ["cuda/*"]},
    install_requires=[
        "cuda-bindings>=13.0,<14",
        "matplotlib>=3.8",
        "numpy>=2.0",
        "nvidia-cuda-nvrtc>=13.0,<14",
        "rich>=13.7",
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "torch>=2.11",
        "triton>=3.6",
    ],
    extras_require={
        "flashinfer": ["flashinfer-python==0.6.18.post1"],
        "test": [
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pytest>=8.3",
            "numpy<2.4",  # Triton's interpreter
            "pytest-timeout>=2.3",
            "ruff>=0.9",
            "transformers>=5.0",
        ],
    },
)
