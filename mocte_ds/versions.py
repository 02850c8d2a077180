"""Versions of what a run rests on."""

import platform
from importlib import metadata

_PACKAGES = (
    "mocte-ds deepspeed torch megatron-core transformers sentencepiece scikit-learn datasets numpy lm-eval".split()
)


def versions() -> dict[str, str]:
    """Python, platform, and the packages that a run reads or writes with."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    return found | {name: version_of(name) for name in _PACKAGES}


def version_of(name: str) -> str:
    """Version of a package; `not installed` where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
