"""Token ids outside of the vocabulary are named before the model sees them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mocte_ds.dist.mesh import ALONE, mesh_of_processes
from mocte_ds.errors import DataError
from mocte_ds.vocabulary import Vocabulary, embedding_size
from tests.small_models import small_llama
from tests.spawn import spawn

IDS = torch.tensor([[0, 5, 39], [1, 2, 3]])


def test_the_embedding_is_found() -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 100}
    assert embedding_size(GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes))) == 40, "not that of the positions"
    assert embedding_size(small_llama(40, 16, 24, 1, positions=100)) == 40
    assert embedding_size(nn.Linear(2, 2)) is None


def test_ids_that_are_none() -> None:
    vocabulary = Vocabulary(small_llama(40, 16, 24, 1), every=10, axis=ALONE)
    vocabulary.look((), {"input_ids": IDS}, 0)
    vocabulary.look((IDS,), {}, 0)
    vocabulary.look((IDS.float() * 100,), {}, 0)  # features, no ids
    with pytest.raises(DataError, match=r"step 4: the batch is empty, input_ids are \(0, 3\)"):
        vocabulary.look((), {"input_ids": IDS[:0]}, 3)
    for step in (0, 1):
        with pytest.raises(DataError, match=f"step {step + 1}: a token id is 40, and .* the ids 0 to 39"):
            vocabulary.look((), {"input_ids": IDS + 1}, step)
    with pytest.raises(DataError, match="a token id is -100"):
        vocabulary.look((torch.where(IDS == 5, -100, IDS),), {}, 0)


def test_a_batch_on_a_gpu_is_looked_at_now_and_then() -> None:
    vocabulary, looked = Vocabulary(small_llama(40, 16, 24, 1), every=10, axis=ALONE), []

    class OnDevice(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    for step in range(25):
        try:
            vocabulary.look((), {"input_ids": (IDS + 1).as_subclass(OnDevice)}, step)
        except DataError:
            looked.append(step)
    assert looked == [0, 10, 20]


def test_a_micro_batch_without_a_label() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=100))
    vocabulary, none = Vocabulary(model, every=10, axis=ALONE), torch.full_like(IDS, -100)
    assert model(input_ids=IDS, labels=none).loss.isnan(), "what it is refused for"
    with pytest.raises(DataError, match="step 8: every label of a micro-batch of 2 sequences is -100"):
        vocabulary.look((), {"input_ids": IDS, "labels": none}, 7, trains=True)
    one = none.clone()
    one[1, 2] = 3
    vocabulary.look((), {"input_ids": IDS, "labels": one}, 7, trains=True)
    vocabulary.look((), {"input_ids": IDS, "labels": none}, 7)  # a validation pass changes no weight


def look_on_a_rank() -> str:
    vocabulary = Vocabulary(small_llama(40, 16, 24, 1), every=10, axis=mesh_of_processes().world)
    ids = IDS + 1 if dist.get_rank() else IDS
    vocabulary.look((), {"input_ids": IDS}, 3, trains=True)
    try:
        vocabulary.look((), {"input_ids": ids}, 3, trains=True)
    except DataError as error:
        return str(error)
    return "nothing"


def test_what_is_wrong_on_one_rank_stops_all() -> None:
    zero, one = spawn(look_on_a_rank, 2)
    assert zero.startswith("step 4: rank 1: a token id is 40") and one.startswith("step 4: a token id is 40")
