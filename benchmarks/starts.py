"""Adapters that start at zero, where the error is (LoftQ), or at the weights' largest part (PiSSA), seed by seed.

    python benchmarks/starts.py [--seeds 3] [--steps 32] [--results FILE]      a quarter of an hour of one core

writes nf4lab/models/records/starts.json, anew after every run. Model, texts and learning rate are chapter 10's
(benchmarks/fine_tune.py); the bases are NF4 and, for an error that a start can take something of, four levels made by
the same rule. Every seed decides what is random in the adapters and the order of the text, the same for all starts.
What a base rounds is dequantized once and stays.
"""

import argparse
import copy
import itertools
import json
from pathlib import Path

import torch
from fine_tune import RECORDS, ROWS, held_out, losses, windows
from provenance import provenance

import nf4lab
from nf4lab import codebooks, models

RANK, ALPHA, RATE, HELD_OUT, EVERY = 8, 16.0, 0.002, 32, 4
STARTS = ("zero", "loftq", "pissa")
BASES = {"nf4": nf4lab.FORMATS["nf4"], "2 bits": nf4lab.Format("2 bits", codebooks.nf2())}


def started(model, format, start: str):
    """A copy of the model on a quantized base, with adapters on it that alone can be trained."""
    model = copy.deepcopy(model)
    originals = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nf4lab.quantize_model_(model, format, exclude="lm_head")
    nf4lab.add_lora_(model, RANK, ALPHA, exclude="lm_head", init=start, originals=originals)
    for layer in model.modules():
        if isinstance(layer, nf4lab.LoRALinear):
            layer.base = layer.base.to_linear(torch.float32).requires_grad_(False)
    return model


@torch.no_grad()
def error(model, original) -> float:
    """The squared error of base plus adapter over all adapted layers, as a share of the weights' squares."""
    squares = power = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, nf4lab.LoRALinear):
            w = original.get_submodule(name).weight
            made = layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A
            squares, power = squares + (made - w).square().sum().item(), power + w.square().sum().item()
    return squares / power


def train(model, seed: int, steps: int, rows, test, of_words) -> list[tuple[float, float]]:
    """Held-out losses, of all tokens and of words, before training and after every 4 steps."""
    order = torch.randint(len(rows), (steps, ROWS), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    on_the_way = [held_out(model, test, of_words)]
    for step in range(steps):
        loss = losses(model, rows[order[step]]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            on_the_way.append(held_out(model, test, of_words))
    return on_the_way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--results", type=Path, default=RECORDS / "starts.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    original, tokenizer = models.manuals_model()
    rows = windows(tokenizer, models.texts("novels-to-learn"))
    test = windows(tokenizer, models.texts("novels-held-out"))
    test = test[torch.linspace(0, len(test) - 1, HELD_OUT).long()]
    tokens = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
    of_words = torch.tensor([any(c.isalpha() for c in token) for token in tokens])[test]
    record = provenance("benchmarks/starts.py", ["torch", "transformers"]) | {
        "rank": RANK, "alpha": ALPHA, "rate": RATE, "rows": ROWS, "every": EVERY,
        "original": held_out(original, test, of_words),
        "error": {}, "runs": {base: {start: [] for start in STARTS} for base in BASES},
    }  # fmt: skip
    made = {}
    for seed, base, start in itertools.product(range(arguments.seeds), BASES, STARTS):
        torch.manual_seed(seed)
        if start == "zero" or (base, start) not in made:  # nothing of the others is random
            made[base, start] = started(original, BASES[base], start)
        record["error"][f"{base}, {start}"] = error(made[base, start], original)
        run = train(copy.deepcopy(made[base, start]), seed, arguments.steps, rows, test, of_words)
        record["runs"][base][start].append(run)
        print(seed, base, start, record["error"][f"{base}, {start}"], run, flush=True)
        arguments.results.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
