"""Layers of torch whose weights stay in 4 bits: the ops, what is stored, the layers, and models swapped in place."""
