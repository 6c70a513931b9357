"""Converts the authors' released models, and a PyTorch port of the tokenizer, to runs and back.

    python pretrained.py imagenet256            # or imagenet512: fetches both models, writes a run
    python sample.py --run runs/imagenet256 --class tench "golden retriever"
    python pretrained.py --tokenizer FILE [--transformer FILE] --run DIR    # from files at hand
    python pretrained.py --export DIR RUN       # a run's two models in the released format
    python pretrained.py --half DIR RUN         # a run in float16: half the size

Fetched files are kept in the cache folder, ~/.cache/maskgit. Reading a file never runs code in it.
"""
import argparse
import math
import os
import shlex
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from lib import files
from lib.data import IMAGENET_CLASSES
from lib.errors import UserError, command_line
from lib.flags import Parser
from lib.flax import import_msgpack, read_arrays, write_arrays
from lib.layouts import PORT, READABLE, ReleasedFile, port_arrays, released_arrays
from maskgit import MaskGIT
from vqgan import VQGAN

URL = "https://storage.googleapis.com/maskgit-public/checkpoints/"
MODELS = ["imagenet256", "imagenet512"]
STAGES = ["vqgan", "transformer", "autoregressive", "classifier"]       # what a run may hold


# ------------------------------------------------------------------------------- file -> our model

def vqgan_from_jax(path: Path | str) -> VQGAN:
    """Returns the tokenizer of the authors' released file or of its PyTorch port, in eval mode.

    Its configuration is read off the shapes. Raises UserError if the file cannot be read or is
    damaged, or names the parameter that is missing, misshapen or left over."""
    if is_torch_file(path):
        file = ReleasedFile(path, read_port(path))
        codebook_size, codebook_dim = file.shape("quantize.embedding.weight", 2)
        filters = file.shape("encoder.conv_in.weight", 4)[0]
        res_blocks = file.count("encoder.mid.")
        widths = []                                     # channels at each resolution, finest first
        for level in range(file.count("encoder.down.")):
            widths.append(file.shape(f"encoder.down.{level}.block.0.conv1.weight", 4)[0])
        layout = port_arrays
    else:
        file = ReleasedFile(path, read_arrays(path))
        codebook_size, codebook_dim = file.shape("quantizer/codebook", 2)
        filters = file.shape("encoder/Conv_0/kernel", 4)[-1]
        file.shape("decoder/Conv_0/kernel", 4)          # raises if there is no decoder
        levels = file.count("decoder/Conv_") - 1        # into it, up between levels, and out of it
        res_blocks = file.count("encoder/ResBlock_") // (levels + 1)
        widths = []
        for level in range(levels):
            kernel = f"encoder/ResBlock_{level * res_blocks}/Conv_0/kernel"
            widths.append(file.shape(kernel, 4)[-1])
        layout = released_arrays
    if not widths or not res_blocks or filters % 32:    # GroupNorm has 32 groups as released
        raise UserError(f"{path} is not a tokenizer as released: it has {len(widths)} resolutions, "
                        f"{res_blocks} residual blocks and {filters} filters; {READABLE}")
    multipliers = tuple(width // filters for width in widths)
    config = VQGAN.Config(codebook_size, codebook_dim, filters, multipliers, res_blocks)
    return file.build(VQGAN, config, layout)


def is_torch_file(path: Path | str) -> bool:
    """Returns whether torch.save wrote a file, as a zip archive or a pickle.

    Raises UserError if it cannot be read, or is a safetensors file."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: check its name") from error
    if start[4:] == b"\0\0\0\0{":                       # the length of a header, then JSON
        raise UserError(f"{path} is a safetensors file: {READABLE}")
    return start.startswith((b"PK", b"\x80\x02"))


def read_port(path: Path | str) -> dict[str, Tensor]:
    """Returns the arrays of the PyTorch port by name. Raises UserError if that cannot be done."""
    try:
        return files.load_tensors(path)
    except UserError as error:                          # Lightning's often cannot be loaded safely
        raise UserError(f"{error}; {READABLE}") from error


def maskgit_from_jax(path: Path | str, codebook_size: int = 1024) -> MaskGIT:
    """Returns the transformer of the authors' released file, in eval mode.

    Its configuration is read off the shapes. codebook_size: of its tokenizer; the other rows of the
    embedding are classes and [MASK]. Raises UserError as vqgan_from_jax() does, and if the
    embedding is too small for the codebook."""
    file = ReleasedFile(path, read_arrays(path))
    rows, dim = file.shape("Embed_0/word_embeddings/embedding", 2)
    if rows < codebook_size + 2:
        raise UserError(f"{path} has a vocabulary of {rows}, too small for {codebook_size} codes, "
                        f"the classes and [MASK]: it was trained with another tokenizer")
    positions, _ = file.shape("Embed_0/position_embeddings/embedding", 2)
    _, heads, _ = file.shape("TransformerLayer_0/Attention_0/self_attention/query/kernel", 3)
    _, mlp_dim = file.shape("TransformerLayer_0/Mlp_0/intermediate_output/kernel", 2)
    config = MaskGIT.Config(
        codebook_size=codebook_size, num_classes=rows - codebook_size - 1,
        num_tokens=positions - 1, dim=dim, depth=file.count("TransformerLayer_"), heads=heads,
        mlp_dim=mlp_dim)
    return file.build(MaskGIT, config, released_arrays)


# ------------------------------------------------------------------------------- our model -> file

def write_released(model: VQGAN | MaskGIT, path: Path | str) -> None:
    """Writes a model as the authors released theirs. For UserError see check_exportable()."""
    check_exportable(model)
    write_arrays(dict(released_arrays(model)), path)


def check_exportable(model: VQGAN | MaskGIT) -> None:
    """Raises UserError if the released format has no place for something in a model."""
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


# ------------------------------------------------------------------------------------- the commands

def convert(args: argparse.Namespace, folder: Path) -> None:
    """Writes a run from the released files that the flags name, or from those of args.model.

    Without a transformer, the run holds the tokenizer alone, for a transformer to be trained."""
    refuse_to_replace(run_files(folder), args.overwrite)
    tokenizer_file = args.tokenizer
    transformer_file = args.transformer
    if args.model:
        import_msgpack()                                # before 1 GB is fetched in vain
        tokenizer_file = tokenizer_file or fetch("tokenizer", args)
        transformer_file = transformer_file or fetch("maskgit", args)
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
    written = ["vqgan"]
    if transformer:
        written.append("transformer")
        about["tokenizer"] = files.fingerprint(tokenizer)
        save_model(folder, "transformer", transformer, transformer_file, about)
        print(f"Next: python sample.py --run {quoted}")
    else:
        print(f"Next: python train_transformer.py --data imagenet --run {quoted}")
    remove_others(folder, written)


def fetch(kind: str, args: argparse.Namespace) -> Path:
    """Returns the path of a released file, fetched if needed. kind: tokenizer or maskgit."""
    name = f"{kind}_{args.model}_checkpoint"
    return files.download(URL + name, name, offline=args.offline)


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
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"wrote {path}: {size:.2f} M parameters, {model.config}")


def export(run: Path, folder: Path, overwrite: bool) -> None:
    """Writes both models of a run to a folder as the authors released theirs."""
    name = run.resolve().name
    tokenizer_file = folder / f"tokenizer_{name}_checkpoint"
    transformer_file = folder / f"maskgit_{name}_checkpoint"
    refuse_to_replace([tokenizer_file, transformer_file], overwrite)
    tokenizer, _ = files.rebuild(run / "vqgan.pt", "vqgan", VQGAN)
    transformer, checkpoint = files.rebuild(run / "transformer.pt", "transformer", MaskGIT)
    check_tokenizer(run, checkpoint, tokenizer)
    check_exportable(transformer)                       # before the tokenizer is written
    write_released(tokenizer, tokenizer_file)
    write_released(transformer, transformer_file)
    print(f"wrote {tokenizer_file} and {transformer_file}")


def halve(run: Path, folder: Path, overwrite: bool) -> None:
    """Writes the models of a run to a folder in float16, which every script reads as float32."""
    refuse_to_replace(run_files(folder), overwrite)
    tokenizer, _ = files.rebuild(run / "vqgan.pt", "vqgan", VQGAN)
    checkpoints = {}                                    # all are read before the first is written
    for stage in STAGES:
        source = run / f"{stage}.pt"
        if source.exists():
            checkpoints[stage] = files.load_checkpoint(source, stage)
            if "tokenizer" in checkpoints[stage]:
                check_tokenizer(run, checkpoints[stage], tokenizer)
    rounded = files.fingerprint(tokenizer.half().float())
    for stage, checkpoint in checkpoints.items():
        weights = checkpoint["model"]
        for name, value in weights.items():
            if value.is_floating_point():
                weights[name] = value.half()
        if "tokenizer" in checkpoint:
            checkpoint["tokenizer"] = rounded
        target = folder / f"{stage}.pt"
        files.save_checkpoint(target, checkpoint)
        print(f"wrote {target}: {target.stat().st_size / 1e6:.2f} MB")
    if not os.path.samefile(folder, run):
        remove_others(folder, list(checkpoints))


def check_tokenizer(run: Path, checkpoint: dict, tokenizer: VQGAN) -> None:
    """Raises UserError if a transformer of a run was trained with another tokenizer."""
    if checkpoint["tokenizer"] != files.fingerprint(tokenizer):
        raise UserError(f"{run / checkpoint['kind']}.pt was trained with another tokenizer than "
                        f"{run / 'vqgan.pt'}: train it again, or move it to another folder")


def run_files(folder: Path) -> list[Path]:
    """Returns the paths of all models that a run may hold, and of the states of their training."""
    endings = ("pt", "best.pt", "resume.pt")
    return [folder / f"{stage}.{ending}" for ending in endings for stage in STAGES]


def remove_others(folder: Path, written: list[str]) -> None:
    """Removes the other models of a run that was replaced, and the states of their training, so
    that no old transformer stays beside the new tokenizer. written: the new stages."""
    for path in run_files(folder):
        if path.exists() and path.stem not in written:
            path.unlink()
            print(f"removed {path}, of the run that was replaced")


def refuse_to_replace(paths: list[Path], overwrite: bool) -> None:
    """Raises UserError if a file is there already and --overwrite is not given."""
    for path in paths:
        if os.path.exists(path) and not overwrite:
            raise UserError(f"{path} is already there: use --overwrite to replace it, or name "
                            f"another folder")


def main() -> None:
    """Parses the flags and runs the command that they ask for."""
    parser = Parser(__doc__)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("model", nargs="?", choices=MODELS, help="a released model, to be fetched")
    parser.add_argument("--tokenizer", metavar="FILE",
                        help=f"a released tokenizer, or its PyTorch port ({PORT})")
    parser.add_argument("--transformer", metavar="FILE", help="a released transformer")
    parser.add_argument("--run", metavar="DIR",
                        help="the run to write (default: runs/NAME, after the model)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--offline", action="store_true",
                        help="use only what is in the cache folder, never the network")
    pair = {"nargs": 2, "type": Path, "metavar": ("DIR", "RUN")}
    task.add_argument("--export", **pair, help="write RUN's models to DIR as released")
    task.add_argument("--half", **pair, help="write RUN's models to DIR in float16")
    args = parser.parse_args()

    if (args.half or args.export) and (
            args.tokenizer or args.transformer or args.run or args.offline):
        raise UserError("--half and --export read a run, RUN, and write DIR: leave --tokenizer, "
                        "--transformer, --run and --offline out")
    if args.half:
        folder, run = args.half
        halve(run, folder, args.overwrite)
    elif args.export:
        folder, run = args.export
        export(run, folder, args.overwrite)
    elif args.model or (args.tokenizer and args.run):
        convert(args, Path(args.run or Path("runs", args.model)))
    else:
        raise UserError(f"no model was named: name one of {', '.join(MODELS)}, or give "
                        f"--tokenizer and --run, and --transformer if there is one")


if __name__ == "__main__":
    command_line(main, interrupted="stopped by Ctrl-C: run it again; files that were fetched whole "
                                   "are kept")
