"""How a training loop runs: flags, learning rate, EMA, checkpoints, progress, logs and pictures (devices.py says where).

A run is a folder, `runs/NAME`. For each stage (`vqgan`, `transformer`) it holds
    STAGE.pt             for use: EMA weights, configuration, class names; loads with weights_only=True
    STAGE.resume.pt      everything needed to go on, bit for bit
    STAGE.log.csv, STAGE.curve.png, STAGE.png    log, loss curve, latest reconstructions or samples
Every file is written to a temporary name and renamed.
"""
import copy
import csv
import hashlib
import math
import os
import shlex
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from devices import add_machine_flags, yes_or_no


def positive(text):
    """argparse type: a finite number, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def whole(text):
    """argparse type: an integer, 0 or more."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def parse_training_flags(parser, presets, flags):
    """Adds the flags that both training scripts have and those a preset sets; parses.

    presets: {data name: {flag: value}}, with "folder" for any folder of images. flags: {flag: help}, in the order of
    --help. A preset's value stands unless its flag is given. Returns the namespace. Exits with status 2 on bad flags."""
    parser.add_argument("--data", default="shapes", help="shapes, cifar10, imagenet (in data/imagenet), or a folder of images with a subfolder for each class (default: %(default)s)")
    parser.add_argument("--run", help="the run's folder (default: runs/NAME, after the data)")
    parser.add_argument("--resume", action="store_true", help="go on where the run stopped (or start, where there is none)")
    parser.add_argument("--overwrite", action="store_true", help="start again, replacing what the run folder holds")
    show = lambda value: {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else \
        " ".join(map(str, value)) if isinstance(value, tuple) else value
    for name, text in flags.items():
        values = {data: preset[name] for data, preset in presets.items()}
        example = values["shapes"]
        shown = show(example) if len(set(values.values())) == 1 else ", ".join(f"{data}: {show(v)}" for data, v in values.items())
        types = {float: positive, int: whole, bool: yes_or_no, str: str, tuple: whole}
        parser.add_argument("--" + name.replace("_", "-"), type=types[type(example)], metavar=name.split("_")[-1].upper(),
                            nargs="+" if isinstance(example, tuple) else None, help=f"{text} (default: {shown})")
    parser.add_argument("--seed", type=whole, default=0, help="of every random draw (default: %(default)s)")
    parser.add_argument("--micro-batch", type=whole, help="images in memory at once on each device; gradients add up to --batch (default: {})".format(
        ", ".join(f"{data}: {preset.get('micro_batch', 'all')}" for data, preset in presets.items())))
    add_machine_flags(parser)
    parser.add_argument("--data-dir", default="data", help="where cifar10, imagenet and places2 are (default: %(default)s)")
    parser.add_argument("--workers", type=whole, help="processes that read images ahead (default: none for data in memory, else one per core)")
    parser.add_argument("--log-every", type=whole, default=50, help="steps between log lines (default: %(default)s)")
    parser.add_argument("--save-every", type=whole, default=500, help="steps between checkpoints and pictures (default: %(default)s)")
    args = parser.parse_args()
    for name, value in presets.get(args.data, presets["folder"]).items():
        given = getattr(args, name)
        setattr(args, name, value if given is None else tuple(given) if isinstance(given, list) else given)
    return args


def learning_rate(step, base, warmup, total, decay):
    """Linear warm-up over `warmup` steps, then constant, or a cosine down to 1% of `base` at step `total`."""
    if step < warmup:
        return base * (step + 1) / warmup
    if not decay:
        return base
    return base * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))))


class EMA:
    """Exponential moving average of a model's weights; `model` is the averaged copy, for evaluation."""

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))  # the first, poor weights are forgotten faster
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------------------------------------------- checkpoints

def write_atomically(path, write):
    """Calls write(file) on a temporary file beside `path`, then renames it. Raises OSError, leaving `path` as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save reports a full disk as a RuntimeError of its zip writer.
        if isinstance(error, (OSError, RuntimeError)):
            reason = getattr(error, "strerror", None) or "the file could not be written (disk full?)"
            raise OSError(f"cannot write {path}: {reason}; free some space or choose another folder with --run") from error
        raise


def to_cpu(value):
    """Nested dicts and lists of tensors and plain values, with every tensor on the CPU."""
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, list) else value.cpu() if torch.is_tensor(value) else value


def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors and plain values, atomically. Raises OSError."""
    write_atomically(path, lambda file: torch.save(to_cpu(checkpoint), file))


def load_checkpoint(path, kind):
    """Reads what save_checkpoint wrote. kind: what its "kind" must say, such as vqgan or transformer.

    Raises FileNotFoundError, or ValueError for a file that is truncated, not a checkpoint, or of another kind."""
    damaged = ValueError(f"{path} is not a checkpoint, or is damaged; restore it or train it again")
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):             # what torch.save writes; anything else is not even unpickled
                raise damaged
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: train it first, or name another run") from None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                           # a damaged archive can raise nearly anything
        raise damaged from error
    if not isinstance(checkpoint, dict) or "kind" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of this project")
    if checkpoint["kind"] != kind:
        raise ValueError(f"{path} holds a {checkpoint['kind']}, where a {kind} is needed")
    return checkpoint


def load_tensors(path):
    """The tensors of a PyTorch state dict, by name. Raises OSError, or ValueError where the file is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value for name, value in state.items() if torch.is_tensor(value)}
    except OSError:
        raise
    except Exception as error:                              # a damaged archive can raise nearly anything
        raise ValueError(f"{path} is no PyTorch state dict, or is damaged; fetch it again") from error


def load_weights(model, weights, path):
    """load_state_dict with a one-line ValueError that names the first parameter which does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights or name not in own:
            raise ValueError(f"{path} does not fit its own configuration: parameter {name} is "
                             f"{'missing' if name not in weights else 'unexpected'}")
        if own[name].shape != weights[name].shape:
            raise ValueError(f"{path} does not fit its own configuration: parameter {name} has shape "
                             f"{tuple(weights[name].shape)}, not {tuple(own[name].shape)}")
    model.load_state_dict({name: value.to(own[name].dtype) for name, value in weights.items()}, assign=True)    # from float16
    return model


def rebuild(path, kind, config_class, model_class):
    """A model from its file alone -> (model in eval mode, checkpoint). Raises ValueError or FileNotFoundError."""
    checkpoint = load_checkpoint(path, kind)
    try:
        with torch.device("meta"):                       # no time for a random start, which is replaced at once
            model = model_class(config_class(**checkpoint["config"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has a configuration that this version does not know ({error}); train it again") from error
    return load_weights(model, checkpoint["model"], path).eval().requires_grad_(False), checkpoint


def fingerprint(model):
    """A short hash of all weights: two tokenizers with the same fingerprint give the same tokens."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- training runs

class Run:
    """One stage's training in a run folder: refuses to overwrite, resumes, logs, shows progress, stops on signals.

    folder: runs/NAME. stage: vqgan, transformer or autoregressive. settings: the plain values that decide the result; a resumed
    run must have the same. columns: what end_step() is given, in the order of the CSV. args: the flags of every training
    script. Only rank 0 writes and prints.
    Attributes: step, where to start; state, the dict given to save() last time, or None. Raises ValueError where a run
    is in the way or does not match, OSError where the folder cannot be written."""

    def __init__(self, folder, stage, settings, columns, args, machine):
        steps, resume, overwrite = args.steps, args.resume, args.overwrite
        self.machine, self.args, self.leads = machine, args, machine.rank == 0
        self.folder, self.stage, self.settings = Path(folder), stage, settings
        self.columns, self.steps = ["step", *columns, "images/s"], steps
        self.files = {name: self.folder / f"{stage}.{name}" for name in ("pt", "resume.pt", "log.csv", "curve.png", "png")}
        self.step, self.state = 0, None
        found = self.files["resume.pt"].exists() or self.files["pt"].exists()
        if found and resume:
            if not self.files["resume.pt"].exists():
                raise ValueError(f"{self.files['pt']} is there but nothing to resume it from; use --overwrite to start again")
            self.state = load_checkpoint(self.files["resume.pt"], f"{stage} training state")
            self.step = self.state["step"]
            for name, value in settings.items():
                if self.state["settings"].get(name) != value:
                    raise ValueError(f"{folder} was started with {name} = {self.state['settings'].get(name)}, not {value}: "
                                     f"resume with the same settings, or use --overwrite or another --run")
        elif found and not overwrite:
            raise ValueError(f"{folder} already holds a {self._progress_of_previous()} {stage}: use --resume to go on, "
                             f"--overwrite to start again, or --run DIR for another place")
        if self.leads:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / ".writable", lambda file: file.write(b"test"))
                (self.folder / ".writable").unlink()
            except OSError as error:
                raise OSError(f"cannot write to the run folder {folder}: {error.strerror or error}; choose another with --run") from error
        self.log_is_open = False
        self.pending, self.extra = [], {}
        self.started = time.time()
        self.start_step = self.step
        self.signal, self.stopping = None, False
        if threading.current_thread() is threading.main_thread():    # torch-xla runs the chips of a host in threads
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)

    def _progress_of_previous(self):
        if not self.files["resume.pt"].exists():
            return "finished"
        step = load_checkpoint(self.files["resume.pt"], f"{self.stage} training state")["step"]
        return "finished" if step >= self.steps else f"unfinished (step {step} of {self.steps})"

    def _on_signal(self, number, frame):
        """The step under way is finished first; a second signal ends the process at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def _open_log(self):
        """Keeps the rows up to the step that is resumed from: what was logged after the last checkpoint is run again."""
        self.log_is_open = True
        rows = []
        if self.step and self.files["log.csv"].exists():
            with open(self.files["log.csv"], newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= self.step]
        with open(self.files["log.csv"], "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def say(self, text):
        """Prints, on rank 0 alone."""
        if self.leads:
            print(text, flush=True)

    def end_step(self, metrics):
        """Keeps a step's metrics (a dict of scalar tensors) on the device until log() needs them: no step waits for them."""
        self.names = list(metrics)
        self.pending.append(torch.stack([value.detach().float() for value in metrics.values()]))
        self.machine.sync()

    def saves(self, step):
        """Whether to save after this step: every --save-every, at the end, or because a signal asked to stop."""
        if self.machine.world > 1 and step % 10 == 0:            # ranks must agree: every tenth step one asks the others
            self.stopping = self.machine.any(self.signal is not None)
        elif self.machine.world == 1:
            self.stopping = self.signal is not None
        return step % self.args.save_every == 0 or step == self.steps or self.stopping

    def log(self, step):
        """Writes the means of the metrics since the last call, over all ranks.

        Raises ValueError where a mean is not finite; the checkpoint on disk is then the last good one."""
        means = dict(zip(self.names, self.machine.fetch(self.machine.mean(torch.stack(self.pending).mean(0)))))
        self.pending = []
        for name, value in means.items():
            if not math.isfinite(value):
                last = f"the last good checkpoint is {self.files['resume.pt']}" if self.files["resume.pt"].exists() else \
                    "no checkpoint was written yet"
                raise ValueError(f"{name} became {value} at or before step {step}: training was stopped, {last}; "
                                 f"go on from it with a lower --lr")
        if not self.leads:
            return
        now = time.time()
        speed = (step - self.start_step) * self.args.batch / (now - self.started)
        row = {"step": step, **means, **self.extra, "images/s": speed}
        self.extra = {}
        if not self.log_is_open:
            self._open_log()
        with open(self.files["log.csv"], "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        left = int((self.steps - step) * self.args.batch / speed)
        text = "  ".join([f"step {step}/{self.steps}"] +
                         [f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "images/s")] +
                         [f"{speed:.0f} images/s", f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"])
        if sys.stdout.isatty():
            width = os.get_terminal_size().columns - 1
            print("\r" + text[:width].ljust(width), end="\n" if step == self.steps else "", flush=True)
        else:
            print(text, flush=True)

    def save(self, step, state, model):
        """Writes the model for use, then the training state: who finds a finished state finds its model as well.

        state, model: dicts of tensors and plain values."""
        if not self.leads:
            return
        save_checkpoint(self.files["pt"], {"kind": self.stage, "step": step, "settings": self.settings, **model})
        save_checkpoint(self.files["resume.pt"], {"kind": f"{self.stage} training state", "step": step,
                                                  "settings": self.settings, **state})

    def exit_if_signalled(self, step):
        """Call after save(): ends the process as the signal asked, with the command that goes on from here."""
        if not self.stopping:
            return
        if self.leads:
            arguments = [a for a in sys.argv if a not in ("--overwrite", "--resume")]
            print(f"\nstopped at step {step} of {self.steps}, all saved. Go on with:\n"
                  f"  python {shlex.join(arguments)} --resume", file=sys.stderr)
        sys.exit(128 + (self.signal or signal.SIGTERM))

    def draw_curve(self):
        """Plots every column of the log against the step."""
        if not self.leads:
            return
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        with open(self.files["log.csv"], newline="") as file:
            rows = list(csv.DictReader(file))
        columns = [c for c in self.columns[1:] if any(row[c] for row in rows)]
        across = min(3, len(columns)) or 1
        figure, axes = plt.subplots(math.ceil(len(columns) / across) or 1, across, figsize=(4 * across, 2.4 * math.ceil(
            len(columns) / across) or 2.4), squeeze=False, layout="constrained")
        for axis in axes.flat[len(columns):]:
            axis.set_visible(False)
        for axis, column in zip(axes.flat, columns):
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            axis.plot(*zip(*points), lw=1.2)
            axis.set_title(column, fontsize=9)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        figure.supxlabel("step", fontsize=9)
        write_atomically(self.files["curve.png"], lambda file: figure.savefig(file, format="png", dpi=110))
        plt.close(figure)


# ------------------------------------------------------------------------------------------------------- pictures

def quantize(images):
    """Floats in [0, 1] -> uint8 of the same shape, as they would be in a file."""
    return (images.detach().float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def to_uint8(images):
    """(..., 3, H, W) floats in [0, 1] -> uint8 array (..., H, W, 3)."""
    return quantize(images).movedim(-3, -1).cpu().numpy()


def sharpness(images):
    """Mean absolute difference of horizontal neighbours over each image's sharpest tenth of places: edges, not noise.

    (n, 3, H, W) in [0, 1] -> a scalar tensor; compare it with that of real images."""
    steps = images.diff(dim=-1).abs().mean(1).flatten(1)
    return steps.topk(steps.shape[1] // 10, dim=1).values.mean()


def grid(rows, captions=(), scale=None, titles=()):
    """A PIL image of rows of pictures, a caption to the left of each row and a title above each column.

    rows: a list of float tensors (n, 3, H, W) in [0, 1]. scale: how often each pixel is repeated; by default as often
    as brings a picture to about 64 pixels."""
    rows = [to_uint8(row) for row in rows]
    height, width = rows[0].shape[1:3]
    scale = scale or max(1, round(64 / height))
    gap, font = 2, ImageFont.load_default(13)
    left = max((int(font.getlength(c)) + 10 for c in captions), default=0)
    top = 18 if titles else 0
    cell_w, cell_h = width * scale + gap, height * scale + gap
    canvas = Image.new("RGB", (left + cell_w * max(len(row) for row in rows) + gap, top + cell_h * len(rows) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        draw.text((left + gap + i * cell_w + 2, 2), title, "black", font)
    for j, row in enumerate(rows):
        if j < len(captions):
            draw.text((4, top + gap + j * cell_h + cell_h // 2 - 9), captions[j], "black", font)
        for i, picture in enumerate(row):
            picture = np.repeat(np.repeat(picture, scale, 0), scale, 1)
            canvas.paste(Image.fromarray(picture), (left + gap + i * cell_w, top + gap + j * cell_h))
    return canvas


def save_image(path, image, **options):
    """Writes a PIL image atomically, in the format of the path's ending. Raises OSError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {path.parent}: {error.strerror}; choose another with --out") from error
    write_atomically(path, lambda file: image.save(file, format=path.suffix[1:].upper(), **options))
