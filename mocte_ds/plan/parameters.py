"""Parameters of a run by what becomes of them, counted on a model without memory."""

import warnings
from dataclasses import dataclass

import torch

from mocte_ds.bigrams import bigrams_of
from mocte_ds.config import MocteConfig
from mocte_ds.flops.model_sizes import ModelSizes, model_sizes
from mocte_ds.moe.attach import attach
from mocte_ds.training.model import make_model
from mocte_ds.training.run_config import RunConfig
from mocte_ds.zero.cut import cuttable


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights."""

    trunk: int
    """Outside of the blocks; tied ones once."""
    dense: int
    """In the FFNs of the blocks, of which experts are born."""
    blocks: int
    banks: int
    """Banks of experts in each block."""
    experts: int
    """In each bank."""
    expert: int
    """In one expert of one bank."""
    router: int
    """In what the routers of one block learn."""
    keeps_dense: bool
    """Whether the dense FFN runs on beside its experts (`expert.kind: lora`)."""
    per_token: int
    """Experts that a token visits in each block, over all banks."""
    embedding: int = 0
    """Of the trunk, in tables that tokens look rows up in: the input embedding, unless the output matrix shares it, and
    the hashed pairs of `model.bigram`."""
    cut: int = 0
    """Of the trunk, in matrices that tensor parallelism cuts."""

    @property
    def in_experts(self) -> int:
        """In all experts of the model."""
        return self.blocks * self.banks * self.experts * self.expert

    @property
    def total(self) -> int:
        """What there is after emergence: the FFNs that experts replace are not counted."""
        return self.trunk + self.in_experts + self.blocks * self.router + (self.dense if self.keeps_dense else 0)

    @property
    def active(self) -> int:
        """What a token is computed with after emergence."""
        mine = self.blocks * (self.per_token * self.expert + self.router)
        return self.trunk + mine + (self.dense if self.keeps_dense else 0)


def count_parameters(run: RunConfig) -> tuple[Parameters, ModelSizes, MocteConfig | None]:
    """Count the parameters of a run, without memory for any.

    Returns:
        The numbers, the sizes that the FLOPs ledger needs, and the "mocte" block.

    Raises:
        ConfigError: the block does not fit the model.
    """
    block = run.deepspeed.get("mocte")
    config = MocteConfig.from_dict({**block, "ep_size": 1}) if block else None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers', of a name that changes
        model = make_model(run.model, weights=False)
        whole = sum(parameter.numel() for parameter in model.parameters())
        inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
        embedding = 0 if outputs is None or outputs.weight is inputs else inputs.numel()
        bigrams = bigrams_of(model)
        embedding += bigrams.table.weight.numel() if bigrams else 0
        if config is None:
            return Parameters(whole, 0, 0, 0, 0, 0, 0, True, 0, embedding), model_sizes(model), None
        sizes = model_sizes(model)
        blocks = attach(model, config)
    first = blocks[0]
    expert = sum(p.numel() for p in first.banks[0].local_experts[0].parameters())
    dense = sum(p.numel() for block in blocks for p in block.dense.parameters())
    router = sum(p.numel() for bank in first.banks for p in bank.gate.parameters())
    return (
        Parameters(
            trunk=whole - dense,
            dense=dense,
            blocks=len(blocks),
            banks=len(first.banks),
            experts=config.num_experts,
            expert=expert,
            router=router,
            keeps_dense=first.kind == "lora",
            per_token=sum(router.top_k for router in config.routers),
            embedding=embedding,
            cut=cuttable(model, blocks),
        ),
        sizes,
        config,
    )
