"""Converts the authors' released models, and a PyTorch port of the tokenizer, to runs and back.

    python pretrained.py imagenet256            # or imagenet512: fetches both models, writes a run
    python sample.py --run runs/imagenet256 --class tench "golden retriever"
    python pretrained.py --tokenizer FILE [--transformer FILE] --run DIR    # from files at hand
    python pretrained.py --export DIR RUN       # a run's two models in the released format
    python pretrained.py --half DIR RUN         # a run in float16: half the size

Fetched files are kept in the cache folder, ~/.cache/maskgit. No file that is read can run code.
"""
import argparse
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from lib import files
from lib.data import IMAGENET_CLASSES
from lib.flags import UserError, command_line
from lib.flax import import_msgpack, read_arrays, write_arrays
from lib.layouts import port_arrays, released_arrays
from maskgit import MaskGIT
from vqgan import VQGAN

URL = "https://storage.googleapis.com/maskgit-public/checkpoints/"
MODELS = ["imagenet256", "imagenet512"]
STAGES = ["vqgan", "transformer", "autoregressive", "classifier"]       # what a run may hold
PORT = "maskgit-vqgan-imagenet-f16-256.bin"             # the tokenizer in open-muse, 1d-tokenizer
READABLE = (f"pretrained.py reads the authors' released files (Flax msgpack) and the tokenizer's "
            f"PyTorch port ({PORT}), but no safetensors files or Lightning checkpoints (.ckpt)")


# ------------------------------------------------------------------------------- file -> our model

class ReleasedFile:
    """The arrays of a file by name, each of which is to be used once. path: for messages."""

    def __init__(self, path: Path | str, arrays: dict[str, Tensor]):
        self.path = path
        self.arrays = arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an array. Raises UserError if there is none."""
        if name not in self.arrays:
            raise UserError(f"{self.path}: parameter {name} is missing: this is another model, or "
                            f"a part of one; {READABLE}")
        return tuple(self.arrays[name].shape)

    def count(self, start: str) -> int:
        """Returns how many different numbers follow `start` in the names."""
        numbers = set()
        for name in self.arrays:
            if name.startswith(start):
                numbers.add(re.match(r"\d*", name.removeprefix(start)).group())
        return len(numbers)

    def build(self, model_class: type, config: object, layout: Callable) -> nn.Module:
        """Returns a model with these arrays, in eval mode.

        layout: released_arrays or port_arrays. Raises UserError if the file has too few, too many
        or misshapen arrays."""
        with torch.device("meta"):                      # takes no time for a random start
            model = model_class(config)
        model = model.to_empty(device="cpu")
        for name, ours in layout(model):
            shape = self.shape(name)
            if shape != tuple(ours.shape):
                raise UserError(f"{self.path}: parameter {name} has shape {shape}, but "
                                f"{tuple(ours.shape)} is expected: this is another model")
            ours.copy_(self.arrays.pop(name))
        if self.arrays:
            raise UserError(f"{self.path}: parameter {next(iter(self.arrays))} is unexpected: this "
                            f"is another model")
        return model.eval()


def vqgan_from_jax(path: Path | str) -> VQGAN:
    """Returns the tokenizer of the authors' released file or of its PyTorch port, in eval mode.

    Its configuration is read off the shapes. Raises UserError if the file cannot be read, is
    damaged, or has a parameter too many or too few, which it names."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: check its name") from error
    if start[4:] == b"\0\0\0\0{":                       # the length of a header, then JSON
        raise UserError(f"{path} is a safetensors file: {READABLE}")
    if start.startswith((b"PK", b"\x80\x02")):          # torch.save: a zip archive, or a pickle
        return vqgan_from_port(path)
    file = ReleasedFile(path, read_arrays(path))
    codebook_size, codebook_dim = file.shape("quantizer/codebook")
    filters = file.shape("encoder/Conv_0/kernel")[-1]
    file.shape("decoder/Conv_0/kernel")                 # raises if there is no decoder
    levels = file.count("decoder/Conv_") - 1            # into it, up between levels, and out of it
    res_blocks = file.count("encoder/ResBlock_") // (levels + 1)
    widths = []
    for level in range(levels):
        widths.append(file.shape(f"encoder/ResBlock_{level * res_blocks}/Conv_0/kernel")[-1])
    config = tokenizer_config(path, codebook_size, codebook_dim, filters, widths, res_blocks)
    return file.build(VQGAN, config, released_arrays)


def vqgan_from_port(path: Path | str) -> VQGAN:
    """Returns the tokenizer of the PyTorch port, as vqgan_from_jax() does."""
    try:
        arrays = files.load_tensors(path)
    except UserError as error:                          # Lightning's often cannot be loaded safely
        raise UserError(f"{error}; {READABLE}") from error
    file = ReleasedFile(path, arrays)
    codebook_size, codebook_dim = file.shape("quantize.embedding.weight")
    filters = file.shape("encoder.conv_in.weight")[0]
    widths = []
    for level in range(file.count("encoder.down.")):
        widths.append(file.shape(f"encoder.down.{level}.block.0.conv1.weight")[0])
    res_blocks = file.count("encoder.mid.")
    config = tokenizer_config(path, codebook_size, codebook_dim, filters, widths, res_blocks)
    return file.build(VQGAN, config, port_arrays)


def tokenizer_config(
    path: Path | str, codebook_size: int, codebook_dim: int, filters: int, widths: list[int],
    res_blocks: int,
) -> VQGAN.Config:
    """Returns the configuration of a released tokenizer. Raises UserError if there can be none.

    widths: channels at each resolution, the finest first. GroupNorm has 32 groups as released: the
    shapes do not tell how many."""
    if not widths or not res_blocks or filters % 32:
        raise UserError(f"{path} is not a tokenizer as released: it has {len(widths)} resolutions, "
                        f"{res_blocks} residual blocks and {filters} filters; {READABLE}")
    multipliers = tuple(width // filters for width in widths)
    return VQGAN.Config(codebook_size, codebook_dim, filters, multipliers, res_blocks)


def maskgit_from_jax(path: Path | str, codebook_size: int = 1024) -> MaskGIT:
    """Returns the transformer of the authors' released file, in eval mode.

    Its configuration is read off the shapes. codebook_size: of its tokenizer; the other rows of the
    embedding are classes and [MASK]. Raises UserError as vqgan_from_jax() does, and if the
    embedding is too small for the codebook."""
    file = ReleasedFile(path, read_arrays(path))
    rows, dim = file.shape("Embed_0/word_embeddings/embedding")
    if rows < codebook_size + 2:
        raise UserError(f"{path} has a vocabulary of {rows}, too small for {codebook_size} codes, "
                        f"the classes and [MASK]: it was trained with another tokenizer")
    positions, _ = file.shape("Embed_0/position_embeddings/embedding")
    _, heads, _ = file.shape("TransformerLayer_0/Attention_0/self_attention/query/kernel")
    _, mlp_dim = file.shape("TransformerLayer_0/Mlp_0/intermediate_output/kernel")
    config = MaskGIT.Config(
        codebook_size=codebook_size, num_classes=rows - codebook_size - 1,
        num_tokens=positions - 1, dim=dim, depth=file.count("TransformerLayer_"), heads=heads,
        mlp_dim=mlp_dim)
    return file.build(MaskGIT, config, released_arrays)


# ------------------------------------------------------------------------------- our model -> file

def write_released(model: VQGAN | MaskGIT, path: Path | str) -> None:
    """Writes a model as the authors released theirs.

    Raises UserError if the format has no place for something in it."""
    config = model.config
    if isinstance(model, VQGAN) and config.groups != 32:
        raise UserError(f"the released format means 32 groups in each GroupNorm, but this "
                        f"tokenizer has {config.groups}: it cannot be exported")
    if isinstance(model, VQGAN) and config.quantizer != "vq":
        raise UserError(f"the released format has a codebook, but this tokenizer was trained with "
                        f"--quantizer {config.quantizer}: it cannot be exported")
    if isinstance(model, MaskGIT) and config.null_class:
        raise UserError("the released format has no null class, but this transformer was trained "
                        "with --class-dropout: it cannot be exported")
    write_arrays(dict(released_arrays(model)), path)


# ------------------------------------------------------------------------------------- the commands

def convert(args: argparse.Namespace, folder: Path) -> None:
    """Writes a run from the released files that the flags name, or from those of args.model.

    Without a transformer, the run holds only the tokenizer, for which one can be trained."""
    tokenizer_file = args.tokenizer
    transformer_file = args.transformer
    if args.model:
        import_msgpack()                                # before 1 GB is fetched in vain
        if not tokenizer_file:
            name = f"tokenizer_{args.model}_checkpoint"
            tokenizer_file = files.download(URL + name, name, offline=args.offline)
        if not transformer_file:
            name = f"maskgit_{args.model}_checkpoint"
            transformer_file = files.download(URL + name, name, offline=args.offline)
    tokenizer = vqgan_from_jax(tokenizer_file)
    classes = IMAGENET_CLASSES
    side = 16                                           # tokens along each side
    transformer = None
    if transformer_file:
        transformer = maskgit_from_jax(transformer_file, tokenizer.config.codebook_size)
        config = transformer.config
        side = math.isqrt(config.num_tokens)
        if side * side != config.num_tokens:
            raise UserError(f"{transformer_file} draws {config.num_tokens} tokens, which are no "
                            f"square image: only square ones can be drawn")
        if config.num_classes != len(classes):
            classes = [str(i) for i in range(config.num_classes)]

    about = {"data": "imagenet", "image_size": side * tokenizer.config.stride, "classes": classes}
    save_model(folder, "vqgan", tokenizer, tokenizer_file, about)
    quoted = shlex.quote(str(folder))
    if transformer:
        about["tokenizer"] = files.fingerprint(tokenizer)
        save_model(folder, "transformer", transformer, transformer_file, about)
        print(f"Next: python sample.py --run {quoted}")
    else:
        print(f"Next: python train_transformer.py --data imagenet --run {quoted}")


def save_model(folder: Path, stage: str, model: nn.Module, source: Path | str, about: dict) -> None:
    """Writes a converted model to a run. about: what its file holds besides the model."""
    checkpoint = {
        "kind": stage,
        "step": 0,
        "settings": {"source": str(source)},
        "config": asdict(model.config),
        "model": model.state_dict(),
        **about,
    }
    path = folder / f"{stage}.pt"
    files.save_checkpoint(path, checkpoint)
    (folder / f"{stage}.resume.pt").unlink(missing_ok=True)         # of a run that is replaced
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"wrote {path}: {size:.2f} M parameters, {model.config}")


def export(run: Path, tokenizer_file: Path, transformer_file: Path) -> None:
    """Writes both models of a run as the authors released theirs."""
    tokenizer, _ = files.rebuild(run / "vqgan.pt", "vqgan", VQGAN)
    transformer, _ = files.rebuild(run / "transformer.pt", "transformer", MaskGIT)
    write_released(tokenizer, tokenizer_file)
    print(f"wrote {tokenizer_file}")
    write_released(transformer, transformer_file)
    print(f"wrote {transformer_file}")


def halve(run: Path, folder: Path) -> None:
    """Writes the models of a run to a folder in float16, which every script reads as float32."""
    for stage in STAGES:
        source = run / f"{stage}.pt"
        if stage != "vqgan" and not source.exists():
            continue
        checkpoint = files.load_checkpoint(source, stage)
        weights = checkpoint["model"]
        for name, value in weights.items():
            if value.is_floating_point():
                weights[name] = value.half()
        if "tokenizer" in checkpoint:                   # a rounded one gives other tokens
            tokenizer, _ = files.rebuild(folder / "vqgan.pt", "vqgan", VQGAN)
            checkpoint["tokenizer"] = files.fingerprint(tokenizer)
        target = folder / f"{stage}.pt"
        files.save_checkpoint(target, checkpoint)
        print(f"wrote {target}: {target.stat().st_size / 1e6:.2f} MB")


def refuse_to_replace(paths: list[Path], overwrite: bool) -> None:
    """Raises UserError if a file is there already and --overwrite is not given."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} is already there: use --overwrite to replace it, or name "
                            f"another folder")


def main() -> None:
    """Parses the flags and runs the command that they ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="imagenet256 or imagenet512, which is fetched")
    parser.add_argument("--tokenizer", metavar="FILE",
                        help=f"a released tokenizer, or its PyTorch port ({PORT})")
    parser.add_argument("--transformer", metavar="FILE", help="a released transformer")
    parser.add_argument("--run", metavar="DIR",
                        help="the run to write (default: runs/NAME, after the model)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--offline", action="store_true",
                        help="use only what is in the cache folder, never the network")
    pair = {"nargs": 2, "type": Path, "metavar": ("DIR", "RUN")}
    parser.add_argument("--export", **pair, help="write RUN's models to DIR as released")
    parser.add_argument("--half", **pair, help="write RUN's models to DIR in float16")
    args = parser.parse_args()

    if args.half:
        folder, run = args.half
        refuse_to_replace([folder / f"{stage}.pt" for stage in STAGES], args.overwrite)
        halve(run, folder)
    elif args.export:
        folder, run = args.export
        name = run.resolve().name
        targets = [folder / f"tokenizer_{name}_checkpoint", folder / f"maskgit_{name}_checkpoint"]
        refuse_to_replace(targets, args.overwrite)
        export(run, *targets)
    elif args.model in MODELS or (not args.model and args.tokenizer and args.run):
        folder = Path(args.run or Path("runs", args.model))
        names = ["vqgan.pt", "vqgan.resume.pt", "transformer.pt", "transformer.resume.pt"]
        refuse_to_replace([folder / name for name in names], args.overwrite)
        convert(args, folder)
    else:
        problem = f"unknown model '{args.model}'" if args.model else "no model was named"
        raise UserError(f"{problem}: name one of {', '.join(MODELS)}, or give --tokenizer, "
                        f"--transformer and --run")


if __name__ == "__main__":
    command_line(main, interrupted="stopped by Ctrl-C: run it again; files that were fetched whole "
                                   "are kept")
