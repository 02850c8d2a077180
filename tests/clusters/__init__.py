"""Tests of mocte_ds.clusters."""
