"""The long runs of chapter 10: adapters on four frozen bases, seed by seed.

    python benchmarks/fine_tune.py NAME [--seeds 3] [--steps 16] [--rate 0.002]

writes nf4lab/models/records/fine-tune-NAME.json, anew after every seed; a seed takes a minute of one core. Base model
and text are the package's. What a base rounds is dequantized once and stays: the layers multiply by the same numbers
as Linear4bit's. Without --rate the learning rate is chosen first, on the base of 16 bits alone and with a seed of its
own. Every seed decides the start of the adapters and the order of the text, the same for all bases.
"""

import argparse
import copy
import datetime
import json
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

import nf4lab
from nf4lab import models

BASES = ("16 bits", "nf4", "fp4", "int4")
ROWS, LENGTH, EVERY, HELD_OUT = 8, 128, 16, 32
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
RECORDS = Path(models.__file__).parent / "records"  # with the package: the chapter reads them anywhere


def windows(tokenizer, texts: list[str]) -> torch.Tensor:
    """The tokens of each text in rows of 128, int64 (n, 128); what is left at a text's end is dropped."""
    rows = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text).ids)
        rows.append(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))
    return torch.cat(rows)


def on_base(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """A copy of the model whose linear layers hold what that format makes of them."""
    model = copy.deepcopy(model)
    if name != "16 bits":
        for layer_name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and layer_name != "lm_head":
                q = nf4lab.quantize(layer.weight.data, name, double_quant=True, backend="torch")
                layer.weight.data = q.dequantize(torch.float32)
    return model


def losses(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token but the first of each row, in nats: (n, 127)."""
    logits = model(input_ids=rows, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")


@torch.no_grad()
def held_out(model: torch.nn.Module, rows: torch.Tensor, of_words: torch.Tensor) -> tuple[float, float]:
    """The mean loss over all tokens, and over those that are words or parts of words."""
    each = torch.cat([losses(model, part) for part in rows.split(32)])
    return round(each.mean().item(), 5), round(each[of_words[:, 1:]].mean().item(), 5)


def fine_tune(base, seed: int, rate: float, steps: int, train, test, of_words) -> dict:
    """Losses of one run: of each training step, and held out before it and after every 16th."""
    device = train.device
    torch.manual_seed(seed)
    tuned = copy.deepcopy(base).cpu()
    adapters = nf4lab.add_lora_(tuned, rank=8, alpha=16.0, exclude="lm_head")
    order = torch.randint(len(train), (steps, ROWS))
    tuned.to(device)
    optimizer = torch.optim.AdamW(adapters, lr=rate)
    of_steps, on_the_way = [], [held_out(tuned, test, of_words)]
    for step in range(steps):
        loss = losses(tuned, train[order[step].to(device)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        of_steps.append(loss.detach())
        if (step + 1) % EVERY == 0:
            on_the_way.append(held_out(tuned, test, of_words))
    return {"training": [round(loss, 5) for loss in torch.stack(of_steps).tolist()], "held_out": on_the_way}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the machine, for the file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rate", type=float, help="learning rate; else the best of a few for the base of 16 bits")
    parser.add_argument("--out", type=Path, default=RECORDS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = models.manuals_model()
    train = windows(tokenizer, models.texts("novels-to-learn")).to(device)
    test = windows(tokenizer, models.texts("novels-held-out"))
    test = test[torch.linspace(0, len(test) - 1, min(HELD_OUT, len(test))).long()].to(device)
    tokens = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
    of_words = torch.tensor([any(c.isalpha() for c in token) for token in tokens], device=device)[test]
    start = time.monotonic()
    bases = {name: on_base(model, name) for name in BASES}
    by_rate = {}
    for rate in () if arguments.rate else RATES:
        run = fine_tune(bases["16 bits"], 1000, rate, arguments.steps, train, test, of_words)
        by_rate[rate] = run["held_out"][-1][0]
    rate = arguments.rate or min(by_rate, key=by_rate.get)
    print(f"learning rate {rate}; held-out losses {by_rate}")
    record = {
        "command": f"python benchmarks/fine_tune.py {arguments.name} --steps {arguments.steps} --rate {rate}",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__, "transformers": transformers.__version__, "nf4lab": nf4lab.__version__,
        "rank": 8, "alpha": 16.0, "rows": ROWS, "length": LENGTH, "steps": arguments.steps, "every": EVERY,
        "held_out_rows": len(test), "held_out_loss_by_rate": by_rate, "rate": rate,
        "tokens_learned_from": train.numel(),
        "held_out": "pairs: mean loss over all tokens, over tokens with a letter; in nats",
        "runs": {name: [] for name in BASES},
    }  # fmt: skip
    for seed in range(arguments.seeds):
        for name, base in bases.items():
            record["runs"][name].append(fine_tune(base, seed, rate, arguments.steps, train, test, of_words))
        (arguments.out / f"fine-tune-{arguments.name}.json").write_text(json.dumps(record) + "\n")
        final = {name: of[-1]["held_out"][-1][1] for name, of in record["runs"].items()}
        print(f"seed {seed}, {time.monotonic() - start:.0f} s: loss on words {final}", flush=True)


if __name__ == "__main__":
    main()
