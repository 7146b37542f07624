"""Captions: text files beside photos, and a real server that answers well, badly, late, too much or not at all."""

import base64
import os
import time

import numpy as np
import pytest
from chat_server import Model, chat, serving
from PIL import Image

pytest.importorskip("httpx", reason="needs the captions extra: pip install '.[captions]'")

from engine.cli import captions
from engine.cli.captions import KEY_VARIABLE, Caption, CaptionError, CaptionServer, Sidecar, make_captioner
from engine.cli.command import restore
from engine.errors import UsageError
from engine.image.files import read_provenance
from engine.settings import MAX_TEXT, Settings

PICTURE = b"\xff\xd8 no real picture"


def ask(*answers, **options):
    """Ask a server that answers so; returns the caption and what it was asked."""
    model = Model(*answers)
    with serving(model) as address:
        return CaptionServer(address, **options).describe(None, PICTURE).text, model.asked


def test_a_server_is_asked_as_openai_is():
    text, ((path, headers, body),) = ask(chat("A boat on a lake."), model="small-vlm", key="secret")
    assert text == "A boat on a lake."
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "small-vlm"
    assert body["max_tokens"] <= 200
    words, picture = body["messages"][0]["content"]
    assert "Describe this photo" in words["text"]
    assert picture["image_url"]["url"] == f"data:image/jpeg;base64,{base64.b64encode(PICTURE).decode()}"
    _, ((_, headers, body),) = ask(chat("A boat."))
    assert "Authorization" not in headers
    assert "model" not in body


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (chat("  A boat\n\n on a\tlake. "), "A boat on a lake."),
        (chat('"A boat."'), "A boat."),
        (chat("<think>The user wants…\n</think>A boat."), "A boat."),
        (chat("A\x1b[31m boat\u202e."), "A [31m boat ."),
        (chat([{"type": "text", "text": "A boat."}]), "A boat."),
        (chat("A boat. Behind it, a for").replace('"stop"', '"length"'), "A boat."),
        (
            chat("A sorry sight: a boat, unable to float."),
            "A sorry sight: a boat, unable to float.",
        ),
    ],
)
def test_what_a_model_says_is_made_one_line(answer, text):
    assert ask(answer)[0] == text


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (chat(""), "said nothing"),
        (chat(" \n"), "said nothing"),
        (chat("<think>for ever"), "said nothing"),
        (chat(None), "refused"),
        (chat("", refusal="no faces"), "refused: no faces"),
        (chat("I'm sorry, but I can't help with that."), "refused: I'm sorry"),
        (chat("As an AI language model, I have no eyes."), "refused"),
        (chat("I cannot see an image."), "refused"),
        (chat("a boat and " * 60), "repeated itself"),
        (chat("".join(f"word{n} " for n in range(900))), "characters of something else"),
        (chat("!!!???"), "characters of something else"),
        (chat({"text": "x"}), "refused"),
        ("<html>no chat here</html>", "did not answer as a chat does: <html>no chat here"),
        ('{"choices": []}', "did not answer as a chat does"),
        ('{"error": "no such model"}', "no such model"),
        ("[" * 100_000, "did not answer as a chat does"),
        ((401, '{"error": "bad key"}'), "answered 401: "),
        ((404, ""), "answered 404"),
        ((302, ""), "answered 302"),
        (b"\xff\xfe\x00", "did not answer as a chat does"),
    ],
)
def test_nonsense_is_a_remark(answer, told):
    with pytest.raises(CaptionError) as refused:
        ask(answer)
    assert told in refused.value.problem
    assert "\n" not in refused.value.problem


def test_a_redirect_is_not_followed():
    trap = Model(chat("A trap."))
    with serving(trap) as elsewhere:

        def send_away(handler):
            handler.send_response(307)
            handler.send_header("Location", f"{elsewhere}/chat/completions")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        with pytest.raises(CaptionError, match="answered 307"):
            ask(send_away)
    assert trap.asked == []


def test_a_gigabyte_is_not_read():
    sent = []

    def flood(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000000")
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b"x" * 1_000_000)
            sent.append(1)

    with pytest.raises(CaptionError, match="sent more than 1000000 bytes"):
        ask(flood)
    assert len(sent) < 30


def test_a_server_that_drips_is_left(monkeypatch):
    monkeypatch.setattr(captions, "_ANSWER_S", 0.4)

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b"x" * 70_000)
            time.sleep(0.1)

    begun = time.monotonic()
    with pytest.raises(CaptionError, match="did not answer in time"):
        ask(drip)
    with pytest.raises(CaptionError, match="did not answer in time"):
        ask(lambda handler: time.sleep(2))
    assert time.monotonic() - begun < 3


def test_a_busy_server_is_asked_again():
    text, asked = ask((503, "loading"), (429, ""), chat("A boat."))
    assert (text, len(asked)) == ("A boat.", 3)
    with pytest.raises(CaptionError, match="answered 500: broken"):
        ask((500, "broken"))


def test_a_server_that_is_down_is_left_alone_in_the_end():
    with serving(Model("")) as address:
        pass  # and closed again
    server = CaptionServer(address)
    for _ in range(3):
        with pytest.raises(CaptionError, match="is not reached"):
            server.describe(None, PICTURE)
    begun = time.monotonic()
    with pytest.raises(CaptionError, match="left alone"):
        server.describe(None, PICTURE)
    assert time.monotonic() - begun < 0.1


@pytest.mark.parametrize(
    ("caption", "model", "told"),
    [
        ("sidecars", None, "is no server's address"),
        ("", None, "is no server's address"),
        ("file:///etc/passwd", None, "is no server's address"),
        ("http://", None, "is no server's address"),
        ("http://host/v1?key=secret", None, "is no server's address"),
        ("http://user:secret@host/v1", None, KEY_VARIABLE),
        ("none", "small", "only a server has models"),
        ("sidecar", "small", "only a server has models"),
    ],
)
def test_impossible_options(caption, model, told):
    with pytest.raises(UsageError) as refused:
        make_captioner(caption, model)
    assert told in str(refused.value)
    assert "user:secret" not in str(refused.value)


def test_options(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert make_captioner("none") is None
    assert make_captioner("sidecar") == Sidecar()
    server = make_captioner("http://host:8000/v1/chat/completions/", "small")
    assert (server.source, server.model, server.key) == ("http://host:8000/v1", "small", "secret")
    assert "secret" not in repr(server)


def test_a_caption_is_no_setting():
    """So that what a server of ours is sent can never have it call an address."""
    assert not {name for name in Settings.model_fields if "caption" in name or "url" in name}
    with pytest.raises(UsageError, match="caption"):
        Settings().updated({"caption": "http://127.0.0.1"})


# -- text files ---------------------------------------------------------------------------------------


def test_a_text_file_beside_the_photo(tmp_path):
    (tmp_path / "boat.txt").write_bytes("\ufeffein Boot,\r\nam See\n".encode())
    assert Sidecar().describe(tmp_path / "boat.jpg").text == "ein Boot, am See"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no boat.txt"),
        (b"\n", "is empty"),
        (b"\xff\xfeb\0", "no text in UTF-8"),
        (b"x" * 5_000_000, "longer than"),
    ],
)
def test_a_text_file_that_is_none(tmp_path, content, told):
    if content is not None:
        (tmp_path / "boat.txt").write_bytes(content)
    with pytest.raises(CaptionError, match=told):
        Sidecar().describe(tmp_path / "boat.jpg")


def test_a_caption_follows_the_prompt():
    caption = Caption("a boat", "sidecar")
    assert caption.joined("old photo ") == "old photo, a boat"
    assert caption.joined("") == "a boat"
    assert Caption("", "sidecar", problem="none").joined("old photo") == "old photo"
    assert len(Caption("b" * MAX_TEXT, "sidecar").joined("a")) == MAX_TEXT


# -- the command --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three photos; the second has a text file."""
    (tmp_path / "photos").mkdir()
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "b.txt").write_text("a boat on a lake")
    return tmp_path


@pytest.fixture
def run(folder, bundle_fp32, capsys):
    """Restore the folder with some options; returns what was printed on standard error."""

    def run_command(*options):
        fixed = ("-o", folder / "out", "--bundle", bundle_fp32, "--steps", 1, "--threads", 1)
        assert restore([str(each) for each in (folder / "photos", *fixed, *options)]) == 0
        return capsys.readouterr().err

    (folder / "out").mkdir()
    return run_command


def result_of(folder, name):
    return np.asarray(Image.open(folder / "out" / name)), read_provenance(folder / "out" / name)


def test_text_files_reach_the_networks_and_the_metadata(folder, run):
    told = run("--caption", "sidecar", "--prompt", "old photo")
    assert "a.png: no caption: there is no a.txt" in told
    pixels, provenance = result_of(folder, "b.png")
    assert provenance["settings"]["prompt"] == "old photo, a boat on a lake"
    assert provenance["caption"] == {
        "source": "sidecar",
        "model": None,
        "prompt": "old photo",
        "text": "a boat on a lake",
    }
    others = [result_of(folder, name)[0] for name in ("a.png", "c.png")]
    again = run("--caption", "sidecar", "--prompt", "old photo")  # what is there is kept
    assert "step" not in again
    run("--prompt", "old photo", "--overwrite")
    assert not np.array_equal(result_of(folder, "b.png")[0], pixels)
    assert all(
        np.array_equal(result_of(folder, name)[0], other)
        for name, other in zip(("a.png", "c.png"), others, strict=True)
    )
    assert "caption" not in result_of(folder, "b.png")[1]


def test_another_text_file_is_another_result(folder, run):
    run("--caption", "sidecar")
    (folder / "photos" / "b.txt").write_text("a tree")
    later = time.time() + 10
    os.utime(folder / "photos" / "b.txt", (later, later))
    with pytest.raises(Exception, match="exists already"):
        run("--caption", "sidecar")


def test_a_server_is_shown_stage_1_while_the_networks_work(folder, run, restorer):
    model = Model(chat("first"), (400, "no"), chat("third"))
    with serving(model) as address:
        told = run("--caption", address, "--caption-model", "small")
    assert f"note: a small picture of each photo is sent to {address} (small)" in told
    assert "b.png: no caption: " in told
    prompts = [result_of(folder, name)[1]["settings"]["prompt"] for name in ("a.png", "b.png", "c.png")]
    assert prompts == ["first", "", "third"]
    kept = result_of(folder, "b.png")[1]["caption"]
    assert (kept["source"], kept["model"], kept["text"]) == (address, "small", "")
    assert "answered 400" in kept["problem"]
    stage1 = restorer.stage1(folder / "photos" / "a.png")
    shown = np.asarray(model.pictures[0]).astype(float) / 255
    assert shown.shape == stage1.rgb.shape
    assert np.abs(shown - stage1.rgb).mean() < 0.1  # a JPEG's loss


def test_the_next_caption_is_asked_for_before_the_present_photo_is_done(folder, run):
    """The second request arrives while the first photo's result is not there yet."""
    there = []

    def answer(handler):
        there.append(sorted(path.name for path in (folder / "out").glob("*.png")))
        content = chat("a boat").encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    with serving(Model(answer)) as address:
        run("--caption", address)
    assert there[0] == there[1] == []


def test_like_takes_the_words_of_a_caption_or_asks_for_new_ones(folder, run):
    run("--caption", "sidecar", "--prompt", "old photo")
    like = folder / "like.png"
    (folder / "out" / "b.png").rename(like)
    run("--like", like, "--overwrite")
    assert result_of(folder, "a.png")[1]["settings"]["prompt"] == "old photo, a boat on a lake"
    run("--like", like, "--overwrite", "--caption", "sidecar")
    assert result_of(folder, "a.png")[1]["settings"]["prompt"] == "old photo"
    assert result_of(folder, "b.png")[1]["settings"]["prompt"] == "old photo, a boat on a lake"
