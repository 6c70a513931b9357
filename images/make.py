"""Draws the pictures of README.md, NOTES.md and LOG.md from one run: seed 0, nothing selected.

    python images/make.py                                   # all, of example/
    python images/make.py --run runs/shapes --out pictures  # of another run of shapes
    python images/make.py film edit                         # these alone
    python images/make.py ablation                          # Figure 8, hours: only if it is named

Prints the command that makes each picture. The photos that are edited are the first validation
images of their classes. The pictures of the page need Chromium and playwright.
"""
import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import demo  # noqa: E402
import evaluate  # noqa: E402
from images.data_flow import draw_data_flow  # noqa: E402
from lib import flags, pictures  # noqa: E402
from lib.data import open_data  # noqa: E402
from lib.errors import UserError, command_line  # noqa: E402
from lib.files import write_atomically  # noqa: E402
from lib.loader import DataSet  # noqa: E402
from lib.runtime import Machine  # noqa: E402
from lib.sampling import load_run  # noqa: E402
from measure import measure_validation_images, open_evaluation  # noqa: E402

ACCURACY_IMAGES = 5000
PAGE_SIZE = {"width": 1240, "height": 900}
TIMEOUT = 600_000                   # milliseconds that the page may take
GAP = 12                            # white pixels between pictures that are put side by side


class Job(NamedTuple):
    """What the pictures are made of."""
    run: Path
    first_run: Path                 # of the README's training command
    out: Path                       # the folder of the pictures
    scratch: Path                   # a folder for what they are put together from
    size: int                       # of the model's images
    classes: list[str]
    validation: DataSet


def open_job(args: argparse.Namespace, scratch: str) -> Job:
    """Returns the job that the flags ask for. Raises UserError."""
    run = Path(os.path.relpath(args.run))               # as it is shown
    _, _, _, checkpoint = load_run(run, Machine())
    size = checkpoint["image_size"]
    _, validation = open_data(checkpoint["data"], size)
    args.out.mkdir(parents=True, exist_ok=True)
    return Job(run, args.first_run, args.out, Path(scratch), size, checkpoint["classes"],
               validation)


# --------------------------------------------------------------------------------------- the means

def run_script(script: str, run: Path, *words: object) -> None:
    """Starts a script of this project on a run, and prints the command. Raises UserError if it
    fails."""
    command = [script, *map(str, words), "--run", str(run)]
    print("    python", *command, flush=True)
    try:
        subprocess.run([sys.executable, ROOT / command[0], *command[1:]], check=True,
                       stdout=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        raise UserError(f"{script} has failed: see its message above") from error


def label_of(job: Job, name: str) -> int:
    """Returns the label of a class. Raises UserError if the run has no such class."""
    if name not in job.classes:
        raise UserError(f"{job.run} has no class {name}: name a run of shapes with --run")
    return job.classes.index(name)


def first_image(job: Job, name: str) -> Tensor:
    """Returns the first validation image of a class, (3, S, S) in [0, 1]. Raises UserError."""
    label = label_of(job, name)
    for index in range(len(job.validation)):
        images, labels = job.validation.batch(np.array([index]))
        if labels[0] == label:
            return images[0] / 255
    raise UserError(f"there is no validation image of {name}")


def edit(job: Job, photo: str, *words: object) -> Image.Image:
    """Returns what edit.py draws for the first validation image of a class."""
    path = job.scratch / f"{photo}.png"
    pictures.save_image(path, pictures.to_pil(first_image(job, photo)))
    out = job.scratch / "edited.png"
    run_script("edit.py", job.run, path, *words, "--out", out)
    with Image.open(out) as picture:
        return picture.convert("RGB")


def write_picture(path: Path, picture: bytes) -> None:
    """Writes the bytes of a picture file, whole or not at all."""
    write_atomically(path, lambda file: file.write(picture))


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Returns the images one below the other."""
    width = max(image.width for image in images)
    canvas = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    return canvas


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Returns two images side by side, the lower one in the middle."""
    height = max(left.height, right.height)
    canvas = Image.new("RGB", (left.width + GAP + right.width, height), "white")
    canvas.paste(left, (0, (height - left.height) // 2))
    canvas.paste(right, (left.width + GAP, (height - right.height) // 2))
    return canvas


@contextlib.contextmanager
def open_page(job: Job, link: str = "") -> Iterator:
    """Serves the run and yields demo.py's page in a browser.

    Raises UserError without a browser, or if the page does not do what is waited for."""
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise UserError("playwright is missing: pip install playwright") from error
    if browser_path is None:
        raise UserError("there is no Chromium: apt-get install chromium")
    print(f"    python demo.py --run {job.run}   # {link or 'as it opens'}", flush=True)
    args = argparse.Namespace(run=job.run, vqgan=None, data_dir="data", max_pixels=10 ** 8)
    server = demo.open_server(demo.Demo(args, Machine()), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            page = browser.new_page(viewport=PAGE_SIZE)
            page.set_default_timeout(TIMEOUT)
            page.goto(f"http://127.0.0.1:{server.server_port}/{link}")
            yield page
            browser.close()
    except Error as error:
        reason = error.message.splitlines()[0]
        raise UserError(f"the page in {browser_path} failed ({reason}): run this again, with "
                        f"nothing else on this computer") from error
    finally:
        server.shutdown()


# ------------------------------------------------------------------------------------ the pictures

def draw_example(job: Job) -> None:
    """Draws eight samples of each class."""
    run_script("sample.py", job.run, "--out", job.out / "example.png")


def draw_film(job: Job) -> None:
    """Draws the decoding steps of one image of each class."""
    run_script("sample.py", job.run, "--film", "--out", job.scratch / "samples.png")
    write_picture(job.out / "film.png", (job.scratch / "samples.film.png").read_bytes())


def draw_samples(job: Job) -> None:
    """Draws samples of the run that the README's training command makes. Raises UserError if it
    is not there."""
    if not job.first_run.exists():
        raise UserError(f"there is no {job.first_run}: train it, or name it with --first-run")
    run_script("sample.py", job.first_run, "--out", job.out / "samples.png")


def draw_flow(job: Job) -> None:
    """Draws the way of a fish through both models."""
    machine = Machine("cpu", bf16=False)
    _, tokenizer, transformer, _ = load_run(job.run, machine, decoder="parallel")
    draw_data_flow(job.out / "data-flow.png", first_image(job, "fish"), label_of(job, "fish"),
                   tokenizer, transformer)


def draw_edit(job: Job) -> None:
    """Draws all four tasks of editing."""
    eighth = job.size // 8
    box = f"{eighth},{eighth},{5 * eighth},{5 * eighth}"
    repainted = stack([
        edit(job, "heart", "--box", box, "--class", "fish", "--num", 6),
        edit(job, "house", "--inpaint", "centre", "--num", 6),
        edit(job, "fish", "--outpaint", "right=0.5", "--num", 6),
    ])
    panorama = edit(job, "ring", "--extrapolate", 3 * job.size, "--num", 1)
    pictures.save_image(job.out / "edit.png", beside(repainted, panorama))


def draw_drift(job: Job) -> None:
    """Draws panoramas that are eight images wide."""
    wide = 8 * job.size
    tree = edit(job, "tree", "--extrapolate", wide, "--num", 1)
    box = edit(job, "box", "--extrapolate", wide, "--num", 1)
    pictures.save_image(job.out / "limit-drift.png", stack([tree, box]))


def draw_boundary(job: Job) -> None:
    """Draws objects at the border of the region."""
    rows = [edit(job, name, "--outpaint", "right=0.5", "--num", 6)
            for name in ("moon", "cross", "ring")]
    pictures.save_image(job.out / "limit-boundary.png", stack(rows))


def draw_symmetry(job: Job) -> None:
    """Draws samples of symmetric classes."""
    run_script("sample.py", job.run, "--class", "cross", "box", "tree", "--num", 10,
               "--out", job.out / "limit-symmetry.png")


def draw_accuracy(job: Job) -> None:
    """Draws the accuracy against the share of masked tokens, as evaluate.py does."""
    words = ["--run", str(job.run), "--num", str(ACCURACY_IMAGES)]
    print("    python evaluate.py", *words, "   # of it only this curve", flush=True)
    args = evaluate.parse_flags(words)
    figures = measure_validation_images(open_evaluation(args, Machine()))
    pictures.draw_accuracy(job.out / "accuracy.png", figures["accuracy by mask ratio"])


def draw_ablation(job: Job) -> None:
    """Draws Figure 8."""
    run_script("evaluate.py", job.run, "--ablate", "--ablate-steps", 8, 16, "--num", 400)
    write_picture(job.out / "ablation.png", (job.run / "eval.ablation.png").read_bytes())


def draw_page(job: Job) -> None:
    """Draws the page of demo.py in the middle of a decoding, with a look into one token."""
    heart = label_of(job, "heart")
    with open_page(job) as page:
        page.wait_for_selector("#status:has-text('passes: ')")
        page.evaluate(f"chosenImage = {heart}; goTo(5); "
                      "chooseToken(Math.floor(side * 3 / 8) * side + side / 4)")
        page.wait_for_selector(".code")
        write_picture(job.out / "demo.png", page.screenshot(full_page=True))


def draw_compare(job: Job) -> None:
    """Draws both decoders when the parallel one is done, as the page compares them."""
    with open_page(job, "#mode=compare") as page:
        page.wait_for_selector("#status:has-text('both decoders')")
        page.evaluate("pause(); goTo(Math.ceil(MOMENTS * timings[1].parallel / longestTime()))")
        write_picture(job.out / "compare.png", page.locator("section").screenshot())


PICTURES = {
    "example": draw_example,
    "film": draw_film,
    "data-flow": draw_flow,
    "demo": draw_page,
    "samples": draw_samples,
    "edit": draw_edit,
    "compare": draw_compare,
    "accuracy": draw_accuracy,
    "limit-drift": draw_drift,
    "limit-boundary": draw_boundary,
    "limit-symmetry": draw_symmetry,
    "ablation": draw_ablation,
}


def draw(args: argparse.Namespace) -> None:
    """Draws the pictures that the flags name. Leaves out one that cannot be drawn, and says why.

    Raises UserError if the run cannot be opened, and at the end if a picture was left out."""
    left_out = []
    with tempfile.TemporaryDirectory() as scratch:
        job = open_job(args, scratch)
        for name in args.pictures:
            print(f"{name}.png", flush=True)
            started = time.time()
            try:
                PICTURES[name](job)
                print(f"    {time.time() - started:.0f} s", flush=True)
            except UserError as error:
                print(f"    left out: {error}", file=sys.stderr, flush=True)
                left_out.append(name)
    if left_out:
        raise UserError(f"left out for the reasons above: {', '.join(left_out)}")


def main() -> None:
    """Parses the flags and draws."""
    parser = flags.Parser(__doc__)
    parser.add_argument("pictures", nargs="*", metavar="PICTURE",
                        help=f"which pictures (default: all but ablation): {', '.join(PICTURES)}")
    flags.add_flags(parser, {
        "run": (Path, ROOT / "example", "the run's folder"),
        "first_run": (Path, ROOT / "runs" / "shapes", "the run of the README's training command, "
                                                      "for samples.png"),
        "out": (Path, ROOT / "images", "the folder to write to"),
    })
    args = parser.parse_args()
    if not args.pictures:
        args.pictures = [name for name in PICTURES if name != "ablation"]
    for name in args.pictures:
        if name not in PICTURES:
            raise UserError(f"there is no picture {name}: choose among {', '.join(PICTURES)}")
    draw(args)


if __name__ == "__main__":
    command_line(main)
