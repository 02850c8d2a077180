"""Models that read two sequences are refused, and blocks that read other tokens are credited with nothing."""

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from mocte_ds.config import MocteConfig
from mocte_ds.controller.probe import ProbeReading
from mocte_ds.errors import ConfigError
from mocte_ds.moe import attach


class Translator(nn.Module):
    """An encoder-decoder without transformers' config."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        raise NotImplementedError


def test_encoder_decoders_are_refused() -> None:
    small = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    for model, pattern in (
        (T5ForConditionalGeneration(small), "decoder.block.*.layer.2"),
        (T5ForConditionalGeneration(small), "encoder.block.*.layer.1"),
        (Translator(), "mlp"),
    ):
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(ConfigError, match="encoder-decoder.*Decoder-only and encoder-only"):
            attach(model, MocteConfig.from_dict({"modules": pattern, "num_experts": 2}))
        assert names == [name for name, _ in model.named_modules()], "nothing was changed"


def test_a_block_whose_tokens_are_others_has_no_way() -> None:
    """Such as a second tower's: a check goes on, and credits nothing to its experts."""
    valid = torch.ones(2, 3, dtype=torch.bool)
    now = ProbeReading(torch.zeros(2, 3), {(0, 0): torch.ones(2, 3, dtype=torch.int64)}, valid)
    route, known = now.way(0, 0)
    assert route.sum() == 6 and known.all()
    route, known = now.way(1, 0)
    assert route.shape == (2, 3) and not known.any()
