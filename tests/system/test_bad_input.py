"""Wrong input, as a table: arguments, exit status, what the message says; and nothing is left behind."""

import shutil

import pytest
from PIL import Image

from engine.console import run_command
from engine.restore import main as restore_main


@pytest.fixture
def place(photo_path, tmp_path):
    """A folder of things that are wrong in different ways."""
    shutil.copy(photo_path, tmp_path / "cup.jpg")
    (tmp_path / "text.png").write_text("hello")
    whole = (tmp_path / "cup.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "there.png").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "cup.jpg", tmp_path / "cup.png")
    Image.new("RGBA", (40, 40)).save(tmp_path / "glass.png")
    Image.new("RGB", (1, 9000)).save(tmp_path / "thread.png")
    return tmp_path


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


RESTORE = [
    (["nothing.jpg"], 1, "nothing.jpg: no such file"),
    (["text.png"], 1, "text.png: is not an image"),
    (["half.jpg"], 1, "half.jpg: is truncated or damaged"),
    (["empty.png"], 1, "empty.png: is not an image"),
    (["folder"], 1, "folder: holds no images"),
    (["thread.png", "--min-size", "1024"], 1, "too large to be worked at in one piece"),
    (["cup.jpg", "-o", "there.png"], 1, "there.png: exists already"),
    (["cup.jpg", "-o", "missing/out.png"], 1, "missing: no such folder"),
    (["cup.jpg", "-o", "missing/out"], 1, "no such folder"),
    (["cup.jpg", "-o", "there.png/out.png"], 1, "no such folder"),
    (["cup.jpg", "-o", "out.bmp"], 1, "no format that is written"),
    (["cup.jpg", "-o", "/proc/out.png"], 1, "/proc/out.png"),
    (["glass.png", "-o", "out.jpg"], 1, "cannot hold the photo's transparency"),
    (["cup.jpg", "cup.png", "-o", "one.png"], 2, "several photos need a folder"),
    (["cup.jpg", "cup.png", "-o", "folder"], 1, "two photos would be restored into one file"),
    (["cup.jpg", "--like", "nothing.png"], 1, "nothing.png: no such file"),
    (["cup.jpg", "--like", "glass.png"], 1, "glass.png: holds no settings"),
    (["cup.jpg", "--bundle", "folder"], 1, "folder: no bundle here"),
    (["cup.jpg", "--bundle", "there.png"], 1, "there.png: no bundle here"),
    (["cup.jpg", "--steps", "0"], 2, "impossible settings"),
    (["cup.jpg", "--steps", "1000000"], 2, "impossible settings"),
    (["cup.jpg", "--cfg-scale", "nan"], 2, "impossible settings"),
    (["cup.jpg", "--upscale", "-1"], 2, "impossible settings"),
    (["cup.jpg", "--seed", "-1"], 2, "impossible settings"),
    (["cup.jpg", "--restore-pull", "0"], 2, "impossible settings"),
]
USAGE = [
    ([], "the following arguments are required: IMG"),
    (["cup.jpg", "--steps", "many"], "invalid int value"),
    (["cup.jpg", "--cfg-scale", "1:2:3"], "--cfg-scale"),
    (["cup.jpg", "--sampler", "ddim"], "invalid choice"),
    (["cup.jpg", "--backend", "tensorrt"], "invalid choice"),
    (["cup.jpg", "--color-fix", "yes"], "invalid choice"),
    (["cup.jpg", "--samples", "0"], "expected 1 to 1000"),
    (["cup.jpg", "--threads", "-1"], "expected 0"),
    (["cup.jpg", "--restore-pull", "2", "--no-restore-pull"], "not allowed with"),
    (["cup.jpg", "--wat"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), RESTORE, ids=[" ".join(row[0]) for row in RESTORE])
def test_restore(place, bundle_fp32, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(place)
    before = snapshot(place)
    if "--bundle" not in arguments:
        arguments = [*arguments, "--bundle", str(bundle_fp32)]
    assert run_command(restore_main, arguments) == status
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert output.out == ""
    assert snapshot(place) == before


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(row[0]) or "nothing" for row in USAGE])
def test_restore_usage(place, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as ended:
        restore_main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_out_of_memory_is_no_bug(monkeypatch, capsys, bundle_fp32, photo_path, tmp_path):
    from engine.backends.ort import OrtRunner

    class Session:
        def run(self, names, inputs):
            raise RuntimeError("bad allocation: Failed to allocate memory for requested buffer of size 1234")

    def broken(self, inputs):
        self._session = Session()
        return infer_impl(self, inputs)

    infer_impl = OrtRunner.infer_impl
    monkeypatch.setattr(OrtRunner, "infer_impl", broken)
    arguments = [str(photo_path), "-o", str(tmp_path / "out.png"), "--bundle", str(bundle_fp32)]
    assert run_command(restore_main, arguments) == 1
    error = capsys.readouterr().err
    assert "out of memory" in error
    assert "--min-size" in error
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_changed_under_us_is_refused(bundle_fp32, photo_path, tmp_path, capsys):
    copy = shutil.copytree(bundle_fp32, tmp_path / "bundle")
    (copy / "unet.onnx").write_bytes((copy / "controlnet.onnx").read_bytes())
    assert run_command(restore_main, [str(photo_path), "-o", str(tmp_path / "o.png"), "--bundle", str(copy)]) == 1
    assert "unet.onnx: a file of the bundle was changed" in capsys.readouterr().err


@pytest.fixture
def build_main(demo):
    from export.build_engines import main

    return main


BUILD = [
    (["--sdxl", "{sdxl}"], 2, "--supir is missing"),
    (["--supir", "{supir}"], 2, "--sdxl is missing"),
    (["--lora", "face={face}"], 2, "--sdxl is missing"),
    (["--sdxl", "{sdxl}", "--supir", "{supir}"], 1, "a single file holds no tokenizer"),
    (["--sdxl", "nothing.safetensors", "--supir", "{supir}", "--tokenizer", "{tokenizer}"], 1, "no such file"),
    (["--sdxl", "{supir}", "--supir", "{supir}", "--tokenizer", "{tokenizer}"], 1, "another model than --sdxl needs"),
    (["--sdxl", "{face}", "--supir", "{supir}", "--tokenizer", "{tokenizer}"], 1, "LoRA"),
    (["--sdxl", "{sdxl}", "--supir", "{sdxl}", "--tokenizer", "{tokenizer}"], 1, "another model than --supir needs"),
    (["--sdxl", "{sdxl}", "--supir", "text.png", "--tokenizer", "{tokenizer}"], 1, "text.png"),
    (["--sdxl", "{sdxl}", "--supir", "{supir}", "--tokenizer", "folder"], 1, "no tokenizer here"),
    (
        ["--sdxl", "{sdxl}", "--supir", "{supir}", "--tokenizer", "{tokenizer}", "--preset", "ours"],
        2,
        "preset ours merges LoRAs",
    ),
    (
        ["--sdxl", "{sdxl}", "--supir", "{supir}", "--tokenizer", "{tokenizer}", "--lora", "face=nothing.safetensors"],
        1,
        "LoRA face: nothing.safetensors: no such file",
    ),
    (
        ["--sdxl", "{sdxl}", "--supir", "{supir}", "--tokenizer", "{tokenizer}", "--lora", "face={supir}"],
        1,
        "LoRA face",
    ),
    (["--preset", "lightning", "--output", "folder2/../there.png"], 1, "something that is no bundle lies there"),
    (["--preset", "lightning", "--output", "."], 1, "something that is no bundle lies there"),
    (["--preset", "lightning", "--output", "there.png/bundle"], 1, "cannot build the bundle"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), BUILD, ids=[" ".join(row[0]) for row in BUILD])
def test_build(place, demo, build_main, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(place)
    (place / "folder2").mkdir()
    before = snapshot(place)
    names = {"sdxl": demo.sdxl, "supir": demo.supir, "tokenizer": demo.tokenizer, **demo.loras}
    filled = [argument.format(**names) for argument in arguments]
    for option, value in (("--output", "bundle"), ("--preset", "lightning-8")):
        if option not in filled:
            filled += [option, value]
    assert run_command(build_main, [*filled, "--quiet"]) == status
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    left = {path for path in snapshot(place) if path not in before and not path.name.endswith(".lock")}
    assert left == set()
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "face"], "expected NAME=FILE[:SCALE]"),
        (["--lora", "=file"], "expected NAME=FILE[:SCALE]"),
        (["--preset", "best"], "invalid choice"),
        (["--precision", "int8"], "invalid choice"),
        (["--backend", "tensorrt"], "invalid choice"),
    ],
)
def test_build_usage(build_main, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        build_main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("face=a.safetensors", ("face", "a.safetensors", 1.0)),
        ("face=a.safetensors:0.8", ("face", "a.safetensors", 0.8)),
        ("face=a.safetensors:-1", ("face", "a.safetensors", -1.0)),
        (r"face=C:\loras\a.safetensors", ("face", r"C:\loras\a.safetensors", 1.0)),
        ("a=b=c.safetensors:2", ("a", "b=c.safetensors", 2.0)),
    ],
)
def test_lora_option(demo, text, expected):
    from export.build_engines import _lora

    lora = _lora(text)
    assert (lora.name, str(lora.path), lora.scale) == expected
