"""Measures speed: training of both stages, both decoders, the tokenizer's two halves.

    python bench.py                                     # the paper's 256 x 256 configuration
    python bench.py --rows train-transformer decode --batch 4 --json bench.json
    python bench.py --preset imagenet256 imagenet512 --rows train-transformer --batch 1 2 4
    python bench.py --preset imagenet256 imagenet512 --rows decode sequential       # Figure 4

A row is timed several times, and the median counts. Its FLOP/s are also given as a share of the
peak: that of the fastest square matrix product in the same precision, timed before and after.

The images and tokens are random, which takes as long as real ones. Reading images, encoding them
for stage 2, logging and saving are left out.
"""
import contextlib
import gc
import itertools
import json
import platform
import re
import statistics
import timeit
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import train_transformer
import train_vq
from discriminator import Discriminator, discriminator_loss, r1_penalty
from lib import costs, flags, optim, plans
from lib.errors import UserError, command_line, out_of_memory
from lib.files import write_atomically
from lib.lpips import LPIPS
from lib.runtime import LONG_TRAINING, Machine, launch
from maskgit import MaskGIT, MaskGITConfig, decode, drop_labels, mask_tokens, mvtm_loss
from sequential import CausalTransformer, KeyValueCache, decode_sequential
from vqgan import VQGAN, VQGANConfig

# Each preset: the training scripts' preset, the image size, the number of classes.
PRESETS = {
    "imagenet256": ("imagenet", 256, 1000),
    "imagenet512": ("imagenet", 512, 1000),
    "cifar10": ("cifar10", 32, 10),
    "shapes": ("shapes", 32, 10),
}


class Sizes(NamedTuple):
    """What a preset stands for: the flags of both training scripts, and both configurations."""
    vq: Namespace
    transformer: Namespace
    vqgan: VQGANConfig
    maskgit: MaskGITConfig
    grid: int                                                   # tokens along each side


def sizes_of(preset: str) -> Sizes:
    """Returns what the training scripts would train for this preset."""
    name, image_size, num_classes = PRESETS[preset]
    vq = Namespace(**train_vq.PRESETS[name], init=None)
    vq.image_size = image_size
    vq.perceptual = "lpips" if image_size >= 128 else "none"
    transformer = Namespace(decoder="parallel", init=None, **train_transformer.PRESETS[name])
    vqgan = train_vq.configuration(vq)
    grid = image_size // vqgan.stride
    maskgit = train_transformer.configuration(
        transformer, vqgan.codebook_size, grid ** 2, num_classes)
    return Sizes(vq, transformer, vqgan, maskgit, grid)


class Cost(NamedTuple):
    """What a row takes for one batch."""
    seconds: float
    flops: float


# ---- the clock and the memory

def seconds(machine: Machine, repeats: int, function: Callable[[], object]) -> float:
    """Returns the median time of a call, after two calls that compile and warm up."""
    def call() -> None:
        result = function()                     # kept until it is computed: see Machine.wait()
        machine.wait()
        del result
    return statistics.median(timeit.repeat(call, number=1, repeat=repeats + 2)[2:])


def matrix_peak(machine: Machine) -> float:
    """Returns the FLOP/s of the fastest square matrix product, in the precision of the rows."""
    widths = (4096, 8192) if machine.device.type == "cuda" else (1024, 2048)
    dtype = torch.bfloat16 if machine.bf16 else torch.float32
    speeds = []
    for width in widths:
        square = torch.randn(width, width, device=machine.device, dtype=dtype)
        product = partial(torch.matmul, square, square)
        speeds.append(2 * width ** 3 / seconds(machine, 7, product))
    return max(speeds)


def free_memory(machine: Machine) -> None:
    """Frees the memory of the row before, and forgets its compiled graphs: after those of eight
    batch sizes torch.compile would go on without compiling."""
    torch.compiler.reset()
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak_memory(machine: Machine) -> None:
    """Makes peak_memory() count from now on, where the system lets it."""
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):                      # only on Linux, not in every container
        Path("/proc/self/clear_refs").write_text("5")       # 5 resets the peak


def peak_memory(machine: Machine) -> int:
    """Returns the most bytes since reset_peak_memory(): allocated on the GPU, or resident in this
    process; 0 where the system does not tell."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    sizes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return int(sizes[1]) * 1024 if sizes else 0


# ---- the rows

def time_train_transformer(machine: Machine, sizes: Sizes, batch: int, repeats: int) -> Cost:
    """Times a step of train_transformer.py, from tokens on."""
    args = sizes.transformer
    model = MaskGIT(sizes.maskgit)
    flops = batch * plans.transformer_flops(model)
    model = machine.place(model)
    ema = optim.averaged(model)
    optimizers = optim.transformer_optimizers(
        model, args.optimizer, args.lr, args.muon_lr, args.weight_decay, machine).values()
    ddp_model = machine.wrap(model, model.blocks)
    shape = batch, sizes.maskgit.num_tokens
    tokens = machine.put(torch.randint(sizes.maskgit.codebook_size, shape))
    classes = machine.put(torch.randint(sizes.maskgit.num_classes, (batch,)))

    def step() -> None:
        generator = machine.seed_step(0, 0)
        labels = classes
        if sizes.maskgit.null_class:
            labels = drop_labels(labels, args.class_dropout, model.null_label, generator)
        visible, mask = mask_tokens(tokens, args.schedule, model.mask_id, generator)
        ddp_model.zero_grad(set_to_none=True)
        with machine.micro_batch(ddp_model, last=True):
            with machine.autocast():
                logits = ddp_model(visible, labels)
                loss = mvtm_loss(logits, tokens, mask, args.label_smoothing)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        optim.update_average(ema, model, args.ema, args.steps)
    return Cost(seconds(machine, repeats, step), flops)


class TokenizerTraining:
    """What train_vq.py trains, and a step of it with the discriminator; from 128 pixels on with
    LPIPS as well (of random weights)."""

    def __init__(self, machine: Machine, sizes: Sizes, batch: int):
        args = sizes.vq
        self.machine = machine
        self.args = args
        self.model = VQGAN(sizes.vqgan)
        self.disc = Discriminator(
            args.image_size, args.disc_width, args.disc_max_width, centred=True)
        self.lpips = LPIPS() if args.perceptual == "lpips" else None
        self.flops = batch * plans.tokenizer_flops(
            self.model, self.disc, self.lpips, args.image_size)
        machine.place(self.model)
        machine.place(self.disc)
        if self.lpips is not None:
            self.lpips = machine.compile(machine.place(self.lpips))
        self.ema = optim.averaged(self.model)
        self.optimizer = train_vq.tokenizer_optimizer(args, self.model, machine)
        self.disc_optimizer = torch.optim.Adam(
            self.disc.parameters(), lr=args.disc_lr, betas=(args.beta1, 0.99),
            fused=machine.fused)
        self.ddp_model = machine.wrap(self.model)
        self.ddp_disc = machine.wrap(self.disc)
        self.compiled_disc = machine.compile(self.disc)
        shape = batch, 3, args.image_size, args.image_size
        self.images = machine.to_floats(torch.randint(256, shape, dtype=torch.uint8))

    def step(self, penalty: bool) -> None:
        """Trains the tokenizer, then the discriminator. penalty: with R1."""
        args = self.args
        machine = self.machine
        self.disc.requires_grad_(False)
        self.ddp_model.zero_grad(set_to_none=True)
        with machine.micro_batch(self.ddp_model, last=True):
            with machine.autocast():
                loss, _, restored = train_vq.tokenizer_loss(
                    args, self.ddp_model, self.compiled_disc, self.lpips, args.adversarial,
                    self.images)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        optim.update_average(self.ema, self.model, args.ema, args.steps)

        self.disc.requires_grad_(True)
        self.ddp_disc.zero_grad(set_to_none=True)
        with machine.micro_batch(self.ddp_disc, last=True):
            with machine.autocast():
                both = torch.cat([self.images, restored])
                real_logits, fake_logits = self.ddp_disc(both).float().chunk(2)
                loss = discriminator_loss(real_logits, fake_logits, args.gan_loss)
            if penalty:
                loss = loss + args.r1_every * args.r1 * r1_penalty(self.disc, self.images)
            loss.backward()
        self.disc_optimizer.step()


def time_train_vq(machine: Machine, sizes: Sizes, batch: int, repeats: int) -> Cost:
    """Times a step of train_vq.py.

    Every r1_every-th step takes the R1 penalty, whose time counts in proportion. Its FLOPs do not
    count."""
    training = TokenizerTraining(machine, sizes, batch)
    plain = seconds(machine, repeats, partial(training.step, penalty=False))
    penalized = seconds(machine, repeats, partial(training.step, penalty=True))
    return Cost(plain + (penalized - plain) / sizes.vq.r1_every, training.flops)


@torch.no_grad()
def time_decode(machine: Machine, sizes: Sizes, batch: int, repeats: int) -> Cost:
    """Times parallel decoding in the paper's number of steps, without guidance: labels to tokens.
    """
    model = MaskGIT(sizes.maskgit).eval()
    steps = sizes.maskgit.default_steps
    with costs.imagined():
        tokens = torch.zeros(batch, sizes.maskgit.num_tokens, dtype=torch.long)
        flops = steps * costs.forward_flops(model, tokens, tokens[:, 0])
    model = machine.compile(machine.freeze(machine.place(model)))
    labels = machine.put(torch.arange(batch) % sizes.maskgit.num_classes)
    with machine.autocast():
        return Cost(seconds(machine, repeats, partial(decode, model, labels, steps)), flops)


@torch.no_grad()
def time_sequential(machine: Machine, sizes: Sizes, batch: int, repeats: int) -> Cost:
    """Times raster-scan decoding, a pass for each token, with the key/value cache: labels to
    tokens."""
    model = CausalTransformer(sizes.maskgit).eval()
    with costs.imagined():
        rows = torch.zeros(batch, 1, dtype=torch.long)
        cache = KeyValueCache(sizes.maskgit, batch, rows.device, torch.float32)
        flops = sizes.maskgit.num_tokens * costs.forward_flops(model.next_logits, rows, cache)
    model = machine.freeze(machine.place(model))
    model.next_logits = machine.compile(model.next_logits)
    labels = machine.put(torch.arange(batch) % sizes.maskgit.num_classes)
    with machine.autocast():
        return Cost(seconds(machine, repeats, partial(decode_sequential, model, labels)), flops)


@torch.no_grad()
def time_encode(machine: Machine, sizes: Sizes, batch: int, repeats: int) -> Cost:
    """Times the tokenizer from images to tokens."""
    model = VQGAN(sizes.vqgan).eval()
    shape = batch, 3, sizes.vq.image_size, sizes.vq.image_size
    with costs.imagined():
        flops = costs.forward_flops(model.encode, torch.zeros(shape))
    model = machine.freeze(machine.place(model))
    encode = machine.compile(model.encode)
    images = machine.to_floats(torch.randint(256, shape, dtype=torch.uint8))
    with machine.autocast():
        return Cost(seconds(machine, repeats, partial(encode, images)), flops)


@torch.no_grad()
def time_restore(machine: Machine, sizes: Sizes, batch: int, repeats: int) -> Cost:
    """Times the tokenizer from tokens to images."""
    model = VQGAN(sizes.vqgan).eval()
    shape = batch, sizes.grid, sizes.grid
    with costs.imagined():
        flops = costs.forward_flops(model.decode, torch.zeros(shape, dtype=torch.long))
    model = machine.freeze(machine.place(model))
    restore = machine.compile(model.decode)
    tokens = machine.put(torch.randint(sizes.vqgan.codebook_size, shape))
    with machine.autocast():
        return Cost(seconds(machine, repeats, partial(restore, tokens)), flops)


ROWS = {
    "train-transformer": time_train_transformer,
    "decode": time_decode,
    "sequential": time_sequential,
    "train-vq": time_train_vq,
    "encode": time_encode,
    "restore": time_restore,
}
# Images at once.
GPU_BATCHES = {"train-transformer": [256], "decode": [1, 16, 64, 256], "sequential": [1, 16, 64],
               "train-vq": [32], "encode": [64], "restore": [64]}
CPU_BATCHES = {"train-transformer": [4], "decode": [1, 4, 16], "sequential": [1, 4],
               "train-vq": [1], "encode": [1], "restore": [1]}


# ---- the table

def measure(machine: Machine, preset: str, row: str, batch: int, repeats: int) -> dict | None:
    """Times a row and prints it. Returns its numbers, or None if memory ran out."""
    torch.manual_seed(0)
    free_memory(machine)
    peak_before = matrix_peak(machine)
    reset_peak_memory(machine)
    try:
        cost = ROWS[row](machine, sizes_of(preset), batch, repeats)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(f"{preset:12} {row:18} {batch:5}   out of memory", flush=True)
        return None
    memory = peak_memory(machine)
    peak = max(peak_before, matrix_peak(machine))
    images_per_second = batch / cost.seconds
    speed = cost.flops / cost.seconds
    print(f"{preset:12} {row:18} {batch:5} {cost.seconds:9.4g} {images_per_second:9.4g} "
          f"{speed / 1e12:8.4g} {peak / 1e12:7.4g} {speed / peak:6.1%} {memory / 2 ** 30:5.2f} GiB",
          flush=True)
    return {
        "preset": preset,
        "row": row,
        "batch": batch,
        "seconds": cost.seconds,
        "flops": cost.flops,
        "peak": peak,
        "images_per_second": images_per_second,
        "share": speed / peak,
        "memory": memory,
    }


def write_json(path: str, content: dict) -> None:
    """Writes the numbers. Raises UserError if that cannot be done."""
    text = json.dumps(content, indent=1).encode()
    write_atomically(path, lambda file: file.write(text))


def check_writable(path: str) -> None:
    """Raises UserError if a file cannot be written, before anything is measured."""
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name another file with "
                        f"--json") from error


def bench(args: Namespace, machine: Machine) -> None:
    """Measures all rows, and writes the file anew after each."""
    device = f"{platform.machine()} {machine.device.type}, {torch.get_num_threads()} threads"
    if machine.device.type == "cuda":
        device = torch.cuda.get_device_name()
    precision = "bfloat16" if machine.bf16 else "float32"
    compiled = machine.compiled
    if machine.compiles_blocks and not machine.compiled:
        compiled = "the transformer's blocks, in training"
    print(f"{device}, {precision}, torch {torch.__version__}, compiled: {compiled}")
    print("preset       row                batch   seconds  images/s  TFLOP/s    peak  share   "
          "memory")
    content = {"device": device, "precision": precision, "torch": torch.__version__, "rows": []}
    if args.json:
        check_writable(args.json)
    for preset, row in itertools.product(args.preset, args.rows):
        batches = CPU_BATCHES
        if machine.device.type == "cuda" or preset == "shapes":     # its models are small
            batches = GPU_BATCHES
        for batch in args.batch or batches[row]:
            numbers = measure(machine, preset, row, batch, args.repeats)
            if numbers is not None:
                content["rows"].append(numbers)
            if args.json:
                write_json(args.json, content)


def main() -> None:
    """Runs the script."""
    parser = flags.Parser(__doc__)
    flags.add_flags(parser, {
        "preset": ({"nargs": "+", "choices": PRESETS}, ["imagenet256"], "sizes to measure"),
        "rows": ({"nargs": "+", "choices": ROWS}, list(ROWS), "what to measure"),
        "batch": ({"type": flags.count, "nargs": "+"}, None,
                  "images at once (default: what suits the device)"),
        "repeats": (flags.count, 3, "timed calls of each row, whose median counts"),
        "json": (str, None, "also write the numbers to this file"),
    })
    flags.add_machine_flags(parser)
    # As long as a training that compiles its blocks on a CPU.
    launch(bench, parser.parse_args(), training_steps=LONG_TRAINING)


if __name__ == "__main__":
    command_line(main)
