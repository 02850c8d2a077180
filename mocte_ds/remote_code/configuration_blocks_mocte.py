"""Config of an exported model of any architecture with MO-CTE blocks; needs transformers alone."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

KINDS = ("token", "online", "type", "pair", "prefix", "document", "previous", "hash", "pair-hash", "random")
WEIGHTS = ("hard", "softmax", "sigmoid", "gain")


class MocteBlocksConfig(PretrainedConfig):
    """The config of the base model, and which of its FFNs are blocks of experts."""

    model_type = "mocte_blocks"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  as transformers has it

    def __init__(
        self,
        text_config: Any = None,
        blocks: list[dict[str, Any]] | None = None,
        dense_ffns: dict[str, int] | None = None,
        document_end_id: int | None = None,
        user_keys: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check and store.

        Args:
            text_config: of the base model, with its `model_type`; a dict or a config. None: Llama's.
            blocks: one for each FFN that is a block: {"module": its path in the base model, "parts" (only where a layer
                calls the FFN's modules itself): names of these in the layer, the first of them at that path, "kind":
                "ffn" (experts instead of the FFN) or "lora" (beside it), "hidden_size": d, "num_experts": E of each
                bank, "expert_sizes": inputs and outputs of the linear layers that differ from the FFN's, by their
                paths, "vocab_size": entries of tables by token ids or None, "banks": one for each bank of experts:
                {"kind": one of KINDS or of `user_keys`, "weight": one of WEIGHTS, "learn": bool, "top_k": experts per
                token, "normalise": whether their weights are divided by their sum, "scale": factor of the weights,
                "unit_mean": whether they are divided by their mean in training, "rows": of tables of hashed pairs,
                "prior": logit of a table in a trained router, "learn_prior": whether it is trained, "groups": of
                experts, or None, "std": of the directions that such a router starts with, or None, "directions" and
                "dropped": of the kind online; and other settings that the key's constructor takes}}.
            dense_ffns: hidden units of the gated FFNs that stand where the base model's class has experts of its own,
                by their paths.
            document_end_id: token that ends a document; routing starts over after it.
            user_keys: files beside the weights that hold routing keys of the user's own, by the kinds.
            **kwargs: fields of every transformers config.

        Raises:
            ValueError: values that no model has.
        """
        if text_config is None or isinstance(text_config, dict):
            values = dict(text_config or {})
            kind = values.pop("model_type", "llama")
            if kind not in CONFIG_MAPPING:
                raise ValueError(f"text_config.model_type = {kind!r} is unknown to this version of transformers.")
            text_config = CONFIG_MAPPING[kind](**values)
        self.text_config = text_config
        self.blocks, self.document_end_id = list(blocks or []), document_end_id
        self.dense_ffns = dict(dense_ffns or {})
        self.user_keys = dict(user_keys or {})
        for block in self.blocks:
            _require_known(block, (*KINDS, *self.user_keys))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            kwargs.setdefault(name, getattr(text_config, name, None))
        kwargs.setdefault("use_cache", getattr(text_config, "use_cache", True))
        super().__init__(**kwargs)

    # What others than transformers look for on the config itself.

    @property
    def vocab_size(self) -> int:
        """V of the base model."""
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """d of the base model."""
        return self.text_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the base model."""
        return self.text_config.num_hidden_layers

    @property
    def max_position_embeddings(self) -> int:
        """Longest context of the base model."""
        return self.text_config.max_position_embeddings


def _require_known(block: dict[str, Any], kinds: tuple[str, ...]) -> None:
    try:
        _require_possible(block, kinds)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a block of the config is damaged ({type(error).__name__}: {error}): {block}") from error


def _require_possible(block: dict[str, Any], kinds: tuple[str, ...]) -> None:
    name = block.get("module")
    if block.get("kind") not in ("ffn", "lora"):
        raise ValueError(f"the block {name} is of the kind {block.get('kind')!r}, not 'ffn' or 'lora'.")
    parts = block.get("parts")
    if parts is not None and (len(set(parts)) < 2 or parts[0] != str(name).rpartition(".")[2]):
        raise ValueError(f"the block {name} has the parts {parts!r}, the first of which is not there.")
    for bank in block["banks"]:
        if bank.get("kind") not in kinds or bank.get("weight") not in WEIGHTS:
            raise ValueError(f"a router of {name} is not one of the kinds {kinds} with a weight of {WEIGHTS}: {bank}.")
        if (bank["learn"] or bank["top_k"] > 1) and bank["weight"] == "hard":
            raise ValueError(f"a router of {name} learns or chooses several, which needs weight 'softmax': {bank}.")
        if bank["kind"] in ("pair", "pair-hash") and not bank["rows"] > 0:
            raise ValueError(f"a router of {name} has a table without rows: {bank}.")
        if bank["weight"] == "gain" and not (bank["learn"] and bank["top_k"] == 1):
            raise ValueError(f"a router of {name} weighs one expert by a factor that it does not learn: {bank}.")
        if not 1 <= bank["top_k"] <= block["num_experts"]:
            raise ValueError(f"a router of {name} cannot choose among {block['num_experts']} experts: {bank}.")
