"""Restorers that are opened, used and closed, on every way to run on a GPU: nothing is left in the driver."""

import threading

import pytest

EVERYTHING = {
    "steps": 4,
    "churn": 2.0,
    "cfg_scale": (3.0, 1.5),
    "control_scale": (1.0, 0.6),
    "restore_pull": 4.0,
}


def test_it_may_be_opened_used_and_closed_by_different_threads(open_on, photo, tall, same, nothing_left):
    opened = in_a_thread(lambda: open_on("rtx"))
    assert in_a_thread(lambda: same(opened, photo))
    assert in_a_thread(lambda: same(opened, tall))
    assert in_a_thread(lambda: opened.plan((64, 64), opened.defaults).memory is not None)
    in_a_thread(opened.close)


def in_a_thread(function):
    results = []

    def run():
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


@pytest.mark.parametrize("way", ["rtx", "tensorrt", "streaming", "stripped", "cuda"])
def test_a_restorer_that_is_closed_has_left_nothing(open_on, photo, tall, same, nothing_left, way):
    with open_on(way) as opened:
        assert same(opened, photo)
        assert same(opened, tall, **EVERYTHING)
        assert same(opened, photo, sampler="dpmpp2m")
