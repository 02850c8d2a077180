"""Checksums that a thread makes beside the reading; against hashlib."""

import hashlib

import pytest
import torch

from mocte_ds.ownership.checksums import SumsBeside


def test_every_tensor_has_its_own_sum() -> None:
    tensors = {str(number): torch.arange(number, number + 1000).reshape(10, 100) for number in range(20)}
    with SumsBeside() as sums:
        for name, tensor in tensors.items():
            sums.add(name, tensor)
    assert sums.found == {
        name: hashlib.sha256(b"torch.int64 (10, 100) " + tensor.numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def test_what_goes_wrong_in_the_thread_is_told() -> None:
    with pytest.raises(AttributeError), SumsBeside() as sums:
        sums.add("no tensor", "text")  # type: ignore[arg-type]
