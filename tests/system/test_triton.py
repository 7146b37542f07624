"""A real server of the demo: results, batches, streams, and what a client may not do."""

import asyncio
import base64
import io
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import DATA, ROOT
from pictures import PHOTO, encoded, pixels, small_png
from PIL import Image

triton = pytest.importorskip("tritonclient.grpc", reason="needs the triton extra")
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from engine import Restorer
from engine.errors import ImageError, UsageError
from engine.image.decoding import decode_photo
from engine.image.files import read_provenance
from triton_repo.client import AsyncClient, Client
from triton_repo.protocol import StoppedError

pytestmark = pytest.mark.timeout(600)

STEPS = 3
#: Worked at 64 × 64 pixels.
SMALL = {"min_size": 64}


@pytest.fixture(scope="module")
def url(server):
    return f"127.0.0.1:{server.ports.grpc}"


@pytest.fixture
def client(url):
    with Client(url, timeout_s=240) as opened:
        yield opened


@pytest.fixture(scope="module")
def direct(demo_bundle):
    """The engine itself, on the same bundle."""
    with Restorer.open(demo_bundle) as restorer:
        yield restorer


def counted(server, name, **labels):
    """Return the sum of a metric over all labels but those that are given."""
    total = 0.0
    for line in server.metrics().splitlines():
        match = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
        if match and match[1] == name and all(f'{key}="{value}"' in match[2] for key, value in labels.items()):
            total += float(match[3])
    return total


def inputs(library, image, options):
    given = []
    for name, value in (("image", image), ("options", options)):
        tensor = library.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value], dtype=np.object_))
        given.append(tensor)
    return given


# -- results --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_command(demo_bundle, tmp_path_factory):
    """What `python -m engine.restore` makes of the photo: file, pixels and provenance."""
    import sys

    output = tmp_path_factory.mktemp("command") / "out.png"
    command = ["-m", "engine.restore", str(DATA / "coffee-damaged.jpg"), "-o", str(output), "--quiet"]
    command += ["--bundle", str(demo_bundle), "--steps", str(STEPS), "--seed", "7"]
    subprocess.run([sys.executable, *command], check=True, timeout=200)
    return output


def assert_same_picture(data, expected):
    """Assert equal pixels, and that neither zeros nor shuffled pixels would pass."""
    found = pixels(data)
    assert np.array_equal(found, expected)
    assert not np.array_equal(np.zeros_like(found), expected)
    assert not np.array_equal(np.random.default_rng(0).permutation(found.reshape(-1)).reshape(found.shape), expected)


def made_by(file):
    """Return how a result of the command's was made; the photo's file, which it names too, a server never has."""
    return {name: value for name, value in read_provenance(file).items() if name != "photo"}


def test_grpc_gives_the_pixels_of_the_command(client, by_command):
    result = client.restore(PHOTO, steps=STEPS, seed=7)
    assert_same_picture(result.image, np.asarray(Image.open(by_command)))
    assert result.provenance == made_by(by_command)


def test_http_gives_the_pixels_of_the_command(server, by_command):
    with triton_http.InferenceServerClient(f"127.0.0.1:{server.ports.http}", network_timeout=240) as http:
        options = json.dumps({"steps": STEPS, "seed": 7}).encode()
        answer = http.infer("restore", inputs(triton_http, PHOTO, options))
        assert_same_picture(answer.as_numpy("restored")[0], np.asarray(Image.open(by_command)))
        assert json.loads(answer.as_numpy("settings")[0]) == made_by(by_command)


def posted(server, path, body):
    """Return what the server answers to JSON."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.ports.http}/v2/models/{path}", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=240) as answer:
        return answer.read().decode()


def test_json_clients_send_and_get_base64(server, client):
    expected = client.restore(small_png(), steps=1, seed=11, **SMALL)
    photo = base64.b64encode(small_png()).decode()
    options = json.dumps({"encoding": "base64", "steps": 1, "seed": 11, **SMALL})
    answer = json.loads(posted(server, "restore/generate", {"image": photo, "options": options}))
    assert base64.b64decode(answer["restored"], validate=True) == expected.image
    assert json.loads(answer["settings"]) == expected.provenance
    tensors = [
        {"name": name, "shape": [1], "datatype": "BYTES", "data": [value]}
        for name, value in (("image", photo), ("options", options))
    ]
    answer = json.loads(posted(server, "restore/infer", {"inputs": tensors}))
    outputs = {output["name"]: output["data"][0] for output in answer["outputs"]}
    assert base64.b64decode(outputs["restored"], validate=True) == expected.image
    options = json.dumps({"encoding": "base64", "steps": 2, "seed": 11, "preview_every": 1, **SMALL})
    lines = posted(server, "restore_stream/generate_stream", {"image": photo, "options": options}).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    kinds = [json.loads(event["event"])["kind"] for event in events]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "result"
    for event, kind in zip(events, kinds, strict=True):
        if kind in ("preview", "result"):
            assert pixels(base64.b64decode(event["restored"], validate=True)).shape[2] == 3


def test_the_curl_command_of_the_documentation(server, client, tmp_path):
    if not all(map(shutil.which, ("bash", "curl", "jq", "base64"))):
        pytest.skip("needs bash, curl, jq and base64")
    (commands,) = re.findall(r"^```bash\n(printf .*?)```", (ROOT / "docs" / "serving.md").read_text(), re.M | re.S)
    assert len(commands.splitlines()) == 2
    assert "localhost:8000" in commands
    assert commands.count("steps") == 1
    commands = commands.replace("localhost:8000", f"127.0.0.1:{server.ports.http}")
    commands = commands.replace("steps", 'min_size\\\\": 64, \\\\"steps')  # quicker
    (tmp_path / "photo.jpg").write_bytes(small_png())
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True, timeout=240)
    expected = client.restore(small_png(), steps=3, **SMALL).image
    assert (tmp_path / "restored.png").read_bytes() == expected


@pytest.mark.parametrize(
    ("encoding", "photo", "sentence"),
    [("binary", base64.b64encode(PHOTO), '"encoding": "base64"'), ("base64", PHOTO, "image: is no base64")],
)
def test_who_mixes_the_encodings_is_told_what_to_do(client, encoding, photo, sentence):
    with pytest.raises(ImageError, match=sentence):
        client.restore(photo, encoding=encoding)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "dpmpp2m", "cfg_scale": [1.0, 3.0], "prompt": "a cup of coffee", "restore_pull": 2.0},
        {"upscale": 1.5, "color_fix": "adain", "cfg_scale": 1.0, "restore_pull": None},
        {"churn": 5.0, "color_fix": "none", "negative_prompt": "cup " * 100},
    ],
    ids=["dpmpp2m", "upscaled and unguided", "churn and a long text"],
)
def test_settings_mean_what_they_mean_to_the_engine(client, direct, options):
    result = client.restore(small_png(), steps=2, seed=3, **SMALL, **options)
    alone = direct.restore(decode_photo(small_png()), steps=2, seed=3, **SMALL, **options)
    assert_same_picture(result.image, np.rint(alone.photo.rgb.clip(0, 1) * np.float32(255)).astype(np.uint8))
    assert result.provenance == alone.provenance


def test_transparency_comes_back(client):
    glass = np.zeros((40, 60, 4), np.uint8)
    glass[:, 30:, 3] = 255
    result = client.restore(encoded(Image.fromarray(glass, "RGBA")), steps=1, format="webp", **SMALL)
    assert Image.open(io.BytesIO(result.image)).format == "WEBP"
    assert np.array_equal(pixels(result.image)[:, :, 3], glass[:, :, 3])


def test_photos_share_batches_and_each_is_what_it_is_alone(server, client, direct):
    """Different seeds and prompts, one shape and one table of steps; another table runs by itself."""
    requests = [{"seed": seed, "prompt": prompt} for seed, prompt in enumerate(["", "a cup", "a plate", "coffee"])]
    requests.append({"seed": 9, "churn": 3.0})
    for request in requests:  # texts are encoded one by one, and kept: new ones spread the photos on a busy machine
        client.restore(small_png(), steps=1, **SMALL, **request)
    before = counted(server, "restoration_batch_requests_count", model="sample")

    async def together():
        async with AsyncClient(f"127.0.0.1:{server.ports.grpc}", timeout_s=240) as opened:
            return await asyncio.gather(
                *(opened.restore(small_png(), steps=6, **SMALL, **request) for request in requests)
            )

    results = asyncio.run(together())
    batches = counted(server, "restoration_batch_requests_count", model="sample") - before
    assert 1 <= batches < len(requests)
    for request, result in zip(requests, results, strict=True):
        alone = direct.restore(decode_photo(small_png()), steps=6, **SMALL, **request).photo.rgb
        assert np.array_equal(pixels(result.image), np.rint(alone.clip(0, 1) * np.float32(255)).astype(np.uint8))
    assert len({result.image for result in results}) == len(requests)


def test_tiles_are_those_of_each_request(server, direct):
    """Requests that differ in nothing but their tiles come together, and none gets another's."""
    requests = [{"tile": "off"}, {"tile": 256}]

    async def together():
        async with AsyncClient(f"127.0.0.1:{server.ports.grpc}", timeout_s=240) as opened:
            return await asyncio.gather(*(opened.restore(PHOTO, steps=1, seed=8, **request) for request in requests))

    results = asyncio.run(together())
    for request, result in zip(requests, results, strict=True):
        alone = direct.restore(decode_photo(PHOTO), steps=1, seed=8, **request)
        assert_same_picture(result.image, np.rint(alone.photo.rgb.clip(0, 1) * np.float32(255)).astype(np.uint8))
        assert result.provenance == alone.provenance
    assert results[0].image != results[1].image


def test_equal_requests_are_answered_from_the_cache_and_another_seed_is_not(server, client):
    first = client.restore(small_png(), steps=1, seed=21, **SMALL)
    steps = counted(server, "restoration_steps_total")
    assert client.restore(small_png(), steps=1, seed=21, **SMALL) == first
    assert counted(server, "restoration_steps_total") == steps
    other = client.restore(small_png(), steps=1, seed=22, **SMALL)
    assert counted(server, "restoration_steps_total") == steps + 1
    assert other.image != first.image


def test_metrics_tell_stages_batches_steps_and_failures(server, client):
    client.restore(small_png(), steps=1, seed=31, **SMALL)
    with pytest.raises(Exception, match="is not an image"):
        client.restore(b"no image")
    for stage in ("preprocess", "denoise_encoder", "vae_decoder", "text", "controlnet", "unet", "postprocess"):
        assert counted(server, "restoration_stage_seconds_count", stage=stage) >= 1, stage
        assert counted(server, "restoration_stage_seconds_sum", stage=stage) > 0, stage
    assert counted(server, "restoration_batch_requests_count", model="vae_decoder") >= 2
    assert counted(server, "restoration_failures_total", model="preprocess", reason="bad request") >= 1
    assert counted(server, "nv_inference_queue_duration_us", model="sample") > 0
    assert counted(server, "nv_inference_request_failure", model="restore") >= 1


# -- streams --------------------------------------------------------------------------------------


REFUSED_STREAMS = [
    (b"hello", {}, ImageError, "is not an image"),
    (PHOTO, {"steps": 0}, UsageError, "impossible"),
    (PHOTO, {"colour": 1}, UsageError, "unknown option"),
    (PHOTO, {"steps": 200, "timeout_s": 0.05}, StoppedError, "time|stopped|deadline"),
]


@pytest.mark.parametrize(("image", "options", "kind", "message"), REFUSED_STREAMS)
def test_an_error_of_a_stream_is_of_its_kind(server, client, image, options, kind, message):
    """And browsers are told, too, in the stream's last event."""
    with pytest.raises(kind, match=message):
        list(client.stream(image, **options))
    request = {"image": base64.b64encode(image).decode(), "options": json.dumps({"encoding": "base64", **options})}
    *_, last = (line for line in posted(server, "restore_stream/generate_stream", request).splitlines() if line)
    event = json.loads(json.loads(last.removeprefix("data: "))["event"])
    assert event["kind"] == "failed"
    assert re.search(message, event["error"])


def test_a_stream_tells_every_step_in_order_and_ends_with_the_result(client):
    events = list(client.stream(PHOTO, steps=5, seed=5, preview_every=2))
    kinds = [event.kind for event in events]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "result"
    progress = [event for event in events if event.kind == "progress"]
    assert [(event.step, event.steps) for event in progress] == [(step, 5) for step in range(1, 6)]
    assert all(event.eta_s >= 0 for event in progress)
    assert progress[-1].eta_s == 0
    previews = [event for event in events if event.kind == "preview"]
    assert [event.step for event in previews] == [2, 4]
    final = pixels(events[-1].image).astype(float)
    errors = []
    for event in previews:
        picture = Image.open(io.BytesIO(event.image))
        assert picture.format == "JPEG"
        small = np.asarray(picture.resize((final.shape[1], final.shape[0]))).astype(float)
        errors.append(np.abs(small - final).mean())
    assert max(errors) < 40  # a picture of the result, not noise
    assert_same_picture(events[-1].image, pixels(client.restore(PHOTO, steps=5, seed=5).image))


def test_a_stream_that_is_left_stops_its_loop_within_a_step(server, client):
    before = counted(server, "restoration_steps_total")
    stopped = counted(server, "restoration_failures_total", model="sample", reason="stopped")
    stream = client.stream(PHOTO, steps=200, seed=1)
    seen = 0
    for event in stream:
        if event.kind == "progress":
            seen = event.step
            if seen == 2:
                break
    reached = counted(server, "restoration_steps_total") - before
    stream.close()
    deadline = time.monotonic() + 30
    while counted(server, "restoration_failures_total", model="sample", reason="stopped") == stopped:
        assert time.monotonic() < deadline, "the loop goes on"
        time.sleep(0.05)
    done = counted(server, "restoration_steps_total") - before
    assert seen == 2
    assert done <= reached + 2  # the step under way when it was left, and one that began before the server was told
    time.sleep(2)
    assert counted(server, "restoration_steps_total") - before == done
    assert pixels(client.restore(small_png(), steps=1, seed=41, **SMALL).image).shape[2] == 3


def test_a_deadline_that_passes_stops_the_loop(server, url, client):
    before = counted(server, "restoration_failures_total", model="sample", reason="stopped")
    steps = counted(server, "restoration_steps_total")
    with Client(url, timeout_s=3.0) as hurried, pytest.raises(StoppedError, match="deadline"):
        hurried.restore(PHOTO, steps=200, seed=2)
    until = time.monotonic() + 30
    while counted(server, "restoration_failures_total", model="sample", reason="stopped") == before:
        if counted(server, "restoration_steps_total") == steps:  # it had not begun, and will not
            break
        assert time.monotonic() < until, "the loop goes on"
        time.sleep(0.1)
    assert counted(server, "restoration_steps_total") - steps < 200
    assert client.restore(small_png(), steps=1, seed=42, **SMALL).image


def test_streams_do_not_wait_for_each_other_to_begin(client):
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(lambda seed: list(client.stream(small_png(), steps=2, seed=seed, **SMALL)), seed)
            for seed in (1, 2, 3)
        ]
        results = [run.result()[-1] for run in runs]
    assert [result.kind for result in results] == ["result"] * 3
    assert len({result.image for result in results}) == 3


# -- what is refused ------------------------------------------------------------------------------


def bomb():
    """A PNG of a few kB whose picture would take 1.2 GB."""
    return encoded(Image.new("1", (20_000, 20_000)))


def half(data):
    return data[: len(data) // 2]


def thread():
    return encoded(Image.new("RGB", (1, 9000)))


BAD = {
    "nothing": (b"", {}, "image: is not an image"),
    "text": (b"hello", {}, "image: is not an image"),
    "a path": (b"/etc/passwd", {}, "image: is not an image"),
    "an address": (b"http://127.0.0.1:1/a.png", {}, "image: is not an image"),
    "an SVG that names a file": (b'<svg><image href="file:///etc/passwd"/></svg>', {}, "image: is not an image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, "image: is not an image"),
    "half a photo": (half(PHOTO), {}, "image: is truncated or damaged"),
    "a bomb": (bomb, {}, "image: is too large"),
    "a thread": (thread, {"min_size": 1024}, "too large for the memory"),
    "a huge result": (PHOTO, {"upscale": 16}, "too large"),
    "a large size": (PHOTO, {"min_size": 8192}, "too large for the memory"),
    "no steps": (PHOTO, {"steps": 0}, "steps: input should be greater"),
    "a million steps": (PHOTO, {"steps": 10**6}, "steps: input should be less"),
    "many steps": (PHOTO, {"steps": 900}, "options.steps: too many steps"),
    "a word for a number": (PHOTO, {"steps": "many"}, "steps: input should be a valid integer"),
    "not a number": (PHOTO, b'{"cfg_scale": NaN}', "NaN is no JSON number"),
    "infinity": (PHOTO, b'{"upscale": 1e999}', "upscale: "),
    "an unknown option": (PHOTO, {"stepz": 3}, "options: unknown option"),
    "an option that is a file": (PHOTO, {"bundle": "/etc/passwd"}, "options: unknown option"),
    "no JSON": (PHOTO, b"steps=3", "options: is no JSON"),
    "a list": (PHOTO, b"[]", "options: is no JSON object"),
    "deep JSON": (PHOTO, b"[" * 50_000, "options: is no JSON"),
    "a long prompt": (PHOTO, {"prompt": "word " * 2000}, "options.prompt: too long"),
    "a prompt of 100 MB": (PHOTO, lambda: b'{"prompt": "' + b"x" * 100_000_000 + b'"}', "options: too long"),
    "an unknown format": (PHOTO, {"format": "exe"}, "options.format"),
    "tiles that do not exist": (PHOTO, {"tile": 100}, "tiles of this size do not exist"),
    "tiles of the VAE": (PHOTO, {"vae_tiles": "fast"}, "options.vae_tiles: a server's VAE sees the whole photo"),
    "the VAE in slices": (PHOTO, {"vae_tiles": "exact"}, "options.vae_tiles: a server's VAE sees the whole photo"),
    "many tokens": (PHOTO, {"prompt": "= " * 2000, "quality_words": "= " * 1000}, "1 to 32 chunks of 75 tokens"),
    "a negative seed": (PHOTO, {"seed": -1}, "seed: input should be greater"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_status_and_a_sentence(server, url, name):
    image, options, sentence = BAD[name]
    image = image() if callable(image) else image
    options = options() if callable(options) else options
    options = json.dumps(options).encode() if isinstance(options, dict) else options
    with triton.InferenceServerClient(url) as raw:
        with pytest.raises(InferenceServerException) as caught:
            raw.infer("restore", inputs(triton, image, options), client_timeout=120)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        message = caught.value.message()
        assert sentence in message
        assert len(message) < 1500
        for leak in ("Traceback", ".py", "triton_repo", "object at 0x"):
            assert leak not in message
        assert raw.is_server_ready()


def test_a_transparent_photo_as_jpeg_is_refused_before_the_work(client):
    with pytest.raises(Exception, match="JPEG cannot hold the photo's transparency"):
        client.restore(encoded(Image.new("RGBA", (40, 40))), format="jpeg")


def test_streams_refuse_alike(client):
    with pytest.raises(Exception, match="image: is not an image"):
        list(client.stream(b"hello"))
    with pytest.raises(Exception, match="unknown option"):
        list(client.stream(PHOTO, stepz=1))
    assert list(client.stream(small_png(), steps=1, seed=51, **SMALL))[-1].kind == "result"


@pytest.mark.parametrize("model", ["restore", "preprocess", "sample", "vae_decoder", "restore_stream", "no_such_model"])
def test_wrong_tensors_are_refused_by_the_server(url, model):
    with triton.InferenceServerClient(url) as raw:
        tensor = triton.InferInput("image", [2, 3], "FP32")
        tensor.set_data_from_numpy(np.zeros((2, 3), np.float32))
        with pytest.raises(InferenceServerException) as caught:
            raw.infer(model, [tensor], client_timeout=60)
        expected = ("StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND", "StatusCode.UNIMPLEMENTED")
        assert caught.value.status() in expected
        assert raw.is_server_ready()


def settings_of(direct, **changes):
    return json.dumps({**direct.defaults.model_dump(mode="json"), **changes}).encode()


def sample_inputs(direct, *, settings=None, run=None, texts=2, chunks=1, side=64, stage1=64, value=0.0, **others):
    unet = direct.bundle.spec("unet")
    width, height = side, 64
    cell = direct.bundle.pixels_per_cell
    return {
        "z_lq": np.full((1, direct.bundle.latent_channels, height // cell, width // cell), value, np.float32),
        "stage1": np.zeros((1, 3, 64, stage1), np.float32),
        "context": np.zeros((1, texts, 77 * chunks, unet.tensor("context").shape[2]), np.float32),
        "vector": np.zeros((1, texts, unet.tensor("vector").shape[1]), np.float32),
        "settings": [[settings_of(direct, **(settings or {}))]],
        "run": [[json.dumps(run or {}).encode()]],
        **others,
    }


def postprocess_inputs(direct, *, settings=None, side=64, stage1=64, value=0.0, image=None, **delivery):
    return {
        "pixels": np.full((1, 3, 64, side), value, np.float32),
        "stage1": np.zeros((1, 3, 64, stage1), np.float32),
        "image": [image or small_png()],
        "settings": [[settings_of(direct, **{**SMALL, **(settings or {})})]],
        "delivery": [json.dumps(delivery).encode()],
    }


def latent(direct, rows=8, columns=8, photos=1):
    return np.zeros((photos, direct.bundle.latent_channels, rows, columns), np.float32)


def plain_jpeg(side):
    """A photo of a few kB."""
    return encoded(Image.new("RGB", (side, side), (90, 120, 30)), "JPEG")


#: What the ensemble would never send: a model, its inputs, and what it says.
FOREIGN = {
    "a large latent": ("vae_decoder", lambda d: {"z": latent(d, 8, 4000)}, "too large for the memory"),
    "a large photo": ("vae_encoder", lambda d: {"pixels": np.zeros((1, 3, 64, 32768), np.float32)}, "too large for"),
    "an empty photo": ("vae_encoder", lambda d: {"pixels": np.zeros((1, 3, 0, 64), np.float32)}, "wrong shape"),
    "an odd photo": ("denoise_encoder", lambda d: {"pixels": np.zeros((1, 3, 7, 7), np.float32)}, "wrong shape"),
    "many photos": ("denoise_encoder", lambda d: {"pixels": np.zeros((64, 3, 64, 64), np.float32)}, "batch"),
    "many rows of tokens": ("text_encoder", lambda d: {"input_ids": np.zeros((20000, 77), np.int64)}, "batch"),
    "unknown tokens": ("text_encoder", lambda d: {"input_ids": np.full((1, 77), 10**9, np.int64)}, "unknown tokens"),
    "negative tokens": ("text_encoder_2", lambda d: {"input_ids": np.full((1, 77), -1, np.int64)}, "unknown tokens"),
    "three texts": ("text", lambda d: {"texts": [b"a", b"b", b"c"], "z_lq": latent(d)}, "one or two texts"),
    "a long text": ("text", lambda d: {"texts": [b"x" * 9000], "z_lq": latent(d)}, "texts: too long"),
    "many tokens": ("text", lambda d: {"texts": [b"= " * 3000], "z_lq": latent(d)}, "1 to 32 chunks of 75 tokens"),
    "a latent to echo": ("text", lambda d: {"texts": [b"a"], "z_lq": latent(d, 8, 4000)}, "too large for the memory"),
    "steps": ("sample", lambda d: sample_inputs(d, settings={"steps": 1000}), "options.steps: too many steps"),
    "texts of a photo": ("sample", lambda d: sample_inputs(d, texts=40), "texts that do not fit"),
    "chunks": ("sample", lambda d: sample_inputs(d, chunks=200), "context: too long"),
    "half a chunk": ("sample", lambda d: sample_inputs(d, context=sample_inputs(d)["context"][:, :, :50]), "no whole"),
    "another stage 1": ("sample", lambda d: sample_inputs(d, stage1=128), "stage1: does not fit z_lq"),
    "a latent of no size": ("sample", lambda d: sample_inputs(d, side=72, stage1=72), "z_lq: no working size"),
    "a wide latent": ("sample", lambda d: sample_inputs(d, side=1 << 15, stage1=64), "too large for the memory"),
    "no number": ("sample", lambda d: sample_inputs(d, value=np.nan), "z_lq: holds values that are not finite"),
    "a path": ("sample", lambda d: sample_inputs(d, run={"progress_channel": "../../etc/passwd"}), "impossible"),
    "a stream": ("sample", lambda d: sample_inputs(d, run={"progress_channel": "0" * 32}), "stream that wanted"),
    "long settings": ("sample", lambda d: sample_inputs(d, settings={"prompt": "x" * (1 << 20)}), "settings: too long"),
    "a result of 125 megapixels": (
        "postprocess",
        lambda d: postprocess_inputs(d, image=plain_jpeg(700), settings={"upscale": 16}),
        "would be too large",
    ),
    "pixels of another photo": ("postprocess", lambda d: postprocess_inputs(d, side=128, stage1=128), "does not fit"),
    "stage 1 of another photo": ("postprocess", lambda d: postprocess_inputs(d, stage1=128), "stage1: does not fit"),
    "pixels that are none": ("postprocess", lambda d: postprocess_inputs(d, value=np.inf), "not finite"),
    "a format": ("postprocess", lambda d: postprocess_inputs(d, format="png/../../x"), "delivery.format: impossible"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_members_refuse_what_the_ensemble_would_never_send(url, direct, what):
    """Anybody can call a model; what it is given is checked there too."""
    model, make, sentence = FOREIGN[what]
    given = []
    for name, value in make(direct).items():
        value = value if isinstance(value, np.ndarray) else np.array(value, dtype=np.object_)
        kind = {"float32": "FP32", "int64": "INT64", "object": "BYTES"}[value.dtype.name]
        tensor = triton.InferInput(name, list(value.shape), kind)
        tensor.set_data_from_numpy(value)
        given.append(tensor)
    with (
        triton.InferenceServerClient(url) as raw,
        pytest.raises(InferenceServerException, match=re.escape(sentence)) as caught,
    ):
        raw.infer(model, given, client_timeout=60)
    assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "StatusCode.CANCELLED")


def test_members_take_what_the_ensemble_sends(url, direct):
    """What the refused requests were made of is right as it is."""
    with triton.InferenceServerClient(url) as raw:
        for model, inputs_of in (("sample", sample_inputs), ("postprocess", postprocess_inputs)):
            given = []
            for name, value in inputs_of(direct, settings={"steps": 1}).items():
                value = value if isinstance(value, np.ndarray) else np.array(value, dtype=np.object_)
                tensor = triton.InferInput(name, list(value.shape), "BYTES" if value.dtype == object else "FP32")
                tensor.set_data_from_numpy(value)
                given.append(tensor)
            raw.infer(model, given, client_timeout=60)


FORBIDDEN = {
    "this computer's memory": lambda raw: raw.register_system_shared_memory("a", "/psm_x", 64),
    "a GPU's memory": lambda raw: raw.register_cuda_shared_memory("a", b"0" * 64, 0, 64),
    "loading a model": lambda raw: raw.load_model("sample"),
    "loading a model from the request": lambda raw: raw.load_model("x", config="{}", files={"file:1/model.py": b"0"}),
    "unloading a model": lambda raw: raw.unload_model("sample"),
    "writing traces to a file": lambda raw: raw.update_trace_settings(settings={"trace_file": "/tmp/trace"}),
    "writing logs to a file": lambda raw: raw.update_log_settings({"log_file": "/tmp/log"}),
    "the bundle's path": lambda raw: raw.get_model_config("sample"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_client_gets_at_files_memory_or_models(server, url, what):
    with triton.InferenceServerClient(url) as raw:
        with pytest.raises(InferenceServerException, match=r"restricted|header"):
            FORBIDDEN[what](raw)
        assert raw.is_model_ready("restore")


def test_http_restricts_the_same(server):
    import urllib.error

    for path in (
        "v2/systemsharedmemory/region/a/register",
        "v2/repository/models/sample/unload",
        "v2/trace/setting",
        "v2/logging",
    ):
        request = urllib.request.Request(f"http://127.0.0.1:{server.ports.http}/{path}", b"{}", method="POST")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=20)
        assert caught.value.code == 403, path


def test_half_a_request_and_noise_leave_the_server_as_it_was(server, client):
    import socket

    head = b"POST /v2/models/restore/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"{" * 50
    for port, data in (
        (server.ports.http, head),
        (server.ports.grpc, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 99),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as half_open:
            half_open.sendall(data)
            half_open.shutdown(socket.SHUT_WR)
            half_open.settimeout(2)
            try:
                while half_open.recv(4096):
                    pass
            except OSError:
                pass
    assert client.is_ready()
    assert client.restore(small_png(), steps=1, seed=61, **SMALL).image


def test_clients_that_leave_are_forgotten(server, url, client):
    """A task that is cancelled takes its request back; the next one is served."""

    async def leave():
        async with AsyncClient(url, timeout_s=100) as opened:
            task = asyncio.create_task(opened.restore(small_png(), steps=50, seed=71, **SMALL))
            await asyncio.sleep(0.5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave())
    assert client.restore(small_png(), steps=1, seed=72, **SMALL).image


def test_memory_is_flat_in_threads(server):
    """Bad streams leave no thread and no socket behind."""
    with Client(f"127.0.0.1:{server.ports.grpc}") as opened:
        for _ in range(20):
            with pytest.raises(Exception, match="is not an image"):
                list(opened.stream(b"hello"))
    assert threading.active_count() < 60
    assert {file.name for file in server.runtime_dir.iterdir()} == {
        "next",
        "turn",
    }  # locks: see `cpu_lock`
