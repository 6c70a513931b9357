"""Measures speed: training of both stages, decoding, the tokenizer; each as a share of this machine's matrix-product peak.

    python bench.py                                  # the paper's 256 x 256 configuration
    python bench.py --preset shapes
    python bench.py --rows train-transformer decode --batch 4 --json bench.json
    python bench.py --preset imagenet256 imagenet512 --rows train-transformer --batch 1 2 4 --plot rate.png
    python bench.py --compare --preset imagenet256 imagenet512 --plot runtime.png   # parallel and sequential decoding (Figure 4)

FLOPs are counted on shapes alone (torch's FlopCounterMode over meta tensors): matrix products, attention and convolutions, 2
for each multiply-add; a training step is counted with its backward pass, recomputation left out. The peak is the fastest of a
few square matrix products of the same precision, timed before and after each row; the better of the two counts.
--compare times single passes and multiplies: parallel decoding passes over all positions at each step; sequential decoding is
timed at eight places, evenly spaced, with the key/value cache (one position a pass) and without (all positions so far).
"""
import argparse
import dataclasses
import json
import platform
import resource
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

import devices
import runtime
import train_transformer
import train_vq
from maskgit import MaskGIT, MaskGITConfig, decode, sample_tokens
from perceptual import LPIPS
from sample import default_steps
from vqgan import VQGAN, Discriminator, VQGANConfig

ROWS = "train-transformer decode train-vq encode restore".split()
PRESETS = {"imagenet256": ("imagenet", 256), "imagenet512": ("imagenet", 512), "shapes": ("shapes", 32)}


def configurations(preset):
    """-> flags of stage 1, flags of stage 2 (namespaces as the training scripts have them), VQGANConfig, MaskGITConfig."""
    name, size = PRESETS[preset]
    one, two = SimpleNamespace(**train_vq.PRESETS[name]), SimpleNamespace(**train_transformer.PRESETS[name])
    one.image_size, one.recompute, two.decoder = size, size >= 512, "parallel"
    vq = VQGANConfig(one.codebook_size, one.codebook_dim, one.filters, one.multipliers, one.res_blocks, one.groups,
                     entropy=one.entropy)
    classes = 1000 if name == "imagenet" else 10
    return one, two, vq, MaskGITConfig(vq.codebook_size, classes, (size // vq.stride) ** 2, two.dim, two.depth, two.heads,
                                       two.mlp_dim, two.dropout)


def flops(function):
    """FLOPs of function() on the meta device, where nothing is computed and no memory is taken."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def seconds(machine, function, repeats):
    """Median time of a call, after two to warm up (and compile)."""
    def wait():
        machine.sync()
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def matrix_peak(machine):
    """FLOP/s of the fastest square matrix product, in the precision that the rows run in."""
    best = 0
    for n in (4096, 8192) if machine.device.type == "cuda" else (1024, 2048):
        a, b = torch.randn(2, n, n, device=machine.device, dtype=torch.bfloat16 if machine.bf16 else torch.float32)
        best = max(best, 2 * n ** 3 / seconds(machine, lambda: a @ b, 7))
    return best


def reset_memory(machine):
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")           # Linux: forget the peak so far


def peak_memory(machine):
    """Bytes: allocated on the GPU, or resident in this process since reset_memory (elsewhere than Linux: since the start)."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def transformer_row(machine, args, config, batch):
    """One training step of stage 2 on tokens: masking, forward, backward, clipping, AdamW, EMA. -> step, FLOPs, images."""
    model = MaskGIT(config).to(machine.device)
    ema, trained = runtime.EMA(model, args.ema), machine.trainable(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=machine.fused)
    tokens = torch.randint(config.codebook_size, (batch, config.num_tokens), device=machine.device)
    labels = torch.randint(config.num_classes, (batch,), device=machine.device)

    def step():
        generator = machine.seed_step(0, 0)
        optimizer.zero_grad(set_to_none=True)
        with machine.autocast():
            loss, _ = train_transformer.training_loss(args, trained, model.mask_id, tokens, labels, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, 1000)

    def count():
        empty = torch.empty(batch, config.num_tokens, dtype=torch.long)
        MaskGIT(config)(empty, empty[:, 0]).sum().backward()
    return step, flops(count), batch


def decode_row(machine, config, batch, steps):
    model = MaskGIT(config).to(machine.device).eval()
    forward = torch.compile(model) if machine.compiled else model
    labels = torch.arange(batch, device=machine.device) % config.num_classes

    def step():
        with machine.autocast():
            decode(forward, labels, steps, generator=machine.generator(0))

    def count():
        empty = torch.empty(batch, config.num_tokens, dtype=torch.long)
        MaskGIT(config).eval()(empty, empty[:, 0])
    return step, steps * flops(count), batch


def vq_row(machine, args, config, batch):
    """One training step of stage 1 with discriminator and, from 128 pixels on, LPIPS (on random weights, which take as long);
    without the R1 penalty, due every 16th step."""
    model = VQGAN(config).to(machine.device, memory_format=machine.layout)
    disc = Discriminator(args.image_size, args.disc_width, args.disc_max_width)
    disc.to(machine.device, memory_format=machine.layout)
    model.encoder.recompute = model.decoder.recompute = args.recompute
    lpips = LPIPS().to(machine.device, memory_format=machine.layout) if args.image_size >= 128 else None
    ema, trained, trained_disc = runtime.EMA(model, args.ema), machine.trainable(model), machine.trainable(disc)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-4, betas=(0.0, 0.99), fused=machine.fused) for m in (model, disc)]
    images = torch.rand(batch, 3, args.image_size, args.image_size).to(machine.device, memory_format=machine.layout)

    def step():
        disc.requires_grad_(False)
        optimizers[0].zero_grad(set_to_none=True)
        with machine.autocast():
            total, _, restored = train_vq.tokenizer_losses(args, trained, images, disc, args.adversarial, lpips)
        total.backward()
        optimizers[0].step()
        ema.update(model, 1000)
        disc.requires_grad_(True)
        optimizers[1].zero_grad(set_to_none=True)
        with machine.autocast():
            total, _ = train_vq.judge_losses(args, trained_disc, disc, images, restored, False)
        total.backward()
        optimizers[1].step()

    def count():
        empty = torch.empty(batch, 3, args.image_size, args.image_size)
        model, disc = VQGAN(config), Discriminator(args.image_size, args.disc_width, args.disc_max_width)
        disc.requires_grad_(False)
        restored = model(empty)[0]
        total = disc(restored).sum() + (LPIPS()(restored, empty).sum() if lpips else 0)
        total.backward()
        disc.requires_grad_(True)
        disc(torch.cat([empty, empty])).sum().backward()
    return step, flops(count), batch


def tokenizer_row(machine, args, config, batch, restore):
    """Images to tokens, or tokens to images (restore)."""
    model = VQGAN(config).to(machine.device, memory_format=machine.layout).eval()
    method = model.decode if restore else model.encode
    method = torch.compile(method) if machine.compiled else method
    side = args.image_size // config.stride
    given = torch.rand(batch, 3, args.image_size, args.image_size).to(machine.device, memory_format=machine.layout)
    if restore:
        given = torch.randint(config.codebook_size, (batch, side, side), device=machine.device)

    @torch.no_grad()
    def step():
        with machine.autocast():
            method(given)

    def count():
        model = VQGAN(config)
        (model.decode if restore else model.encode)(torch.empty(given.shape, dtype=given.dtype))
    return step, flops(count), batch


def rows_of(machine, preset, wanted, batches):
    """(label, a function that prepares the row) of every row; batches: sizes to measure, None for those that suit the device."""
    one, two, vq, config = configurations(preset)
    cuda, small, steps = machine.device.type == "cuda", preset == "shapes", default_steps(config.num_tokens)
    sizes = lambda cpu, shapes, gpu: batches or (gpu if cuda else shapes if small else cpu)
    for row in wanted:
        if row == "train-transformer":
            for b in sizes([4], [32], [256]):
                yield row, lambda: transformer_row(machine, two, config, b)
        elif row == "decode":
            for b in sizes([1, 4, 16], [1, 16, 64, 256], [1, 16, 64, 256]):
                yield f"decode, {steps} steps", lambda: decode_row(machine, config, b, steps)
        elif row == "train-vq":
            for b in sizes([1], [16], [32]):
                yield row, lambda: vq_row(machine, one, vq, b)
        else:
            for b in sizes([1], [64], [64]):
                yield row, lambda: tokenizer_row(machine, one, vq, b, restore=row == "restore")


@torch.no_grad()
def compare(machine, args):
    """Wall-clock of one batch against the number of passes, parallel and sequential -> rows for the table and the plot."""
    print(f"{'preset':12} {'batch':>5} {'decoder':22} {'passes':>6} {'seconds':>9} {'to parallel, 8':>14}")
    results = []
    for preset in args.preset:
        config = dataclasses.replace(configurations(preset)[3], dropout=0.0)
        torch.manual_seed(0)
        parallel = MaskGIT(config).to(machine.device).eval()
        causal = MaskGIT(dataclasses.replace(config, causal=True)).to(machine.device).eval()
        N = config.num_tokens
        forward = torch.compile(parallel) if machine.compiled else parallel
        step = torch.compile(causal.predict) if machine.compiled else causal.predict
        for batch in args.batch or ([1, 16, 64] if machine.device.type == "cuda" else [1, 4]):
            labels = torch.arange(batch, device=machine.device) % config.num_classes
            rows = torch.zeros(batch, N + 1, dtype=torch.long, device=machine.device)
            places = torch.arange(N, device=machine.device)
            eight = [round((i + 0.5) * N / 8) for i in range(8)]

            def cached(i):
                sample_tokens(step(rows[:, i:i + 1], cache, places[i:i + 1])[:, -1].float(), 1.0, None)

            def uncached(i):
                sample_tokens(causal.predict(rows[:, :i + 1])[:, -1].float(), 1.0, None)

            with machine.autocast():
                cache = causal.empty_cache(batch)
                one_step = seconds(machine, lambda: decode(forward, labels, 2), args.repeats) / 2
                times = [("parallel", steps, steps * one_step) for steps in (1, 2, 4, 8, 12, 16, 32, 64, 128, 256) if steps <= N]
                for label, function in (("sequential, cached", cached), ("sequential, uncached", uncached)):
                    times.append((label, N, N * statistics.mean(seconds(machine, lambda: function(i), 1) for i in eight)))
            for label, passes, took in times:
                results.append({"preset": preset, "batch": batch, "row": label, "passes": passes, "seconds": took})
                print(f"{preset:12} {batch:5} {label:22} {passes:6} {took:9.4g} {took / one_step / 8:14.3g}", flush=True)
    return results


def plot(path, results, x, y):
    """results[y] against results[x]: a colour for each preset (and, where x is another quantity, batch), a marker for each row."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    group = lambda r: ", ".join([r["preset"]] + [f"batch {r['batch']}"] * (x != "batch"))
    groups, rows = list(dict.fromkeys(map(group, results))), list(dict.fromkeys(r["row"] for r in results))
    for i, row in enumerate(rows):
        for j, name in enumerate(groups):
            points = [(r[x], r[y]) for r in results if r["row"] == row and group(r) == name]
            if points:
                axis.plot(*zip(*points), "osxDv"[i % 5] + "-", color=f"C{j}", ms=5, lw=1, label=f"{name}: {row}")
    axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y.replace("_per_", "/"))
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right", fontsize=8)
    runtime.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def bench(args, machine):
    name = torch.cuda.get_device_name() if machine.device.type == "cuda" else \
        f"{platform.processor() or platform.machine()} {machine.device.type}, {torch.get_num_threads()} threads"
    precision = "bfloat16" if machine.bf16 else "float32"
    print(f"{name}, {precision}, torch {torch.__version__}, compiled: {'yes' if machine.compiled else 'no'}")
    if args.compare:
        results = compare(machine, args)
        return report(args, name, precision, results, "passes", "seconds")
    print(f"{'preset':12} {'row':18} {'batch':>5} {'seconds':>9} {'images/s':>9} {'TFLOP/s':>8} {'peak':>7} {'share':>6} {'memory':>8}")
    results = []
    for preset in args.preset:
        for label, prepare in rows_of(machine, preset, args.rows, args.batch):
            torch.manual_seed(0)
            reset_memory(machine)
            step, count, images = prepare()
            before = matrix_peak(machine)
            took = seconds(machine, step, args.repeats)
            memory, peak = peak_memory(machine), max(before, matrix_peak(machine))
            results.append({"preset": preset, "row": label, "batch": images, "seconds": took,
                            "images_per_second": images / took, "flops": count, "flops_per_second": count / took,
                            "peak": peak, "share": count / took / peak, "memory": memory})
            print(f"{preset:12} {label:18} {images:5} {took:9.4g} {images / took:9.4g} {count / took / 1e12:8.4g} {peak / 1e12:7.4g} "
                  f"{count / took / peak:6.1%} {memory / 2 ** 30:5.2f} GB", flush=True)
            del step
    report(args, name, precision, results, "batch", "images_per_second")


def report(args, device, precision, results, x, y):
    """Writes what --json and --plot ask for."""
    if args.json:
        content = {"device": device, "precision": precision, "torch": torch.__version__, "rows": results}
        runtime.write_atomically(args.json, lambda file: file.write(json.dumps(content, indent=1).encode()))
    if args.plot:
        plot(args.plot, results, x, y)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["imagenet256"], choices=PRESETS, help="sizes to measure (default: imagenet256)")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, help="what to measure (default: all)")
    parser.add_argument("--compare", action="store_true", help="wall-clock of parallel and sequential decoding against the number of passes, instead of the rows")
    parser.add_argument("--batch", type=runtime.whole, nargs="+", help="images at once, one size or several (default: what suits the device)")
    parser.add_argument("--repeats", type=runtime.whole, default=3, help="timed calls of each row, whose median counts (default: %(default)s)")
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--plot", help="also plot images/s against the batch (with --compare: seconds against the passes), to this PNG")
    devices.add_machine_flags(parser)
    devices.launch(bench, parser.parse_args())


if __name__ == "__main__":
    devices.command_line(main)
