"""Larger images than a tokenizer was trained on."""
from conftest import TINY_TRANSFORMER
from test_data import make_folder

import sample
import train_transformer


def test_larger_images_with_a_tokenizer_of_smaller_ones(untrained, tmp_path, call_main):
    """As in the paper, where the tokenizer trained at 256 serves 512 too."""
    make_folder(tmp_path / "images", {"a": 6, "b": 6}, size=(80, 80))
    output = call_main(train_transformer, tmp_path, "--run", "run", "--data", "images",
                       "--vqgan", untrained / "vqgan.pt", "--image-size", 64, *TINY_TRANSFORMER, "--picture-every", 6)
    assert "256 tokens of 32, 2 classes" in output
    call_main(sample, tmp_path, "--run", "run", "--num", 1)
    assert (tmp_path / "run" / "samples.png").exists()
