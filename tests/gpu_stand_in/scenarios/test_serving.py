"""Served on a GPU, with Triton's Python backend played: the command line's results and the command line's calls."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from gpu_stand_in import driver
from gpu_stand_in.costs import STEP, costs, step_costs
from gpu_stand_in.played_triton import COUNTED, Server, TritonError

from engine.bundle.manifest import open_bundle
from engine.image.decoding import decode_photo
from engine.image.encoding import encode_photo
from engine.image.photo import Photo

ASKED = {"steps": 3, "seed": 5, "restore_pull": 2.0}


@pytest.fixture(scope="module")
def server(bundle_for):
    pytest.importorskip("tritonclient.grpc", reason="needs the triton extra")
    from triton_repo.repository import MEMBERS, PYTHON_MEMBERS
    from triton_repo.runtime_dir import VARIABLE, make_runtime_dir
    from triton_repo.serving import ServingConfig

    folder = make_runtime_dir()  # whose path is short enough for sockets; pytest's may not be
    os.environ[VARIABLE] = str(folder)
    bundle = open_bundle(bundle_for("rtx"))
    serving = ServingConfig(bundle=bundle.path, digest=bundle.digest, backend="tensorrt-rtx")
    started = Server(serving, [*MEMBERS, *PYTHON_MEMBERS], [*MEMBERS, "sample"])
    yield started
    started.close()
    del os.environ[VARIABLE]
    shutil.rmtree(folder)


def sent(photo):
    return np.array([[encode_photo(Photo(photo), ".png", {})]], dtype=np.object_)


def text(value):
    return np.array([[json.dumps(value).encode()]], dtype=np.object_)


def walk(server, photo, **options):
    """Walk the ensemble's chain, and return the restored photo."""
    from triton_repo.chain import chain

    values = {"image": sent(photo), "options": text({**ASKED, "format": "tiff", **options})}
    for link in chain():
        made = server.ask(link.model, {tensor: values[value] for tensor, value in link.inputs.items()})
        values |= {value: made[tensor] for tensor, value in link.outputs.items()}
    return decode_photo(values["restored"].reshape(-1)[0], "restored").rgb


def sampling(server, photo, **options):
    """Return what `sample` is given for a photo."""
    from triton_repo.chain import chain

    values = {"image": sent(photo), "options": text({**ASKED, **options})}
    for link in chain():
        inputs = {tensor: values[value] for tensor, value in link.inputs.items()}
        if link.model == "sample":
            return inputs
        made = server.ask(link.model, inputs)
        values |= {value: made[tensor] for tensor, value in link.outputs.items()}
    raise AssertionError


def seen(photo):
    """Return a photo as it is once it was sent: in the bits of a file."""
    return decode_photo(sent(photo)[0, 0], "photo")


def test_a_served_photo_is_the_command_lines(server, photo, tall, restorer):
    for each in (photo, tall):
        wanted = restorer.restore(seen(each), **ASKED).photo
        sixteen_bits = decode_photo(encode_photo(wanted, ".tiff", {}), "wanted").rgb
        assert np.array_equal(walk(server, each), sixteen_bits)


def test_a_served_step_costs_what_the_command_lines_does(server, open_on, photo):
    ready = {steps: sampling(server, photo, steps=steps, churn=0.0, restore_pull=None) for steps in (6, 16)}
    served = step_costs(lambda steps: server.ask("sample", ready[steps]))
    with open_on("rtx") as opened:
        command = step_costs(lambda steps: opened.restore(seen(photo), steps=steps, churn=0.0, restore_pull=None))
    assert served == command == STEP


def test_a_second_request_of_a_size_allocates_and_records_nothing(server, photo):
    ready = sampling(server, photo, churn=0.0, restore_pull=None)
    server.ask("sample", ready)
    found = costs(lambda: server.ask("sample", ready))
    assert found["allocations on the device"] == found["allocations of pinned memory"] == 0
    assert found["waits for a stream"] == 2


def test_requests_go_together_and_are_what_each_is_alone(server, photo):
    inputs = [
        sampling(server, each, seed=seed, prompt=prompt)
        for each, seed, prompt in ((photo, 1, "a cup"), (photo[::-1].copy(), 2, "a face"))
    ]
    alone = [server.ask("sample", each)["z"] for each in inputs]
    before = dict(COUNTED)
    answers = server.models["sample"].execute([server.request("sample", each) for each in inputs])
    together = ("restoration_steps_total", "model=sample")
    assert COUNTED[together] - before[together] == ASKED["steps"]  # of the batch, not of each
    for answer, wanted in zip(answers, alone, strict=True):
        assert np.allclose(answer.arrays()["z"], wanted, atol=1e-4)


def test_a_request_that_is_cancelled_ends_amid_its_steps_and_the_next_is_right(server, photo):
    inputs = sampling(server, photo, steps=40)
    wanted = server.ask("sample", inputs)["z"]
    request = server.request("sample", inputs)
    steps = []

    class Told(type(request)):
        def is_cancelled(self):
            steps.append(1)
            return len(steps) > 5

    request.__class__ = Told
    (answer,) = server.models["sample"].execute([request])
    assert "cancelled" in answer.error().message()
    assert len(steps) < 10
    assert np.array_equal(server.ask("sample", inputs)["z"], wanted)


def look_when_sampling_has_ended(monkeypatch):
    """Have a stream's first look for its sampling find nobody, and its second one come too late for the steps."""
    from triton_repo.progress_channel import ProgressReceiver

    connect = ProgressReceiver.connect
    looks = []

    def late(receiver, patience_s):
        looks.append(patience_s)
        if len(looks) > 1:
            return connect(receiver, patience_s)
        time.sleep(3)
        return False

    monkeypatch.setattr(ProgressReceiver, "connect", late)


@pytest.mark.parametrize("is_late", [False, True], ids=["", "also if it looks when sampling has ended"])
def test_a_stream_tells_every_step_and_shows_what_comes(server, photo, monkeypatch, is_late):
    if is_late:
        look_when_sampling_has_ended(monkeypatch)
    inputs = {"image": sent(photo), "options": text({**ASKED, "steps": 5, "preview_every": 2})}
    request = server.request("restore_stream", inputs)
    server.models["restore_stream"].execute([request])
    server.models["restore_stream"]._walkers.submit(lambda: None).result()
    while not request.sender.is_over:
        time.sleep(0.01)
    events = [json.loads(answer.arrays()["event"].reshape(-1)[0]) for answer in request.sender.sent]
    assert [event["step"] for event in events if event["kind"] == "progress"] == [1, 2, 3, 4, 5]
    assert [event["step"] for event in events if event["kind"] == "preview"] == [2, 4]
    assert events[-1]["kind"] == "result"


def test_too_little_memory_is_an_answer_and_costs_no_other_request(server, photo):
    inputs = sampling(server, photo)
    large = sampling(server, np.zeros((192, 192, 3), np.float32))
    with (
        driver.fault("cuMemAllocFromPoolAsync", 1, driver.OUT_OF_MEMORY) as fault,
        pytest.raises(TritonError, match="memory"),
    ):
        server.ask("sample", large)
    assert fault.happened
    assert server.ask("sample", inputs)["z"].shape == (1, 4, 8, 8)
