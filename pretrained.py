"""What others trained: the authors' released tokenizer and transformer, and the tokenizer's PyTorch port.

    python pretrained.py imagenet256                    # fetches both models, writes the run runs/imagenet256; or imagenet512
    python sample.py --run runs/imagenet256 --class tench "golden retriever"
    python pretrained.py --tokenizer FILE [--transformer FILE] --run DIR    # from files at hand
    python pretrained.py --export DIR RUN               # a run's two models in the released format
    python pretrained.py --half DIR RUN                 # a run in float16, half the size, to hand on

Files are fetched into the cache folder (downloads.py). Nothing that is loaded can run code.
"""
import argparse
import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

import devices
import runtime
from downloads import download
from maskgit import Linear, MaskGIT, MaskGITConfig
from vqgan import VQGAN, ResBlock, VQGANConfig

# ------------------------------------------------------------------------------------- the released models' names

def tokenizer_layers(model):
    """Every layer of a VQGAN that has weights: (our name, its name in the released file, its name in the PyTorch port)."""
    levels, blocks = range(len(model.config.multipliers)), range(model.config.res_blocks)
    down = [f"down.{level}.block.{i}" for level in levels for i in blocks]
    middle = [f"mid.{i}" for i in blocks]
    up = []
    for level in reversed(levels):                          # the port numbers the finest resolution 0, on the way up too
        up += [f"up.{level}.block.{i}" for i in blocks] + [f"up.{level}.upsample_conv"] * (level > 0)
    port_names = {"encoder": ["conv_in", *down, *middle, "norm_out", "conv_out"],
                  "decoder": ["conv_in", *middle, *up, "norm_out", "conv_out"]}
    for tower, names in port_names.items():
        counts = Counter()                                  # Flax numbers the layers of each kind as they are called
        layers = [(i, layer) for i, layer in enumerate(getattr(model, tower).layers) if list(layer.parameters())]
        for (i, layer), port_name in zip(layers, names, strict=True):
            kind = {ResBlock: "ResBlock", nn.Conv2d: "Conv", nn.GroupNorm: "GroupNorm"}[type(layer)]
            ours, theirs, port = f"{tower}.layers.{i}", f"{tower}/{kind}_{counts[kind]}", f"{tower}.{port_name}"
            counts[kind] += 1
            if kind != "ResBlock":
                yield ours, theirs, port
                continue
            yield f"{ours}.norm1", f"{theirs}/GroupNorm_0", f"{port}.norm1"
            yield f"{ours}.conv1", f"{theirs}/Conv_0", f"{port}.conv1"
            yield f"{ours}.norm2", f"{theirs}/GroupNorm_1", f"{port}.norm2"
            yield f"{ours}.conv2", f"{theirs}/Conv_1", f"{port}.conv2"
            if layer.shortcut is not None:
                yield f"{ours}.shortcut", f"{theirs}/Conv_2", f"{port}.nin_shortcut"


def transformer_layers(model):
    """Every layer of a MaskGIT that has weights: (our name, its name in the released file, or those of its three parts)."""
    yield "token_embedding", "Embed_0/word_embeddings"
    yield "position_embedding", "Embed_0/position_embeddings"
    yield "norm", "Embed_0/embeddings_ln"
    for i in range(model.config.depth):
        ours, theirs = f"blocks.{i}", f"TransformerLayer_{i}"
        attention = f"{theirs}/Attention_0/self_attention"
        yield f"{ours}.attention.qkv", [f"{attention}/{part}" for part in ("query", "key", "value")]
        yield f"{ours}.attention.out", f"{attention}/out"
        yield f"{ours}.norm1", f"{theirs}/Attention_0/attention_output_ln"
        yield f"{ours}.mlp.0", f"{theirs}/Mlp_0/intermediate_output"
        yield f"{ours}.mlp.2", f"{theirs}/Mlp_0/layer_output"
        yield f"{ours}.norm2", f"{theirs}/Mlp_0/layer_output_ln"
    yield "head.0", "MlmLayer_0/mlm_dense"
    yield "head.2", "MlmLayer_0/mlm_ln"


def released_arrays(model):
    """Every parameter of a VQGAN or MaskGIT: (our name, the names of the released arrays that make it up, the shape of each).

    One rule then leads from theirs to ours (`from_released`) and one back (`to_released`)."""
    if isinstance(model, VQGAN):
        layers = [(ours, theirs) for ours, theirs, _ in tokenizer_layers(model)]
        yield "quantizer.codebook", ["quantizer/codebook"], tuple(model.quantizer.codebook.shape)
    else:
        layers = transformer_layers(model)
        heads = (model.config.heads, model.config.dim // model.config.heads)
        yield "head_bias", ["MlmLayer_0/mlm_bias/bias"], tuple(model.head_bias.shape)
    for ours, theirs in layers:
        layer = model.get_submodule(ours)
        theirs = [theirs] if isinstance(theirs, str) else theirs
        weight = {nn.Conv2d: "kernel", Linear: "kernel", nn.Embedding: "embedding"}.get(type(layer), "scale")
        for name, parameter in layer.named_parameters():
            shape = tuple(parameter.shape)
            if ours.endswith("attention.qkv"):              # theirs are split by part and by head
                shape = heads if name == "bias" else (shape[1], *heads)
            elif ours.endswith("attention.out") and name == "weight":
                shape = (*heads, shape[0])
            elif weight == "kernel" and name == "weight":   # (height, width, in, out) or (in, out), where ours begin with out
                shape = (*shape[2:], shape[1], shape[0])
            yield f"{ours}.{name}", [f"{path}/{weight if name == 'weight' else 'bias'}" for path in theirs], shape


def from_released(name, array, shape):
    """A released array -> this part of ours, of `shape`."""
    if not name.endswith("/kernel"):
        return array.reshape(shape)
    return array.permute(3, 2, 0, 1) if array.ndim == 4 else array.reshape(shape[::-1]).T


def to_released(name, part, shape):
    """This part of ours -> a released array of `shape`."""
    if not name.endswith("/kernel"):
        return part.reshape(shape)
    return part.permute(2, 3, 1, 0) if part.ndim == 4 else part.T.reshape(shape)


def port_arrays(model):
    """As released_arrays, for the PyTorch port of the tokenizer, whose arrays are laid out as ours."""
    yield "quantizer.codebook", ["quantize.embedding.weight"], tuple(model.quantizer.codebook.shape)
    for ours, _, port in tokenizer_layers(model):
        for name, parameter in model.get_submodule(ours).named_parameters():
            yield f"{ours}.{name}", [f"{port}.{name}"], tuple(parameter.shape)


# ------------------------------------------------------------------------------------------- reading and writing

DTYPES = {b"float32": torch.float32, b"float16": torch.float16, b"bfloat16": torch.bfloat16, b"float64": torch.float64}


def import_msgpack():
    try:
        import msgpack
    except ImportError:
        raise ValueError("the released files are in the msgpack format: pip install msgpack") from None
    return msgpack


def read_released(path):
    """The arrays of a Flax msgpack file by name, such as encoder/Conv_0/kernel; whatever the parameters are wrapped in is
    left off. Raises OSError, or ValueError for a file that is truncated, of another format, or ambiguous."""
    msgpack = import_msgpack()

    def unpack(code, data):                                 # extension type 1 is an array, others are single numbers
        if code == 1:
            shape, dtype, buffer = msgpack.unpackb(data, raw=True)
            return torch.frombuffer(bytearray(buffer), dtype=DTYPES[dtype]).reshape(shape) if dtype in DTYPES else None

    def flatten(tree, path=()):
        if "__msgpack_chunked_array__" in tree:             # Flax cuts an array of over 1 GiB into flat pieces
            pieces, shape = ([tree[key][str(i)] for i in range(len(tree[key]))] for key in ("chunks", "shape"))
            yield path, torch.cat(pieces).reshape(shape)
            return
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, (*path, key))
            elif torch.is_tensor(value):
                yield (*path, key), value

    with open(path, "rb") as file:
        data = file.read()
    try:
        found = list(flatten(msgpack.unpackb(data, ext_hook=unpack)))
    except Exception as error:                              # msgpack raises a dozen kinds on what it does not expect
        raise ValueError(f"{path} is no Flax msgpack file, or is truncated ({type(error).__name__}: {error})") from error
    arrays = {}
    for parts, array in found:
        name = "/".join(map(str, parts[len(parts) - parts[::-1].index("params"):] if "params" in parts else parts))
        if name in arrays:
            raise ValueError(f"{path} holds parameter {name} twice; leave one set of parameters in it")
        arrays[name] = array
    return arrays


def shape_of(arrays, name, path):
    if name not in arrays:
        raise ValueError(f"{path}: parameter {name} is missing")
    return tuple(arrays[name].shape)


def count(arrays, start):
    """How many different numbers follow `start` in the names."""
    return len({re.match(r"\d*", name[len(start):]).group() for name in arrays if name.startswith(start)})


def build(model_class, config, arrays, names, path):
    """A model in eval mode from the arrays of a file, each used exactly once. names: released_arrays or port_arrays."""
    with torch.device("meta"):                              # no memory, no time for a random start
        model = model_class(config)
    weights, own = {}, model.state_dict()
    for ours, theirs, shape in names(model):
        parts, size = [], own[ours].shape
        for name in theirs:
            if shape_of(arrays, name, path) != shape:
                raise ValueError(f"{path}: parameter {name} has shape {tuple(arrays[name].shape)} where {shape} is expected")
            parts.append(from_released(name, arrays.pop(name), (size[0] // len(theirs), *size[1:])))
        weights[ours] = torch.cat(parts).float()
    for name in arrays:
        raise ValueError(f"{path}: parameter {name} is unexpected")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def tokenizer_config(path, codebook, filters, widths, res_blocks):
    """The VQGANConfig of a file; shapes do not tell the groups of GroupNorm, 32 as released. Raises ValueError."""
    if not widths or not res_blocks or filters % 32:
        raise ValueError(f"{path} is no tokenizer as released: it has {len(widths)} resolutions, {res_blocks} residual "
                         f"blocks and {filters} filters")
    return VQGANConfig(*codebook, filters, tuple(width // filters for width in widths), res_blocks)


def vqgan_from_jax(path):
    """The authors' released tokenizer file -> VQGAN in eval mode, its configuration read off the shapes.

    Raises OSError, or ValueError for a damaged file and for one with a parameter too many or too few, which it names."""
    arrays = read_released(path)
    shape = lambda name: shape_of(arrays, name, path)
    filters, _ = shape("encoder/Conv_0/kernel")[-1], shape("decoder/Conv_0/kernel")
    levels = count(arrays, "decoder/Conv_") - 1             # into the decoder, up at each level but the finest, and out
    res_blocks = count(arrays, "encoder/ResBlock_") // (levels + 1)
    widths = [shape(f"encoder/ResBlock_{level * res_blocks}/Conv_0/kernel")[-1] for level in range(levels)]
    config = tokenizer_config(path, shape("quantizer/codebook"), filters, widths, res_blocks)
    return build(VQGAN, config, arrays, released_arrays, path)


def vqgan_from_port(path):
    """The tokenizer's PyTorch port (maskgit-vqgan-imagenet-f16-256.bin of open-muse and 1d-tokenizer) -> VQGAN in eval mode.

    Raises as vqgan_from_jax does."""
    state = runtime.load_tensors(path)
    if "quantize.embedding.weight" not in state:
        raise ValueError(f"{path} is not the PyTorch port of the released tokenizer: it has no quantize.embedding.weight")
    shape = lambda name: shape_of(state, name, path)
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(count(state, "encoder.down."))]
    config = tokenizer_config(path, shape("quantize.embedding.weight"), shape("encoder.conv_in.weight")[0], widths,
                              count(state, "encoder.mid."))
    return build(VQGAN, config, state, port_arrays, path)


def read_tokenizer(path):
    """A released tokenizer or its PyTorch port, told apart by the first bytes -> VQGAN in eval mode."""
    with open(path, "rb") as file:
        start = file.read(2)
    return vqgan_from_port(path) if start in (b"PK", b"\x80\x02") else vqgan_from_jax(path)       # zip, or a bare pickle


def maskgit_from_jax(path, codebook_size=1024):
    """The authors' released transformer file -> MaskGIT in eval mode, its configuration read off the shapes.

    codebook_size: of its tokenizer; the rest of the table is classes and [MASK]. Raises as vqgan_from_jax does, and
    ValueError where the table is too small for the codebook."""
    arrays = read_released(path)
    shape = lambda name: shape_of(arrays, name, path)
    rows, dim = shape("Embed_0/word_embeddings/embedding")
    if rows < codebook_size + 2:
        raise ValueError(f"{path} has a vocabulary of {rows}, too small for {codebook_size} codes, the classes and [MASK]: "
                         f"it was trained with another tokenizer")
    positions, _ = shape("Embed_0/position_embeddings/embedding")
    _, heads, _ = shape("TransformerLayer_0/Attention_0/self_attention/query/kernel")
    _, mlp_dim = shape("TransformerLayer_0/Mlp_0/intermediate_output/kernel")
    depth = count(arrays, "TransformerLayer_")
    config = MaskGITConfig(codebook_size, rows - codebook_size - 1, positions - 1, dim, depth, heads, mlp_dim)
    return build(MaskGIT, config, arrays, released_arrays, path)


def write_released(model, path):
    """Writes a VQGAN or MaskGIT as the authors released theirs. Raises OSError, or ValueError for what has no place there."""
    msgpack = import_msgpack()
    if getattr(model.config, "groups", 32) != 32:
        raise ValueError(f"the released format means 32 groups in each GroupNorm, and this tokenizer has {model.config.groups}")
    if getattr(model.config, "null_class", False):
        raise ValueError("the released format has no null class, and this transformer was trained with --class-dropout")
    tree, weights, packer = {"params": {}}, model.state_dict(), msgpack.Packer()
    for ours, theirs, shape in released_arrays(model):
        for name, part in zip(theirs, weights[ours].chunk(len(theirs))):
            *folders, last = name.split("/")
            node = tree["params"]
            for folder in folders:
                node = node.setdefault(folder, {})
            node[last] = to_released(name, part, shape)

    def write(node, file):                                  # piece by piece, never the whole file in memory
        file.write(packer.pack_map_header(len(node)))
        for key, value in node.items():
            file.write(packer.pack(key))
            if isinstance(value, dict):
                write(value, file)
            else:
                array = value.contiguous().numpy()
                file.write(packer.pack(msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))))

    runtime.write_atomically(path, lambda file: write(tree, file))


# ---------------------------------------------------------------------------------------------------------- runs

URL = "https://storage.googleapis.com/maskgit-public/checkpoints/"
MODELS = {name: (f"tokenizer_{name}_checkpoint", f"maskgit_{name}_checkpoint") for name in ("imagenet256", "imagenet512")}


def convert(tokenizer_file, transformer_file, folder):
    """Writes a run from released files, with vqgan.pt and, unless its file is None, transformer.pt."""
    tokenizer = read_tokenizer(tokenizer_file)
    stages = {"vqgan": (tokenizer, tokenizer_file)}
    side, classes = 16, Path(__file__).with_name("imagenet_classes.txt").read_text().splitlines()
    if transformer_file:
        transformer = maskgit_from_jax(transformer_file, tokenizer.config.codebook_size)
        stages["transformer"] = (transformer, transformer_file)
        side = math.isqrt(transformer.config.num_tokens)
        if side * side != transformer.config.num_tokens:
            raise ValueError(f"{transformer_file} draws {transformer.config.num_tokens} tokens, which are no square image")
        if transformer.config.num_classes != len(classes):
            classes = [str(i) for i in range(transformer.config.num_classes)]
    folder.mkdir(parents=True, exist_ok=True)
    for stage, (model, source) in stages.items():
        checkpoint = {"kind": stage, "step": 0, "settings": {"source": str(source)}, "config": asdict(model.config),
                      "model": model.state_dict(), "data": "imagenet", "image_size": side * tokenizer.config.stride,
                      "classes": classes}
        if stage == "transformer":
            checkpoint["tokenizer"] = runtime.fingerprint(tokenizer)
        runtime.save_checkpoint(folder / f"{stage}.pt", checkpoint)
        (folder / f"{stage}.resume.pt").unlink(missing_ok=True)            # of the run that --overwrite replaces
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"wrote {folder}/{stage}.pt: {size:.2f} M parameters, {model.config}")


def export(run, tokenizer_file, transformer_file):
    """Writes both models of a run as released."""
    stages = ("vqgan", VQGANConfig, VQGAN, tokenizer_file), ("transformer", MaskGITConfig, MaskGIT, transformer_file)
    for stage, config_class, model_class, target in stages:
        model, _ = runtime.rebuild(run / f"{stage}.pt", stage, config_class, model_class)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_released(model, target)


KINDS = "vqgan transformer autoregressive classifier".split()                # the models a run may hold, the tokenizer first


def halve(run, folder):
    """Writes the models of a run to a folder in float16, as a run that every script takes (and computes with in float32)."""
    for stage in KINDS:
        if not (run / f"{stage}.pt").exists():
            continue
        checkpoint = runtime.load_checkpoint(run / f"{stage}.pt", stage)
        checkpoint["model"] = {name: value.half() if value.is_floating_point() else value for name, value in checkpoint["model"].items()}
        if stage == "vqgan":                                # rounded, it is another tokenizer: the transformers must know it again
            rounded = VQGAN(VQGANConfig(**checkpoint["config"]))
            fingerprint = runtime.fingerprint(runtime.load_weights(rounded, checkpoint["model"], run / "vqgan.pt"))
        if "tokenizer" in checkpoint:
            checkpoint["tokenizer"] = fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        runtime.save_checkpoint(folder / f"{stage}.pt", checkpoint)
        print(f"wrote {folder}/{stage}.pt: {(folder / f'{stage}.pt').stat().st_size / 1e6:.2f} MB")


# ---------------------------------------------------------------------------------------------------- command line

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="imagenet256 or imagenet512, to be fetched")
    parser.add_argument("--tokenizer", metavar="FILE", help="a released tokenizer that is at hand, or its PyTorch port")
    parser.add_argument("--transformer", metavar="FILE", help="a released transformer that is at hand")
    parser.add_argument("--run", metavar="DIR", help="the run to write (default: runs/NAME, after the model)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--offline", action="store_true", help="never use the network: take what is in the cache folder")
    parser.add_argument("--export", nargs=2, type=Path, metavar=("DIR", "RUN"), help="write RUN's models to DIR as released")
    parser.add_argument("--half", nargs=2, type=Path, metavar=("DIR", "RUN"), help="write RUN's models to DIR in float16")
    args = parser.parse_args()
    if args.half:
        folder, run = args.half
        targets = [folder / f"{stage}.pt" for stage in KINDS]
        runtime.load_checkpoint(run / "vqgan.pt", "vqgan")
    elif args.export:
        folder, run = args.export
        targets = [folder / f"{kind}_{run.resolve().name}_checkpoint" for kind in ("tokenizer", "maskgit")]
    elif args.model in MODELS or args.model is None and args.tokenizer and args.run:
        folder = Path(args.run or Path("runs", args.model))
        targets = [folder / f"{stage}.{ending}" for stage in ("vqgan", "transformer") for ending in ("pt", "resume.pt")]
    else:
        raise ValueError(f"{f'unknown model {args.model!r}' if args.model else 'no model was named'}: name one of "
                         f"{', '.join(MODELS)}, or files with --tokenizer, --transformer and --run")
    for path in targets:
        if path.exists() and not args.overwrite:
            raise ValueError(f"{path} is already there: use --overwrite to replace it, or name another folder")
    if args.half:
        return halve(run, folder)
    if args.export:
        export(run, *targets)
        print(f"wrote {targets[0]} and {targets[1]}")
        return
    files = args.tokenizer, args.transformer
    if args.model:
        import_msgpack()                                    # without it, there is no use in fetching
        files = [file or download(URL + name, name, offline=args.offline) for file, name in zip(files, MODELS[args.model])]
    convert(*files, folder)
    print(f"next: python {'sample.py' if files[1] else 'train_transformer.py --data imagenet'} --run {folder}")


if __name__ == "__main__":
    devices.command_line(main)
