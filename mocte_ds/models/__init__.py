"""Decoders and their named sizes."""

from mocte_ds.models.decoder import Decoder, DecoderConfig
from mocte_ds.models.presets import PRESETS, preset

__all__ = ["PRESETS", "Decoder", "DecoderConfig", "preset"]
