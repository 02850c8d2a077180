"""Package mocte-ds: `pip install -e .[eval,plots,dev]`."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent

setup(
    name="mocte-ds",
    version="0.1.0",
    description="DeepSpeed plugin: pre-training with mixtures of cluster-oriented, trainability-aware experts (MO-CTE)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=[*find_namespace_packages(include=["mocte_ds", "mocte_ds.*"]), "mocte_ds.tools"],
    package_dir={"mocte_ds.tools": "tools"},
    entry_points={"console_scripts": ["mocte-ds = mocte_ds.command:main"]},
    package_data={"mocte_ds": ["corpus/*.jsonl.gz", "evaluation/tasks/*"]},
    python_requires=">=3.11",
    install_requires=[
        # mocte_ds/zero relies on private parts of DeepSpeed; conformance.py names the checked versions.
        "deepspeed==0.19.8",
        "torch>=2.8",
        "megatron-core>=0.16,<0.17",
        "transformers>=5.0,<6",
        "sentencepiece>=0.2",
        "scikit-learn>=1.5",
        "datasets>=4.0",
        "numpy>=1.26",
        "psutil>=5.9",
        "pyyaml>=6",
        "tqdm>=4.66",
        "safetensors>=0.4",
        "tensorboard>=2.15",
        "ninja>=1.11",
        # DeepSpeed's launcher and megatron-core import pkg_resources and distutils through it.
        "setuptools",
    ],
    extras_require={
        "eval": ["lm-eval==0.4.13", "accelerate>=1.0"],
        "plots": ["matplotlib>=3.8"],
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff==0.17.6", "mypy>=1.11", "types-PyYAML", "types-tqdm"],
    },
)
