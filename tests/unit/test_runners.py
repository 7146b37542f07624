"""Opened graphs: all of them stay, or only those that are kept and those of the stage at hand."""

import pytest

from engine.backends.runners import Runners
from engine.errors import BackendError
from engine.timings import Timings


class Backend:
    def __init__(self):
        self.calls = []

    def open(self, bundle, graph):
        if graph == "broken":
            raise BackendError("cannot open it", where=graph)
        self.calls.append(f"open {graph}")
        return Runner(self, graph)


class Runner:
    def __init__(self, backend, graph):
        self.backend, self.graph = backend, graph

    def close(self):
        self.backend.calls.append(f"close {self.graph}")


def test_a_graph_is_opened_once_and_its_time_is_told():
    backend, times = Backend(), Timings()
    runners = Runners(backend, None)
    assert runners.open("unet", times) is runners.open("unet")
    runners.open("text_encoder")
    assert backend.calls == ["open unet", "open text_encoder"]
    assert set(times.graphs_ms) == {"load unet"}


def test_a_graph_of_another_stage_makes_room():
    backend = Backend()
    runners = Runners(backend, None, frozenset({"vae_encoder"}))
    for graph in ("vae_encoder", "text_encoder", "text_encoder_2", "controlnet", "unet", "controlnet"):
        runners.open(graph)
    assert set(backend.calls[3:5]) == {"close text_encoder", "close text_encoder_2"}
    assert backend.calls[:3] + backend.calls[5:] == [
        *("open vae_encoder", "open text_encoder", "open text_encoder_2"),
        *("open controlnet", "open unet"),
    ]


def test_what_is_closed_is_opened_again_and_closing_twice_is_nothing():
    backend = Backend()
    runners = Runners(backend, None)
    runners.open("unet")
    runners.close(["unet", "controlnet"])
    runners.close()
    runners.open("unet")
    assert backend.calls == ["open unet", "close unet", "open unet"]


def test_a_graph_that_does_not_open_is_not_kept():
    runners = Runners(Backend(), None)
    with pytest.raises(BackendError):
        runners.open("broken")
    assert not runners.opened
