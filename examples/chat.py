"""Talk with an exported model, by transformers alone: it goes on where you stop.

From texts of your own (a folder with a file for each kind of text: docs/data.md) to the conversation:

    mocte-ds train_tokenizer my_texts --out runs/mine/tokenizer.model --vocab-size 4096
    mocte-ds prepare_data my_texts --out runs/mine/data --tokenizer runs/mine/tokenizer.model
    mocte-ds pretrain --run quickstart --out runs/mine --set data.prepared=runs/mine/data
    mocte-ds export_hf runs/mine/checkpoints runs/mine/export
    python examples/chat.py runs/mine/export

A model that has only been pre-trained answers nothing: it continues the text, of which the last part is remembered.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer


def main() -> None:
    """Command line; see --help. An empty line begins a new text, the end of the input (Ctrl-D) ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="export of a run (mocte-ds export_hf)")
    parser.add_argument("--tokens", type=int, default=60, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The folder brings the class of a model with experts; look at what you load from others.
    model = AutoModelForCausalLM.from_pretrained(options.folder, trust_remote_code=True).to(device).eval()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 2048)
    if not 0 < options.tokens < context:
        parser.error(f"--tokens must lie between 1 and {context - 1}: the model reads {context} tokens at most")
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature > 0 else {}
    streamer, text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), ""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            text = ""
            continue
        text = f"{text} {line.strip()}".strip()
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        ids = ids[:, -(context - options.tokens) :].to(device)
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=options.tokens, streamer=streamer, **sampling)
        text += tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
