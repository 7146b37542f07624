"""The serving benchmark's arithmetic and its table, on times that are made up."""

import pytest

pytest.importorskip("tritonclient.grpc", reason="needs the triton extra")

from benchmarks import serving
from benchmarks.summary import percentile


def test_percentiles_are_those_of_the_other_benchmarks():
    """Latency and serving tell the same figure for the same times."""
    latencies = [float(value) for value in range(10, 0, -1)]
    found = serving.Load(1, latencies, [1.0], [1.0]).report()
    assert [found["p50_s"], found["p95_s"], found["p99_s"]] == [percentile(latencies, share) for share in (50, 95, 99)]
    assert (found["p50_s"], found["p95_s"]) == pytest.approx((5.5, 9.55))


def load(clients, served, direct):
    made = serving.Load(clients, [2.0, 4.0], served, direct, 0.25, 0.7, 1.5)
    return made.report()


def report(overhead, served):
    one = {"served_s": [1.0], "overhead": overhead, "served_median_s": 1.03, "direct_median_s": 1.0}
    part = {"one_client": one, "loads": [load(1, [0.9], [1.0]), load(8, served, [1.0, 2.0, 4.0])]}
    return {
        "machine": {"date": "2026-11-25", "command": "x", "processor": "y", "cores": 2, "memory_gib": 24},
        "bundle": {"name": "demo"},
        "photo": "photo.jpg",
        "size": (384, 256),
        "steps": 15,
        "batching_on": part,
        "batching_off": part,
    }


def test_throughput_is_compared_turn_by_turn():
    found = load(8, [1.1, 2.0, 8.0], [1.0, 2.0, 4.0])
    assert found["throughput_over_direct_by_turn"] == [1.1, 1.0, 2.0]
    assert found["throughput_over_direct"] == 1.1
    assert (found["photos_per_s"], found["direct_photos_per_s"]) == (2.0, 2.0)


def test_the_table_says_which_aims_are_reached():
    text = serving.to_markdown(report(0.03, [1.1, 2.0, 8.0]))
    assert "| on | 8 | 2.000 | 1.10 × | 3.00 | 3.90 | 3.98 | 25% | 70% | 1.5 |" in text
    assert "+3.0% (aim: at most +5.0%, reached)" in text
    assert "1.10 (aim: at least 1.00, reached)" in text
    text = serving.to_markdown(report(0.08, [0.9, 1.8, 3.2]))
    assert "+8.0% (aim: at most +5.0%, missed)" in text
    assert "0.90 (aim: at least 1.00, missed)" in text


def test_shares_are_of_the_time_between_two_looks():
    def counters(scale):
        members = {
            name: {"success": 10 * scale, "queue": 2 * scale, "compute_infer": 6 * scale, "requests": 4 * scale}
            for name in ("sample", "vae_decoder")
        }
        whole = {"success": 40 * scale, "queue": 9 * scale, "compute_infer": 0, "requests": 4 * scale}
        stats = {"restore": whole, "text_encoder": members["sample"], **members}
        return {name: {**found, "executions": 2 * scale} for name, found in stats.items()}

    made = serving.Load(4)
    serving.note_shares(made, counters(1), counters(3))
    assert made.queue_share == pytest.approx(4 / 40)
    assert made.compute_share == pytest.approx(12 / 40)
    assert made.batch == 2.0


def test_more_clients_than_the_bound_are_refused():
    with pytest.raises(SystemExit):
        serving.main(["--clients", "17"])
