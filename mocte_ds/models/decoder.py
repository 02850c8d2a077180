"""The decoders that launch/pretrain.py trains: Llama and GPT-2 style, with the numbers of transformers' classes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mocte_ds.errors import ConfigError
from mocte_ds.models.config import DecoderConfig
from mocte_ds.models.layers import Layer, make_norm, rotary_angles

__all__ = ["Decoder", "DecoderConfig"]

# Shapes: B sequences, T tokens, d features, V vocabulary.


class Trunk(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.style == "gpt2":
            self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, number) for number in range(config.num_layers)])
        self.norm = make_norm(config)

    def forward(self, input_ids: Tensor, document_end: int | None = None) -> Tensor:
        x, rotation, document, positions = self.embed_tokens(input_ids), None, None, None
        if document_end is not None:
            document, positions = documents(input_ids, document_end)
        if self.config.style == "llama":
            rotation = rotary_angles(self.config, input_ids.shape[1], x, positions)
        elif positions is None:
            x = x + self.embed_positions.weight[: input_ids.shape[1]]
        else:
            x = x + self.embed_positions(positions)
        recompute = self.config.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                x = checkpoint(layer, x, rotation, document, use_reentrant=False)
            else:
                x = layer(x, rotation, document)
        return self.norm(x)


def documents(input_ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Where the documents of packed sequences are.

    Args:
        input_ids: (B, T) int64.
        end: id of the token that ends a document, and belongs to it.

    Returns:
        Number of each token's document within its sequence, and the token's position in the document; (B, T) int64.
    """
    ends = (input_ids == end).long()
    document = ends.cumsum(dim=1) - ends
    place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = torch.ones_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = ends[:, :-1] > 0
    return document, place - torch.where(begins, place, 0).cummax(dim=1).values


class Decoder(nn.Module):
    """A decoder-only language model; the llama style's parameters are named as in transformers' LlamaForCausalLM."""

    def __init__(self, config: DecoderConfig, document_end: int | None = None) -> None:
        """Random weights: normal with ``initializer_range``, residual outputs times 1/sqrt(2 layers), zero biases.

        Args:
            config: size and style.
            document_end: id of the token that ends a document: then tokens see only their own document, and positions
                count from its start (as in the training of Llama 3; Grattafiori et al., 2024). None: attention goes
                over the borders of packed documents. A sequence that holds one document is computed alike.
        """
        super().__init__()
        self.config, self.document_end = config, document_end
        self.model = Trunk(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
                scale = (2 * config.num_layers) ** -0.5 if residual else 1.0
                nn.init.normal_(parameter, std=config.initializer_range * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the next token.

        Args:
            input_ids: (B, T) int64, T at most max_positions.
            labels: (B, T) the token after each position, -100 where there is none.

        Returns:
            Mean loss in nats a token (scalar) with labels, else logits (B, T, V).

        Raises:
            ConfigError: a sequence longer than max_positions.
        """
        if input_ids.shape[1] > self.config.max_positions:
            raise ConfigError(
                f"a sequence of {input_ids.shape[1]} tokens is longer than model.max_positions = "
                f"{self.config.max_positions}."
            )
        weight = self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight
        logits = F.linear(self.model(input_ids, self.document_end), weight)
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
