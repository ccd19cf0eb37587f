"""Train the book's language model, ten million parameters, on the manuals that benchmarks/manuals.py gathers.

    python benchmarks/train_language_model.py tokens FOLDER          a tokenizer and the text as token numbers
    python benchmarks/train_language_model.py train FOLDER OUT       --seconds 100 on an H200; --steps N anywhere

`tokens` writes FOLDER/tokenizer.json and FOLDER/{train,pages,manual}.npy; `train` reads those and writes to OUT the
weights in bfloat16, config.json, tokenizer.json, and training.json: every loss on the way and what it was made with.
The learning rate falls with the share of the time or of the steps that is spent, so either may be the limit.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY, CONTEXT = 6144, 256
END = "<|end|>"  # between documents
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
PARTS = ("train", "pages", "manual")
ROWS, PEAK, WARM_UP, DECAY = 256, 3e-3, 0.03, 0.1  # rows per step, learning rate, share of the run, weight decay


def texts(folder: Path, part: str) -> list[str]:
    """The documents of one part, without lines of fewer than four words: headings, and lists of names."""
    with open(folder / f"{part}.jsonl") as file:
        pages = [json.loads(line)["text"].split("\n") for line in file]
    prose = ["\n".join(line for line in page if line.count(" ") > 2) for page in pages]
    return [page for page in prose if len(page) >= 500]


def make_tokens(folder: Path) -> None:
    """Train the tokenizer, byte-level BPE, on the training text alone; write every part as token numbers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes: no text has an unknown token
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts(folder, "train"), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    for part in PARTS:
        encoded = tokenizer.encode_batch(texts(folder, part))
        tokens = np.concatenate([np.array([0, *one.ids], dtype=np.uint16) for one in encoded])
        np.save(folder / f"{part}.npy", tokens)
        print(f"{part}: {len(encoded):,} documents, {len(tokens):,} tokens")


def new_model(device: str) -> torch.nn.Module:
    """The model before training: Llama's architecture, the output head tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).to(device)
    model.config.use_cache = False
    for layer in model.model.layers:  # each adds to the residual stream twice: keep its variance at the start
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight.data /= math.sqrt(2 * SHAPE["num_hidden_layers"])
    return model


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats; rows: int64 (n, CONTEXT + 1)."""
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor, rows: int) -> float:
    """The loss on the tokens in windows that lie end to end, `rows` at a time."""
    windows = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1).long()
    losses = [loss_of(model, part).item() * len(part) for part in windows.split(rows)]
    return sum(losses) / len(windows)


def learning_rate(done: float) -> float:
    """At a share of the run: a linear rise, then a cosine to a twentieth of the peak."""
    if done < WARM_UP:
        return PEAK * done / WARM_UP
    return PEAK * (0.525 + 0.475 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def optimizer_of(model: torch.nn.Module, fused: bool) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices and none on the norms."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=fused)


def train(folder: Path, out: Path, seconds: float, steps: int, rows: int, compiled: bool) -> None:
    """Train until `seconds` or `steps` are spent, and write the model and its record to `out`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    tokens = {part: torch.from_numpy(np.load(folder / f"{part}.npy").astype(np.int32)).to(device) for part in PARTS}
    model = new_model(device)
    optimizer = optimizer_of(model, fused=device == "cuda")
    span = torch.arange(CONTEXT + 1, device=device)
    if compiled:
        before = time.monotonic()
        for layer in model.model.layers:
            layer.compile()
        loss_of(model, tokens["train"][: rows * (CONTEXT + 1)].reshape(rows, -1).long()).backward()
        print(f"compiled in {time.monotonic() - before:.0f} s", flush=True)
    record, start, step, done = [], time.monotonic(), 0, 0.0
    while done < 1:
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(done)
        at = torch.randint(len(tokens["train"]) - CONTEXT, (rows, 1), device=device)
        loss = loss_of(model, tokens["train"][at + span].long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0 or step == 1:
            spent = time.monotonic() - start
            record.append({"step": step, "seconds": round(spent, 1), "loss": round(loss.item(), 4)})
            print(record[-1], flush=True)
        done = max((time.monotonic() - start) / seconds, step / steps)
    spent = time.monotonic() - start
    for p in model.parameters():
        p.data = p.data.bfloat16().float()  # what is measured is what is written
    held_out = {part: round(held_out_loss(model, tokens[part], rows), 4) for part in PARTS[1:]}
    whole = tokens["train"][: len(tokens["train"]) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    again = round(held_out_loss(model, whole[:: max(1, len(whole) // 1000)].flatten(), rows), 4)
    save(model, folder, out, {
        "command": f"train_language_model.py train FOLDER OUT --seconds {seconds:g} --steps {steps} --rows {rows}"
        + " --compile" * compiled,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__, "steps": step, "seconds": round(spent, 1),
        "tokens_seen": step * rows * CONTEXT, "tokens_of_text": len(tokens["train"]), "held_out_loss": held_out,
        "loss_on_training_text": again, "on_the_way": record,
    })  # fmt: skip
    print(f"{step} steps, {step * rows * CONTEXT / 1e6:.0f} million tokens in {spent:.0f} s; held out: {held_out}, "
          f"training text: {again}")  # fmt: skip


def save(model: torch.nn.Module, folder: Path, out: Path, record: dict) -> None:
    """The folder that `transformers` loads, in two files of weights, and the record of the training."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True
    model.bfloat16().save_pretrained(out, max_shard_size="15MB")
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokens", "train"))
    parser.add_argument("folder", type=Path, help="where benchmarks/manuals.py has written")
    parser.add_argument("out", type=Path, nargs="?", help="train: where the model goes")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of 256 tokens per step")
    arguments = parser.parse_args()
    if arguments.what == "tokens":
        make_tokens(arguments.folder)
    elif arguments.out is None:
        parser.error("train needs OUT")
    else:
        train(arguments.folder, arguments.out, arguments.seconds, arguments.steps, arguments.rows,
              arguments.compile)  # fmt: skip


if __name__ == "__main__":
    main()
