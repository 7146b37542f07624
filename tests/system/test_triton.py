"""A real server of the demo: results, batches, streams, and what a client may not do."""

import asyncio
import io
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import DATA
from pictures import PHOTO, encoded, pixels, small_png
from PIL import Image

triton = pytest.importorskip("tritonclient.grpc", reason="needs the triton extra")
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from engine import Restorer
from engine.image.decoding import decode_photo
from engine.image.files import read_provenance
from triton_repo.client import AsyncClient, Client
from triton_repo.protocol import StoppedError
from triton_repo.runtime_dir import runtime_dir_of

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
    import subprocess
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


def test_grpc_gives_the_pixels_of_the_command(client, by_command):
    result = client.restore(PHOTO, steps=STEPS, seed=7)
    assert_same_picture(result.image, np.asarray(Image.open(by_command)))
    assert result.provenance == read_provenance(by_command)


def test_http_gives_the_pixels_of_the_command(server, by_command):
    with triton_http.InferenceServerClient(f"127.0.0.1:{server.ports.http}", network_timeout=240) as http:
        options = json.dumps({"steps": STEPS, "seed": 7}).encode()
        answer = http.infer("restore", inputs(triton_http, PHOTO, options))
        assert_same_picture(answer.as_numpy("restored")[0], np.asarray(Image.open(by_command)))
        assert json.loads(answer.as_numpy("settings")[0]) == read_provenance(by_command)


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
    while not counted(server, "restoration_failures_total", model="sample", reason="stopped"):
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


def test_members_refuse_what_the_ensemble_would_never_send(url, direct):
    """Anybody can call a model; what it is given is checked there too."""
    spec = direct.bundle.spec("vae_decoder")
    channels = spec.tensor("z").shape[1]
    large = np.zeros((1, channels, 8, 4000), np.float32)
    with triton.InferenceServerClient(url) as raw:
        tensor = triton.InferInput("z", list(large.shape), "FP32")
        tensor.set_data_from_numpy(large)
        with pytest.raises(InferenceServerException, match="too large for the memory"):
            raw.infer("vae_decoder", [tensor], client_timeout=60)
        with pytest.raises(InferenceServerException, match="options.steps: too many steps"):
            raw.infer("sample", sample_inputs(direct, {"steps": 1000}, {}), client_timeout=60)
        with pytest.raises(InferenceServerException, match=r"run.progress_channel: impossible"):
            raw.infer("sample", sample_inputs(direct, {}, {"progress_channel": "../../etc/passwd"}), client_timeout=60)
        with pytest.raises(InferenceServerException, match="the stream that wanted this result is gone"):
            raw.infer("sample", sample_inputs(direct, {}, {"progress_channel": "0" * 32}), client_timeout=60)
        with pytest.raises(InferenceServerException, match="not finite"):
            raw.infer("sample", sample_inputs(direct, {}, {}, value=np.nan), client_timeout=60)


def sample_inputs(direct, settings, run, value=0.0):
    defaults = direct.defaults.model_dump(mode="json")
    unet = direct.bundle.spec("unet")
    arrays = {
        "z_lq": np.full((1, direct.bundle.latent_channels, 8, 8), value, np.float32),
        "stage1": np.zeros((1, 3, 64, 64), np.float32),
        "context": np.zeros((1, 2, 77, unet.tensor("context").shape[2]), np.float32),
        "vector": np.zeros((1, 2, unet.tensor("vector").shape[1]), np.float32),
        "settings": np.array([[json.dumps({**defaults, **settings}).encode()]], dtype=np.object_),
        "run": np.array([[json.dumps(run).encode()]], dtype=np.object_),
    }
    given = []
    for name, array in arrays.items():
        tensor = triton.InferInput(name, list(array.shape), "BYTES" if array.dtype == np.object_ else "FP32")
        tensor.set_data_from_numpy(array)
        given.append(tensor)
    return given


FORBIDDEN = {
    "this computer's memory": lambda raw: raw.register_system_shared_memory("a", "/psm_x", 64),
    "a GPU's memory": lambda raw: raw.register_cuda_shared_memory("a", b"0" * 64, 0, 64),
    "loading a model": lambda raw: raw.load_model("sample"),
    "loading a model from the request": lambda raw: raw.load_model("x", config="{}", files={"file:1/model.py": b"0"}),
    "unloading a model": lambda raw: raw.unload_model("sample"),
    "writing traces to a file": lambda raw: raw.update_trace_settings(settings={"trace_file": "/tmp/trace"}),
    "writing logs to a file": lambda raw: raw.update_log_settings({"log_file": "/tmp/log"}),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_client_gets_at_files_memory_or_models(server, url, what):
    with triton.InferenceServerClient(url) as raw:
        with pytest.raises(InferenceServerException, match=r"restricted|header"):
            FORBIDDEN[what](raw)
        assert raw.is_model_ready("restore")


def test_http_restricts_the_same(server):
    import urllib.error
    import urllib.request

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
    assert {file.name for file in runtime_dir_of(server.process.pid).iterdir()} == {
        "next",
        "turn",
    }  # locks: see `cpu_lock`
