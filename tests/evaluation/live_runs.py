"""Checkpoints to be scored as they are, written by two processes, and what an lm-eval model answers."""

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import runs, tiny

TEXTS = [f"the river moves over stone {n} and light falls on dark water" for n in range(5)]
LLAMA = {"vocab_size": 340, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
GPT2 = {"vocab_size": 340, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 48}
LEARNED = {"kind": "prefix", "weight": "softmax", "learn": True, "top_k": 2}


def write(folder: str, tokenizer: str) -> None:
    """A GPT-2 as a run has it, and a Llama of a script whose routers remember and choose two of four experts."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    import mocte_ds
    from mocte_ds.training import saving
    from mocte_ds.training.model import model_record

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2))
    engine, *_ = mocte_ds.initialize(model=_random(model), config=_config(modules="transformer.h.*.mlp"))
    _emerge(engine)
    saving.save(engine, Path(folder) / "gpt2", "step6", {**model_record(engine.module), "tokenizer": tokenizer})
    torch.manual_seed(0)
    sizes = {**LLAMA, "num_attention_heads": 4, "max_position_embeddings": 48}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2))
    engine, *_ = mocte_ds.initialize(model=_random(model), config=_config(router=LEARNED))
    _emerge(engine)
    engine.save_checkpoint(Path(folder) / "llama", tag="step6")


def _random(model: torch.nn.Module) -> torch.nn.Module:
    """The model with large random weights, so that what it generates depends on the prompt."""
    tiny.randomise(model, 1)
    return model


def _config(**changes: Any) -> dict[str, Any]:
    return {**runs.config(**changes), "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}}}


def _emerge(engine: Any) -> None:
    """Experts in every block, and some steps in which they part."""
    for step in range(2 * runs.STEPS):
        if step == runs.STEPS:
            for block in range(len(engine.mocte.blocks)):
                engine.mocte.emerge(block)
        generator = torch.Generator().manual_seed(10 * step + torch.distributed.get_rank())
        tokens = torch.randint(4, runs.VOCAB, (4, 33), generator=generator)
        output = engine(input_ids=tokens[:, :-1], labels=tokens[:, 1:])
        engine.backward(output.loss)
        engine.step()


def answers(model: Any) -> dict[str, list[Any]]:
    """What a model of lm-eval says to requests of all three kinds."""
    from lm_eval.api.instance import Instance

    def asked(kind: str, arguments: list[tuple]) -> list[Any]:
        return [Instance(kind, {}, given, i, metadata=("t", i, 1)) for i, given in enumerate(arguments)]

    pairs = [(text, f" {word}") for text in TEXTS for word in ("river", "dark water", "stone 3")]
    how = {"until": ["5"], "max_gen_toks": 12, "do_sample": False}
    scored = model.loglikelihood(asked("loglikelihood", [("", TEXTS[0]), *pairs]), disable_tqdm=True)
    generated = model.generate_until(asked("generate_until", [(text, how) for text in TEXTS]), disable_tqdm=True)
    model.add_bos_token = False  # rolling puts the token that begins a text in front itself
    rolling = model.loglikelihood_rolling(asked("loglikelihood_rolling", [(text * 3,) for text in TEXTS]), True)
    found = {"loglikelihood": [value for value, _ in scored], "greedy": [same for _, same in scored]}
    return {**found, "rolling": rolling, "generated": generated}


def live(checkpoint: str, tokenizer: str, ep_size: int | None) -> tuple[dict[str, list[Any]], int]:
    """Answers of a checkpoint, and the numbers that this rank holds as experts."""
    from mocte_ds.evaluation.harness_models import MocteLM

    model = MocteLM(checkpoint, tokenizer=tokenizer, ep_size=ep_size, batch_size=3)
    held = sum(p.numel() for name, p in model.model.named_parameters() if ".experts." in name)
    return answers(model), held
