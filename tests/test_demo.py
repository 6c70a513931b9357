"""demo.py: what the server answers, and the page in a real browser, where Chromium and playwright are there."""
import base64
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
import zlib
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from PIL import Image

import demo
from lib.data import Shapes
from lib.editing import likeliest_class
from lib.runtime import Machine
from maskgit import decode, decode_sequential, gamma, guided_logits, mask_counts
from vqgan import as_grid

CENTRE = [int(2 <= i % 8 < 6 and 2 <= i // 8 < 6) for i in range(64)]


@pytest.fixture(scope="module")
def server():
    """The server on the models in example/, in a thread of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), demo.Page)
    args = SimpleNamespace(run=str(ROOT / "example"), vqgan=None, data_dir="data", max_pixels=178_956_970)
    server.demo = demo.Demo(args, Machine("cpu", bf16=False))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


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
        return [json.loads(line) for line in text.splitlines()] if method == "POST" else text.decode()
    return ask


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


def drawn(lines):
    """The answer to /draw: how many passes were told of, the steps in numbers, and the images of each step."""
    passes = [line for line in lines if "done" in line]
    steps, = (line for line in lines if "predicted" in line)
    return len(passes), steps, {line["step"]: np.stack([pixels(url) for url in line["images"]])
                                for line in lines if "images" in line}


# ------------------------------------------------------------------------------------------------ what is answered

def test_the_steps_are_those_of_decode(server, ask):
    settings = {"class": "", "num": "12", "steps": "6", "schedule": "square", "choice-temperature": "3",
                "temperature": "0.9", "top-k": "50", "order": "confidence", "seed": "5"}
    lines = ask("/draw", {"settings": settings})
    passes, steps, images = drawn(lines)
    model, tokenizer = server.demo.models["parallel"], server.demo.tokenizer
    labels = torch.arange(12) % 10
    _, history = decode(model, labels, 6, "square", choice_temperature=3, temperature=0.9, top_k=50, cfg=1.0,
                        generator=torch.Generator().manual_seed(5), return_steps=True)
    assert passes == 6 and steps["labels"] == labels.tolist() and sorted(images) == [1, 2, 3, 4, 5, 6]
    for t, (predicted, masked, confidence) in enumerate(history):
        assert steps["predicted"][t] == predicted.tolist() and steps["masked"][t] == masked.int().tolist()
        known = confidence.isinf()
        assert np.allclose(steps["confidence"][t], confidence.masked_fill(known, 0), atol=6e-4)
        assert (images[t + 1] == as_bytes(tokenizer.decode(as_grid(predicted)))).all()
    assert steps["counts"] == [64, *mask_counts("square", 6, 64)] == [64, *(sum(masks[0]) for masks in steps["masked"])]
    assert np.allclose(steps["gammas"], [gamma(t / 6, "square", 64) for t in range(7)])
    assert np.allclose(steps["curve"][::20], [gamma(r / 5, "square", 64) for r in range(6)]) and all(steps["unknown"])
    assert drawn(ask("/draw", {"settings": settings}))[1]["predicted"] == steps["predicted"]           # the same again


def test_a_class_and_the_sequential_decoder(server, ask):
    settings = {"class": "fish", "num": "3", "decoder": "autoregressive"}
    passes, steps, images = drawn(ask("/draw", {"settings": settings}))
    model = server.demo.models["autoregressive"]
    tokens = decode_sequential(model, torch.full((3,), 3), generator=torch.Generator().manual_seed(0))
    assert passes == 64 and steps["predicted"] == [tokens.tolist()] and not np.any(steps["masked"])
    assert steps["class"] == "fish" and (images[1] == as_bytes(server.demo.tokenizer.decode(as_grid(tokens)))).all()


def test_look_shows_what_was_sampled_from(server, ask):
    """The probabilities are the model's; without noise, as in the last step, log p is the confidence."""
    settings = {"num": "4", "steps": "5", "seed": "1", "choice-temperature": "0"}
    _, steps, images = drawn(ask("/draw", {"settings": settings}))
    before, predicted, masked = steps["predicted"][2][2], steps["predicted"][3][2], steps["masked"][2][2]
    tokens = [None if mask else code for code, mask in zip(before, masked)]
    model, tokenizer = server.demo.models["parallel"], server.demo.tokenizer
    given = torch.tensor([[model.mask_id if code is None else code for code in tokens]])
    p = guided_logits(model, given, torch.tensor([2]), 1 * 4 / 5)[0].softmax(-1)
    # A place where an unlikely token was sampled: it is shown besides the eight likeliest.
    cell = next(place for place in range(64) if masked[place] and predicted[place] not in p[place].topk(8).indices)
    request = {"settings": settings, "label": 2, "step": 4, "tokens": tokens, "predicted": predicted, "cell": cell}
    answer, = ask("/look", request)
    best = p[cell].topk(8)
    assert answer["codes"][:8] == best.indices.tolist() and np.allclose(answer["p"][:8], best.values, rtol=1e-4)
    chance = answer["p"][answer["codes"].index(predicted[cell])]
    assert np.log(chance) == pytest.approx(steps["confidence"][3][2][cell], abs=2e-3)
    # The patch of the code that was sampled is cut out of the image as it is: 3 x 3 tokens, inside of its borders.
    row, column = (min(max(place - 1, 0), 5) * 4 for place in divmod(cell, 8))
    patch = pixels(answer["patches"][answer["codes"].index(predicted[cell])])
    assert np.abs(patch.astype(int) - images[4][2][row:row + 12, column:column + 12]).max() <= 1
    changed = torch.tensor([predicted]).repeat(2, 1)
    changed[1, cell] = answer["codes"][0]
    whole = as_bytes(tokenizer.decode(as_grid(changed)))[1]
    assert np.abs(pixels(answer["patches"][0]).astype(int) - whole[row:row + 12, column:column + 12]).max() <= 1


def test_an_edit_changes_the_region_alone(server, ask):
    photo, = ask("/validation", {"number": 7})
    images, _ = Shapes("val").batch(np.array([7]))
    assert (pixels(photo["picture"]) == images[0].movedim(0, -1).numpy()).all()
    request = {"settings": {"num": "3", "class": "heart"}, "picture": photo["picture"], "region": CENTRE}
    _, steps, frames = drawn(ask("/draw", request))
    inside = np.kron(np.reshape(CENTRE, (8, 8)), np.ones((4, 4))) > 0
    was = pixels(photo["picture"])
    for frame in frames.values():
        assert (frame[:, ~inside] == was[~inside]).all() and (frame[:, inside] != was[inside]).any()
    model, tokens = server.demo.models["parallel"], server.demo.tokenizer.encode(images / 255).flatten()
    known = torch.where(torch.tensor(CENTRE) > 0, model.mask_id, tokens)
    painted = decode(model, torch.full((3,), 6), known=known.expand(3, -1), cfg=1.0,
                     generator=torch.Generator().manual_seed(0))
    assert steps["predicted"][-1] == painted.tolist() and steps["counts"] == [16, *mask_counts("cosine", 8, 16)]
    assert steps["unknown"] == [bool(place) for place in CENTRE]
    soft = drawn(ask("/draw", request | {"settings": request["settings"] | {"feather": "3"}}))[2][8]
    assert (soft[:, ~inside] != was[~inside]).any() and (soft[:, inside] == frames[8][:, inside]).all()
    likeliest = drawn(ask("/draw", request | {"settings": {"num": "1"}}))[1]
    assert likeliest["labels"] == [likeliest_class(model, known, 0)] and "likeliest" in likeliest["class"]


def test_photos(ask):
    """Any file that is an image comes back as the model takes it; others are named for what they are."""
    wide = np.zeros((60, 100, 3), np.uint8)
    wide[:, 20:80] = 200
    for kind in ("png", "jpeg", "gif"):
        answer, = ask("/photo", as_file(wide, kind))
        assert pixels(answer["picture"]).shape == (32, 32, 3) and pixels(answer["picture"]).min() > 150
    assert "not a readable image" in ask("/photo", b"hello")[0]["error"]
    assert "not a readable image" in ask("/photo", as_file(wide)[:100])[0]["error"]
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n" + len(header[4:]).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    assert "too large" in ask("/photo", bomb + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")[0]["error"]
    assert "20 MB" in ask("/photo", bytes(20_000_001), status=413)[0]["error"]


@pytest.mark.parametrize("settings, says", [
    ({"steps": "0"}, "at least 1"), ({"steps": "65"}, "the number of tokens, 64"), ({"class": "dog"}, "unknown class"),
    ({"num": "65"}, "from 1 to 64"), ({"schedule": "x"}, "--schedule"), ({"cfg": "-1"}, "--cfg"),
    ({"top-k": "300"}, "codebook, 256"), ({"temperature": "nan"}, "--temperature"), ({"run": "/etc"}, "unrecognized"),
    ({"decoder": "x"}, "--decoder"), ({"seed": "-1"}, "--seed")])
def test_bad_settings(ask, settings, says):
    *_, last = ask("/draw", {"settings": settings})
    assert says in last["error"] and len(last) == 1


def test_bad_requests(ask):
    for body in (b"", b"[]", b"{}", {"settings": {}, "picture": "x", "region": CENTRE},
                 {"settings": {}, "picture": demo.data_url(torch.zeros(3, 32, 32)), "region": [1, 0]}):
        assert set(ask("/draw", body)[-1]) == {"error"}
    request = {"settings": {}, "picture": demo.data_url(torch.zeros(3, 32, 32)), "region": [0] * 64}
    assert "nothing is painted over" in ask("/draw", request)[-1]["error"]
    look = {"settings": {}, "label": 0, "step": 1, "tokens": [None] * 64, "predicted": [0] * 64, "cell": 64}
    assert set(ask("/look", look)[0]) == {"error"}
    assert ask("/about")[0]["tokens"] == 64                                                   # it answers all the same


def test_only_its_own_page_is_answered(server, ask):
    port = server.server_port
    page = ask("/", method="GET")
    assert page == (ROOT / "lib" / "demo.html").read_text()
    assert not re.search(r"""(src|href)=['"](?!data:)|@import|url\(|https?:""", page)                 # it loads nothing
    for path in ("/lib/demo.html", "/../demo.py", "/etc/passwd", "/?x"):
        ask(path, method="GET", status=404)
    ask("/nothing", {}, status=404)
    for headers in ({"Host": f"evil.example:{port}"}, {"Host": ""}, {"Origin": "http://evil.example"},
                    {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{port + 1}"},
                    {"Origin": f"https://127.0.0.1:{port}"}):
        assert "only the page" in ask("/about", {}, status=403, **headers)[0]["error"]
        assert "only the page" in ask("/", method="GET", status=403, **headers)
    assert ask("/about", {}, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0]["size"] == 32


def test_pages_wait_for_each_other_and_a_closed_one_stops(server, ask):
    model, passes = server.demo.models["parallel"], []
    watch = model.norm.register_forward_pre_hook(lambda *_: passes.append(1))
    body = json.dumps({"settings": {"num": "64", "steps": "64"}}).encode()
    page = socket.create_connection(("127.0.0.1", server.server_port))
    page.sendall(b"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    with page.makefile("rb") as answer:
        while b'"done": 2' not in answer.readline():
            pass
    page.close()
    assert ask("/about")[-1]["tokens"] == 64                                  # its turn comes when the other has ended
    assert 2 <= len(passes) < 32 and list(model.norm._forward_pre_hooks) == [watch.id]
    watch.remove()
    with server.demo.lock:
        waiting = http.client.HTTPConnection("127.0.0.1", server.server_port)
        waiting.request("POST", "/about", b"")
        assert json.loads(waiting.getresponse().readline()) == {"waits": True}


# --------------------------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def address():
    """The address that `demo.py --port 0` prints; in the end Ctrl-C must end it, in the midst of its work."""
    command = [sys.executable, ROOT / "demo.py", "--run", ROOT / "example", "--port", "0", "--bf16", "no"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
    yield found[0]
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]))
    connection.request("POST", "/draw", json.dumps({"settings": {"num": "64", "steps": "64"}}).encode())
    assert b"done" in connection.getresponse().readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 0 and process.stdout.read() == ""


def test_a_port_in_use(address):
    port = address.rpartition(":")[2]
    refused("demo.py", "--run", ROOT / "example", "--port", port, says=[f"port {port}", "--port"])


# --------------------------------------------------------------------------------------------------- in a browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-sync", "--disable-background-networking",
         "--disable-component-update"]


@pytest.fixture
def page(address):
    """The page, loaded; whatever its console says makes the test fail."""
    if not BROWSER:
        pytest.skip("no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    said = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        finished(page)
        yield page
        browser.close()
    assert said == []


def finished(page, says="in 8 passes: "):
    page.wait_for_selector(f"#status:has-text('{says}')")


def canvas(page, selector):
    """The pixels of a canvas of the page, at the model's size."""
    image = Image.fromarray(pixels(page.eval_on_selector(selector, "canvas => canvas.toDataURL()"))).convert("RGB")
    return np.asarray(image.resize((32, 32), Image.Resampling.NEAREST))


def go_to(page, t):
    page.locator("#t").focus()
    page.keyboard.press("Home")
    for _ in range(t):
        page.keyboard.press("ArrowRight")


def test_page_draws_and_shows_the_steps(page):
    assert page.locator("#images button").count() == 10
    before = canvas(page, "#images canvas")
    page.select_option("[name=class]", label="fish")
    page.fill("[name=num]", "3")
    page.fill("[name=seed]", "4")
    page.click("#go")
    finished(page, "3 images (fish) in 8 passes: ")
    assert page.locator("#images button").count() == 3 and (canvas(page, "#images canvas") != before).any()
    counts = mask_counts("cosine", 8, 64)
    go_to(page, 3)
    assert page.text_content("#now") == "t = 3 of 8"
    assert f"masked: {counts[2]} of 64" in page.text_content("#maskedCount").replace("stays ", "")
    assert f"= {counts[2]}." in page.text_content("#lines")
    assert f"masked: {counts[2]} of 64" in page.text_content("#gamma")
    hidden = (canvas(page, "#predicted") != canvas(page, "#masked")).any(2).reshape(8, 4, 8, 4).any((1, 3))
    assert hidden.sum() == counts[2]
    page.locator("#confidence").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#token:has-text('row 3, column 1, step 3')")
    assert page.locator(".code").count() >= 8 and page.locator(".code.sampled").count() == 1
    again = page.context.browser.new_page()               # the link draws the same
    again.goto(page.url)
    finished(again, "3 images (fish) in 8 passes: ")
    go_to(again, 3)
    assert (canvas(again, "#predicted") == canvas(page, "#predicted")).all()


def test_page_edits_with_a_brush(page):
    page.check("[value=edit]")
    page.wait_for_selector("#status:has-text('Drop a photo')")
    page.click("#another")
    page.wait_for_selector("#status:has-text('Paint over')")
    was = canvas(page, "#photo")
    box = page.locator("#photo").bounding_box()
    page.select_option("#brush", "1")
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)    # the third token of the third row
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.44, box["y"] + box["height"] * 0.3)   # and the fourth
    page.mouse.up()
    finished(page, "10 images (")
    inside = np.zeros((32, 32), bool)
    inside[8:12, 8:16] = True
    now = canvas(page, "#predicted")
    assert (now[~inside] == was[~inside]).all() and (now[inside] != was[inside]).any()
    assert page.text_content("#maskedCount") == "what stays masked: 0 of 64"
    page.locator("#photo").focus()                                                        # and by the keyboard alone
    page.keyboard.press("ArrowDown")
    page.keyboard.press(" ")
    page.wait_for_function("() => result.counts[0] === 3")
    finished(page, "10 images (")
    with page.expect_download() as download:
        page.click("#save")
    assert np.asarray(Image.open(download.value.path())).shape == (32, 32, 3)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    page.wait_for_selector("#message:has-text('not a readable image')")


def test_page_compares_on_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.check("[value=compare]")
    finished(page, "token by token in 64 passes")
    assert page.locator("#rivals button").count() == 10
    go_to(page, 20)
    assert page.text_content("#title2") == "token by token: 20 of 64 passes"
    later = canvas(page, "#rivals canvas").reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, -1)
    assert (later[20:] == 128).all() and not (later[:20] == 128).all(1).any()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
