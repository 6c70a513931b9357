"""edit.py: what is kept stays, to the pixel, and what is painted is what was asked for."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, run
from PIL import Image

import edit
from edit import box_region, extrapolate, panorama, repaint
from lib.editing import composite, likeliest_class
from lib.features import Classifier
from lib.files import load_checkpoint, load_weights
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
def call(trained, photo, call_main):
    """Calls edit.py's main beside the photo: -> what it printed."""
    def call(*flags, code=0, image=photo, feather=("--feather", 0)):
        arguments = [image, "--run", trained, "--num", 1, "--steps", 8, *feather, "--out", "out.png", *flags]
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


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


CASES = {   # flags, and which pixels may change: tokens are 4 x 4, and a box takes one token more on either side
    "box": (["--box", "9,10,5,7", "--class", "fish"], (slice(4, 16), slice(4, 20))),
    "corner": (["--box", "0,0,1,1", "--class", 2], (slice(0, 4), slice(0, 4))),
    "inpaint": (["--inpaint", "centre"], (slice(8, 24), slice(8, 24))),
    "outpaint-right": (["--outpaint", "right=0.5"], (slice(0, 32), slice(16, 32))),
    "outpaint-left": (["--outpaint", "left=.25"], (slice(0, 32), slice(0, 8))),
    "outpaint-up": (["--outpaint", "up=0.3"], (slice(0, 12), slice(0, 32))),
    "outpaint-down": (["--outpaint", "down=0.1"], (slice(28, 32), slice(0, 32))),
    "mask": (["--mask", "mask.png", "--class", "moon"], (slice(12, 20), slice(0, 4))),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_outside_are_the_inputs(call, photo, case):
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
    grid = pixels(photo.parent / "out.png")                       # below the titles: input, masked input, variants
    assert (grid[20:84:2, 2:66:2] == pixels(photo)).all()
    masked = grid[20:84:2, 68:132:2]
    assert (masked[may_change] == 128).all() and (masked[~may_change] == pixels(photo)[~may_change]).all()


@pytest.mark.parametrize("width", [33, 45, 64, 101])
def test_a_panorama_keeps_the_photo(call, photo, width):
    call("--extrapolate", width, "--film")
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
    assert len(steps) == 1 + 3 + 2                                # 5 columns to the right, 3 to the left, 2 at a time
    assert (steps[0] != model.mask_id).sum() == 32
    before = 4
    known_columns = [(canvas[0, 0] != model.mask_id).nonzero()[:, 0].tolist() for canvas in steps]
    first_and_last = [(columns[0], columns[-1]) for columns in known_columns]
    assert first_and_last == [(3, 6), (3, 8), (3, 10), (3, 11), (1, 11), (0, 11)]
    for canvas in steps[1:]:
        assert canvas.shape == (2, 4, 12) and torch.equal(canvas[:, :, 3:7], tokens)
        known = (canvas[0, 0] != model.mask_id).sum()
        assert 0 < known - before <= 2
        before = known
    assert before == 12 and steps[-1].max() < 24


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
    assert (image[:, mask] == 1).all() and (0 < image[:, 29, 30:34]).all() and (image[:, ~mask] < 0.5).all()


def test_start_step(trained):
    """Part-way: the first steps' counts are passed over, the rest follow the schedule on the unknown tokens alone."""
    _, _, model, _ = load_run(trained, Machine("cpu"), VQGAN, MaskGIT)
    known = torch.randint(0, 32, (1, 64))
    known[0, 10:50] = model.mask_id
    tokens, history = decode(model, torch.tensor([1]), 12, known=known, start_step=2, return_steps=True)
    counts = [mask.sum().item() for _, mask, _ in history]
    assert counts == mask_counts("cosine", 12, 40, 2) == mask_counts("cosine", 12, 40)[2:]
    assert torch.equal(tokens[0, :10], known[0, :10]) and torch.equal(tokens[0, 50:], known[0, 50:])
    assert mask_counts("cosine", 12, 3, 2)[0] == 2       # released: at least one fewer than at the start, not at step 2


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
    with pytest.raises(ValueError, match="--class"):
        likeliest_class(model, masks[0], 0)


def test_without_a_class(trained, photo, call, asked):
    """Without --class: the likeliest one."""
    printed = call("--inpaint", "centre")
    _, _, transformer, checkpoint = load_run(trained, Machine("cpu"), VQGAN, MaskGIT)
    (labels, known, _), = asked
    likeliest = likeliest_class(transformer, known[0], 0)
    assert f"class: {checkpoint['classes'][likeliest]} (the likeliest" in printed and labels.tolist() == [likeliest]
    assert "class: moon (as asked)" in call("--inpaint", "centre", "--class", "moon")
    assert asked[1][0].tolist() == [7]


def test_what_is_repainted_shows_its_class():
    """On 200 validation images, with the models in example/: a classifier finds the object's class after its centre was
    painted anew, and another class after the object, to the borders of its box, was edited into it; both in at least
    80%."""
    n = 200
    _, tokenizer, transformer, _ = load_run(ROOT / "example", Machine("cpu"), VQGAN, MaskGIT)
    weights = load_checkpoint(ROOT / "example" / "classifier.pt", "classifier")["model"]
    classifier = load_weights(Classifier(10), weights, "classifier.pt").eval()
    images, labels = Shapes("val").batch(np.arange(n))
    images = images.float() / 255
    u = hashed_uniform(1, np.arange(n), 13)                       # as Shapes draws: size and centre of each object
    size = 0.7 + 0.2 * u[:, 0]
    top, left = (1 - (2 * u[:, 4] - 1) * (1 - size) - size) * 16, (1 + (2 * u[:, 3] - 1) * (1 - size) - size) * 16
    boxes = [f"{int(y)},{int(x)},{int(32 * s)},{int(32 * s)}" for y, x, s in zip(top, left, size)]
    args, frame = SimpleNamespace(fit="crop", photo="it"), Image.new("RGB", (32, 32))
    boxes = torch.stack([box_region(SimpleNamespace(box=box, **vars(args)), frame, 32, 8) for box in boxes])
    cases = {"inpainting": (edit.inpaint_region(args, frame, 32, 8).expand(n, 8, 8), labels),
             "editing": (boxes, (labels + 1) % 10)}
    with torch.no_grad():
        tokens, right = tokenizer.encode(images), {}
        for name, (regions, asked) in cases.items():
            known = torch.where(regions, transformer.mask_id, tokens).flatten(1)
            generator = torch.Generator().manual_seed(0)
            painted = torch.cat([decode(transformer, part, known=given, cfg=1.0, generator=generator)
                                 for part, given in zip(asked.split(64), known.split(64))])
            painted = [composite(image, new[None], mask, 3) for image, new, mask
                       in zip(images, tokenizer.decode(as_grid(painted)), to_pixels(regions, 4))]
            right[name] = (classifier(torch.cat(painted)).argmax(1) == asked).float().mean().item()
    assert min(right.values()) >= 0.8, right
    right = {name: round(share, 3) for name, share in right.items()}
    print(right, "tokens in a box:", boxes.sum((1, 2)).float().mean().item())


# --------------------------------------------------------------------------------------------------- what is asked for

def test_what_the_decoder_is_asked_for(trained, call, asked, photo):
    """The class, the seed and the sampler's flags arrive; the photo's tokens are given, but for those in the box."""
    call("--box", "9,10,5,7", "--class", "fish", "--num", 70, "--seed", 5, "--steps", 3, "--start-step", 1,
         "--top-k", 7)
    _, tokenizer, transformer, _ = load_run(trained, Machine("cpu"), VQGAN, MaskGIT)
    tokens = tokenizer.encode(torch.from_numpy(pixels(photo)).movedim(-1, 0)[None].float() / 255)[0]
    tokens[1:4, 1:5] = transformer.mask_id
    assert [labels.tolist() for labels, _, _ in asked] == [[3] * 64, [3] * 6]
    for labels, known, options in asked:
        assert torch.equal(known, tokens.flatten().expand(len(labels), -1))
        assert options["start_step"] == 1 and options["steps"] == 3 and options["top_k"] == 7
        assert options["generator"] is asked[0][2]["generator"] and options["generator"].initial_seed() == 5


def test_a_panorama_is_painted_as_asked(call, asked):
    call("--extrapolate", 40, "--class", "fish", "--num", 2, "--seed", 5, "--steps", 3)
    assert [labels.tolist() for labels, _, _ in asked] == [[3, 3], [3, 3]]
    assert all(options["steps"] == 3 and options["generator"].initial_seed() == 5 for _, _, options in asked)


def test_variants_and_seeds(call, photo):
    """Each variant differs from the others, and a seed gives the same ones again."""
    results = []
    for seed in (0, 0, 1):
        call("--inpaint", "centre", "--num", 2, "--seed", seed)
        results.append([(photo.parent / f"out.{i}.png").read_bytes() for i in (1, 2)])
    assert results[0] == results[1] and len({*results[0], *results[2]}) == 4


def test_the_default_feather(call, photo):
    """Is one pixel less than a token is wide."""
    results = []
    for feather in ([], ["--feather", 3], ["--feather", 0]):
        call("--inpaint", "centre", feather=feather)
        results.append((photo.parent / "out.1.png").read_bytes())
    assert results[0] == results[1] != results[2]


def test_a_box_in_a_photo_of_another_size():
    """96 x 48 pixels on 8 x 8 tokens of 4: cropped, 6 of its pixels are a token; padded, 12 are."""
    photo, args = Image.new("RGB", (96, 48)), SimpleNamespace(box="12,36,12,24", photo="it", fit="crop")
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[1:5, 1:7] = True                                       # touched are rows 2 and 3, columns 2 to 5
    assert torch.equal(box_region(args, photo, 32, 8), region)
    args.fit, region = "pad", torch.zeros(8, 8, dtype=torch.bool)
    region[2:5, 2:6] = True                                       # touched are row 3, columns 3 and 4
    assert torch.equal(box_region(args, photo, 32, 8), region)
    args.box = "40,90,2,6"                                        # at the right border; the photo begins in row 2
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[4:6, 6:8] = True                                       # touched is token 7 in row 5
    assert torch.equal(box_region(args, photo, 32, 8), region)


def test_what_is_padded_is_not_masked(tmp_path):
    """A white mask repaints the whole photo, and nothing of the bars beside it."""
    Image.new("L", (96, 48), 255).save(tmp_path / "white.png")
    args = SimpleNamespace(mask=tmp_path / "white.png", photo="it", fit="pad")
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[2:6] = True
    assert torch.equal(edit.mask_region(args, Image.new("RGB", (96, 48)), 32, 8), region)


def test_outpainting_each_side():
    for side, expected in {"left": (slice(None), slice(0, 2)), "right": (slice(None), slice(6, 8)),
                           "up": (slice(0, 2), slice(None)), "down": (slice(6, 8), slice(None))}.items():
        region = torch.zeros(8, 8, dtype=torch.bool)
        region[expected] = True
        assert torch.equal(edit.outpaint_region(SimpleNamespace(outpaint=f"{side}=0.25"), None, 32, 8), region)


class Tiles:
    """In place of a tokenizer: the image of a token is a square of 4 x 4 pixels, as bright as its number."""
    config = SimpleNamespace(stride=4, codebook_size=24)

    def decode(self, tokens):
        return to_pixels(tokens[:, None].float() / 24, 4).repeat(1, 3, 1, 1)


def test_what_is_painted_is_what_was_decoded():
    """The last step's tokens; with --film also those before it, greyed out where they stay masked."""
    torch.manual_seed(0)
    model = MaskGIT(MaskGITConfig(24, 3, 16, 32, 1, 4, 64)).eval()
    picture, known, labels = torch.rand(3, 16, 16), torch.randint(0, 24, (4, 4)), torch.tensor([0, 1])
    known[1:3, 2:] = model.mask_id
    options = {"steps": 3, "generator": torch.Generator().manual_seed(5)}
    given = known.flatten().expand(2, 16)
    tokens, steps = decode(model, labels, known=given, return_steps=True, **options)
    for film, count in ((False, 1), (True, 3)):
        options["generator"].manual_seed(5)
        args = SimpleNamespace(film=film)
        around, mask, frames = repaint(args, Tiles(), model, picture, known, labels, options)
        assert torch.equal(around, picture) and torch.equal(mask, to_pixels(known == model.mask_id, 4))
        assert len(frames) == count and torch.equal(frames[-1], Tiles().decode(as_grid(tokens)))
        for frame, (predicted, masked, _) in zip(frames, steps[-count:]):
            grey = 0.85 * to_pixels(as_grid(masked), 4)[:, None]
            assert torch.allclose(frame, Tiles().decode(as_grid(predicted)) * (1 - grey) + 0.5 * grey)


@pytest.mark.parametrize("width", [17, 21, 32])
def test_what_is_painted_beside_the_photo_fits_to_it(width):
    """In each step of a panorama the photo's tokens lie at its own place, though whole tokens overhang on the left."""
    torch.manual_seed(0)
    model = MaskGIT(MaskGITConfig(24, 3, 16, 32, 1, 4, 64)).eval()
    picture, tokens = torch.rand(3, 16, 16), torch.randint(0, 24, (4, 4))
    args = SimpleNamespace(extrapolate=width, film=True)
    wide, mask, frames = panorama(args, Tiles(), model, picture, tokens, torch.tensor([0, 1]), {"steps": 2})
    before = (width - 16) // 2
    inside = slice(before, before + 16)
    assert torch.equal(wide[:, :, inside], picture) and wide.shape == (3, 16, width)
    assert not mask[:, inside].any() and mask.sum() == 16 * (width - 16)
    for frame in frames:
        assert frame.shape == (2, 3, 16, width) and torch.equal(frame[0, :, :, inside], Tiles().decode(tokens[None])[0])
    grey = [(frame == 0.5).all(0).all(0).all(0).sum().item() for frame in frames]
    assert grey == sorted(grey, reverse=True) and grey[0] == width - 16 and grey[-1] == 0


def test_the_film_shows_the_steps(call, photo, monkeypatch):
    """Over the photo, what is predicted; greyed out where it stays masked: less and less, and nothing in the end."""
    films = []

    def recording_film(path, frames):
        films.append(frames)
        return path, path
    monkeypatch.setattr(edit, "save_film", recording_film)
    call("--inpaint", "centre", "--film", "--num", 2, "--steps", 4)
    frames, = films
    grey = [((frame - 0.5).abs().amax(1) <= 0.075).sum().item() for frame in frames]
    assert len(frames) == 4 and frames[0].shape == (2, 3, 32, 32)
    assert grey == sorted(grey, reverse=True) and grey[0] > grey[-1]
    assert (np.abs(pixels(photo.parent / "out.2.png") / 255 - frames[-1][1].movedim(0, -1).numpy()) <= 0.51 / 255).all()


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
    (["--outpaint", "right=nan"], ["right=nan", "fraction"]),
    (["--outpaint", "north=0.5"], ["north=0.5", "up"]),
    (["--outpaint", "right"], ["right", "fraction"]),
    (["--extrapolate", 32], ["32", "wider"]),
    (["--inpaint", "centre", "--start-step", 8], ["start step", "8"]),
    (["--inpaint", "centre", "--class", "fish", "moon"], ["moon"]),
    (["--inpaint", "centre", "--class", "zebra"], ["zebra", "ball"]),
    (["--inpaint", "centre", "--num", 0], ["--num"]),
    (["--inpaint", "centre", "--out", "picture.xyz"], ["picture.xyz", ".png"]),
])
def test_bad_edits(call, photo, flags, says):
    Image.new("L", (16, 16), 255).save(photo.parent / "small.png")
    Image.new("L", (32, 32), 0).save(photo.parent / "black.png")
    before = sorted(photo.parent.iterdir())
    line = call(*flags, code=2)
    assert all(word in line for word in says), line
    assert sorted(photo.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["broken.png", "none.png"])
def test_bad_photos(call, photo, name):
    (photo.parent / "broken.png").write_bytes(photo.read_bytes()[:100])
    line = call("--inpaint", "centre", image=name, code=2)
    assert name in line and "not a readable image" in line


def test_the_script_itself(trained, photo):
    """As a user starts it: the names of its files, and a photo that was forgotten."""
    assert "class: fish (as asked)" in run("edit.py", photo, "--run", trained, "--inpaint", "centre", "--class", "fish",
                                           "--num", 2, "--steps", 2, "--out", photo.parent / "edited.png")
    written = sorted(path.name for path in photo.parent.iterdir())
    assert written == ["edited.1.png", "edited.2.png", "edited.png", "photo.png"]
    refused("edit.py", "--run", trained, "--box", "0,0,4,4", says="PHOTO")


def test_files_are_named_after_the_photo_and_the_task(trained, call, photo, monkeypatch):
    """Without --out they lie in the run's folder."""
    written = []
    monkeypatch.setattr(edit, "save_image", lambda path, image, **options: written.append(path))
    monkeypatch.setattr("sys.argv", ["edit.py", str(photo), "--run", str(trained), "--outpaint", "left=0.5",
                                     "--num", "2"])
    edit.main()
    assert written == [trained / f"photo.outpaint{end}" for end in (".png", ".1.png", ".2.png")]


def test_an_autoregressive_transformer_cannot_edit(call, photo):
    flags = ["--run", ROOT / "example", "--decoder", "autoregressive", "--inpaint", "centre"]
    line = call(*flags, code=2)
    assert "autoregressive" in line and "--decoder parallel" in line


def test_a_box_that_the_crop_cuts_off(call, tmp_path):
    Image.new("RGB", (96, 32), "red").save(tmp_path / "wide.png")
    flags = ["--box", "0,0,8,8", "--class", 1]
    line = call(*flags, image="wide.png", code=2)
    assert all(word in line for word in ("wide.png", "--fit", "cut off"))
    call(*flags, "--fit", "pad", image="wide.png")
