"""The sampled SVD against numpy's SVD of all rows, over rank counts, dtypes and awkward inputs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mocte_ds.dist import collectives
from mocte_ds.dist.mesh import ALONE, mesh_of_processes
from mocte_ds.errors import MocteError
from mocte_ds.spectrum import subspace as module
from mocte_ds.spectrum.subspace import (
    certified_rank,
    gap_rank,
    gate_rank,
    sampled_svd,
    sine_of_largest_angle,
    split_half_angles,
    split_half_certificate,
)
from tests.spawn import spawn


def _features(n: int, d: int, seed: int = 0, strong: int = 8) -> Tensor:
    """Rows with a mean that outweighs everything, ``strong`` directions that decay, and noise."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.cat([torch.linspace(9, 4, strong), torch.ones(d - strong)])
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(77))).Q
    mean = 30 * torch.randn(d, generator=torch.Generator().manual_seed(78))
    return (torch.randn(n, d, generator=generator) * scale) @ turn.T + mean


def _numpy_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    rows = x.double().numpy()
    _, values, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return torch.from_numpy(values[:rank].copy()), torch.from_numpy(vectors[:rank].T.copy())


def _assert_equal_to_numpy(found, x: Tensor, rank: int, angle: float = 0.02) -> None:
    values, vectors = _numpy_svd(x, rank)
    assert torch.allclose(found.mean.double(), x.double().mean(0), atol=1e-3)
    assert ((found.singular_values - values) / values).abs().max() < 0.01
    assert sine_of_largest_angle(vectors, found.basis) < angle
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(rank), atol=1e-4)


def test_wide_rows_warm_and_cold() -> None:
    x, rank = _features(4096, 1024), 8
    old = sampled_svd(x[:2048], rank, ALONE)
    cold, warm = sampled_svd(x, rank, ALONE), sampled_svd(x, rank, ALONE, basis=old.basis)
    _assert_equal_to_numpy(cold, x, rank)
    _assert_equal_to_numpy(warm, x, rank)
    # A sample half as large differs visibly; otherwise the warm start would prove nothing.
    assert sine_of_largest_angle(old.basis, warm.basis) > 0.1
    again = sampled_svd(x, rank, ALONE, basis=warm.basis)
    assert again.moved_bytes < 0.5 * cold.moved_bytes
    _assert_equal_to_numpy(again, x, rank)


def test_directions_are_the_singular_vectors_in_order() -> None:
    x = _features(600, 48)
    values, vectors = _numpy_svd(x, 6)
    found = sampled_svd(x, 6, ALONE)
    cosines = (vectors * found.directions).sum(0).abs()
    assert cosines.min() > 0.9999
    variance = (x - x.mean(0)).double().square().sum()
    assert torch.allclose(found.explained.double(), values.square() / variance, rtol=1e-4)
    assert int(found.rows) == 600


def test_basis_stays_near_the_one_before() -> None:
    x = _features(3000, 64)
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    before = sampled_svd(x, 8, ALONE).basis @ turn
    found = sampled_svd(x, 8, ALONE, basis=before)
    assert (found.basis - before).abs().max() < 1e-3
    assert sine_of_largest_angle(found.directions, found.basis) < 1e-4
    assert sampled_svd(x, 8, ALONE, basis=before[:, :5]).basis.shape == (64, 8)


def test_flat_spectra_are_within_one_percent() -> None:
    x = torch.randn(2048, 512)
    found = sampled_svd(x, 8, ALONE)
    values, _ = _numpy_svd(x, 8)
    assert ((found.singular_values - values) / values).abs().max() < 0.012


def test_layers_and_lists_equal_single_calls() -> None:
    x = torch.stack([_features(300, 32, seed) * (seed + 1) for seed in range(3)])
    single = [sampled_svd(h, 4, ALONE) for h in x]
    for found in (sampled_svd(x, 4, ALONE), sampled_svd([x[0], x[1], x[2]], 4, ALONE)):
        for i in range(3):
            assert torch.allclose(found.basis[i], single[i].basis, atol=1e-4)
            assert torch.allclose(found.singular_values[i], single[i].singular_values, rtol=1e-4)
    ragged = sampled_svd([x[0], x[1, :50]], 4, ALONE)
    _assert_equal_to_numpy(type(ragged)(*(getattr(ragged, f)[1] for f in _FIELDS), moved_bytes=0), x[1, :50], 4)
    warm = sampled_svd(x, 4, ALONE, basis=torch.stack([s.basis for s in single]))
    assert torch.allclose(warm.basis[2], single[2].basis, atol=1e-3)


_FIELDS = ("mean", "basis", "singular_values", "directions", "explained", "rows")


def _svd_of_part(x: Tensor, splits: list[int], basis: Tensor | None, layers: bool) -> tuple:
    axis = mesh_of_processes().data
    part = x.split(splits, dim=-2)[axis.rank]
    calls = []
    real = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda t, *a, **k: (calls.append(t.numel()), real(t, *a, **k))[1]
    collectives.dist.all_reduce = torch.distributed.all_reduce
    found = sampled_svd(part, 4, axis, basis=basis)
    half = split_half_certificate(part, 4, axis)
    return found.mean, found.basis, found.singular_values, half, calls


@pytest.mark.parametrize("splits", [[400, 600], [0, 700, 1, 299]])
def test_any_number_of_ranks_gives_the_same(splits: list[int]) -> None:
    x = torch.stack([_features(1000, 96, seed) for seed in range(2)])
    single = sampled_svd(x, 4, ALONE)
    half = split_half_certificate(x, 4, ALONE)
    results = spawn(_svd_of_part, len(splits), x, splits, None, True)
    for mean, basis, values, angle, _ in results:
        assert torch.allclose(mean, single.mean, rtol=1e-3, atol=1e-3)
        assert torch.allclose(basis, single.basis, atol=1e-3)
        assert torch.allclose(values, single.singular_values, rtol=1e-3)
        assert torch.allclose(angle, half, atol=1e-3)
        # Bit for bit over the ranks, or they would drift apart.
        assert torch.equal(basis, results[0][1]) and torch.equal(values, results[0][2])


def test_one_all_reduce_a_pass_for_all_layers() -> None:
    x = torch.stack([_features(200, 96, seed) for seed in range(3)])
    warm = sampled_svd(x, 4, ALONE).basis
    one = spawn(_svd_of_part, 2, x[0], [100, 100], warm[0], False)[0][4]
    three = spawn(_svd_of_part, 2, x, [100, 100], warm, True)[0][4]
    assert len(one) == len(three)
    # moments, one warm pass, projection; then the certificate's cold call: moments, five passes, projection
    assert len(three) == 3 + 2 + module.COLD_PASSES
    assert three[1] == 3 * 96 * 12
    assert max(three) < 2 * 3 * 96 * 96


def test_few_rows_constant_rows_and_full_width() -> None:
    few = _features(5, 40)
    found = sampled_svd(few, 8, ALONE)
    values, vectors = _numpy_svd(few, 4)
    assert torch.allclose(found.singular_values[:4].double(), values, rtol=1e-3)
    assert found.singular_values[4:].max() < 1e-2
    assert sine_of_largest_angle(found.directions, vectors).item() > 0  # finite
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(8), atol=1e-4)
    assert sine_of_largest_angle(vectors, found.directions[:, :4]) < 1e-3

    constant = sampled_svd(torch.full((50, 12), 3.0), 4, ALONE)
    assert torch.allclose(constant.singular_values, torch.zeros(4), atol=1e-3)
    assert torch.allclose(constant.basis.T @ constant.basis, torch.eye(4), atol=1e-4)
    assert constant.explained.isfinite().all()

    full = _features(100, 10, strong=4)
    _assert_equal_to_numpy(sampled_svd(full, 10, ALONE), full, 10)
    assert sampled_svd(torch.randn(1, 6), 2, ALONE).singular_values.max() < 1e-5


def test_bf16_and_autocast_compute_in_fp32() -> None:
    x = _features(1000, 64)
    x = x - x.mean(0)
    half = x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sampled_svd(half, 6, ALONE)
        exact = sampled_svd(half.float(), 6, ALONE)
    assert torch.allclose(found.singular_values, exact.singular_values, rtol=1e-5)
    values, vectors = _numpy_svd(half.float(), 6)
    assert torch.allclose(found.singular_values.double(), values, rtol=1e-4)
    assert found.basis.dtype == torch.float32


NAMES = ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"]


def _bad_rows_on_one_rank() -> list[str]:
    """What every use of the spectrum says of one bad row, in layer 1 of rank 1."""
    messages, axis = [], mesh_of_processes().data
    for value in (float("nan"), float("inf"), -float("inf")):
        layers = [torch.randn(20, 8) for _ in NAMES]
        if axis.rank == 1:
            layers[1][3, 2] = value
        for call in (sampled_svd, split_half_angles):
            for names in (NAMES, None):
                try:
                    call(layers, 2, axis, names=names)
                    messages.append("no error")
                except MocteError as error:
                    messages.append(str(error))
    return messages


def test_rows_that_are_not_finite_stop_every_rank_by_the_name_of_their_layer() -> None:
    one, other = spawn(_bad_rows_on_one_rank, 2, timeout=60)
    assert one == other, "ranks with different errors would act differently"
    # Half-samples are halves of a layer, not layers of their own.
    for message, place in zip(one, 6 * [NAMES[1], "layer 1"], strict=True):
        assert f"rows with NaN or infinity ({place}: 1 of 40)" in message


def test_errors_say_what_is_wrong() -> None:
    x = torch.randn(20, 8)
    cases = [
        ({"x": x, "rank": 9}, "between 1 and the features' width 8"),
        ({"x": x[:0], "rank": 2}, "no rank has any row"),
        ({"x": [x, x[:, :4]], "rank": 2}, "different widths"),
        ({"x": x, "rank": 2, "basis": torch.randn(7, 2)}, "does not fit"),
        ({"x": x.long(), "rank": 2}, "floating point"),
        ({"x": x, "rank": 2, "names": NAMES}, "3 names for 1 layers"),
    ]
    for arguments, message in cases:
        with pytest.raises(MocteError, match=message):
            sampled_svd(**arguments, axis=ALONE)


def test_the_certificate_tells_enough_rows_from_too_few() -> None:
    enough, scarce = _features(4000, 64), _features(60, 64)
    assert split_half_certificate(enough, 8, ALONE) < 0.3
    assert split_half_certificate(scarce, 8, ALONE) > 0.5
    assert split_half_certificate(torch.randn(4000, 64), 8, ALONE) > 0.5
    # Two true directions: certain for k = 2, chance for more.
    angles = split_half_angles(_features(4000, 64, strong=2), 4, ALONE)
    assert angles[1] < 0.3 < angles[3]
    both = split_half_certificate([enough, scarce], 8, ALONE)
    assert both[0] < 0.3 < both[1]
    warm = split_half_certificate(enough, 8, ALONE, basis=sampled_svd(enough, 8, ALONE).basis)
    assert abs(float(warm - split_half_certificate(enough, 8, ALONE))) < 0.02


def test_rank_lies_at_the_largest_gap() -> None:
    values = torch.tensor([100.0, 50, 40, 30, 28, 26, 9, 8, 7, 6, 5])
    assert gap_rank(values) == 6
    assert gap_rank(values, low=1, high=3) == 1
    assert gap_rank(torch.tensor([5.0, 4, 3]), low=4) == 3


def test_certified_and_gate_rank() -> None:
    angles = [0.02, 0.1, 0.4, 0.25, 0.6]
    assert certified_rank(angles, 0.3) == 4, "two directions of equal strength may swap and still span the same"
    assert certified_rank(angles, 0.05) == 1 and certified_rank(angles, 0.01) == 0
    assert gate_rank(angles, 0.3) == 4 and gate_rank(angles, 0.05) == 2
    assert gate_rank([0.9, 0.8, 0.7], 0.3) == 3 and gate_rank([0.9], 0.3) == 1


def test_halves_by_place_are_the_same_in_any_order() -> None:
    x, order = _features(600, 24, strong=3), torch.randperm(600)
    found = split_half_angles(x, 6, ALONE, place=torch.arange(600))
    torch.testing.assert_close(split_half_angles(x[order], 6, ALONE, place=order), found, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(split_half_angles(x, 6, ALONE), found, atol=1e-4, rtol=1e-3)
    one, other = (sampled_svd(x[half::2], 6, ALONE).directions for half in (0, 1))
    torch.testing.assert_close(found[-1], sine_of_largest_angle(one, other), atol=1e-3, rtol=1e-2)
