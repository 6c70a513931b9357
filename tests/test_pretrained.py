"""What others trained: the released format both ways, the tokenizer's PyTorch port, LPIPS; bad networks."""
import csv
import hashlib
import os
import shutil
import sys
import threading
from argparse import Namespace
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_TRANSFORMER, TINY_VQ, refused, run

import pretrained
import sample
import train_transformer
from lib import lpips
from lib.data import IMAGENET_CLASSES
from lib.errors import UserError
from lib.files import cache_folder, download, fingerprint, load_checkpoint, save_checkpoint
from lib.flax import read_arrays, write_arrays
from lib.layouts import port_arrays
from lib.lpips import LPIPS, load_lpips
from lib.runtime import Machine
from lib.sampling import load_run
from maskgit import MaskGIT, MaskGITConfig
from pretrained import maskgit_from_jax, vqgan_from_jax, write_released
from vqgan import VQGAN, VQGANConfig

DATA = Path(__file__).parent / "data"
TOKENIZER, TRANSFORMER = DATA / "tokenizer_tiny.msgpack", DATA / "transformer_tiny.msgpack"


@pytest.fixture
def msgpack():
    return pytest.importorskip("msgpack")


def reference(name):
    """What the authors' code computed with these weights: arrays by name, as tensors."""
    return {key: torch.from_numpy(value) for key, value in np.load(DATA / f"{name}.npz").items()}


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), atol=atol, rtol=0)


def says(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, f"'{word}' is not in: {message}"


def refuses(read, path, *words):
    """The file is refused with one line that names it and holds these words."""
    with pytest.raises(UserError) as error:
        read(path)
    says(error, path, *words)


def maskgit_of_64(path):
    return maskgit_from_jax(path, 64)


# ---- the released files

@torch.no_grad()
def test_released_tokenizer(msgpack):
    ref = reference("tokenizer_tiny")
    model = vqgan_from_jax(TOKENIZER)
    assert not model.training
    assert model.config == VQGANConfig(codebook_size=64, codebook_dim=16, filters=32, multipliers=(1, 1, 2),
                                       res_blocks=1)
    images = ref["image"].permute(0, 3, 1, 2)
    close(model.encoder(images), ref["encoded"].permute(0, 3, 1, 2))
    assert torch.equal(model.encode(images), ref["indices"].long())
    close(model(images)[0], ref["reconstruction"].permute(0, 3, 1, 2))


@torch.no_grad()
def test_released_transformer(msgpack):
    ref = reference("transformer_tiny")
    model = maskgit_of_64(TRANSFORMER)
    assert not model.training
    assert model.config == MaskGITConfig(64, num_classes=10, num_tokens=16, dim=32, depth=2, heads=4, mlp_dim=64)
    ids = ref["input_ids"].long()
    close(model(torch.where(ids[:, 1:] < 0, model.mask_id, ids[:, 1:]), ids[:, 0] - 64), ref["logits"][:, 1:, :64])


@pytest.mark.parametrize("path, read", [(TOKENIZER, vqgan_from_jax), (TRANSFORMER, maskgit_of_64)])
def test_export_gives_the_released_file_again(msgpack, path, read, tmp_path):
    write_released(read(path), tmp_path / "file")
    assert msgpack.unpackb((tmp_path / "file").read_bytes()) == msgpack.unpackb(path.read_bytes())


@pytest.mark.parametrize("config", [
    VQGANConfig(codebook_size=20, codebook_dim=6, filters=32, multipliers=(1, 2, 3), res_blocks=2),
    VQGANConfig(codebook_size=20, codebook_dim=6, filters=32, multipliers=(2,), res_blocks=3),
    MaskGITConfig(codebook_size=64, num_classes=5, num_tokens=9, dim=24, depth=3, heads=2, mlp_dim=40),
])
def test_export_and_import_change_no_bit(msgpack, config, tmp_path):
    model, read = (VQGAN(config), vqgan_from_jax) if isinstance(config, VQGANConfig) else (MaskGIT(config), maskgit_of_64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    write_released(model, tmp_path / "file")
    again = read(tmp_path / "file")
    assert again.config == config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value) and again.state_dict()[name].is_contiguous(), name


def test_parameters_are_read_bare_or_wrapped(msgpack, tmp_path):
    tree = msgpack.unpackb(TRANSFORMER.read_bytes())
    expected = maskgit_of_64(TRANSFORMER).state_dict()
    step = msgpack.ExtType(3, msgpack.packb(((), "int32", b"\0\0\0\1")))
    for wrapped in (tree["params"], {"step": step, "params": tree}, {"target": tree, "step": 7}):
        (tmp_path / "file").write_bytes(msgpack.packb(wrapped))
        for name, value in maskgit_of_64(tmp_path / "file").state_dict().items():
            assert torch.equal(value, expected[name]), name
    (tmp_path / "file").write_bytes(msgpack.packb({"a": tree, "b": tree}))
    refuses(maskgit_of_64, tmp_path / "file", "twice")


def test_bfloat16_is_read(msgpack, tmp_path):
    numbers = torch.randn(3, 2).bfloat16()
    packed = msgpack.packb(((3, 2), "bfloat16", numbers.view(torch.int16).numpy().tobytes()))
    (tmp_path / "file").write_bytes(msgpack.packb({"params": {"a": {"b": msgpack.ExtType(1, packed)}}}))
    arrays = read_arrays(tmp_path / "file")
    assert list(arrays) == ["a/b"] and torch.equal(arrays["a/b"], numbers)


# ---- damaged files

@pytest.mark.parametrize("path, read", [(TOKENIZER, vqgan_from_jax), (TRANSFORMER, maskgit_of_64)])
def test_a_missing_parameter_is_named(msgpack, path, read, monkeypatch):
    arrays = read_arrays(path)
    for name in arrays:
        others = {other: array for other, array in arrays.items() if other != name}
        monkeypatch.setattr(pretrained, "read_arrays", lambda path, others=others: others)
        refuses(read, path, name, "missing")


@pytest.mark.parametrize("path, read, name", [
    (TOKENIZER, vqgan_from_jax, "decoder/Conv_1/bias"),
    (TRANSFORMER, maskgit_of_64, "TransformerLayer_0/Mlp_0/layer_output/bias")])
def test_a_parameter_too_many_or_misshapen_is_named(msgpack, path, read, name, monkeypatch, tmp_path):
    arrays = read_arrays(path)
    write_arrays(arrays | {"decoder/more": torch.zeros(2)}, tmp_path / "file")
    refuses(read, tmp_path / "file", "decoder/more", "unexpected")
    write_arrays(arrays | {name: torch.zeros(5)}, tmp_path / "file")
    refuses(read, tmp_path / "file", name, "(5,)")
    for name in arrays:
        monkeypatch.setattr(pretrained, "read_arrays", lambda path, name=name: arrays | {name: torch.tensor(0.)})
        refuses(read, path, name, "()")


WHOLE = TRANSFORMER.read_bytes()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", WHOLE[:20], WHOLE[:50_000], WHOLE + b"x"],
                         ids=["empty", "text", "start", "half", "longer"])
def test_a_truncated_file_says_what_to_do(msgpack, content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    for read in (vqgan_from_jax, maskgit_from_jax):
        refuses(read, tmp_path / "file", "delete it and run again")


def test_an_array_that_does_not_fill_its_shape(msgpack, tmp_path):
    packed = msgpack.packb(((3,), "float32", bytes(8)))
    (tmp_path / "file").write_bytes(msgpack.packb({"params": {"a": msgpack.ExtType(1, packed)}}))
    refuses(maskgit_from_jax, tmp_path / "file", "not a whole")


def test_a_file_that_is_not_there(msgpack, tmp_path):
    for read in (vqgan_from_jax, maskgit_from_jax):
        refuses(read, tmp_path / "none", "No such file")


def test_other_formats_are_told_from_what_is_read(tmp_path):
    """A safetensors file, a Lightning checkpoint, the weights of another model."""
    header = b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refuses(vqgan_from_jax, tmp_path / "model.safetensors", "safetensors", "Flax msgpack", "maskgit-vqgan-imagenet-f16-256")
    lightning = {"pytorch-lightning_version": "2.0", "state_dict": {"encoder.conv_in.weight": torch.zeros(2)}}
    torch.save(lightning, tmp_path / "last.ckpt")
    refuses(vqgan_from_jax, tmp_path / "last.ckpt", "Lightning", "Flax msgpack")
    torch.save(lightning | {"callbacks": Path()}, tmp_path / "last.ckpt")        # cannot be loaded safely
    refuses(vqgan_from_jax, tmp_path / "last.ckpt", "Lightning", "Flax msgpack")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    refuses(vqgan_from_jax, tmp_path / "resnet.pth", "quantize.embedding.weight", "Flax msgpack")


def test_a_vocabulary_that_does_not_fit(msgpack):
    refuses(maskgit_from_jax, TRANSFORMER, "vocabulary of 75", 1024)


def test_msgpack_is_optional(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    assert "pip install msgpack" in call("imagenet256", "--run", "run", code=2)
    with pytest.raises(UserError, match="pip install msgpack"):
        write_arrays({}, tmp_path / "file")
    assert not list(tmp_path.iterdir())


# ---- runs

@pytest.fixture
def call(call_main, tmp_path):
    """Calls pretrained.py's main in tmp_path -> what it printed."""
    def call(*flags, code=0):
        return call_main(pretrained, tmp_path, *flags, code=code)
    return call


def test_conversion_makes_a_run_to_sample_from(msgpack, call, call_main, tmp_path):
    command = ["--tokenizer", TOKENIZER, "--transformer", TRANSFORMER, "--run", "a run"]
    assert "Next: python sample.py --run 'a run'" in call(*command)
    call_main(sample, tmp_path, "--run", "a run", "--steps", 3, "--class", "7", "0", "--num", 2)
    folder = tmp_path / "a run"
    assert (folder / "samples.png").exists()
    checkpoint = load_checkpoint(folder / "transformer.pt", "transformer")
    assert checkpoint["image_size"] == 16 and checkpoint["data"] == "imagenet"
    assert checkpoint["classes"] == list("0123456789")
    line = call(*command, code=2)
    assert str(Path("a run", "vqgan.pt")) in line and "--overwrite" in line
    for name in ("vqgan.resume.pt", "transformer.best.pt", "autoregressive.pt"):
        (folder / name).write_text("of a run that is replaced")
    assert f"removed {Path('a run', 'autoregressive.pt')}" in call(*command, "--overwrite")
    assert sorted(path.name for path in folder.glob("*.pt")) == ["transformer.pt", "vqgan.pt"]

    call("--export", "out", "a run")
    for name, path in (("tokenizer", TOKENIZER), ("maskgit", TRANSFORMER)):
        exported = (tmp_path / "out" / f"{name}_a run_checkpoint").read_bytes()
        assert msgpack.unpackb(exported) == msgpack.unpackb(path.read_bytes())
    assert "--overwrite" in call("--export", "out", "a run", code=2)


def test_a_tokenizer_alone_makes_a_run_to_train_in(msgpack, call, tmp_path):
    printed = call("--tokenizer", TOKENIZER, "--run", "mine")
    assert "Next: python train_transformer.py --data imagenet --run mine" in printed
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["vqgan.pt"]


def test_a_damaged_file_makes_no_run(msgpack, call, tmp_path):
    (tmp_path / "cut").write_bytes(TRANSFORMER.read_bytes()[:1000])
    assert "cut" in call("--tokenizer", TOKENIZER, "--transformer", "cut", "--run", "run", code=2)
    assert not (tmp_path / "run").exists()


def test_a_truncated_download_is_named(msgpack, call, monkeypatch, tmp_path):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path))
    path = tmp_path / "tokenizer_imagenet256_checkpoint"
    path.write_bytes(TOKENIZER.read_bytes()[:1000])
    (tmp_path / "maskgit_imagenet256_checkpoint").write_bytes(TRANSFORMER.read_bytes())
    line = call("imagenet256", "--run", "run", code=2)
    assert str(path) in line and "delete it and run again" in line


def test_what_the_released_format_cannot_hold(msgpack, tmp_path):
    cases = {"groups": VQGAN(VQGANConfig(20, 6, 32, (1,), 1, groups=8)),
             "--quantizer fsq": VQGAN(VQGANConfig(15, 2, 32, (1,), 1, quantizer="fsq", levels=(5, 3))),
             "--class-dropout": MaskGIT(MaskGITConfig(64, 5, 9, 24, 1, 2, 40, null_class=True))}
    for word, model in cases.items():
        with pytest.raises(UserError) as error:
            write_released(model, tmp_path / "file")
        says(error, word, "cannot be exported")
    assert not list(tmp_path.iterdir())


def test_an_export_is_whole_or_not_there(call, tmp_path):
    tokenizer = VQGAN(VQGANConfig(20, 6, 32, (1,), 1))
    pretrained.save_model(tmp_path / "run", "vqgan", tokenizer, "", {})
    transformer = MaskGIT(MaskGITConfig(20, 5, 9, 24, 1, 2, 40, null_class=True))
    about = {"tokenizer": fingerprint(tokenizer)}
    pretrained.save_model(tmp_path / "run", "transformer", transformer, "", about)
    assert "--class-dropout" in call("--export", "out", "run", code=2)
    assert not (tmp_path / "out").exists()


def test_flags_that_would_be_ignored_are_refused(call):
    assert "not allowed" in call("--half", "a", "b", "--export", "c", "d", code=2)
    assert "leave --tokenizer" in call("--half", "a", "b", "--run", "c", code=2)
    assert "and --offline out" in call("--export", "a", "b", "--offline", code=2)


def test_model_names(call, tmp_path):
    line = call("imagenet1024", code=2)
    assert "imagenet1024" in line and "imagenet256" in line and "imagenet512" in line
    assert "--tokenizer" in call("--transformer", TRANSFORMER, "--run", "run", code=2)
    assert not list(tmp_path.iterdir())


def test_offline_without_the_files(msgpack, call, tmp_path):
    line = call("imagenet256", "--offline", "--run", "run", code=2)
    assert "tokenizer_imagenet256_checkpoint" in line and "--offline" in line
    assert not list(tmp_path.iterdir())


def test_a_run_in_half_the_size(untrained, call, call_main, tmp_path):
    call("--half", "half", untrained)
    for stage in ("vqgan", "transformer"):
        whole = load_checkpoint(untrained / f"{stage}.pt", stage)["model"]
        half = load_checkpoint(tmp_path / "half" / f"{stage}.pt", stage)["model"]
        for name, value in whole.items():
            assert half[name].dtype == torch.float16 and torch.equal(half[name], value.half())
    _, tokenizer, transformer, _ = load_run(tmp_path / "half", Machine("cpu"))
    for model in (tokenizer, transformer):
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    call_main(sample, tmp_path, "--run", "half", "--num", 1)
    call("--half", "half", tmp_path / "half", "--overwrite")
    assert load_run(tmp_path / "half", Machine("cpu"), decoder="autoregressive")
    line = call("--half", "half", untrained, code=2)
    assert "vqgan.pt" in line and "already there" in line and "--overwrite" in line
    line = call("--half", "other", ".", code=2)
    assert "vqgan.pt" in line and "does not exist" in line


@pytest.mark.parametrize("stage", ["transformer", "autoregressive"])
def test_models_that_do_not_belong_together_are_not_written(untrained, call, tmp_path, stage):
    """Nor is what was there replaced, even by those that were read before."""
    shutil.copytree(untrained, tmp_path / "run")
    call("--half", "out", "run")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    file = tmp_path / "run" / f"{stage}.pt"
    save_checkpoint(file, load_checkpoint(file, stage) | {"tokenizer": "another"})
    command = ["--half"] if stage == "autoregressive" else ["--half", "--export"]
    for flag in command:
        line = call(flag, "out", "run", "--overwrite", code=2)
        assert f"{stage}.pt was trained with another tokenizer than {Path('run', 'vqgan.pt')}" in line
    file.write_bytes(b"damaged")
    assert "damaged" in call("--half", "out", "run", "--overwrite", code=2)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_imagenet_classes():
    names = IMAGENET_CLASSES
    assert len({name.lower() for name in names}) == len(names) == 1000
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 388: "giant panda", 517: "crane (machine)",
             985: "daisy", 999: "toilet tissue"}
    assert {i: names[i] for i in known} == known


# ---- the tokenizer's PyTorch port

def port_reconstruction(weights, levels, blocks, x):
    """The port's forward pass, from its names alone."""
    def conv(name, x):
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, weights.get(f"{name}.bias"), padding=kernel.shape[-1] // 2)

    def norm(name, x):
        return F.silu(F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6))

    def residual(name, x):
        h = conv(f"{name}.conv2", norm(f"{name}.norm2", conv(f"{name}.conv1", norm(f"{name}.norm1", x))))
        return h + (conv(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.weight" in weights else x)

    def residuals(name, x):
        for i in range(blocks):
            x = residual(f"{name}.{i}", x)
        return x

    x = conv("encoder.conv_in", x)
    for level in range(levels):
        x = residuals(f"encoder.down.{level}.block", x)
        x = F.avg_pool2d(x, 2) if level < levels - 1 else x
    x = conv("encoder.conv_out", norm("encoder.norm_out", residuals("encoder.mid", x)))
    codes = weights["quantize.embedding.weight"]
    indices = torch.cdist(x.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(-1)
    x = codes[indices].view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
    x = residuals("decoder.mid", conv("decoder.conv_in", x))
    for level in reversed(range(levels)):
        x = residuals(f"decoder.up.{level}.block", x)
        x = conv(f"decoder.up.{level}.upsample_conv", F.interpolate(x, scale_factor=2.0)) if level else x
    return conv("decoder.conv_out", norm("decoder.norm_out", x))


@torch.no_grad()
def test_port_of_the_tokenizer(tmp_path):
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(codebook_size=20, codebook_dim=6, filters=32, multipliers=(1, 2, 2, 3), res_blocks=2))
    model.eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    own = model.state_dict()
    weights = dict(port_arrays(model))
    assert len(weights) == len(own)
    images = torch.rand(2, 3, 32, 32)
    close(port_reconstruction(weights, 4, 2, images), model(images)[0])
    for zipped in (True, False):                            # as torch.save writes now, and as it did before 1.6
        torch.save(weights, tmp_path / "port.bin", _use_new_zipfile_serialization=zipped)
        found = vqgan_from_jax(tmp_path / "port.bin")
        assert found.config == model.config and not found.training
        assert all(torch.equal(value, own[name]) for name, value in found.state_dict().items())

    changed = {name: value for name, value in weights.items() if name != "decoder.up.3.upsample_conv.bias"}
    torch.save(changed, tmp_path / "port.bin")
    with pytest.raises(ValueError) as error:
        vqgan_from_jax(tmp_path / "port.bin")
    says(error, tmp_path / "port.bin", "decoder.up.3.upsample_conv.bias", "missing")
    torch.save(weights | {"encoder.more": torch.zeros(1)}, tmp_path / "port.bin")
    with pytest.raises(ValueError) as error:
        vqgan_from_jax(tmp_path / "port.bin")
    says(error, "encoder.more", "unexpected")


def test_a_port_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for zipped in (True, False):
        torch.save({"quantize.embedding.weight": Evil()}, tmp_path / "port.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError) as error:
            vqgan_from_jax(tmp_path / "port.bin")
        says(error, tmp_path / "port.bin")
    assert not (tmp_path / "ran").exists()


# ---- LPIPS

def lpips_weights():
    """Parameter number i of the sorted names is RandomState(1000 + i).randn(*shape), scaled; linear ones positive."""
    weights = {}
    for i, (name, value) in enumerate(sorted(LPIPS().state_dict().items())):
        array = np.random.RandomState(1000 + i).randn(*value.shape)
        scale = 0.1 if name.endswith("bias") else np.sqrt(2 / array[0].size)
        array = np.abs(array) if name.startswith("linear") else array * scale
        weights[name] = torch.from_numpy(array.astype(np.float32))
    return weights


def save_lpips_weights(folder):
    """The random weights in files named and laid out as upstream's -> their paths."""
    weights, vgg16, linear = lpips_weights(), folder / "vgg16-397923af.pth", folder / "lpips-vgg.pth"
    features = {k: v for k, v in weights.items() if k.startswith("features")}
    torch.save(features | {"classifier.0.bias": torch.zeros(2)}, vgg16)
    torch.save({f"lin{i}.model.1.weight": weights[f"linear.{i}"].view(1, -1, 1, 1) for i in range(5)}, linear)
    return vgg16, linear


def test_lpips(monkeypatch, tmp_path):
    """Distances and gradients are those of the package lpips 0.1.4 with the same weights (tests/data/lpips.npz)."""
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path))
    vgg16, linear = save_lpips_weights(tmp_path)
    random = np.random.RandomState(0)
    model, ref = load_lpips(offline=True), np.load(DATA / "lpips.npz")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    a, b = (torch.from_numpy(random.rand(4, 3, 32, 32).astype(np.float32)) for _ in range(2))
    b[1], b[2] = a[1], a[2] + 0.05 * (b[2] - a[2])
    a.requires_grad_(True)
    distance = model(a, b)
    close(distance, ref["distance"], 1e-5)
    gradient, = torch.autograd.grad(distance.sum(), a)
    close(gradient[:, :, ::8, ::8], ref["gradient"], 1e-6)

    for bias in (name for name in model.state_dict() if name.endswith("bias")):     # features that are zero everywhere
        model.get_parameter(bias).fill_(-1e3)
    distance = model(a, b)
    gradient, = torch.autograd.grad(distance.sum(), a)
    assert torch.equal(distance, torch.zeros(4)) and gradient.isfinite().all()

    torch.save({"w": torch.zeros(2)}, linear)
    with pytest.raises(UserError, match="parameter linear.0 is not there.* delete it, to fetch it again"):
        load_lpips(offline=True)
    save_lpips_weights(tmp_path)
    torch.save({"features.0.weight": torch.zeros(2)}, vgg16)
    with pytest.raises(ValueError) as error:
        load_lpips(offline=True)
    says(error, "vgg16-397923af.pth", "features.0.bias")


@pytest.mark.parametrize("leads, events", [(True, ["load", "wait"]), (False, ["wait", "load"])])
def test_the_first_rank_fetches_lpips(leads, events, monkeypatch):
    happened = []
    monkeypatch.setattr(lpips, "load_lpips", lambda: happened.append("load"))
    machine = Machine("cpu", bf16=False)
    machine.leads = leads
    machine.wait_for_ranks = lambda: happened.append("wait")
    lpips.fetch_lpips(machine)
    assert happened == events


def test_lpips_without_its_files(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_lpips(offline=True)
    says(error, tmp_path, "vgg16-397923af.pth", "lpips-vgg.pth", "--perceptual none")


@pytest.mark.slow
def test_training_with_the_perceptual_loss(tmp_path):
    save_lpips_weights(tmp_path)
    command = ["train_vq.py", "--run", tmp_path / "run", *TINY_VQ, "--steps", 2, "--perceptual", "lpips"]
    run(*command, env=os.environ | {"MASKGIT_CACHE": str(tmp_path)})
    with open(tmp_path / "run" / "vqgan.log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(0 < float(row["perceptual"]) < 100 for row in rows)
    # Neither at hand nor to be fetched: training does not silently go on without.
    unreachable = dict.fromkeys(["https_proxy", "HTTPS_PROXY"], "http://127.0.0.1:9")
    refused(*command, "--overwrite", env=os.environ | unreachable | {"MASKGIT_CACHE": str(tmp_path / "empty")},
            says=["vgg16-397923af.pth", "lpips-vgg.pth", "--perceptual none"])
    refused("train_vq.py", "--run", tmp_path / "other", "--perceptual", "l2", says=["l2", "lpips", "none"])


@pytest.mark.slow
def test_training_goes_on_from_a_run(trained, tmp_path):
    """--init takes weights and sizes over, the rows of classes only where both have the same."""
    output = run("train_transformer.py", "--run", tmp_path / "same", "--vqgan", trained / "vqgan.pt", "--init", trained,
                 *TINY_TRANSFORMER, "--steps", 1, "--lr", 0, "--muon-lr", 0, "--dim", 999)
    assert "10 classes" in output
    ours = load_checkpoint(tmp_path / "same" / "transformer.resume.pt", "transformer training state")["model"]
    theirs = load_checkpoint(trained / "transformer.pt", "transformer")["model"]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    refused("train_transformer.py", "--run", tmp_path / "no", "--vqgan", trained / "vqgan.pt",
            "--init", tmp_path / "nowhere", says=["nowhere", "does not exist"])


def test_a_run_goes_on_with_the_null_class_it_has_learned(tmp_path):
    """Its row comes last, and so it is another row where there are other classes."""
    config = MaskGITConfig(codebook_size=8, num_classes=2, num_tokens=4, dim=8, depth=1, heads=1, mlp_dim=8,
                           null_class=True)
    start = MaskGIT(config)
    save_checkpoint(tmp_path / "transformer.pt", {
        "kind": "transformer", "config": asdict(config), "model": start.state_dict(), "tokenizer": "same",
        "classes": ["a", "b"],
    })
    model = MaskGIT(replace(config, num_classes=3))
    args = Namespace(init=tmp_path, decoder="parallel", resume=False)
    train_transformer.load_pretrained(args, model, "same", ["x", "y", "z"])
    for ours, theirs in ((model.token_embedding.weight, start.token_embedding.weight), (model.head_bias, start.head_bias)):
        assert torch.equal(ours[[0, 7, model.mask_id, -1]], theirs[[0, 7, start.mask_id, -1]])


# ---- fetching

BODY = np.random.RandomState(0).bytes(3_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves BODY, or with the server's attribute `status` an error (None: no HTTP); `cut` breaks the connection off.
    `head`: the status of its answers to HEAD."""
    def do_GET(self):
        if self.server.status is None:
            return self.wfile.write(b"nonsense\r\n")
        if self.server.status != 200:
            return self.send_error(self.server.status)
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:900_000] if self.server.cut else BODY)

    def do_HEAD(self):
        self.send_response(self.server.head)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.status, server.head, server.cut = 200, 200, False
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        server.cache = tmp_path / "cache"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_fetching_once(server):
    path = download(server.url, "file", SHA256)
    assert path == server.cache / "file" and path.read_bytes() == BODY
    server.status = 503                                     # a second request would fail
    assert download(server.url, "file") == path


def test_a_server_that_refuses_head(server):
    server.head = 405
    assert download(server.url, "file").read_bytes() == BODY


def test_the_cache_folder_may_start_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MASKGIT_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"


def test_what_cannot_be_fetched_leaves_no_file(server, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="checksum.*run this again"):
        download(server.url, "file", "0" * 64)
    server.cut = True
    with pytest.raises(UserError, match="900000 of 3000000"):
        download(server.url, "file")
    server.status = 503
    with pytest.raises(UserError, match="cannot fetch http://127.*503.*network"):
        download(server.url, "file")
    server.status = None
    with pytest.raises(UserError, match="(?s)cannot fetch http://127.*nonsense.*network"):
        download(server.url, "file")
    server.status = 200
    with pytest.raises(UserError, match="cannot fetch .*File name too long"):
        download(server.url, "x" * 300)
    with pytest.raises(UserError, match="cannot fetch http://127.0.0.1:9/file.*refused.*network"):
        download("http://127.0.0.1:9/file", "file")
    with pytest.raises(UserError, match="--offline"):
        download(server.url, "file", offline=True)
    assert not list(server.cache.iterdir())
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "occupied" / "cache"))
    with pytest.raises(UserError, match="occupied"):
        download(server.url, "file")
