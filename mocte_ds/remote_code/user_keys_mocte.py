"""The routing keys that blocks look up; an export writes this file anew where the user has keys of their own."""

from .known_keys_mocte import KEYS

__all__ = ["KEYS"]
