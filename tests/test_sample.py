"""sample.py as a user runs it, every bad input of its own, and the sequential decoder beside the parallel one."""
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_TRANSFORMER, TINY_VQ, refused, run
from PIL import Image

import sample
from lib.pictures import picture_path, save_image
from maskgit import MaskGIT, MaskGITConfig, decode, decode_sequential
from vqgan import as_grid, to_pixels


class Tiles:
    """In place of a tokenizer: the image of a token is a square of 2 x 2 pixels, as bright as its number."""
    config = SimpleNamespace(stride=2)

    def decode(self, tokens):
        return to_pixels(tokens[:, None].float() / 24, 2).repeat(1, 3, 1, 1)


@pytest.fixture(scope="module", params=[False, True], ids=["parallel", "sequential"])
def toy(request):
    """An untrained transformer of 4 x 4 tokens, whose logits are far from equal."""
    torch.manual_seed(0)
    config = MaskGITConfig(codebook_size=24, num_classes=3, num_tokens=16, dim=32, depth=2, heads=4, mlp_dim=64,
                           causal=request.param)
    model = MaskGIT(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double()


@pytest.fixture
def call(call_main, tmp_path):
    """Calls sample.py's main in tmp_path: -> what it printed."""
    def call(*flags, code=0):
        return call_main(sample, tmp_path, *flags, code=code)
    return call


def test_newest_run_grid_and_film(trained, tmp_path):
    for name in ("older", "newer"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    os.utime(tmp_path / "runs" / "older" / "transformer.pt", (1, 1))
    (tmp_path / "runs" / "unfinished").mkdir()
    output = run("sample.py", "--steps", 4, "--schedule", "cosine", "--num", 3, "--film", cwd=tmp_path)
    assert "runs/newer" in output
    newer = tmp_path / "runs" / "newer"
    with Image.open(newer / "samples.png") as grid, Image.open(newer / "samples.film.gif") as gif:
        assert grid.height > 10 * 64 and grid.width > 3 * 64
        assert gif.n_frames >= 4
    assert (newer / "samples.film.png").exists()


def test_classes_and_seeds(trained, call, tmp_path):
    cases = {"a": ["--class", "heart", 3], "b": ["--class", "HEART", "fish"], "c": ["--class", "hea", "3", "--seed", 1]}
    for name, flags in cases.items():
        call("--run", trained, "--num", 2, "--out", f"{name}.png", *flags)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("flags", [["--order", "halton"], ["--order", "random"], ["--top-k", 3, "--temperature", 0.5],
                                   ["--temperature", 0]])
def test_options(trained, call, tmp_path, flags):
    """Each changes what is drawn."""
    call("--run", trained, "--num", 1, "--out", "a.png", *flags)
    call("--run", trained, "--num", 1, "--out", "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_guidance_needs_a_null_class(trained, call, tmp_path):
    assert "--class-dropout" in call("--run", trained, "--cfg", 2, "--out", "a.png", code=2)
    shutil.copy(trained / "vqgan.pt", tmp_path)
    run("train_transformer.py", "--run", tmp_path, *TINY_TRANSFORMER, "--class-dropout", 0.5)
    call("--run", tmp_path, "--cfg", 2, "--num", 1)


@pytest.mark.parametrize("flags, says", [
    (["--schedule", "quartic"], ["quartic", "cosine", "logarithmic"]),
    (["--order", "spiral"], ["spiral", "halton"]),
    (["--class", "zebra"], ["zebra", "ball"]),
    (["--class", "10"], ["10", "0 to 9"]),
    (["--class", "r"], ["several"]),
    (["--steps", 0], ["steps", "1"]),
    (["--steps", 65], ["steps", "64"]),
    (["--num", 0], ["--num"]),
    (["--top-k", 33], ["codebook, 32", "33"]),
    (["--run", "nowhere"], ["nowhere", "does not exist"]),
    (["--out", "picture.xyz"], ["picture.xyz", ".png"]),
])
def test_bad_flags(trained, call, tmp_path, flags, says):
    line = call("--run", trained, "--out", "a.png", *flags, code=2)
    assert all(word in line for word in says), line
    assert not list(tmp_path.iterdir())


def test_no_run_at_all(tmp_path):
    """The example beside the scripts is drawn from, and nothing can be trained on."""
    assert "/example: samples" in run("sample.py", "--steps", 2, "--num", 1, "--out", "a.png", cwd=tmp_path)
    assert (tmp_path / "a.png").exists()
    refused("train_transformer.py", says=["vqgan.pt", "does not exist"], cwd=tmp_path)


def test_pictures_of_every_kind(tmp_path):
    for ending in (".png", ".jpg", ".jpeg", ".webp", ".JPG"):
        path = picture_path(tmp_path / f"a{ending}")
        save_image(path, Image.new("RGB", (8, 8), "red"))
        with Image.open(path) as image:
            assert image.size == (8, 8)


def test_an_unwritable_output(trained, call, tmp_path):
    (tmp_path / "file").write_text("")
    line = call("--run", trained, "--num", 1, "--out", "file/a.png", code=2)
    assert "file" in line and "--out" in line


def test_broken_checkpoints(trained, call, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    good = (folder / "transformer.pt").read_bytes()
    cases = {"truncated": good[:len(good) // 2], "a few bytes": good[:10], "empty": b"",
             "text": b"these are no weights\n" * 50, "other stage": (folder / "vqgan.pt").read_bytes()}
    for name, content in cases.items():
        (folder / "transformer.pt").write_bytes(content)
        line = call("--run", folder, code=2)
        assert "transformer.pt" in line, line
        assert ("holds a vqgan" if name == "other stage" else "not a checkpoint") in line, line
    torch.save([1, 2], folder / "transformer.pt")
    line = call("--run", folder, code=2)
    assert "transformer.pt" in line and "not a checkpoint" in line
    checkpoint = torch.load(trained / "transformer.pt", weights_only=True)
    del checkpoint["model"]["head_bias"]
    torch.save(checkpoint, folder / "transformer.pt")
    line = call("--run", folder, code=2)
    assert "head_bias" in line and "missing" in line
    (folder / "transformer.pt").write_bytes(good)
    call("--run", folder, "--num", 1)


def test_a_checkpoint_cannot_run_code(trained, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was-here",)
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    torch.save({"kind": "transformer", "x": Evil()}, folder / "transformer.pt")
    refused("sample.py", "--run", folder, says=["transformer.pt", "not a checkpoint"])
    assert not (tmp_path / "was-here").exists()


def test_another_codebook(trained, call, tmp_path):
    checkpoint = torch.load(trained / "vqgan.pt", weights_only=True)
    checkpoint["config"]["codebook_size"] = 16
    checkpoint["model"]["quantizer.codebook"] = checkpoint["model"]["quantizer.codebook"][:16]
    torch.save(checkpoint, tmp_path / "vqgan.pt")
    line = call("--run", trained, "--vqgan", tmp_path / "vqgan.pt", code=2)
    assert "codebook of 32" in line and "16" in line


def test_image_size_and_stride(tmp_path):
    refused("train_vq.py", "--data", tmp_path, "--run", tmp_path, *TINY_VQ, "--image-size", 30,
            says=["30", "stride 4"])
    refused("train_vq.py", "--run", tmp_path, *TINY_VQ, "--image-size", 64, says=["shapes", "32"])


# ------------------------------------------------------------------------------------------- what is drawn, and how

def test_batches_share_one_generator(toy):
    """Images beyond the first batch are other images, in the order of their labels."""
    labels = torch.tensor([0, 1, 0, 1, 2])
    decoder, options = (decode_sequential, {}) if toy.config.causal else (decode, {"steps": 3})
    images, _ = sample.draw(Tiles(), toy, labels, batch=2, generator=torch.Generator().manual_seed(5), **options)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.cat([decoder(toy, part, generator=generator, **options) for part in labels.split(2)])
    assert torch.equal(images, Tiles().decode(as_grid(tokens)))
    assert not torch.equal(images[:2], images[2:4])


def test_film(toy):
    """Each frame shows what is predicted, greyed out where it stays masked (in raster order: what comes later)."""
    labels, generators = torch.tensor([0, 1, 2]), [torch.Generator().manual_seed(5) for _ in range(2)]
    if toy.config.causal:
        images, frames = sample.draw(Tiles(), toy, labels, batch=2, film=True, generator=generators[0])
        tokens = decode_sequential(toy, labels[:2], generator=generators[1])
        steps = [(tokens, (torch.arange(16) >= 2 * known).expand(2, 16), None) for known in range(1, 9)]
        share = 1.0
    else:
        images, frames = sample.draw(Tiles(), toy, labels, batch=2, film=True, steps=5, generator=generators[0])
        tokens, steps = decode(toy, labels[:2], 5, generator=generators[1], return_steps=True)
        share = 0.85
    assert len(frames) == len(steps) and torch.equal(images, frames[-1])
    for frame, (predicted, masked, _) in zip(frames, steps):
        assert frame.shape == (3, 3, 8, 8)
        masked = to_pixels(as_grid(masked), 2)[:, None].expand(2, 3, 8, 8)
        shown = Tiles().decode(as_grid(predicted))
        assert torch.equal(frame[:2][~masked], shown[~masked])
        assert torch.allclose(frame[:2][masked], (shown * (1 - share) + 0.5 * share)[masked])


def test_what_the_decoder_is_asked_for(call, monkeypatch):
    """A row for each class, 64 images at a time; the seed and the flags of the sampler arrive."""
    asked, rows = [], []

    def recording_decode(model, labels, **options):
        asked.append((labels.tolist(), options))
        return decode(model, labels, **options)

    def recording_grid(images, captions=(), **options):
        rows.append((len(images), {len(row) for row in images}, captions))
        return Image.new("RGB", (8, 8))
    monkeypatch.setattr(sample, "decode", recording_decode)
    monkeypatch.setattr(sample, "grid", recording_grid)
    flags = {"--steps": 2, "--schedule": "square", "--choice-temperature": 3, "--temperature": 0.9, "--top-k": 7,
             "--order": "random", "--num": 40, "--seed": 5, "--out": "a.png"}
    call("--run", ROOT / "example", "--class", "heart", 3, *[word for flag in flags.items() for word in flag])
    assert [labels for labels, _ in asked] == [[6] * 40 + [3] * 24, [3] * 16]
    assert rows == [(2, {40}, ["heart", "fish"])]
    generators = [options.pop("generator") for _, options in asked]
    assert generators[0] is generators[1] and generators[0].initial_seed() == 5
    for _, options in asked:
        assert options == {"steps": 2, "schedule": "square", "choice_temperature": 3, "temperature": 0.9, "top_k": 7,
                           "cfg": 1, "order": "random", "return_steps": True}


def test_the_film_shows_one_image_of_each_class(call, monkeypatch):
    drawn = {}

    def recording_grid(rows, captions=(), **options):
        drawn["rows"] = rows
        return Image.new("RGB", (8, 8))

    def recording_film(path, frames):
        drawn["frames"] = frames
        return path, path
    monkeypatch.setattr(sample, "grid", recording_grid)
    monkeypatch.setattr(sample, "save_film", recording_film)
    call("--run", ROOT / "example", "--num", 3, "--steps", 4, "--film", "--out", "a.png")
    assert len(drawn["frames"]) == 4 and len(drawn["rows"]) == 10
    assert torch.equal(drawn["frames"][-1], torch.stack([row[0] for row in drawn["rows"]]))


# ----------------------------------------------------------------------------------------- the autoregressive baseline

@pytest.mark.parametrize("toy", [True], indirect=True)
def test_a_position_sees_only_what_comes_before(toy):
    tokens, labels = torch.randint(0, 24, (1, 16)), torch.tensor([1])
    before = toy(tokens, labels)
    assert before.shape == (1, 16, 24)
    for i in (0, 7, 15):
        changed = tokens.clone()
        changed[0, i] = (changed[0, i] + 1) % 24
        differs = (toy(changed, labels) != before).any(-1)[0]
        assert not differs[:i + 1].any() and differs[i + 1:].all()
    assert (toy(tokens, torch.tensor([2])) != before).any(-1).all()


@pytest.mark.parametrize("toy", [True], indirect=True)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 5}])
def test_the_cache_changes_no_token(toy, options):
    labels = torch.tensor([0, 1, 2, 1])
    cached, uncached = [decode_sequential(toy, labels, cached=with_cache, generator=torch.Generator().manual_seed(1),
                                          **options) for with_cache in (True, False)]
    assert torch.equal(cached, uncached) and cached.max() < 24
    if options.get("temperature") == 0:                           # each token is the likeliest after those before it
        assert torch.equal(toy(cached, labels).argmax(-1), cached)


@pytest.mark.parametrize("toy", [True], indirect=True)
def test_one_decoder_for_each_kind(toy):
    with pytest.raises(ValueError, match="token by token"):
        decode(toy, torch.tensor([0]))
    with pytest.raises(ValueError, match="--decoder autoregressive"):
        decode_sequential(MaskGIT(MaskGITConfig(8, 3, 4, 16, 1, 2, 16)), torch.tensor([0]))


def test_a_run_with_both(trained, call, tmp_path):
    """Training and drawing; a run that holds only the sequential one draws with it."""
    folder = tmp_path / "both"
    shutil.copytree(trained, folder)
    line = call("--run", folder, "--decoder", "autoregressive", code=2)
    assert "autoregressive.pt" in line and "does not exist" in line
    run("train_transformer.py", "--run", folder, *TINY_TRANSFORMER, "--decoder", "autoregressive")
    call("--run", folder, "--decoder", "autoregressive", "--num", 1, "--film", "--bf16", "yes", "--top-k", 3)
    assert (folder / "samples.film.gif").exists()
    (folder / "transformer.pt").unlink()
    assert "token by token" in call("--run", folder, "--num", 1)
