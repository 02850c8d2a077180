"""Tests of mocte_ds.dist."""
