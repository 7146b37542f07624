"""What harms a server: killed processes, a swapped bundle, a full queue, ports that are taken, many requests."""

import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import psutil
import pytest
from conftest import DATA, ROOT
from pictures import PHOTO, small_png

triton = pytest.importorskip("tritonclient.grpc", reason="needs the triton extra")
from benchmarks.leaving import LEFT, WAYS, Leavers, Photo, Stayers, leave_all, table
from engine.bundle.files import describe_file
from engine.bundle.manifest import open_bundle
from engine.errors import BackendError, RestoreError, UsageError
from triton_repo.client import Client
from triton_repo.protocol import BusyError, ServerError
from triton_repo.repository import DeploymentConfig, serving_of
from triton_repo.server import Ports, free_ports

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def bundle(bundle_fp32, tmp_path_factory):
    """A copy that may be harmed; synthetic weights, 64 pixels, 3 steps."""
    return Path(shutil.copytree(bundle_fp32, tmp_path_factory.mktemp("harmed") / "bundle"))


@pytest.fixture(scope="module")
def server(serve_bundle, bundle):
    """A server of its own; no batches, room for two, and for small photos."""
    small = {"max_image_bytes": 1 << 20, "max_photo_pixels": 1 << 20, "max_pixels": 1 << 18, "max_streams": 2}
    with serve_bundle(bundle, layout=DeploymentConfig(max_queue=2, cache=False), max_batch=1, **small) as running:
        yield running


def client_of(server, **options):
    return Client(f"127.0.0.1:{server.ports.grpc}", **{"timeout_s": 120, **options})


def other_weights(folder):
    """Make a whole bundle of another one: half of its weights are gone, and its manifest knows."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    weights = folder / manifest["weights"]["name"]
    data = bytearray(weights.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    weights.write_bytes(data)
    manifest["weights"] = describe_file(weights).model_dump()
    file.write_text(json.dumps(manifest))
    open_bundle(folder)


def processes(server):
    """Return the server's process and its stubs, by id, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = os.getsid(int(folder.name))
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ProcessLookupError):
            continue
        if session == server.process.pid and command:
            found[int(folder.name)] = command
    return found


def until(condition, patience_s=60.0):
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_full_queue_is_said_and_the_rest_is_served(server):
    def restore(seed):
        with client_of(server, retries=0) as client:
            try:
                return client.restore(small_png(seed), steps=20, seed=seed).image
            except BusyError as error:
                return error

    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(restore, range(12)))
    refused = [result for result in results if isinstance(result, BusyError)]
    assert refused
    assert all("maximum queue size" in str(error) for error in refused)
    assert any(isinstance(result, bytes) for result in results)
    with client_of(server) as client:
        assert client.is_ready()
        assert client.restore(small_png(), steps=1).image


def test_a_stream_that_is_refused_for_want_of_room_is_told_so(server):
    """And not as a fault of the server's, for which nobody would ask again."""

    def stream(seed):
        with client_of(server) as client:
            try:
                return list(client.stream(small_png(seed), steps=3, seed=seed))[-1].kind
            except BusyError as error:
                return error.args[0].partition("\n")[0]

    with ThreadPoolExecutor(6) as pool:
        found = Counter(pool.map(stream, range(6)))
    assert found["too many streams"] >= 1
    assert found["result"] >= 2
    assert found.total() == found["too many streams"] + found["result"]


def test_who_is_refused_and_asks_again_is_served(server):
    def restore(seed):
        with client_of(server, retries=20) as client:
            return client.restore(small_png(seed), steps=10, seed=seed).image

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(restore, range(8)))) == 8


def leave(server, count, *, stay, at_once, longest_s, seed=1):
    """Let clients leave in every way while others stay, whose every answer is checked.

    Returns:
        How many left, had their answer or were refused, and (seconds, bytes of the server, of its shared memory) by
        the number of clients that have left.
    """
    photos = []
    with client_of(server, retries=100) as client:
        for seed_of_photo in range(5):
            photo = Photo(small_png(seed_of_photo), {"steps": 3, "seed": seed_of_photo})
            photos.append((photo, client.restore(photo.image, **photo.options).image))
    assert len({image for _, image in photos}) == 5
    pids = set(processes(server))
    ways = [*WAYS] * -(-count // len(WAYS))
    Random(seed).shuffle(ways)
    found, memory, started = Counter(), [], time.monotonic()

    def wanted(number):
        return Photo(small_png(number), {"steps": 3, "seed": number})

    with Stayers(server.ports, stay, photos) as staying, Leavers(server.ports) as leavers:
        for result in leave_all(leavers, ways[:count], wanted, longest_s, at_once, seed):
            found[result] += 1
            assert server.process.poll() is None, f"the server is gone after {found.total()} clients"
            if found.total() % 20 == 0:
                held = sum(memory_of(server).values())
                memory.append((time.monotonic() - started, held, server.shared_memory.bytes()))
        until(lambda: staying.answers > 5)
    print(table(found), *(f"{s:.0f} s: {held >> 20} MiB, shared {shm >> 20} MiB" for s, held, shm in memory), sep="\n")
    print(f"{staying.answers} answers for those who stayed, {staying.wrong} wrong; {staying.errors}")
    assert (staying.wrong, staying.errors) == (0, [])
    assert set(processes(server)) == pids
    regions = list(Path("/dev/shm").glob(f"{server.shared_memory.prefix}*"))
    assert len(regions) > len(pids) // 2
    assert {stat.S_IMODE(region.stat().st_mode) for region in regions} == {0o600}
    return found, memory


def test_clients_that_leave_cost_nobody_else_anything(server):
    """Every way twice, at a server whose queue holds two: some are refused."""
    found, _ = leave(server, 2 * len(WAYS), stay=1, at_once=1, longest_s=0.3)
    assert sum(count for (_, what), count in found.items() if what == LEFT) >= len(WAYS) // 2
    with client_of(server, retries=100) as client:
        assert client.restore(small_png(), steps=1).image


def test_a_message_larger_than_what_a_model_may_hold_leaves_no_memory_behind(server):
    """Triton reads what comes, of any size, and shared memory keeps what it was once given."""
    limit = serving_of(server.repository).region_bytes
    before = server.shared_memory.bytes()
    with client_of(server) as client:
        with pytest.raises(ServerError, match="Failed to increase the shared memory"):
            client.restore(bytes(limit))
        assert server.shared_memory.bytes() == before
        assert resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)[0] == limit
        assert client.restore(small_png(), steps=1).image


def test_a_model_gives_back_what_a_large_photo_took(server):
    """And a small one's memory stays for the next, which is quicker."""
    (process,) = [pid for pid, command in processes(server).items() if "/vae_encoder/1/model.py" in command]

    def held_after(side):
        with triton.InferenceServerClient(f"127.0.0.1:{server.ports.grpc}") as raw:
            pixels = triton.InferInput("pixels", [1, 3, side, side], "FP32")
            pixels.set_data_from_numpy(np.zeros((1, 3, side, side), np.float32))
            raw.infer("vae_encoder", [pixels], client_timeout=100)
        memory = psutil.Process(process).memory_info()
        return memory.rss - memory.shared

    before = held_after(64)
    assert held_after(512) < before + (64 << 20)


def test_streams_that_fail_at_once_do_not_end_the_server(server):
    """Each counts its failure in a thread of its own; two at one metric ended the server after 6 to 49 of these."""
    pids = set(processes(server))

    told = set()

    def fail(_):
        with client_of(server) as client:
            for _ in range(40):
                with pytest.raises(RestoreError, match="is not an image|too many streams") as error:
                    list(client.stream(b"hello"))
                told.add(str(error.value).partition("\n")[0])

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(fail, range(12)))
    assert len(told) == 2  # some were refused, and some were read
    assert set(processes(server)) == pids


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_clients_leave_in_every_way(serve_bundle, bundle_fp32):
    """Memory is flat: what the second half of them adds is a few per cent of what the server holds."""
    with serve_bundle(bundle_fp32, layout=DeploymentConfig(cache=False)) as running:
        found, memory = leave(running, 1200, stay=5, at_once=8, longest_s=5.0)
    for way in WAYS:
        assert found[way, LEFT] >= 20, way  # others had their answer
    _, held, shared = zip(*memory, strict=True)
    # Regions grow in steps of 1 MiB to hold what is under way at once; 600 forgotten requests would take 30 MiB.
    assert max(shared[25:]) <= max(shared[:25]) + (8 << 20)
    assert max(held[25:]) < 1.05 * max(held[:25])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_clients_of_the_demo_may_leave(serve_bundle, demo_bundle):
    """At 512 pixels and 3 steps, after up to 2.5 s: with two models of the ensemble at once the server ended here."""
    with serve_bundle(demo_bundle) as running, client_of(running, retries=100) as client:
        pids, found = set(processes(running)), Counter()
        with Leavers(running.ports) as leavers:
            unary = [way for way in WAYS if "unary" in way] * 13

            def wanted(number):
                return Photo(small_png(number), {"min_size": 512, "steps": 3, "seed": number})

            for _, what in leave_all(leavers, unary, wanted, longest_s=2.5, at_once=1, seed=1):
                found[what] += 1
                assert running.process.poll() is None, f"the server is gone after {found.total()} clients"
        assert found[LEFT] >= 50
        assert client.restore(small_png(), steps=1).image
        assert set(processes(running)) == pids


def test_a_member_that_is_killed_is_told_and_noticed(server):
    """Triton does not start it again and says that it is ready; `serve.py` looks, and starts the server again."""
    with client_of(server) as client:
        before = client.restore(small_png(), steps=2, seed=3).image
        assert not server.has_lost_a_member()
        (stub,) = [pid for pid, command in processes(server).items() if "/sample/1/model.py" in command]
        stream = client.stream(small_png(), steps=200, seed=3)
        for event in stream:
            if event.kind == "progress":
                os.kill(stub, signal.SIGKILL)
                break
        with pytest.raises(ServerError, match="not healthy"):
            list(stream)
        assert server.has_lost_a_member()
        server.stop()
        server.start()
        assert not server.has_lost_a_member()
        assert client.restore(small_png(), steps=2, seed=3).image == before


def test_a_bundle_that_is_swapped_does_no_harm_and_is_refused_at_the_next_start(server, serve_bundle, bundle):
    with client_of(server) as client:
        before = client.restore(small_png(), steps=2, seed=4).image
        kept = bundle.rename(bundle.with_name("kept"))
        other_weights(shutil.copytree(kept, bundle))
        try:
            assert client.restore(small_png(), steps=2, seed=4).image == before
            again = serve_bundle(kept)
            for config in again.repository.glob("*/config.pbtxt"):  # as the first server's: rendered before the swap
                config.write_text(config.read_text().replace(str(kept), str(bundle)))
            with pytest.raises(BackendError, match="not the bundle that this model repository was rendered from"):
                again.start()
        finally:
            shutil.rmtree(bundle)
            kept.rename(bundle)


def test_a_server_that_is_killed_while_it_samples(server):
    """The client is told; what is left of the server ends; started again, it serves, also who has kept asking."""
    with client_of(server, retries=0) as client:
        failed = []

        def restore():
            try:
                client.restore(small_png(), steps=200)
            except RestoreError as error:
                failed.append(error)

        thread = threading.Thread(target=restore)
        steps = steps_of(server)
        thread.start()
        until(lambda: steps_of(server) != steps)
        pids = list(processes(server))
        server.kill()
        thread.join(60)
    (error,) = failed
    assert isinstance(error, (BusyError, ServerError))
    assert "Traceback" not in str(error)
    until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() and is_running(pid) for pid in pids), 20)
    with client_of(server, retries=100) as patient, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(patient.restore, small_png(), steps=1)
        time.sleep(0.5)
        server.start()
        assert waiting.result(120).image


def is_running(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def steps_of(server):
    return sum(float(value) for value in re.findall(r"^restoration_steps_total\S* (\S+)$", server.metrics(), re.M))


def test_ports_that_are_taken_are_named(server, triton_programs):
    from dataclasses import replace

    with pytest.raises(UsageError, match=f"{server.ports.http}: cannot be listened on"):
        replace(server, process=None, ports=Ports(free_ports().grpc, server.ports.http, free_ports().metrics)).start()


def test_nobody_answers(capsys):
    from engine.cli.console import run_command
    from triton_repo.client import main

    port = free_ports().grpc
    arguments = [str(DATA / "coffee.jpg"), "-o", "/tmp/never.png", "--url", f"127.0.0.1:{port}", "--retries", "1"]
    assert run_command(main, [*arguments, "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "no server answers" in error
    assert "python triton_repo/serve.py" in error
    assert run_command(main, [*arguments, "--wait", "0.5"]) == 1
    assert "is not ready" in capsys.readouterr().err


CLIENT = [
    (["nothing.jpg"], 1, "nothing.jpg: no such file"),
    (["."], 2, "is a folder"),
    (["cup.jpg", "-o", "cup.jpg"], 1, "exists already"),
    (["cup.jpg", "-o", "out.bmp"], 1, "no format that is written"),
    (["cup.jpg", "--previews", "missing"], 1, "missing: no such folder"),
    (["cup.jpg", "--steps", "0"], 2, "impossible settings"),
    (["text.png"], 1, "image: is not an image"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), CLIENT, ids=[" ".join(row[0]) for row in CLIENT])
def test_mistakes_at_the_client(server, tmp_path, monkeypatch, capsys, arguments, status, message):
    from engine.cli.console import run_command
    from triton_repo.client import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "cup.jpg").write_bytes(PHOTO)
    (tmp_path / "text.png").write_text("hello")
    url = f"127.0.0.1:{server.ports.grpc}"
    assert run_command(main, [*arguments, "--url", url, *([] if "-o" in arguments else ["-o", "o.png"])]) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cup.jpg", "text.png"]


def test_the_two_commands(bundle_fp32, triton_programs, tmp_path):
    """A server from the command line, a photo through it with a bar and previews, a model that is killed, Ctrl-C."""
    ports = free_ports()
    names = [f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), ports, strict=True)]
    serve = [sys.executable, str(ROOT / "triton_repo" / "serve.py"), "--bundle", str(bundle_fp32), *names]
    said = []

    def ask(*options):
        client = [sys.executable, str(ROOT / "triton_repo" / "client.py"), str(DATA / "coffee.jpg"), "--overwrite"]
        client += ["-o", str(tmp_path / "out.png"), "--url", f"127.0.0.1:{ports.grpc}", "--wait", "200"]
        return subprocess.run([*client, *options], capture_output=True, text=True, timeout=300, check=False)

    with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as process:
        reader = threading.Thread(target=lambda: said.extend(process.stderr))
        reader.start()
        try:
            done = ask("--previews", str(tmp_path), "--preview-every", "1", "--json", "--steps", "4")
            assert done.returncode == 0, done.stderr
            family = psutil.Process(process.pid).children(recursive=True)
            (stub,) = [child for child in family if any("/sample/1/model.py" in part for part in child.cmdline())]
            stub.kill()
            until(lambda: sum("ready: gRPC" in line for line in said) == 2, 200)
            again = ask("--steps", "2", "--quiet")
            assert again.returncode == 0, again.stderr
            family += psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait(60)
            reader.join()
    assert status == 0
    assert f"ready: gRPC 127.0.0.1:{ports.grpc}" in "".join(said)
    assert "a model has died; starting again in 1 s\n" in said
    assert said[-1] == "stopping\n"
    assert "4/4" in done.stderr
    assert '"steps": 4' in done.stdout
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        *(f"coffee.000{step}.jpg" for step in (1, 2, 3)),
        "out.png",
    ]
    until(lambda: not any(is_running(child.pid) for child in family), 20)


def memory_of(server):
    """Return the bytes that the server and its stubs hold, by process; each counts what it shares."""
    return {pid: psutil.Process(pid).memory_info().rss for pid in processes(server)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat_after_two_hundred_requests_fifty_of_them_bad(serve_bundle, bundle_fp32):
    """After twenty that fill arenas and caches, 200 more add nothing that 200 others would add again."""
    bad = [b"hello", PHOTO[: len(PHOTO) // 2], b"", b"%!PS", b"\x89PNG\r\n\x1a\n" + b"0" * 100]

    def ask(client, number):
        if number % 4 == 3:
            with pytest.raises(RestoreError):
                client.restore(bad[number // 4 % len(bad)], seed=number)
        elif number % 10 == 0:
            assert list(client.stream(small_png(number), steps=2, seed=number))[-1].kind == "result"
        else:
            assert client.restore(small_png(number), steps=2, seed=number).image

    with serve_bundle(bundle_fp32, layout=DeploymentConfig(cache=False)) as running, client_of(running) as client:
        for number in range(40):
            ask(client, number)
        before = memory_of(running)
        for number in range(200):
            ask(client, 1000 + number)
        after = memory_of(running)
        assert set(before) == set(after)  # no model was started again
    print({pid: f"{before[pid] / 2**20:.1f} -> {after[pid] / 2**20:.1f} MiB" for pid in before})
    assert sum(after.values()) < 1.02 * sum(before.values())
