"""The benchmark, and what --dry-run counts."""
import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from test_data import make_folder
from torch import nn

import bench
import train_transformer
import train_vq
from lib import costs, plans
from lib.runtime import Machine
from maskgit import MaskGIT, MaskGITConfig
from vqgan import VQGAN, VQGANConfig

# ---- the benchmark

def enough(machine, sizes, batch, repeats):
    return bench.Cost(seconds=1.0, flops=1.0)


def too_much(machine, sizes, batch, repeats):
    raise torch.OutOfMemoryError("CUDA out of memory")


def read_rows(path):
    return json.loads(path.read_text())["rows"]


def test_bench_goes_on_after_a_row_without_memory(call_main, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "matrix_peak", lambda machine: 1e12)
    monkeypatch.setitem(bench.ROWS, "decode", enough)
    monkeypatch.setitem(bench.ROWS, "sequential", too_much)
    monkeypatch.setitem(bench.ROWS, "encode", enough)
    output = call_main(bench, tmp_path, "--preset", "shapes", "--rows", "decode", "sequential", "encode",
                       "--batch", 1, "--json", "bench.json")
    assert "sequential             1   out of memory" in output
    assert [row["row"] for row in read_rows(tmp_path / "bench.json")] == ["decode", "encode"]


def test_rows_are_written_as_they_come(call_main, tmp_path, monkeypatch):
    def interrupted(machine, sizes, batch, repeats):
        assert [row["row"] for row in read_rows(tmp_path / "bench.json")] == ["decode"]
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "matrix_peak", lambda machine: 1e12)
    monkeypatch.setitem(bench.ROWS, "decode", enough)
    monkeypatch.setitem(bench.ROWS, "encode", interrupted)
    call_main(bench, tmp_path, "--preset", "shapes", "--rows", "decode", "encode", "--batch", 1,
              "--json", "bench.json", code=130)
    assert len(read_rows(tmp_path / "bench.json")) == 1


def test_any_other_error_ends_the_benchmark(call_main, tmp_path, monkeypatch):
    def broken(machine, sizes, batch, repeats):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(bench, "matrix_peak", lambda machine: 1e12)
    monkeypatch.setitem(bench.ROWS, "decode", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        call_main(bench, tmp_path, "--preset", "shapes", "--rows", "decode", "--batch", 1)


def test_results_are_kept_until_they_are_computed(monkeypatch):
    """torch-xla computes only what a variable still holds, and a clock must wait for it."""
    events = []

    class Result:
        def __del__(self):
            events.append("dropped")
    machine = Machine("cpu")
    monkeypatch.setattr(machine, "wait", lambda: events.append("waited"))
    bench.seconds(machine, 1, Result)
    assert events == 3 * ["waited", "dropped"]


def test_the_waiting_of_each_device(monkeypatch):
    calls = []
    machine = Machine("cpu")
    machine.wait()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("cuda"))
    machine.device = torch.device("cuda")
    machine.wait()
    machine.mesh = "chips"
    xla_model = Namespace(wait_device_ops=lambda: calls.append("wait"))
    machine.xla = Namespace(sync=lambda: calls.append("sync"), core=Namespace(xla_model=xla_model))
    machine.wait()
    assert calls == ["cuda", "sync", "wait"]


def test_blocks_are_compiled_as_in_a_long_training(call_main, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")

    def row(machine, *arguments):
        compiled.append(machine.compiles_blocks)
        return enough(machine, *arguments)
    monkeypatch.setattr(bench, "matrix_peak", lambda machine: 1e12)
    monkeypatch.setitem(bench.ROWS, "train-transformer", row)
    for flags in ([], ["--compile", "no"]):
        call_main(bench, tmp_path, "--preset", "shapes", "--rows", "train-transformer", "--batch", 1, *flags)
    assert compiled == [Machine("cpu", training_steps=1000).compiles_blocks, False]


def test_the_compiler_is_reset_before_each_row(call_main, tmp_path, monkeypatch):
    """And the peak of memory, after the large matrices whose product is timed first. Not all systems can."""
    events = []

    def write_text(path, text):
        events.append((str(path), text))
        raise PermissionError
    monkeypatch.setattr(bench.Path, "write_text", write_text)
    monkeypatch.setattr(torch.compiler, "reset", lambda: events.append("reset"))
    monkeypatch.setattr(bench, "matrix_peak", lambda machine: events.append("matrices") or 1e12)
    monkeypatch.setitem(bench.ROWS, "decode", enough)
    call_main(bench, tmp_path, "--preset", "shapes", "--rows", "decode", "--batch", 1, 2, 3)
    assert events == 3 * ["reset", "matrices", ("/proc/self/clear_refs", "5"), "matrices"]


@pytest.mark.parametrize("row", bench.ROWS)
def test_each_row_is_measured(row, call_main, tmp_path, monkeypatch):
    sizes = bench.sizes_of("shapes")
    smaller = sizes._replace(vqgan=replace(sizes.vqgan, filters=8), maskgit=replace(sizes.maskgit, dim=64, depth=1))
    monkeypatch.setattr(bench, "sizes_of", lambda preset: smaller)
    monkeypatch.setattr(bench, "matrix_peak", lambda machine: 1e12)
    output = call_main(bench, tmp_path, "--preset", "shapes", "--rows", row, "--batch", 2, "--repeats", 1,
                       "--bf16", "no", "--json", "bench.json")
    [numbers] = read_rows(tmp_path / "bench.json")
    assert numbers["row"] == row and row in output and "float32" in output
    assert numbers["share"] == pytest.approx(numbers["flops"] / numbers["seconds"] / numbers["peak"])
    assert numbers["images_per_second"] == pytest.approx(2 / numbers["seconds"])
    assert numbers["flops"] > 1e6 and numbers["memory"] > 1e7


@pytest.mark.slow
def test_the_peak_is_a_plausible_speed():
    assert 1e9 < bench.matrix_peak(Machine("cpu", bf16=False)) < 1e14


@pytest.mark.parametrize("preset, tokens, steps, image_size", [
    ("imagenet256", 256, 8, 256), ("imagenet512", 1024, 12, 512), ("cifar10", 256, 8, 32), ("shapes", 64, 8, 32)])
def test_presets_are_those_of_the_training_scripts(preset, tokens, steps, image_size):
    sizes = bench.sizes_of(preset)
    assert sizes.maskgit.num_tokens == sizes.grid ** 2 == tokens
    assert sizes.maskgit.default_steps == steps
    assert sizes.vq.image_size == image_size
    assert sizes.vq.perceptual == ("lpips" if image_size >= 128 else "none")


# ---- FLOPs and memory, counted on tensors without numbers

def transformer_flops(positions, dim, depth, codebook_size):
    """Counts the multiply-adds of a forward pass by hand, times 2."""
    matrices = depth * 12 * dim ** 2
    attention = depth * 2 * positions * dim
    head = dim ** 2 + dim * codebook_size
    return 2 * positions * (matrices + attention), 2 * head


def test_flops_of_the_transformer():
    blocks, head = transformer_flops(positions=65, dim=128, depth=4, codebook_size=256)
    model = MaskGIT(MaskGITConfig(256, 10, 64, dim=128, depth=4, heads=4, mlp_dim=512, dropout=0.0))
    assert plans.transformer_flops(model) == 3 * (blocks + 64 * head)


def test_costs_of_the_tokenizer_are_counted_without_the_other_ranks(monkeypatch):
    """Its entropy loss asks them, but torch 2.9 cannot send a tensor without numbers."""
    model = VQGAN(VQGANConfig(32, 4, filters=8, multipliers=(1, 2), res_blocks=1, groups=2))
    with costs.imagined():
        forward = costs.forward_flops(model, torch.zeros(1, 3, 16, 16))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: pytest.fail("asked the other ranks"))
    assert plans.tokenizer_flops(model, None, None, 16) == 3 * forward
    assert plans.tokenizer_activations(Namespace(image_size=16), 2, model, None, None) > 2 * 2 * 8 * 16 ** 2 * 4


def test_memory_for_the_backward_pass_leaves_out_the_weights():
    model = nn.Sequential(nn.Linear(1000, 1000), nn.GELU(), nn.Linear(1000, 10))
    with costs.imagined():
        kept = costs.kept_for_backward([model], model, torch.zeros(7, 1000))
    assert kept == 3 * 7 * 1000 * 4                     # the input of each layer


# ---- --dry-run

def plan(call_main, script, folder, *flags):
    """Returns what --dry-run prints: {row: text}."""
    output = call_main(script, folder, *flags, "--dry-run", 1)
    rows = {}
    name = ""
    for line in output.splitlines():
        name = line[:13].strip() or name                    # a row may go on in a second line
        rows[name] = f"{rows.get(name, '')} {line[13:]}".strip()
    assert not list(folder.glob("runs"))
    return rows


def number(text):
    return float(text.split()[0].replace(",", ""))


def total(rows):
    """Returns the PFLOP of the whole training."""
    return float(rows["FLOPs"].split(", ")[-1].split()[0])


TINY = ["--dim", 16, "--depth", 2, "--heads", 2, "--batch", 4]


def test_a_dry_run_of_stage_2_follows_the_sizes(call_main, tmp_path):
    tiny = plan(call_main, train_transformer, tmp_path, *TINY)
    assert "64 tokens of 256" in tiny["parameters"] and tiny["memory"].endswith("a micro-batch of 4")
    larger = plan(call_main, train_transformer, tmp_path, *TINY, "--image-size", 64)
    assert "256 tokens of 256" in larger["parameters"]
    assert number(larger["FLOPs"]) > 4 * number(tiny["FLOPs"])
    deeper = plan(call_main, train_transformer, tmp_path, *TINY, "--depth", 4)
    assert number(deeper["parameters"]) > number(tiny["parameters"])
    assert number(deeper["FLOPs"]) > 1.5 * number(tiny["FLOPs"])


def test_a_dry_run_of_stage_2_reads_the_tokenizer_and_the_run_that_it_is_given(call_main, untrained, tmp_path):
    with_tokenizer = plan(call_main, train_transformer, tmp_path, *TINY, "--vqgan", untrained / "vqgan.pt")
    assert "64 tokens of 32" in with_tokenizer["parameters"]
    continued = plan(call_main, train_transformer, tmp_path, "--batch", 4, "--init", untrained)
    assert continued["parameters"].startswith("0.0") and "64 tokens of 32" in continued["parameters"]


def test_a_dry_run_of_stage_2_follows_the_other_flags(call_main, tmp_path):
    at_first = plan(call_main, train_transformer, tmp_path, *TINY, "--cache-tokens", 0)
    twice = plan(call_main, train_transformer, tmp_path, *TINY, "--cache-tokens", 0, "--steps", 8000)
    assert total(twice) == pytest.approx(2 * total(at_first), rel=0.01)
    views = plan(call_main, train_transformer, tmp_path, *TINY, "--cache-tokens", 3, "--optimizer", "adamw", "--bf16", "no")
    assert total(views) > 3 * total(at_first)                       # 150,000 views, instead of 4,000 steps of 4 images
    to_resume = [float(rows["checkpoints"].split(", ")[1].split()[0]) for rows in (at_first, views)]
    assert to_resume[0] < to_resume[1]                              # Muon keeps a moment less
    assert "H100, H200" in at_first and "H100, H200" not in views
    activations = [number(rows["memory"].split("weights, ")[1]) for rows in (at_first, views)]
    assert activations[1] == pytest.approx(2 * activations[0], rel=0.01)
    dropping = plan(call_main, train_transformer, tmp_path, *TINY, "--cache-tokens", 0, "--dropout", 0.1)
    more = number(dropping["memory"].split("weights, ")[1]) / activations[0]
    assert 1 < more < 1.5                                           # masks, but no 65 x 65 products as without a GPU
    causal = plan(call_main, train_transformer, tmp_path, *TINY, "--decoder", "autoregressive", "--cache-tokens", 0)
    assert causal["memory"] != at_first["memory"]                   # no embedding of the null class


def test_a_dry_run_says_what_reading_takes(call_main, tmp_path):
    """The token cache, the processes that read, and the shared memory through which they hand images over."""
    make_folder(tmp_path / "images", {"a": 40, "b": 20})
    flags = [*TINY, "--data", tmp_path / "images"]
    small = plan(call_main, train_transformer, tmp_path, *flags, "--cache-tokens", 3)
    assert small["token cache"] == f"{3 * 57 * 2 * 65 / 1e9:.3g} GB: {3 * 57} views"
    assert "readers" not in small                                                     # decoded once, into memory
    larger = plan(call_main, train_transformer, tmp_path, *flags, "--cache-tokens", 0, "--image-size", 128, "--workers", 5)
    assert "token cache" not in larger
    assert larger["/dev/shm"].startswith(f"{5 * 2 * 4 * 3 * 128 ** 2 / 1e9:.2g} GB for the 5 readers")


@pytest.mark.parametrize("preset", ["imagenet", "cifar10", "shapes"])
def test_plans_are_those_of_the_training_scripts(preset):
    planned = plans.PLANNED[preset]
    sizes = bench.sizes_of(preset.replace("imagenet", "imagenet256"))
    assert (planned.image_size, planned.tokenizer) == (sizes.vq.image_size, sizes.vqgan)


def test_a_dry_run_refuses_what_a_run_would(call_main, tmp_path):
    line = call_main(train_transformer, tmp_path, *TINY, "--image-size", 30, "--dry-run", 1, code=2)
    assert "--image-size 30" in line and "stride 4" in line


@pytest.mark.slow
def test_a_dry_run_of_stage_1_follows_the_sizes(call_main, tmp_path):
    tiny = ["--filters", 8, "--batch", 4]
    with_disc = plan(call_main, train_vq, tmp_path, *tiny)
    at_32 = plan(call_main, train_vq, tmp_path, *tiny, "--adversarial", 0)
    assert number(at_32["FLOPs"]) < number(with_disc["FLOPs"])
    at_64 = plan(call_main, train_vq, tmp_path, *tiny, "--adversarial", 0, "--image-size", 64)
    assert "256 tokens of 256" in at_64["parameters"]
    assert number(at_64["FLOPs"]) > 3.5 * number(at_32["FLOPs"])
    fsq = plan(call_main, train_vq, tmp_path, *tiny, "--quantizer", "fsq", "--levels", 5, 4)
    assert "64 tokens of 20" in fsq["parameters"]
    later = plan(call_main, train_vq, tmp_path, *tiny, "--gan-start", 0.75)
    alone = plan(call_main, train_vq, tmp_path, *tiny, "--adversarial", 0)
    assert total(with_disc) - total(alone) == pytest.approx(2 * (total(later) - total(alone)), rel=0.05)
    without_r1 = plan(call_main, train_vq, tmp_path, *tiny, "--r1", 0)
    assert total(without_r1) < total(with_disc) < total(plan(call_main, train_vq, tmp_path, *tiny, "--r1-every", 1))
    in_parts = plan(call_main, train_vq, tmp_path, *tiny, "--micro-batch", 2)
    assert in_parts["memory"].endswith("a micro-batch of 2")
