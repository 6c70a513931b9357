"""The frame of a training loop: flags and presets; the run's folder, checkpoints and log; signals.

A run is a folder, `runs/NAME`. For each stage (`vqgan`, `transformer`) it holds
    STAGE.pt             for use: EMA weights, configuration, class names; loads with weights_only=True
    STAGE.resume.pt      everything needed to go on, bit for bit
    STAGE.log.csv, STAGE.curve.png, STAGE.png    log, loss curves, latest reconstructions or samples
"""
import contextlib
import csv
import functools
import math
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch

from lib.files import load_checkpoint, on_cpu, save_checkpoint, write_atomically
from lib.flags import UserError
from lib.optim import match_layouts
from lib.pictures import draw_log, save_image
from lib.runtime import mean_over_ranks
from lib.terminal import show_line, time_left


def micro_batches(args, machine):
    """Into how many parts each rank's share of --batch is split. Raises ValueError where it does not divide evenly."""
    own_share, rest = divmod(args.batch, machine.devices)
    size = min(args.micro_batch or own_share, own_share)
    if rest or own_share % size:
        raise UserError(f"--batch {args.batch} on {machine.devices} devices does not split into micro-batches of "
                         f"{size}: choose --micro-batch so that it does")
    return own_share // size


class Run:
    """One stage's training in a run folder: refuses to overwrite, resumes, saves, stops on signals.

    stage: vqgan, transformer or autoregressive. flags: the stage's hyperparameters. found: what else decides the
    result, plain values by name. columns: what the log holds besides the step and the speed. args: as from
    parse_training_flags. Only the leading process writes and prints. Attributes: folder; step, how many were done at
    the start. Raises ValueError where a run is in the way or does not match, OSError where the folder cannot be
    written."""

    def __init__(self, stage, flags, found, columns, args, machine):
        # --micro-batch decides the memory alone: a resumed run may have another.
        decisive = [name for name in (*flags, "data", "seed", "init") if name != "micro_batch"]
        self.settings = {name: getattr(args, name) for name in decisive} | found | {"bf16": machine.bf16}
        self.stage, self.folder, self.args, self.machine = stage, args.run, args, machine
        self.model_file, self.resume_file, self.picture, self.curve = (
            self.folder / f"{stage}.{ending}" for ending in ("pt", "resume.pt", "png", "curve.png"))
        self.best = math.inf                                   # the least distance that --evaluate-every has found
        self.step, self.state, self.copy, self.writing, self.writer = 0, None, None, None, ThreadPoolExecutor(1)
        if not args.overwrite and (self.model_file.exists() or self.resume_file.exists()):
            self._resume_or_refuse()
        if machine.leads:                                      # a folder that cannot be written shows here, not later
            write_atomically(self.folder / f".{stage}.test.tmp", lambda file: file.write(b"test"))
            for leftover in self.folder.glob(f".{stage}.*.tmp"):                                # also of a killed run
                leftover.unlink()
            with contextlib.suppress(OSError):                 # a folder that was not there comes with its first file
                self.folder.rmdir()
        self.log = Log(self.folder / f"{stage}.log.csv", columns, self.step, args, machine)
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember_signal)

    def _remember_signal(self, number, frame):
        """Ctrl-C or SIGTERM: finish_step() ends the process, all saved; a second signal ends it at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def _resume_or_refuse(self):
        there = self.resume_file.exists()
        state = load_checkpoint(self.resume_file, f"{self.stage} training state") if there else None
        if not self.args.resume:
            progress = "finished"
            if state and state["step"] < self.args.steps:
                progress = f"unfinished (step {state['step']} of {self.args.steps})"
            raise UserError(f"{self.folder} already holds a {progress} {self.stage}: use --resume to go on, "
                             f"--overwrite to start again, or --run DIR for another place")
        if not state:
            raise UserError(f"{self.model_file} is there but nothing to resume it from; "
                             f"use --overwrite to start again")
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise UserError(f"{self.folder} was started with {name} = {state['settings'].get(name)}, not {value}: "
                                 f"resume with the same settings, or use --overwrite or another --run")
        self.step, self.state, self.best = state["step"], state, state.get("best", math.inf)

    def start(self, parts, about, what, flops):
        """Takes what is trained and saved from now on, brings it to where the run stopped, and says what it is.

        parts: models and optimizers by name, of which "model" learns and "ema" is for use. about: the plain values that
        the latter's file holds besides its weights and configuration. what: anything to say besides the number of
        parameters and the devices. flops: for an image, from lib.costs."""
        self.parts, self.about, self.log.flops = parts, about, flops
        for name, part in parts.items() if self.state else ():
            part.load_state_dict(self.state[name])
            if isinstance(part, torch.optim.Optimizer):
                match_layouts(part)
        self.state = None                                        # as large as the models: not kept while training
        parameters = sum(parameter.numel() for parameter in parts["model"].parameters()) / 1e6
        where = f"{self.machine.device} x {self.machine.devices}"
        self.say(f"{self.folder}: {parameters:.2f} M parameters, {what}, on {where}")

    def say(self, text):
        if self.machine.leads:
            print(text, flush=True)

    def finish_step(self, step, metrics, preview, judge=None):
        """Ends a step: logs, draws and saves where it is time to, and ends the process where a signal asked for it.

        step: how many are done now. metrics: scalar tensors by name. preview() -> figures of validation by name, and a
        picture (PIL). judge() -> {name: a distance}, for --evaluate-every; None: there is none. Raises ValueError where
        a metric is not finite; the files on disk are then the last good ones."""
        machine, args = self.machine, self.args
        self.log.add(metrics)
        machine.sync()
        # Ranks must agree whether to stop: at every tenth step they tell each other.
        stopping = (machine.world == 1 or step % 10 == 0) and machine.any(self.signal is not None)
        ending = stopping or step == args.steps
        draw = ending or step % args.picture_every == 0
        figures, picture = preview() if draw else ({}, None)
        if judge and (step == args.steps or step % args.evaluate_every == 0):
            figures |= self._keep_the_best(step, judge())
        if figures or step % args.log_every == 0 or step % args.save_every == 0:
            self.log.write(step, figures, self.resume_file)
        if machine.leads and draw:
            save_image(self.picture, picture)
            draw_log(self.curve, self.log.path)
        if machine.leads and (ending or step % args.save_every == 0):
            self._save(step)
            if ending:
                self.writing.result()
        elif machine.leads and not self.writing and machine.mesh is None:
            self.writing = self.writer.submit(self._copy)                     # gets the memory, which takes seconds
        if stopping:
            if machine.leads:
                command = shlex.join(word for word in sys.argv if word not in ("--overwrite", "--resume"))
                print(f"\nstopped at step {step} of {args.steps}, all saved. Go on with:\n"
                      f"  {launcher()} {command} --resume", file=sys.stderr)
            sys.exit(128 + (self.signal or signal.SIGTERM))

    def _keep_the_best(self, step, found):
        """Keeps the model for use beside the latest one, where none before was as good. found: {name: distance}."""
        distance, = found.values()
        if distance < self.best and self.machine.leads:
            weights = on_cpu(self.parts["ema"].state_dict())
            save_checkpoint(self.folder / f"{self.stage}.best.pt", self._for_use(step, weights))
        self.best = min(distance, self.best)
        return found

    def _copy(self):
        self.copy = on_cpu({name: part.state_dict() for name, part in self.parts.items()}, self.copy)

    def _save(self, step):
        """Copies what is to be saved, and leaves it to a thread to write that while training goes on. Raises OSError
        where the save before this one, for which it waits, could not be written."""
        if self.writing:
            self.writing.result()
        self._copy()
        self.writing = self.writer.submit(self._write, step, self.best)

    def _write(self, step, best):
        """The model for use first, then the training state: who finds a finished state finds its model as well."""
        save_checkpoint(self.model_file, self._for_use(step, self.copy["ema"]))
        save_checkpoint(self.resume_file, {"kind": f"{self.stage} training state", "step": step, "best": best,
                                           "settings": self.settings, **self.copy})

    def _for_use(self, step, weights):
        return {"kind": self.stage, "step": step, "settings": self.settings,
                "config": asdict(self.parts["ema"].config), "model": weights, **self.about}


class Log:
    """A CSV file with a row of means now and then, each shown as a line of progress as well.

    columns: the names of all metrics and figures. step: how many are done at the start; rows beyond it, which were
    logged after the checkpoint that the run goes on from, are dropped, since those steps are done again."""

    def __init__(self, path, columns, step, args, machine):
        self.path, self.columns = path, ["step", *columns, "images/s", "TFLOP/s"]
        self.step, self.args, self.machine = step, args, machine
        self.pending, self.names = [], []
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
                raise UserError(f"{name} became {value} at or before step {step}: training was stopped; the last good "
                                 f"checkpoint, if any, is {resume_file}: go on from it with a lower --lr")
        if not self.machine.leads:
            return
        (first, then), speed = self.times[0], None                      # over the last ten lines
        self.times = [*self.times[-10:], (step, time.time())]
        if step > first:
            speed = (step - first) * self.args.batch / (time.time() - then)
        row = {"step": step, **means, **figures, "images/s": speed, "TFLOP/s": speed and speed * self.flops / 1e12}
        self.table.writerow(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
        shown = [f"{name} {value:.4g}" for name, value in (means | figures).items()]
        left = time_left((self.args.steps - step) * self.args.batch, speed)
        rate = f"{speed or 0:.0f} images/s ({row['TFLOP/s'] or 0:.3g} TFLOP/s)"
        text = "  ".join([f"step {step}/{self.args.steps}", *shown, rate, left])
        show_line(text, last=step == self.args.steps)

    @functools.cached_property
    def table(self):
        """The file's writer, opened for the first row; what it writes is in the file at once."""
        rows = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.step and self.path.exists():
            with open(self.path, newline="") as file:
                rows = [{name: row.get(name) for name in self.columns} for row in csv.DictReader(file)
                        if row["step"].isdigit() and int(row["step"]) <= self.step]
        table = csv.DictWriter(self.path.open("w", newline="", buffering=1), self.columns)
        table.writeheader()
        table.writerows(rows)
        return table


def launcher():
    """What a command begins with that starts as many processes as there are: python, or torchrun."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return "python"
    nodes = os.environ["GROUP_WORLD_SIZE"]
    hosts = f"--nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint HOST:PORT " if nodes != "1" else ""
    return f"torchrun {hosts}--nproc_per_node {os.environ['LOCAL_WORLD_SIZE']} --"
