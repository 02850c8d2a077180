"""Tests of mocte_ds.trainability."""
