"""The page's parts without a browser: turns at the desk, controls, visitors' files."""

import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from given_faces import GivenFaces
from PIL import Image

pytest.importorskip("gradio", reason="needs the web extra: pip install '.[web]'")

from engine import FaceRestorer
from engine.errors import UsageError
from engine.page import faces, presets
from engine.page.command import listen, read_users
from engine.page.controls import (
    FOLDED,
    IN_SIGHT,
    control_of,
    differences,
    label_of,
    settings_from,
    values_of,
)
from engine.page.desk import CancellationError, Desk, Ticket
from engine.page.fragments import progress, result, sentence, summary
from engine.page.sessions import Result, Sessions
from engine.settings import FaceSettings, ScaleRange, Settings

DEFAULTS = Settings()
EVIL = "<script>alert(1)</script>.png"


# -- controls -----------------------------------------------------------------------------------------


def test_every_setting_has_a_control_with_the_command_lines_words():
    assert sorted((*IN_SIGHT, *FOLDED)) == sorted(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        control = control_of(name, DEFAULTS)
        assert control.label.lower().replace(" ", "_") == name
        assert field.description[1:] in control.info
    assert label_of("cfg_scale") == "CFG scale"


def test_bounds_are_the_settings_own():
    steps = control_of("steps", DEFAULTS)
    assert (steps.minimum, steps.maximum, steps.precision) == (1, 1000, 0)
    assert "above 0, up to 16" in control_of("upscale", DEFAULTS).info
    assert control_of("prompt", DEFAULTS).max_length == 16_000


@pytest.mark.parametrize(
    "settings",
    [
        DEFAULTS,
        DEFAULTS.updated({"tile": 256, "restore_pull": 0.06, "seed": 2**63 - 1, "cfg_scale": ScaleRange(4, 1.5)}),
        DEFAULTS.updated({"tile": "off", "restore_pull": None, "prompt": "", "negative_prompt": "<b>"}),
    ],
)
def test_what_controls_show_means_the_settings_again(settings):
    assert settings_from(values_of(settings), DEFAULTS.updated({"steps": 3, "restore_pull": 5})) == settings


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("control_scale", "strong", "Control scale: cannot be read"),
        ("cfg_scale", "", "CFG scale: is empty"),
        ("steps", None, "Steps: is empty"),
        ("seed", "-1", "seed: input should be greater than or equal to 0"),
        ("seed", "1e3", "Seed: cannot be read"),
        ("tile", "32", "tile"),
        ("restore_pull", "much", "Restore pull: cannot be read"),
        ("sampler", "euler", "sampler"),
        ("bundle", "/", "bundle: no such setting"),
        ("prompt", {"path": "/etc/passwd"}, "prompt: input should be a valid string"),
        ("steps", [1], "steps: input should be a valid integer"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(name, value, told):
    with pytest.raises(UsageError) as refused:
        settings_from({name: value}, DEFAULTS)
    assert told in str(refused.value)


def test_what_differs_from_the_bundle_is_told():
    changed = DEFAULTS.updated({"steps": 8, "prompt": "x" * 200, "restore_pull": 2})
    assert differences(changed, DEFAULTS) == [f"prompt “{'x' * 57}…”", "steps 8", "restore pull 2", "seed 0"]


# -- presets ------------------------------------------------------------------------------------------


def test_a_preset_sets_what_presets_differ_in(restorer):
    manifest = restorer.bundle.manifest
    chooser = presets.lay_out(manifest)["preset"]
    assert [name for name, _ in chooser.choices] == ["lightning", "lightning-8"]
    assert chooser.value == "lightning"
    assert chooser.info == "Sets sampler, CFG scale; each can be changed after"
    assert presets.chosen(manifest, "lightning-8") == {"sampler": "dpmpp2m", "cfg_scale": "2:1.5"}
    assert presets.chosen(manifest, "lightning") == {"sampler": "edm", "cfg_scale": "2"}
    assert presets.asked(manifest, "lightning-8") == "lightning-8"
    assert presets.asked(manifest, "lightning") is None
    assert presets.asked(manifest, None) is None
    for wrong in ("fast", 8, ["lightning-8"]):
        with pytest.raises(UsageError, match="preset"):
            presets.asked(manifest, wrong)


def test_a_bundle_with_one_set_of_settings_has_no_chooser(restorer):
    assert presets.lay_out(restorer.bundle.manifest.model_copy(update={"presets": {}})) == {}


# -- the desk -----------------------------------------------------------------------------------------


class Counter:
    """Tickets at a desk, and the order in which they end."""

    def __init__(self, folder):
        self.folder, self.ended, self.changed = folder, [], threading.Condition()

    def ticket(self, owner, name, settings=DEFAULTS):
        ticket = Ticket(owner, self.folder / "photo.png", self.folder / f"{name}.png", settings, lambda: None)

        def tell():
            with self.changed:
                if ticket.outcome is not None:
                    self.ended.append(name)
                self.changed.notify_all()

        ticket.on_change = tell
        return ticket

    def wait(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, 30)


@pytest.fixture
def counter(tmp_path):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "photo.png")
    return Counter(tmp_path)


@pytest.fixture
def desk(restorer):
    opened = Desk(restorer, limit=6)
    yield opened
    opened.close()


def test_people_take_turns(desk, restorer, counter):
    settings = restorer.defaults.updated({"steps": 1})
    busy = counter.ticket("first", "busy", restorer.defaults.updated({"steps": 1000}))
    desk.submit([busy])
    counter.wait(lambda: busy.progress.done > 0)
    many = [counter.ticket("many", f"many{index}", settings) for index in range(3)]
    desk.submit(many)
    alone = counter.ticket("alone", "alone", settings)
    desk.submit([alone])
    assert [each.progress.ahead for each in (*many, alone)] == [1, 3, 4, 2]
    desk.cancel("first")
    counter.wait(lambda: len(counter.ended) == 5)
    assert counter.ended == ["busy", "many0", "alone", "many1", "many2"]
    assert isinstance(busy.outcome.error, CancellationError)
    assert not busy.output.exists()
    assert all(each.outcome.error is None and each.output.exists() for each in (*many, alone))


def test_more_than_may_wait_is_refused_as_a_whole(desk, counter):
    with pytest.raises(UsageError, match="too many photos are waiting"):
        desk.submit([counter.ticket("many", str(index)) for index in range(7)])
    assert counter.ended == []


def test_what_waits_is_taken_back_at_once(desk, restorer, counter):
    busy = counter.ticket("first", "busy", restorer.defaults.updated({"steps": 1000}))
    waiting = counter.ticket("second", "waiting")
    desk.submit([busy])
    desk.submit([waiting])
    desk.cancel("second")
    assert isinstance(waiting.outcome.error, CancellationError)
    begun = time.monotonic()
    desk.close()  # which ends the other one after its step
    assert time.monotonic() - begun < 10
    assert isinstance(busy.outcome.error, CancellationError)


def test_a_bug_leaves_nobody_waiting(desk, counter, monkeypatch, capsys):
    def fail(ticket):
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr(desk, "_restore", fail)
    ticket = counter.ticket("first", "one")
    desk.submit([ticket])
    counter.wait(lambda: ticket.outcome is not None)
    assert "by accident" in str(ticket.outcome.error)
    assert "Traceback" in capsys.readouterr().err


# -- visitors -----------------------------------------------------------------------------------------


@pytest.fixture
def sessions(tmp_path):
    (tmp_path / "uploads").mkdir()
    return Sessions(tmp_path / "results", tmp_path / "uploads")


def upload(tmp_path, name):
    folder = tmp_path / "uploads" / name
    folder.mkdir()
    file = folder / "photo.png"
    file.write_bytes(b"photo")
    return file


def test_a_visits_files_go_with_it_unless_another_has_them_too(sessions, tmp_path):
    own, shared = upload(tmp_path, "1"), upload(tmp_path, "2")
    sessions.adopt(sessions.of("one"), [own, shared])
    sessions.adopt(sessions.of("two"), [shared])
    output = sessions.of("one").new_output(own)
    output.write_bytes(b"result")
    sessions.end("one")
    assert (own.exists(), shared.exists(), output.exists()) == (False, True, False)
    sessions.end("two")
    assert not shared.exists()
    assert sessions.end("two") is None


@pytest.mark.parametrize("name", ["../secret.png", "uploads/none.png", "/etc/hostname"])
def test_only_what_was_uploaded_is_taken(sessions, tmp_path, name):
    (tmp_path / "secret.png").write_bytes(b"")
    with pytest.raises(UsageError, match="not here any more"):
        sessions.adopt(sessions.of("one"), [str(tmp_path / "uploads" / name)])


def test_a_link_out_of_the_uploads_is_not_followed(sessions, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UsageError, match="not here any more"):
        sessions.adopt(sessions.of("one"), [str(tmp_path / "uploads" / "link.png")])


def test_names_that_come_twice_are_numbered_in_the_zip(sessions, tmp_path):
    session = sessions.of("one")
    with pytest.raises(UsageError, match="no results yet"):
        session.zip()
    for content in (b"first", b"second"):
        output = session.new_output(Path("photo.jpg"))
        output.write_bytes(content)
        session.results.append(Result(Path("photo.jpg"), output, output, output, DEFAULTS, {}))
    with zipfile.ZipFile(session.zip()) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "photo.restored.png": b"first",
            "photo.restored.2.png": b"second",
        }


def test_programs_that_do_not_come_back_are_forgotten(sessions):
    for name in ("program", "page", "worker", "fresh"):
        sessions.of(name).last_used -= 3600 if name != "fresh" else 0
    sessions._sessions["page"].has_page = True
    sessions._sessions["worker"].runs.add("run")
    assert sessions.forgotten() == ["program"]


# -- faces ---------------------------------------------------------------------------------------------


@pytest.fixture
def person(tmp_path):
    path = tmp_path / "person.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def face_restorer(restorer):
    return FaceRestorer(restorer, GivenFaces((20, 14, 44, 40), (80, 14, 104, 40), size=(128, 64)))


def changed(update):
    return update["value"] if isinstance(update, dict) else update


def test_faces_are_found_and_those_without_a_tick_are_left_out(face_restorer, restorer, person):
    shown = faces.found_in(person, face_restorer, restorer, restorer.defaults)
    picture = changed(shown["faces_found"])
    assert picture.count('<span class="face"') == 2
    assert "2 faces found." in picture
    assert "left:15.62%;top:21.88%;width:18.75%;height:40.62%" in picture
    assert shown["face_choice"]["choices"] == ["1", "2"]
    assert shown["faces"] is True
    known = shown["faces_of"]
    values = {"faces": True, "face_words": "a face", "face_choice": ["1"], "faces_of": known}
    assert faces.settings_from(values, [person]) == FaceSettings(words="a face", leave=(2,))
    assert faces.settings_from({**values, "faces": False}, [person]) is None
    assert faces.settings_from({}, [person]) is None
    other = person.with_name("other.png")
    other.write_bytes(b"another photo")
    for photos in ([other], [person, other]):  # whose faces have other numbers
        assert faces.settings_from(values, photos) == FaceSettings(words="a face")
    assert faces.is_of(known, [person])
    assert not faces.is_of(known, [other])
    assert not faces.is_of(None, [person])


def test_a_ticket_with_faces_and_its_settings_again(face_restorer, restorer, person, counter):
    desk = Desk(restorer, limit=6, faces=face_restorer)
    try:
        ticket = counter.ticket("one", "one", restorer.defaults.updated({"steps": 1}))
        ticket.photo, ticket.faces = person, FaceSettings(leave=(2,))
        desk.submit([ticket])
        counter.wait(lambda: ticket.outcome is not None)
    finally:
        desk.close()
    (report,) = ticket.outcome.reports
    assert [face["done"] for face in report["faces"]["found"]] == ["restored", "left out"]
    before = person.with_name("before.webp")
    before.write_bytes(ticket.outcome.before)
    made = Result(person, ticket.output, before, before, ticket.settings, report, (), ticket.faces)
    assert "2 faces found: 1 restored; 2 left out." in result(made, restorer.bundle.manifest)
    shown = faces.again(made)
    assert shown["face_choice"]["value"] == ["1"]
    assert 'class="face left"' in changed(shown["faces_found"])
    assert faces.again(replace(made, faces=None))["faces"] is False


def test_what_programs_ask_of_faces():
    assert faces.asked(None) is None
    assert faces.asked(False) is None
    assert faces.asked(True) == FaceSettings()
    assert faces.asked({"leave": [3]}) == FaceSettings(leave=(3,))
    for wrong in (1, "yes", {"leave": [0]}, {"bundle": "/"}, {"words": None}):
        with pytest.raises(UsageError, match="impossible settings of faces"):
            faces.asked(wrong)


# -- what is said ------------------------------------------------------------------------------------


def test_names_are_escaped(counter):
    ticket = counter.ticket("one", "x")
    for text in (progress(EVIL, "1 of 2", ticket.progress), summary(EVIL, [(EVIL, EVIL)])):
        assert "<script>" not in text
        assert "&lt;script&gt;" in text


def test_an_error_is_one_sentence_with_what_to_do():
    error = UsageError(
        "is too large", where="/tmp/secret/photo.png", expected="1 MB", found="2 MB", fix="make it small"
    )
    assert sentence(error) == "is too large (2 MB), expected 1 MB. To do: make it small."


# -- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names nobody"),
        ("ann:\n", "line 1"),
        ("ann:x\n\nbob\n", "line 3"),
        (":x", "line 1"),
        (b"\xff\xfe", "no text"),
    ],
)
def test_a_file_of_passwords_that_is_none(tmp_path, text, told):
    file = tmp_path / "users.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as refused:
        read_users(file)
    assert told in str(refused.value)


def test_names_and_passwords(tmp_path):
    file = tmp_path / "users.txt"
    file.write_text("ann:a:b c\n\n bob:x \n")
    assert read_users(file) == [("ann", "a:b c"), ("bob", "x")]


def test_a_port_that_is_taken_and_an_address_that_is_not_here():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match="cannot listen there"), listen("127.0.0.1", port):
            pass
    with pytest.raises(UsageError, match="cannot listen there"), listen("203.0.113.1", 0):
        pass
    with pytest.raises(UsageError, match="cannot listen there"), listen("no.such.name.invalid", 0):
        pass


def test_without_gradio_one_sentence_says_what_to_install(run_web, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['gradio'] = None\n")
    done = run_web(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == (
        "error: the page needs Gradio\n  found:    no module gradio\n"
        "  to do:    pip install 'restoration-engine[web]'\n"
    )


def test_without_a_bundle_nothing_is_served(run_web, tmp_path):
    done = run_web("--bundle", tmp_path, "--port", 0)
    assert done.returncode == 1
    assert "no bundle here" in done.stderr
    assert done.stdout == ""
