"""What beats rounding to nearest: two models, eleven methods, judged on text that none of them was calibrated on.

    python benchmarks/beyond.py [--results FILE]      ten minutes of one core

writes results/beyond.json. All at blocks of 64 and 4.5 bits per weight, but for a table a row, whose bits are counted.
Each method twice, in ways that are as good as one another: rotations with another seed, everything else on the mirrored
weights, which uses every code for the other sign. What the two differ by is noise.

encoder         all-MiniLM-L6-v2, calibrated on pages of the manual of Flask; judged as in outputs.py
language model  nf4lab.models.manuals_model, calibrated on held-out pages of manuals; judged on other such pages and on
                Flask's
"""

import argparse
import json
import time
from pathlib import Path

import torch
from outputs import encoder, language_model
from provenance import provenance

import nf4lab
from nf4lab import models
from nf4lab.beyond.learning import learn_format, learn_rows
from nf4lab.beyond.rotation import random_signs, rotate, unrotate
from nf4lab.beyond.scaling import activation_scales

BLOCK = 64
N_CALIBRATION = 64  # pages


def rounded(w, format="nf4", hessian=None):
    return nf4lab.quantize(w, format, BLOCK, hessian=hessian).dequantize()


def rotated(w, seed, format="nf4", hessian=None):
    signs = random_signs(w.shape[1], seed)
    if hessian is not None:
        hessian = rotate(rotate(hessian, signs).T, signs)
        hessian = (hessian + hessian.T) / 2
    return unrotate(rounded(rotate(w, signs), format, hessian), signs)


def scaled(w, hessian):
    scales, _ = activation_scales(w, hessian, rounded)
    return rounded(w * scales) / scales


# name -> what is read back of w with the second moments of its inputs, in the first way and in the second
def mirrored(method):
    return lambda w, h, way: method(w, h) if way == 0 else -method(-w, h)


METHODS = {
    "nearest": mirrored(lambda w, h: rounded(w)),
    "nearest, bof4-s": mirrored(lambda w, h: rounded(w, "bof4-s")),
    "searched": mirrored(lambda w, h: rounded(w, nf4lab.FORMATS["nf4"].searched())),
    "scaled": mirrored(scaled),
    "learned, a table a layer": mirrored(lambda w, h: rounded(w, learn_format(w, BLOCK, h.diagonal()))),
    "learned, a table a row": mirrored(lambda w, h: learn_rows(w, BLOCK, h.diagonal()).dequantize()),
    "corrected": mirrored(lambda w, h: rounded(w, hessian=h)),
    "corrected, bof4-s": mirrored(lambda w, h: rounded(w, "bof4-s", h)),
    "rotated": lambda w, h, way: rotated(w, way),
    "rotated, corrected": lambda w, h, way: rotated(w, way, hessian=h),
    "rotated, corrected, bof4-s": lambda w, h, way: rotated(w, way, "bof4-s", h),
}


def encoder_batches(model):
    """Pages of Flask's manual, of which the judged sentences have none."""
    for text in models.texts("flask")[:N_CALIBRATION]:
        yield dict(model.tokenizer(text, return_tensors="pt", truncation=True, max_length=128))


def language_batches(tokenizer):
    """Held-out pages of manuals that language_model() does not judge: it takes numbers 0 to 3 of each 25."""
    pages = [page for i, page in enumerate(models.texts("manuals")) if i % 25 > 3]
    for text in pages[:N_CALIBRATION]:
        yield torch.tensor([[0, *tokenizer.encode(text).ids][:256]])


def hessians_of(name):
    """The second moments of every judged layer's inputs, by the names of outputs.py."""
    if name == "encoder":
        model = models.sentence_encoder()
        return nf4lab.calibrate(model[0].auto_model, encoder_batches(model), exclude="pooler*")
    model, tokenizer = models.manuals_model()
    return nf4lab.calibrate(model, language_batches(tokenizer), exclude="lm_head")


@torch.no_grad()
def measure(name, layers, judge) -> dict:
    """method -> seconds of processor time, what the model says in both ways, and each layer's error of weights."""
    hessians = hessians_of(name)
    weights = {layer: part.weight.detach().clone() for layer, part in layers.items()}
    table = {}
    for method, make in METHODS.items():
        row = {"seconds": [], "damage": [], "weights": []}
        for way in range(2):
            start = time.process_time()
            made = {layer: make(w, hessians[layer], way) for layer, w in weights.items()}
            row["seconds"].append(time.process_time() - start)
            row["weights"].append(sum(nf4lab.mse(w, made[layer]) * w.numel() for layer, w in weights.items())
                                  / sum(w.square().sum().item() for w in weights.values()))  # fmt: skip
            for layer, part in layers.items():
                part.weight.copy_(made[layer])
            row["damage"].append(judge())
        table[method] = row
        print(name, method, row["weights"], row["damage"], flush=True)
    return {"methods": table, "layers": len(weights), "weights": sum(w.numel() for w in weights.values()),
            "bits_of_row_tables": row_table_bits(weights)}  # fmt: skip


def row_table_bits(weights) -> float:
    """Bits per weight of a table a row, over all layers."""
    bits = sum(w.numel() * learn_rows(w, BLOCK).bits_per_weight for w in weights.values())
    return bits / sum(w.numel() for w in weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "beyond.json")
    results = parser.parse_args().results
    torch.set_num_threads(1)
    record = {"provenance": provenance("benchmarks/beyond.py", ["torch", "numpy", "numba", "transformers"])}
    with torch.no_grad():
        record["encoder"] = measure("encoder", *encoder())
        record["language model"] = measure("language model", *language_model())
    results.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
