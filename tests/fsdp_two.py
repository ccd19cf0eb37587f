"""Two processes of FSDP2: quantized models with adapters, cut in two by fully_shard, and what came of a step of each.

`test_sharding.py` compares it with one process. By itself it prints the comparison, on the CPU or on two GPUs:

    python tests/fsdp_two.py cuda
"""

import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import nf4lab
from nf4lab.layers.stored import Stored4bit

SECONDS = 300  # for two processes: importing torch twice on busy cores takes most of it


class Case(NamedTuple):
    """double_quant: whether the constants are quantized. dtype: of the model. adapters: their dtype. storage: the dtype
    that packed bytes pass under. width: of the layers. mixed: whether fully_shard computes in bfloat16. experts:
    whether a mixture of experts in 4 bits stands between the blocks."""

    double_quant: bool
    dtype: torch.dtype = torch.float32
    adapters: torch.dtype = torch.float32
    storage: torch.dtype = torch.uint8
    width: int = 64
    mixed: bool = False
    experts: bool = False


F32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "float32": Case(False),
    "float32, double quantization": Case(True),
    "bfloat16": Case(False, BF16, BF16),
    "bfloat16, double quantization": Case(True, BF16, BF16),
    "bfloat16, adapters in float32": Case(True, BF16),
    "mixed precision": Case(True, mixed=True),
    "experts": Case(True, experts=True),
    "float32 as storage": Case(False, storage=F32),
    "float32 as storage, cut unevenly": Case(True, storage=F32, width=6),
    "float32 as storage, bfloat16": Case(True, BF16, BF16, storage=F32),
}
if torch.__version__ < "2.12":  # whose fully_shard cuts no uint8, and casts what stands in for it
    CASES.pop("mixed precision")
    CASES = {name: case._replace(storage=F32) for name, case in CASES.items()}


class FusedExperts(nn.Module):
    """Four experts in 4 bits, which each row goes through: one by one, and all at once."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, width, width) / width)

    def forward(self, x):
        """x (n, width) and what the experts add."""
        return x + x @ self.up[1] + torch.einsum("bi,eio->bo", x, self.up)


def model_and_batches(case: Case, device: str):
    """A model of two blocks, quantized, with adapters on both layers of each, and a batch for each of two processes."""
    torch.manual_seed(0)
    k = case.width
    blocks = [nn.Sequential(nn.Linear(k, 2 * k), nn.SiLU(), nn.Linear(2 * k, k)) for _ in range(2)]
    model = nn.Sequential(blocks[0], *([FusedExperts(k)] if case.experts else []), blocks[1]).to(case.dtype)
    nf4lab.quantize_model_(model, double_quant=case.double_quant)
    nf4lab.add_lora_(model, rank=4, dtype=case.adapters)
    for layer in model.modules():
        if isinstance(layer, nf4lab.LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.1)
    batches = torch.randn(2, 8, k).to(device, case.dtype)
    return model.to(device), batches


def in_bfloat16(model):
    """What a mixed-precision policy does to a model that one process has whole: a call of it, in bfloat16."""

    def call(x):
        parameters = {n: p.to(BF16) for n, p in model.named_parameters() if p.is_floating_point()}
        return torch.func.functional_call(model, parameters, x.to(BF16))

    return call


def train(model, trained, batches):
    """Two steps on the mean of the batches' losses; returns what each batch gave, at last without autograd."""
    optimizer, answers = torch.optim.SGD(trained, 0.1), [[] for _ in batches]
    for _ in range(2):
        for x, given in zip(batches, answers, strict=True):
            given.append(model(x))
            given[-1].square().mean().backward()
        for p in trained:
            p.grad /= len(batches)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        last = [model(x[:3]) for x in batches]
    return [torch.cat([*given, y]).detach().cpu() for given, y in zip(answers, last, strict=True)]


def trained(model) -> list[nn.Parameter]:
    """The parameters that a step changes."""
    return [p for p in model.parameters() if p.requires_grad]


def whole(tensor):
    """A tensor, put together where processes have parts of it, on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def in_one(case: Case, device: str) -> dict:
    """What one process has afterwards: what both batches gave, and the state."""
    model, batches = model_and_batches(case, device)
    answers = train(in_bfloat16(model) if case.mixed else model, trained(model), batches)
    return {"answers": answers, "state": {key: whole(value) for key, value in model.state_dict().items()}}


def in_two(case: Case, device: str, rank: int) -> dict:
    """What this one of two processes has: what its batch gave, its bytes, and the state that both have together."""
    model, batches = model_and_batches(case, device)
    packed = sum(layer.packed.nbytes for layer in model.modules() if isinstance(layer, Stored4bit))
    nf4lab.shardable_(model, case.storage)
    mesh = init_device_mesh(device, (2,))
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32) if case.mixed else MixedPrecisionPolicy()
    for part in [*model, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    local = sum(p.to_local().nbytes for name, p in model.named_parameters() if name.endswith("packed"))
    (answers,) = train(model, trained(model), batches[rank : rank + 1])
    state = {key: whole(value) for key, value in model.state_dict().items()}
    found = {"answers": answers, "state": state, "local": local, "packed": packed, "failed": ""}
    try:
        return found | saved_and_loaded(model)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:  # the rest is worth having
        return found | {"failed": f"{type(error).__name__}: {error}"}


def saved_and_loaded(model) -> dict:
    """What torch.distributed.checkpoint has of a sharded model, and what comes back where that is loaded again."""
    parts = get_model_state_dict(model)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    kept = {key: whole(value) for key, value in parts.items()}
    loaded = {}
    for name, state, options in (("parts", parts, {}), ("whole", full, {"full_state_dict": True})):
        state = {key: value.clone() for key, value in state.items()}
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.detach().zero_()
        set_model_state_dict(model, state, options=StateDictOptions(**options))
        loaded[name] = {key: whole(value) for key, value in model.state_dict().items()}
    return {"full": {key: whole(value) for key, value in full.items()}, "kept": kept, "loaded": loaded}


def both(device: str, folder: str) -> list[dict]:
    """What each of two processes has after a step of each case, by the case's name."""
    command = [sys.executable, __file__, device, folder]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, env=one_thread) for rank in (0, 1)]
    try:
        errors = [run.communicate(timeout=SECONDS)[1].decode() for run in runs]
    finally:
        for run in runs:
            run.kill()
    if any(run.returncode for run in runs):
        raise RuntimeError("\n".join(error[-3000:] for error in errors))
    return [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]


def one_of_two(device: str, folder: str, rank: int) -> None:
    """A process of `both`."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    meeting = f"file://{folder}/meeting"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, meeting, timedelta(seconds=SECONDS), rank=rank, world_size=2)
    torch.save({name: in_two(case, device, rank) for name, case in CASES.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main(device: str) -> None:
    """Print, for each case, how far two processes are from one."""
    with tempfile.TemporaryDirectory() as folder:
        found = both(device, folder)
    for name, case in CASES.items():
        one, two = in_one(case, device), [each[name] for each in found]
        far = [(each["answers"] - one["answers"][rank]).abs().max().item() for rank, each in enumerate(two)]
        other = [key for key, value in one["state"].items() if not torch.equal(two[0]["state"][key], value)]
        print(f"{name}: answers differ by {far}; of {len(one['state'])} tensors {other or 'none'} differ; "
              f"packed bytes {[each['local'] for each in two]} of {two[0]['packed']}; "
              f"checkpoint: {two[0]['failed'] or 'saved and loaded'}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else one_of_two(sys.argv[1], sys.argv[2], int(sys.argv[3]))
