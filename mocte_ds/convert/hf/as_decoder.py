"""A trained model of transformers as the decoder of ours that computes the same, so that stock classes can fit it."""

from dataclasses import asdict

from torch import Tensor

from mocte_ds.base_model import make_config
from mocte_ds.checkpoints.source import Source, empty_decoder
from mocte_ds.convert.hf.imports.config import decoder_of
from mocte_ds.convert.hf.trained import STATE
from mocte_ds.errors import CheckpointError

_HEAD = "lm_head.weight"


class DecoderView(Source):
    """The same weights under the same names."""

    def __init__(self, source: Source) -> None:
        """Look at it.

        Args:
            source: of a model of transformers, with or without blocks.

        Raises:
            CheckpointError: no decoder of ours computes what this model does.
        """
        base, state = source.base, source.state
        assert base is not None
        decoder = decoder_of(base["architecture"], make_config(base, STATE), STATE)
        if decoder.style != "llama":
            raise CheckpointError(f"no stock class has experts in the layers of a {base['architecture']}.")
        mocte = None if state["mocte"] is None else {"config": state["mocte"], "blocks": state["blocks"]}
        model = empty_decoder(asdict(decoder), mocte, STATE)
        super().__init__(model, {**state, "model": asdict(decoder), "base": None}, source.dtype)
        self._source = source
        shapes = {name: shape for name, shape in source.shapes.items() if not (decoder.tied and name == _HEAD)}
        different = shapes.items() ^ self.shapes.items()
        if different:
            name = min(different)[0]
            raise CheckpointError(f"{name} of the {base['architecture']} has no place in a decoder of ours.")

    def _stored(self, name: str) -> Tensor:
        return self._source._stored(name)
