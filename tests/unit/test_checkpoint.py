import pickle

import pytest
from synthetic import TINY_UNET

torch = pytest.importorskip("torch", reason="needs the export extra")

import layouts
import numpy as np
from safetensors.numpy import save_file

from engine.errors import CheckpointError
from export.checkpoint.checkpoint import identify, open_file, open_sdxl, open_supir, open_unet

UNET = "model.diffusion_model."


def same(found, expected):
    assert set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        read = found.tensors[name].read()
        assert tuple(read.shape) == found.tensors[name].shape == tensor.shape
        assert read.dtype == tensor.read().dtype
        assert np.array_equal(read, tensor.read())
    return True


@pytest.fixture(scope="module")
def sdxl(tiny):
    return open_sdxl(tiny.sdxl)


@pytest.fixture(scope="module")
def supir(tiny):
    return open_supir(tiny.supir)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize(("shards", "variant"), [(1, ""), (3, ""), (1, "fp16"), (2, "fp16")])
def test_diffusers_folders(tiny, sdxl, tmp_path, shards, variant, prefix):
    folder = layouts.write_diffusers_folder(tiny.sdxl, tmp_path / "m", shards=shards, variant=variant, prefix=prefix)
    found = open_sdxl(folder)
    assert same(found, sdxl)
    assert len(found.files) == 4 * shards


def test_unet_alone_in_every_layout(tiny, sdxl, tmp_path):
    alone = open_unet(layouts.write_diffusers_unet(tiny.sdxl, tmp_path / "unet.safetensors"))
    assert set(alone.tensors) == {name for name in sdxl.tensors if name.startswith("unet.")}
    layouts.write_diffusers_folder(tiny.sdxl, tmp_path / "m")
    ldm = {name: tensor for name, tensor in layouts.load(tiny.sdxl).items() if name.startswith(UNET)}
    for prefix in ("", "diffusion_model."):
        save_file({prefix + name.removeprefix(UNET): value for name, value in ldm.items()}, tmp_path / f"{prefix}ldm")
    for path in (
        tiny.sdxl,
        tmp_path / "m",
        tmp_path / "m" / "unet",
        tmp_path / "ldm",
        tmp_path / "diffusion_model.ldm",
    ):
        assert same(open_unet(path), alone)
    with pytest.raises(CheckpointError, match=r"(?s)another model than --sdxl needs.*UNet \(LDM\).*with --unet"):
        open_sdxl(tmp_path / "ldm")


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_supir_files(tiny, supir, tmp_path, suffix, prefixed):
    file = layouts.edit(
        tiny.supir,
        tmp_path / f"supir{suffix}",
        add={"model.control_model.mask_LQ" if prefixed else "control_model.mask_LQ": np.zeros(1, np.float32)},
        rename=(lambda name: name) if prefixed else (lambda name: name.removeprefix("model.")),
    )
    assert same(open_supir(file), supir)


def test_pickles_with_a_state_dict_inside(tiny, supir, tmp_path):
    tensors = {name: torch.from_numpy(value) for name, value in layouts.load(tiny.supir).items()}
    torch.save({"state_dict": tensors}, tmp_path / "supir.ckpt")
    assert same(open_supir(tmp_path / "supir.ckpt"), supir)


def test_half_precision_is_read_as_it_is(tiny, tmp_path):
    file = layouts.edit(tiny.supir, tmp_path / "supir.safetensors", dtype=np.float16)
    assert {tensor.read().dtype for tensor in open_supir(file).tensors.values()} == {np.dtype(np.float16)}


def test_what_belongs_to_no_network_is_ignored_and_listed(tiny, sdxl, tmp_path):
    extra = {"model_ema.decay": np.zeros(1, np.float32), "denoiser.sigmas": np.zeros(10, np.float32)}
    found = open_sdxl(layouts.edit(tiny.sdxl, tmp_path / "sdxl.safetensors", add=extra))
    assert same(found, sdxl)
    assert sorted(found.ignored) == sorted(extra)


def test_files_of_a_folder_are_told_apart(tiny, tmp_path):
    """diffusers gives the UNet's and the VAE's file one name."""
    found = open_sdxl(layouts.write_diffusers_folder(tiny.sdxl, tmp_path / "m"))
    names = [found.file_name(file) for file in found.files]
    assert len(set(names)) == len(names) == 4
    assert "unet/diffusion_pytorch_model.safetensors" in names


def test_opening_reads_headers_only(tiny):
    tensor = open_sdxl(tiny.sdxl).tensors["unet.conv_in.weight"]
    assert tensor.name == "model.diffusion_model.input_blocks.0.0.weight"
    assert tensor.file == tiny.sdxl


def test_diffusers_names_are_those_of_diffusers(sdxl):
    """Our names of the UNet and the VAE against diffusers' own modules of the same sizes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**TINY_UNET)
        vae = AutoencoderKL(
            block_out_channels=(32, 64, 128, 128),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    for net, module in (("unet", unet), ("vae", vae)):
        expected = {f"{net}.{name}": tuple(value.shape) for name, value in module.state_dict().items()}
        found = {name: tensor.shape for name, tensor in sdxl.tensors.items() if name.startswith(f"{net}.")}
        assert found == expected


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def write_pickle(path, content):
    with path.open("wb") as file:
        pickle.dump(content, file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, tiny: None, "no such file"),
        (lambda path, tiny: path.write_bytes(b""), "not a checkpoint"),
        (lambda path, tiny: path.write_text("<html>404</html>"), "not a checkpoint"),
        (lambda path, tiny: path.write_bytes(b"\x80\x02}q\x00"), "not a whole checkpoint"),
        (lambda path, tiny: torch.save({"a": torch.zeros(1, dtype=torch.int8)}, path), "plain floating-point type"),
        (lambda path, tiny: path.write_bytes(b"PK\x03\x04 not a zip"), "not a whole checkpoint"),
        (lambda path, tiny: torch.save({"a": Evil()}, path), "holds more than tensors"),
        (lambda path, tiny: write_pickle(path, {"a": Evil()}), "holds more than tensors"),
        (lambda path, tiny: torch.save({"a": torch.zeros(1), "b": 3}, path), "holds more than tensors"),
        (lambda path, tiny: torch.save([torch.zeros(1)], path), "not a dictionary of tensors"),
    ],
)
def test_pickles_that_are_not_plain_tensors(tmp_path, tiny, make, message, capsys):
    path = tmp_path / "model.ckpt"
    make(path, tiny)
    with pytest.raises(CheckpointError, match=message):
        open_file(path)
    assert "this ran" not in capsys.readouterr().out


def test_truncated_files_are_told(tmp_path, tiny):
    file = tmp_path / "sdxl.safetensors"
    file.write_bytes(tiny.sdxl.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="(?s)not a whole safetensors file.*download it again"):
        open_sdxl(file)
    pickled = layouts.edit(tiny.supir, tmp_path / "supir.ckpt")
    pickled.write_bytes(pickled.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        open_supir(pickled)


def test_quantized_files_are_told(tmp_path):
    save_file({"model.diffusion_model.label_emb.0.0.weight": np.zeros(4, np.int8)}, tmp_path / "q.safetensors")
    with pytest.raises(CheckpointError, match="(?s)plain floating-point type.*int8.*unquantized"):
        open_sdxl(tmp_path / "q.safetensors")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["lora_unet_down_blocks_1.lora_down.weight"], "LoRA"),
        (["unet.mid_block.attn.to_q.lora_A.weight"], "LoRA"),
        (
            ["cond_stage_model.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"],
            "Stable Diffusion 1 or 2",
        ),
        (["model.diffusion_model.input_blocks.0.0.weight"], "Stable Diffusion 1 or 2"),
        (["conditioner.embedders.0.model.ln_final.weight"], "SDXL refiner"),
        (["conditioner.embedders.1.model.x", "conditioner.embedders.0.transformer.x"], "SDXL (one file)"),
        (["model.diffusion_model.label_emb.0.0.weight"], "SDXL (one file)"),
        (["input_blocks.0.0.weight", "label_emb.0.0.weight"], "UNet (LDM)"),
        (["diffusion_model.input_blocks.0.0.weight", "diffusion_model.label_emb.0.0.weight"], "UNet (LDM)"),
        (["input_blocks.0.0.weight"], "Stable Diffusion 1 or 2"),
        (["unet.conv_in.w_norm"], "LoRA"),
        (["control_model.x", "diffusion_model.project_modules.1.x"], "SUPIR"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["down_blocks.0.resnets.0.conv1.weight"], "UNet (diffusers)"),
        (["transformer.wte.weight"], "something unknown"),
    ],
)
def test_models_are_told_by_their_names(names, kind):
    assert identify(names) == kind


@pytest.mark.parametrize(
    ("opener", "make", "message"),
    [
        (open_sdxl, lambda tiny, path: tiny.supir, "(?s)another model than --sdxl needs.*SUPIR.*give it with --supir"),
        (open_sdxl, lambda tiny, path: tiny.loras["face"], "(?s)found: +LoRA.*--lora NAME=FILE"),
        (open_supir, lambda tiny, path: tiny.sdxl, "(?s)another model than --supir needs.*give it with --sdxl"),
        (open_unet, lambda tiny, path: tiny.supir, "another model than --unet needs"),
        (open_sdxl, lambda tiny, path: layouts.write_diffusers_unet(tiny.sdxl, path), "(?s)give it with --unet"),
        (open_supir, lambda tiny, path: path.parent, "is a folder"),
        (open_sdxl, lambda tiny, path: path.parent, "(?s)no such folder.*a diffusers folder"),
    ],
)
def test_a_model_in_the_wrong_role_is_told(tiny, tmp_path, opener, make, message):
    with pytest.raises(CheckpointError, match=message):
        opener(make(tiny, tmp_path / "file.safetensors"))


@pytest.mark.parametrize(
    ("role", "name", "place"),
    [
        ("sdxl", "model.diffusion_model.input_blocks.9.0.weight", "has no place"),
        ("sdxl", "first_stage_model.loss.weight", "has no place"),
        ("sdxl", "conditioner.embedders.1.model.visual.proj", "has no place"),
        ("supir", "model.diffusion_model.input_blocks.0.0.weight", "has no place"),
        ("supir", "first_stage_model.denoise_encoder_s1.conv_in.weight", "has no place"),
        ("supir", "model.diffusion_model.project_modules.x.weight", "has no place"),
    ],
)
def test_unknown_tensors_of_a_known_prefix_are_named(tiny, tmp_path, role, name, place):
    source = getattr(tiny, role)
    file = layouts.edit(source, tmp_path / "file.safetensors", add={name: np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=f"{name}: a tensor {place}"):
        (open_sdxl if role == "sdxl" else open_supir)(file)


def test_a_shard_that_lacks_a_tensor_is_told(tiny, tmp_path):
    folder = layouts.write_diffusers_folder(tiny.sdxl, tmp_path / "m", shards=2)
    shard = folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    tensors = layouts.load(shard)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match="(?s)a shard lacks a tensor.*expected"):
        open_sdxl(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        open_sdxl(folder)
