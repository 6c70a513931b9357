"""demo.py: what the server answers, and the page in a browser, if Chromium and playwright are installed."""
import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import demo
import lib.errors
import lib.orders
import lib.sampling
import maskgit
from images import make
from lib.editing import composite, likeliest_class
from lib.files import load_checkpoint
from lib.orders import by_chance, by_confidence
from lib.runtime import Machine
from lib.sampling import rand_of_images
from lib.shapes import Shapes
from maskgit import decode, gamma, guided_logits, mask_counts
from sequential import decode_sequential
from vqgan import as_grid

SIZE = load_checkpoint(ROOT / "example" / "vqgan.pt", "vqgan")["image_size"]
SIDE = SIZE // 4                                # tokens along each side, of 4 x 4 pixels each
N = SIDE * SIDE
CENTRE = [abs(i % SIDE + 0.5 - SIDE / 2) < 2 and abs(i // SIDE + 0.5 - SIDE / 2) < 2 for i in range(N)]
CORNER = [i % SIDE < 2 and i // SIDE < 2 for i in range(N)]


def load(folder):
    """The models of a run, on the CPU and in float32."""
    args = SimpleNamespace(run=str(folder), vqgan=None, data_dir="data", max_pixels=178_956_970)
    return demo.Demo(args, Machine("cpu", bf16=False))


@contextlib.contextmanager
def served(models, port=0):
    """A server of these models, in a thread of this process."""
    server = demo.open_server(models, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def models():
    return load(ROOT / "example")


@pytest.fixture(scope="module")
def server(models):
    with served(models) as server:
        yield server


@pytest.fixture(scope="module")
def ask(server):
    """ask(path, body) -> the lines of the answer. status: what it must be; headers: of the request."""
    def ask(path, body=b"", status=200, method="POST", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == status, text
        if method == "GET":
            return text.decode()
        lines = [json.loads(line) for line in text.splitlines()]
        if "error" not in lines[-1]:
            assert lines.pop() == {"end": True}                              # without it an answer was cut short
        return lines
    return ask


@pytest.fixture
def draw(ask):
    """draw(settings, label) -> the number of passes that were told, the steps in numbers, and {step: its images}."""
    def draw(settings, label=None, **edit):
        lines = ask("/draw", {"settings": settings, "label": label, **edit})
        passes = [line for line in lines if "done" in line]
        steps, = (line for line in lines if "sampled" in line)
        images = {line["step"]: np.stack([pixels(url) for url in line["images"]]) for line in lines if "images" in line}
        return len(passes), steps, images
    return draw


def pixels(url):
    """(H, W, 3) uint8 of a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def as_file(array, kind="png"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def as_bytes(images):
    """(n, 3, H, W) in [0, 1] -> (n, H, W, 3) uint8, as in a file."""
    return (images.clamp(0, 1) * 255 + 0.5).to(torch.uint8).movedim(1, -1).numpy()


def in_pixels(region):
    """N booleans -> (SIZE, SIZE)."""
    return np.kron(np.reshape(region, (SIDE, SIDE)), np.ones((4, 4))) > 0


# ------------------------------------------------------------------------------------------------ what is answered

def test_the_steps_are_those_of_decode(models, draw):
    settings = {"num": "12", "steps": "6", "schedule": "square", "choice-temperature": "3",
                "temperature": "0.9", "top-k": "50", "order": "confidence", "seed": "5"}
    passes, steps, images = draw(settings)
    model = models.models["parallel"]
    labels = torch.arange(12) % 10
    expected = []
    decode(model, labels, 6, "square", order=by_confidence(3), temperature=0.9, top_k=50, cfg=1.0,
           rand=rand_of_images(5, labels, torch.arange(12) // 10, Machine("cpu")), on_step=lambda *step: expected.append(step))
    assert passes == 6 and steps["labels"] == labels.tolist() and sorted(images) == [1, 2, 3, 4, 5, 6]
    for t, sampled, masked, confidence in expected:
        assert steps["sampled"][t - 1] == sampled.tolist() and steps["masked"][t - 1] == masked.tolist()
        known = confidence.isinf()
        assert np.allclose(steps["confidence"][t - 1], confidence.masked_fill(known, 0), atol=6e-4)
        assert (images[t] == as_bytes(models.tokenizer.decode(as_grid(sampled)))).all()
    assert steps["counts"] == [N, *mask_counts("square", 6, N)] == [N, *(sum(masks[0]) for masks in steps["masked"])]
    assert np.allclose(steps["gammas"], [gamma(t / 6, "square", N) for t in range(7)])
    assert np.allclose(steps["curve"][::20], [gamma(r / 5, "square", N) for r in range(6)]) and all(steps["unknown"])
    assert steps["settings"]["choice_temperature"] == 3 and steps["settings"]["order"] == "confidence"
    assert draw(settings)[1]["sampled"] == steps["sampled"]                                            # the same again


def test_a_class_and_the_sequential_decoder(models, draw):
    passes, steps, images = draw({"num": "3", "decoder": "autoregressive"}, label=3)
    model = models.models["autoregressive"]
    labels = torch.full((3,), 3)
    rand = rand_of_images(0, labels, torch.arange(3), Machine("cpu"))
    tokens = decode_sequential(model, labels, rand=rand)
    assert passes == N and steps["sampled"] == [tokens.tolist()] and not np.any(steps["masked"])
    assert steps["labels"] == [3, 3, 3] and (images[1] == as_bytes(models.tokenizer.decode(as_grid(tokens)))).all()


def test_the_clock_times_what_is_asked_for(ask):
    """Both decoders, for each number of images, with the settings of the page."""
    lines = ask("/clock", {"settings": {"steps": "1", "cfg": "0"}, "numbers": [2, 1]})
    asked = [(num, decoder) for num in (2, 1) for decoder in ("parallel", "autoregressive")]
    measured = [line for line in lines if "seconds" in line]
    assert [(line["num"], line["decoder"]) for line in measured] == asked
    # A line before each of at least two runs: a page that has gone is noticed between them.
    starts = [(line["num"], line["decoder"]) for line in lines if "seconds" not in line]
    assert sorted(starts, key=asked.index) == starts and all(2 <= starts.count(pair) <= 5 for pair in asked)
    lines = ask("/clock", {"settings": {"steps": "32"}, "numbers": [1]})
    more_steps = next(line["seconds"] for line in lines if "seconds" in line)
    assert more_steps > 8 * measured[2]["seconds"] > 0


def test_look_shows_what_the_model_predicted(models, ask, draw):
    """The probabilities are the model's; without noise, as in the last step, log p is the confidence."""
    settings = {"num": "4", "steps": "5", "seed": "1", "choice-temperature": "0"}
    _, steps, images = draw(settings)
    before, sampled, masked = steps["sampled"][2][2], steps["sampled"][3][2], steps["masked"][2][2]
    visible = [None if mask else code for code, mask in zip(before, masked, strict=True)]
    model = models.models["parallel"]
    given = torch.tensor([[model.mask_id if code is None else code for code in visible]])
    p = guided_logits(model, given, torch.tensor([2]), 1 * 4 / 5)[0].softmax(-1)
    # A place where an unlikely token was sampled: it is shown besides the eight likeliest.
    place = next(place for place in range(N) if masked[place] and sampled[place] not in p[place].topk(8).indices)
    request = {"settings": settings, "label": 2, "step": 4, "visible": visible, "sampled": sampled, "place": place}
    answer, = ask("/look", request)
    best = p[place].topk(8)
    assert answer["codes"][:8] == best.indices.tolist()
    assert np.allclose(answer["probabilities"][:8], best.values, rtol=1e-4)
    index = answer["codes"].index(sampled[place])
    assert np.log(answer["probabilities"][index]) == pytest.approx(steps["confidence"][3][2][place], abs=2e-3)
    # The patch of the code that was sampled is cut out of the image as it is: 3 x 3 tokens, inside of its borders.
    row, column = (min(max(place - 1, 0), SIDE - 3) * 4 for place in divmod(place, SIDE))
    patch = pixels(answer["patches"][index])
    assert np.abs(patch.astype(int) - images[4][2][row:row + 12, column:column + 12]).max() <= 1
    changed = torch.tensor([sampled]).repeat(2, 1)
    changed[1, place] = answer["codes"][0]
    whole = as_bytes(models.tokenizer.decode(as_grid(changed)))[1]
    assert np.abs(pixels(answer["patches"][0]).astype(int) - whole[row:row + 12, column:column + 12]).max() <= 1


def test_an_edit_changes_the_region_alone(models, ask, draw, monkeypatch):
    photo, = ask("/validation", {"number": 7})
    images, _ = Shapes("val", SIZE).batch(np.array([7]))
    assert (pixels(photo["picture"]) == images[0].movedim(0, -1).numpy()).all()
    edit = {"picture": photo["picture"], "region": CENTRE}
    _, steps, frames = draw({"num": "3", "feather": "0"}, label=6, **edit)
    inside = in_pixels(CENTRE)
    before = pixels(photo["picture"])
    for frame in frames.values():
        assert (frame[:, ~inside] == before[~inside]).all() and (frame[:, inside] != before[inside]).any()
    model = models.models["parallel"]
    tokens = models.tokenizer.encode(images / 255).flatten()
    known = torch.where(torch.tensor(CENTRE), model.mask_id, tokens)
    labels = torch.full((3,), 6)
    rand = rand_of_images(0, labels, torch.arange(3), Machine("cpu"))
    painted = decode(model, labels, known=known.expand(3, -1), cfg=1.0, order=by_confidence(1.0), rand=rand)
    assert steps["sampled"][-1] == painted.tolist() and steps["counts"] == [16, *mask_counts("cosine", 8, 16)]
    assert steps["unknown"] == CENTRE
    now = [0]

    def slow_search(*arguments):
        now[0] += 9
        return likeliest_class(*arguments)
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(demo, "likeliest_class", slow_search)
    _, steps, _ = draw({"num": "1"}, **edit)
    assert steps["labels"] == [likeliest_class(model, known, 0)]
    assert now == [9] and steps["seconds"] == 0                                         # the page shows those of the passes


def test_the_default_border_fades_as_in_edit_py(models, ask, draw):
    """A token's width less one: no seam, and pixels farther away are the picture's."""
    photo, = ask("/validation", {"number": 7})
    edit = {"picture": photo["picture"], "region": CORNER}
    _, steps, frames = draw({"num": "2"}, label=6, **edit)
    before, inside = pixels(photo["picture"]), in_pixels(CORNER)
    painted = models.tokenizer.decode(as_grid(torch.tensor(steps["sampled"][-1])))
    expected = composite(torch.tensor(before).movedim(-1, 0) / 255, painted, torch.from_numpy(inside), 3)
    assert steps["settings"]["feather"] == 3 and (frames[8] == as_bytes(expected)).all()
    far = ~np.pad(inside, 10, mode="edge")[10:-10, 10:-10]
    far[:18] = far[:, :18] = False                          # the corner is 8 pixels wide: 10 more pixels may be blended
    assert far.sum() == (SIZE - 18) ** 2 and (frames[8][:, far] == before[far]).all()
    border = inside != np.roll(inside, 1, axis=1)
    border[:, 0] = False
    assert (frames[8][:, border] != before[border]).any()


def test_photos(ask):
    """Any file that is an image comes back as the model takes it; others are named for what they are."""
    wide = np.zeros((60, 100, 3), np.uint8)
    wide[:, 20:80] = 200
    for kind in ("png", "jpeg", "gif"):
        answer, = ask("/photo", as_file(wide, kind))
        assert pixels(answer["picture"]).shape == (SIZE, SIZE, 3) and pixels(answer["picture"]).min() > 150
    assert "not a readable image" in ask("/photo", b"hello")[0]["error"]
    assert "not a readable image" in ask("/photo", as_file(wide)[:100])[0]["error"]
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n" + len(header[4:]).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    assert "too large" in ask("/photo", bomb + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")[0]["error"]
    assert "20 MB" in ask("/photo", bytes(20_000_001), status=413)[0]["error"]


@pytest.mark.parametrize("settings, says", [
    ({"steps": "0"}, "at least 1"), ({"steps": str(N + 1)}, f"the number of tokens, {N}"),
    ({"num": "65"}, "num: it must be a whole number from 1 to 64"), ({"schedule": "x"}, "schedule: "),
    ({"cfg": "-1"}, "cfg: "), ({"top-k": "300"}, "256"), ({"temperature": "nan"}, "temperature: "),
    ({"run": "/etc"}, "unrecognized"), ({"decoder": "x"}, "decoder: "), ({"seed": "-1"}, "seed: "),
    ({"feather": "-1"}, "feather: "), ({"feather": "1e12"}, "feather: ")])
def test_bad_settings(ask, settings, says):
    *_, last = ask("/draw", {"settings": settings, "label": None})
    assert says in last["error"] and len(last) == 1 and not last["error"].startswith(("--", "argument --"))


def test_more_numbers_than_a_page_can_take(ask, monkeypatch):
    monkeypatch.setattr(demo, "MAX_NUMBERS", 4 * N)
    assert ask("/draw", {"settings": {"num": "2", "steps": "2"}, "label": None})[-1]["step"] == 1
    last = ask("/draw", {"settings": {"num": "2", "steps": "3"}, "label": None})[-1]
    assert last["error"].startswith("3 steps of 2 images") and "ask for fewer images or steps" in last["error"]


def test_nothing_is_painted_over(ask):
    request = {"settings": {}, "label": None, "picture": demo.data_url(torch.zeros(3, SIZE, SIZE)), "region": [False] * N}
    assert "nothing is painted over" in ask("/draw", request)[-1]["error"]
    request["region"] = [True] * N
    assert "nothing tells its class" in ask("/draw", request)[-1]["error"]


@pytest.mark.parametrize("body", [
    b"", b"[]", b"{}", b'{"settings": {}, "label": 1000}', {"settings": {}, "label": "1"},
    {"settings": {}, "label": 1, "picture": demo.data_url(torch.zeros(3, SIZE, SIZE)), "region": [True]}])
def test_our_errors_stay_on_the_terminal(ask, capsys, body):
    """What only a bug of the page could send: a traceback for us, and no text of it for the reader."""
    assert ask("/draw", body)[-1] == {"error": "internal error: see the terminal in which demo.py runs"}
    assert "Traceback" in capsys.readouterr().err
    assert ask("/about")[0]["tokens"] == N                                                   # it answers all the same


def test_a_lack_of_memory_is_no_bug(ask, models, monkeypatch, capsys):
    def decode(tokens):
        raise RuntimeError("can't allocate memory: you tried to allocate 1 byte")
    monkeypatch.setattr(models.tokenizer, "decode", decode)
    assert ask("/draw", {"settings": {}, "label": None})[-1] == {"error": "out of memory: ask for fewer images"}
    assert capsys.readouterr().err == ""


def test_a_page_that_takes_no_more_has_gone(server, monkeypatch, capfd):
    """The end of its connection, or a line that it does not read for a minute: both are no bug."""
    def about(body, tell):
        raise TimeoutError("timed out")
    monkeypatch.setitem(server.questions, "/about", about)
    with socket.create_connection(("127.0.0.1", server.server_port)) as page:
        page.sendall(b"POST /about HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        with page.makefile("rb") as answer:
            assert answer.read().endswith(b"\r\n\r\n")                                     # the head alone
    assert capfd.readouterr().err == ""


def test_max_pixels_holds_for_uploads_from_the_start(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    load(ROOT / "example")
    assert Image.MAX_IMAGE_PIXELS == 178_956_970 / 2


def test_defaults_come_from_the_flags(ask):
    about, = ask("/about")
    assert about["defaults"] == {
        "num": 10, "decoder": "parallel", "feather": 3, "steps": 8, "schedule": "cosine", "choice-temperature": 1.0,
        "temperature": 1.0, "top-k": None, "cfg": 1.0, "order": "confidence", "seed": 0}
    assert about["schedules"] == maskgit.SCHEDULES and about["orders"] == lib.orders.ORDERS
    assert about["decoders"] == ["parallel", "autoregressive"]


def test_only_its_own_page_is_answered(server, ask):
    port = server.server_port
    for path, name in (("/", "index.html"), ("/style.css", "style.css"), ("/app.js", "app.js")):
        text = ask(path, method="GET")
        assert text == (ROOT / "lib" / "demo" / name).read_text()
        # It loads nothing from elsewhere, and has no address but that of SVG's namespace.
        text = text.replace("http://www.w3.org/2000/svg", "").replace('href="data:,"', "")
        assert not re.search(r"@import|url\(|https?:|\bimport\b", text)
    for path in ("/lib/demo/index.html", "/index.html", "/../demo.py", "/etc/passwd", "/?x"):
        ask(path, method="GET", status=404)
    ask("/nothing", {}, status=404)
    ask("/run_id", {}, status=404)
    for headers in ({"Host": f"evil.example:{port}"}, {"Host": ""}, {"Origin": "http://evil.example"},
                    {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{port + 1}"},
                    {"Origin": f"https://127.0.0.1:{port}"}):
        assert "only the page" in ask("/about", {}, status=403, **headers)[0]["error"]
        assert "only the page" in ask("/", method="GET", status=403, **headers)
    assert ask("/about", {}, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0]["size"] == SIZE


def test_the_page_may_load_its_own_files_alone(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", "/")
    policy = connection.getresponse().getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "style-src 'self'" in policy
    assert "unsafe" not in policy


def test_pages_wait_for_each_other_and_a_closed_one_stops(server, models, ask):
    passes = []
    watch = models.models["parallel"].norm.register_forward_pre_hook(lambda *_: passes.append(1))
    body = json.dumps({"settings": {"num": "64", "steps": "64"}, "label": None}).encode()
    page = socket.create_connection(("127.0.0.1", server.server_port))
    page.sendall(b"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    with page.makefile("rb") as answer:
        while b'"done": 2' not in answer.readline():
            pass
    page.close()
    assert ask("/about")[-1]["tokens"] == N                                  # its turn comes when the other has ended
    assert 2 <= len(passes) < 32
    watch.remove()
    with server.lock:
        waiting = http.client.HTTPConnection("127.0.0.1", server.server_port)
        waiting.request("POST", "/about", b"")
        assert json.loads(waiting.getresponse().readline()) == {"waits": True}


def test_a_page_of_another_run_is_told_to_reload(models, ask):
    assert "reload this page" in ask("/about", {}, X_Run="another")[0]["error"]
    assert ask("/about", {}, X_Run=models.run_id)[0]["run_id"] == models.run_id


def test_loading_draws_no_random_weights(monkeypatch):
    """Embedding's would import torch._dynamo, longer than all the rest of the start."""
    drawn = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *arguments, **options: drawn.append(tensor) or tensor)
    load(ROOT / "example")
    assert drawn == []


# ------------------------------------------------------------------------------------------------ other runs

NAMES = ["1", "10", "2", "кот", "naïve", "<b>bold</b>", "日本", "0", "9", "ball"]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run of the example's models with other class names, no sequential decoder, and data at a relative path."""
    folder = tmp_path_factory.mktemp("other") / "runs" / "other"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "example" / "vqgan.pt", folder)
    checkpoint = torch.load(ROOT / "example" / "transformer.pt", weights_only=True)
    torch.save(checkpoint | {"classes": NAMES, "data": "pictures"}, folder / "transformer.pt")
    return folder


def test_a_relative_data_path(other, tmp_path, monkeypatch):
    """From the folder where it was trained it opens; elsewhere the error says what to do."""
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(np.full((40, 40, 3), 10 * i, np.uint8)).save(tmp_path / "pictures" / name / f"{i}.png")
    monkeypatch.chdir(ROOT)
    told = []
    models = load(other)
    with pytest.raises(lib.errors.UserError, match="pictures.*start demo.py in the folder where it was trained"):
        models.validation(b'{"number": 0}', told.append)
    monkeypatch.chdir(tmp_path)
    models.validation(b'{"number": 0}', told.append)
    assert pixels(told[0]["picture"]).shape == (SIZE, SIZE, 3)
    del models.validation_images
    models.checkpoint["data"] = str(tmp_path / "gone")                                # newer runs hold the whole path
    with pytest.raises(lib.errors.UserError, match=f"put the folder back at {tmp_path}/gone$"):
        models.validation(b'{"number": 0}', told.append)


@pytest.mark.parametrize("name, value", [("tokenizer", "another"), ("image_size", 2 * SIZE), ("classes", ["ball", "box"])])
def test_a_sequential_decoder_that_does_not_compare(other, tmp_path, capsys, name, value):
    """It is left out, and said so."""
    shutil.copytree(other, tmp_path / "run")
    checkpoint = torch.load(ROOT / "example" / "autoregressive.pt", weights_only=True) | {"classes": NAMES}
    torch.save(checkpoint | {name: value}, tmp_path / "run" / "autoregressive.pt")
    assert list(load(tmp_path / "run").models) == ["parallel"]
    assert "no Compare" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- the command

@pytest.mark.slow
def test_ctrl_c_ends_it_in_the_midst_of_its_work():
    command = [sys.executable, ROOT / "demo.py", "--run", ROOT / "example", "--port", "0", "--bf16", "no"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    line = process.stdout.readline()
    match = re.search(r"http://127\.0\.0\.1:(\d+)", line)
    assert match, line
    connection = http.client.HTTPConnection("127.0.0.1", int(match[1]))
    connection.request("POST", "/draw", json.dumps({"settings": {"num": "64", "steps": "64"}, "label": None}).encode())
    assert b"done" in connection.getresponse().readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 0 and process.stdout.read() == ""


def test_a_port_in_use(server, call_main):
    last = call_main(demo, ROOT, "--run", ROOT / "example", "--port", server.server_port, code=2)
    assert last.startswith(f"error: port {server.server_port} is not available") and "--port" in last


# ------------------------------------------------------------------------------------------------ images/make.py

@pytest.mark.slow
def test_pictures_of_a_run(call_main, tmp_path, monkeypatch):
    """Those of the README are made of example/; one that cannot be made is left out, and the next is made."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(make, "TIMEOUT", 1)                                  # or playwright or Chromium are missing
    printed = call_main(make, ROOT, "samples", "compare", "data-flow", "limit-boundary", "--out", tmp_path,
                        "--first-run", tmp_path / "none", code=2)
    assert "left out: there is no " in printed and "--first-run" in printed and printed.count("left out: ") == 2
    assert "error: left out for the reasons above: samples, compare" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data-flow.png", "limit-boundary.png"]
    with Image.open(tmp_path / "limit-boundary.png") as rows:
        assert rows.size == (530, 258)                                              # three grids, each with its titles
        photo, _ = Shapes("val", SIZE).batch(np.array([7]))                               # the first moon, which is its input
        shown = np.asarray(rows)[20:84:64 // SIZE, 2:66:64 // SIZE]
    assert (shown == photo[0].movedim(0, -1).numpy()).all()


def test_an_unknown_picture(call_main, tmp_path):
    last = call_main(make, ROOT, "flim", "--out", tmp_path, code=2)
    assert last.startswith("error: there is no picture flim: choose among example, film")


def test_what_a_picture_cannot_be_made_of(tmp_path, capfd):
    with pytest.raises(lib.errors.UserError, match="has no class fish: name a run of shapes"):
        make.label_of(SimpleNamespace(run="run", classes=["a"]), "fish")
    with pytest.raises(lib.errors.UserError, match="nothing.py has failed: see its message above"):
        make.run_script("nothing.py", tmp_path)
    assert "nothing.py" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------- in a browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-sync", "--disable-background-networking",
         "--disable-component-update"]


@pytest.fixture(scope="module")
def browser():
    if not BROWSER:
        pytest.skip("no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(server, link) -> the page, loaded; whatever its console says makes the test fail."""
    said, pages = [], []

    def open_page(server, link="", shows="#status:has-text('in 8 passes: ')"):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        pages.append(page)
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_port}/{link}")
        page.wait_for_selector(shows)
        return page
    yield open_page
    for page in pages:
        page.close()
    assert said == []


@pytest.fixture
def page(server, open_page):
    return open_page(server)


def finished(page, says="in 8 passes: "):
    page.wait_for_selector(f"#status:has-text('{says}')")


def canvas(page, selector):
    """The pixels of a canvas of the page, at the model's size."""
    image = Image.fromarray(pixels(page.eval_on_selector(selector, "canvas => canvas.toDataURL()"))).convert("RGB")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.NEAREST))


def go_to(page, t):
    page.locator("#time").focus()
    page.keyboard.press("Home")
    for _ in range(t):
        page.keyboard.press("ArrowRight")


@contextlib.contextmanager
def busy(server, page):
    """While the server works for somebody else: the question that is asked inside is answered once that has ended."""
    with server.lock:
        yield
        page.wait_for_selector("#waiting:visible")
        time.sleep(0.5)                                                         # so that it is told to wait repeatedly
    page.wait_for_selector("#waiting", state="hidden")


@pytest.mark.slow
def test_page_draws_and_shows_the_steps(page):
    assert page.locator("#images button").count() == 10
    before = canvas(page, "#images canvas")
    page.select_option("[name=class]", label="fish")
    page.fill("[name=num]", "3")
    page.fill("[name=seed]", "4")
    page.click("#go")
    finished(page, "3 images (fish) in 8 passes: ")
    assert page.locator("#images button").count() == 3 and (canvas(page, "#images canvas") != before).any()
    counts = mask_counts("cosine", 8, N)
    go_to(page, 3)
    assert page.text_content("#time-text") == "t = 3 of 8"
    assert page.text_content("#masked-text") == f"still masked: {counts[2]} of {N} tokens"
    assert f"= {counts[2]}." in page.text_content("#sentences")
    assert "log p plus 1 · (1 − 3/8) = 0.63 times Gumbel noise" in page.text_content("#sentences")
    assert f"masked: {counts[2]} of {N}" in page.text_content("#schedule")
    predicted = canvas(page, "#predicted")
    hidden = (predicted != canvas(page, "#masked")).any(2).reshape(SIDE, 4, SIDE, 4).any((1, 3))
    assert hidden.sum() == counts[2]
    page.locator("#confidence").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#token:has-text('row 3, column 1, step 3')")
    assert page.locator(".code").count() >= 8 and page.locator(".code.sampled").count() == 1
    assert "log p ≈" in page.text_content("#token") and "sampled at" not in page.text_content("#token")
    page.fill("[name=temperature]", "0.5")
    page.fill("[name=top-k]", "3")
    page.wait_for_selector("#token:has-text('sampled at temperature 0.5 among the 3 likeliest codes')")
    page.fill("[name=temperature]", "1")
    page.fill("[name=top-k]", "")
    page.wait_for_function("() => result.settings.temperature === 1")
    finished(page, "3 images (fish) in 8 passes: ")
    again = page.context.browser.new_page()                                                   # the link draws the same
    again.goto(page.url)
    finished(again, "3 images (fish) in 8 passes: ")
    go_to(again, 3)
    assert (canvas(again, "#predicted") == predicted).all()
    again.close()


@pytest.mark.slow
def test_page_plays_the_steps(page):
    page.click("#play")
    page.wait_for_selector("#time-text:has-text('t = 2 of 8')")
    page.click("#play")
    shown = page.text_content("#time-text")
    page.wait_for_timeout(1200)
    assert page.text_content("#time-text") == shown and page.text_content("#play") == "▶ Play"
    assert page.is_enabled("#save") and page.is_enabled("#take")
    go_to(page, 0)                                                                            # there is no image yet
    assert page.is_disabled("#save") and page.is_disabled("#take")


@pytest.mark.slow
def test_page_takes_no_part_of_an_answer_for_the_whole(page):
    page.route("**/draw", lambda route: route.fulfill(body='{"done": 1, "of": 8}\n'))
    page.click("#go")
    page.wait_for_selector("#problem:has-text('stopped in the midst of its answer')")
    page.unroute("**/draw")
    page.click("#go")
    finished(page)
    stops_drawing = "() => { run(); const {signal} = drawing; takeValidationImage(0); return signal.aborted; }"
    assert page.evaluate(stops_drawing)
    page.wait_for_selector("#status:has-text('Paint over')")


@pytest.mark.slow
def test_page_before_the_server_has_said_what_it_has(server, open_page):
    """Nothing can be pressed or dropped yet, and the link that was opened is kept."""
    with server.lock:
        page = open_page(server, "#mode=draw&num=1&seed=7", "#waiting:visible")
        for button in ("#go", "label:has([value=edit])"):
            box = page.locator(button).bounding_box()
            page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.evaluate("""() => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File(['text'], 'a.png'));
            document.dispatchEvent(new DragEvent('drop', {dataTransfer}));
        }""")
        assert page.url.endswith("#mode=draw&num=1&seed=7") and page.is_checked("[value=draw]")
    finished(page, "1 image (")
    assert page.evaluate("result.settings.seed") == 7


@pytest.mark.slow
def test_a_request_that_was_taken_over_says_nothing_more(server, open_page):
    """Not even if all of its answer has already come, and only its images are not ready yet."""
    page = open_page(server, "#mode=draw&num=1&steps=1", "#status:has-text('1 image (ball) in 1 pass: ')")
    page.route("**/draw", lambda route: route.fulfill(response=route.fetch()))               # in one piece
    page.evaluate("""() => {
        const {decode} = HTMLImageElement.prototype;
        const released = new Promise(resolve => { window.release = resolve; });
        window.asked = new Promise(resolve => {
            HTMLImageElement.prototype.decode = async function () {
                resolve();
                await released;
                await decode.call(this);
            };
        });
        window.ended = run();
        return asked;
    }""")
    page.check("[value=edit]")
    page.wait_for_selector("#status:has-text('Drop a photo')")
    page.evaluate("() => { release(); return ended; }")
    assert page.text_content("#status").startswith("Drop a photo")


@pytest.mark.slow
def test_no_token_is_asked_for_during_a_drawing(server, page, monkeypatch):
    """The server could not answer; the token that is chosen last is asked for at the end."""
    page.locator("#predicted").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#token:has-text('row 1, column 2, step 8')")
    draw = server.questions["/draw"]
    goes_on = threading.Event()

    def slow_draw(body, tell):
        draw(body, tell)
        goes_on.wait(60)
    monkeypatch.setitem(server.questions, "/draw", slow_draw)
    asked = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    page.click("#go")
    page.wait_for_selector("#status:has-text('pixels')")
    page.locator("#predicted").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(500)
    assert asked == ["draw"] and page.is_hidden("#waiting") and page.is_visible("#token.stale")
    goes_on.set()
    page.wait_for_selector("#token:not(.stale):has-text('row 1, column 3, step 8')")
    assert asked == ["draw", "look"]


@pytest.mark.slow
def test_an_error_about_a_token_goes_away_with_it(page):
    page.route("**/look", lambda route: route.fulfill(body='{"error": "a fault"}\n'))
    page.locator("#predicted").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#token:not(.stale):has-text('a fault')")
    page.unroute("**/look")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#token:has-text('row 1, column 3, step 8')")
    assert page.is_hidden("#problem") and "a fault" not in page.text_content("#token")


@pytest.mark.slow
def test_play_pressed_during_the_timing(server, open_page, monkeypatch):
    """The race goes on, now at the speed of the times that are known at last."""
    goes_on = threading.Event()

    def clock(body, tell):
        tell({"num": 1, "decoder": "parallel"})
        goes_on.wait(60)
        for decoder in ("parallel", "autoregressive"):
            tell({"num": 1, "decoder": decoder, "seconds": 20})
    monkeypatch.setitem(server.questions, "/clock", clock)
    page = open_page(server, "#mode=compare&num=1", "#status:has-text('timing 1 image in parallel')")
    page.evaluate("""() => {
        const start = setInterval;
        window.intervals = [];
        window.setInterval = (action, interval) => {
            intervals.push(interval);
            return start(action, interval);
        };
    }""")
    page.click("#play")
    goes_on.set()
    finished(page, "by both decoders")
    assert page.text_content("#play") == "❚❚ Pause"
    assert page.evaluate("intervals") == [5000 / 512, 20_000 / 512]                # it takes five seconds at least


@pytest.mark.slow
def test_links_of_other_runs(other, server, open_page):
    """Of one with guidance, and of one whose data is there."""
    with served(load(other)) as another:
        page = open_page(another, "#mode=edit&photo=3", "#problem:has-text('cannot be opened')")
        assert page.is_visible("#editor") and page.text_content("#go") == "Repaint"
    page = open_page(server)
    page.evaluate("() => { about.guidance = false; location.hash = '#mode=draw&cfg=1&num=1'; }")
    finished(page, "1 image (ball) in 8 passes")
    assert page.evaluate("result.settings.cfg") == 0


@pytest.mark.slow
def test_page_edits_with_a_brush(page):
    page.check("[value=edit]")
    page.wait_for_selector("#status:has-text('Drop a photo')")
    page.click("#validation")
    page.wait_for_selector("#status:has-text('Paint over')")
    before = canvas(page, "#photo")
    page.fill("#feather", "0")
    box = page.locator("#photo").bounding_box()
    page.select_option("#brush", "1")
    token = box["width"] / SIDE
    page.mouse.move(box["x"] + 2.5 * token, box["y"] + 2.5 * token)                   # the third token of the third row
    page.mouse.down()
    page.mouse.move(box["x"] + 3.5 * token, box["y"] + 2.5 * token)                   # and the fourth
    page.mouse.up()
    finished(page, "10 images (")
    inside = np.zeros((SIZE, SIZE), bool)
    inside[8:12, 8:16] = True
    after = canvas(page, "#predicted")
    assert (after[~inside] == before[~inside]).all() and (after[inside] != before[inside]).any()
    assert page.text_content("#masked-text") == f"still masked: 0 of {N} tokens"
    page.locator("#photo").focus()                                                            # and by the keyboard alone
    page.keyboard.press("ArrowDown")
    page.keyboard.press(" ")
    page.wait_for_function("() => result.counts[0] === 3")
    finished(page, "10 images (")
    page.check("#erase")
    page.locator("#photo").focus()
    page.keyboard.press(" ")
    page.wait_for_function("() => result.counts[0] === 2")
    finished(page, "10 images (")
    go_to(page, 6)
    assert "= 0, but at least one stays masked: 1." in page.text_content("#sentences")
    assert "the 1 least confident is masked again; 0 are kept." in page.text_content("#sentences")
    with page.expect_download() as download:
        page.click("#save")
    assert np.asarray(Image.open(download.value.path())).shape == (SIZE, SIZE, 3)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    page.wait_for_selector("#problem:has-text('not a readable image')")


@pytest.mark.slow
def test_a_link_keeps_an_edit(server, page, open_page):
    page.check("[value=edit]")
    page.click("#validation")
    page.wait_for_selector("#status:has-text('Paint over')")
    page.click("#validation")                                                                              # the second
    page.click("#centre")
    finished(page, "the class that fits best")
    assert "in turn" not in page.text_content("#status") and page.input_value("#brush") == str(SIDE // 4)
    assert page.input_value("#feather") == "3"
    again = open_page(server, "#" + page.url.partition("#")[2])
    assert (canvas(again, "#photo") == canvas(page, "#photo")).all()
    assert (canvas(again, "#predicted") == canvas(page, "#predicted")).all()
    # Of 50 tokens, in float32 as the decoder rounds, linear leaves 45 after a tenth of the steps; exactly, 44.999 999.
    page.evaluate(f"() => {{ location.hash = '#mode=edit&photo=1&num=1&steps=10&schedule=linear&region={50 * '1'}'; }}")
    finished(page, "1 image (")
    go_to(page, 1)
    assert page.text_content("#sentences li:nth-child(3)").endswith("⌊0.900 · 50⌋ = 45.")


@pytest.mark.slow
def test_page_compares_on_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.check("[value=compare]")
    finished(page, "1 image (ball) by both decoders")
    assert page.text_content("#play") == "❚❚ Pause"                                           # the race starts by itself
    assert page.locator("#times tr").count() == 3 and "…" not in page.text_content("#times")
    # With these times, after a quarter of the race parallel decoding is done, and the other one has done a quarter of its passes.
    page.evaluate("""() => {
        pause();
        const slow = {parallel: 1.6, autoregressive: 0.8};
        timings = {1: {parallel: 0.1, autoregressive: 0.4}, 4: {parallel: 0.4, autoregressive: 0.4}, 16: slow};
        showTable();
        goTo(MOMENTS / 4);
    }""")
    assert page.text_content("#parallel-clock") == page.text_content("#autoregressive-clock") == "0.100 s"
    assert page.text_content("#parallel-passes") == "pass 8 of 8"
    assert page.text_content("#autoregressive-passes") == f"pass {N // 4} of {N}"
    assert page.locator("#parallel-track i.done").count() == 8
    assert page.locator("#autoregressive-track i.done").count() == N // 4
    widths = [page.locator(f"#{name}-track").bounding_box()["width"] for name in ("parallel", "autoregressive")]
    assert widths[0] == pytest.approx(widths[1] / 4, abs=1)
    assert page.locator("#axis span").all_text_contents() == ["0 s", "0.1 s", "0.2 s", "0.3 s"]
    assert "guidance 1" in page.text_content("#parallel-text")
    later = canvas(page, "#sequential-images canvas").reshape(SIDE, 4, SIDE, 4, 3).transpose(0, 2, 1, 3, 4).reshape(N, -1)
    assert (later[N // 4:] == 128).all() and not (later[:N // 4] == 128).all(1).any()
    rows = [row.split() for row in page.locator("#times tr").all_inner_texts()]
    assert [row[-3:] for row in rows] == [["4.0", "×", "faster"], ["1.0", "×", "faster"], ["2.0", "×", "slower"]]
    reasons = page.locator("#reasons p").all_text_contents()
    assert "16.0 times as long" in reasons[0] and "arithmetic" in reasons[0]
    assert "2.0 times as long" in reasons[1] and "operations to start" in reasons[1]
    assert f"8 passes against {N}, {16 * N} tokens computed for an image against {N}" in reasons[2]
    page.evaluate("() => { about.device = 'cuda:0'; showTable(); }")
    reasons = page.locator("#reasons p").all_text_contents()
    assert "for the CPU to start the operations" in reasons[1] and "the passes decide" in reasons[2]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("() => { timings = {1: {}, 16: timings[16]}; showTable(); }")
    assert page.text_content("#reasons") == ""                      # of one image is not known yet how long it takes
    page.evaluate("() => { timings = {}; showTable(); showStep(); }")
    assert page.text_content("#autoregressive-passes") == page.text_content("#autoregressive-clock") == ""
    drawn = canvas(page, "#images canvas")
    page.check("[value=edit]")                                      # the panels show what was compared, step by step
    page.wait_for_selector("#status:has-text('Drop a photo')")
    assert page.text_content("#time-text") == "t = 8 of 8" and (canvas(page, "#predicted") == drawn).all()
    assert page.text_content("#masked-text") == f"still masked: 0 of {N} tokens"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.check("[value=draw]")                                                                # where ten are the default
    finished(page, "10 images")
    assert page.is_visible("#masked") and not page.is_visible("#race")


@pytest.mark.slow
def test_every_answer_passes_over_the_waits(server, page):
    """The token panel, a photo, a validation image, and drawing: each waits its turn and then gets its answer."""
    with busy(server, page):
        page.locator("#predicted").focus()
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#token:has-text('row 1, column 2, step 8')")
    page.check("[value=edit]")
    with busy(server, page):
        page.click("#validation")
    page.wait_for_selector("#photo:visible")
    first = canvas(page, "#photo")
    file = {"name": "a.png", "mimeType": "image/png", "buffer": as_file(np.full((50, 50, 3), 200, np.uint8))}
    with busy(server, page):
        page.set_input_files("#file", file)
    page.wait_for_selector("#status:has-text('Paint over')")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy-link")
    page.wait_for_selector("#copy-link:has-text('Copied, without the photo')")
    assert (canvas(page, "#photo") == 200).all() and (first != 200).any()
    with busy(server, page):
        page.click("#centre")
    finished(page, "the class that fits best")
    page.wait_for_selector("#token:has-text('known from the start')")         # of the edit, no longer of what was drawn


@pytest.mark.slow
def test_page_of_a_run_with_other_classes(other, open_page):
    """Numbers and any letters are names; without a sequential decoder there is nothing to compare with."""
    with served(load(other)) as server:
        page = open_page(server, "#mode=compare&schedule=unknown")
        assert not page.is_visible("#compare") and page.is_checked("[value=draw]")
        assert page.input_value("[name=schedule]") == "cosine"
        assert page.locator("#images button").all_text_contents() == NAMES
        page.fill("[name=num]", "1")
        for label in (1, 4, 5, 7):
            name = NAMES[label]
            page.select_option("[name=class]", label=name)
            finished(page, f"({name}) in 8 passes")
            assert set(page.evaluate("result.labels")) == {label}


@pytest.mark.slow
def test_page_left_open_while_the_server_restarts(models, other, open_page):
    """The same run goes on; of another one the page says that it must be loaded again."""
    with served(models) as server:
        page = open_page(server)
    with served(models, server.server_port):
        page.click("#new-seed")
        page.wait_for_selector("#status:has-text('pass ')")
        finished(page)
    with served(load(other), server.server_port) as another:
        page.click("#new-seed")
        page.wait_for_selector("#problem:has-text('reload this page')")
        assert open_page(another).locator("#images button").all_text_contents() == NAMES


@pytest.mark.slow
def test_page_takes_a_new_order_and_a_new_schedule(server, open_page, monkeypatch):
    """They are named by the server alone: nothing is to be changed in the page."""
    monkeypatch.setitem(maskgit.GAMMAS, "steep", lambda r, N: (1 - r) ** 3)
    monkeypatch.setattr(lib.sampling, "make_order", lambda *arguments: by_chance())
    lib.orders.ORDERS.append("strange")
    maskgit.SCHEDULES.append("steep")
    try:
        page = open_page(server)
        page.select_option("[name=order]", "strange")
        page.select_option("[name=schedule]", "steep")
        page.wait_for_function("() => result.settings.order === 'strange' && result.settings.schedule === 'steep'")
        finished(page)
        go_to(page, 4)
        page.locator("#confidence").focus()
        page.keyboard.press("ArrowDown")
        page.wait_for_selector("#token:has-text('row 2, column 1, step 4')")
        text = page.text_content("body")
        assert "the order “strange” gives its confidence" in text and f"= {N // 8}." in text         # ⌊(1 − 4/8)³ · N⌋
        assert "undefined" not in text and "NaN" not in text
    finally:
        lib.orders.ORDERS.remove("strange")
        maskgit.SCHEDULES.remove("steep")
