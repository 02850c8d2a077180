"""Package mocte-ds: `pip install -e .[all,dev]`; MANIFEST.in says what else a source distribution holds."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
HUGGING_FACE = ["transformers>=5.0,<6", "tokenizers>=0.20", "safetensors>=0.4", "sentencepiece>=0.2", "protobuf>=4"]
EXTRAS = {
    # launch/pretrain.py, tools/plan.py, tools/train_tokenizer.py, tools/prepare_data.py, tools/study.py
    "train": [
        *HUGGING_FACE,  # its models
        "megatron-core>=0.16,<0.17",  # its indexed datasets
        "pyarrow>=15",
        "pyyaml>=6",
        "tensorboard>=2.15",
    ],
    # tools/export_hf.py, tools/import_hf.py
    "hf": HUGGING_FACE,
    # tools/to_megatron.py
    "megatron": [*HUGGING_FACE, "megatron-core>=0.16,<0.17"],
    # launch/evaluate.py
    "eval": [*HUGGING_FACE, "lm-eval==0.4.13", "accelerate>=1.0", "datasets>=4.0", "pyarrow>=15", "pyyaml>=6"],
    # mocte_ds.integrations.transformers
    "trainer": [*HUGGING_FACE, "accelerate>=1.0"],
    # tools/report.py, tools/study.py
    "report": ["matplotlib>=3.8", "pyyaml>=6"],
}
APPLICATION = ["train", "hf", "megatron", "eval", "trainer", "report"]
# It measures this project; command.py says so where its tool is asked for.
CHECKOUT_ONLY = ["mocte_ds.benchmark", "mocte_ds.benchmark.*"]
# Copied into the package when it is built, beside each other as here: mocte_ds/shipped.py.
BESIDE = {"tools": [], "launch": ["runs/*.yaml", "studies/*.yaml"], "ds_configs": ["*.json"]}
DEV = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.5",
    "peft>=0.19",
    "pytest>=8",
    "pytest-cov>=5",
    "pytest-xdist>=3.6",
    "pre-commit>=3.7",
    "ruff==0.17.6",
    "mypy>=1.11",
    "types-PyYAML",
    "types-tqdm",
]


def description() -> str:
    """README.md without pictures, and with plain text for what links into the repository."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    name="mocte-ds",
    version="0.1.0",
    description="DeepSpeed plugin: pre-training with mixtures of cluster-oriented, trainability-aware experts (MO-CTE)",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="The authors of mocte-ds",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["mixture of experts", "pre-training", "deepspeed", "language models"],
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=[
        *find_namespace_packages(include=["mocte_ds", "mocte_ds.*"], exclude=CHECKOUT_ONLY),
        *(f"mocte_ds.{name}" for name in BESIDE),
    ],
    package_dir={f"mocte_ds.{name}": name for name in BESIDE},
    entry_points={"console_scripts": ["mocte-ds = mocte_ds.command:main"]},
    package_data={
        "mocte_ds": ["py.typed", "corpus/*.jsonl.gz", "evaluation/tasks/*", "plan/hardware.yaml"],
        **{f"mocte_ds.{name}": patterns for name, patterns in BESIDE.items()},
    },
    python_requires=">=3.11",
    # What `import mocte_ds; mocte_ds.initialize` needs in anybody's training script.
    install_requires=[
        # mocte_ds/zero relies on private parts of DeepSpeed; conformance.py names the checked versions.
        "deepspeed==0.19.8",
        "torch>=2.8",
        "hjson>=3",  # DeepSpeed's configs are Hjson
        "scikit-learn>=1.5",
        "numpy>=1.26",
        "scipy>=1.11",
        "psutil>=5.9",
        "pydantic>=2.12",
        "tqdm>=4.66",
        "ninja>=1.11",
        # DeepSpeed's launcher imports pkg_resources and distutils through it.
        "setuptools",
    ],
    extras_require={**EXTRAS, "all": sorted({name for extra in APPLICATION for name in EXTRAS[extra]}), "dev": DEV},
)
