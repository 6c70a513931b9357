"""What all scripts that draw share: flags of the run and of the sampler, and loading a run.

Of lib/, only this file, plans.py and layouts.py know the models of both stages.
"""
import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.errors import UserError
from lib.files import fingerprint, rebuild
from lib.flags import add_flags, count, non_negative, number, seed
from lib.orders import ORDERS, make_order
from lib.pictures import EXAMPLE, grey_out
from lib.runtime import Machine, step_seed
from maskgit import SCHEDULES, MaskGIT, Rand, check_decoding, decode
from sequential import CausalTransformer, decode_sequential
from vqgan import VQGAN, as_grid

# A decoder's stage of training: the parallel one is kept as transformer.pt, the other one as
# autoregressive.pt. Then the stage's model.
STAGES = {"parallel": "transformer", "autoregressive": "autoregressive"}
MODELS = {"transformer": MaskGIT, "autoregressive": CausalTransformer}


def unit_fraction(text: str) -> float:
    """Reads 1, 0.5, 0.33, 0.25, ...: about one divided by a whole number."""
    value = number(float, 0.001, 1)(text)
    if abs(round(1 / value) * value - 1) > 0.02:
        raise argparse.ArgumentTypeError(f"{text} is not 1, 0.5, 0.33, 0.25, 0.2 or the like")
    return value


ACCEPT_FLAG = {
    "accept": (unit_fraction, 1.0,
               "1, or 0.5, 0.33, 0.25, ...: of 2, 3, 4, ... candidates for each image, keep the "
               "one that the run's classifier scores highest"),
}


RUN_FLAGS = {
    "run": (str, None, "the run's folder (default: the newest in runs/ with a transformer)"),
    "vqgan": (str, None, "tokenizer file (default: vqgan.pt in the run's folder)"),
}
DECODER_FLAG = {
    "decoder": (list(STAGES), None,
                "which transformer of the run (default: parallel, if any); the autoregressive one "
                "takes only --temperature, --top-k and --seed"),
}
# The arguments of both decoding functions as flags; those of decode() alone; --seed.
SHARED_FLAGS = {
    "temperature": (non_negative, 1.0,
                    "temperature of the token samples; 0 takes the likeliest"),
    "top_k": (count, None, "sample among the K likeliest tokens (default: all)"),
}
PARALLEL_FLAGS = {
    "steps": (count, None, "T, decoding steps (default: 8; 12 for 32 x 32 tokens)"),
    "schedule": (SCHEDULES, "cosine", "mask schedule"),
    "choice_temperature": (non_negative, None,
                           "noise in the choice of which tokens to keep (default: the run's, "
                           "from --choice-temperature of train_transformer.py)"),
    "cfg": (non_negative, None,
            "weight of classifier-free guidance (default: 1 if the run was trained with "
            "--class-dropout, else 0)"),
    "order": (ORDERS, "confidence", "which tokens are revealed first"),
}
SEED_FLAG = {"seed": (seed, 0, "seed of every random draw")}


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the sampler; sampler_options() reads them."""
    group = parser.add_argument_group("the sampler")
    add_flags(group, PARALLEL_FLAGS | SHARED_FLAGS | SEED_FLAG)


def sampler_options(args: argparse.Namespace, model: MaskGIT) -> dict:
    """Returns the keyword arguments for the model's decoding function that the flags ask for.

    Raises UserError for a value that does not suit the model."""
    config = model.config
    if args.top_k and args.top_k > config.codebook_size:
        raise UserError(f"--top-k {args.top_k} is more than the codebook's {config.codebook_size} "
                        f"entries: choose fewer")
    options = {"temperature": args.temperature, "top_k": args.top_k}
    if isinstance(model, CausalTransformer):
        return options
    settings = decoding_settings(args, model)
    for name in ("steps", "schedule", "cfg"):
        options[name] = settings[name]
    try:
        check_decoding(model, options["steps"], options["schedule"], cfg=options["cfg"])
        options["order"] = make_order(
            settings["order"], config.num_tokens, settings["choice_temperature"],
            model.head_bias.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    return options


def sampler_settings(args: argparse.Namespace, model: MaskGIT) -> dict:
    """Returns decoding_settings() and the value of --accept."""
    return {"accept": args.accept} | decoding_settings(args, model)


def decoding_settings(args: argparse.Namespace, model: MaskGIT) -> dict:
    """Returns the settings of the model's decoding function as plain values, defaults filled in."""
    names = list(SHARED_FLAGS)
    if not isinstance(model, CausalTransformer):
        names += PARALLEL_FLAGS
    defaults = {                                            # those that depend on the model
        "steps": model.config.default_steps,
        "choice_temperature": model.config.choice_temperature,
        "cfg": default_guidance(model),
    }
    settings = {}
    for name in names:
        value = getattr(args, name)
        settings[name] = defaults.get(name) if value is None else value
    return settings


def default_guidance(model: MaskGIT) -> float:
    """Returns the default of --cfg: 1 for a model with a null class, else 0."""
    return 0.0 if model.null_label is None else 1.0


def sampler_of(model: MaskGIT) -> Callable[..., Tensor]:
    """Returns the model's decoding function: sampler(model, labels, **options) -> tokens (B, N)."""
    return decode_sequential if isinstance(model, CausalTransformer) else decode


def rand_of_images(seed: int, labels: Tensor, numbers: Tensor, machine: Machine) -> Rand:
    """Returns a function like torch.rand for a batch of images, each with a generator of its own.

    So on one kind of device, image number k of a class is always drawn from the same random
    numbers, whatever is drawn beside it. labels, numbers: of the images, (B,) on the CPU."""
    # torch-xla has a single generator, so its numbers are drawn on the CPU.
    generator_device = torch.device("cpu") if machine.mesh else machine.device
    generators = []
    for label, k in zip(labels.tolist(), numbers.tolist(), strict=True):
        seed_of_image = step_seed(seed, label, k)
        generators.append(torch.Generator(generator_device).manual_seed(seed_of_image))

    def rand(*shape: int, device: torch.device) -> Tensor:      # the device is always the machine's
        values = torch.empty(shape, device=generator_device)
        for row, generator in zip(values, generators, strict=True):
            row.uniform_(generator=generator)
        return machine.put(values)
    return rand


class Sampler:
    """Draws images of a run: image k of a class is a function of the seed, the class and k alone,
    on a GPU but for rounding.

    args: of add_sampler_flags() and ACCEPT_FLAG. classifier: images (B, 3, S, S) -> logits of the
    classes; only --accept needs it. Raises UserError for flags that do not suit the transformer."""

    def __init__(self, args: argparse.Namespace, tokenizer: VQGAN, transformer: MaskGIT,
                 machine: Machine, classifier: nn.Module | None = None):
        self.seed = args.seed
        self.options = sampler_options(args, transformer)
        self.candidates = round(1 / args.accept)
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.machine = machine
        self.classifier = classifier

    def draw(self, labels: Tensor, numbers: Tensor) -> Tensor:
        """Returns the tokens (B, N) of images of these classes and numbers k, both (B,) on the CPU.

        With --accept 1/c, image k is one of the candidates c·k to c·k + c - 1."""
        first = self.candidates * numbers
        best = self.decode(labels, first)
        if self.candidates == 1:
            return best
        best_score = self.score(best, labels)
        for i in range(1, self.candidates):
            tokens = self.decode(labels, first + i)
            score = self.score(tokens, labels)
            best = torch.where(score > best_score, tokens, best)
            best_score = torch.maximum(score, best_score)
        return best

    def decode(
        self, labels: Tensor, numbers: Tensor,
        on_step: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Decodes tokens (B, N), without rejecting any. on_step: as for maskgit.decode()."""
        rand = rand_of_images(self.seed, labels, numbers, self.machine)
        sampler = sampler_of(self.transformer)
        labels = self.machine.put(labels)
        with self.machine.autocast():
            return sampler(self.transformer, labels, rand=rand, on_step=on_step, **self.options)

    @torch.no_grad()
    def score(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns log p(class | image) by the classifier, (B, 1)."""
        log_p = self.classifier(self.images(tokens)).log_softmax(-1)
        return log_p.gather(1, self.machine.put(labels)[:, None])

    @torch.no_grad()
    def images(self, tokens: Tensor) -> Tensor:
        """Returns the images of tokens (B, N), floats (B, 3, S, S) in [0, 1] on the device."""
        with self.machine.autocast():
            return self.tokenizer.decode(as_grid(tokens)).float()


@torch.no_grad()
def draw_step(
    tokenizer: VQGAN, tokens: Tensor, masked: Tensor, opacity: float = 0.85, batch: int = 64,
) -> Tensor:
    """Returns a step of decoding as images (n, 3, H, W), on the CPU: grey where it is masked.

    tokens, masked: (n, h, w). opacity: of the grey; below 1, what was predicted shines through.
    batch: images to decode at once."""
    images = []
    for codes, mask in zip(tokens.split(batch), masked.split(batch), strict=True):
        images.append(grey_out(tokenizer.decode(codes), mask, opacity).float().cpu())
    return torch.cat(images)


def load_run(
    folder: str | Path | None, machine: Machine,
    vqgan: str | None = None, decoder: str | None = None,
) -> tuple[Path, VQGAN, MaskGIT, dict]:
    """Loads a run's models onto the machine.

    folder: of the run; None for the newest that has the decoder. vqgan: another tokenizer file.
    decoder: one of STAGES; None for parallel, unless the run holds only the other.
    Returns the folder, the tokenizer, the transformer, and the transformer's checkpoint.
    Raises UserError if a file is missing or the two models do not belong together."""
    folder = Path(folder or newest_run([STAGES[decoder]] if decoder else MODELS))
    if decoder is None:
        decoder = "parallel"
        if not (folder / "transformer.pt").exists() and (folder / "autoregressive.pt").exists():
            decoder = "autoregressive"
    stage = STAGES[decoder]
    path = folder / f"{stage}.pt"
    tokenizer_path = Path(vqgan or folder / "vqgan.pt")
    transformer, checkpoint = rebuild(path, stage, MODELS[stage])
    tokenizer, _ = rebuild(tokenizer_path, "vqgan", VQGAN)
    if tokenizer.config.codebook_size != transformer.config.codebook_size:
        raise UserError(f"{path} was trained with a codebook of "
                        f"{transformer.config.codebook_size} entries, but {tokenizer_path} has "
                        f"{tokenizer.config.codebook_size}: name the right file with --vqgan")
    if fingerprint(tokenizer) != checkpoint["tokenizer"]:
        raise UserError(f"{tokenizer_path} is not the tokenizer that {path} was trained with (was "
                        f"it trained again later?): run train_transformer.py again, or name the "
                        f"right file with --vqgan")
    tokenizer = machine.freeze(machine.place(tokenizer))
    transformer = machine.freeze(machine.place(transformer))
    return folder, tokenizer, transformer, checkpoint


def load_sequential(folder: Path, parallel: dict, machine: Machine) -> CausalTransformer | None:
    """Loads a run's autoregressive transformer onto the machine, to be compared with its parallel
    one. Returns None if the run has none.

    parallel: the parallel transformer's checkpoint. Raises UserError if the two do not draw the
    same tokens for the same classes."""
    path = folder / "autoregressive.pt"
    if not path.exists():
        return None
    transformer, checkpoint = rebuild(path, "autoregressive", CausalTransformer)
    for name in ("tokenizer", "image_size", "classes"):
        if checkpoint[name] != parallel[name]:
            raise UserError(f"{path} was not trained with the {name.replace('_', ' ')} of "
                            f"transformer.pt: train it again")
    return machine.freeze(machine.place(transformer))


def load_tokenizer(
    folder: str | Path | None, machine: Machine, vqgan: str | None = None,
) -> tuple[Path, VQGAN, dict]:
    """Loads a run's tokenizer alone, which needs no transformer. The arguments are as above.

    Returns the folder, the tokenizer, and the tokenizer's checkpoint."""
    folder = Path(folder or newest_run(["vqgan"]))
    tokenizer, checkpoint = rebuild(Path(vqgan or folder / "vqgan.pt"), "vqgan", VQGAN)
    return folder, machine.freeze(machine.place(tokenizer)), checkpoint


def newest_run(stages: Iterable[str]) -> Path:
    """Returns the folder in runs/ with the newest model of one of these stages, or example/ if
    there is none."""
    models = [path for stage in stages for path in Path("runs").glob(f"*/{stage}.pt")]
    if not models:
        return EXAMPLE
    return max(models, key=lambda path: path.stat().st_mtime).parent
