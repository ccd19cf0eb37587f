"""A language model of ten million parameters that comes with the package, and the texts that chapters ask it about.

It has learned from manuals (the page on it, book/language-model.md, says which, and what it cannot do), by
`benchmarks/train_language_model.py`. Its folder is one that `transformers` loads: architecture Llama, bfloat16.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nf4lab.models.pretrained import quietly

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

FOLDER = Path(__file__).parent / "manuals-10m"
TEXTS = Path(__file__).parent / "texts"
RECORDS = Path(__file__).parent / "records"


def manuals_model(dtype: torch.dtype = torch.float32) -> tuple["LlamaForCausalLM", "Tokenizer"]:
    """The model, ready to predict, and its tokenizer: 8 blocks, 256 wide, 6,144 tokens, at most 256 positions.

    Token ids, int64 (batch, positions), to logits: model(ids).logits, (batch, positions, 6144). Its 56 linear layers
    are `torch.nn.Linear`; the output head is the embedding. tokenizer.encode(text).ids gives a list of ids,
    tokenizer.decode(ids) the text; any text can be encoded, for each byte is a token.

    Raises ModuleNotFoundError where transformers is not installed.
    """
    with quietly():
        from tokenizers import Tokenizer
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(FOLDER, dtype=dtype, local_files_only=True)
    return model.eval(), Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def texts(name: str) -> list[str]:
    """The documents of one of six texts that come with the package.

    "manuals": a page each, held out of manuals that the model has learned from. "flask": pages of a manual of which it
    has seen none. "novels-to-learn", "novels-held-out": beginnings of four and of two other novels by Jane Austen.
    "python": docstrings of 80 of Python's modules; "python-code": the ends of twenty of them.
    Raises ValueError for another name. Source and licence of each: texts/README.md in the package.
    """
    path = TEXTS / f"{name}.jsonl"
    if not path.is_file():
        raise ValueError(f"name must be one of {sorted(file.stem for file in TEXTS.glob('*.jsonl'))}; got {name!r}")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def record(name: str) -> dict:
    """What a long measurement has found, with the command, date and versions that it was made with.

    "outputs": benchmarks/outputs.py. "beyond": benchmarks/beyond.py. "starts": benchmarks/starts.py.
    "fine-tune-two-cores": benchmarks/fine_tune.py. Raises ValueError for another.
    """
    path = RECORDS / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"name must be one of {sorted(file.stem for file in RECORDS.glob('*.json'))}; got {name!r}")
    return json.loads(path.read_text(encoding="utf-8"))
