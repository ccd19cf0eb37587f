"""Two processes of `test_sharding.py`: a quantized model with adapters under fully_shard, and what came of it."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import nf4lab


def model_and_data():
    """A model of two blocks, quantized, with adapters on both layers of each, and a batch for each of two processes."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64)) for _ in range(2)]
    model = nn.Sequential(*blocks)
    nf4lab.quantize_model_(model, double_quant=True)
    nf4lab.add_lora_(model, rank=4)
    for layer in model.modules():
        if isinstance(layer, nf4lab.LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.1)
    return model, torch.randn(2, 8, 64)


def step(model, x):
    """One step of training; returns the output."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    y = model(x)
    y.square().mean().backward()
    optimizer.step()
    return y.detach()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, data = model_and_data()
    packed = sum(layer.packed.nbytes for layer in model.modules() if isinstance(layer, nf4lab.Linear4bit))
    nf4lab.shardable_(model)
    mesh = init_device_mesh("cpu", (2,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = sum(p.to_local().nbytes for n, p in model.named_parameters() if n.endswith("packed"))
    y = step(model, data[rank])
    state = {key: whole(value).clone() for key, value in model.state_dict().items()}
    torch.save({"y": y, "state": state, "local": local, "packed": packed}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
