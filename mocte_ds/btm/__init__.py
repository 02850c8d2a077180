"""Baselines that train one dense model for each cluster of documents: c-BTM mixes them, BTX merges them.

c-BTM: Gururangan et al., arXiv 2303.14177. BTX: Sukhbaatar et al., arXiv 2403.07816.
"""
