"""Options of a request as bytes that anybody may have sent, and the socket that a stream follows its sampling by."""

import json
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="needs the triton extra")

from engine.errors import ImageError, UsageError
from triton_repo import progress_channel
from triton_repo.protocol import Delivery, Run, StoppedError, parse_options

GOOD = [
    (b"", {}, "png", None),
    (b"{}", {}, "png", None),
    (b'{"steps": 8, "format": "webp", "timeout_s": 2.5}', {"steps": 8}, "webp", 2.5),
    (b'{"restore_pull": null, "cfg_scale": [1, 4]}', {"restore_pull": None, "cfg_scale": [1, 4]}, "png", None),
]
BAD = [
    (b"\xff\xfe", "is no JSON"),
    (b"{", "is no JSON"),
    (b"[" * 100_000, "is no JSON"),
    (b"1" * 10_000, "is no JSON"),
    (b"[1]", "is no JSON object"),
    (b'{"cfg_scale": NaN}', "NaN is no JSON number"),
    (b'{"eta": -Infinity}', "-Infinity is no JSON number"),
    (b'{"bundle": "/etc/passwd"}', "unknown option"),
    (b'{"file": "http://169.254.169.254/"}', "unknown option"),
    (b'{"format": "exe"}', "options.format"),
    (b'{"encoding": "hex"}', "options.encoding"),
    (b'{"timeout_s": 0}', "options.timeout_s"),
    (b'{"timeout_s": 1e999}', "options.timeout_s"),
    (b'{"preview_every": -1}', "options.preview_every"),
    (b'{"prompt": "' + b"x" * (1 << 20) + b'"}', "too long"),
]


@pytest.mark.parametrize(("data", "changes", "form", "timeout_s"), GOOD)
def test_options(data, changes, form, timeout_s):
    found, delivery = parse_options(data)
    assert (found, delivery.format, delivery.timeout_s) == (changes, form, timeout_s)


@pytest.mark.parametrize(("data", "message"), BAD, ids=[str(row[0][:24]) for row in BAD])
def test_bad_options_are_refused_in_few_words(data, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_options(data)
    assert len(str(caught.value)) < 1000


def test_photos_go_through_json_and_come_back():
    delivery, photo = Delivery(encoding="base64"), bytes(range(256))
    sent = delivery.encode(photo)
    assert json.loads(json.dumps(sent.decode())) == sent.decode()
    assert delivery.decode(sent) == photo
    assert Delivery().decode(Delivery().encode(photo)) == photo
    for damaged in (b"\xff" + sent, sent[:-1], sent + b"\n", b"data:image/png;base64," + sent):
        with pytest.raises(ImageError, match="is no base64"):
            delivery.decode(damaged)


def test_a_name_of_a_stream_is_no_path():
    for name in ("../../etc/passwd", "/tmp/x", "a" * 31, "A" * 32, ""):
        with pytest.raises(ValueError, match="progress_channel"):
            Run(progress_channel=name)


@pytest.fixture
def runtime(monkeypatch):
    """A server's folder; pytest's own may have a path too long for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(progress_channel, "runtime_dir", lambda: Path(folder))
        yield Path(folder)


@pytest.fixture
def stream(runtime):
    """(the stream's end, the sampling's end), connected."""
    listening = progress_channel.ProgressReceiver()
    sampling = progress_channel.ProgressSender(listening.name)
    assert listening.connect(1.0)
    yield listening, sampling
    sampling.close()
    listening.close()
    assert list(runtime.iterdir()) == []


def test_steps_and_estimates_arrive_in_order(stream):
    listening, sampling = stream
    rng = np.random.default_rng(0)
    sent = [rng.random((4, 96, 96), np.float32) if step % 2 else None for step in range(6)]

    def tell():  # from a thread: an estimate is larger than a socket's buffer
        for step, estimate in enumerate(sent):
            sampling.tell(step + 1, 6, estimate)
        sampling.close()

    thread = threading.Thread(target=tell)
    thread.start()
    found = list(iter(lambda: listening.next((4, 96, 96)), None))
    thread.join()
    assert [report[:2] for report in found] == [(step, 6) for step in range(1, 7)]
    for (_, _, estimate), expected in zip(found, sent, strict=True):
        assert (estimate is None and expected is None) or np.array_equal(estimate, expected)


def test_a_stream_that_stops_ends_the_sampling_at_its_next_step(stream):
    listening, sampling = stream
    sampling.tell(1, 9, None)
    listening.stop()
    with pytest.raises(StoppedError, match="step 2 of 9"):
        sampling.tell(2, 9, None)


def test_a_stream_that_stops_before_the_sampling_begins_ends_it_too(runtime):
    listening = progress_channel.ProgressReceiver()
    listening.stop()
    sampling = progress_channel.ProgressSender(listening.name)
    assert listening.connect(1.0)
    with pytest.raises(StoppedError):
        sampling.tell(1, 9, None)
    listening.close()
    sampling.close()


def test_nobody_listens_under_a_name_that_was_made_up(runtime):
    with pytest.raises(StoppedError, match="is gone"):
        progress_channel.ProgressSender("0" * 32)


def test_nothing_is_sent_but_json():
    assert json.loads(Run(deadline=1.5).model_dump_json()) == {
        "deadline": 1.5,
        "progress_channel": None,
        "preview_every": 0,
    }
