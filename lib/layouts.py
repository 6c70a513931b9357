"""Says which array of a released file is which parameter of our models.

A layout is a function of a model that yields (the name of an array in the file, our weights). The
weights are a view in the shape of that array, to be read from or to be written to.
"""
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.errors import UserError
from lib.files import WithoutInitialization
from maskgit import MaskGIT
from vqgan import VQGAN, ResBlock

PORT = "maskgit-vqgan-imagenet-f16-256.bin"             # the tokenizer in open-muse, 1d-tokenizer
READABLE = (f"pretrained.py reads the authors' released files (Flax msgpack) and the tokenizer's "
            f"PyTorch port ({PORT}), but no safetensors files or Lightning checkpoints (.ckpt)")
# {our name of a layer of the transformer: the released one}
LAYERS = {
    "token_embedding": "Embed_0/word_embeddings",
    "position_embedding": "Embed_0/position_embeddings",
    "norm": "Embed_0/embeddings_ln",
    "head.0": "MlmLayer_0/mlm_dense",
    "head.2": "MlmLayer_0/mlm_ln",
}
BLOCK_LAYERS = {
    "attention.query": "Attention_0/self_attention/query",
    "attention.key": "Attention_0/self_attention/key",
    "attention.value": "Attention_0/self_attention/value",
    "attention.out": "Attention_0/self_attention/out",
    "norm1": "Attention_0/attention_output_ln",
    "mlp.0": "Mlp_0/intermediate_output",
    "mlp.2": "Mlp_0/layer_output",
    "norm2": "Mlp_0/layer_output_ln",
}
# {a kind of layer: the released name of its weight}
WEIGHTS = {nn.Conv2d: "kernel", nn.Linear: "kernel", nn.Embedding: "embedding",
           nn.GroupNorm: "scale", nn.LayerNorm: "scale"}


class ReleasedFile:
    """The arrays of a file by name, each of which is to be used once. path: for messages."""

    def __init__(self, path: Path | str, arrays: dict[str, Tensor]):
        self.path = path
        self.arrays = arrays

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Returns the shape of an array. Raises UserError if there is none of this name, or if it
        does not have so many dimensions."""
        if name not in self.arrays:
            raise UserError(f"{self.path}: parameter {name} is missing: this is another model, or "
                            f"a part of one; {READABLE}")
        shape = tuple(self.arrays[name].shape)
        if len(shape) != dimensions:
            raise UserError(f"{self.path}: parameter {name} has shape {shape}, but {dimensions} "
                            f"dimensions are expected: this is another model")
        return shape

    def count(self, start: str) -> int:
        """Returns how many different numbers follow `start` in the names."""
        numbers = set()
        for name in self.arrays:
            match = re.match(re.escape(start) + r"(\d+)", name)
            if match:
                numbers.add(match[1])
        return len(numbers)

    def build(self, model_class: type, config: object, layout: Callable) -> nn.Module:
        """Returns a model with these arrays, in eval mode.

        layout: released_arrays or port_arrays. Raises UserError if an array is missing, misshapen
        or left over."""
        with torch.device("meta"), WithoutInitialization():
            model = model_class(config)
        model = model.to_empty(device="cpu")
        for name, ours in layout(model):
            shape = self.shape(name, ours.ndim)
            if shape != tuple(ours.shape):
                raise UserError(f"{self.path}: parameter {name} has shape {shape}, but "
                                f"{tuple(ours.shape)} is expected: this is another model")
            ours.copy_(self.arrays.pop(name))
        if self.arrays:
            raise UserError(f"{self.path}: parameter {next(iter(self.arrays))} is unexpected: this "
                            f"is another model")
        return model.eval()


# ----------------------------------------------------------------------------- the authors' layout

def released_arrays(model: VQGAN | MaskGIT) -> Iterator[tuple[str, Tensor]]:
    """Yields every array of a released file: the layout of the authors."""
    if isinstance(model, VQGAN):
        yield "quantizer/codebook", model.quantizer.codebook.detach()
        for tower in ("encoder", "decoder"):
            yield from tower_arrays(model.get_submodule(f"{tower}.layers"), tower)
        return
    yield "MlmLayer_0/mlm_bias/bias", model.head_bias.detach()
    for ours, released in LAYERS.items():
        yield from layer_arrays(model.get_submodule(ours), released)
    for i, block in enumerate(model.blocks):
        for ours, released in BLOCK_LAYERS.items():
            name = f"TransformerLayer_{i}/{released}"
            yield from layer_arrays(block.get_submodule(ours), name, model.config.heads)


def tower_arrays(tower: nn.Module, released: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the arrays of an encoder, a decoder or a residual block, whose released name is given.

    Flax numbers the layers of each kind as they are called, which is the order of ours."""
    counts = Counter()
    for layer in tower.children():
        kind = type(layer).__name__.removesuffix("2d")              # Conv, GroupNorm or ResBlock
        name = f"{released}/{kind}_{counts[kind]}"
        counts[kind] += 1
        if isinstance(layer, ResBlock):
            yield from tower_arrays(layer, name)
        elif type(layer) in WEIGHTS:                                # the others have no weights
            yield from layer_arrays(layer, name)


def layer_arrays(
    layer: nn.Module, released: str, heads: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the arrays of one layer: its weight and, if it has one, its bias.

    heads: of the attention that the layer may be a part of."""
    weight = layer.weight
    bias = getattr(layer, "bias", None)
    if WEIGHTS[type(layer)] == "kernel":
        weight = weight.movedim((1, 0), (-2, -1))       # ours begin (out, in), theirs end (in, out)
    if released.endswith(("/query", "/key", "/value")):
        weight = weight.unflatten(-1, (heads, -1))      # the output is split by head
        bias = bias.unflatten(-1, (heads, -1))
    elif released.endswith("/self_attention/out"):
        weight = weight.unflatten(0, (heads, -1))       # the input is split by head
    yield f"{released}/{WEIGHTS[type(layer)]}", weight.detach()
    if bias is not None:
        yield f"{released}/bias", bias.detach()


# ------------------------------------------------------------------------------ the port's layout

def port_arrays(model: VQGAN) -> Iterator[tuple[str, Tensor]]:
    """Yields every array of the tokenizer's PyTorch port: its layout. The shapes are as ours."""
    yield "quantize.embedding.weight", model.quantizer.codebook.detach()
    levels = len(model.config.multipliers)
    blocks = range(model.config.res_blocks)
    down = []
    for level in range(levels):
        down += [f"down.{level}.block.{i}" for i in blocks]
    middle = [f"mid.{i}" for i in blocks]
    up = []
    for level in reversed(range(levels)):               # level 0 is the finest resolution here too
        up += [f"up.{level}.block.{i}" for i in blocks]
        if level > 0:
            up.append(f"up.{level}.upsample_conv")
    yield from port_tower_arrays(model.encoder, "encoder", down + middle)
    yield from port_tower_arrays(model.decoder, "decoder", middle + up)


def port_tower_arrays(
    tower: nn.Module, name: str, between: list[str],
) -> Iterator[tuple[str, Tensor]]:
    """Yields the arrays of the port's encoder or decoder.

    between: the port's names of the layers between the first and the last ones, in order."""
    names = ["conv_in", *between, "norm_out", "conv_out"]
    layers = [layer for layer in tower.layers if layer.state_dict()]
    for layer_name, layer in zip(names, layers, strict=True):
        for parameter, array in layer.state_dict().items():
            parameter = parameter.replace("shortcut", "nin_shortcut")
            yield f"{name}.{layer_name}.{parameter}", array
