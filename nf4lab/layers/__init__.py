"""Layers of torch whose weights stay in 4 bits.

layout      a QuantizedTensor as arguments of an op
ops         the products of every layer, as ops of torch
prepared    a weight made ready, so that a call does only what a call must
stored      what every layer shares: a weight in buffers, moved, saved and copied with the module
linear      a linear layer
embedding   a table of which rows are looked up
experts     fused experts of a mixture
lora        low-rank adapters on a frozen layer
starts      adapters that begin with what the base lacks
swap        a whole model, its layers quantized and put in place
adopt       bitsandbytes' layers for these, and back
load        a model filled from a checkpoint
sharded     layers for FSDP2
peft_lora   PEFT's adapters on these layers
"""
