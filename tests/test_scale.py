"""Larger images than a tokenizer was trained on."""
from conftest import TINY_TRANSFORMER, run
from test_data import make_folder


def test_larger_images_with_a_tokenizer_of_smaller_ones(trained, tmp_path):
    """As in the paper, where the tokenizer trained at 256 serves 512 too."""
    make_folder(tmp_path / "images", {"a": 6, "b": 6}, size=(80, 80))
    output = run("train_transformer.py", "--run", tmp_path / "run", "--data", tmp_path / "images",
                 "--vqgan", trained / "vqgan.pt", "--image-size", 64, *TINY_TRANSFORMER)
    assert "256 tokens of 32, 2 classes" in output
    run("sample.py", "--run", tmp_path / "run", "--num", 1)
