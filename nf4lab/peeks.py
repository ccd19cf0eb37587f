"""Layers of a model whose weight its code looks at, past the layer: in 4 bits it would find packed bytes there.

    hidden_states = hidden_states.to(self.wo.weight.dtype)        # in Switch Transformers
    time_step = self.dt_proj.weight @ time_step                   # in Mamba

In bitsandbytes' layers the dtype of the weight is uint8: a cast input loses its fractions and its signs, and the model
answers wrongly without a word. T5 keeps such layers in float32; Switch Transformers, Long T5, SigLIP 2, ColPali and
others don't. Where the weight itself is read, a shape is wrong, or an index. No list of names would stay right, so the
model's own source is read: `module.weight` and `next(module.parameters()).dtype`.
"""

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterator

from torch import nn

CAST = "transformers casts its input to its weight's dtype, in bitsandbytes' layer uint8"
READ = "transformers reads its weight past the layer"
# A function that mentions one of these asks for a dtype, and takes care of layers that are quantized.
CAREFUL = ("uint8", "is_floating_point", "_is_quantized", "quantization_config")
SETS_UP = re.compile(r"_*(init|tie|reset|set|get|resize)(_.*)?_*")  # methods that run before the weights are there
HARMLESS = ("device", "is_meta", "requires_grad", "_is_hf_initialized")
OWN = ("weight",)  # a layer may look at its own
FIRST = "first parameter"  # the last part of a path: not the module itself, but the one that holds its first parameter


def peeked_at(model: nn.Module) -> dict[str, str]:
    """The layers of `model` whose weight its code looks at, by dotted name: CAST or READ."""
    found: dict[str, str] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for path, what in _paths(type(module)).items():
            for layer in filter(lambda layer: _multiplies(modules.get(layer)), _resolved(module, path, name)):
                found[layer] = CAST if CAST in (what, found.get(layer)) else READ
    return found


def _multiplies(module: nn.Module | None) -> bool:
    """Whether a module is a layer that may be in 4 bits, or is."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit")


@functools.cache
def _paths(kind: type) -> dict[tuple, str]:
    """{path from an object of the class: CAST or READ} of what its methods and those that it inherits look at."""
    found: dict[tuple, str] = {}
    for c in kind.__mro__:
        for path, what in _in_file(c.__module__).get(c.__qualname__, ()) if c.__module__ in sys.modules else ():
            found[path] = CAST if CAST in (what, found.get(path)) else READ
    return found


@functools.cache
def _in_file(module: str) -> dict[str, list[tuple[tuple, str]]]:
    """The same for each class that a module of Python defines; nothing for torch's, ours, and those without source."""
    try:
        source = "" if module.partition(".")[0] in ("torch", "nf4lab") else inspect.getsource(sys.modules[module])
        tree = ast.parse(source if ".weight" in source or "parameters()" in source else "")
    except (OSError, TypeError, SyntaxError):
        return {}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {c.name: [look for node in c.body for look in _in_method(node)] for c in classes}


def _in_method(method: ast.AST) -> Iterator[tuple[tuple, str]]:
    """What one method looks at."""
    if isinstance(method, ast.FunctionDef) and not SETS_UP.fullmatch(method.name):
        is_careful = any(word in ast.unparse(method) for word in CAREFUL)
        yield from (look for look in _looks(method, True) if look[1] == READ or not is_careful)


def _looks(node: ast.AST, always: bool) -> Iterator[tuple[tuple, str]]:
    """What a piece of code looks at. always: whether it always runs; a weight that is read in some case is not counted.

    What is only compared is left out, and so is what tells nothing of the values.
    """
    if isinstance(node, ast.Compare) or _is_call_of(node, "isinstance"):
        return
    if isinstance(node, ast.Attribute) and node.attr == "dtype":
        path = _path(node.value)
        if path and path != OWN and path[-1] in ("weight", FIRST):
            yield path if path[-1] == FIRST else path[:-1], CAST
            return
    if isinstance(node, ast.Attribute) and node.attr in HARMLESS:
        return
    if isinstance(node, ast.Attribute) and node.attr == "weight" and always:
        path = _path(node)
        if path and path != OWN:
            yield path[:-1], READ
    always = always and not isinstance(node, ast.If | ast.IfExp)
    for child in ast.iter_child_nodes(node):
        yield from _looks(child, always)


def _is_call_of(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _path(node: ast.AST) -> tuple | None:
    """("layers", 0, "fc") for self.layers[0].fc, None in the place of an index that varies; None for all else."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else None
    if _is_call_of(node, "next") and node.args:
        inner = node.args[0]
        is_parameters = isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute)
        path = _path(inner.func.value) if is_parameters and inner.func.attr == "parameters" else None
        return None if path is None else (*path, FIRST)
    if isinstance(node, ast.Subscript):
        path, index = _path(node.value), getattr(node.slice, "value", None)
        return None if path is None else (*path, index if isinstance(index, int | str) else None)
    if isinstance(node, ast.Attribute):
        path = _path(node.value)
        return None if path is None else (*path, node.attr)
    return None


def _resolved(module: nn.Module, path: tuple, name: str) -> Iterator[str]:
    """The dotted names of the modules at the end of a path that starts at the module of that name."""
    if path == (FIRST,):
        first = next((key for key, _ in module.named_parameters()), "")
        yield f"{name}.{first.rpartition('.')[0]}".strip(".")
    elif path:
        children = list(module._modules)
        if isinstance(path[0], int):
            part = children[path[0]] if -len(children) <= path[0] < len(children) else None
        else:
            part = path[0]
        for child in children if path[0] is None else [part] if part in children else []:
            yield from _resolved(module._modules[child], path[1:], f"{name}.{child}".lstrip("."))
    else:
        yield name
