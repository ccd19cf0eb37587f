"""What rounding does to the outputs of two models, and how far that moves when nothing that matters changes.

    python benchmarks/outputs.py [--only "language model" | --only encoder]      ten minutes of one core

writes nf4lab/models/records/outputs.json. Formats of the league at 4.5 bits per weight, others at their own block size,
and levels fitted to each matrix; each in three ways that are as good as one another:

plain      as the package quantizes
mirrored   minus the weights, quantized, and minus that again: every code is used for the other sign
shifted    the weights moved on by half a block: every block has other neighbours

encoder         all-MiniLM-L6-v2, its 36 linear layers; 1 - cosine of each sentence's vector to the original's, averaged
                over five sets of 20 sentences, four of which share no fragment
language model  nf4lab.models.manuals_model, its 56 linear layers; Kullback-Leibler divergence from the original and the
                loss gained, in nats per token, averaged over groups of pages that it has not learned from
"""

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from provenance import provenance
from torch import nn

import nf4lab
from nf4lab import codebooks, league, models

RECORD = Path(models.__file__).parent / "records" / "outputs.json"  # with the package: pages read it anywhere
WAYS = ("plain", "mirrored", "shifted")
WORLDS = {
    "kitchen": ("A chef|My grandmother|The young baker|A tired father",
                "slices onions for the soup|kneads the bread dough|washes the dishes|burns the pancakes|sets the table",
                "in a small kitchen|early in the morning|while the radio plays"),
    "money": ("The bank|A small company|The finance minister|An investor",
              "reports higher profits|sells government bonds|cuts taxes|warns of a recession|buys shares of a rival",
              "this quarter|after months of losses|despite the protests"),
    "space": ("An astronomer|The research team|A physics student|The space probe",
              "discovers a new planet|photographs the rings of Saturn|loses contact with Earth|studies the moon|"
              "calculates the orbit of a comet", "during the eclipse|with a new telescope|for the first time"),
    "sport": ("The goalkeeper|A marathon runner|The home team|Our coach",
              "wins the final match|misses the decisive penalty|trains in the rain|injures a knee|celebrates",
              "in the last minute|in front of a full stadium|after a long season"),
}  # fmt: skip


def variants() -> dict[str, tuple]:
    """name -> (format, block size); "fitted" has levels made for each matrix, which `quantized` asks for."""
    found = {f"{e.name}, {e.storage}": (e.format, e.block_size) for e in league.entries((4.5,))}
    for name, row in nf4lab.FORMATS.items():
        if not any(
            block_size == row.block_size and name == key.split(",")[0] for key, (_, block_size) in found.items()
        ):
            found[f"{name}, blocks of {row.block_size}"] = (row, row.block_size)
    return found | {"fitted to each matrix": (None, 64)}


def quantized(w: torch.Tensor, format, block_size: int, way: str) -> torch.Tensor:
    """What is read back of a matrix, quantized in one of WAYS."""
    flat = w.reshape(-1)
    if format is None:
        format = replace(nf4lab.FORMATS["bof4-s"], levels=codebooks.fit(w, block_size, signed=True), name="fitted")
    if way == "mirrored":
        flat = -flat
    elif way == "shifted":
        flat = flat.roll(block_size // 2)
    back = nf4lab.quantize(flat, format, block_size).dequantize()
    return (-back if way == "mirrored" else back.roll(-block_size // 2) if way == "shifted" else back).reshape(w.shape)


def sentence_sets() -> dict[str, list[str]]:
    """Four worlds that share no fragment, 20 sentences of each, and the first sentences of 20 pages of manuals."""
    sets = {
        world: [f"{' '.join(parts)}." for parts in itertools.product(*(column.split("|") for column in columns))]
        for world, columns in WORLDS.items()
    }
    first = [page.split("\n")[0].split(". ")[0] for page in models.texts("manuals")]
    sets["manuals"] = [line for line in first if line.count(" ") > 7]
    return {name: one[:60:3] for name, one in sets.items()}


def encoder():
    """Its layers, and a function: the damage to each set of sentences, with what the layers hold now."""
    model = models.sentence_encoder()
    layers = {name: layer for name, layer in model[0].auto_model.named_modules()
              if isinstance(layer, nn.Linear) and "pooler" not in name}  # fmt: skip
    sets = sentence_sets()
    everything = [sentence for one in sets.values() for sentence in one]
    original = model.encode(everything, batch_size=60, convert_to_tensor=True)

    def judge() -> dict[str, float]:
        now = model.encode(everything, batch_size=60, convert_to_tensor=True)
        each = (1 - (now * original).sum(dim=1)).split([len(one) for one in sets.values()])
        return {name: part.mean().item() for name, part in zip(sets, each, strict=True)}

    return layers, judge


def language_model():
    """Its layers, and a function: (divergence, loss gained) on each group of pages, with what the layers hold now.

    The function takes another model with the same tokens, too, and then it is that one's.
    """
    model, tokenizer = models.manuals_model()
    layers = {name: layer for name, layer in model.named_modules()
              if isinstance(layer, nn.Linear) and name != "lm_head"}  # fmt: skip
    pages = [[0, *tokenizer.encode(text).ids][:256] for name in ("manuals", "flask") for text in models.texts(name)]
    n_manuals = len(models.texts("manuals"))
    groups = {f"pages {i}": torch.tensor(pages[i:n_manuals:25][:6]) for i in range(4)}
    groups["flask"] = torch.tensor([page for page in pages[n_manuals:] if len(page) == 256][:6])

    def log_p(ids, of):
        return of(ids, use_cache=False).logits[:, :-1].log_softmax(dim=-1)

    original = {name: log_p(ids, model) for name, ids in groups.items()}

    def judge(of=model) -> dict[str, tuple[float, float]]:
        found = {}
        for name, ids in groups.items():
            difference = original[name] - log_p(ids, of)
            kl = (original[name].exp() * difference).sum(dim=-1).mean().item()
            found[name] = kl, difference.gather(-1, ids[:, 1:, None]).mean().item()
        return found

    return layers, judge


def measure(layers: dict[str, nn.Linear], judge, names: list[str]) -> dict:
    """variant -> bits, error and power of the weights, and for each of WAYS what the outputs say."""
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    numel = sum(w.numel() for w in weights.values())
    table = {}
    for name in names:
        format, block_size = variants()[name]
        row = {"block_size": block_size, "ways": {}}
        for way in WAYS:
            squares, decibels = 0.0, []
            for key, w in weights.items():
                back = quantized(w, format, block_size, way)
                layers[key].weight.copy_(back)
                squares += (back - w).square().sum().item()
                decibels.append(nf4lab.sqnr_db(w, back))
            row["ways"][way] = {"mse": squares / numel, "sqnr_db": float(np.mean(decibels)), "outputs": judge()}
        table[name] = row
        print(name, {way: f"{one['mse']:.4g}" for way, one in row["ways"].items()}, row["ways"]["plain"]["outputs"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RECORD)
    parser.add_argument("--only", choices=("language model", "encoder"), help="leave the other as it is in the file")
    parser.add_argument("--variants", nargs="+", default=list(variants()), help="these formats, beside what is there")
    arguments = parser.parse_args()
    path = arguments.results
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name, model in (("language model", language_model), ("encoder", encoder)):
        if arguments.only in (None, name):
            table = measure(*model(), arguments.variants)
            record = json.loads(path.read_text()) if path.exists() else {}
            record |= provenance("benchmarks/outputs.py", ["torch", "transformers", "sentence-transformers"])
            path.write_text(json.dumps(record | {name: record.get(name, {}) | table}) + "\n")


if __name__ == "__main__":
    main()
