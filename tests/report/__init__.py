"""Tests of mocte_ds.report."""
