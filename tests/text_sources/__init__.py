"""Tests of mocte_ds.text_sources."""
