"""Checkpoints and LoRAs from strangers: each is read, or ends as one error of ours, soon and in little memory."""

import json
import pickle
import struct

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the build extra")

from engine.errors import CheckpointError, LoraError
from export.checkpoint.checkpoint import open_sdxl
from export.checkpoint.lora import open_lora
from export.checkpoint.lora_config import Configuration
from export.checkpoint.model_kinds import require_noise_scheduler
from export.checkpoint.tensor_files import open_file
from export.checkpoint.tokenizer import load_tokenizer

INDICES = {
    "a list": {"weight_map": ["a"]},
    "numbers": {"weight_map": {"a": 1}},
    "a number and a text": {"weight_map": {"a": 1, "b": "x"}},
    "nothing": {"weight_map": None},
    "no object": [1],
    "another folder": {"weight_map": {"down_blocks.weight": "../../secret.safetensors"}},
    "a device": {"weight_map": {"a": "/dev/zero"}},
    "a zero byte": {"weight_map": {"a": "x\0y"}},
    "a long name": {"weight_map": {"a": "x" * 5000}},
    "deep": "[" * 200_000,
    "no text": b"\xff\xfe{",
}


@pytest.mark.parametrize("content", INDICES.values(), ids=INDICES)
def test_an_index_names_files_beside_it(tmp_path, content):
    (tmp_path / "unet").mkdir()
    data = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"not an index of shards|no text in UTF-8"):
        open_sdxl(tmp_path)


@pytest.mark.parametrize("content", ["[" * 200_000, "[1]", '"x"', "{"])
def test_configurations_in_a_folder_are_objects(tmp_path, content):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="the scheduler's configuration is damaged"):
        require_noise_scheduler(tmp_path)
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(CheckpointError, match="the tokenizer is damaged"):
        load_tokenizer(tmp_path)


def test_a_name_that_no_disk_holds_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_file(tmp_path / ("x" * 5000))


# -- configurations of LoRAs ------------------------------------------------------------------------------


def scaling(patterns, layer):
    return Configuration("LoRA test", {"": {"lora_alpha": 4, "alpha_pattern": patterns}}).scaling(layer).alpha


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", ["(a|a)*(_|[a-z0-9_]*)*([a-z0-9_]*)*!", "(([a-z0-9_])+)+!", "(.*a)*(.*a)*(.*a)*!"])
def test_patterns_of_layers_take_time_in_proportion(pattern):
    """Python's own matching takes years for the first two."""
    for layer in ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "a" * 10_000):
        assert scaling({pattern: 1}, layer) == 4


@pytest.mark.parametrize(
    ("patterns", "layer", "alpha"),
    [
        ({"to_q": 1}, "a.to_q", 1),
        ({"to_q": 1}, "a_to_q", 4),  # a part behind a dot
        ({"attn.to_q": 1}, "x.attn.to_q", 1),
        ({r"attn\d\.to_q": 1}, "x.attn2.to_q", 1),
        ({"^x.*to_q": 1}, "x.attn2.to_q", 1),
        ({"^y.*to_q": 1}, "x.attn2.to_q", 4),
        ({"to_(q|k)": 1, "to_q": 2}, "a.to_q", 1),  # the first one counts
        ({"to_q": 2, "to_(q|k)": 1}, "a.to_q", 2),
        ({f"layer{number}": number for number in range(5000)}, "x.layer4999", 4999),
    ],
)
def test_patterns_mean_what_peft_means(patterns, layer, alpha):
    import re

    by_peft = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), None)
    assert patterns.get(by_peft, 4) == alpha
    assert scaling(patterns, layer) == alpha


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"(((a{999}){999}){999})": 1}},
        {"alpha_pattern": {"a" * 300 + "*": 1}},
        {"alpha_pattern": {f"a*{number}": 1 for number in range(100)}},
        {"alpha_pattern": "x"},
        {"alpha_pattern": {"a": "x"}},
        {"lora_alpha": 10**400},
        {"r": float("inf")},
    ],
    ids=lambda config: str(config)[:30],
)
def test_configurations_without_meaning_are_told(config):
    with pytest.raises(LoraError, match="its configuration is damaged"):
        Configuration("LoRA test", {"": {"lora_alpha": 4, **config}}).scaling("a")


# -- pickles of before torch 1.6 ----------------------------------------------------------------------------


@pytest.fixture
def legacy(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the export extra")

    def save(value):
        torch.save(value, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
        return tmp_path / "x.ckpt"

    return torch, save


ODD = {
    "sparse": lambda torch: torch.eye(4).to_sparse(),
    "sparse by rows": lambda torch: torch.eye(4).to_sparse_csr(),
    "without values": lambda torch: torch.zeros(4, device="meta"),
    "quantized": lambda torch: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
    "complex": lambda torch: torch.tensor(1j),
    "of terabytes": lambda torch: torch.zeros(1).expand(10**6, 10**6),
    "no tensor": lambda torch: {"b": torch.zeros(2)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_tensors_that_are_not_plain_are_told(legacy, value):
    torch, save = legacy
    with pytest.raises(CheckpointError, match=r"x\.ckpt: a: (the pickle holds|a tensor is larger)"):
        open_file(save({"a": value(torch)}))


def test_names_that_are_no_texts_are_told(legacy):
    torch, save = legacy
    with pytest.raises(CheckpointError, match="a tensor's name is no text"):
        open_file(save({1: torch.zeros(2), "1": torch.ones(2)}))


HEAD = b"".join(
    pickle.dumps(each, 2)
    for each in (
        119547037146038801333356,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    )
)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "instructions",
    [b"R.", REBUILD + b")R.", b"h\x05.", b"X\xff", b"u.", b"(K\x01K\x02s.", b"}(K\x01t0.", b"]" * 10_000, b"", b"N."],
)
@pytest.mark.filterwarnings("ignore")
def test_a_pickle_whose_instructions_fail_is_told(tmp_path, instructions):
    """Some of these ended as other exceptions: IndexError, TypeError, struct.error."""
    pytest.importorskip("torch", reason="needs the export extra")
    (tmp_path / "x.ckpt").write_bytes(HEAD + b"\x80\x02" + instructions)
    with pytest.raises(CheckpointError, match=r"x\.ckpt: "):
        open_file(tmp_path / "x.ckpt")


# -- safetensors ---------------------------------------------------------------------------------------------


def safetensors(header, body=b""):
    data = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(data)) + data + body


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DAMAGED = {
    "overlapping tensors": safetensors({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 24]}}, bytes(24)),
    "an endless header": struct.pack("<Q", 1 << 62) + b"{}",
    "a header of 99 MB": safetensors(b'{"__metadata__":{"x":"' + b"a" * 99_000_000 + b'"}}'),
    "too many tensors": safetensors({f"t{i}": {**ENTRY, "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}),
    "an endless shape": safetensors({"a": {**ENTRY, "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}}),
    "a negative shape": safetensors({"a": {**ENTRY, "shape": [-1]}}, bytes(16)),
    "a deep header": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "half a byte": safetensors({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)),
    "nothing": b"",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_headers_without_meaning_are_told(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        open_file(tmp_path / "x.safetensors")


def test_names_that_steer_a_terminal_are_escaped(tmp_path):
    from safetensors.numpy import save_file

    pair = {"lora_up.weight": np.zeros((4, 2), np.float32), "lora_down.weight": np.zeros((2, 4), np.float32)}
    save_file({f"lora_unet_\x1b[2J.{name}": value for name, value in pair.items()}, tmp_path / "x.safetensors")
    with pytest.raises(LoraError) as caught:
        open_lora("a", tmp_path / "x.safetensors", 1.0, {})
    assert "\x1b" not in str(caught.value)
    assert r"\x1b[2J" in str(caught.value)
