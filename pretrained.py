"""What others trained: the authors' released tokenizer and transformer, and the tokenizer's PyTorch port.

    python pretrained.py imagenet256                    # or imagenet512: fetches both models, writes runs/imagenet256
    python sample.py --run runs/imagenet256 --class tench "golden retriever"
    python pretrained.py --tokenizer FILE [--transformer FILE] --run DIR    # from files at hand
    python pretrained.py --export DIR RUN               # a run's two models in the released format
    python pretrained.py --half DIR RUN                 # a run in float16, half the size, to hand on

Files are fetched into the cache folder (lib/downloads.py). Nothing that is loaded can run code.
"""
import argparse
import math
import re
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lib import files
from lib.data import IMAGENET_CLASSES
from lib.files import download
from lib.flags import UserError, command_line
from maskgit import MaskGIT
from vqgan import VQGAN

URL = "https://storage.googleapis.com/maskgit-public/checkpoints/"
MODELS = ["imagenet256", "imagenet512"]
KINDS = ["vqgan", "transformer", "autoregressive", "classifier"]            # what a run may hold, the tokenizer first
# The transformer's layers, around and inside its blocks: {our name: the names of the released ones that it unites}.
AROUND_THE_BLOCKS = {"token_embedding": ["Embed_0/word_embeddings"],
                     "position_embedding": ["Embed_0/position_embeddings"], "norm": ["Embed_0/embeddings_ln"],
                     "head.0": ["MlmLayer_0/mlm_dense"], "head.2": ["MlmLayer_0/mlm_ln"]}
TRANSFORMER_BLOCK = {"attention.qkv": [f"Attention_0/self_attention/{part}" for part in ("query", "key", "value")],
                     "attention.out": ["Attention_0/self_attention/out"], "norm1": ["Attention_0/attention_output_ln"],
                     "mlp.0": ["Mlp_0/intermediate_output"], "mlp.2": ["Mlp_0/layer_output"],
                     "norm2": ["Mlp_0/layer_output_ln"]}


def tokenizer_layers(model):
    """The same of a VQGAN: {our name: [the released name]}, also of what holds no weights but has layers in it.

    Flax numbers the layers of each kind as they are called, which is the order in which ours are defined."""
    names, counts = {"quantizer": "quantizer", "encoder.layers": "encoder", "decoder.layers": "decoder"}, Counter()
    for ours, layer in model.named_modules():
        parent = ours.rpartition(".")[0]
        if parent in names:
            kind = f"{names[parent]}/{type(layer).__name__.removesuffix('2d')}"
            names[ours] = f"{kind}_{counts[kind]}"
            counts[kind] += 1
    return {ours: [name] for ours, name in names.items()}


def released_arrays(model):
    """Every array of a released file, of a VQGAN or MaskGIT: (its name, our weights that it stands for).

    These are views of the model's weights in the shape of the released array, to be read, or to be written into."""
    if isinstance(model, VQGAN):
        layers = tokenizer_layers(model)
    else:
        yield "MlmLayer_0/mlm_bias/bias", model.head_bias.detach()
        layers = AROUND_THE_BLOCKS | {f"blocks.{i}.{ours}": [f"TransformerLayer_{i}/{name}" for name in names]
                                      for i in range(model.config.depth) for ours, names in TRANSFORMER_BLOCK.items()}
    for ours, names in layers.items():
        layer = model.get_submodule(ours)
        weight = {nn.Conv2d: "kernel", nn.Linear: "kernel", nn.Embedding: "embedding"}.get(type(layer), "scale")
        for kind, united in layer.named_parameters(recurse=False):
            kind = weight if kind == "weight" else kind
            for name, array in zip(names, united.detach().chunk(len(names)), strict=True):
                if kind == "kernel":                        # ours begin with (out, in), theirs end with (in, out)
                    array = array.movedim((1, 0), (-2, -1))
                if name.endswith(("query", "key", "value")):                # what comes out is split by head
                    array = array.unflatten(-1, (model.config.heads, -1))
                elif name.endswith("self_attention/out") and kind == "kernel":          # so is what goes in here
                    array = array.unflatten(0, (model.config.heads, -1))
                yield f"{name}/{kind}", array


def port_arrays(model):
    """As released_arrays, for the PyTorch port of the tokenizer, whose arrays are laid out as ours."""
    levels, blocks = range(len(model.config.multipliers)), range(model.config.res_blocks)
    down = [f"down.{level}.block.{i}" for level in levels for i in blocks]
    middle = [f"mid.{i}" for i in blocks]
    up = []
    for level in reversed(levels):                          # in the port the finest resolution is 0 on the way up too
        up += [f"up.{level}.block.{i}" for i in blocks] + [f"up.{level}.upsample_conv"] * (level > 0)
    yield "quantize.embedding.weight", model.quantizer.codebook.detach()
    for tower, names in (("encoder", [*down, *middle]), ("decoder", [*middle, *up])):
        layers = [layer for layer in getattr(model, tower).layers if list(layer.parameters())]
        for path, layer in zip(["conv_in", *names, "norm_out", "conv_out"], layers, strict=True):
            for name, array in layer.state_dict().items():
                yield f"{tower}.{path}.{name}".replace("shortcut", "nin_shortcut"), array


def import_msgpack():
    try:
        import msgpack
    except ImportError:
        raise UserError("the released files are in the msgpack format: pip install msgpack") from None
    return msgpack


def flatten(tree, path=""):
    """The arrays in nested dicts, each with its name: its path below whatever the parameters are wrapped in."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, "" if key == "params" else f"{path}/{key}".lstrip("/"))
    elif torch.is_tensor(tree) and tree.is_floating_point():                # other arrays are no parameters
        yield path, tree


def read_released(path):
    """The arrays of a Flax msgpack file by name, such as encoder/Conv_0/kernel.
    Raises OSError, or ValueError for a file that is truncated, of another format, or ambiguous."""
    msgpack = import_msgpack()

    def unpack(code, data):                                 # extension type 1 is an array, others are single numbers
        if code == 1:
            shape, dtype, buffer = msgpack.unpackb(data, raw=True)
            return torch.frombuffer(bytearray(buffer), dtype=getattr(torch, dtype.decode())).reshape(shape)

    data = Path(path).read_bytes()
    try:
        found = list(flatten(msgpack.unpackb(data, ext_hook=unpack)))
    except Exception as error:                              # msgpack raises a dozen kinds on what it does not expect
        raise UserError(f"{path} is no Flax msgpack file, or truncated ({type(error).__name__}: {error})") from error
    for name, times in Counter(name for name, _ in found).items():
        if times > 1:
            raise UserError(f"{path} holds parameter {name} twice; leave one set of parameters in it")
    return dict(found)


def shape_of(path, arrays, name):
    if name not in arrays:
        raise UserError(f"{path}: parameter {name} is missing: this is no released model or port, or not a whole one")
    return tuple(arrays[name].shape)


def count(arrays, start):
    """How many different numbers follow `start` in the names."""
    return len({re.match(r"\d*", name.removeprefix(start)).group() for name in arrays if name.startswith(start)})


def build(model_class, config, arrays, layout, path):
    """A model in eval mode from a file's arrays, each used exactly once. layout: released_arrays or port_arrays."""
    with torch.device("meta"):                              # no time for a random start
        model = model_class(config)
    for name, own in layout(model.to_empty(device="cpu")):
        found, expected = shape_of(path, arrays, name), tuple(own.shape)
        if found != expected:
            raise UserError(f"{path}: parameter {name} has shape {found} where {expected} is expected")
        own.copy_(arrays.pop(name))
    for name in arrays:
        raise UserError(f"{path}: parameter {name} is unexpected")
    return model.eval()


def vqgan_from_jax(path):
    """The authors' released tokenizer file, or its PyTorch port, which is maskgit-vqgan-imagenet-f16-256.bin of
    open-muse and 1d-tokenizer -> VQGAN in eval mode, its configuration read off the shapes.

    Raises OSError, or ValueError for a damaged file, and for a parameter too many or too few, which it names."""
    with open(path, "rb") as file:
        is_port = file.read(2) in (b"PK", b"\x80\x02")      # the port is a zip archive, or a bare pickle
    arrays = files.load_tensors(path) if is_port else read_released(path)
    shape = partial(shape_of, path, arrays)
    if is_port:
        codebook, filters = shape("quantize.embedding.weight"), shape("encoder.conv_in.weight")[0]
        levels, res_blocks = count(arrays, "encoder.down."), count(arrays, "encoder.mid.")
        widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    else:
        codebook, filters = shape("quantizer/codebook"), shape("encoder/Conv_0/kernel")[-1]
        shape("decoder/Conv_0/kernel")                      # raises where there is no decoder to count in
        levels = count(arrays, "decoder/Conv_") - 1         # into the decoder, up at each level but the finest, and out
        res_blocks = count(arrays, "encoder/ResBlock_") // (levels + 1)
        widths = [shape(f"encoder/ResBlock_{level * res_blocks}/Conv_0/kernel")[-1] for level in range(levels)]
    if not widths or not res_blocks or filters % 32:        # shapes do not tell the groups of GroupNorm: 32 as released
        raise UserError(f"{path} is no tokenizer as released: it has {len(widths)} resolutions, {res_blocks} residual "
                         f"blocks and {filters} filters")
    config = VQGAN.Config(*codebook, filters, tuple(width // filters for width in widths), res_blocks)
    return build(VQGAN, config, arrays, port_arrays if is_port else released_arrays, path)


def maskgit_from_jax(path, codebook_size=1024):
    """The authors' released transformer file -> MaskGIT in eval mode, its configuration read off the shapes.

    codebook_size: of its tokenizer; the rest of the table is classes and [MASK]. Raises as vqgan_from_jax does, and
    ValueError where the table is too small for the codebook."""
    arrays = read_released(path)
    shape = partial(shape_of, path, arrays)
    rows, dim = shape("Embed_0/word_embeddings/embedding")
    if rows < codebook_size + 2:
        raise UserError(f"{path} has a vocabulary of {rows}, too small for {codebook_size} codes, the classes and "
                         f"[MASK]: it was trained with another tokenizer")
    positions, _ = shape("Embed_0/position_embeddings/embedding")
    _, heads, _ = shape("TransformerLayer_0/Attention_0/self_attention/query/kernel")
    _, mlp_dim = shape("TransformerLayer_0/Mlp_0/intermediate_output/kernel")
    depth = count(arrays, "TransformerLayer_")
    config = MaskGIT.Config(codebook_size, rows - codebook_size - 1, positions - 1, dim, depth, heads, mlp_dim)
    return build(MaskGIT, config, arrays, released_arrays, path)


def write_released(model, path):
    """Writes a VQGAN or MaskGIT as the authors released theirs. Raises OSError, or ValueError where that cannot be."""
    msgpack = import_msgpack()
    if getattr(model.config, "groups", 32) != 32:
        raise UserError(f"the released format means 32 groups in each GroupNorm, not {model.config.groups}")
    if getattr(model.config, "null_class", False):
        raise UserError("the released format has no null class, and this transformer was trained with --class-dropout")
    tree = {}
    for name, array in released_arrays(model):
        *folders, last = f"params/{name}".split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array

    def pack(array):
        array = array.contiguous().numpy()
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))

    files.write_atomically(path, lambda file: msgpack.pack(tree, file, default=pack))


def convert(args, folder):
    """Writes vqgan.pt and, where there is a transformer, transformer.pt of a run: from the released files that args
    names, and for what it does not name from those of args.model."""
    files = [args.tokenizer, args.transformer]
    if args.model:
        import_msgpack()                                    # without it, there is no use in fetching
        names = [f"{kind}_{args.model}_checkpoint" for kind in ("tokenizer", "maskgit")]
        files = [file or download(URL + name, name, offline=args.offline) for file, name in zip(files, names)]
    tokenizer, side, classes = vqgan_from_jax(files[0]), 16, IMAGENET_CLASSES
    models = {"vqgan": tokenizer}
    if files[1]:
        models["transformer"] = maskgit_from_jax(files[1], tokenizer.config.codebook_size)
        config = models["transformer"].config
        side = math.isqrt(config.num_tokens)
        if side * side != config.num_tokens:
            raise UserError(f"{files[1]} draws {config.num_tokens} tokens, which are no square image")
        if config.num_classes != len(classes):
            classes = [str(i) for i in range(config.num_classes)]
    for (kind, model), source in zip(models.items(), files):
        checkpoint = {"kind": kind, "step": 0, "settings": {"source": str(source)}, "config": asdict(model.config),
                      "model": model.state_dict(), "data": "imagenet", "image_size": side * tokenizer.config.stride,
                      "classes": classes}
        if kind == "transformer":
            checkpoint["tokenizer"] = files.fingerprint(tokenizer)
        files.save_checkpoint(folder / f"{kind}.pt", checkpoint)
        (folder / f"{kind}.resume.pt").unlink(missing_ok=True)             # of the run that --overwrite replaces
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"wrote {folder}/{kind}.pt: {size:.2f} M parameters, {model.config}")
    print(f"next: python {'sample.py' if files[1] else 'train_transformer.py --data imagenet'} --run {folder}")


def export(run, targets):
    """Writes both models of a run as released. targets: the files of the tokenizer and of the transformer."""
    for kind, model_class, target in zip(("vqgan", "transformer"), (VQGAN, MaskGIT), targets, strict=True):
        model, _ = files.rebuild(run / f"{kind}.pt", kind, model_class)
        write_released(model, target)
        print(f"wrote {target}")


def halve(run, folder):
    """Writes the models of a run to a folder in float16. Every script takes that run, and computes in float32."""
    for kind in KINDS:
        source, target = run / f"{kind}.pt", folder / f"{kind}.pt"
        if kind != "vqgan" and not source.exists():
            continue
        checkpoint = files.load_checkpoint(source, kind)
        checkpoint["model"] = {name: value.half() if value.is_floating_point() else value
                               for name, value in checkpoint["model"].items()}
        if "tokenizer" in checkpoint:                       # rounded, it is another one, with other tokens
            tokenizer, _ = files.rebuild(folder / "vqgan.pt", "vqgan", VQGAN)
            checkpoint["tokenizer"] = files.fingerprint(tokenizer)
        files.save_checkpoint(target, checkpoint)
        print(f"wrote {target}: {target.stat().st_size / 1e6:.2f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="imagenet256 or imagenet512, to be fetched")
    parser.add_argument("--tokenizer", metavar="FILE", help="a released tokenizer that is at hand, or its PyTorch port")
    parser.add_argument("--transformer", metavar="FILE", help="a released transformer that is at hand")
    parser.add_argument("--run", metavar="DIR", help="the run to write (default: runs/NAME, after the model)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--offline", action="store_true", help="never use the network, only the cache folder")
    pair = {"nargs": 2, "type": Path, "metavar": ("DIR", "RUN")}
    parser.add_argument("--export", **pair, help="write RUN's models to DIR as released")
    parser.add_argument("--half", **pair, help="write RUN's models to DIR in float16")
    args = parser.parse_args()

    if args.half:
        folder, run = args.half
        targets, command = [folder / f"{kind}.pt" for kind in KINDS], partial(halve, run, folder)
    elif args.export:
        folder, run = args.export
        targets = [folder / f"{kind}_{run.resolve().name}_checkpoint" for kind in ("tokenizer", "maskgit")]
        command = partial(export, run, targets)
    elif args.model in MODELS or args.model is None and args.tokenizer and args.run:
        folder = Path(args.run or Path("runs", args.model))
        targets = [folder / f"{kind}.{ending}" for kind in KINDS[:2] for ending in ("pt", "resume.pt")]
        command = partial(convert, args, folder)
    else:
        problem = f"unknown model '{args.model}'" if args.model else "no model was named"
        raise UserError(f"{problem}: name one of {', '.join(MODELS)}, or give --tokenizer, --transformer and --run")
    for path in targets:
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} is already there: use --overwrite to replace it, or name another folder")
    command()


if __name__ == "__main__":
    command_line(main)
