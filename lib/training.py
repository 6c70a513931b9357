"""The frame of a training loop: flags and presets, learning rate, optimizers, averaged weights; the run and its log.

A run is a folder, `runs/NAME`. For each stage (`vqgan`, `transformer`) it holds
    STAGE.pt             for use: EMA weights, configuration, class names; loads with weights_only=True
    STAGE.resume.pt      everything needed to go on, bit for bit
    STAGE.log.csv, STAGE.curve.png, STAGE.png    log, loss curves, latest reconstructions or samples
"""
import argparse
import copy
import csv
import math
import shlex
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from lib.checkpoints import load_checkpoint, save_checkpoint, write_atomically
from lib.devices import add_flags, add_machine_flags, count, mean_over_ranks, whole
from lib.pictures import clock, draw_log, save_image, show_line

# ------------------------------------------------------------------------------------------------- flags and presets

def presets(flags, others):
    """{name: {flag: value}} of every preset.

    flags: {flag: (type, its value for `shapes`, `cifar10` and `imagenet`, help)}. others: {name: (the preset that it
    follows, {flag: value} where it does not)}."""
    table = {name: {flag: row[column] for flag, row in flags.items()}
             for column, name in enumerate(("shapes", "cifar10", "imagenet"), 1)}
    return table | {name: table[base] | changes for name, (base, changes) in others.items()}


def parse_training_flags(description, own_flags, flags, presets):
    """The flags of a training script: its own, those of both, its hyperparameters. Exits with status 2 on bad ones.

    own_flags: as for add_flags. flags, presets: as above. A preset's value stands unless its flag is given. The preset
    is that of the data set, `folder` for any folder of images, or the one named by --preset."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = {"action": "store_true"}
    add_flags(parser, {
        "data": (str, "shapes", "shapes, cifar10, imagenet, places2, or a folder with a subfolder for each class"),
        "preset": (list(presets), None, "the data set whose settings to take (default: the data's own, or folder)"),
        "run": (str, None, "the run's folder (default: runs/NAME, after the data)"),
        "resume": (switch, None, "go on where the run stopped; start, if there is none"),
        "overwrite": (switch, None, "start again, replacing what the run folder holds")})
    add_flags(parser, own_flags)
    for name, (kind, *_, text) in flags.items():
        add_flags(parser, {name: (kind, None, f"{text} (default: {shown_default(name, presets)})")})
    add_flags(parser, {
        "seed": (whole, 0, "of every random draw"),
        "data_dir": (str, "data", "where cifar10, imagenet and places2 are"),
        "workers": (whole, None, "processes that read ahead (default: none for data in memory, else one per core)"),
        "log_every": (count, 50, "steps between log lines"),
        "save_every": (count, 500, "steps between checkpoints and pictures")})
    add_machine_flags(parser)
    args = parser.parse_args()
    for name, value in presets[args.preset or (args.data if args.data in presets else "folder")].items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, value)
        elif isinstance(given, list):
            setattr(args, name, tuple(given))
    return args


def shown_default(flag, presets):
    """What --help says of a flag's default: its value, or, where the presets differ, that of each."""
    def show(value):
        if value is None:
            return "all"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    values = {name: show(preset[flag]) for name, preset in presets.items()}
    if len(set(values.values())) == 1:
        return values["shapes"]
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def decisive_settings(args, flags, *others):
    """The plain values that decide a run's result, which a resumed run must share: of all of `flags` and `others` but
    --micro-batch, which decides the memory alone."""
    return {name: getattr(args, name) for name in (*flags, "data", "seed", *others) if name != "micro_batch"}


def micro_batches(args, machine):
    """Into how many parts each rank's share of --batch is split. Raises ValueError where it does not divide evenly."""
    own_share, rest = divmod(args.batch, machine.devices)
    size = min(args.micro_batch or own_share, own_share)
    if rest or own_share % size:
        raise ValueError(f"--batch {args.batch} on {machine.devices} devices does not split into micro-batches of "
                         f"{size}: choose --micro-batch so that it does")
    return own_share // size


# ------------------------------------------------------------------------------------------------------ of each step

def learning_rate(step, base, warmup, total, decay):
    """Linear warm-up over `warmup` steps, then constant, or a cosine down to 1% of `base` at step `total`."""
    if step < warmup:
        return base * (step + 1) / warmup
    if not decay:
        return base
    return base * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))))


def set_learning_rate(optimizer, step, base, warmup, total, decay):
    """learning_rate() for every group of parameters, with the group's own "base" where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, group.get("base", base), warmup, total, decay)


class Muon(torch.optim.Optimizer):
    """Momentum of which every singular value is made about 1, so that a matrix moves as far in all directions, where
    Adam follows a few strong ones (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    groups: of matrices; "parts" is how many each consists of, one below the other. dtype: of the iterations.
    torch.optim.Muon does the same, but for matrices whole: with queries, keys and values as one it learns slower."""

    def __init__(self, groups, lr, weight_decay, dtype):
        super().__init__(groups, {"lr": lr, "base": lr, "weight_decay": weight_decay, "parts": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"].lerp_(matrix.grad, 0.05)
                towards = matrix.grad.lerp(momentum, 0.95).chunk(group["parts"])                 # Nesterov's
                rows, columns = towards[0].shape
                moved = torch.cat([orthogonal(part.to(self.dtype)) for part in towards]).to(matrix.dtype)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(moved, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix):
    """About the nearest matrix with orthonormal rows or columns: five Newton-Schulz iterations, of the coefficients
    that raise small singular values fastest and leave all between 0.7 and 1.2 (Jordan et al. 2024)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def transformer_optimizers(model, args, machine):
    """AdamW for all parameters, or (--optimizer muon) for all but the blocks' matrices. Returns {name: optimizer}."""
    blocks = [(name, p) for name, p in model.blocks.named_parameters() if p.ndim > 1 and args.optimizer == "muon"]
    chosen = {id(p) for _, p in blocks}
    others = [p for p in model.parameters() if id(p) not in chosen]
    # Weight decay for matrices; biases, LayerNorms and the output's bias are left alone.
    groups = [{"params": [p for p in others if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0}]
    optimizers = {"adamw": torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.96), fused=machine.fused)}
    if blocks:
        groups = [{"params": [p for name, p in blocks if name.endswith("qkv.weight")], "parts": 3},
                  {"params": [p for name, p in blocks if not name.endswith("qkv.weight")]}]
        precision = torch.bfloat16 if machine.bf16 else torch.float32
        optimizers["muon"] = Muon(groups, args.muon_lr, args.weight_decay, precision)
    return optimizers


class EMA:
    """Exponential moving average of a model's weights; `model` is the averaged copy, for evaluation."""

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))  # the first, poor weights are forgotten faster
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


def accumulate(machine, wrapped, loss_of, batch, parts):
    """The gradients of a batch, taken in `parts` micro-batches; ranks exchange them with the last one.

    batch: tensors of equal length. loss_of(*part of each) -> (the loss to minimise, metrics by name), scalars. Returns
    the means of the metrics, on the device."""
    wrapped.zero_grad(set_to_none=True)
    means = {}
    for i, part in enumerate(zip(*(tensor.chunk(parts) for tensor in batch), strict=True)):
        with machine.accumulating(wrapped, more=i + 1 < parts):
            with machine.autocast():
                loss, metrics = loss_of(*part)
            (loss / parts).backward()
        for name, value in metrics.items():
            means[name] = means.get(name, 0) + value.detach() / parts
    return means


# ------------------------------------------------------------------------------------------------------------ the run

def folder_of(args):
    """The run's folder: --run, or runs/NAME, after the data."""
    return Path(args.run or Path("runs", Path(args.data).name))


class Run:
    """One stage's training in a run folder: refuses to overwrite, resumes, saves, stops on signals.

    stage: vqgan, transformer or autoregressive. settings: see decisive_settings. columns: what the log holds besides
    the step and the speed. args: the flags of every training script. Only the leading process writes and prints.
    Attributes: folder; step, how many were done at the start. Raises ValueError where a run is in the way or does not
    match, OSError where the folder cannot be written."""

    def __init__(self, stage, settings, columns, args, machine):
        self.stage, self.settings, self.args, self.machine = stage, settings | {"bf16": machine.bf16}, args, machine
        self.folder = folder_of(args)
        self.model_file, self.resume_file, self.picture, self.curve = (
            self.folder / f"{stage}.{ending}" for ending in ("pt", "resume.pt", "png", "curve.png"))
        self.step, self.state = 0, None
        if self.model_file.exists() or self.resume_file.exists():
            self._resume_or_refuse()
        if machine.leads:                                      # a folder that cannot be written shows here, not later
            write_atomically(self.folder / ".writable", lambda file: file.write(b"test"))
            (self.folder / ".writable").unlink()
        self.log = Log(self.folder / f"{stage}.log.csv", columns, self.step, args, machine)
        self.stop = StopSignal(machine)

    def _resume_or_refuse(self):
        if self.args.overwrite:
            return
        state = None
        if self.resume_file.exists():
            state = load_checkpoint(self.resume_file, f"{self.stage} training state")
        if not self.args.resume:
            progress = "finished"
            if state and state["step"] < self.args.steps:
                progress = f"unfinished (step {state['step']} of {self.args.steps})"
            raise ValueError(f"{self.folder} already holds a {progress} {self.stage}: use --resume to go on, "
                             f"--overwrite to start again, or --run DIR for another place")
        if not state:
            raise ValueError(f"{self.model_file} is there but nothing to resume it from; "
                             f"use --overwrite to start again")
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(f"{self.folder} was started with {name} = {state['settings'].get(name)}, not {value}: "
                                 f"resume with the same settings, or use --overwrite or another --run")
        self.step, self.state = state["step"], state

    def restore(self, parts, about):
        """Takes what is to be saved from now on, and brings it to where the run stopped.

        parts: models and optimizers by name, of which "ema" is the model for use. about: the plain values that the
        latter's file holds besides its weights and configuration."""
        self.parts, self.about = parts, about
        if self.state:
            for name, part in parts.items():
                part.load_state_dict(self.state[name])
            self.state = None                                    # as large as the models: not kept while training

    def introduce(self, model, what):
        """Says what is about to be trained. what: anything besides the number of parameters and the devices."""
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        where = f"{self.machine.device} x {self.machine.devices}"
        self._say(f"{self.folder}: {parameters:.2f} M parameters, {what}, on {where}")

    def say_the_end(self, following):
        self._say(f"the {self.stage} is {self.model_file}; look at {self.picture}. Next: {following}")

    def _say(self, text):
        if self.machine.leads:
            print(text, flush=True)

    def finish_step(self, step, metrics, preview):
        """Ends a step: logs, draws and saves where it is time to, and ends the process where a signal asked for it.

        step: how many are done now. metrics: scalar tensors by name. preview() -> figures of validation by name, and a
        picture (PIL). Raises ValueError where a metric is not finite; the files on disk are then the last good ones."""
        self.log.add(metrics)
        self.machine.sync()
        stopping = self.stop.requested(step)
        save = stopping or step % self.args.save_every == 0 or step == self.args.steps
        figures, picture = preview() if save else ({}, None)
        if save or step % self.args.log_every == 0:
            self.log.write(step, figures, self.resume_file)
        if save:
            self._save(step, picture)
        if stopping:
            self.stop.exit(step, self.args.steps)

    def _save(self, step, picture):
        """The model for use first, then the training state: who finds a finished state finds its model as well."""
        if not self.machine.leads:
            return
        common = {"step": step, "settings": self.settings}
        state = {name: part.state_dict() for name, part in self.parts.items()}
        model = {"config": asdict(self.parts["ema"].config), "model": state["ema"], **self.about}
        save_image(self.picture, picture)
        save_checkpoint(self.model_file, {"kind": self.stage, **common, **model})
        save_checkpoint(self.resume_file, {"kind": f"{self.stage} training state", **common, **state})
        draw_log(self.curve, self.log.path)


class Log:
    """A CSV file with a row of means now and then, each shown as a line of progress as well.

    columns: the names of all metrics and figures. step: how many are done at the start; rows beyond it, which were
    logged after the checkpoint that the run goes on from, are dropped, since those steps are done again."""

    def __init__(self, path, columns, step, args, machine):
        self.path, self.columns = path, ["step", *columns, "images/s"]
        self.step, self.args, self.machine = step, args, machine
        self.pending, self.names, self.is_open = [], [], False
        self.times = []                                                        # (step, seconds) of the latest lines

    def add(self, metrics):
        """Keeps a step's metrics (scalar tensors by name) on the device until write(): no step waits for them."""
        self.names = list(metrics)
        self.pending.append(torch.stack([value.detach().float() for value in metrics.values()]))
        if not self.times:                              # the first step, which compiles and warms up, is not timed
            self.times = [(self.step + 1, time.time())]

    def write(self, step, figures, resume_file):
        """Writes the means since the last call, over all ranks, and `figures`. Raises ValueError if one is infinite."""
        values = self.machine.fetch(mean_over_ranks(torch.stack(self.pending).mean(0)))
        means, self.pending = dict(zip(self.names, values, strict=True)), []
        for name, value in means.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} became {value} at or before step {step}: training was stopped; the last good "
                                 f"checkpoint, if any, is {resume_file}: go on from it with a lower --lr")
        if not self.machine.leads:
            return
        speed = self._images_per_second(step)
        row = {"step": step, **means, **figures, "images/s": speed}
        if not self.is_open:
            self._open()
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
        shown = [f"{name} {value:.4g}" for name, value in (means | figures).items()]
        left = clock((self.args.steps - step) * self.args.batch / speed) if speed else "?"
        text = "  ".join([f"step {step}/{self.args.steps}", *shown, f"{speed or 0:.0f} images/s", f"{left} left"])
        show_line(text, last=step == self.args.steps)

    def _images_per_second(self, step):
        """Over the last ten lines; None where no time has passed."""
        first, then = self.times[0]
        self.times = [*self.times[-10:], (step, time.time())]
        return (step - first) * self.args.batch / (time.time() - then) if step > first else None

    def _open(self):
        self.is_open, rows = True, []
        if self.step and self.path.exists():
            with open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= self.step]
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


class StopSignal:
    """Ctrl-C or SIGTERM: the step under way is finished and saved first; a second signal ends the process at once."""

    def __init__(self, machine):
        self.number, self.machine = None, machine
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def requested(self, step):
        """Whether to stop after this step. Ranks must agree: at every tenth step they tell each other."""
        received = self.number is not None
        if self.machine.world == 1:
            return received
        return step % 10 == 0 and self.machine.any(received)

    def exit(self, step, steps):
        """Ends the process as the signal asked, with the command that goes on from here."""
        if self.machine.leads:
            arguments = [argument for argument in sys.argv if argument not in ("--overwrite", "--resume")]
            print(f"\nstopped at step {step} of {steps}, all saved. Go on with:\n"
                  f"  python {shlex.join(arguments)} --resume", file=sys.stderr)
        sys.exit(128 + (self.number or signal.SIGTERM))
