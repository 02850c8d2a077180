"""Tests of mocte_ds.spectrum."""
