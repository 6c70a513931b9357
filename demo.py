"""A page in the browser that shows every step of decoding (§3.3) and edits images with a brush (§4.3).

    python demo.py                       # the newest run, or the models in example/, at http://127.0.0.1:8000
    python demo.py --run runs/shapes --port 8001

The page, lib/demo.html, asks for what the methods of Demo give: /about, /photo, /validation, /draw, /look. An answer is
lines of JSON: news while it takes, then what was asked for, or {"error": ...}. Nothing is kept from one request to the
next. A page that is closed, or wants something else by now, closes its connection, and what runs for it stops.
"""
import argparse
import base64
import contextlib
import functools
import io
import itertools
import json
import math
import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

from lib import flags, runtime
from lib.data import DATA_FLAGS, admit_pixels, find_class, open_data, read_image
from lib.editing import composite, likeliest_class, to_square
from lib.flags import UserError
from lib.pictures import to_pil
from lib.sampling import STAGES, add_sampler_flags, load_run, sampler_options
from maskgit import SCHEDULES, MaskGIT, decode, decode_sequential, gamma, guided_logits, mask_counts
from vqgan import VQGAN, as_grid, to_pixels

QUESTIONS = ["/about", "/photo", "/validation", "/draw", "/look"]               # methods of Demo
MOST_BYTES = 20_000_000     # of a photo


def read_settings(settings):
    """{flag of sample.py or edit.py: text, "" for its default} -> their values. Raises ValueError."""
    def refuse(message):
        raise UserError(message)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse
    flags.add_flags(parser, {
        "class": ({"dest": "class_name"}, None, "what to draw (default: each class in turn)"),
        "num": (flags.number(int, 1, 64), 10, "images"),
        "decoder": (list(STAGES), "parallel", "which transformer of the run"),
        "feather": (flags.non_negative, 0, "of what is painted, in pixels")})
    add_sampler_flags(parser, SCHEDULES, ORDERS)
    return parser.parse_args([f"--{name}={text}" for name, text in settings.items() if text != ""])


class Upload(io.BytesIO):
    """A file that has no path by which read_image() could name it."""

    def __repr__(self):
        return "this file"


def data_url(image):
    """An image (3, H, W) in [0, 1] as text that a page can show."""
    file = io.BytesIO()
    to_pil(image).save(file, "png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Demo:
    """The models of a run, and what a page may ask of them.

    Each question takes the bytes that came, and `tell`, which sends a dict to the page and raises ConnectionError where
    nobody waits for it any more. Raises ValueError or OSError for what cannot be done."""

    def __init__(self, args, machine):
        self.args, self.machine, self.lock = args, machine, threading.Lock()
        what = {"machine": machine, "tokenizer_class": VQGAN, "transformer_class": MaskGIT, "vqgan": args.vqgan}
        self.folder, self.tokenizer, parallel, self.checkpoint = load_run(args.run, decoder="parallel", **what)
        self.models = {"parallel": parallel}
        with contextlib.suppress(FileNotFoundError, ValueError):        # it was not trained, or on other tokens
            self.models["autoregressive"] = load_run(self.folder, decoder="autoregressive", **what)[2]
        self.classes, self.stride = self.checkpoint["classes"], self.tokenizer.config.stride

    @functools.cached_property
    def validation_images(self):
        admit_pixels(self.args.max_pixels)
        return open_data(self.checkpoint["data"], self.checkpoint["image_size"], self.args.data_dir)[1]

    def about(self, body, tell):
        """What the page must know before it asks for anything else."""
        config = self.models["parallel"].config
        tell({"run": str(self.folder), "device": str(self.machine.device), "classes": self.classes,
              "size": self.checkpoint["image_size"], "tokens": config.num_tokens, "codes": config.codebook_size,
              "steps": config.default_steps, "guidance": config.null_class, "schedules": SCHEDULES, "orders": ORDERS,
              "decoders": list(self.models), "most_bytes": MOST_BYTES})

    def square(self, file):
        """The bytes of an image file -> the image as the model takes it, (3, S, S) in [0, 1]."""
        return to_square(read_image(Upload(file)), self.checkpoint["image_size"], "crop")

    def photo(self, body, tell):
        """An image file -> its "picture" at the model's size."""
        tell({"picture": data_url(self.square(body))})

    def validation(self, body, tell):
        """{"number": any whole number} -> the "picture" of that validation image."""
        number = json.loads(body)["number"] % len(self.validation_images)
        images, _ = self.validation_images.batch(np.array([number]))
        tell({"picture": data_url(images[0] / 255)})

    def draw(self, body, tell):
        """{"settings": as for read_settings(); "picture": a data URL, "region": N times 0 or 1, or neither} -> news of
        each pass; the steps (see steps_in_numbers); then the images of each step, those of the last one first.

        A picture is edited: its region, where there is a 1, is painted anew for the class, or the likeliest."""
        request = json.loads(body)
        args = read_settings(request["settings"])
        model = self.models[args.decoder]
        options = sampler_options(args, model.config) | {"generator": self.machine.generator(args.seed)}
        with self.machine.autocast():
            labels, class_name, known, picture, mask = self.subject(request, args, model)
            passes = options.get("steps", model.config.num_tokens)
            labels, started, done = self.machine.put(labels), time.time(), itertools.count(1)
            # Either decoder goes through this layer once in a pass.
            with model.norm.register_forward_pre_hook(lambda *_: tell({"done": next(done), "of": passes})):
                if model.config.causal:
                    tokens = decode_sequential(model, labels, **options)
                    steps = [(tokens, tokens < 0, tokens)]                      # the last one: nothing is masked
                else:
                    steps = decode(model, labels, known=known, return_steps=True, **options)[1]
            tell(steps_in_numbers(steps, args.schedule, (known[0] == model.mask_id).tolist())
                 | {"labels": labels.tolist(), "class": class_name, "seconds": time.time() - started})
            for t, (predicted, *_) in reversed(list(enumerate(steps, 1))):
                images = self.tokenizer.decode(as_grid(predicted)).float().cpu()
                if picture is not None:
                    images = composite(picture, images, mask, args.feather)
                tell({"step": t, "images": [data_url(image) for image in images]})

    def subject(self, request, args, model):
        """What to draw -> labels (B,), their class in words, the tokens that are known (B, N), mask_id for the others;
        and of an edit the picture (3, S, S) and the mask (S, S) of what is painted, else twice None."""
        label, name, picture, mask = None, "each class in turn", None, None
        known = torch.full((model.config.num_tokens,), model.mask_id)
        if request.get("picture"):
            picture = self.square(base64.b64decode(request["picture"].partition(",")[2]))
            tokens = self.tokenizer.encode(picture[None].to(self.machine.device))[0]
            region = torch.tensor(request["region"], device=tokens.device).view_as(tokens) > 0
            if not region.any():
                raise UserError("nothing is painted over yet: mark the region that is to be drawn anew")
            known, mask = torch.where(region, model.mask_id, tokens).flatten(), to_pixels(region, self.stride).cpu()
        if args.class_name is not None:
            label = find_class(args.class_name, self.classes)
            name = self.classes[label]
        elif picture is not None:
            label = likeliest_class(model, known, args.seed)
            name = f"{self.classes[label]} (the likeliest for what is kept of the image)"
        labels = torch.arange(args.num) % len(self.classes) if label is None else torch.full((args.num,), label)
        return labels, name, known.to(self.machine.device).expand(args.num, -1), picture, mask

    def look(self, body, tell):
        """{"settings"; "label"; "step" t; "tokens", the N codes, or null, that step t is given; "predicted", those that
        it sampled; "cell", the place of one} -> its likeliest codes, and the sampled one: "codes", their probabilities
        "p", and "patches" of 3 x 3 tokens, as the decoder makes them around it."""
        request = json.loads(body)
        model, cell, stride = self.models["parallel"], request["cell"], self.stride
        options = sampler_options(read_settings(request["settings"]), model.config)
        tokens = [model.mask_id if token is None else token for token in request["tokens"]]
        tokens, predicted = torch.tensor([tokens, request["predicted"]], device=self.machine.device)
        weight = options["cfg"] * request["step"] / options["steps"]
        with self.machine.autocast(), torch.no_grad():
            label = torch.tensor([request["label"]], device=self.machine.device)
            p = guided_logits(model, tokens[None], label, weight)[0, cell].softmax(-1)
            codes = p.topk(min(8, len(p))).indices
            codes = torch.cat([codes, predicted[cell, None]]) if predicted[cell] not in codes else codes
            variants = predicted.repeat(len(codes), 1)
            variants[:, cell] = codes
            images = self.tokenizer.decode(as_grid(variants)).float().cpu()
        side = math.isqrt(len(tokens))
        top, left = (max(0, min(place - 1, side - 3)) * stride for place in divmod(cell, side))
        patches = [data_url(image) for image in images[:, :, top:top + 3 * stride, left:left + 3 * stride]]
        tell({"codes": codes.tolist(), "p": p[codes].tolist(), "patches": patches})


def steps_in_numbers(steps, schedule, unknown):
    """What decode() returned, as lists of (step, image, token), and what the formulas say of its T steps: γ(t / T) and
    how many tokens stay masked, for t = 0 .. T, and the curve of γ(r) at 101 places.

    unknown: N times whether a token was masked at the start. The infinite confidence of known ones is given as 0."""
    predicted, masked, confidence = (torch.stack(parts).cpu() for parts in zip(*steps))
    T, M = len(steps), sum(unknown)
    return {"predicted": predicted.tolist(), "masked": masked.int().tolist(), "unknown": unknown,
            "confidence": confidence.double().nan_to_num(posinf=0).round(decimals=3).tolist(),
            "counts": [M, *mask_counts(schedule, T, M)],
            "gammas": gamma(torch.arange(T + 1) / T, schedule, M).tolist(),
            "curve": gamma(torch.linspace(0, 1, 101), schedule, M).tolist()}


class Page(BaseHTTPRequestHandler):
    """A request, in a thread of its own. Only a page that came from here may ask: none of another site (Origin), nor
    one under another name that leads to this machine (Host)."""
    timeout = 60

    def handle(self):
        with contextlib.suppress(ConnectionError, TimeoutError):                # the page has gone
            super().handle()

    def do_GET(self):
        if self.admitted(["/"]):
            self.start(200, "text/html; charset=utf-8")
            self.wfile.write(Path(__file__).parent.joinpath("lib", "demo.html").read_bytes())

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not self.admitted(QUESTIONS):
            return
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return self.refuse(413, f"this file is larger than {MOST_BYTES // 1_000_000} MB: reduce it")
        self.answer(getattr(self.server.demo, self.path[1:]), self.rfile.read(int(length)))

    def admitted(self, paths):
        """Whether this is a question of this server's page for one of these; refuses it, which is false, if not."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if urlsplit("//" + host).hostname not in ("127.0.0.1", "localhost") or origin not in (None, "http://" + host):
            return self.refuse(403, "only the page of this server is answered")
        return self.path in paths or self.refuse(404, "there is nothing here but the page itself")

    def answer(self, question, body):
        """Sends what question(body, tell) tells, when its turn has come, and what it raises."""
        self.start(200)
        while not self.server.demo.lock.acquire(timeout=0.2):
            self.tell({"waits": True})
        try:
            question(body, self.tell)
        except (ValueError, OSError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            self.tell({"error": str(error)})
        finally:
            self.server.demo.lock.release()

    def tell(self, news):
        """Sends a line of JSON. Raises ConnectionError where the page has gone."""
        self.wfile.write(json.dumps(news).encode() + b"\n")

    def refuse(self, status, reason):
        """Answers with an error. What is still being sent is read, or the sender would but see a broken connection."""
        self.start(status)
        self.wfile.write(json.dumps({"error": reason}).encode() + b"\n")
        self.connection.shutdown(socket.SHUT_WR)
        while self.rfile.read(1 << 16):
            pass

    def start(self, status, kind="application/x-ndjson"):
        self.send_response(status)
        # The page loads nothing from anywhere, and is shown in no other.
        self.send_header("Content-Security-Policy", "default-src 'none'; connect-src 'self'; img-src data:; "
                         "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'")
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *_):
        """Lists no requests on the terminal."""


def serve(args, machine):
    """Answers until Ctrl-C. Raises ValueError where the port is taken, and what load_run() raises."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Page)
    except OSError as error:
        raise UserError(f"port {args.port} cannot be had ({error.strerror}): name another with --port") from error
    server.demo = Demo(args, machine)
    print(f"{server.demo.folder}: open http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    # At its end Python would break off what computes in the midst of torch, which aborts. There is nothing to save.
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    server.serve_forever()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_flags(parser, {
        "run": (str, None, "the run's folder (default: the newest in runs/ that holds a transformer)"),
        "vqgan": (str, None, "tokenizer file (default: vqgan.pt in the run's folder)"),
        "port": (flags.number(int, 0, 65535), 8000, "of 127.0.0.1; 0 for one that is free"), **DATA_FLAGS})
    flags.add_machine_flags(parser, compiles=False)
    runtime.launch(serve, parser.parse_args())


if __name__ == "__main__":
    flags.command_line(main)
