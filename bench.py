"""Measures speed: training of both stages, decoding, the tokenizer; each as a share of the matrix-product peak.

    python bench.py                                  # the paper's 256 x 256 configuration
    python bench.py --rows train-transformer decode --batch 4 --json bench.json
    python bench.py --preset imagenet256 imagenet512 --rows train-transformer --batch 1 2 4 --plot rate.png
    python bench.py --compare --preset imagenet256 imagenet512 --plot runtime.png      # both decoders (Figure 4)

What is timed are the training scripts' own train_step()s, maskgit's decode() and the tokenizer's encode() and decode().
lib/costs.py counts their FLOPs. The peak is the fastest of a few square matrix products of the same precision, timed
before and after each row. --compare times single passes and multiplies: parallel decoding passes over all positions at
each step; sequential decoding is timed at eight places, with its cache and without.
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
from lib import devices
from lib.checkpoints import write_atomically
from lib.costs import flops
from lib.lpips import LPIPS
from lib.pictures import new_figure
from maskgit import MaskGIT, decode, sample_tokens
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
    """decode: all steps from class labels to tokens. encode: from images to tokens. restore: from tokens to images."""
    size, side, decoding = sizes.image_size, sizes.side, functools.partial(decode, steps=sizes.maskgit.default_steps)
    function, given = {
        "decode": (decoding, torch.arange(batch) % sizes.maskgit.num_classes),
        "encode": (VQGAN.encode, torch.rand(batch, 3, size, size).contiguous(memory_format=machine.layout)),
        "restore": (VQGAN.decode, torch.randint(sizes.vqgan.codebook_size, (batch, side, side)))}[row]
    model = MaskGIT(sizes.maskgit) if row == "decode" else VQGAN(sizes.vqgan)
    model = machine.freeze(model.to(machine.device, memory_format=machine.layout).eval())
    # Of decode(), only the model's passes are compiled.
    fast = (function, machine.compile(model)) if row == "decode" else (machine.compile(function), model)
    with machine.autocast():
        took = seconds(machine, repeats, *fast, machine.put(given))
    return took, flops(lambda: function(model.to("meta", torch.float32), given.to("meta")))


# By row: a function that returns seconds and FLOPs of a batch; how many images that is, on a CPU for the presets of the
# paper's size, and on a GPU or for `shapes`.
ROWS = {
    "train-transformer": (time_train_transformer, [4], [256]),
    "decode": (functools.partial(time_inference, "decode"), [1, 4, 16], [1, 16, 64, 256]),
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
                if not devices.out_of_memory(error):
                    raise
                print(f"{preset:12} {row:18} {batch:5}   out of memory", flush=True)
                continue
            memory, peak = peak_memory(machine), max(before, matrix_peak(machine))
            print(f"{preset:12} {row:18} {batch:5} {took:9.4g} {batch / took:9.4g} {count / took / 1e12:8.4g} "
                  f"{peak / 1e12:7.4g} {count / took / peak:6.1%} {memory / 2 ** 30:5.2f} GB", flush=True)
            yield {"preset": preset, "row": row, "batch": batch, "seconds": took, "flops": count, "peak": peak,
                   "images_per_second": batch / took, "share": count / took / peak, "memory": memory}


def sequential_pass(predict, rows, i, caches):
    """What decode_sequential() does for token i. predict: that of a causal MaskGIT, whose caches are given, or None."""
    if caches:
        caches[0].position.fill_(i)                                                             # of all layers
    logits = predict(rows[:, i:i + 1], caches) if caches else predict(rows[:, :i + 1])
    sample_tokens(logits[:, -1].float(), 1.0, None)


@torch.no_grad()
def compare(machine, args):
    """Times a batch against the number of passes, parallel and sequential; prints these rows and yields them."""
    print("preset       batch decoder                passes   seconds to parallel, 8")
    for preset in args.preset:
        config = configuration(preset).maskgit
        torch.manual_seed(0)
        parallel = machine.freeze(MaskGIT(config).to(machine.device).eval())
        causal = machine.freeze(MaskGIT(dataclasses.replace(config, causal=True)).to(machine.device).eval())
        forward, predict_one, N = machine.compile(parallel), machine.compile(causal.predict), config.num_tokens
        for batch in args.batch or ([1, 16, 64] if machine.device.type == "cuda" else [1, 4]):
            labels = machine.put(torch.arange(batch) % config.num_classes)
            rows = torch.zeros(batch, N + 1, dtype=torch.long, device=machine.device)
            with machine.autocast():
                one_step = seconds(machine, args.repeats, decode, forward, labels, 2) / 2
                times = [("parallel", T, T * one_step) for T in (1, 2, 4, 8, 12, 16, 32, 64, 128, 256) if T <= N]
                for decoder, predict, caches in (("sequential, cached", predict_one, causal.empty_caches()),
                                                 ("sequential, uncached", causal.predict, None)):
                    each = [seconds(machine, 1, sequential_pass, predict, rows, i, caches)
                            for i in range(N // 16, N, N // 8)]
                    times.append((decoder, N, N * statistics.mean(each)))
            for decoder, passes, took in times:
                print(f"{preset:12} {batch:5} {decoder:22} {passes:6} {took:9.4g} {took / one_step / 8:14.3g}")
                yield {"preset": preset, "batch": batch, "row": decoder, "passes": passes, "seconds": took}


def plot(path, results, x, y):
    """results[y] against results[x]: a curve for each row of each preset (and, if x is not the batch, each batch)."""
    curves = {}
    for result in results:
        batch = "" if x == "batch" else f", batch {result['batch']}"
        curves.setdefault(f"{result['preset']}{batch}: {result['row']}", []).append((result[x], result[y]))
    with new_figure(path, 9, 4.5) as (figure, (axis,)):
        for name, points in curves.items():
            axis.plot(*zip(*points), "o-", ms=5, lw=1, label=name)
        axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y.replace("_per_", "/"))
        figure.legend(loc="outside right", fontsize=8)


def bench(args, machine):
    cpu = f"{platform.machine()} {machine.device.type}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if machine.device.type == "cuda" else cpu
    precision = "bfloat16" if machine.bf16 else "float32"
    print(f"{name}, {precision}, torch {torch.__version__}, compiled: {machine.compiled}")
    content = {"device": name, "precision": precision, "torch": torch.__version__, "rows": []}
    timed, x, y = (compare, "passes", "seconds") if args.compare else (measure, "batch", "images_per_second")
    for row in timed(machine, args):
        content["rows"].append(row)
        if args.json:
            write_atomically(args.json, lambda file: file.write(json.dumps(content, indent=1).encode()))
        if args.plot:
            plot(args.plot, content["rows"], x, y)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices.add_flags(parser, {
        "preset": ({"nargs": "+", "choices": PRESETS}, ["imagenet256"], "sizes to measure"),
        "rows": ({"nargs": "+", "choices": ROWS}, list(ROWS), "what to measure"),
        "compare": ({"action": "store_true"}, None, "time the decoders against the number of passes, not the rows"),
        "batch": ({"type": devices.count, "nargs": "+"}, None, "images at once (default: what suits the device)"),
        "repeats": (devices.count, 3, "timed calls of each row, whose median counts"),
        "json": (str, None, "also write the numbers to this file"),
        "plot": (str, None, "also plot the rate against the batch (--compare: seconds against passes), to this PNG")})
    devices.add_machine_flags(parser)
    devices.launch(bench, parser.parse_args())


if __name__ == "__main__":
    devices.command_line(main)
