"""Measures speed: training of both stages, decoding, the tokenizer; each as a share of the matrix-product peak.

    python bench.py                                  # the paper's 256 x 256 configuration
    python bench.py --rows train-transformer decode --batch 4 --json bench.json
    python bench.py --preset imagenet256 imagenet512 --rows train-transformer --batch 1 2 4
    python bench.py --preset imagenet256 imagenet512 --rows decode sequential          # both decoders (Figure 4)

What is timed are the training scripts' own train_step()s, maskgit's decode() and decode_sequential(), which makes a
pass for each token, with a cache, and the tokenizer's encode() and decode(). lib/costs.py counts their FLOPs. The peak
is the fastest of a few square matrix products of the same precision, timed before and after each row.
"""
import argparse
import dataclasses
import functools
import gc
import itertools
import json
import platform
import statistics
import timeit
from pathlib import Path
from types import SimpleNamespace

import torch

import train_transformer
import train_vq
from lib import flags, runtime
from lib.costs import flops
from lib.files import write_atomically
from lib.lpips import LPIPS
from maskgit import MaskGIT, decode, decode_sequential
from vqgan import VQGAN

PRESETS = {"imagenet256": ("imagenet", 256), "imagenet512": ("imagenet", 512), "cifar10": ("cifar10", 32),
           "shapes": ("shapes", 32)}


def configuration(preset):
    """The flags of both stages, as the training scripts have them, and the configurations of both models."""
    name, size = PRESETS[preset]
    own = {"seed": 0, "parts": 1, "init": None, "decoder": "parallel"}
    one, two = (SimpleNamespace(**script.PRESETS[name], **own) for script in (train_vq, train_transformer))
    one.image_size, one.perceptual = size, "lpips" if size >= 128 else "none"
    vqgan, _ = train_vq.configuration(one)
    classes, side = 1000 if name == "imagenet" else 10, size // vqgan.stride
    maskgit = train_transformer.configuration(two, vqgan.codebook_size, side ** 2, classes)
    return SimpleNamespace(stage1=one, stage2=two, vqgan=vqgan, maskgit=maskgit, image_size=size, side=side)


def seconds(machine, repeats, function, *arguments):
    """Median time of function(*arguments), after two calls to warm up (and compile)."""
    def call():
        function(*arguments)
        machine.sync()
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
    return statistics.median(timeit.repeat(call, number=1, repeat=repeats + 2)[2:])


def matrix_peak(machine):
    """FLOP/s of the fastest square matrix product, in the precision that the rows run in."""
    sides = (4096, 8192) if machine.device.type == "cuda" else (1024, 2048)
    dtype = torch.bfloat16 if machine.bf16 else torch.float32
    squares = [torch.randn(n, n, device=machine.device, dtype=dtype) for n in sides]
    return max(2 * len(a) ** 3 / seconds(machine, 7, torch.matmul, a, a) for a in squares)


def start_afresh(machine):
    """Forgets what earlier rows compiled, of which torch.compile would make graphs of any shape, and their memory."""
    torch.compiler.reset()
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(machine):
    """Bytes since start_afresh: allocated on the GPU, or resident in this process (Linux; elsewhere not known)."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else 0


def time_train_transformer(machine, sizes, batch, repeats):
    args, config = sizes.stage2, sizes.maskgit
    nets = train_transformer.build(args, config, machine)
    tokens = machine.put(torch.randint(config.codebook_size, (batch, config.num_tokens)))
    labels = machine.put(torch.randint(config.num_classes, (batch,)))
    took = seconds(machine, repeats, train_transformer.train_step, nets, tokens, labels, args.warmup, args, machine,
                   machine.seed_step(0, 0))
    return took, flops(train_transformer.imagined_step(args, config, batch)[1])


def time_train_vq(machine, sizes, batch, repeats):
    """With the discriminator and, from 128 pixels on, LPIPS (of random weights, which take as long).

    The R1 penalty, due at every r1_every-th step, counts in proportion; its FLOPs, hidden from the counter, do not."""
    args, shape = sizes.stage1, (batch, 3, sizes.image_size, sizes.image_size)
    nets = train_vq.build(args, sizes.vqgan, machine, LPIPS() if args.perceptual == "lpips" else None)
    images = machine.to_floats(torch.randint(256, shape, dtype=torch.uint8))
    due = args.steps - args.steps % args.r1_every                       # by then, the discriminator has set in
    with_r1, without = (seconds(machine, repeats, train_vq.train_step, nets, images, step, args, machine)
                        for step in (due, due + 1))
    counted = flops(train_vq.imagined_step(args, sizes.vqgan, batch)[1])
    return without + (with_r1 - without) / args.r1_every, counted


@torch.no_grad()
def time_inference(row, machine, sizes, batch, repeats):
    """decode, sequential: from labels to tokens. encode: from images to tokens. restore: from tokens to images."""
    function, model, config = {
        "decode": (functools.partial(decode, steps=sizes.maskgit.default_steps), MaskGIT, sizes.maskgit),
        "sequential": (decode_sequential, MaskGIT, dataclasses.replace(sizes.maskgit, causal=True)),
        "encode": (VQGAN.encode, VQGAN, sizes.vqgan), "restore": (VQGAN.decode, VQGAN, sizes.vqgan)}[row]
    if row == "encode":
        shape = batch, 3, sizes.image_size, sizes.image_size
        given = torch.rand(shape).contiguous(memory_format=machine.layout)
    elif row == "restore":
        given = torch.randint(config.codebook_size, (batch, sizes.side, sizes.side))
    else:
        given = torch.arange(batch) % config.num_classes
    with torch.device("meta"):
        imagined = model(config)
    count = flops(functools.partial(function, imagined, given.to("meta")))
    model = machine.freeze(model(config).to(machine.device, memory_format=machine.layout).eval())
    # Of the decoders only the model's passes are compiled.
    if row == "decode":
        model = machine.compile(model)
    elif row == "sequential":
        model.predict = machine.compile(model.predict)
    else:
        function = machine.compile(function)
    with machine.autocast():
        return seconds(machine, repeats, function, model, machine.put(given)), count


# By row: a function that returns seconds and FLOPs of a batch; how many images that is, on a CPU for the presets of the
# paper's size, and on a GPU or for `shapes`.
ROWS = {
    "train-transformer": (time_train_transformer, [4], [256]),
    "decode": (functools.partial(time_inference, "decode"), [1, 4, 16], [1, 16, 64, 256]),
    "sequential": (functools.partial(time_inference, "sequential"), [1, 4], [1, 16, 64]),
    "train-vq": (time_train_vq, [1], [32]),
    "encode": (functools.partial(time_inference, "encode"), [1], [64]),
    "restore": (functools.partial(time_inference, "restore"), [1], [64]),
}


def measure(machine, args):
    """Times every row that is asked for, prints it and yields it, a dict."""
    print("preset       row                batch   seconds  images/s  TFLOP/s    peak  share   memory")
    for preset, row in itertools.product(args.preset, args.rows):
        function, few, many = ROWS[row]
        for batch in args.batch or (many if machine.device.type == "cuda" or preset == "shapes" else few):
            torch.manual_seed(0)
            start_afresh(machine)
            before = matrix_peak(machine)
            try:
                took, count = function(machine, configuration(preset), batch, args.repeats)
            except RuntimeError as error:
                if not flags.out_of_memory(error):
                    raise
                print(f"{preset:12} {row:18} {batch:5}   out of memory", flush=True)
                continue
            memory, peak = peak_memory(machine), max(before, matrix_peak(machine))
            print(f"{preset:12} {row:18} {batch:5} {took:9.4g} {batch / took:9.4g} {count / took / 1e12:8.4g} "
                  f"{peak / 1e12:7.4g} {count / took / peak:6.1%} {memory / 2 ** 30:5.2f} GB", flush=True)
            yield {"preset": preset, "row": row, "batch": batch, "seconds": took, "flops": count, "peak": peak,
                   "images_per_second": batch / took, "share": count / took / peak, "memory": memory}


def bench(args, machine):
    cpu = f"{platform.machine()} {machine.device.type}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if machine.device.type == "cuda" else cpu
    precision = "bfloat16" if machine.bf16 else "float32"
    print(f"{name}, {precision}, torch {torch.__version__}, compiled: {machine.compiled}")
    content = {"device": name, "precision": precision, "torch": torch.__version__, "rows": []}
    for row in measure(machine, args):
        content["rows"].append(row)
        if args.json:
            write_atomically(args.json, lambda file: file.write(json.dumps(content, indent=1).encode()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_flags(parser, {
        "preset": ({"nargs": "+", "choices": PRESETS}, ["imagenet256"], "sizes to measure"),
        "rows": ({"nargs": "+", "choices": ROWS}, list(ROWS), "what to measure"),
        "batch": ({"type": flags.count, "nargs": "+"}, None, "images at once (default: what suits the device)"),
        "repeats": (flags.count, 3, "timed calls of each row, whose median counts"),
        "json": (str, None, "also write the numbers to this file")})
    flags.add_machine_flags(parser)
    runtime.launch(bench, parser.parse_args())


if __name__ == "__main__":
    flags.command_line(main)
