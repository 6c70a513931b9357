"""What others trained: the released format both ways, the tokenizer's PyTorch port, LPIPS; bad networks."""
import copy
import csv
import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_TRANSFORMER, TINY_VQ, refused, run
from test_parity import DATA, close, load

from lib.data import IMAGENET_CLASSES
from lib.files import download, load_checkpoint
from lib.flags import UserError
from lib.lpips import LPIPS, load_lpips
from lib.runtime import Machine
from lib.sampling import load_run
from maskgit import MaskGIT, MaskGITConfig
from pretrained import maskgit_from_jax, port_arrays, vqgan_from_jax, write_released
from vqgan import VQGAN, VQGANConfig

TOKENIZER, TRANSFORMER = DATA / "tokenizer_tiny.msgpack", DATA / "transformer_tiny.msgpack"


@pytest.fixture
def msgpack():
    return pytest.importorskip("msgpack")


def tree_of(msgpack, path):
    """The file as nested dicts, every array still packed."""
    return msgpack.unpackb(path.read_bytes())


def says(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, f"'{word}' is not in: {message}"


# ---- the released files

@torch.no_grad()
def test_released_tokenizer(msgpack):
    ref, _ = load("tokenizer_tiny")
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
    ref, _ = load("transformer_tiny")
    model = maskgit_from_jax(TRANSFORMER, 64)
    assert not model.training
    assert model.config == MaskGITConfig(64, num_classes=10, num_tokens=16, dim=32, depth=2, heads=4, mlp_dim=64)
    ids = ref["input_ids"].long()
    close(model(torch.where(ids[:, 1:] < 0, model.mask_id, ids[:, 1:]), ids[:, 0] - 64), ref["logits"][:, 1:, :64])


def test_export_gives_the_released_file_again(msgpack, tmp_path):
    for path, model in ((TOKENIZER, vqgan_from_jax(TOKENIZER)), (TRANSFORMER, maskgit_from_jax(TRANSFORMER, 64))):
        write_released(model, tmp_path / "file")
        assert tree_of(msgpack, tmp_path / "file") == tree_of(msgpack, path)


@pytest.mark.parametrize("model", [
    lambda: VQGAN(VQGANConfig(codebook_size=20, codebook_dim=6, filters=32, multipliers=(1, 2, 3), res_blocks=2)),
    lambda: VQGAN(VQGANConfig(codebook_size=20, codebook_dim=6, filters=32, multipliers=(2,), res_blocks=3)),
    lambda: MaskGIT(MaskGITConfig(codebook_size=64, num_classes=5, num_tokens=9, dim=24, depth=3, heads=2, mlp_dim=40)),
])
def test_export_and_import_change_no_bit(msgpack, model, tmp_path):
    model = model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    write_released(model, tmp_path / "file")
    found = vqgan_from_jax(tmp_path / "file") if isinstance(model, VQGAN) else maskgit_from_jax(tmp_path / "file", 64)
    assert found.config == model.config
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value) and found.state_dict()[name].is_contiguous(), name


def test_wrappings_and_other_types(msgpack, tmp_path):
    """Parameters bare or wrapped, and bfloat16."""
    expected, tree = maskgit_from_jax(TRANSFORMER, 64).state_dict(), tree_of(msgpack, TRANSFORMER)
    bias = tree["params"]["MlmLayer_0"]["mlm_dense"]
    halved = torch.from_numpy(np.frombuffer(msgpack.unpackb(bias["bias"].data)[2], np.float32).copy()).bfloat16()
    buffer = halved.view(torch.int16).numpy().tobytes()
    bias["bias"] = msgpack.ExtType(1, msgpack.packb((halved.shape, "bfloat16", buffer)))
    step = msgpack.ExtType(3, msgpack.packb(((), "int32", b"\0\0\0\1")))
    for i, wrapped in enumerate((tree, tree["params"], {"step": step, "params": tree}, {"target": tree, "step": 7})):
        (tmp_path / "file").write_bytes(msgpack.packb(wrapped))
        for name, value in maskgit_from_jax(tmp_path / "file", 64).state_dict().items():
            assert torch.equal(value, halved.float() if name == "head.0.bias" else expected[name]), (i, name)
    (tmp_path / "file").write_bytes(msgpack.packb({"a": tree, "b": tree}))
    with pytest.raises(ValueError) as error:
        maskgit_from_jax(tmp_path / "file", 64)
    says(error, tmp_path / "file", "twice")


def leaves(tree, path=()):
    for key, value in tree.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]


@pytest.mark.parametrize("path, read", [(TOKENIZER, vqgan_from_jax),
                                        (TRANSFORMER, lambda path: maskgit_from_jax(path, 64))])
def test_a_parameter_too_few_too_many_or_misshapen_is_named(msgpack, path, read, tmp_path):
    file, tree = tmp_path / "file", tree_of(msgpack, path)
    for *folders, last in leaves(tree["params"]):
        changed = copy.deepcopy(tree)
        node, name = changed["params"], "/".join((*folders, last))
        for folder in folders:
            node = node[folder]
        value = node.pop(last)
        file.write_bytes(msgpack.packb(changed))
        with pytest.raises(ValueError) as error:
            read(file)
        says(error, file, name, "missing")
        node[last], node["more"] = value, value
        file.write_bytes(msgpack.packb(changed))
        with pytest.raises(ValueError) as error:
            read(file)
        says(error, file, "/".join((*folders, "more")), "unexpected")
        if last in ("bias", "scale"):                       # nothing is read off these
            del node["more"]
            node[last] = msgpack.ExtType(1, msgpack.packb(((5,), "float32", bytes(20))))
            file.write_bytes(msgpack.packb(changed))
            with pytest.raises(ValueError) as error:
                read(file)
            says(error, file, name, "(5,)")


def test_damaged_files(msgpack, tmp_path):
    file, whole = tmp_path / "file", TRANSFORMER.read_bytes()
    for data in (b"", b"not a checkpoint at all", whole[:20], whole[:50_000], whole[:-1], whole + b"x",
                 b"\x93\x01\x02\x03", whole.replace(b"float32", b"complex"),
                 whole.replace(b"\x92\x20\x04\x08", b"\x92\x20\x04\x09")):
        file.write_bytes(data)
        for read in (maskgit_from_jax, vqgan_from_jax):
            with pytest.raises(ValueError) as error:
                read(file)
            says(error, file)
    with pytest.raises(OSError):
        maskgit_from_jax(tmp_path / "none")


def test_a_vocabulary_that_does_not_fit(msgpack):
    with pytest.raises(ValueError) as error:
        maskgit_from_jax(TRANSFORMER)
    says(error, TRANSFORMER, "vocabulary of 75", 1024)


def test_msgpack_is_optional(trained, tmp_path, monkeypatch):
    (tmp_path / "msgpack.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    refused("pretrained.py", "imagenet256", "--run", tmp_path / "run", says="pip install msgpack")
    refused("pretrained.py", "--export", tmp_path / "out", trained, says="pip install msgpack")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


# ---- runs

def test_conversion_makes_a_run_to_sample_from(msgpack, tmp_path):
    folder = tmp_path / "run"
    command = ["pretrained.py", "--tokenizer", TOKENIZER, "--transformer", TRANSFORMER, "--run", folder]
    run(*command)
    run("sample.py", "--run", folder, "--steps", 3, "--class", "7", "0", "--num", 2, "--device", "cpu")
    assert (folder / "samples.png").exists()
    found = load_checkpoint(folder / "transformer.pt", "transformer")
    assert found["image_size"] == 16 and found["data"] == "imagenet" and found["classes"] == list("0123456789")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused(*command, says=[str(folder), "--overwrite"])
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "vqgan.resume.pt").write_text("of a run that was replaced")
    run(*command, "--overwrite")
    assert not (folder / "vqgan.resume.pt").exists()

    run("pretrained.py", "--export", tmp_path / "out", folder)
    assert tree_of(msgpack, tmp_path / "out" / "tokenizer_run_checkpoint") == tree_of(msgpack, TOKENIZER)
    assert tree_of(msgpack, tmp_path / "out" / "maskgit_run_checkpoint") == tree_of(msgpack, TRANSFORMER)
    refused("pretrained.py", "--export", tmp_path / "out", folder, says=["tokenizer_run_checkpoint", "--overwrite"])


def test_a_damaged_file_makes_no_run(msgpack, tmp_path):
    (tmp_path / "cut").write_bytes(TRANSFORMER.read_bytes()[:1000])
    refused("pretrained.py", "--tokenizer", TOKENIZER, "--transformer", tmp_path / "cut", "--run", tmp_path / "run",
            says=str(tmp_path / "cut"))
    assert not (tmp_path / "run").exists()


def test_what_the_released_format_cannot_hold(msgpack, trained, tmp_path):
    refused("pretrained.py", "--export", tmp_path, trained, says="groups")
    with pytest.raises(ValueError) as error:
        write_released(MaskGIT(MaskGITConfig(64, 5, 9, 24, 1, 2, 40, null_class=True)), tmp_path / "file")
    says(error, "null class")
    assert not list(tmp_path.iterdir())


def test_model_names(tmp_path):
    refused("pretrained.py", "imagenet1024", says=["imagenet1024", "imagenet256, imagenet512"])
    refused("pretrained.py", "--transformer", TRANSFORMER, "--run", tmp_path / "run", says="--tokenizer")
    assert not (tmp_path / "run").exists()


def test_offline_without_the_files(msgpack, tmp_path):
    refused("pretrained.py", "imagenet256", "--offline", "--run", tmp_path / "run",
            says=["tokenizer_imagenet256_checkpoint", "not there"])
    assert not (tmp_path / "run").exists()


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
    for name, parameter in model.named_parameters():
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
    vgg16, _ = save_lpips_weights(tmp_path)
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

    torch.save({"features.0.weight": torch.zeros(2)}, vgg16)
    with pytest.raises(ValueError) as error:
        load_lpips(offline=True)
    says(error, "vgg16-397923af.pth", "features.0.bias")


def test_lpips_without_its_files(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path))
    with pytest.raises(OSError) as error:
        load_lpips(offline=True)
    says(error, tmp_path, "vgg16-397923af.pth", "lpips-vgg.pth", "--perceptual none")


def test_training_with_the_perceptual_loss(tmp_path):
    save_lpips_weights(tmp_path)
    command = ["train_vq.py", "--run", tmp_path / "run", *TINY_VQ, "--steps", 2, "--perceptual", "lpips"]
    run(*command, env=os.environ | {"MASKGIT_CACHE": str(tmp_path)})
    with open(tmp_path / "run" / "vqgan.log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(0 < float(row["perceptual"]) < 100 for row in rows)
    # Neither at hand nor to be fetched: training does not silently go on without.
    unreachable = {name: "http://127.0.0.1:9" for name in ("https_proxy", "HTTPS_PROXY")}
    refused(*command, "--overwrite", env=os.environ | unreachable | {"MASKGIT_CACHE": str(tmp_path / "empty")},
            says=["vgg16-397923af.pth", "lpips-vgg.pth", "--perceptual none"])
    refused("train_vq.py", "--run", tmp_path / "other", "--perceptual", "l2", says=["l2", "lpips", "none"])


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


# ---- fetching

BODY = np.random.RandomState(0).bytes(3_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves BODY, or with the server's attribute `status` an error; `cut` breaks the connection off."""
    def do_GET(self):
        if self.server.status != 200:
            return self.send_error(self.server.status)
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:900_000] if self.server.cut else BODY)

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.status, server.cut = 200, False
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


def test_what_cannot_be_fetched_leaves_no_file(server, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="checksum.*run this again"):
        download(server.url, "file", "0" * 64)
    server.cut = True
    with pytest.raises(UserError, match="900000 of 3000000"):
        download(server.url, "file")
    server.status = 503
    with pytest.raises(UserError, match="cannot fetch http://127.*503.*network"):
        download(server.url, "file")
    with pytest.raises(UserError, match="cannot fetch http://127.0.0.1:9/file.*refused.*network"):
        download("http://127.0.0.1:9/file", "file")
    with pytest.raises(UserError, match="--offline"):
        download(server.url, "file", offline=True)
    assert not list(server.cache.iterdir())
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "occupied" / "cache"))
    with pytest.raises(UserError, match="occupied"):
        download(server.url, "file")


def test_a_run_in_half_the_size(trained, tmp_path):
    run("pretrained.py", "--half", tmp_path / "half", trained)
    for stage in ("vqgan", "transformer"):
        whole, half = (torch.load(folder / f"{stage}.pt", weights_only=True)["model"]
                       for folder in (trained, tmp_path / "half"))
        for name, value in whole.items():
            assert half[name].dtype == torch.float16 and torch.equal(half[name], value.half())
    _, tokenizer, transformer, _ = load_run(tmp_path / "half", Machine("cpu"), VQGAN, MaskGIT)
    assert {p.dtype for model in (tokenizer, transformer) for p in model.parameters()} == {torch.float32}
    run("sample.py", "--run", tmp_path / "half", "--num", 1)
    refused("pretrained.py", "--half", tmp_path / "half", trained, says=["vqgan.pt", "already there", "--overwrite"])
    refused("pretrained.py", "--half", tmp_path / "other", tmp_path, says=["vqgan.pt", "does not exist"])
