"""sample.py --image: what is kept stays, to the pixel; and the autoregressive baseline beside the parallel decoder."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import devices
import runtime
import sample
from classifier import Classifier
from conftest import ROOT, TINY_TRANSFORMER, refused, run
from data import Shapes, hashed_uniform
from maskgit import MaskGIT, MaskGITConfig, decode, decode_sequential, mask_counts
from sample import composite, draw, extrapolate, likeliest_class, load_run, repaint_region


@pytest.fixture
def photo(tmp_path):
    """32 x 32, the size of the toy run (8 x 8 tokens of 4 pixels): every pixel another colour."""
    y, x = np.mgrid[:32, :32]
    Image.fromarray(np.stack([y * 8, x * 8, (x * y) % 256], -1).astype(np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def edit(trained, photo, monkeypatch, capsys):
    """Calls sample.py's main in this process (a new one takes seconds to start), in the photo's folder: -> what it printed."""
    def call(*flags, code=0):
        arguments = ["--run", trained, "--image", photo, "--num", 1, "--steps", 8, "--feather", 0, "--out", "out.png", *flags]
        monkeypatch.chdir(photo.parent)
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, arguments)])
        try:
            devices.command_line(sample.main)
            status = 0
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        assert status == code, printed
        return printed.out if code == 0 else printed.err.strip().splitlines()
    return call


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


CASES = {   # flags, and which pixels may change: tokens are 4 x 4, and a box takes one token more on either side
    "box": (["--box", "9,10,5,7", "--class", "fish"], (slice(4, 16), slice(4, 20))),
    "corner": (["--box", "0,0,1,1", "--class", 2], (slice(0, 4), slice(0, 4))),
    "inpaint": (["--inpaint", "centre"], (slice(8, 24), slice(8, 24))),
    "outpaint-right": (["--outpaint", "right=0.5"], (slice(0, 32), slice(16, 32))),
    "outpaint-up": (["--outpaint", "up=0.3"], (slice(0, 12), slice(0, 32))),
    "mask": (["--mask", "mask.png", "--class", "moon"], (slice(12, 20), slice(0, 4))),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_outside_are_the_inputs(edit, photo, case):
    flags, inside = CASES[case]
    mask = np.zeros((32, 32), np.uint8)
    mask[13:17, 2] = 255
    Image.fromarray(mask).save(photo.parent / "mask.png")
    edit("--num", 2, *flags)
    may_change = np.zeros((32, 32), bool)
    may_change[inside] = True
    for i in (1, 2):
        changed = (pixels(photo.parent / f"out.{i}.png") != pixels(photo)).any(-1)
        assert not changed[~may_change].any()
        assert changed[may_change].mean() > 0.9
    grid = pixels(photo.parent / "out.png")                               # below the titles: input, masked input, variants
    assert (grid[20:84:2, 2:66:2] == pixels(photo)).all()
    masked = grid[20:84:2, 68:132:2]
    assert (masked[may_change] == 128).all() and (masked[~may_change] == pixels(photo)[~may_change]).all()


@pytest.mark.parametrize("width", [33, 45, 64, 101])
def test_a_panorama_keeps_the_photo(edit, photo, width):
    edit("--extrapolate", width, "--film")
    result, left = pixels(photo.parent / "out.1.png"), (width - 32) // 2
    assert result.shape == (32, width, 3)
    assert (result[:, left:left + 32] == pixels(photo)).all()
    rest = np.delete(result, slice(left, left + 32), 1)
    assert rest.shape[1] == width - 32 and not (rest == 128).all(-1).any(0).all()            # painted, not grey
    with Image.open(photo.parent / "out.film.gif") as film:
        assert film.n_frames >= 2


def test_each_window_is_half_known():
    """Every call sees half of its window known, known tokens stay, and nothing is left unknown."""
    torch.manual_seed(0)
    model = MaskGIT(MaskGITConfig(24, 3, 16, 32, 1, 4, 64)).eval()
    tokens = torch.randint(0, 24, (2, 4, 4))
    steps = extrapolate(model, tokens, torch.tensor([0, 1]), 3, 5, steps=2)
    assert len(steps) == 1 + 3 + 2                                        # 5 columns to the right, 3 to the left, 2 at a time
    assert (steps[0] != model.mask_id).sum() == 32
    before = 4
    for canvas in steps[1:]:
        assert canvas.shape == (2, 4, 12) and torch.equal(canvas[:, :, 3:7], tokens)
        known = (canvas[0, 0] != model.mask_id).sum()
        assert 0 < known - before <= 2
        before = known
    assert before == 12 and steps[-1].max() < 24


@pytest.mark.parametrize("fit, mode, size, turned", [("crop", "L", (50, 40), 1), ("pad", "RGBA", (20, 64), 6), ("pad", "P", (64, 33), 1),
                                                     ("crop", "CMYK", (32, 48), 8), ("crop", "1", (31, 77), 3), ("pad", "I;16", (40, 30), 1)])
def test_photos_of_any_size_and_mode(edit, tmp_path, fit, mode, size, turned):
    """Fitted as PIL alone would: upright by the EXIF tag, cropped or padded; then repainted on the right half only."""
    colours = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(colours)
    if mode == "I;16":
        image = Image.fromarray(colours[..., 0].astype(np.uint16) * 256)
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x112] = turned
    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    image.save(path, exif=exif)
    edit("--image", path, "--outpaint", "right=0.5", "--fit", fit)
    result = pixels(tmp_path / "out.1.png")
    assert result.shape == (32, 32, 3)
    wide = (size[0] > size[1]) != (turned in (6, 8))
    if fit == "pad":                                                      # the bars repeat the photo's border
        bars = result[:3, :16] if wide else result[:, :3]
        assert (bars.std(0 if wide else 1) == 0).all()
    if mode == "CMYK":                                                    # turned by 90 degrees, then a square from its middle
        with Image.open(path) as original:
            upright = original.transpose(Image.Transpose.ROTATE_90).convert("RGB")
        assert (result[:, :16] == np.asarray(upright.crop((8, 0, 40, 32)))[:, :16]).all()


def test_feather():
    """Between the photo and what is painted lies a smooth slope, all of it on the photo's side."""
    photo, painted, mask = torch.zeros(3, 64, 64), torch.ones(1, 3, 64, 64), torch.zeros(64, 64, dtype=torch.bool)
    mask[:, 32:] = True
    row = composite(photo, painted, mask, 4)[0, 0, 10]
    assert (row[32:] == 1).all() and (row[:16] == 0).all()
    assert (row.diff() >= 0).all() and row.diff().max() < 0.25 and 0.3 < row[29] < 0.7
    assert torch.equal(composite(photo, painted, mask, 0)[0, 0, 10], mask[10].float())


def test_start_step(trained):
    """Part-way: the first steps' counts are passed over, and the rest follow the schedule on the unknown tokens alone."""
    _, _, model, _ = load_run(trained, "cpu")
    known = torch.randint(0, 32, (1, 64))
    known[0, 10:50] = model.mask_id
    tokens, history = decode(model, torch.tensor([1]), 12, known=known, start_step=2, return_steps=True)
    counts = [mask.sum().item() for _, mask in history]
    assert counts == mask_counts("cosine", 12, 40, 2) == mask_counts("cosine", 12, 40)[2:]
    assert torch.equal(tokens[0, :10], known[0, :10]) and torch.equal(tokens[0, 50:], known[0, 50:])
    assert mask_counts("cosine", 12, 3, 2)[0] == 2       # released: at least one fewer than at the start, not than at step 2


def test_the_likeliest_class():
    """A model that has learned one token for each class tells the class from a few known tokens."""
    torch.manual_seed(0)
    model = MaskGIT(MaskGITConfig(codebook_size=8, num_classes=6, num_tokens=9, dim=32, depth=1, heads=2, mlp_dim=32, dropout=0.0))
    optimizer, labels = torch.optim.Adam(model.parameters(), 3e-3), torch.arange(6)
    masks, targets = torch.full((6, 9), model.mask_id), labels[:, None].expand(6, 9)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model(masks, labels).transpose(1, 2), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for label in range(6):
        known = torch.full((9,), model.mask_id)
        known[[2, 5, 7]] = label
        assert likeliest_class(model.eval(), known, 0) == label
    with pytest.raises(ValueError, match="--class"):
        likeliest_class(model, masks[0], 0)


def test_without_a_class(trained, photo, edit):
    assert "the likeliest" in edit("--inpaint", "centre")
    folder = photo.parent / "run"
    folder.mkdir()
    shutil.copy(trained / "vqgan.pt", folder)
    run("train_transformer.py", "--run", folder, *TINY_TRANSFORMER, "--class-dropout", 0.5)
    assert "class: none" in edit("--run", folder, "--inpaint", "centre")


def test_what_is_repainted_shows_its_class():
    """On 200 validation images, with the models in example/: a classifier finds the object's class after its centre was painted
    anew, and another class after the object, to the borders of its box, was edited into it; both in at least 80%."""
    example, n = ROOT / "example", 200
    _, tokenizer, transformer, checkpoint = load_run(example, "cpu")
    classifier = Classifier(10)
    runtime.load_weights(classifier, runtime.load_checkpoint(example / "classifier.pt", "classifier")["model"], "classifier.pt").eval()
    images, labels = Shapes("val").batch(np.arange(n))
    images = images.float() / 255
    u = hashed_uniform(1, np.arange(n), 13)                               # as Shapes draws: size and centre of each object
    size = 0.7 + 0.2 * u[:, 0]
    top, left = (1 - (2 * u[:, 4] - 1) * (1 - size) - size) * 16, (1 + (2 * u[:, 3] - 1) * (1 - size) - size) * 16

    def region(**flags):
        given = SimpleNamespace(**{"box": None, "mask": None, "inpaint": None, "fit": "crop", "image": "it"} | flags)
        return repaint_region(given, Image.new("RGB", (32, 32)), (0, 0, 32), 32, 4)

    boxes = [region(box=f"{int(y)},{int(x)},{int(32 * s)},{int(32 * s)}") for y, x, s in zip(top, left, size)]
    with torch.no_grad():
        tokens, right = tokenizer.encode(images), {}
        for name, where, asked in (("inpainting", region(inpaint="centre"), labels), ("editing", torch.stack(boxes), (labels + 1) % 10)):
            known = torch.where(where, transformer.mask_id, tokens).flatten(1)
            painted, _ = draw(tokenizer, transformer, asked, known=known, generator=torch.Generator().manual_seed(0))
            mask = where.expand(n, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
            painted = torch.cat([composite(a, b[None], m, 3) for a, b, m in zip(images, painted, mask)])
            right[name] = (classifier(painted).argmax(1) == asked).float().mean().item()
    assert min(right.values()) >= 0.8, right
    print({name: round(share, 3) for name, share in right.items()}, "tokens in a box:", torch.stack(boxes).float().sum((1, 2)).mean().item())


# ----------------------------------------------------------------------------------------- the autoregressive baseline

@pytest.fixture(scope="module")
def causal():
    torch.manual_seed(0)
    model = MaskGIT(MaskGITConfig(codebook_size=24, num_classes=3, num_tokens=16, dim=32, depth=2, heads=4, mlp_dim=64, causal=True)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double()


def test_a_position_sees_only_what_comes_before(causal):
    tokens, labels = torch.randint(0, 24, (1, 16)), torch.tensor([1])
    before = causal(tokens, labels)
    assert before.shape == (1, 16, 24)
    for i in (0, 7, 15):
        changed = tokens.clone()
        changed[0, i] = (changed[0, i] + 1) % 24
        differs = (causal(changed, labels) != before).any(-1)[0]
        assert not differs[:i + 1].any() and differs[i + 1:].all()
    assert (causal(tokens, torch.tensor([2])) != before).any(-1).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 5}])
def test_the_cache_changes_no_token(causal, options):
    labels = torch.tensor([0, 1, 2, 1])
    cached, uncached = (decode_sequential(causal, labels, cached=cached, generator=torch.Generator().manual_seed(1), **options)
                        for cached in (True, False))
    assert torch.equal(cached, uncached) and cached.max() < 24
    if options.get("temperature") == 0:                                   # each token is the likeliest after those before it
        assert torch.equal(causal(cached, labels).argmax(-1), cached)


def test_one_decoder_for_each_kind(causal):
    with pytest.raises(ValueError, match="token by token"):
        decode(causal, torch.tensor([0]))
    with pytest.raises(ValueError, match="--decoder autoregressive"):
        decode_sequential(MaskGIT(MaskGITConfig(8, 3, 4, 16, 1, 2, 16)), torch.tensor([0]))


def test_a_run_with_both(trained, photo, tmp_path):
    """Training, drawing, comparing; and editing is refused."""
    folder = tmp_path / "both"
    shutil.copytree(trained, folder)
    refused("sample.py", "--run", folder, "--compare", says=["autoregressive.pt", "does not exist"])
    run("train_transformer.py", "--run", folder, *TINY_TRANSFORMER, "--decoder", "autoregressive")
    run("sample.py", "--run", folder, "--compare", "--num", 1)
    assert (folder / "compare.png").exists()
    run("sample.py", "--run", folder, "--decoder", "autoregressive", "--num", 1, "--film", "--bf16", "yes", "--top-k", 3)
    assert (folder / "samples.film.gif").exists()
    (folder / "transformer.pt").unlink()
    assert "token by token" in run("sample.py", "--run", folder, "--num", 1)
    refused("sample.py", "--run", folder, "--image", photo, "--inpaint", "centre", says=["autoregressive", "--decoder parallel"])


# ---------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, says", [
    ([], ["--image", "--inpaint"]),
    (["--inpaint", "centre", "--outpaint", "right=0.5"], ["--image", "one of"]),
    (["--box", "0,0,33,4"], ["0,0,33,4", "32 x 32"]),
    (["--box=-1,0,3,4"], ["-1,0,3,4", "outside"]),
    (["--box", "3,3,0,4"], ["3,3,0,4", "empty"]),
    (["--box", "3,3,4"], ["3,3,4", "TOP,LEFT,HEIGHT,WIDTH"]),
    (["--mask", "small.png"], ["small.png", "16 x 16", "32 x 32"]),
    (["--mask", "black.png"], ["nothing", "mask"]),
    (["--mask", "absent.png"], ["absent.png"]),
    (["--outpaint", "right=1"], ["right=1", "fraction"]),
    (["--outpaint", "right=0"], ["right=0", "fraction"]),
    (["--outpaint", "right=nan"], ["right=nan", "fraction"]),
    (["--outpaint", "north=0.5"], ["north=0.5", "up"]),
    (["--outpaint", "right"], ["right", "fraction"]),
    (["--extrapolate", 32], ["32", "wider"]),
    (["--inpaint", "centre", "--start-step", 8], ["start step", "8"]),
    (["--inpaint", "centre", "--class", "fish", "moon"], ["one --class"]),
    (["--image", "broken.png", "--inpaint", "centre"], ["broken.png", "not a readable image"]),
    (["--image", "none.png", "--inpaint", "centre"], ["none.png", "not a readable image"]),
])
def test_bad_edits(edit, photo, flags, says):
    Image.new("L", (16, 16), 255).save(photo.parent / "small.png")
    Image.new("L", (32, 32), 0).save(photo.parent / "black.png")
    (photo.parent / "broken.png").write_bytes(photo.read_bytes()[:100])
    before = sorted(photo.parent.iterdir())
    line, = edit(*flags, code=2)
    assert all(word in line for word in says), line
    assert sorted(photo.parent.iterdir()) == before


def test_editing_flags_need_an_image(trained):
    refused("sample.py", "--run", trained, "--box", "0,0,4,4", says=["--box", "--image"])


def test_a_box_that_the_crop_cuts_off(edit, tmp_path):
    Image.new("RGB", (96, 32), "red").save(tmp_path / "wide.png")
    flags = ["--image", "wide.png", "--box", "0,0,8,8", "--class", 1]
    line, = edit(*flags, code=2)
    assert all(word in line for word in ("wide.png", "--fit", "cut off"))
    edit(*flags, "--fit", "pad")
