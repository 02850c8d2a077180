"""Decoders of imported models."""

from mocte_ds.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
