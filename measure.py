"""What evaluate.py measures: it opens a run, draws samples, and applies its models to real images.

The networks that look at images are in lib/features.py, the formulas in lib/metrics.py.
"""
import argparse
import functools
import math
import os
import platform
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib import flags, metrics, pictures, runtime, sets
from lib.data import DATA_SETS, open_data
from lib.errors import UserError
from lib.features import Measurements, Networks, Reference, open_networks
from lib.files import fingerprint
from lib.image_files import admit_pixels
from lib.loader import DataSet
from lib.lpips import LPIPS, load_lpips_at_hand
from lib.orders import ORDERS
from lib.results import Results
from lib.sampling import (
    ACCEPT_FLAG,
    PARALLEL_FLAGS,
    SHARED_FLAGS,
    Sampler,
    load_run,
    load_sequential,
    load_tokenizer,
    rand_of_images,
    sampler_options,
)
from lib.sets import Batch, random_subset, read_batches_of_rank
from maskgit import SCHEDULES, MaskGIT, decode, mask_tokens, mvtm_loss
from sequential import CausalTransformer
from vqgan import VQGAN, as_grid, to_pixels

NEXT_TOKEN = "next token"
SAMPLER_FLAGS = [*PARALLEL_FLAGS, *SHARED_FLAGS, *ACCEPT_FLAG]
SWEEPS = {
    "choice_temperature": [0.0, 1.0, 2.0, 4.5, 8.0, 12.0],
    "temperature": [0.6, 0.7, 0.8, 0.9, 1.0, 1.1],
    "cfg": [0.0, 0.5, 1.0, 2.0, 4.0],
    "order": ORDERS,
}


# ------------------------------------------------------------------------------------------ the run

@dataclass
class Evaluation:
    """A run, and what it is measured with."""
    args: argparse.Namespace
    machine: runtime.Machine
    folder: Path                            # the run's
    tokenizer: VQGAN
    transformer: MaskGIT | None             # the one that draws; none with --tokenizer
    parallel: MaskGIT | None                # transformer, if it is the parallel one
    sequential: CausalTransformer | None    # transformer, or the run's second; for the likelihood
    data: str                               # the name or path of the data set
    train: DataSet
    real: DataSet                           # validation images
    networks: Networks
    lpips: LPIPS | None                     # with --tokenizer, if its weights are there
    results: Results
    title: str

    @functools.cached_property
    def reference(self) -> Reference:
        """Returns the real images, measured when they are needed first."""
        batches = read_batches_of_rank(self.real, self.args.batch, "real images")
        measured = self.networks.measure(batches)
        images, dimensions = measured.features.shape
        if self.machine.leads and images <= dimensions:
            print(f"note: {images} images are too few for {dimensions} features: with more images "
                  f"the {self.networks.distance} would be far lower", flush=True)
        return Reference(self.networks, measured)


def open_evaluation(args: argparse.Namespace, machine: runtime.Machine) -> Evaluation:
    """Opens the models, the data, the networks and the results. Raises UserError."""
    transformer = None
    parallel = None
    sequential = None
    lpips = None
    if args.tokenizer:
        folder, tokenizer, checkpoint = load_tokenizer(args.tokenizer, machine, args.vqgan)
        lpips = load_lpips_at_hand(machine)
    else:
        folder, tokenizer, transformer, checkpoint = load_run(
            args.run, machine, args.vqgan, args.decoder)
    check_flags(args, transformer)
    if isinstance(transformer, CausalTransformer):
        sequential = transformer
    elif transformer is not None:
        parallel = transformer
        try:
            sequential = load_sequential(folder, checkpoint, machine)
        except UserError as error:
            if machine.leads:
                print(f"note: {NEXT_TOKEN} is left out: {error}")
    train, real = open_images(args, folder, checkpoint)
    networks = open_networks(args, machine, train, folder)
    setup = {
        "tokenizer": fingerprint(tokenizer),
        "transformer": fingerprint(transformer) if transformer else None,
        "sequential transformer": fingerprint(sequential) if sequential else None,
        "features": networks.name,
        "generated images": args.num,
        "real images": len(real),
        "their signatures": zlib.crc32(real.signatures().tobytes()),
        "signatures of the training images": zlib.crc32(train.signatures().tobytes()),
        "batch": args.batch,
        "classifier steps": args.classifier_steps,
        "device": machine.device.type,
        "bf16": machine.bf16,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    results = Results(folder / "eval.json", setup, writes=machine.leads, again=args.again)
    generated = f"{args.num} generated and " if transformer else ""
    title = f"{folder}: {generated}{len(real)} real validation images, {args.features} features"
    return Evaluation(args, machine, folder, tokenizer, transformer, parallel, sequential,
                      checkpoint["data"], train, real, networks, lpips, results, title)


def open_images(args: argparse.Namespace, folder: Path,
                checkpoint: dict) -> tuple[DataSet, DataSet]:
    """Returns the training images of a run, and up to --num of its validation images.

    Raises UserError if they are not there, or not those that the run was trained on."""
    data = checkpoint["data"]
    if data not in DATA_SETS and not os.path.isdir(data):
        remedy = "put it there"
        if not os.path.isabs(data):
            remedy += ", or start this from the folder where the run was trained"
        raise UserError(f"{data}, the images that {folder} was trained on, is not there: {remedy}")
    admit_pixels(args.max_pixels)
    train, val = open_data(data, checkpoint["image_size"], args.data_dir)
    if list(train.classes) != list(checkpoint["classes"]):
        raise UserError(f"the {len(train.classes)} classes of {data} are not those that {folder} "
                        f"was trained on: restore its images")
    real = random_subset(val, args.num)
    fewest = 2 if args.tokenizer else metrics.NEIGHBOURS + 1    # of precision and recall
    if len(real) < fewest:
        raise UserError(f"--num {args.num} takes {len(real)} of the {len(val)} validation images "
                        f"of {data}, and at least {fewest} are needed: raise --num or add images")
    if len(train) < fewest:
        raise UserError(f"{data} has {len(train)} training images, and at least {fewest} are "
                        f"needed: add images")
    return train, real


def check_flags(args: argparse.Namespace, transformer: MaskGIT | None) -> None:
    """Raises UserError, before anything takes long, for flags that do not suit the transformer."""
    refuse_useless_flags(args, transformer)
    if transformer is None:
        return
    if args.ablate and min(args.ablate_steps) > transformer.config.num_tokens:
        raise UserError(f"--ablate-steps are all more than the number of tokens, "
                        f"{transformer.config.num_tokens}: name fewer steps")
    if args.manipulate and args.accept < 1:
        raise UserError("--accept chooses among whole samples, and --manipulate repaints real "
                        "images: leave one of them out")
    if args.accept < 1 and not args.classifier_steps:
        raise UserError("--accept needs the run's classifier: leave out --classifier-steps 0")
    sampler_options(args, transformer)
    if args.sweep == "choice_temperature" and args.order != "confidence":
        raise UserError(f"--sweep choice_temperature changes nothing with --order {args.order}: "
                        f"leave out --order")
    for value in SWEEPS.get(args.sweep, []):
        sampler_options(changed(args, **{args.sweep: value}), transformer)


def refuse_useless_flags(args: argparse.Namespace, transformer: MaskGIT | None) -> None:
    """Raises UserError if a flag was given that changes nothing in what is measured."""
    if not args.ablate:
        flags.refuse_useless(args, ["ablate_steps"], "without --ablate")
    if not args.ablate and not args.sweep:
        flags.refuse_useless(args, ["seeds"], "without --ablate or --sweep")
    if transformer is None:
        others = ["run", "decoder", "manipulate", "ablate", "sweep", *SAMPLER_FLAGS]
        flags.refuse_useless(args, others, "with --tokenizer, which needs no transformer")
    if isinstance(transformer, CausalTransformer):
        if args.ablate or args.sweep or args.manipulate:
            raise UserError("--ablate, --sweep and --manipulate need a parallel decoder: "
                            "add --decoder parallel")
        flags.refuse_useless(args, PARALLEL_FLAGS, "with an autoregressive decoder")
    unused = [name for name in SAMPLER_FLAGS if name not in used_sampler_flags(args)]
    flags.refuse_useless(args, unused, "where --ablate or --sweep tries several values")


def used_sampler_flags(args: argparse.Namespace) -> set[str]:
    """Returns the names of those flags of the sampler that a table is measured with."""
    if args.manipulate or not (args.ablate or args.sweep):
        return set(SAMPLER_FLAGS)
    used = set()
    if args.ablate:
        used |= set(SAMPLER_FLAGS) - {"schedule", "steps"}
    if args.sweep:
        used |= set(SAMPLER_FLAGS) - {args.sweep}
    return used


def changed(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Returns the flags with some of them changed."""
    return argparse.Namespace(**{**vars(args), **changes})


# ---------------------------------------------------------------------------- images that are drawn

def draw_tokens(run: Evaluation, args: argparse.Namespace, title: str) -> Tensor:
    """Draws the tokens (num, N) int32 of --num samples with the sampler's flags in `args`.

    The classes take turns, and the images of each are those that sample.py draws. All ranks get all
    of them. title: of the progress line."""
    sampler = Sampler(
        args, run.tokenizer, run.transformer, run.machine, run.networks.classifier)
    classes = run.transformer.config.num_classes
    drawn = []
    numbers = sets.batches_of_rank(args.num, args.batch)
    for number in sets.with_progress(numbers, args.num, args.batch, title):
        tokens = sampler.draw(*sets.samples_in_turn(number, args.batch, args.num, classes))
        run.machine.sync()
        drawn.append(tokens.to("cpu", torch.int32))
    return torch.cat(sets.gather_batches(drawn))


class Samples:
    """Samples as a data set: the tokens (n, N) of draw_tokens(), decoded when they are read."""
    workers = 0

    def __init__(self, tokens: Tensor, run: Evaluation):
        self.tokens = tokens
        self.run = run
        self.classes = run.train.classes

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: np.ndarray, seeds: Any = None) -> tuple[Tensor, Tensor]:
        """Returns images uint8 (n, 3, S, S) and the labels (n,) that they were drawn for."""
        images = to_images(self.run, self.tokens[indices].long())
        return images.cpu(), torch.from_numpy(indices) % len(self.classes)


@torch.no_grad()
def to_images(run: Evaluation, tokens: Tensor) -> Tensor:
    """Decodes tokens (n, N) to images uint8 (n, 3, S, S), as they would be in a file."""
    with run.machine.autocast():
        images = run.tokenizer.decode(as_grid(run.machine.put(tokens)))
    images = pictures.to_uint8(images)
    run.machine.sync()
    return images


@torch.no_grad()
def repainted_batches(run: Evaluation, region: Tensor, title: str) -> Iterator[Batch]:
    """Yields this rank's batches of validation images, a region of which is drawn anew.

    region: (h, w) boolean, true for the tokens that are drawn, given the true class of the image.
    title: of the progress line."""
    region = region.to(run.machine.device)
    pixels = to_pixels(region, run.tokenizer.config.stride)                         # (S, S)
    options = sampler_options(run.args, run.transformer)
    for batch in read_batches_of_rank(run.real, run.args.batch, title):
        images = run.machine.put(batch.images)
        labels = run.machine.put(batch.labels)
        places = batch.number * run.args.batch + torch.arange(len(labels))
        rand = rand_of_images(run.args.seed, batch.labels, places, run.machine)
        with run.machine.autocast():
            known = run.tokenizer.encode(run.machine.to_floats(batch.images)).flatten(1)
            known = torch.where(region.flatten(), run.transformer.mask_id, known)   # (n, N)
            tokens = decode(run.transformer, labels, known=known, rand=rand, **options)
        repainted = torch.where(pixels, to_images(run, tokens), images)
        run.machine.sync()
        yield Batch(batch.number, repainted.cpu(), batch.labels)


# -------------------------------------------------------------------------------- validation images

class ImageMeasurements(NamedTuple):
    """What was measured on validation images: tensors on the CPU with a row for each image."""
    tokens: Tensor      # (n, N)
    psnr: Tensor        # (n,), of the reconstruction
    lpips: Tensor       # (n,), its perceptual distance; NaN without the network's weights
    nll: Tensor         # (n, L), the mean of the image's batch for each of likelihood_names()
    right: Tensor       # (n, schedules), how many masked tokens are predicted right
    masked: Tensor      # (n, schedules), how many tokens are masked


def measure_validation_images(run: Evaluation) -> dict:
    """Measures the tokenizer and the transformers on validation images.

    Returns figures of the tokenizer; under "NLL" the likelihood of tokens by schedule (Table 3);
    under "accuracy by mask ratio", if the decoder is parallel, what accuracy_by_mask_ratio() does;
    under "reconstructions" a row of Table 1."""
    measured_images = []
    measured_reconstructions = []
    for batch in read_batches_of_rank(run.real, run.args.batch, "validation images"):
        measured, restored = measure_batch(run, batch)
        measured_images.append(measured)
        measured_reconstructions.append(run.networks.measure_batch(restored, batch.labels))
    return summarise(
        run,
        sets.concatenate(sets.gather_batches(measured_images)),
        sets.concatenate(sets.gather_batches(measured_reconstructions)),
    )


@torch.no_grad()
def measure_batch(run: Evaluation, batch: Batch) -> tuple[ImageMeasurements, Tensor]:
    """Measures the models on a batch. Returns also the reconstructions, uint8 (n, 3, S, S)."""
    floats = run.machine.to_floats(batch.images)
    labels = run.machine.put(batch.labels)
    with run.machine.autocast():
        tokens = run.tokenizer.encode(floats).flatten(1)                            # (n, N)
        restored = run.tokenizer.decode(as_grid(tokens)).float()
        lpips = torch.full((len(tokens),), math.nan)
        if run.lpips is not None:
            lpips = run.lpips(restored, floats)
    psnr = metrics.psnr(floats, restored)
    seed = runtime.step_seed(run.args.seed, batch.number)
    nll, right, masked = measure_predictions(run, tokens, labels, seed)
    # Every image gets its batch's mean, so that a mean over images weights batches by their size.
    nll = nll.expand(len(tokens), -1)
    run.machine.sync()
    measured = ImageMeasurements(
        tokens.cpu(), psnr.cpu(), lpips.cpu(), nll.cpu(), right.cpu(), masked.cpu())
    return measured, pictures.to_uint8(restored).cpu()


def measure_predictions(run: Evaluation, tokens: Tensor, labels: Tensor,
                        seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Predicts masked tokens under every schedule, and each next token, if the run has the models.

    tokens: (n, N). labels: (n,). seed: of the masks. Returns the mean losses of the batch, one for
    each of likelihood_names(), and how many tokens of each image were predicted right and how many
    were masked, both (n, schedules)."""
    generator = torch.Generator().manual_seed(seed)
    # Each begins with an empty tensor, so that cat() works for a run that lacks one of the models.
    losses = [torch.zeros(0, device=tokens.device)]
    right = [torch.zeros(len(tokens), 0, dtype=torch.long, device=tokens.device)]
    masked = [torch.zeros(len(tokens), 0, dtype=torch.long, device=tokens.device)]
    if run.parallel is not None:
        for schedule in SCHEDULES:
            visible, mask = mask_tokens(tokens, schedule, run.parallel.mask_id, generator)
            with run.machine.autocast():
                logits = run.parallel(visible, labels)                              # (n, N, codes)
            losses.append(mvtm_loss(logits, tokens, mask, label_smoothing=0).view(1))
            right_tokens = (logits.argmax(-1) == tokens) & mask
            right.append(right_tokens.sum(1, keepdim=True))
            masked.append(mask.sum(1, keepdim=True))
    if run.sequential is not None:
        with run.machine.autocast():
            logits = run.sequential(tokens, labels)
        every_token = torch.ones_like(tokens, dtype=torch.bool)
        losses.append(mvtm_loss(logits, tokens, every_token, label_smoothing=0).view(1))
    return torch.cat(losses).double(), torch.cat(right, 1), torch.cat(masked, 1)


def likelihood_names(run: Evaluation) -> list[str]:
    """Returns what the losses of measure_predictions() are of."""
    names = list(SCHEDULES) if run.parallel is not None else []
    if run.sequential is not None:
        names.append(NEXT_TOKEN)
    return names


def summarise(run: Evaluation, measured: ImageMeasurements, restored: Measurements) -> dict:
    """Returns the figures of measure_validation_images(), from the measurements of all images."""
    entries = run.tokenizer.config.codebook_size
    num_tokens = measured.tokens.numel()
    frequencies = torch.bincount(measured.tokens.flatten(), minlength=entries).double() / num_tokens
    figures = {
        "PSNR, dB": measured.psnr.mean().item(),
        "codebook usage": (frequencies > 0).sum().item() / min(entries, num_tokens),
        "codebook perplexity": torch.exp(-torch.xlogy(frequencies, frequencies).sum()).item(),
        "NLL": dict(zip(likelihood_names(run), measured.nll.mean(0).tolist(), strict=True)),
    }
    if run.lpips is not None:
        figures["LPIPS"] = measured.lpips.mean().item()
    if run.parallel is not None:
        figures["accuracy by mask ratio"] = metrics.accuracy_by_mask_ratio(
            measured.right.flatten(), measured.masked.flatten(), measured.tokens.shape[1])
    figures["reconstructions"] = run.reference.figures(restored)
    return figures
