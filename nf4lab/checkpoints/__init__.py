"""Checkpoints: what a file stores of a quantized tensor, and whole checkpoints made of others.

beginnings     what a file is that was taken for another
checked_json   JSON from a file that nobody vouches for
tensorfile     safetensors files, one tensor at a time
keys           a quantized tensor's keys in a file: bitsandbytes' where it has any
files          a checkpoint in one file or in shards, saved and loaded
architecture   what a folder's own model multiplies, and so what is quantized
plan           which tensors go into which file, decided before the first is read
folder         a model's folder beside its weights, and what is quantized already
partial        files and folders that appear whole, and what a kill leaves of them
convert        one checkpoint made of another, a tensor at a time
"""
