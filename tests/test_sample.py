"""sample.py as a user runs it: what is drawn, how, and where it is written."""
import argparse
import os
import re
import runpy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call_script, on_ranks, run
from PIL import Image

import lib.errors
import lib.sampling
import sample
from lib import pictures, runtime
from lib.errors import UserError
from lib.features import Classifier
from lib.files import save_checkpoint
from lib.flags import add_flags
from lib.folders import open_folder
from lib.runtime import Machine
from lib.sample_files import claim_folder, class_folders
from lib.sampling import ACCEPT_FLAG, Sampler, add_sampler_flags
from lib.shapes import Shapes
from maskgit import MaskGIT, MaskGITConfig, decode
from sequential import CausalTransformer, decode_sequential
from vqgan import as_grid, to_pixels


class Tiles:
    """In place of a tokenizer: the image of a token is a square of 2 x 2 pixels, as bright as its number."""
    config = SimpleNamespace(stride=2)

    def decode(self, tokens):
        return to_pixels(tokens[:, None].float() / 24, 2).repeat(1, 3, 1, 1)


@pytest.fixture(scope="module", params=[MaskGIT, CausalTransformer])
def model(request):
    """An untrained transformer of 4 x 4 tokens, whose logits are far from equal."""
    torch.manual_seed(0)
    config = MaskGITConfig(codebook_size=24, num_classes=3, num_tokens=16, dim=32, depth=2, heads=4, mlp_dim=64)
    model = request.param(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture
def call(call_main, tmp_path):
    """Calls sample.py's main in tmp_path -> what it printed."""
    def call(*flags, code=0):
        return call_main(sample, tmp_path, *flags, code=code)
    return call


def change_classes(run_folder, names):
    """Gives the transformer of a run other class names."""
    for stage in ("transformer", "autoregressive"):
        checkpoint = torch.load(run_folder / f"{stage}.pt", weights_only=True)
        checkpoint["classes"] = names
        torch.save(checkpoint, run_folder / f"{stage}.pt")


# ------------------------------------------------------------------------------------------------ as a user runs it

def test_newest_run_grid_and_film(untrained, call, tmp_path):
    for name in ("older", "newer"):
        shutil.copytree(untrained, tmp_path / "runs" / name)
    for path in (tmp_path / "runs" / "older").iterdir():
        os.utime(path, (1, 1))
    (tmp_path / "runs" / "unfinished").mkdir()
    newer = tmp_path / "runs" / "newer"
    assert "runs/newer: samples, 4 steps, cosine schedule" in call("--steps", 4, "--num", 3, "--film")
    with Image.open(newer / "samples.png") as grid, Image.open(newer / "samples.film.gif") as gif:
        assert grid.height > 10 * 64 and grid.width > 3 * 64
        assert gif.n_frames >= 4
    assert (newer / "samples.film.png").exists()


def test_the_newest_run_that_has_the_decoder(untrained, call, tmp_path):
    for name, other in (("older", "autoregressive"), ("newer", "transformer")):
        shutil.copytree(untrained, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / f"{other}.pt").unlink()
        if name == "older":
            os.utime(tmp_path / "runs" / name / "transformer.pt", (1, 1))
    assert "runs/older: samples" in call("--decoder", "parallel", "--num", 1)
    assert "runs/newer: samples" in call("--num", 1)


def test_a_film_of_few_tokens():
    """Of four tokens there are four pictures."""
    transformer = CausalTransformer(MaskGITConfig(8, 2, num_tokens=4, dim=8, depth=1, heads=1, mlp_dim=8)).eval()

    def decode(labels, numbers, on_step):
        return decode_sequential(transformer, labels, on_step=on_step)
    tokenizer = SimpleNamespace(decode=lambda codes: torch.zeros(len(codes), 3, 8, 8))
    sampler = SimpleNamespace(transformer=transformer, decode=decode, tokenizer=tokenizer, machine=Machine("cpu"))
    frames, titles = sample.draw_film(sampler, torch.tensor([0, 1]))
    assert titles == ["1 tokens", "2 tokens", "3 tokens", "4 tokens"] and {len(frame) for frame in frames} == {2}


def test_classes_and_seeds(untrained, call, tmp_path):
    """A name in any case, a part of it, or a number; a seed gives the same images again."""
    call("--run", untrained, "--num", 2, "--out", "a.png", "--class", "heart", 3)
    call("--run", untrained, "--num", 2, "--out", "b.png", "--class", "HEART", "fish")
    call("--run", untrained, "--num", 2, "--out", "c.png", "--class", "hea", "3", "--seed", 1)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_class_names_that_are_numbers(untrained, call, monkeypatch, tmp_path):
    """--class 10 is the class of that name, not the eleventh."""
    shutil.copytree(untrained, tmp_path / "run")
    change_classes(tmp_path / "run", [str(number) for number in range(1, 11)])
    captions = []

    def recording_grid(rows, names):
        captions.extend(names)
        return Image.new("RGB", (8, 8))
    monkeypatch.setattr(pictures, "grid", recording_grid)
    call("--run", "run", "--num", 1, "--class", 10, 2)
    assert captions == ["10", "2"]
    assert "'12'" in call("--run", "run", "--class", 12, code=2)


@pytest.mark.parametrize("flags", [["--order", "halton"], ["--order", "random"], ["--top-k", 3, "--temperature", 0.5],
                                   ["--temperature", 0]])
def test_options(untrained, call, tmp_path, flags):
    """Each changes what is drawn."""
    call("--run", untrained, "--num", 1, "--out", "a.png", *flags)
    call("--run", untrained, "--num", 1, "--out", "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_guidance(untrained, call, tmp_path):
    """A run with a null class can be guided, and is by default; another cannot."""
    for name, flags in {"a": [], "b": ["--cfg", 1], "c": ["--cfg", 0]}.items():
        call("--run", ROOT / "example", "--class", "heart", "--num", 2, "--out", f"{name}.png", *flags)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    assert "--class-dropout" in call("--run", untrained, "--cfg", 2, "--out", "d.png", code=2)


def test_the_choice_temperature_of_the_run(call, tmp_path):
    """It is the default of sampling; models without one, as the released, have the released one."""
    shutil.copytree(ROOT / "example", tmp_path / "without")
    checkpoint = torch.load(tmp_path / "without" / "transformer.pt")
    del checkpoint["config"]["choice_temperature"]
    torch.save(checkpoint, tmp_path / "without" / "transformer.pt")
    for name, flags in {
        "default": ["--run", ROOT / "example"],
        "1": ["--run", ROOT / "example", "--choice-temperature", 1],
        "without": ["--run", "without"],
        "4.5": ["--run", ROOT / "example", "--choice-temperature", 4.5],
    }.items():
        call("--class", "heart", "--num", 1, "--out", f"{name}.png", *flags)
    default, one, without, released = (
        (tmp_path / f"{name}.png").read_bytes() for name in ("default", "1", "without", "4.5"))
    assert default == one != released == without


def test_nothing_trained_yet(call, tmp_path):
    """The models in example/ draw, into the working folder; example/ stays as it is."""
    before = sorted((ROOT / "example").iterdir())
    printed = call("--steps", 2, "--num", 1, "--class", "heart")
    assert f"{ROOT}/example: samples" in printed and "wrote samples.png" in printed
    assert (tmp_path / "samples.png").exists() and sorted((ROOT / "example").iterdir()) == before


@pytest.mark.slow
def test_the_script_itself(untrained, tmp_path):
    printed = run("sample.py", "--run", untrained, "--num", 1, "--class", "moon", "--out", "a.png", cwd=tmp_path)
    assert "wrote a.png: 1 image in" in printed


def test_a_run_with_both_decoders(untrained, call, tmp_path):
    """A run that holds only the sequential one draws with it."""
    shutil.copytree(untrained, tmp_path / "both")
    assert "8 steps" in call("--run", "both", "--num", 1)
    assert "token by token" in call("--run", "both", "--decoder", "autoregressive", "--num", 1, "--film", "--top-k", 3)
    assert (tmp_path / "both" / "samples.film.gif").exists()
    (tmp_path / "both" / "transformer.pt").unlink()
    assert "token by token" in call("--run", "both", "--num", 1)


@pytest.mark.parametrize("script", ["sample", "edit", "pretrained"])
def test_ctrl_c_says_what_became_of_the_work(script, monkeypatch, capsys):
    if script == "pretrained":
        pytest.importorskip("msgpack")

    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(runtime, "launch", interrupt)
    monkeypatch.setattr("lib.files.download", interrupt)
    arguments = {"sample": [], "edit": ["photo.png", "--inpaint", "centre"], "pretrained": ["imagenet256"]}
    monkeypatch.setattr("sys.argv", [f"{script}.py", *arguments[script]])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert end.value.code == 130
    expected = {"pretrained": "files that were fetched whole are kept", "edit": "every picture is whole"}
    expected = expected.get(script, "with --files, the same command goes on")
    assert expected in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- a file an image

def files_in(folder):
    """{path below the folder: its bytes}, of the images alone."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_single_files(untrained, call, tmp_path):
    """Image k of a class is the same file whatever else is asked for, and what the grid shows."""
    call("--run", untrained, "--files", "all", "--num", 2)
    call("--run", untrained, "--files", "some", "--num", 3, "--class", "fish", "heart", "ball", "heart", "--out", "a.png")
    everything, some = files_in(tmp_path / "all"), files_in(tmp_path / "some")
    assert len(everything) == 20 and list(some) == [
        f"{name}/{k:05}.png" for name in ("0 ball", "3 fish", "6 heart") for k in range(3)]
    assert len(everything.items() & some.items()) == 6 and len(set(some.values())) == 9
    call("--run", untrained, "--num", 3, "--class", "fish", "heart", "ball", "--out", "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_files_that_are_there_are_kept(untrained, call, tmp_path):
    """A file that was being written is not there."""
    command = ["--run", untrained, "--files", "out", "--class", "heart", "--out", "a.png"]
    call(*command, "--num", 4)
    folder = tmp_path / "out" / "6 heart"
    before = files_in(folder)
    (folder / "00002.png").rename(folder / ".00002.png.host.1.tmp")
    (folder / "00001.png").write_bytes((folder / "00003.png").read_bytes())
    assert "drawing: 2 of 2 images" in call(*command, "--num", 5)
    after = files_in(folder)
    assert after["00001.png"] == before["00003.png"] and after["00002.png"] == before["00002.png"] and len(after) == 5
    assert "drawing" not in call(*command, "--num", 5)


@pytest.mark.parametrize("flags", [["--seed", 1], ["--steps", 3], ["--decoder", "autoregressive"]])
def test_files_of_another_sampler_are_not_mixed(untrained, call, tmp_path, flags):
    command = ["--run", untrained, "--files", "out", "--class", "heart", "--num", 1, "--out", "a.png"]
    call(*command)
    assert "--files" in call(*command, *flags, code=2)
    (tmp_path / "photos" / "heart").mkdir(parents=True)
    assert "photos is not empty" in call(*command, "--files", "photos", code=2)


def test_files_of_another_device_or_classifier_are_not_mixed(untrained, call, tmp_path):
    shutil.copytree(untrained, tmp_path / "run")

    def save_classifier():
        save_checkpoint(tmp_path / "run" / "classifier.pt", {
            "kind": "classifier", "classes": Shapes.classes, "image_size": 32, "model": Classifier(10).state_dict()})
    save_classifier()
    command = ["--run", "run", "--class", "heart", "--num", 1, "--out", "a.png"]
    call(*command, "--files", "chosen", "--accept", 0.5)
    call(*command, "--files", "all")
    save_classifier()
    assert "chosen is not empty" in call(*command, "--files", "chosen", "--accept", 0.5, code=2)
    call(*command, "--files", "all")                                # these were not chosen by a classifier
    note = tmp_path / "all" / ".drawn-with"
    note.write_text(note.read_text().replace('"cpu"', '"cuda"'))
    assert "all is not empty" in call(*command, "--files", "all", code=2)
    note.write_bytes(b"\xff")                                        # not text
    assert "all is not empty" in call(*command, "--files", "all", code=2)


def test_a_folder_of_hidden_files_is_empty(tmp_path):
    (tmp_path / ".DS_Store").touch()
    claim_folder(tmp_path, Machine("cpu"), {"seed": 0})
    assert (tmp_path / ".drawn-with").exists()


def test_a_grid_that_is_too_large_is_left_out_beside_files(untrained, call, tmp_path, monkeypatch):
    command = ["--run", untrained, "--num", 2, "--class", "heart", "--out", "a.png"]
    monkeypatch.setattr(sample, "GRID_PIXELS", 1000)
    printed = call(*command, "--files", "out")
    assert "a.png: left out" in printed and not (tmp_path / "a.png").exists() and len(files_in(tmp_path / "out")) == 2
    assert "wrote a.png" in call(*command)


def test_ranks_share_the_files(untrained, call, tmp_path):
    command = ["--run", untrained, "--num", 3, "--class", "heart", "fish", "--out", tmp_path / "a.png", "--bf16", "no"]
    call(*command, "--files", "one")
    assert on_ranks(call_script, "sample", *command, "--files", tmp_path / "two") == [0, 0]
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")


@pytest.mark.parametrize("classes, folders", [
    (["ant", "bee 2", "bee 10"], ["ant", "bee 2", "bee 10"]),
    (["bee", "ant"], ["0 bee", "1 ant"]),
    (["ant", "ant"], ["0 ant", "1 ant"]),
    (["n/a", "why?", "x:y"], ["0 n_a", "1 why_", "2 x_y"]),
    (["test", "train"], ["0 test", "1 train"]),
    ([".ant", "bee"], ["0 .ant", "1 bee"]),
    (["", "bee"], ["0", "1 bee"]),
    (["Cat", "cat"], ["0 Cat", "1 cat"]),
    (["Test", "bee"], ["0 Test", "1 bee"]),
    (["bee", "x."], ["0 bee", "1 x."]),
    ([f"c{i}" for i in range(11)][::-1], [f"{i:02} c{10 - i}" for i in range(11)]),
])
def test_class_folders_are_read_back_in_the_same_order(tmp_path, classes, folders):
    assert [path.name for path in class_folders(tmp_path, classes)] == folders
    for number, path in enumerate(class_folders(tmp_path, classes)):
        for k in range(2):
            pictures.save_image(path / f"{k:05}.png", Image.new("RGB", (8, 8), (number, 0, 0)))
    train, _ = open_folder(str(tmp_path), 8)
    images, labels = train.batch(np.arange(len(train)))
    assert train.classes == folders and torch.equal(images[:, 0, 0, 0].long(), labels)


# ---------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, says", [
    (["--schedule", "nonsense"], ["nonsense", "cosine", "logarithmic"]),
    (["--order", "spiral"], ["spiral", "halton"]),
    (["--class", "zebra"], ["zebra", "ball"]),
    (["--class", "10"], ["10", "0 to 9"]),
    (["--class", "r"], ["several"]),
    (["--steps", 0], ["steps", "1"]),
    (["--steps", 65], ["steps", "64"]),
    (["--num", 0], ["--num"]),
    (["--num", 100_000_000], ["--num 100000000", "GB"]),
    (["--top-k", 33], ["codebook", "32", "33"]),
    (["--run", "nowhere"], ["nowhere", "does not exist"]),
    (["--out", "picture.xyz"], ["picture.xyz", ".png"]),
    (["--num", 1000, "--out", "wide.jpg"], ["wide.jpg", "65,500", ".png", "--num"]),
    (["--accept", 0], ["--accept", "0.001"]),
    (["--accept", 0.5], ["--accept", "classifier.pt", "evaluate.py --run"]),
    (["--accept", 0.5, "--film"], ["--accept", "--film"]),
    (["--decoder", "autoregressive", "--steps", 8], ["--steps changes nothing", "autoregressive"]),
    (["--num", 300, "--out", "wide.webp"], ["wide.webp", "16,383", ".png", "--num"]),
])
def test_bad_flags(untrained, call, tmp_path, monkeypatch, flags, says):
    """They are refused before anything is drawn."""
    monkeypatch.setattr(sample, "draw", None)
    line = call("--run", untrained, "--out", "a.png", *flags, code=2)
    assert all(word in line for word in says), line
    assert not list(tmp_path.iterdir())


def test_a_film_that_would_fill_the_memory(untrained, call, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.errors, "memory", lambda: 1e6)
    flags = ["--run", untrained, "--out", "a.png", "--num", 1, "--film"]
    line = call(*flags, code=2)
    assert "--film would take 0.001966 GB" in line and "name fewer classes with --class" in line
    assert not list(tmp_path.iterdir())
    call(*flags, "--class", "heart")


@pytest.mark.parametrize("ending, longest", [(".jpg", 65_500), (".JPG", 65_500), (".webp", 16_383), (".gif", 65_535)])
def test_the_longest_side_of_a_format_is_what_pillow_can_write(tmp_path, ending, longest):
    pictures.save_image(tmp_path / f"a{ending}", Image.new("RGB", (longest, 1)))
    with pytest.raises((OSError, ValueError, OverflowError)):
        Image.new("RGB", (longest + 1, 1)).save(tmp_path / f"b{ending}")
    if ending != ".gif":
        pictures.check_picture(tmp_path / f"a{ending}", (1, longest), "fewer")
        with pytest.raises(UserError, match="use .png, or fewer"):
            pictures.check_picture(tmp_path / f"a{ending}", (1, longest + 1), "fewer")


def test_pictures_of_every_kind(tmp_path):
    for ending in (".png", ".jpg", ".jpeg", ".webp", ".JPG"):
        path = tmp_path / f"a{ending}"
        pictures.check_picture(path, (8, 8), "fewer")
        pictures.save_image(path, Image.new("RGB", (8, 8), "red"))
        with Image.open(path) as image:
            assert image.size == (8, 8)


def test_an_unwritable_output(untrained, call, tmp_path):
    (tmp_path / "file").write_text("")
    line = call("--run", untrained, "--num", 1, "--out", "file/a.png", code=2)
    assert "file/a.png" in line and "another folder" in line


@pytest.mark.parametrize("content, says", [
    (b"", "not a checkpoint"), (b"these are no weights\n" * 50, "not a checkpoint"), (b"PK\3\4 cut", "not a checkpoint"),
    ("half", "not a checkpoint"), ("vqgan.pt", "holds a vqgan")], ids=["empty", "text", "start", "half", "other stage"])
def test_broken_checkpoints(untrained, call, tmp_path, content, says):
    shutil.copytree(untrained, tmp_path / "run")
    path = tmp_path / "run" / "transformer.pt"
    if content == "half":
        content = path.read_bytes()[:path.stat().st_size // 2]
    elif content == "vqgan.pt":
        content = (untrained / "vqgan.pt").read_bytes()
    path.write_bytes(content)
    line = call("--run", "run", code=2)
    assert "transformer.pt" in line and says in line


def test_checkpoints_that_lack_something(untrained, call, tmp_path):
    shutil.copytree(untrained, tmp_path / "run")
    torch.save([1, 2], tmp_path / "run" / "transformer.pt")
    assert "not a checkpoint" in call("--run", "run", code=2)
    checkpoint = torch.load(untrained / "transformer.pt", weights_only=True)
    del checkpoint["model"]["head_bias"]
    torch.save(checkpoint, tmp_path / "run" / "transformer.pt")
    line = call("--run", "run", code=2)
    assert "head_bias" in line and "not there" in line


def test_a_checkpoint_cannot_run_code(untrained, call, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was-here",)
    shutil.copytree(untrained, tmp_path / "run")
    torch.save({"kind": "transformer", "x": Evil()}, tmp_path / "run" / "transformer.pt")
    assert "not a checkpoint" in call("--run", "run", code=2)
    assert not (tmp_path / "was-here").exists()


def test_another_codebook(untrained, call, tmp_path):
    checkpoint = torch.load(untrained / "vqgan.pt", weights_only=True)
    checkpoint["config"]["codebook_size"] = 16
    checkpoint["model"]["quantizer.codebook"] = checkpoint["model"]["quantizer.codebook"][:16]
    torch.save(checkpoint, tmp_path / "vqgan.pt")
    line = call("--run", untrained, "--vqgan", "vqgan.pt", code=2)
    assert "codebook of 32" in line and "16" in line


# ------------------------------------------------------------------------------------------- what is drawn, and how

def sampler_for(model, *flags):
    """Returns a Sampler as sample.py makes it, whose classifier is surest of class c if the image is brightest there."""
    parser = argparse.ArgumentParser()
    add_sampler_flags(parser)
    add_flags(parser, ACCEPT_FLAG)
    args = parser.parse_args(["--steps", "3", *map(str, flags)])
    return Sampler(args, Tiles(), model, Machine("cpu", bf16=False), lambda images: images[:, 0, 0, :6:2])


def asked_for(model, images, *flags):
    """Draws images [(class, k), ...] in one batch -> their tokens, a list for each."""
    labels, numbers = torch.tensor(images).T
    return dict(zip(images, sampler_for(model, *flags).draw(labels, numbers).tolist(), strict=True))


@pytest.mark.parametrize("images", [
    [(0, 0)], [(1, 7)], [(0, k) for k in range(8)], [(0, k) for k in reversed(range(8))], [(1, 7), (0, 0)],
    [(c, k) for c in range(3) for k in range(3)], [(c, k) for k in range(8) for c in (2, 0, 1)], [(2, 2), (0, 5)] * 35])
@pytest.mark.parametrize("flags", [[], ["--accept", 0.5], ["--order", "random", "--top-k", 5, "--seed", 9]])
def test_an_image_is_the_same_whatever_is_drawn_beside_it(model, images, flags):
    """Its tokens are a function of the seed, its class and its number k alone."""
    all_images = asked_for(model, [(c, k) for c in range(3) for k in range(8)], *flags)
    for image, tokens in asked_for(model, images, *flags).items():
        assert tokens == all_images[image]


def test_images_of_another_number_class_or_seed_are_others(model):
    tokens = asked_for(model, [(c, k) for c in range(3) for k in range(4)])
    tokens |= {"another seed": asked_for(model, [(0, 0)], "--seed", 1)[0, 0]}
    assert len(set(map(tuple, tokens.values()))) == 13


def test_of_several_candidates_the_one_stays_that_the_classifier_is_surest_of(model):
    """Image k is one of 4 k to 4 k + 3."""
    tokens = asked_for(model, [(1, k) for k in range(12)])
    chosen = asked_for(model, [(1, k) for k in range(3)], "--accept", 0.25)
    classifier = sampler_for(model).classifier
    for k in range(3):
        candidates = torch.tensor([tokens[1, i] for i in range(4 * k, 4 * k + 4)])
        log_p = classifier(Tiles().decode(as_grid(candidates))).log_softmax(-1)[:, 1]
        assert chosen[1, k] == candidates[log_p.argmax()].tolist()


def test_images_beyond_the_first_batch(model, monkeypatch):
    """They are in the order of their labels."""
    monkeypatch.setattr(sample, "BATCH", 2)
    labels, numbers = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 0, 1, 3, 0])
    sampler = sampler_for(model)
    images = sample.draw(sampler, labels, numbers)
    assert torch.equal(images, Tiles().decode(as_grid(sampler.draw(labels, numbers))))


def test_the_steps_of_a_film_are_what_the_decoder_tells(model, monkeypatch):
    """Of image 0 of each class, those at the moments that are shown; what is masked is grey."""
    monkeypatch.setattr(sample, "BATCH", 2)
    told, labels, sampler = {}, torch.tensor([0, 1, 2]), sampler_for(model)
    sampler.decode(labels, torch.zeros(3).long(), lambda t, *step: told.update({t: step}))
    frames, titles = sample.draw_film(sampler, labels)
    moments = [2 * i for i in range(1, 9)] if isinstance(model, CausalTransformer) else [1, 2, 3]
    assert [int(re.search(r"\d+", title)[0]) for title in titles] == moments
    for t, frame in zip(moments, frames, strict=True):
        sampled, masked, _ = told[t]
        shown = to_pixels(~as_grid(masked), 2)[:, None].expand(3, 3, 8, 8)
        assert torch.equal(frame[shown], Tiles().decode(as_grid(sampled))[shown])
        assert not torch.equal(frame, Tiles().decode(as_grid(sampled))) or t == moments[-1]


def test_a_step_is_shown_with_grey_over_what_is_masked():
    sampled, masked = torch.arange(32).view(2, 16) % 24, torch.zeros(2, 16, dtype=torch.bool)
    masked[0, 5] = masked[1, 15] = True
    image = sample.draw_step(Tiles(), as_grid(sampled), as_grid(masked), opacity=0.75, batch=1)
    plain = Tiles().decode(as_grid(sampled))
    grey = to_pixels(as_grid(masked), 2)[:, None].expand(2, 3, 8, 8)
    assert grey.sum() == 2 * 3 * 4
    assert torch.equal(image[~grey], plain[~grey])
    torch.testing.assert_close(image[grey], 0.25 * plain[grey] + 0.75 * 0.5)


@pytest.mark.parametrize("decoder, titles", [
    ("parallel", ["step 1", "step 2", "step 3", "step 4"]),
    ("autoregressive", [f"{8 * i} tokens" for i in range(1, 9)])])
def test_the_film_of_a_run(untrained, call, monkeypatch, decoder, titles):
    """It shows the first image of each class; less and less of it is grey, and at last nothing."""
    drawn = {}

    def recording_grid(rows, captions):
        drawn["rows"] = rows
        return Image.new("RGB", (8, 8))

    def recording_film(path, frames, titles):
        drawn["frames"], drawn["titles"] = frames, titles
    monkeypatch.setattr(pictures, "grid", recording_grid)
    monkeypatch.setattr(pictures, "save_film", recording_film)
    steps = ["--steps", 4] if decoder == "parallel" else []
    call("--run", untrained, "--decoder", decoder, "--num", 3, *steps, "--film", "--out", "a.png")
    assert drawn["titles"] == titles and len(drawn["frames"]) == len(titles) and len(drawn["rows"]) == 10
    result = torch.stack([row[0] for row in drawn["rows"]])
    differs = [(frame != result).any(1).sum().item() for frame in drawn["frames"]]
    assert differs == sorted(differs, reverse=True) and differs[0] > 0 and differs[-1] == 0


def test_what_the_decoder_is_asked_for(untrained, call, monkeypatch):
    """A row for each class, 64 images at a time; the flags of the sampler arrive."""
    asked, rows = [], []

    def recording_decode(model, labels, **options):
        asked.append((labels.tolist(), options))
        return decode(model, labels, **options)

    def recording_grid(images, captions):
        rows.append((len(images), {len(row) for row in images}, captions))
        return Image.new("RGB", (8, 8))
    monkeypatch.setattr(lib.sampling, "sampler_of", lambda model: recording_decode)
    monkeypatch.setattr(pictures, "grid", recording_grid)
    flags = {"--steps": 2, "--schedule": "square", "--temperature": 0.9, "--top-k": 7, "--num": 40,
             "--out": "a.png"}
    call("--run", untrained, "--class", "heart", 3, *[word for flag in flags.items() for word in flag])
    assert [labels for labels, _ in asked] == [[6] * 40 + [3] * 24, [3] * 16]
    assert rows == [(2, {40}, ["heart", "fish"])]
    for _, options in asked:
        assert options["steps"] == 2 and options["schedule"] == "square" and options["top_k"] == 7
        assert options["temperature"] == 0.9 and options["cfg"] == 0


# ------------------------------------------------------------------------------------------------------- the pictures

def test_a_grid_has_each_image_at_its_place():
    """Each pixel becomes 8 x 8; two pixels of white lie between the images."""
    rows = torch.rand(2, 3, 3, 8, 8)
    picture = np.asarray(pictures.grid(list(rows)))
    assert picture.shape == (2 + 2 * 66, 2 + 3 * 66, 3)
    for row in range(2):
        for column in range(3):
            top, left = 2 + row * 66, 2 + column * 66
            cell = picture[top:top + 64:8, left:left + 64:8]
            assert (cell == pictures.to_uint8(rows[row, column]).movedim(0, -1).numpy()).all()


def test_a_grid_is_as_large_as_its_layout_says():
    for captions, titles in (((), ()), (["a", "longer"], ()), (["Größe", "b"], ["x", "y", "z"])):
        layout = pictures.GridLayout(3, 2, (8, 12), captions, titles)
        assert pictures.grid(list(torch.rand(2, 3, 3, 8, 12)), captions, titles).size == layout.size


@pytest.mark.parametrize("letter", "éßжλ")
def test_captions_have_letters_beyond_ascii(letter):
    """They are not the box that stands for a letter that a font lacks."""
    images = [torch.zeros(1, 3, 64, 64)]
    assert pictures.grid(images, [letter]).tobytes() != pictures.grid(images, ["\uffff"]).tobytes()


def test_a_film_too_wide_for_a_gif_still_has_its_strip(tmp_path):
    frames = [torch.zeros(1, 3, 1, 1100)]                           # each pixel becomes 64 x 64
    with pytest.raises(UserError, match=r"a.film.gif would be too large.*a.film.png"):
        pictures.save_film(tmp_path / "a.png", frames, ["step 1"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.film.png"]
