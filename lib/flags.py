"""Flags: their types, tables of them, and the presets of the training scripts."""
import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from lib.errors import UserError

# ---- types

def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """Returns an argparse type: an int or float (kind) from `low` to `high`."""
    name = "a whole number" if kind is int else "a number"
    bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):         # not a number; a whole number of 400 digits
            finite = False
        if not finite or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"it must be {name} {bounds}, not {text}")
        return value
    return parse


count = number(int, 1)
whole = number(int, 0)
non_negative = number(float, 0)
fraction = number(float, 0, 1)
seed = number(int, 0, 2 ** 63 - 1)                  # what torch's generators take


def yes_or_no(text: str) -> bool:
    """Converts yes or no to a bool, as an argparse type."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"it must be yes or no, not {text}")
    return text == "yes"


def check_image_size(size: int, stride: int):
    """Raises UserError, which names the nearest sizes that work, if --image-size is no multiple of
    the tokenizer's stride, or too small for the discriminator."""
    smallest = math.ceil(8 / stride) * stride
    if size < smallest:
        raise UserError(f"--image-size {size} is too small: with the tokenizer's stride {stride}, "
                        f"the smallest is {smallest} (the tokenizer's discriminator needs 8 "
                        f"pixels)")
    if size % stride:
        below = size - size % stride
        raise UserError(f"--image-size {size} is not divisible by the tokenizer's stride {stride}: "
                        f"choose {below} or {below + stride}")


# ---- parsers and tables of flags

class Parser(argparse.ArgumentParser):
    """Parses a command line. A bad flag is a UserError, without argparse's list of all flags.

    description: for --help, which shows its lines as they are."""

    def __init__(self, description: str):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help explains all flags)")


def add_flags(parser: argparse._ActionsContainer, table: dict):
    """Adds the flags of a table {name: (type, default, help)}, in its order.

    In place of a type may stand a list of choices, or a dict of argparse's own options."""
    for name, (type_or_choices, default, text) in table.items():
        if isinstance(type_or_choices, dict):
            options = type_or_choices
        elif isinstance(type_or_choices, list):
            options = {"choices": type_or_choices}
        else:
            options = {"type": type_or_choices, "metavar": name.split("_")[-1].upper()}
        if default is not None:
            text += " (default: %(default)s)"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=default, help=text, **options)


def add_machine_flags(parser: argparse.ArgumentParser, compiles: bool = True):
    """Adds the flags that say where to run. compiles: whether the script can use torch.compile."""
    add_flags(parser, {
        "device": (["auto", "cpu", "cuda", "xla"], "auto",
                   "auto: cuda if there is a GPU, else cpu; xla: TPU"),
        "bf16": (yes_or_no, None, "yes or no: products and convolutions in bfloat16 (default: yes, "
                                  "but no on a CPU or GPU without instructions for it)"),
    })
    if compiles:
        add_flags(parser, {
            "compile": (yes_or_no, None,
                        "yes or no: torch.compile (default: yes on cuda where it works, and for a "
                        "transformer's long training on a CPU)"),
        })


def parse(parser: argparse.ArgumentParser,
          arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line, or other words in its place.

    One attribute more is `given`: the names of the flags that the user gave; the others have their
    defaults."""
    args = parser.parse_args(arguments)
    without_defaults = argparse.Namespace(**dict.fromkeys(vars(args)))
    parser.parse_args(arguments, without_defaults)
    args.given = {name for name, value in vars(without_defaults).items() if value is not None}
    return args


def refuse_useless(args: argparse.Namespace, names: Iterable[str], reason: str):
    """Raises UserError if the user gave one of these flags, although it changes nothing.

    args: from parse(). reason: why, as in `--seeds changes nothing without --sweep`."""
    for name in names:
        if name in args.given:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} changes nothing {reason}: leave it out")


# ---- training flags and their presets

def presets(flags: dict, variants: dict) -> dict[str, dict]:
    """Returns {preset: {flag: value}}.

    flags: {flag: (type, its value for `shapes`, for `cifar10`, for `imagenet`, help)}.
    variants: further presets, {name: (the preset it follows, {flag: value} where it differs)}."""
    table = {"shapes": {}, "cifar10": {}, "imagenet": {}}
    for flag, (_, shapes, cifar10, imagenet, _) in flags.items():
        table["shapes"][flag] = shapes
        table["cifar10"][flag] = cifar10
        table["imagenet"][flag] = imagenet
    for name, (base, changes) in variants.items():
        table[name] = table[base] | changes
    return table


def parse_training_flags(
        description: str, flags: dict, values: dict[str, dict],
        other_flags: dict) -> argparse.Namespace:
    """Reads the command line of a training script. Raises UserError for a bad flag.

    flags: as for presets(), which makes `values`. other_flags: as for add_flags(). A flag that is
    not given has the value of the preset: the data set's, `folder` for any folder of images, or the
    one that --preset names. The attribute `given` is that of parse()."""
    parser = Parser(description)
    resume_or_overwrite = parser.add_mutually_exclusive_group()
    add_flags(parser, {
        "data": (str, "shapes",
                 "shapes, cifar10, imagenet, places2, or a folder with a subfolder for each class"),
        "preset": (list(values), None,
                   "the data set whose settings to take (default: the data's own, or folder)"),
        "run": (str, None, "the run's folder (default: runs/NAME, after the data)"),
        "init": (str, None,
                 "a run whose model to start from, such as runs/imagenet256; its sizes replace the "
                 "flags'"),
    })
    add_flags(resume_or_overwrite, {
        "resume": ({"action": "store_true"}, None,
                   "go on where the run stopped; start it if there is nothing to go on from"),
        "overwrite": ({"action": "store_true"}, None,
                      "start again, and replace what the run's folder holds"),
    })
    add_flags(parser, {
        "dry_run": ({"type": number(float, 0.001), "metavar": "TFLOPS"}, None,
                    "print what the run would take at this many TFLOP/s, and exit"),
    })
    add_flags(parser, other_flags)
    for flag, (type_or_choices, *_, text) in flags.items():
        text += f" (default: {shown_default(flag, values)})"
        add_flags(parser, {flag: (type_or_choices, None, text)})
    add_flags(parser, {
        "seed": (seed, 0, "seed of every random draw"),
        "workers": (whole, None,
                    "processes that read ahead (default: none for data in memory, else up to 16)"),
    })
    add_machine_flags(parser)
    args = parse(parser)
    if args.preset is None:
        args.preset = default_preset(args.data, values)
    args.run = Path(args.run or Path("runs", Path(args.data).name))
    for flag, value in values[args.preset].items():
        if getattr(args, flag) is None:
            setattr(args, flag, list(value) if isinstance(value, tuple) else value)
    return args


def default_preset(data: str, values: dict[str, dict]) -> str:
    """Returns the preset of a data set: its own, or `folder`. values: from presets()."""
    return data if data in values else "folder"


def shown_default(flag: str, values: dict[str, dict]) -> str:
    """Returns what --help says of a default: its value, or that of each preset if they differ."""
    defaults = {preset: value_as_typed(of_preset[flag]) for preset, of_preset in values.items()}
    if len(set(defaults.values())) == 1:
        return defaults["shapes"]
    return ", ".join(f"{preset}: {default}" for preset, default in defaults.items())


def value_as_typed(value: object) -> str:
    """Returns a flag's value as one would type it; None stands for no limit."""
    if value is None:
        return "all"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)
