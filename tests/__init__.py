"""Tests of mocte_ds, in the folders of the package."""
