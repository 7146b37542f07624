"""`python export/build_engines.py` as its users call it."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="needs the build extra")

import layouts
import numpy as np
from conftest import ROOT, Silent
from filelock import FileLock
from safetensors.numpy import save_file

from engine import Restorer
from engine.bundle.files import MANIFEST
from engine.bundle.manifest import open_bundle
from engine.bundle.verification import Trial
from engine.cli.console import run_command
from engine.errors import BuildError, OutputError
from export.build import steps as build_module
from export.build.build_plan import make_plan
from export.build.request import BuildRequest, LoraRequest
from export.build.steps import build, differences
from export.build.trial import TrialRun
from export.build.weights import write_weights
from export.build_engines import main


@pytest.fixture
def request_of(tiny, tmp_path):
    def make(**changes):
        fields = {
            "sdxl": tiny.sdxl,
            "supir": tiny.supir,
            "tokenizer": tiny.tokenizer,
            "output": tmp_path / "bundle",
            "preset": "lightning",
            "settings": {"min_size": 64, "steps": 3},
        }
        return BuildRequest(**{**fields, **changes})

    return make


@pytest.fixture
def untried(monkeypatch):
    """Builds that run no graph: for what becomes of folders, states and locks."""
    trial = TrialRun(Trial(method="not run", symbols={}), {}, {})
    monkeypatch.setattr(build_module, "try_graph", lambda *_: trial)


@pytest.fixture
def built(bundle_fp32, tmp_path):
    """The bundle that `request_of()` asks for, finished."""
    return open_bundle(shutil.copytree(bundle_fp32, tmp_path / "bundle"))


def run(request, say=lambda line: None):
    return build(make_plan(request), Silent(), say)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_demo_is_built_where_restore_looks_and_restores_a_photo(run_build, run_restore, photo_path, tmp_path):
    place = {"RESTORE_BUNDLE": str(tmp_path / "bundle")}
    done = run_build(**place)
    assert done.returncode == 0, done.stderr
    assert "merged LoRA landscape × 1: LoRA, rank 26, alpha 2600, " in done.stdout
    assert len(re.findall(r"agreed with torch to \d\.\de-07 when it was traced, runs", done.stdout)) == 7
    assert done.stdout.count("in slices too") == 3
    assert "100 %" in done.stderr
    assert "left" in done.stderr
    restored = run_restore(photo_path, "-o", tmp_path / "out.png", "--steps", 1, **place)
    assert restored.returncode == 0, restored.stderr
    assert "this is the demo, a small model" in restored.stderr
    assert (tmp_path / "out.png").is_file()


def test_a_finished_bundle_is_left_alone_unless_something_changed(untried, request_of, built, tiny, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bundle").iterdir()}
    second = run(request_of())
    assert (second.status, second.changes) == ("unchanged", ())
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bundle").iterdir()} == before

    said = []
    face = LoraRequest("face", tiny.loras["face"], 0.5)
    third = run(request_of(preset="lightning-lora", loras=(face,)), said.append)
    assert third.status == "built"
    assert len(said) == 3
    assert said[0] == "changed: preset: lightning → lightning-lora"
    assert said[1].startswith("changed: loras.face: nothing → ")
    assert re.fullmatch(r"writes \d+ MB to a disk with .+ free", said[2])
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert [(lora.name, lora.scale, lora.ranks, lora.alphas, lora.layers) for lora in manifest.loras] == [
        ("face", 0.5, (4,), (2.0,), 136)
    ]
    assert hidden(tmp_path) == []


def test_a_changed_checkpoint_is_noticed(untried, request_of, built, tiny, tmp_path):
    name = "model.diffusion_model.out.2.bias"
    changed = layouts.load(tiny.sdxl)[name] + 1
    sdxl = layouts.edit(tiny.sdxl, tmp_path / "sdxl.safetensors", add={name: changed})
    assert [line.split(":")[0] for line in run(request_of(sdxl=sdxl)).changes] == ["sources.sdxl sdxl.safetensors"]


def test_a_changed_unet_in_a_folder_is_noticed(tiny, tmp_path):
    """diffusers gives the UNet's and the VAE's file one name."""
    folder = layouts.write_diffusers_folder(tiny.sdxl, tmp_path / "m")
    request = BuildRequest(
        sdxl=folder, supir=tiny.supir, tokenizer=tiny.tokenizer, output=tmp_path / "b", preset="lightning"
    )

    def key():
        plan = make_plan(request)
        return plan.key(plan.hash_sources())

    before = key()
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        file = next((folder / component).glob("*.safetensors"))
        tensors = layouts.load(file)
        name = next(name for name in tensors if name.endswith(".bias"))
        save_file({**tensors, name: tensors[name] + 1}, file)
        after = key()
        assert [line.split(":")[0] for line in differences(before, after)] == [f"sources.sdxl {component}/{file.name}"]
        before = after


def test_a_move_that_fails_gives_the_old_bundle_back(untried, request_of, built, tmp_path, monkeypatch):
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".building"):
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="cannot build the bundle"):
        run(request_of(preset="supir"))
    monkeypatch.undo()
    assert open_bundle(tmp_path / "bundle").manifest.preset == built.manifest.preset
    assert hidden(tmp_path) == []


def test_a_bug_leaves_nothing_behind(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "try_graph", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(request_of())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle_is_built_again(untried, request_of, built, tmp_path):
    (tmp_path / "bundle" / "unet.onnx").write_bytes(b"")
    assert run(request_of()).status == "built"
    open_bundle(tmp_path / "bundle")


def test_merged_weights_are_in_the_bundle(untried, request_of, tiny, tmp_path):
    run(request_of(preset="ours", loras=(LoraRequest("face", tiny.loras["face"], 0.5),)))
    merged = layouts.load(tmp_path / "bundle" / "weights.safetensors")
    base, lora = layouts.load(tiny.sdxl), layouts.load(tiny.loras["face"])
    ldm = "input_blocks.5.1.transformer_blocks.0.attn2.to_v"
    flat = "lora_unet_" + ldm.replace(".", "_")
    delta = lora[f"{flat}.lora_up.weight"].astype(np.float64) @ lora[f"{flat}.lora_down.weight"].astype(np.float64)
    expected = base[f"model.diffusion_model.{ldm}.weight"] + 0.5 * (2.0 / 4) * delta
    ours = merged["unet.down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v.weight"]
    assert np.array_equal(ours, expected.astype(np.float32))  # added in float64, rounded once
    untouched = "controlnet.down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v.weight"
    assert np.array_equal(merged[untouched], layouts.load(tiny.supir)[f"model.control_model.{ldm}.weight"])


def test_scale_zero_merges_to_the_base_to_the_bit(request_of, tiny, bundle_fp32, tmp_path):
    plan = make_plan(request_of(preset="ours", loras=(LoraRequest("face", tiny.loras["face"], 0.0),)))
    digest = write_weights(tmp_path / "w.safetensors", plan.layout, plan.tensors, plan.loras)
    assert digest == open_bundle(bundle_fp32).manifest.weights.sha256


class Stop(BaseException):
    """What Ctrl-C or a kill looks like from inside."""


def test_a_stopped_build_goes_on_where_it_was(untried, request_of, tmp_path, monkeypatch):
    tried = []
    skip = build_module.try_graph

    def stop_at_the_fourth(definition, *rest):
        if len(tried) == 3:
            raise Stop
        tried.append(definition.name)
        return skip(definition, *rest)

    monkeypatch.setattr(build_module, "try_graph", stop_at_the_fourth)
    with pytest.raises(Stop):
        run(request_of())
    assert not (tmp_path / "bundle").exists()
    weights = tmp_path / ".bundle.building" / "weights.safetensors"
    written = weights.stat().st_mtime_ns

    monkeypatch.setattr(build_module, "try_graph", skip)
    said = []
    result = run(request_of(), said.append)
    assert result.resumed == ("weights.safetensors", "text_encoder", "text_encoder_2", "denoise_encoder")
    assert said[1:] == ["goes on behind: weights.safetensors, text_encoder, text_encoder_2, denoise_encoder"]
    assert (tmp_path / "bundle" / "weights.safetensors").stat().st_mtime_ns == written
    open_bundle(tmp_path / "bundle")
    assert hidden(tmp_path) == []


def test_a_killed_build_goes_on_too(tmp_path):
    command = [sys.executable, str(ROOT / "export" / "build_engines.py"), "--output", str(tmp_path / "bundle")]
    command += ["--preset", "lightning"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    state = tmp_path / ".bundle.building" / "state.json"
    while process.poll() is None and not state.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "bundle").exists()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=280, check=True)
    report = json.loads(done.stdout)
    assert report["status"] == "built"
    assert report["resumed"][0] == "weights.safetensors"


def test_a_stopped_build_of_something_else_is_not_mixed_in(untried, request_of, monkeypatch):
    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "try_graph", stop)
        with pytest.raises(Stop):
            run(request_of())
    assert run(request_of(preset="supir")).resumed == ()


@pytest.mark.parametrize("before", [False, True])
def test_a_failed_build_leaves_what_was_there(request_of, bundle_fp32, tmp_path, monkeypatch, before):
    if before:
        shutil.copytree(bundle_fp32, tmp_path / "bundle")
    kept = open_bundle(tmp_path / "bundle").digest if before else None

    def fail(definition, *_):
        raise BuildError("the graph gives values that are not finite", where=definition.name)

    monkeypatch.setattr(build_module, "try_graph", fail)
    with pytest.raises(BuildError, match="text_encoder: the graph gives values that are not finite"):
        run(request_of(preset="supir"))
    assert (tmp_path / "bundle").exists() is before
    assert not before or open_bundle(tmp_path / "bundle").digest == kept
    assert hidden(tmp_path) == []


def test_a_weight_that_is_nan_fails_the_build_by_name(request_of, tiny, tmp_path):
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    broken = layouts.load(tiny.sdxl)[name]
    broken[3, 4] = float("nan")
    sdxl = layouts.edit(tiny.sdxl, tmp_path / "sdxl.safetensors", add={name: broken})
    with pytest.raises(Exception, match=rf"sdxl\.safetensors: {name}: a tensor holds values that are not finite"):
        run(request_of(sdxl=sdxl))
    assert not (tmp_path / "bundle").exists()
    assert hidden(tmp_path) == []


def test_too_little_room_is_said_beforehand(request_of, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000_000)
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"(?s)not enough room on the disk.*expected: +\d+ MB.*50 MB free"):
        run(request_of())
    assert hidden(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(request_of, tmp_path):
    """A real full disk, where this machine lets the test mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        (disk / "filler").write_bytes(bytes(60 << 20))
        plan = make_plan(request_of(output=disk / "bundle"))
        real, build_module.check_room = build_module.check_room, lambda plan, partial: 0
        try:
            with pytest.raises(OutputError, match="the disk is full"):
                build(plan, Silent(), lambda line: None)
        finally:
            build_module.check_room = real
        assert [path.name for path in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_builders_do_not_meet(request_of, tmp_path):
    with FileLock(tmp_path / ".bundle.lock"), pytest.raises(BuildError, match="another build of this bundle"):
        run(request_of())


def named(tiny):
    files = {"sdxl": tiny.sdxl, "supir": tiny.supir, "tokenizer": tiny.tokenizer}
    arguments = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    return arguments + [text for name, path in tiny.loras.items() for text in ("--lora", f"{name}={path}")]


def test_a_dry_run_reads_headers_and_writes_nothing(tiny, tmp_path, capsys):
    arguments = ["--dry-run", "--output", str(tmp_path / "bundle"), *named(tiny)]
    assert run_command(main, arguments) == 0
    text = capsys.readouterr().out
    for part in (
        "read   sdxl",
        "96.7 MB",
        "merge  face × 1: LoRA, rank 4, alpha 2, 136 weights",
        "34,686,995 parameters",
    ):
        assert part in text
    assert run_command(main, [*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["write"]["weights_bytes"] > 138e6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "expected"), [([], 1024), (["--min-size", "512"], 512)])
def test_a_bundle_says_the_size_that_it_works_at(tiny, tmp_path, option, expected):
    from export.build.command import _parser, _request

    request = _request(_parser().parse_args([*named(tiny), *option, "--output", str(tmp_path / "bundle")]))
    assert make_plan(request).defaults.min_size == expected


def test_a_size_that_is_impossible_is_told(tiny, tmp_path, capsys):
    arguments = [*named(tiny), "--min-size", "5", "--output", str(tmp_path / "bundle")]
    assert run_command(main, arguments) == 2
    assert "min_size" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_demo_without_its_weights_is_told(monkeypatch, tmp_path, capsys):
    from export.demo import files

    monkeypatch.setattr(files, "SDXL", tmp_path / "sdxl.safetensors")
    assert run_command(main, ["--output", str(tmp_path / "bundle")]) == 1
    assert "the demo's weights are not here" in capsys.readouterr().err


def test_json_reports_the_whole_manifest(tiny, tmp_path, capsys):
    assert run_command(main, ["--preset", "lightning-8", "--output", str(tmp_path / "x"), "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "built"
    assert report["manifest"] == json.loads((tmp_path / "x" / MANIFEST).read_text())


@pytest.mark.parametrize("layout", ["diffusers", "sharded", "unet", "ckpt"])
def test_every_layout_builds_the_same_weights(request_of, tiny, bundle_fp32, tmp_path, layout):
    changes = {
        "diffusers": lambda: {"sdxl": layouts.write_diffusers_folder(tiny.sdxl, tmp_path / "m")},
        "sharded": lambda: {"sdxl": layouts.write_diffusers_folder(tiny.sdxl, tmp_path / "m", shards=3)},
        "unet": lambda: {"unet": layouts.write_diffusers_unet(tiny.sdxl, tmp_path / "unet.safetensors")},
        "ckpt": lambda: {"supir": layouts.edit(tiny.supir, tmp_path / "supir.ckpt")},
    }[layout]()
    plan = make_plan(request_of(**changes))
    digest = write_weights(tmp_path / "w.safetensors", plan.layout, plan.tensors, plan.loras)
    assert digest == open_bundle(bundle_fp32).manifest.weights.sha256


def test_a_clip_folder_of_vocabulary_and_merges(request_of, tiny, tmp_path):
    """CLIP's own files, vocab.json and merges.txt, become one tokenizer.json."""
    from tokenizers import Tokenizer

    from export.checkpoint.tokenizer import load_tokenizer

    original = Tokenizer.from_file(str(tiny.tokenizer / "tokenizer.json"))
    model = json.loads(original.to_str())["model"]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    text = "A dog's photo, high resolution — 猫"
    assert load_tokenizer(folder).encode(text).ids == original.encode(text).ids


def test_differences_are_told_by_their_place():
    old = {"a": 1, "b": {"c": "x", "d": [1]}, "gone": True}
    new = {"a": 1, "b": {"c": "y", "d": [1, 2]}, "new": {"e": 0}}
    assert differences(old, new) == [
        "b.c: x → y",
        "b.d: [1] → [1, 2]",
        "gone: True → nothing",
        "new: nothing → {'e': 0}",
    ]


def test_help_is_quick_and_complete(run_build):
    started = time.monotonic()
    done = run_build("--help")
    assert done.returncode == 0
    assert time.monotonic() - started < 5
    for option in ("--sdxl", "--unet", "--supir", "--lora", "--tokenizer", "--preset", "--precision", "--dry-run"):
        assert option in done.stdout


def test_bf16_is_built_and_refused_by_the_cpu_with_the_reason(request_of, tmp_path, photo_path):
    plan = make_plan(request_of(precision="bf16"))
    assert {graph.definition.spec.precision for graph in plan.graphs.values()} == {"bf16"}
    spec = plan.graphs["text_encoder"].definition.spec
    from engine.backends.ort import OrtBackend
    from engine.errors import BackendError

    with pytest.raises(BackendError, match="(?s)no bf16 operators.*--precision fp32"):
        OrtBackend().open_file(tmp_path / "text_encoder.onnx", spec)


def test_a_bundle_of_each_kind_restores(bundle_fp32, bundle_fp16, photo_path):
    for bundle in (bundle_fp32, bundle_fp16):
        with Restorer.open(bundle) as restorer:
            assert restorer.restore(photo_path, steps=1).photo.size == (384, 256)


def test_a_build_compares_with_torch_where_that_is_asked_for(request_of, bundle_fp32, tmp_path):
    """The graphs are those of a build that does not, to the byte, and the record has both."""
    pytest.importorskip("torch", reason="needs the export extra")
    run(request_of(verify="torch"))
    compared, plain = (open_bundle(folder).manifest for folder in (tmp_path / "bundle", bundle_fp32))
    for name, graph in compared.graphs.items():
        assert graph.verification.in_build.worst < graph.verification.in_build.bound
        assert "the bundle's weights" in graph.verification.in_build.method
        assert graph.verification.when_traced == plain.graphs[name].verification.when_traced
        assert plain.graphs[name].verification.in_build is None
        assert graph.file == plain.graphs[name].file
    assert compared.weights == plain.weights
    assert "torch" in compared.built_with
    assert "torch" not in plain.built_with


@pytest.mark.parametrize("module", ["lora", "keymap", "weights", "checkpoint", "torch_zip"])
def test_a_change_of_code_that_decides_the_weights_is_noticed(request_of, monkeypatch, tmp_path, module):
    """A bundle that a mended merge would make otherwise is not up to date."""
    from export.build import build_plan as plan
    from export.graphs import code_key

    source = next(path for path in plan._SOURCES if path.stem == module)
    changed = tmp_path / source.name
    changed.write_text(source.read_text() + "\nMENDED = True\n")
    sources = tuple(changed if path == source else path for path in plan._SOURCES)

    def key():
        code_key._file_key.cache_clear()
        planned = make_plan(request_of())
        return planned.key(planned.hash_sources())

    before = key()
    monkeypatch.setattr(plan, "_SOURCES", sources)
    assert [line.split(":")[0] for line in differences(before, key())] == ["code"]
    changed.write_text(source.read_text() + "\n# a comment\n")
    assert key() == before
