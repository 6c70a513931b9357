"""edit.py: what is kept stays, to the pixel, and what is painted is what was asked for."""
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, rand_of, refused, run
from PIL import Image

import edit
import lib.errors
from edit import extrapolate, paint
from lib import pictures
from lib.editing import (
    box_region,
    centre_region,
    composite,
    likeliest_class,
    mask_region,
    outpaint_region,
    square_place,
    to_square,
)
from lib.features import Classifier
from lib.files import load_checkpoint, load_weights, rebuild
from lib.runtime import Machine, hashed_uniform
from lib.sampling import load_run
from lib.shapes import Shapes
from maskgit import MaskGIT, MaskGITConfig, decode, mask_counts
from vqgan import VQGAN, as_grid, to_pixels


@pytest.fixture
def photo(tmp_path):
    """32 x 32, the size of the toy run (8 x 8 tokens of 4 pixels): every pixel another colour."""
    y, x = np.mgrid[:32, :32]
    Image.fromarray(np.stack([y * 8, x * 8, (x * y) % 256], -1).astype(np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def call(untrained, photo, call_main):
    """Calls edit.py's main beside the photo -> what it printed."""
    def call(*flags, code=0, image=photo, feather=("--feather", 0)):
        arguments = [image, "--run", untrained, "--num", 1, "--steps", 8, *feather, "--out", "out.png", *flags]
        return call_main(edit, photo.parent, *arguments, code=code)
    return call


@pytest.fixture
def asked(monkeypatch):
    """What decode() is asked for by edit.py: a list that grows by (labels, known, options) with each call."""
    calls = []

    def recording_decode(model, labels, known, **options):
        calls.append((labels.clone(), known.clone(), options))
        return decode(model, labels, known=known, **options)
    monkeypatch.setattr(edit, "decode", recording_decode)
    return calls


@pytest.fixture
def model():
    """An untrained transformer of 4 x 4 tokens."""
    torch.manual_seed(0)
    return MaskGIT(MaskGITConfig(24, 3, 16, 32, 1, 4, 64)).eval()


class Tiles:
    """In place of a tokenizer: the image of a token is a square of 4 x 4 pixels, as bright as its number."""
    config = SimpleNamespace(stride=4, codebook_size=24)

    def decode(self, tokens):
        return to_pixels(tokens[:, None].float() / 24, 4).repeat(1, 3, 1, 1)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def grid_of(*rows):
    """Eight strings of eight characters -> (8, 8) bool, true where there is an x."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


# ------------------------------------------------------------------------------------------- which tokens are repainted

@pytest.mark.parametrize("box, rows, columns", [
    ((9, 10, 5, 7), (1, 4), (1, 5)),            # touches rows 2 to 3, columns 2 to 4; as released, one token is added
    ((0, 0, 1, 1), (0, 1), (0, 1)),             # before it, and after it where the box is as long as a token
    ((8, 8, 4, 4), (1, 4), (1, 4)),
    ((28, 28, 4, 4), (6, 8), (6, 8)),
    ((0, 0, 32, 32), (0, 8), (0, 8)),
])
def test_a_box_takes_one_token_more_before_it(box, rows, columns):
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(box_region(box, (0, 0, 32), 8), expected)


@pytest.mark.parametrize("fit, box, rows, columns", [
    ("crop", (12, 36, 12, 24), (1, 5), (1, 7)),                     # touched are rows 2 and 3, columns 2 to 5
    ("pad", (12, 36, 12, 24), (2, 5), (2, 6)),                      # touched are row 3, columns 3 and 4
    ("pad", (40, 90, 2, 6), (4, 6), (6, 8)),                        # at the right border: token 7 in row 5
    ("crop", (12, 0, 12, 20), (0, 0), (0, 0)),                      # the crop cuts it off
])
def test_a_box_in_a_photo_of_another_size(fit, box, rows, columns):
    """96 x 48 pixels on 8 x 8 tokens of 4: cropped, 6 of its pixels are a token; padded, 12 are."""
    place = square_place(96, 48, fit)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(box_region(box, place, 8), expected)


def test_a_mask_takes_every_token_with_a_white_pixel():
    mask = np.zeros((32, 32), np.uint8)
    mask[13:17, 2] = 255
    mask[31, 31] = 128
    mask[0, 20] = 127                                               # is dark
    region = grid_of("........", "........", "........", "x.......", "x.......", "........", "........", ".......x")
    assert torch.equal(mask_region(Image.fromarray(mask).convert("RGB"), "crop", 8), region)
    large = np.zeros((1024, 1024), np.uint8)
    large[300, 700] = 255                                           # a single pixel, of 16,384 in a token
    assert mask_region(Image.fromarray(large), "crop", 8).nonzero().tolist() == [[2, 5]]


def test_what_is_padded_is_not_masked():
    """A white mask repaints the whole photo, and nothing of the bars beside it."""
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[2:6] = True
    assert torch.equal(mask_region(Image.new("RGB", (96, 48), "white"), "pad", 8), region)


def test_a_transparent_mask_is_black(call, photo):
    mask = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    mask.paste("white", (0, 16, 4, 20))
    mask.save(photo.parent / "mask.png")
    call("--mask", "mask.png", "--class", "moon")
    changed = (pixels(photo.parent / "out.1.png") != pixels(photo)).any(-1)
    assert changed[16:20, :4].any() and changed.sum() <= 16


def test_the_centre():
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[2:6, 2:6] = True
    assert torch.equal(centre_region(8), region)
    assert centre_region(16)[4:12, 4:12].all() and centre_region(16).sum() == 64


@pytest.mark.parametrize("side, rows, columns", [("left", (0, 8), (0, 3)), ("right", (0, 8), (5, 8)),
                                                 ("up", (0, 3), (0, 8)), ("down", (5, 8), (0, 8))])
def test_outpainting_each_side(side, rows, columns):
    """A third of 8 tokens is rounded up to 3."""
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[slice(*rows), slice(*columns)] = True
    assert torch.equal(outpaint_region(side, 1 / 3, 8), region)


CASES = {   # flags, and which pixels may change: tokens are 4 x 4, and a box takes one token more
    "box": (["--box", "9,10,5,7", "--class", "fish"], (slice(4, 16), slice(4, 20))),
    "inpaint": (["--inpaint", "centre"], (slice(8, 24), slice(8, 24))),
    "outpaint": (["--outpaint", "left=.25"], (slice(0, 32), slice(0, 8))),
    "mask": (["--mask", "mask.png", "--class", "moon"], (slice(12, 20), slice(0, 4))),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_outside_are_the_photo_s(call, photo, case):
    flags, inside = CASES[case]
    mask = np.zeros((32, 32), np.uint8)
    mask[13:17, 2] = 255
    Image.fromarray(mask).save(photo.parent / "mask.png")
    call("--num", 2, *flags)
    may_change = np.zeros((32, 32), bool)
    may_change[inside] = True
    for i in (1, 2):
        changed = (pixels(photo.parent / f"out.{i}.png") != pixels(photo)).any(-1)
        assert not changed[~may_change].any()
        assert changed[may_change].mean() > 0.9
    grid = pixels(photo.parent / "out.png")                       # below the titles: photo, masked photo, variants
    assert (grid[20:84:2, 2:66:2] == pixels(photo)).all()
    masked = grid[20:84:2, 68:132:2]
    assert (masked[may_change] == 128).all() and (masked[~may_change] == pixels(photo)[~may_change]).all()


# -------------------------------------------------------------------------------------------------------- the border

def test_feather():
    """Between the photo and what is painted lies a smooth slope, all of it on the photo's side; so it is too where what
    is painted is narrower than the Gaussian, which is below 1/2 there."""
    photo, painted, mask = torch.zeros(3, 64, 64), torch.ones(1, 3, 64, 64), torch.zeros(64, 64, dtype=torch.bool)
    mask[:, 32:] = True
    row = composite(photo, painted, mask, 4)[0, 0, 10]
    assert (row[32:] == 1).all() and (row[:16] == 0).all()
    assert (row.diff() >= 0).all() and row.diff().max() < 0.25 and 0.3 < row[29] < 0.7
    assert torch.equal(composite(photo, painted, mask, 0)[0, 0, 10], mask[10].float())
    mask[:] = False
    mask[30:34, 30:34] = True
    image = composite(photo, painted, mask, 6)[0]
    assert (image[:, mask] == 1).all() and (image[:, 29, 30:34] > 0).all() and (image[:, ~mask] < 0.5).all()


def test_the_default_feather(call, photo):
    """Is one pixel less than a token is wide."""
    results = []
    for feather in ([], ["--feather", 3], ["--feather", 0]):
        call("--inpaint", "centre", feather=feather)
        results.append((photo.parent / "out.1.png").read_bytes())
    assert results[0] == results[1] != results[2]


# ------------------------------------------------------------------------------------------------------- the panorama

@pytest.mark.parametrize("width", [33, 64, 101])
def test_a_panorama_keeps_the_photo(call, photo, width):
    call("--extrapolate", width, "--film")
    result, left = pixels(photo.parent / "out.1.png"), (width - 32) // 2
    assert result.shape == (32, width, 3)
    assert (result[:, left:left + 32] == pixels(photo)).all()
    rest = np.delete(result, slice(left, left + 32), 1)
    assert rest.shape[1] == width - 32 and not (rest == 128).all(-1).any(0).all()            # painted, not grey
    with Image.open(photo.parent / "out.film.gif") as film:
        assert film.n_frames >= 2


def test_each_window_is_half_known(model):
    """Every call sees half of its window known, known tokens stay, and nothing is left unknown."""
    tokens = torch.randint(0, 24, (4, 4))
    steps = extrapolate(model, tokens, torch.tensor([0, 1]), 3, 5, {"steps": 2})
    known = [(~masked[0, 0]).nonzero()[:, 0].tolist() for _, masked in steps]
    # The photo lies in columns 3 to 6. Two columns at a time: 5 to the right, then 3 to the left.
    assert known == [list(range(3, 7)), list(range(3, 9)), list(range(3, 11)), list(range(3, 12)), list(range(1, 12)),
                     list(range(12))]
    for canvas, masked in steps:
        assert canvas.shape == masked.shape == (2, 4, 12) and torch.equal(canvas[:, :, 3:7], tokens.expand(2, 4, 4))
        assert canvas.max() < 24
    for (before, masked), (after, _) in zip(steps, steps[1:], strict=False):
        assert torch.equal(before[~masked], after[~masked])


@pytest.mark.parametrize("margins", [(0, 1), (2, 3), (8, 8)])
def test_what_is_painted_beside_the_photo_fits_to_it(model, margins):
    """In each frame of a panorama the photo's tokens lie at its own place, though whole tokens overhang on the left."""
    tokens, width = torch.randint(0, 24, (4, 4)), 16 + sum(margins)
    frames = paint(Tiles(), model, tokens, torch.tensor([0, 1]), margins, {"steps": 2}, film=True)
    for frame in frames:
        assert frame.shape == (2, 3, 16, width)
        assert torch.equal(frame[0, :, :, margins[0]:margins[0] + 16], Tiles().decode(tokens[None])[0])
    grey = [(frame == 0.5).all(0).all(0).all(0).sum().item() for frame in frames]           # columns
    assert grey == sorted(grey, reverse=True) and grey[0] == width - 16 and grey[-1] == 0
    result, = paint(Tiles(), model, tokens, torch.tensor([0, 1]), margins, {"steps": 2}, film=False)
    assert result.shape == frames[-1].shape


# ------------------------------------------------------------------------------------------- what is painted, and how

def test_what_is_painted_is_what_was_decoded(model):
    """The last step's tokens; with film also those before it, greyed out where they stay masked."""
    known, labels, told = torch.randint(0, 24, (4, 4)), torch.tensor([0, 1]), []
    known[1:3, 2:] = model.mask_id
    options = {"steps": 3, "rand": rand_of(5)}
    tokens = decode(model, labels, known=known.flatten().expand(2, 16), on_step=lambda *step: told.append(step), **options)

    options["rand"] = rand_of(5)
    result, = paint(Tiles(), model, known, labels, (0, 0), options, film=False)
    assert torch.equal(result, Tiles().decode(as_grid(tokens)))

    options["rand"] = rand_of(5)
    frames = paint(Tiles(), model, known, labels, (0, 0), options, film=True)
    assert len(frames) == 3 and torch.equal(frames[-1], result)
    for frame, (_, sampled, masked, _) in zip(frames, told, strict=True):
        grey = 0.85 * to_pixels(as_grid(masked), 4)[:, None]
        torch.testing.assert_close(frame, Tiles().decode(as_grid(sampled)) * (1 - grey) + 0.5 * grey)
    assert told[0][2].any()


def test_the_film_shows_the_steps(call, photo, monkeypatch):
    """Over the photo, what is predicted; greyed out where it stays masked: less and less, and nothing in the end."""
    films = []
    monkeypatch.setattr(pictures, "save_film", lambda *film: films.append(film))
    call("--inpaint", "centre", "--film", "--num", 2, "--steps", 4)
    call("--inpaint", "centre", "--film", "--num", 2, "--steps", 4, "--start-step", 2)
    path, frames, titles = films[0]
    assert titles == ["step 1", "step 2", "step 3", "step 4"] and films[1][2] == ["step 3", "step 4"]
    assert len(frames) == 4 and frames[0].shape == (2, 3, 32, 32)
    grey = [((frame - 0.5).abs().amax(1) <= 0.075).sum().item() for frame in frames]
    assert grey == sorted(grey, reverse=True) and grey[0] > grey[-1]
    call("--inpaint", "centre", "--num", 2, "--steps", 4)
    assert (np.abs(pixels(photo.parent / "out.2.png") / 255 - frames[-1][1].movedim(0, -1).numpy()) <= 0.51 / 255).all()


def test_what_the_decoder_is_asked_for(untrained, call, asked, photo):
    """The class, the seed and the sampler's flags arrive; the photo's tokens are given, but for those in the box."""
    call("--box", "9,10,5,7", "--class", "fish", "--num", 70, "--seed", 5, "--steps", 3, "--start-step", 1,
         "--top-k", 7)
    _, tokenizer, transformer, _ = load_run(untrained, Machine("cpu"))
    tokens = tokenizer.encode(torch.from_numpy(pixels(photo)).movedim(-1, 0)[None].float() / 255)[0]
    tokens[1:4, 1:5] = transformer.mask_id
    assert [labels.tolist() for labels, _, _ in asked] == [[3] * 64, [3] * 6]
    for labels, known, options in asked:
        assert torch.equal(known, tokens.flatten().expand(len(labels), -1))
        assert options["start_step"] == 1 and options["steps"] == 3 and options["top_k"] == 7


def test_a_panorama_is_painted_as_asked(call, asked):
    call("--extrapolate", 40, "--class", "fish", "--num", 2, "--seed", 5, "--steps", 3)
    assert [labels.tolist() for labels, _, _ in asked] == [[3, 3], [3, 3]]
    assert all(options["steps"] == 3 for _, _, options in asked)


def test_variants_and_seeds(call, photo):
    """Each variant differs from the others; a seed gives the same ones again, however many there are."""
    results = []
    for seed, num in ((0, 2), (0, 3), (1, 2)):
        call("--inpaint", "centre", "--num", num, "--seed", seed)
        results.append([(photo.parent / f"out.{i}.png").read_bytes() for i in (1, 2)])
    assert results[0] == results[1] and len({*results[0], *results[2]}) == 4


def test_start_step():
    """Part-way: the first steps' counts are passed over, the rest follow the schedule on the unknown tokens alone."""
    torch.manual_seed(0)
    model, counts = MaskGIT(MaskGITConfig(32, 10, 64, 16, 1, 2, 64)).eval(), []
    known = torch.randint(0, 32, (1, 64))
    known[0, 10:50] = model.mask_id
    tokens = decode(model, torch.tensor([1]), 12, known=known, start_step=2,
                    on_step=lambda t, sampled, masked, confidence: counts.append(masked.sum().item()))
    assert counts == mask_counts("cosine", 12, 40, 2) == mask_counts("cosine", 12, 40)[2:]
    assert torch.equal(tokens[0, :10], known[0, :10]) and torch.equal(tokens[0, 50:], known[0, 50:])
    assert mask_counts("cosine", 12, 3, 2)[0] == 2       # released: at least one fewer than at the start, not at step 2


# ---------------------------------------------------------------------------------------------------------- the class

def test_the_likeliest_class():
    """A model that has learned one token for each class tells the class from a few known tokens."""
    torch.manual_seed(0)
    model = MaskGIT(MaskGITConfig(codebook_size=8, num_classes=6, num_tokens=9, dim=32, depth=1, heads=2, mlp_dim=32,
                                  dropout=0.0))
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
    with pytest.raises(ValueError, match="choose a class"):
        likeliest_class(model, masks[0], 0)


def test_what_the_likeliest_class_is_told_from():
    """Each quarter of the known tokens is predicted from those before it, under fewer and fewer classes."""
    asked = []

    class Model:
        config, mask_id = SimpleNamespace(num_classes=100), 150

        def __call__(self, tokens, labels):
            asked.append(((tokens[0] != self.mask_id).sum().item(), len(labels)))
            assert torch.equal(tokens[0][tokens[0] != self.mask_id], known[tokens[0] != self.mask_id])
            logits = torch.zeros(*tokens.shape, 24)
            logits[..., 7] = 3 - (labels - 42).abs()[:, None] / 20
            return logits
    known = torch.full((12,), Model.mask_id)
    known[2:10] = 7
    assert likeliest_class(Model(), known, 0) == 42
    assert asked == [(0, 64), (0, 36), (2, 25), (4, 16), (6, 16)]


def test_without_a_class(untrained, call, asked):
    """Without --class: the likeliest one."""
    printed = call("--inpaint", "centre")
    _, _, transformer, checkpoint = load_run(untrained, Machine("cpu"))
    (labels, known, _), = asked
    likeliest = likeliest_class(transformer, known[0], 0)
    assert f"class: {checkpoint['classes'][likeliest]} (the likeliest" in printed and labels.tolist() == [likeliest]
    assert "class: moon (as asked)" in call("--inpaint", "centre", "--class", "moon")
    assert asked[1][0].tolist() == [7]


def test_class_names_that_are_numbers(untrained, call, tmp_path):
    """--class 10 is the class of that name, not the eleventh."""
    shutil.copytree(untrained, tmp_path / "run")
    checkpoint = torch.load(untrained / "transformer.pt", weights_only=True)
    checkpoint["classes"] = [str(number) for number in range(1, 11)]
    torch.save(checkpoint, tmp_path / "run" / "transformer.pt")
    assert "class: 10 (as asked)" in call("--inpaint", "centre", "--run", "run", "--class", 10)


@pytest.mark.slow
def test_what_is_repainted_shows_its_class():
    """On 200 validation images, with the models in example/: a classifier finds the object's class after its centre was
    painted anew, and another class after the object, to the borders of its box, was edited into it; both in at least
    80%."""
    n = 200
    _, tokenizer, transformer, checkpoint = load_run(ROOT / "example", Machine("cpu"))
    half = checkpoint["image_size"] // 2
    side = 2 * half // tokenizer.config.stride
    weights = load_checkpoint(ROOT / "example" / "classifier.pt", "classifier")["model"]
    classifier = load_weights(Classifier(10), weights, "classifier.pt").eval()
    images, labels = Shapes("val", 2 * half).batch(np.arange(n))
    images = images.float() / 255
    u = hashed_uniform(1, np.arange(n), 13)                       # as Shapes draws: size and centre of each object
    size = 0.7 + 0.2 * u[:, 0]
    top, left = (1 - (2 * u[:, 4] - 1) * (1 - size) - size) * half, (1 + (2 * u[:, 3] - 1) * (1 - size) - size) * half
    boxes = [box_region((int(y), int(x), int(2 * half * s), int(2 * half * s)), (0, 0, 2 * half), side)
             for y, x, s in zip(top, left, size, strict=True)]
    cases = {"inpainting": (centre_region(side).expand(n, side, side), labels),
             "editing": (torch.stack(boxes), (labels + 1) % 10)}
    right = {}
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        for name, (regions, classes) in cases.items():
            known = torch.where(regions, transformer.mask_id, tokens).flatten(1)
            painted = decode(transformer, classes, known=known, cfg=1.0, rand=rand_of(0))
            masks = to_pixels(regions, 4)
            edited = [composite(image, new[None], mask, 3) for image, new, mask
                      in zip(images, tokenizer.decode(as_grid(painted)), masks, strict=True)]
            right[name] = (classifier(torch.cat(edited)).argmax(1) == classes).float().mean().item()
    assert min(right.values()) >= 0.8, right


# ------------------------------------------------------------------------------------------------------------- photos

@pytest.mark.parametrize("fit, mode, size, turned", [
    ("crop", "L", (50, 40), 1), ("pad", "RGBA", (20, 64), 6), ("pad", "P", (64, 33), 1),
    ("crop", "CMYK", (32, 48), 8), ("crop", "1", (31, 77), 3), ("pad", "I;16", (40, 30), 1)])
def test_photos_of_any_size_and_mode(call, tmp_path, fit, mode, size, turned):
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
    call("--outpaint", "right=0.5", "--fit", fit, image=path)
    result = pixels(tmp_path / "out.1.png")
    assert result.shape == (32, 32, 3)
    wide = (size[0] > size[1]) != (turned in (6, 8))
    if fit == "pad":                                                      # the bars repeat the photo's border
        bars = result[:3, :16] if wide else result[:, :3]
        assert (bars.std(0 if wide else 1) == 0).all()
    if mode == "CMYK":                                            # turned by 90 degrees, then a square from its middle
        with Image.open(path) as original:
            upright = original.transpose(Image.Transpose.ROTATE_90).convert("RGB")
        assert (result[:, :16] == np.asarray(upright.crop((8, 0, 40, 32)))[:, :16]).all()


def test_a_long_photo_is_padded_in_little_memory():
    """It is scaled first: its square would have 1.6 billion pixels."""
    photo = Image.new("RGB", (40_000, 900), "red")
    tracemalloc.start()
    square = to_square(photo, 64, "pad")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(square, torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 64, 64)) and peak < 1e7


# ---------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, says", [
    ([], ["--box", "--mask", "--inpaint", "--outpaint", "--extrapolate", "required"]),
    (["--inpaint", "centre", "--outpaint", "right=0.5"], ["--outpaint", "--inpaint", "not allowed"]),
    (["--box", "0,0,33,4"], ["0,0,33,4", "32 x 32"]),
    (["--box=-1,0,3,4"], ["-1,0,3,4", "outside"]),
    (["--box", "3,3,0,4"], ["3,3,0,4", "empty"]),
    (["--box", "3,3,4"], ["3,3,4", "TOP,LEFT,HEIGHT,WIDTH"]),
    (["--mask", "small.png"], ["small.png", "16 x 16", "32 x 32"]),
    (["--mask", "black.png"], ["nothing", "mask"]),
    (["--mask", "absent.png"], ["absent.png"]),
    (["--outpaint", "right=1"], ["right=1", "fraction"]),
    (["--outpaint", "right=0"], ["right=0", "fraction"]),
    (["--outpaint", "right=0.0"], ["right=0.0", "fraction"]),
    (["--outpaint", "right=nan"], ["right=nan", "fraction"]),
    (["--outpaint", "north=0.5"], ["north=0.5", "up"]),
    (["--outpaint", "right"], ["right", "fraction"]),
    (["--extrapolate", 32], ["32", "wider"]),
    (["--extrapolate", 20_000, "--out", "wide.webp"], ["wide.webp", "16,383", ".png", "--extrapolate"]),
    (["--inpaint", "centre", "--num", 20_000, "--out", "high.jpg"], ["high.jpg", "65,500", ".png", "--num"]),
    (["--inpaint", "centre", "--start-step", 8], ["--start-step 8", "8"]),
    (["--inpaint", "centre", "--class", "fish", "moon"], ["moon"]),
    (["--inpaint", "centre", "--class", "zebra"], ["zebra", "ball"]),
    (["--inpaint", "centre", "--num", 0], ["--num"]),
    (["--inpaint", "centre", "--out", "picture.xyz"], ["picture.xyz", ".png"]),
    (["--inpaint", "centre", "--feather", 1e12], ["--feather", "from 0 to 1000"]),
    (["--extrapolate", 10_000, "--film", "--num", 1000], ["--num 1000", "memory", "fewer"]),
    (["--inpaint", "centre", "--out", "photo.png"], ["photo.png", "overwritten", "--out"]),
    (["--mask", "m.1.png", "--out", "m.png"], ["m.1.png", "overwritten", "--out"]),
    (["--mask", "m.film.png", "--out", "m.png", "--film"], ["m.film.png", "overwritten", "--out"]),
    (["--inpaint", "centre", "--num", 10 ** 6, "--film"], ["--num 1000000", "memory", "fewer"]),
])
def test_bad_edits(call, photo, monkeypatch, flags, says):
    """They are refused before anything is painted."""
    monkeypatch.setattr(edit, "decode", None)
    monkeypatch.setattr(lib.errors, "memory", lambda: 1e11)          # a hundred gigabytes
    Image.new("L", (16, 16), 255).save(photo.parent / "small.png")
    Image.new("L", (32, 32), 0).save(photo.parent / "black.png")
    before = sorted(photo.parent.iterdir())
    line = call(*flags, code=2)
    assert all(word in line for word in says), line
    assert sorted(photo.parent.iterdir()) == before


@pytest.mark.parametrize("flags", [
    ["--class", "fish"], ["--num", 8], ["--feather", 0], ["--start-step", 2], ["--film"], ["--steps", 4], ["--top-k", 5],
    ["--seed", 1]])
def test_a_reconstruction_paints_nothing(call_main, photo, flags):
    line = call_main(edit, photo.parent, "photo.png", "--reconstruct", *flags, code=2)
    assert line == f"error: {flags[0]} changes nothing with --reconstruct, which paints nothing: leave it out"


@pytest.mark.parametrize("name, says", [("broken.png", "not a readable image"), ("none.png", "does not exist")])
def test_bad_photos(call, photo, name, says):
    (photo.parent / "broken.png").write_bytes(photo.read_bytes()[:100])
    line = call("--inpaint", "centre", image=name, code=2)
    assert name in line and says in line


def test_a_photo_beside_its_reconstruction(untrained, photo, call_main):
    """By a run that holds a tokenizer alone."""
    (photo.parent / "runs" / "new").mkdir(parents=True)
    shutil.copy(untrained / "vqgan.pt", photo.parent / "runs" / "new")
    printed = call_main(edit, photo.parent, "photo.png", "--reconstruct")
    path = photo.parent / "runs" / "new" / "photo.reconstruct.png"
    tokenizer, _ = rebuild(path.with_name("vqgan.pt"), "vqgan", VQGAN)
    image = torch.from_numpy(pixels(photo)).movedim(-1, 0).float()[None] / 255
    with torch.no_grad():
        restored = tokenizer.decode(tokenizer.encode(image))[0].movedim(0, -1)
    shown = pixels(path)[20::2, 2::2]                               # below the titles, each pixel is 2 x 2
    assert np.array_equal(shown[:32, :32], pixels(photo))
    assert np.abs(shown[:32, 33:65] - 255 * restored.numpy()).max() <= 1
    assert f"wrote {Path('runs/new/photo.reconstruct.png')}: " in printed and " dB" in printed


def test_a_box_that_the_crop_cuts_off(call, tmp_path):
    Image.new("RGB", (96, 32), "red").save(tmp_path / "wide.png")
    flags = ["--box", "0,0,8,8", "--class", 1]
    line = call(*flags, image="wide.png", code=2)
    assert all(word in line for word in ("wide.png", "--fit", "cut off"))
    call(*flags, "--fit", "pad", image="wide.png")


# -------------------------------------------------------------------------------------------------------------- files

@pytest.mark.slow
def test_the_script_itself(untrained, photo):
    """As a user starts it: the names of its files, and a photo that was forgotten."""
    assert "class: fish (as asked)" in run("edit.py", photo, "--run", untrained, "--inpaint", "centre",
                                           "--class", "fish", "--num", 2, "--steps", 2,
                                           "--out", photo.parent / "edited.png")
    written = sorted(path.name for path in photo.parent.iterdir())
    assert written == ["edited.1.png", "edited.2.png", "edited.png", "photo.png"]
    refused("edit.py", "--run", untrained, "--box", "0,0,4,4", says="PHOTO")


@pytest.mark.parametrize("flags, folder", [(["--run", "run"], "run"), ([], ".")])
def test_files_are_named_after_the_photo_and_the_task(untrained, call_main, photo, flags, folder):
    """Without --out they lie in the run's folder; of example/, where nothing is trained, in the working folder."""
    shutil.copytree(untrained, photo.parent / "run")
    before = sorted((ROOT / "example").iterdir())
    call_main(edit, photo.parent, photo, "--outpaint", "left=0.5", "--num", 2, "--steps", 2, *flags)
    written = sorted(path.name for path in (photo.parent / folder).glob("photo.outpaint*"))
    assert written == ["photo.outpaint.1.png", "photo.outpaint.2.png", "photo.outpaint.png"]
    assert sorted((ROOT / "example").iterdir()) == before
