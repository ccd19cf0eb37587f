"""4-bit NormalFloat, from its levels to its kernels: the package behind the book."""

import os
import re
import signal
import sys

__version__ = "0.1.0"
if re.fullmatch(r"(.*[/\\])?nf4lab(\.exe)?", "".join(sys.orig_argv[-len(sys.argv) :][:1])):
    # The command line is served here already, since all that follows imports torch, which takes seconds.
    if sys.argv[1:] == ["--version"]:
        print(f"nf4lab {__version__}")
        sys.exit()

    def end(number, frame):
        said = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        os.write(2, f"nf4lab: {said}; nothing was left behind\n".encode())
        os._exit(128 + number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # until the work begins, they end it at once; what is ignored stays so
        if getattr(signal, name, None) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), end)

from nf4lab.beyond.calibration import calibrate
from nf4lab.beyond.rotation import hadamard
from nf4lab.blockwise import BLOCK_SIZES, QuantizedTensor, dequantize, quantize
from nf4lab.checkpoints.convert import quantize_checkpoint
from nf4lab.checkpoints.files import iterate_quantized, load_quantized, save_quantized
from nf4lab.codebooks import extremes, lloyd  # noqa: F401  the book calls them by these names
from nf4lab.formats import FORMATS, Format
from nf4lab.formats.double_quant import DoubleQuant, QuantizedConstants
from nf4lab.layers.adopt import adopt_, release_
from nf4lab.layers.embedding import Embedding4bit
from nf4lab.layers.experts import Experts4bit
from nf4lab.layers.linear import Linear4bit
from nf4lab.layers.load import load_model_
from nf4lab.layers.lora import LoRALinear, add_lora_, merge_lora_
from nf4lab.layers.sharded import shardable_
from nf4lab.layers.swap import QuantizedLayer, QuantizedLayers, quantize_model_
from nf4lab.metrics import code_usage, compression_ratio, entropy_bits, mae, mse, output_error, shannon_limit, sqnr_db

__all__ = [
    "BLOCK_SIZES",
    "FORMATS",
    "DoubleQuant",
    "Embedding4bit",
    "Experts4bit",
    "Format",
    "Linear4bit",
    "LoRALinear",
    "QuantizedConstants",
    "QuantizedLayer",
    "QuantizedLayers",
    "QuantizedTensor",
    "add_lora_",
    "adopt_",
    "calibrate",
    "code_usage",
    "compression_ratio",
    "dequantize",
    "entropy_bits",
    "hadamard",
    "iterate_quantized",
    "load_model_",
    "load_quantized",
    "mae",
    "merge_lora_",
    "mse",
    "output_error",
    "quantize",
    "quantize_checkpoint",
    "quantize_model_",
    "release_",
    "save_quantized",
    "shannon_limit",
    "shardable_",
    "sqnr_db",
]  # fmt: skip
