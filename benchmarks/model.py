"""Measure a whole model, and one layer of it, in 16 bits, in bitsandbytes' 4 bits and in nf4lab's, in one run.

    python benchmarks/model.py                                  the shape of Llama-3-8B on a GPU, about five minutes
    python benchmarks/model.py --device cpu --layers 2 --width 256 --vocabulary 512 --tokens 32 128

Weights are random: speed and memory do not depend on their values. The three take turns, sample by sample, so that what
disturbs one disturbs all: compare within a record. Times are those of a user's clock, from an idle GPU to an idle GPU,
except "host", which is what a call costs the host while the GPU works on. Written to results/<device>-model.json,
and with --only to results/<device>-model-<parts>.json.
"""

import argparse
import gc
import json
import pathlib
import statistics
import time

import numpy as np

if not hasattr(np, "row_stack"):
    np.row_stack = np.vstack  # noqa: NPY201 - numba-cuda 0.30 asks for it, NumPy 2.5 has it no more

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from provenance import provenance
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import nf4lab

KINDS = ("bfloat16", "bitsandbytes", "nf4lab")
records = []


# --- measuring


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(calls, rounds, device, *, repeats=1, warmup=1, idle=True):
    """Seconds of each call, {name: samples}, the names taking turns. idle: wait for the GPU within the time."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    samples = {name: [] for name in calls}
    gc.collect()
    gc.disable()  # as timeit does: whose turn it is when garbage is looked for would be chance
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            if idle:
                synchronize(device)
            samples[name].append((time.perf_counter() - start) / repeats)
    synchronize(device)
    gc.enable()
    return samples


KERNELS = {  # what a kernel does, by what stands in its name; the first that fits
    "dequantize": ("dequantize",),
    "multiply": ("gemm", "gemv", "nvjet", "cutlass", "splitk", "few_rows", "warpgroup"),
    "attention": ("flash", "fmha", "attention"),
}


def record_gpu_time(operation, calls, **details):
    """What the GPU itself works on one call, in ms, by kind of kernel, and how many kernels it is."""
    for by, call in calls.items():
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            call()
            torch.cuda.synchronize()
        events = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA and "#" not in e.name]
        spent = dict.fromkeys([*KERNELS, "the rest"], 0.0)
        for event in events:
            name = event.name.lower()
            kind = next((kind for kind, words in KERNELS.items() if any(w in name for w in words)), "the rest")
            spent[kind] += event.device_time / 1e3
        records.append({"operation": f"GPU time of a {operation}", "by": by, **details, "unit": "ms",
                        "median": sum(spent.values()), "kernels": len(events), "of": spent})  # fmt: skip
        print(f"GPU time of a {operation} {details} {by}: {sum(spent.values()):.2f} ms, {len(events)} kernels,",
              {kind: round(ms, 2) for kind, ms in spent.items()}, flush=True)  # fmt: skip


def record(operation, unit, samples, **details):
    """Append one line for each name of samples, and print them beside each other."""
    for by, values in samples.items():
        median = statistics.median(values)
        spread = {"least": min(values), "greatest": max(values)}
        records.append({"operation": operation, "by": by, **details, "unit": unit, "median": median, **spread,
                        "samples": values})  # fmt: skip
    what = " ".join([operation, *(f"{key} {value}" for key, value in details.items())])
    line = "  ".join(f"{by} {statistics.median(values):.4g}" for by, values in samples.items())
    print(f"{what:52s} {line} {unit}", flush=True)


def scaled(samples, factor):
    return {name: [factor * value for value in values] for name, values in samples.items()}


def measure_ceilings(args):
    """What this device does at best of the two things that a budget by hand divides by."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    samples = alternate({"torch": lambda: target.copy_(source)}, args.rounds, "cuda", repeats=5)
    record("copy", "TB/s", {"torch": [2e-12 * source.nbytes / seconds for seconds in samples["torch"]]})
    x, w = (torch.randn(n, 4096, device="cuda", dtype=torch.bfloat16) for n in (4096, 14336))
    samples = alternate({"torch": lambda: nn.functional.linear(x, w)}, args.rounds, "cuda", repeats=5)
    rates = [2e-12 * len(x) * w.numel() / seconds for seconds in samples["torch"]]
    record("multiply", "TFLOP/s", {"torch": rates}, rows=len(x), shape=f"{len(w)}x4096")


# --- one layer


def bitsandbytes_layer(linear, double_quant=True):
    """bitsandbytes' layer with this layer's weight, made without first filling another one with random numbers."""
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, False, linear.weight.dtype, double_quant, "nf4"
        )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double_quant
    )
    return layer.to(linear.weight.device)


def measure_host(args, dtype):
    """What a call of a small layer costs the host: there is nothing to compute, so that only the way there counts."""
    linear = nn.Linear(256, 256, bias=False, device=args.device, dtype=dtype)
    layers = {"torch": linear, "bitsandbytes": bitsandbytes_layer(linear),
              "nf4lab": nf4lab.Linear4bit.from_linear(linear, double_quant=True)}  # fmt: skip
    repeats = 200 if args.device == "cuda" else 20
    for rows in (1, 4, 64):
        x = torch.randn(rows, 256, device=args.device, dtype=dtype)
        with_grad, grad = x.clone().requires_grad_(), torch.randn_like(x)
        passes = {
            "no_grad": lambda layer, x=x: layer(x),
            "forward": lambda layer, x=with_grad: layer(x),
            "forward and backward": lambda layer, x=with_grad, grad=grad: layer(x).backward(grad),
        }
        for name, run in passes.items():
            with torch.set_grad_enabled(name != "no_grad"):
                calls = {by: lambda layer=layer, run=run: run(layer) for by, layer in layers.items()}
                samples = alternate(calls, args.rounds, args.device, repeats=repeats, warmup=20, idle=False)
            record("host", "us", scaled(samples, 1e6), rows=rows, what=name)


def measure_layer(args, dtype):
    """One layer as a user calls it on an idle machine: for processors, where there is no host to hide."""
    for width in (256, 4096):
        linear = nn.Linear(width, width, bias=False, device=args.device, dtype=dtype)
        layers = {"torch": linear, "bitsandbytes": bitsandbytes_layer(linear, False),
                  "nf4lab": nf4lab.Linear4bit.from_linear(linear),
                  "nf4lab nested": nf4lab.Linear4bit.from_linear(linear, double_quant=True)}  # fmt: skip
        for rows in (1, 64):
            x = torch.randn(rows, width, device=args.device, dtype=dtype)
            calls = {by: lambda layer=layer, x=x: layer(x) for by, layer in layers.items()}
            with torch.no_grad():
                samples = alternate(calls, args.rounds, args.device, repeats=50 if width == 256 else 1, warmup=3)
            record("layer", "us", scaled(samples, 1e6), rows=rows, width=width, dtype=str(dtype).removeprefix("torch."))


# --- a model


def build(args, layers):
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=args.width * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=args.width // 128, num_key_value_heads=max(1, args.width // 512),
        vocab_size=args.vocabulary, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    return model.eval()


def convert(model, kind):
    """The linear layers of the blocks in 4 bits, double-quantized; the head stays as it is, as is usual."""
    if kind == "nf4lab":
        nf4lab.quantize_model_(model, "nf4", double_quant=True, exclude="lm_head", progress=False)
    if kind == "bitsandbytes":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, bitsandbytes_layer(layer))
    return model


def held(args):
    gc.collect()
    if args.device != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def build_all(args, layers):
    """{kind: model}, all on the device; how long each took to convert, and the memory that it then holds."""
    models = {}
    for kind in KINDS:
        before = held(args)
        model = build(args, layers)
        synchronize(args.device)
        start = time.perf_counter()
        convert(model, kind)
        synchronize(args.device)
        seconds = time.perf_counter() - start
        models[kind] = model
        if layers == args.layers:
            record("convert", "s", {kind: [seconds]})
            record("model at rest", "GiB", {kind: [(held(args) - before) / 2**30]})
    return models


def block_layers(model):
    """The linear layers of the blocks: those that 4 bits are about."""
    return [layer for name, layer in model.model.named_modules() if name.endswith("_proj")]


def static_step(model, args):
    """A decoding step over a cache of fixed size: a function of no arguments, always the same work."""
    cache = StaticCache(config=model.config, max_cache_len=256)
    ids = torch.randint(0, args.vocabulary, (1, 32), device=args.device)
    token, place = torch.zeros(1, 1, dtype=torch.long, device=args.device), torch.tensor([40], device=args.device)

    def step(token, place):
        return model(token, past_key_values=cache, use_cache=True, cache_position=place, position_ids=place[None])

    model(ids, past_key_values=cache, use_cache=True, cache_position=torch.arange(32, device=args.device))
    return step, (token, place)


def graph_of(call):
    """A CUDA graph of one call, after it has run on another stream."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_alone(models, args, layers):
    """The linear layers of a decoding step and nothing else, one after the other in a CUDA graph."""
    calls = {}
    for kind, model in models.items():
        found = block_layers(model)
        widths = {layer.in_features for layer in found}
        inputs = {k: torch.randn(1, 1, k, device="cuda", dtype=torch.bfloat16) for k in widths}
        calls[kind] = graph_of(lambda found=found, inputs=inputs: [x(inputs[x.in_features]) for x in found])
    samples = alternate(calls, 2 * args.rounds, "cuda", warmup=3)
    record("linear layers of it alone, graph", "ms", scaled(samples, 1e3), layers=layers)


@torch.no_grad()
def measure_decode(models, args):
    steps = {}
    for kind, model in models.items():
        step, arguments = static_step(model, args)
        steps[kind] = lambda step=step, arguments=arguments: step(*arguments)
    record("decode step, eager", "ms", scaled(alternate(steps, args.rounds, args.device, warmup=3), 1e3))
    if args.device == "cuda":
        graphs = {kind: graph_of(step) for kind, step in steps.items()}
        record("decode step, graph", "ms", scaled(alternate(graphs, 2 * args.rounds, args.device, warmup=3), 1e3))
        measure_alone(models, args, args.layers)
        record_gpu_time("decode step", steps)
    ids = torch.randint(0, args.vocabulary, (1, 32), device=args.device)
    settings = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    for count in (4, args.new_tokens):  # the first time only warms up
        calls = {
            kind: lambda model=model, count=count: model.generate(
                ids, max_new_tokens=count, min_new_tokens=count, **settings
            )
            for kind, model in models.items()
        }
        samples = alternate(calls, 1 if count == 4 else 3, args.device, warmup=0)
    rates = {kind: [args.new_tokens / seconds for seconds in values] for kind, values in samples.items()}
    record("generate", "tokens/s", rates, tokens=args.new_tokens)
    ids = torch.randint(0, args.vocabulary, (1, args.prefill), device=args.device)
    calls = {kind: lambda model=model: model(ids, use_cache=False, logits_to_keep=1) for kind, model in models.items()}
    record("prefill", "ms", scaled(alternate(calls, args.rounds, args.device), 1e3), tokens=args.prefill)


@torch.no_grad()
def measure_compiled(args):
    """One decoding step under torch.compile, launched as a CUDA graph; of a few layers, since compiling takes long."""
    models, calls = build_all(args, args.compiled_layers), {}
    for kind, model in models.items():
        step, arguments = static_step(model, args)
        mode = "reduce-overhead" if args.device == "cuda" else "default"
        compiled = torch.compile(lambda *given, step=step: step(*given).logits, mode=mode, fullgraph=True)
        start = time.perf_counter()
        for _ in range(3):
            compiled(*arguments)
        synchronize(args.device)
        record("compile", "s", {kind: [time.perf_counter() - start]}, layers=args.compiled_layers)
        calls[kind] = lambda compiled=compiled, arguments=arguments: compiled(*arguments)
    samples = alternate(calls, 4 * args.rounds, args.device, warmup=5)
    record("decode step, compiled", "ms", scaled(samples, 1e3), layers=args.compiled_layers)
    if args.device == "cuda":
        measure_alone(models, args, args.compiled_layers)


def training_step(model, kind, args):
    """(a function of token ids that makes a step, the model that it trains): rank 16 on every layer of the blocks."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if kind == "nf4lab":
        parameters = nf4lab.add_lora_(model, rank=16, alpha=32, exclude="lm_head")
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)
        model = get_peft_model(model, settings)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(ids):
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(parameter.numel() for parameter in parameters)


def measure_training(models, args):
    steps, at_rest = {}, {}
    ids = torch.randint(0, args.vocabulary, (1, 16), device=args.device)
    for kind, model in models.items():
        before = held(args)
        steps[kind], count = training_step(model, kind, args)
        steps[kind](ids)  # the optimizer's state is made now
        at_rest[kind] = held(args) - before
        record("trainable parameters", "", {kind: [count]})
    for tokens in args.tokens:
        ids = torch.randint(0, args.vocabulary, (1, tokens), device=args.device)
        calls = {kind: lambda step=step: step(ids) for kind, step in steps.items()}
        rounds = args.rounds if tokens < 4096 else 3
        record("LoRA step", "ms", scaled(alternate(calls, rounds, args.device), 1e3), tokens=tokens)
        if args.device == "cuda" and tokens == sorted(args.tokens)[len(args.tokens) // 2]:
            record_gpu_time("LoRA step", calls, tokens=tokens)
        if args.device == "cuda":
            for kind, call in calls.items():
                before = held(args)
                torch.cuda.reset_peak_memory_stats()
                call()
                own = models_at_rest(kind) + at_rest[kind] / 2**30
                peak = (torch.cuda.max_memory_allocated() - before) / 2**30
                record("peak memory of it", "GiB", {kind: [own + peak]}, tokens=tokens)


def models_at_rest(kind):
    return next(r["median"] for r in records if (r["operation"], r["by"]) == ("model at rest", kind))


def write(path, args):
    words = {name.replace("_", " "): value for name, value in vars(args).items() if name != "results"}
    packages = ["torch", "numpy", "numba", "bitsandbytes", "transformers", "peft"]
    result = provenance("benchmarks/model.py", packages) | {"arguments": words, "records": records}
    path.write_text(json.dumps(result, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--compiled-layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="of a training step")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=["host", "layer", "decode", "compiled", "training"])
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    args = parser.parse_args()
    parts = args.only or (["host", "decode", "training", "compiled"] if args.device == "cuda" else ["layer"])
    torch.manual_seed(0)
    args.results.mkdir(exist_ok=True)
    name = torch.cuda.get_device_name().replace(" ", "-").lower() if args.device == "cuda" else "cpu"
    path = args.results / f"{'-'.join([name, 'model', *(args.only or [])])}.json"
    if args.device == "cuda":
        measure_ceilings(args)
    if "host" in parts:
        measure_host(args, torch.bfloat16)
    if "layer" in parts:
        for dtype in (torch.float32, torch.bfloat16):
            measure_layer(args, dtype)
    write(path, args)
    if "decode" in parts or "training" in parts:
        models = build_all(args, args.layers)
        for part, measure in (("decode", measure_decode), ("training", measure_training)):
            if part in parts:
                measure(models, args)
                write(path, args)
        del models
        held(args)
    if "compiled" in parts:
        measure_compiled(args)
        write(path, args)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
