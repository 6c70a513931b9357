"""A run's folder: start or resume, save, stop on a signal.

A run is a folder, `runs/NAME`. For each stage (`vqgan`, `transformer`, `autoregressive`) it holds
    STAGE.pt             for use: averaged weights, configuration, class names
    STAGE.resume.pt      everything needed to go on, bit for bit
    STAGE.best.pt        for use: the best weights so far, with --evaluate-every
    STAGE.log.csv, STAGE.curve.png, STAGE.png    log, curves, latest reconstructions or samples
"""
import argparse
import atexit
import contextlib
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn, TextIO

import torch
from torch import nn

from lib.errors import UserError
from lib.files import load_checkpoint, on_cpu, save_checkpoint
from lib.flags import value_as_typed
from lib.optim import load_optimizer
from lib.runtime import Machine

REPEAT_SECONDS = 3      # torchrun and a scheduler may each forward the same SIGTERM


class Run:
    """One stage's training in a run's folder. Only the leading process writes and prints.

    Attributes: step, at which this process starts; stage; folder; the paths model_file, best_file,
    resume_file, log_file, curve and picture. Raises UserError if another run is in the way, or
    another process is training it."""

    def __init__(self, stage: str, args: argparse.Namespace, machine: Machine):
        self.stage = stage
        self.args = args
        self.machine = machine
        self.settings = {}
        self.folder = Path(args.run)
        self.model_file = self.folder / f"{stage}.pt"
        self.best_file = self.folder / f"{stage}.best.pt"
        self.resume_file = self.folder / f"{stage}.resume.pt"
        self.log_file = self.folder / f"{stage}.log.csv"
        self.curve = self.folder / f"{stage}.curve.png"
        self.picture = self.folder / f"{stage}.png"
        self.step = 0
        self.state = None
        self.signal = None
        self.signal_time = 0.0
        if machine.leads:
            self._lock()
            self._remove_leftovers()
        if not args.overwrite and (self.model_file.exists() or self.resume_file.exists()):
            self._resume_or_refuse()
        self._check_ranks_agree()

    def _lock(self) -> None:
        """Locks the stage in this folder, or raises UserError if another process trains it.

        The lock is released when the process ends, however it ends."""
        try:
            import fcntl
        except ImportError:                                                 # Windows has none
            return
        path = self.folder / f".{self.stage}.lock"
        locked = False
        while not locked:
            self.lock = self._open_lock(path)
            try:
                # Not flock(), whose lock the reader processes of a killed run would still hold.
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):              # the system decides which
                raise UserError(
                    f"another process is training the {self.stage} in {self.folder}: wait for it, "
                    f"stop it, or choose another folder with --run") from None
            except OSError as error:
                print(f"{path} cannot be locked ({error.strerror}): do not train the {self.stage} "
                      f"twice in this folder at once", file=sys.stderr)
            # A process that has just ended may have removed the file that was opened here.
            locked = path.exists() and os.path.samestat(path.stat(), os.fstat(self.lock.fileno()))
        atexit.register(self._unlock, path)

    def _open_lock(self, path: Path) -> TextIO:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return path.open("w")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror}): "
                            f"choose another folder with --run") from error

    def _unlock(self, path: Path) -> None:
        """Removes the lock, and the folder if nothing was written to it."""
        with contextlib.suppress(OSError):
            path.unlink()
            self.folder.rmdir()

    def _remove_leftovers(self) -> None:
        """Removes temporary files of a killed run."""
        for leftover in self.folder.glob(f".{self.stage}.*.tmp"):
            leftover.unlink()

    def _resume_or_refuse(self) -> None:
        """Reads the state to resume from, or raises UserError if the folder is taken."""
        remedy = "use --overwrite to start again, or --run DIR for another place"
        if not self.resume_file.exists():
            raise UserError(f"{self.model_file} exists, but there is no {self.resume_file.name} to "
                            f"resume from: {remedy}")
        try:
            state = load_checkpoint(self.resume_file, f"{self.stage} training state")
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
        if not self.args.resume:
            progress = "finished"
            if state["step"] < self.args.steps:
                progress = f"unfinished (step {state['step']} of {self.args.steps})"
            raise UserError(f"{self.folder} already holds a {progress} {self.stage}: use --resume "
                            f"to go on, {remedy}")
        self.step = state["step"]
        self.state = state

    def _check_ranks_agree(self) -> None:
        """Raises UserError if ranks start at different steps."""
        least, most = self.machine.range_over_ranks(self.step)
        if least != most:
            raise UserError(f"one process starts at step {least}, another at {most}: "
                            f"{self.folder} must be on a disk that all computers share")

    def note_settings(self, settings: dict, flags: Iterable[str]) -> None:
        """Notes the settings of this run, for its checkpoints.

        flags: the names of flags to note. settings: other plain values by name."""
        self.settings = {name: getattr(self.args, name) for name in flags} | settings
        self.settings |= {"seed": self.args.seed, "bf16": self.machine.bf16}
        self.settings["init"] = self.args.init or "none"

    def compare_with_saved(self, fixed: set[str]) -> None:
        """Reports settings that have changed since the run was saved, if it is resumed.

        fixed: the names of settings that cannot change. Raises UserError if one of them did. A
        setting that an older checkpoint does not record is passed over."""
        if self.state is None:
            return
        changes = []
        for name, value in self.settings.items():
            before = self.state["settings"].get(name, value)
            if before == value:
                continue
            if name == "classes":
                names = sorted(set(before) ^ set(value))[:5]
                raise UserError(f"the classes have changed since {self.folder} was started "
                                f"({', '.join(names)}), and its weights depend on them: bring the "
                                f"former ones back, or use --overwrite or another --run")
            typed = value_as_typed(value)
            typed_before = value_as_typed(before)
            if name in fixed:
                moved = ""
                if name == "data":
                    moved = "put a link at the former path if the images have only moved; else "
                raise UserError(f"{self.folder} was started with {name} = {typed_before}, not "
                                f"{typed}, and its weights depend on that: {moved}resume with the "
                                f"same, or use --overwrite or another --run")
            changes.append(f"{name} {typed} (was {typed_before})")
        if changes:
            self.say("resuming with " + ", ".join(changes))

    def restore(self, saved: dict[str, nn.Module | torch.optim.Optimizer]) -> None:
        """Loads models and optimizers, by name, from where the run stopped, if it is resumed."""
        if self.state is None:
            return
        for name, target in saved.items():
            if isinstance(target, torch.optim.Optimizer):
                load_optimizer(target, self.state[name])
            else:
                target.load_state_dict(self.state[name])
        self.state = None                                   # it takes as much memory as `saved`

    def discard_former(self) -> None:
        """Deletes what a former run left that this one does not resume: its state and best weights.

        Otherwise --resume would go on with that run, if this one ends before it is first saved.
        Call this last: an error before it leaves the former run as it was."""
        if self.step == 0 and self.machine.leads:
            self.resume_file.unlink(missing_ok=True)
            self.best_file.unlink(missing_ok=True)

    def say(self, text: str) -> None:
        """Prints a line, in the leading process only."""
        if self.machine.leads:
            print(text, flush=True)

    def due(self, step: int, every: int) -> bool:
        """Returns True after every `every`-th step and after the last one; never if it is 0."""
        return every > 0 and (step == self.args.steps or step % every == 0)

    def save(self, step: int, saved: dict, about: dict) -> None:
        """Writes the model for use, and then the state to resume from.

        In this order, wherever there is a state there is a model. saved: models and optimizers by
        name; "ema" is for use. about: plain values to store beside the weights of the model.
        Raises UserError if a file cannot be written; the one before it then stays."""
        self.save_model(self.model_file, step, saved["ema"], about)
        state = {name: part.state_dict() for name, part in saved.items()}
        self._write(self.resume_file, {
            "kind": f"{self.stage} training state", "step": step,
            "settings": self.settings, **state,
        })

    def save_model(self, path: Path, step: int, model: nn.Module, about: dict) -> None:
        """Writes one model for use, with its configuration. The other arguments: see save()."""
        self._write(path, {
            "kind": self.stage, "step": step, "settings": self.settings,
            "config": asdict(model.config), "model": model.state_dict(), **about,
        })

    @property
    def _fetches(self) -> bool:
        """True if this process fetches the tensors that are saved: on the first rank, and on every
        host of a TPU, since their chips may hold parts of them."""
        return self.machine.leads or self.machine.mesh is not None

    def _write(self, path: Path, checkpoint: dict) -> None:
        """Writes a file, on the first rank."""
        if self._fetches:
            checkpoint = on_cpu(checkpoint)
        if self.machine.leads:
            save_checkpoint(path, checkpoint)

    def keep_best(
        self, step: int, distance: float, measure: str, model: nn.Module, about: dict,
    ) -> None:
        """Writes STAGE.best.pt if this distance is a number, and less than that of the file.

        measure: which distance it is, in words. The file is also replaced, and this is said, if its
        distance is another one. The other arguments: see save()."""
        if math.isnan(distance) or not self._fetches:
            return
        if self.best_file.exists():
            best = load_checkpoint(self.best_file, self.stage)
            if best.get("measure") != measure:
                self.say(f"{self.best_file} was chosen by another distance than the {measure}: it "
                         f"is replaced")
            elif distance >= best["distance"]:
                return
        measured = {"measure": measure, "distance": distance}
        self.save_model(self.best_file, step, model, about | measured)

    def catch_signals(self) -> None:
        """Makes Ctrl-C and SIGTERM wait for the end of a step, where should_stop() reports them."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal = number
            self.signal_time = now
            if self.machine.leads:      # not by print(), which the signal may have interrupted
                os.write(2, b"\nstopping at the end of a step, which is then saved; to stop at "
                            b"once, repeat the signal after some seconds\n")
        elif now - self.signal_time > REPEAT_SECONDS:               # someone insists: end at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def should_stop(self, step: int) -> bool:
        """Returns True if a signal asks to stop after this step; all ranks get the same answer.

        After its last step, a run ends in any case."""
        if step == self.args.steps:
            return False
        if self.machine.world == 1:
            return self.signal is not None
        # The ranks must agree. That costs a little time, so they only ask at every tenth step.
        return step % 10 == 0 and self.machine.true_on_any_rank(self.signal is not None)

    def exit(self, step: int) -> NoReturn:
        """Ends the process, and says how to go on."""
        if self.machine.leads:
            print(f"\nstopped at step {step} of {self.args.steps}, and everything is saved: "
                  f"run the same command with --resume to go on", file=sys.stderr)
        sys.exit(128 + (self.signal or signal.SIGTERM))


def initial_model(args: argparse.Namespace, stage: str) -> Path:
    """Returns the file of the model to start from: that of the run named by --init.

    If this run is resumed, it is its own, so the other run may be gone."""
    resumed = args.resume and Path(args.run, f"{stage}.resume.pt").exists()
    return Path(args.run if resumed else args.init, f"{stage}.pt")


def command(script: str, *words: str | Path) -> str:
    """Returns a command that a user can paste into a shell."""
    return shlex.join(["python", script, *map(str, words)])
