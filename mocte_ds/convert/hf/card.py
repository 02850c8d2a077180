"""The model card of an exported folder: what it is, how it was trained, how to load it, what was compared."""

from typing import Any

_LOAD = """```python
from transformers import AutoModelForCausalLM{and_tokenizer}

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
{tokenizer}```"""
_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'


def model_card(state: dict[str, Any], facts: dict[str, Any]) -> str:
    """Text of README.md.

    Args:
        state: of the checkpoint, as of :class:`mocte_ds.checkpoints.source.Source`.
        facts: of the export.
    """
    own = facts["architecture"].startswith("Mocte")
    trust = ", trust_remote_code=True" if own else ""
    with_tokenizer = facts.get("tokenizer", True)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        "# Model exported by mocte-ds",
        "",
        "Pre-trained with MO-CTE (cluster-oriented, trainability-aware experts); stored as "
        f"{facts['architecture']}.{' The code of this class lies beside the weights.' if own else ''}",
        "",
        _LOAD.format(
            trust=trust,
            and_tokenizer=", AutoTokenizer" if with_tokenizer else "",
            tokenizer=_TOKENIZER if with_tokenizer else "",
        ),
        "",
        f"- parameters: {facts['parameters']:,}",
        f"- trained tokens: {state['tokens']:,} ({state['step']} steps)",
    ]
    lines.append(f"- base model: {state['base']['architecture']} (model_type {state['base']['model_type']})")
    for block in state["blocks"]:
        frozen = sum(mode == "frozen" for mode in block["experts"])
        lines.append(f"- {block['name']}: {block['mode']}, {len(block['experts'])} experts, {frozen} frozen")
    if state["mocte"]:
        lines.append(f"- routers: {_routers(state['mocte'])}")
    if facts["reason"]:
        lines.append(f"- no stock class: {facts['reason']}")
    lines.append(f"- largest difference of logits from the checkpoint's, relative: {facts['logit_difference']:.1e}")
    lines.append(f"- compared: {facts['tensors_compared']} tensors, {facts['experts_compared']} experts among them")
    return "\n".join(lines) + "\n"


def _routers(settings: dict[str, Any]) -> str:
    found = []
    for router in settings.get("banks") or [settings["router"]]:
        learned = ", learned" if router["learn"] else ""
        found.append(f"{router['kind']} (weight {router['weight']}{learned})")
    return " + ".join(found)
