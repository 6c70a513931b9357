"""Beyond one process: ranks, accumulation, cached tokens; and the benchmark."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_TRANSFORMER, TINY_VQ, refused, run
from test_data import make_folder
from test_training import read_log, wait_for_step

import bench
import train_transformer
import train_vq
from lib import data, runtime
from lib import run as run_
from lib.tokens import CachedTokens
from maskgit import MaskGITConfig
from vqgan import VQGANConfig

# Entropy loss and codebook start look at whole batches: without them stage 1 is the same however a batch is split.
SPLITTABLE = [*TINY_VQ, "--codebook-lr", 1, "--entropy", 0, "--gan-start", 0.4]


def torchrun(script, *arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",    # on a free port
            "--", str(ROOT / script), *map(str, arguments)]           # "--", or torchrun takes our --run for its own


# ---- two processes against one

def gradients(stage, machine):
    """Gradients of one training step, as the scripts take it, on this rank's half of a fixed batch."""
    half = slice(4 * machine.rank // machine.world, 4 * (machine.rank + 1) // machine.world)
    torch.manual_seed(1)
    if stage == "transformer":          # the causal one: masks would be drawn on each rank, for its own half
        args = SimpleNamespace(**train_transformer.PRESETS["shapes"], seed=0, parts=1)
        config = MaskGITConfig(24, 3, 16, 32, 2, 4, 64, dropout=0.0, causal=True)
        nets = train_transformer.build(args, config, machine)
        tokens, labels = torch.randint(0, 24, (4, 16))[half], torch.tensor([0, 1, 2, 1])[half]
        train_transformer.train_step(nets, tokens, labels, 0, args, machine, None)
        return [nets.model]
    args = SimpleNamespace(**train_vq.PRESETS["shapes"] | {"disc_width": 1, "disc_max_width": 8}, seed=0, parts=1)
    nets = train_vq.build(args, VQGANConfig(32, 4, 8, (1, 1, 1), 1, 1), machine)
    torch.nn.init.normal_(nets.model.quantizer.codebook)
    images = torch.rand(4, 3, 32, 32)[half]
    train_vq.train_step(nets, images, args.steps - args.steps % args.r1_every, args, machine)        # R1 is due
    return [nets.model, nets.disc]


def on_a_rank(rank, stage, port, path):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    models = gradients(stage, runtime.Machine("cpu", bf16=False))
    if rank == 0:
        torch.save([p.grad for model in models for p in model.parameters()], path)


@pytest.mark.parametrize("stage", ["transformer", "vqgan"])
def test_two_processes_give_the_gradients_of_one(stage, tmp_path):
    torch.multiprocessing.spawn(on_a_rank, (stage, 28000 + os.getpid() % 1000, tmp_path / "gradients.pt"), nprocs=2)
    ours = [p.grad for model in gradients(stage, runtime.Machine("cpu", bf16=False)) for p in model.parameters()]
    theirs = torch.load(tmp_path / "gradients.pt")
    assert len(ours) == len(theirs) and max(g.abs().max() for g in ours) > 0.01
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def weights(folder):
    return torch.load(folder / "vqgan.pt", weights_only=True)["model"]


def assert_close(a, b):
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def one_process(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def test_a_run_moves_from_two_processes_to_one_and_back(tmp_path):
    run("train_vq.py", "--run", tmp_path / "alone", *SPLITTABLE)
    for name, first, then in (("fewer", torchrun, one_process), ("more", one_process, torchrun)):
        command = "train_vq.py", "--run", tmp_path / name, *SPLITTABLE
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(first(*command), stdout=subprocess.PIPE, text=True, env=environment,
                                   start_new_session=True)
        wait_for_step(process, 3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        result = subprocess.run(then(*command, "--resume"), capture_output=True, text=True, env=environment,
                                timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        assert_close(weights(tmp_path / "alone"), weights(tmp_path / name))
        rows, alone = (read_log(folder / "vqgan.log.csv") for folder in (tmp_path / name, tmp_path / "alone"))
        assert [row["step"] for row in rows] == list("123456")
        # The logged loss is the mean over the ranks: that of the whole batch.
        assert all(abs(float(a["reconstruction"]) - float(b["reconstruction"])) < 1e-3 for a, b in zip(rows, alone))


def test_a_rank_that_dies_ends_the_others(trained, tmp_path):
    process = subprocess.Popen(torchrun("train_vq.py", "--run", tmp_path, *TINY_VQ, "--steps", 100000), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
    wait_for_step(process, 2)
    children = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True).split()
    os.kill(int(children[-1]), signal.SIGKILL)
    started = time.time()
    process.communicate(timeout=60)
    assert process.returncode not in (0, None) and time.time() - started < 60


def test_micro_batches_add_up(tmp_path):
    for name, micro in (("whole", 4), ("split", 2)):
        recompute = "yes" if micro == 2 else "no"
        run("train_vq.py", "--run", tmp_path / name, *SPLITTABLE, "--micro-batch", micro, "--recompute", recompute)
    assert_close(weights(tmp_path / "whole"), weights(tmp_path / "split"))
    refused("train_vq.py", "--run", tmp_path / "bad", *SPLITTABLE, "--micro-batch", 3,
            says=["--batch 4", "--micro-batch"])


# ---- cached tokens

def test_cached_tokens_are_those_encoded_on_the_fly(trained, tmp_path, monkeypatch):
    make_folder(tmp_path / "images", {"a": 12, "b": 9})
    train, _ = data.open_data(str(tmp_path / "images"), 32)
    monkeypatch.setattr(CachedTokens, "CHUNK", 16)
    calls = []

    def tokenize(images):                       # stands for the tokenizer: every image its own, by its own mean
        calls.append(len(images))
        return images[:, :, ::16, ::16].flatten(1).long()
    cached = CachedTokens(tmp_path / "tokens", train, 3, 12)
    for rank in (0, 1):                         # ranks share the chunks
        cached.encode(tokenize, rank, 2)
    assert sum(calls) == 3 * len(train) and len(cached.paths) == -(-3 * len(train) // 16)
    indices = [0, len(train) - 1, 5]
    tokens, labels = cached.batch(indices, [3, 4, 5])
    assert torch.equal(labels, train.batch(indices)[1]) and tokens.shape == (3, 12)
    view = int(data.hashed_uniform(5, [3], 1)[0, 0] * 3)
    again = train.batch([0], [view * len(train) + (1 << 50)])[0]
    assert torch.equal(tokens[0].long(), tokenize(again)[0])
    # A half-written cache resumes: what is there stays.
    os.remove(cached.paths[1])
    calls.clear()
    CachedTokens(tmp_path / "tokens", train, 3, 12).encode(tokenize)
    assert sum(calls) == 16
    with pytest.raises(ValueError, match="stale.*value of views: rm -r "):
        CachedTokens(tmp_path / "tokens", train, 2, 12)


def test_training_from_cached_tokens(trained, tmp_path):
    """The same losses, and a stale cache is refused with the command that renews it."""
    make_folder(tmp_path / "images", {"a": 12, "b": 9})
    flags = ["--data", tmp_path / "images", "--vqgan", trained / "vqgan.pt", *TINY_TRANSFORMER]
    run("train_transformer.py", "--run", tmp_path / "cached", *flags, "--cache-tokens", 2)
    assert len(list((tmp_path / "cached" / "tokens").glob("*/00000.npy"))) == 1      # a folder for each tokenizer
    shutil.copytree(tmp_path / "cached" / "tokens", tmp_path / "other" / "tokens")
    refused("train_transformer.py", "--run", tmp_path / "other", *flags, "--cache-tokens", 3,
            says=["stale", "views", "rm -r"])


# ---- many ranks

def test_readers_are_shared_among_the_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(192)), raising=False)
    assert runtime.cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "24")
    assert runtime.cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "400")
    assert runtime.cores() == 1


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 .* no GPU of its own.*--nproc_per_node"):
        runtime.Machine("cuda")


@pytest.mark.parametrize("ending", [ValueError("bad"), SystemExit(143), None])
def test_the_group_is_left_however_a_rank_ends(ending, monkeypatch):
    """Without that, NCCL complains at exit and gloo's threads may abort the process."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": 29000 + os.getpid() % 1000}.items():
        monkeypatch.setenv(name, str(value))

    def function(args, machine):
        assert torch.distributed.is_initialized()
        if ending:
            raise ending
    with pytest.raises(type(ending)) if ending else contextlib.nullcontext():
        runtime.launch(function, SimpleNamespace(device="cpu", bf16=False))
    assert not torch.distributed.is_initialized()


def test_the_command_to_go_on_starts_as_many_processes(monkeypatch):
    assert run_.launcher() == "python"
    for name, value in {"LOCAL_WORLD_SIZE": 8, "WORLD_SIZE": 8, "GROUP_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert run_.launcher() == "torchrun --nproc_per_node 8 --"
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert run_.launcher().startswith("torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:PORT --nproc")


def test_two_machines(tmp_path):
    """Two agents with a process each, as on two machines with a shared folder, end with the weights of one process."""
    run("train_vq.py", "--run", tmp_path / "alone", *SPLITTABLE)
    port = 27000 + os.getpid() % 1000
    agents = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend",
         "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1", "--", str(ROOT / "train_vq.py"),
         "--run", str(tmp_path / "both"), *map(str, SPLITTABLE)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    for agent in agents:
        output, _ = agent.communicate(timeout=240)
        assert agent.returncode == 0, output
    assert_close(weights(tmp_path / "alone"), weights(tmp_path / "both"))


# ---- data at scale

def test_the_token_cache_holds_few_files_open(tmp_path):
    class ImageNet:
        classes = "a",

        def __len__(self):
            return 1_281_167
    cached = CachedTokens(tmp_path, ImageNet(), 10, 256)
    assert len(cached.paths) <= 256 and cached.chunk * len(cached.paths) >= 12_811_670



def test_a_scan_is_kept_until_a_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "cache"))
    make_folder(tmp_path / "images", {"a": 3, "b": 2})
    first = data.list_files(tmp_path / "images")
    monkeypatch.setattr(os, "walk", None)                       # a second walk would fail
    assert data.list_files(tmp_path / "images") == first and len(first) == 5
    monkeypatch.undo()
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "cache"))
    make_folder(tmp_path / "images", {"b": 4})
    assert len(data.list_files(tmp_path / "images")) == 7
    for path in (tmp_path / "cache").iterdir():
        path.write_text("{")
    assert len(data.list_files(tmp_path / "images")) == 7


def test_bad_places(trained, tmp_path):
    for name, says in (("imagenet", "n01440764"), ("places2", "365")):
        refused("train_vq.py", "--data", name, "--run", tmp_path / "run", cwd=tmp_path,
                says=[f"data/{name}", "train/CLASS", says, "--data-dir"])
    if not torch.cuda.is_available():
        refused("sample.py", "--run", trained, "--device", "cuda", says=["CUDA", "--device cpu"])
    try:
        import torch_xla  # noqa: F401
    except ImportError:
        refused("train_vq.py", "--run", tmp_path / "run", "--device", "xla", says=["torch-xla", "pip install"])


def test_larger_images_with_a_tokenizer_of_smaller_ones(trained, tmp_path):
    """As in the paper, where the tokenizer trained at 256 serves 512 too."""
    make_folder(tmp_path / "images", {"a": 6, "b": 6}, size=(80, 80))
    output = run("train_transformer.py", "--run", tmp_path / "run", "--data", tmp_path / "images",
                 "--vqgan", trained / "vqgan.pt", "--image-size", 64, *TINY_TRANSFORMER)
    assert "256 tokens of 32, 2 classes" in output
    run("sample.py", "--run", tmp_path / "run", "--num", 1)


# ---- speed

def test_bench_goes_on_after_a_row_without_memory(tmp_path, monkeypatch, capsys):
    path, resets = tmp_path / "bench.json", []

    def enough(machine, sizes, batch, repeats):
        return 1.0, 1.0

    def full(machine, sizes, batch, repeats):
        assert [row["row"] for row in json.loads(path.read_text())["rows"]] == ["first"]         # written as they come
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append("before each row"))
    monkeypatch.setattr(bench, "ROWS", {name: (function, [1], [1]) for name, function in
                                        {"first": enough, "full": full, "last": enough}.items()})
    args = SimpleNamespace(preset=["shapes"], rows=["first", "full", "last"], batch=None, repeats=1,
                           json=str(path))
    bench.bench(args, runtime.Machine("cpu"))
    assert "out of memory" in capsys.readouterr().out and len(resets) == 3
    assert [row["row"] for row in json.loads(path.read_text())["rows"]] == ["first", "last"]


def test_bench(tmp_path):
    output = run("bench.py", "--preset", "shapes", "--batch", 2, "--repeats", 1, "--json", tmp_path / "bench.json")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    names = ["train-transformer", "decode", "sequential", "train-vq", "encode", "restore"]
    assert [row["row"] for row in rows] == names
    assert all(0 < row["share"] < 1.2 and row["memory"] > 1e7 for row in rows) and "float32" in output
    # 6 FLOPs for each weight of the blocks and each of 65 positions, a little more for attention and the output.
    train = rows[0]["flops"] / 2
    assert 6 * 65 * 4 * 12 * 128 ** 2 < train < 1.15 * 6 * 65 * 4 * 12 * 128 ** 2
