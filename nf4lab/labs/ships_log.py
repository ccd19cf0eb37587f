"""A ship's log that never was, for lab 5: its text by a seed, its tokens in batches, and a model's loss on them."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDS = ["north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"]
CREW = ["captain", "mate", "cook", "boy", "surgeon", "carpenter", "gunner", "pilot"]
DEEDS = ["slept", "fell ill", "saw a sail", "was silent", "sang", "mended a sail", "found no water", "wrote home"]


def ships_log(seed: int, n: int) -> str:
    """n entries of a ship's log, one a line; the seed draws half of the winds, the crew and their deeds."""
    rng = random.Random(seed)
    winds, crew, deeds = (rng.sample(words, len(words) // 2) for words in (WINDS, CREW, DEEDS))
    entries = (
        f"Day {day}. Wind {rng.choice(winds)}, {rng.randint(10, 90)} miles. The {rng.choice(crew)} {rng.choice(deeds)}."
        for day in range(1, n + 1)
    )
    return "\n".join(entries)


def batches(tokenizer, text: str, rows: int = 8, length: int = 32) -> Tensor:
    """The text's tokens in order: int64 (n_batches, rows, length + 1). What does not fill a batch is left out."""
    ids = torch.tensor(tokenizer.encode(text))
    size = rows * (length + 1)
    return ids[: len(ids) // size * size].reshape(-1, rows, length + 1)


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor) -> float:
    """Mean cross-entropy of the next token over data (n, rows, length + 1), in nats."""
    losses = [F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()) for ids in data]
    return torch.stack(losses).mean().item()
