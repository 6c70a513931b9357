"""Serves a page that shows every step of decoding (§3.2) and edits images with a brush (§4.3).

    python demo.py                    # the newest run, or example/, at http://127.0.0.1:8000
    python demo.py --run runs/shapes --port 8001

The page is in lib/demo/. Its questions, /about, /photo, /validation, /draw, /look and /clock, go
through lib/web.py to the methods of Demo with these names. No state of a page is kept between
requests. When the page no longer wants an answer it closes the connection, and the work for it
stops.
"""
import argparse
import base64
import functools
import io
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import flags, runtime
from lib.data import DATA_FLAGS, open_data
from lib.editing import MOST_FEATHER, composite, default_feather, likeliest_class, to_square
from lib.errors import UserError, command_line
from lib.files import fingerprint
from lib.image_files import admit_pixels, read_image
from lib.loader import DataSet
from lib.orders import ORDERS
from lib.pictures import to_pil
from lib.runtime import Machine
from lib.sampling import (
    RUN_FLAGS,
    STAGES,
    add_sampler_flags,
    decoding_settings,
    load_run,
    load_sequential,
    rand_of_images,
    sampler_of,
    sampler_options,
)
from lib.sets import samples_in_turn
from lib.web import MAX_UPLOAD, PageServer, Tell
from maskgit import SCHEDULES, MaskGIT, gamma, guided_logits, mask_counts
from vqgan import as_grid, to_pixels

PAGE = Path(__file__).parent / "lib" / "demo"
MAX_IMAGES = 64
MAX_NUMBERS = 1 << 20       # images x steps x tokens: of each the page is told several
SHOWN_CODES = 8             # the likeliest codes of a token
TIMED_RUNS = 5              # of which the fastest counts
TIMED_SECONDS = 1           # for all of these, unless two take longer


class SettingsParser(argparse.ArgumentParser):
    """Parses the page's settings as flags; a bad one is a UserError."""

    def error(self, message: str) -> None:
        raise UserError(message.removeprefix("argument --"))      # the page knows no flags


def options_of(settings: argparse.Namespace, model: MaskGIT) -> dict:
    """Returns sampler_options(). The page knows no flags, so its errors name none."""
    try:
        return sampler_options(settings, model)
    except UserError as error:
        raise UserError(str(error).removeprefix("--")) from error


class Upload(io.BytesIO):
    """The bytes of a file without a path. Errors of read_image() name it by its repr."""

    def __repr__(self) -> str:
        return "this file"


def data_url(image: Tensor) -> str:
    """Returns an image (3, H, W) in [0, 1] as text that a page can show."""
    file = io.BytesIO()
    to_pil(image).save(file, "png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Demo:
    """The models of a run, and the answers to a page's questions.

    Each question is a method that takes the body of the request and `tell`, which sends a line of
    the answer. It raises UserError for what the user can mend."""

    def __init__(self, args: argparse.Namespace, machine: Machine):
        admit_pixels(args.max_pixels)
        self.args = args
        self.machine = machine
        self.folder, self.tokenizer, parallel, self.checkpoint = load_run(
            args.run, machine, args.vqgan, decoder="parallel")
        self.models = {"parallel": parallel}
        try:
            sequential = load_sequential(self.folder, self.checkpoint, machine)
            if sequential is not None:
                self.models["autoregressive"] = sequential
        except UserError as error:
            print(f"the page has no Compare: {error}")
        self.classes = self.checkpoint["classes"]
        self.stride = self.tokenizer.config.stride

    @functools.cached_property
    def run_id(self) -> str:
        """Identifies the models: a server of other models has another text."""
        models = [self.tokenizer, *self.models.values()]
        return "-".join(fingerprint(model) for model in models)

    @functools.cached_property
    def validation_images(self) -> DataSet:
        """The run's validation data set. Raises UserError if it cannot be opened."""
        name = self.checkpoint["data"]
        try:
            _, validation = open_data(name, self.checkpoint["image_size"], self.args.data_dir)
        except UserError as error:
            remedy = "start demo.py in the folder where it was trained, or give --data-dir"
            if os.path.isabs(name):
                remedy = f"put the folder back at {name}"
            raise UserError(f"the data of this run cannot be opened ({error}): {remedy}") from error
        return validation

    def read_settings(self, texts: dict[str, str]) -> argparse.Namespace:
        """Parses {flag of sample.py or edit.py: its text, or "" for its default}."""
        parser = SettingsParser(add_help=False, allow_abbrev=False)
        flags.add_flags(parser, {
            "num": (flags.number(int, 1, MAX_IMAGES), 10, "images"),
            "decoder": (list(STAGES), "parallel", "which transformer of the run"),
            "feather": (flags.number(float, 0, MOST_FEATHER), default_feather(self.stride),
                        "blur of the border"),
        })
        add_sampler_flags(parser)
        return parser.parse_args([f"--{flag}={text}" for flag, text in texts.items() if text != ""])

    def about(self, body: bytes, tell: Tell) -> None:
        """Tells what the page must know before it asks anything else."""
        model = self.models["parallel"]
        settings = self.read_settings({})
        settings = vars(settings) | decoding_settings(settings, model)
        defaults = {name.replace("_", "-"): value for name, value in settings.items()}
        tell({
            "run": str(self.folder),
            "run_id": self.run_id,
            "device": str(self.machine.device),
            "classes": self.classes,
            "size": self.checkpoint["image_size"],
            "tokens": model.config.num_tokens,
            "codes": model.config.codebook_size,
            "guidance": model.null_label is not None,
            "decoders": list(self.models),
            "schedules": SCHEDULES,
            "orders": ORDERS,
            "defaults": defaults,
            "max_images": MAX_IMAGES,
            "max_upload": MAX_UPLOAD,
        })

    def read_photo(self, file: bytes) -> Tensor:
        """Returns an image file as the model takes it, (3, S, S) in [0, 1]. Raises UserError."""
        return to_square(read_image(Upload(file)), self.checkpoint["image_size"], "crop")

    def photo(self, body: bytes, tell: Tell) -> None:
        """Tells the "picture" of an image file, at the model's size."""
        tell({"picture": data_url(self.read_photo(body))})

    def validation(self, body: bytes, tell: Tell) -> None:
        """Tells the "picture" of the validation image of any whole "number"."""
        number = json.loads(body)["number"] % len(self.validation_images)
        images, _ = self.validation_images.batch(np.array([number]))
        tell({"picture": data_url(images[0] / 255)})

    def draw(self, body: bytes, tell: Tell) -> None:
        """Draws images, or paints a region of a picture anew.

        The request: "settings", as for read_settings(); "label", the index of a class or null for
        each in turn, or for the likeliest in an edit; to edit, "picture", a data URL, and "region",
        for each token whether it is painted anew. Tells of each pass; then the steps, see
        steps_in_numbers(); then the images of each step, the last first."""
        request = json.loads(body)
        settings = self.read_settings(request["settings"])
        model = self.models[settings.decoder]
        options = options_of(settings, model)
        num_tokens = model.config.num_tokens
        passes = options.get("steps", num_tokens)
        check_amount(settings.num, options.get("steps", 1), num_tokens)
        decoded_steps = []

        def on_step(t: int, sampled: Tensor, masked: Tensor, confidence: Tensor) -> None:
            tell({"done": t, "of": passes})
            if settings.decoder == "parallel" or t == passes:       # of the other only the last
                decoded_steps.append((sampled, masked, confidence))

        label = request["label"]
        picture = None
        region = torch.tensor(request.get("region", [True] * num_tokens))           # (N,)
        with self.machine.autocast():
            if "picture" in request:
                picture, known = self.read_edit(request["picture"], region)
                options["known"] = known.expand(settings.num, -1)
                if label is None:
                    label = likeliest_class(model, known, settings.seed)
            labels, numbers = images_of(label, settings.num, len(self.classes))
            options["rand"] = rand_of_images(settings.seed, labels, numbers, self.machine)

            started = time.perf_counter()
            sampler_of(model)(model, self.machine.put(labels), on_step=on_step, **options).cpu()
            tell({
                "seconds": time.perf_counter() - started,       # .cpu() has waited for a GPU
                **steps_in_numbers(decoded_steps, settings.schedule, int(region.sum())),
                "unknown": region.tolist(),
                "settings": vars(settings) | decoding_settings(settings, model),
                "labels": labels.tolist(),
            })
            tokens_of_steps = [sampled for sampled, _, _ in decoded_steps]
            self.tell_images(tokens_of_steps, picture, region, settings.feather, tell)

    def tell_images(
        self, tokens_of_steps: list[Tensor], picture: Tensor | None, region: Tensor,
        feather: float, tell: Tell,
    ) -> None:
        """Tells the images of each step, the last step first.

        tokens_of_steps: (B, N) each. picture: (3, S, S), into whose region (N,) they are painted;
        None if nothing is edited."""
        mask = to_pixels(as_grid(region[None]), self.stride)[0]
        for t in range(len(tokens_of_steps), 0, -1):
            images = self.tokenizer.decode(as_grid(tokens_of_steps[t - 1])).float().cpu()
            if picture is not None:
                images = composite(picture, images, mask, feather)
            tell({"step": t, "images": [data_url(image) for image in images]})

    def read_edit(self, picture_url: str, region: Tensor) -> tuple[Tensor, Tensor]:
        """Reads a picture, a data URL, whose region (N,) bool is to be painted anew.

        Returns the picture (3, S, S) in [0, 1] and its tokens (N,), mask_id in the region. Raises
        UserError if the region is empty."""
        if not region.any():
            raise UserError("nothing is painted over yet: mark the region to draw anew")
        _, _, encoded = picture_url.partition(",")
        picture = self.read_photo(base64.b64decode(encoded))
        tokens = self.tokenizer.encode(picture[None].to(self.machine.device)).flatten()
        tokens[region.to(tokens.device)] = self.models["parallel"].mask_id
        return picture, tokens

    def look(self, body: bytes, tell: Tell) -> None:
        """Tells the likeliest codes of one token at one step, and the code that was sampled.

        The request: "settings" and "label", as drawn; "step", t; "visible", the N codes that step t
        is given, null where masked; "sampled", the N codes that it sampled; "place", the token's
        index. The answer: "codes", the "probabilities" of each, and "patches" of 3 x 3 tokens, as
        the decoder makes them around each code."""
        request = json.loads(body)
        model = self.models["parallel"]
        place = request["place"]
        options = options_of(self.read_settings(request["settings"]), model)
        weight = options["cfg"] * request["step"] / options["steps"]
        device = self.machine.device
        visible = [model.mask_id if code is None else code for code in request["visible"]]
        visible = torch.tensor([visible], device=device)                            # (1, N)
        sampled = torch.tensor(request["sampled"], device=device)                   # (N,)
        label = torch.tensor([request["label"]], device=device)
        with self.machine.autocast(), torch.no_grad():
            logits = guided_logits(model, visible, label, weight)[0, place]
            probabilities = logits.softmax(-1)
            codes = probabilities.topk(min(SHOWN_CODES, len(probabilities))).indices
            if sampled[place] not in codes:
                codes = torch.cat([codes, sampled[place, None]])
            variants = sampled.repeat(len(codes), 1)
            variants[:, place] = codes
            images = self.tokenizer.decode(as_grid(variants)).float().cpu()
        side = math.isqrt(len(sampled))
        row, column = divmod(place, side)
        top = max(0, min(row - 1, side - 3)) * self.stride
        left = max(0, min(column - 1, side - 3)) * self.stride
        width = 3 * self.stride
        patches = images[:, :, top:top + width, left:left + width]
        tell({
            "codes": codes.tolist(),
            "probabilities": probabilities[codes].tolist(),
            "patches": [data_url(patch) for patch in patches],
        })

    def clock(self, body: bytes, tell: Tell) -> None:
        """Tells how long each decoder takes to draw several numbers of images.

        The request: "settings", as for read_settings(), and "numbers", of images. The answer, for
        each of these and each decoder: {"num", "decoder"} before every run, then {"num", "decoder",
        "seconds"}: the transformer's time, without turning tokens into pixels, and with torch.rand
        for all images, since a generator for each would be timed as well."""
        request = json.loads(body)
        settings = self.read_settings(request["settings"])
        for num in request["numbers"]:
            labels = self.machine.put(torch.arange(num) % len(self.classes))
            for decoder, model in self.models.items():
                options = options_of(settings, model)
                measured = {"num": num, "decoder": decoder}
                on_run = functools.partial(tell, measured)
                seconds = self.shortest_time(model, labels, options, on_run)
                tell(measured | {"seconds": seconds})

    def shortest_time(
        self, model: MaskGIT, labels: Tensor, options: dict, on_run: Callable[[], None],
    ) -> float:
        """Returns the seconds of the fastest of several runs of a decoder.

        on_run: is called before each; it raises ConnectionError if the page has gone."""
        times = []
        while len(times) < 2 or (len(times) < TIMED_RUNS and sum(times) < TIMED_SECONDS):
            on_run()
            started = time.perf_counter()
            with self.machine.autocast():
                tokens = sampler_of(model)(model, labels, **options)
            tokens.cpu()                                # waits for a GPU
            times.append(time.perf_counter() - started)
        return min(times)


def check_amount(num: int, steps: int, tokens: int) -> None:
    """Raises UserError if the numbers of so many steps are too many for a page."""
    if num * steps * tokens > MAX_NUMBERS:
        raise UserError(f"{steps} steps of {num} images with {tokens} tokens each are too many to "
                        f"show: ask for fewer images or steps")


def images_of(label: int | None, num: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Returns the labels and the numbers k, both (num,), of the images to draw.

    They are images 0, 1, ... of a class or, with label None, of each class in turn."""
    if label is None:
        return samples_in_turn(0, num, num, num_classes)
    numbers = torch.arange(num)
    return torch.full_like(numbers, label), numbers


def steps_in_numbers(
    steps: list[tuple[Tensor, Tensor, Tensor]], schedule: str, total: int,
) -> dict[str, list]:
    """Returns what decode() told of its T steps, as lists [step][image][token], and the formulas.

    total: how many tokens were masked at the start. "counts", the tokens that stay masked, and
    "gammas", γ(t / T), are of t = 0 .. T; "curve" is γ at 101 places from 0 to 1. The infinite
    confidence of known tokens is given as 0."""
    T = len(steps)
    sampled = torch.stack([step[0] for step in steps])                              # (T, B, N)
    masked = torch.stack([step[1] for step in steps])
    confidence = torch.stack([step[2] for step in steps])
    return {
        "sampled": sampled.tolist(),
        "masked": masked.tolist(),
        "confidence": confidence.double().nan_to_num(posinf=0).round(decimals=3).tolist(),
        "counts": [total, *mask_counts(schedule, T, total)],
        "gammas": gamma(torch.arange(T + 1) / T, schedule, total).tolist(),
        "curve": gamma(torch.linspace(0, 1, 101), schedule, total).tolist(),
    }


def open_server(demo: Demo, port: int) -> PageServer:
    """Returns a server that answers the page's questions. Raises UserError if the port is taken."""
    questions = {
        "/about": demo.about,
        "/photo": demo.photo,
        "/validation": demo.validation,
        "/draw": demo.draw,
        "/look": demo.look,
        "/clock": demo.clock,
    }
    return PageServer(port, PAGE, questions, demo.run_id)


def serve(args: argparse.Namespace, machine: Machine) -> None:
    """Answers until Ctrl-C. Raises UserError if the run cannot be loaded or the port is taken."""
    demo = Demo(args, machine)
    server = open_server(demo, args.port)
    address = f"http://127.0.0.1:{server.server_port}"
    print(f"{demo.folder}: open {address} in a browser (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGINT, stop)
    server.serve_forever()


def stop(number: int, frame: object) -> None:
    """Ends the process at once: an exception in the midst of torch would abort it."""
    os._exit(0)


def main() -> None:
    """Parses the flags and serves."""
    parser = flags.Parser(__doc__)
    flags.add_flags(parser, {
        **RUN_FLAGS,
        "port": (flags.number(int, 0, 65535), 8000, "port on 127.0.0.1; 0 takes a free one"),
        **DATA_FLAGS,
    })
    flags.add_machine_flags(parser, compiles=False)
    runtime.launch(serve, parser.parse_args())


if __name__ == "__main__":
    command_line(main)
