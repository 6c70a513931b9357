"""Larger images than a tokenizer was trained on; and the benchmark."""
import json
from types import SimpleNamespace

import torch
from conftest import TINY_TRANSFORMER, run
from test_data import make_folder

import bench
from lib import runtime


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
