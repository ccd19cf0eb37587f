"""Checkpoints: safetensors files, what is stored in them of a quantized tensor, whole checkpoints converted."""
