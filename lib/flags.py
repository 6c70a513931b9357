"""Flags and their types, what a mistake of the user is, and the entry point of every script."""
import argparse
import math
import os
import sys
from pathlib import Path

import torch


class UserError(ValueError):
    """A mistake of the user: its text is one line that names the input, what is wrong with it, and the remedy."""


def command_line(main):
    """Runs a script's main(): a ValueError or OSError becomes one line on stderr and exit status 2.

    TRACEBACK=1 in the environment shows where it came from."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped: started again, an evaluation goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        text = " ".join(str(error).split())
        if out_of_memory(error):
            text = ("out of memory: in training lower --micro-batch (the result stays that of --batch) or the model's "
                    "sizes, else the number of images at once (--num, --batch)")
        elif not isinstance(error, UserError) or os.environ.get("TRACEBACK"):
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


def out_of_memory(error):
    """Whether an error of torch says so, of a GPU or of the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def check_memory(size, flag):
    """Raises ValueError where so many bytes, which `flag` asks for, are more than this machine's memory."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if size > there:
        raise ValueError(f"{flag} would take {size / 1e9:.4g} GB of memory, and this machine has {there / 1e9:.4g}: "
                         f"ask for fewer images")


def number(kind, low, high=math.inf):
    """An argparse type: an int or float (kind) from `low` to `high`; says so where it is not."""
    def parse(text):
        bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or not math.isfinite(value):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"it must be {what} {bounds}, not {text}")
        return value
    return parse


count, whole = number(int, 1), number(int, 0)              # how many there are; how many, or none


positive, share = number(float, 0), number(float, 0, 1)    # 0 or more; from none to all


def yes_or_no(text):
    """argparse type: yes or no."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"it must be yes or no, not {text}")
    return text == "yes"


def add_flags(parser, table):
    """Adds flags in the order of a table {name: (kind, default, help)}.

    kind: a type, a list of choices, or a dict of argparse's own options."""
    for name, (kind, default, text) in table.items():
        options = kind
        if isinstance(kind, list):
            options = {"choices": kind}
        elif not isinstance(kind, dict):
            options = {"type": kind, "metavar": name.split("_")[-1].upper()}
        shown = "" if default is None else " (default: %(default)s)"
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=text + shown, **options)


def add_machine_flags(parser, compiles=True):
    """The flags that say where to run, for every script. compiles: whether torch.compile serves it."""
    add_flags(parser, {
        "device": (["auto", "cpu", "cuda", "xla"], "auto", "auto: cuda where there is one, else cpu; xla: TPU"),
        "bf16": (yes_or_no, None, "yes or no: products and convolutions in bfloat16 (default: unless a CPU has none)")})
    if compiles:
        add_flags(parser, {"compile": (yes_or_no, None, "yes or no: torch.compile (default: yes on cuda)")})


# How often a run says, shows and keeps something: a row as in the scripts' tables, decisive for no result.
PACE = {
    "log_every": (count, 50, 50, 50, "steps between log lines"),
    "picture_every": (count, 500, 1000, 5000, "steps between validations, with a picture"),
    "save_every": (count, 500, 1000, 2000, "steps between checkpoints"),
}


def presets(flags, others):
    """{name: {flag: value}} of every preset, PACE included.

    flags: {flag: (type, its value for `shapes`, `cifar10` and `imagenet`, help)}. others: {name: (the preset that it
    follows, {flag: value} where it does not)}."""
    table = {name: {flag: row[column] for flag, row in (flags | PACE).items()}
             for column, name in enumerate(("shapes", "cifar10", "imagenet"), 1)}
    return table | {name: table[base] | changes for name, (base, changes) in others.items()}


def parse_training_flags(description, flags, presets, own_flags):
    """The flags of a training script: those of both, its own, its hyperparameters. Exits with status 2 on bad ones.

    flags, presets: as above. own_flags: as for add_flags. A preset's value stands unless its flag is given. The preset
    is that of the data set, `folder` for any folder of images, or the one named by --preset."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, {
        "data": (str, "shapes", "shapes, cifar10, imagenet, places2, or a folder with a subfolder for each class"),
        "preset": (list(presets), None, "the data set whose settings to take (default: the data's own, or folder)"),
        "run": (str, None, "the run's folder (default: runs/NAME, after the data)"),
        "init": (str, None, "a run whose model to start from, sizes included, such as runs/imagenet256"),
        "resume": ({"action": "store_true"}, None, "go on where the run stopped; start, if there is none"),
        "overwrite": ({"action": "store_true"}, None, "start again, replacing what the run folder holds"),
        "dry_run": (number(float, 0.001), None, "say what the run would take at so many TFLOP/s, and end"),
        **own_flags,
        **{name: (kind, None, f"{text} (default: {shown_default(name, presets)})")
           for name, (kind, *_, text) in (flags | PACE).items()},
        "seed": (whole, 0, "of every random draw"),
        "workers": (whole, None, "processes that read ahead (default: none for data in memory, else up to 16)")})
    add_machine_flags(parser)
    args = parser.parse_args()
    args.preset = args.preset or (args.data if args.data in presets else "folder")
    args.run = Path(args.run or Path("runs", Path(args.data).name))
    for name, value in presets[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def shown_default(flag, presets):
    """What --help says of a flag's default: its value, or, where the presets differ, that of each."""
    words, values = {"None": "all", "True": "yes", "False": "no"}, {}
    for name, preset in presets.items():
        text = " ".join(map(str, preset[flag])) if isinstance(preset[flag], tuple) else str(preset[flag])
        values[name] = words.get(text, text)
    if len(set(values.values())) == 1:
        return values["shapes"]
    return ", ".join(f"{name}: {value}" for name, value in values.items())
