"""Captions by `transformers serve` with a small vision-language model, made here: a real server, model and protocol."""

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from itertools import pairwise

import pytest

from engine.cli.captions import CaptionServer, caption_picture

#: What the model says: its networks pass each word on, and its last layer knows the word that follows.
SENTENCE = ["answer:", "a", "small", "boat", "on", "the", "lake", "."]
TEMPLATE = (
    "{% for message in messages %}user: {% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %} answer:"
)


def make_model(folder):
    """Write a LLaVA of 100,000 parameters, its image processor and its tokenizer of a few words."""
    torch = pytest.importorskip("torch", reason="needs the export extra")
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "user:", *SENTENCE]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=32)
    text = transformers.LlamaConfig(**small, vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=3)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=16)
    )
    language = model.model.language_model
    with torch.no_grad():
        meaning = torch.nn.functional.normalize(torch.randn(len(words), 32), dim=1)
        language.embed_tokens.weight.copy_(meaning)
        for layer in language.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        chain = [words.index(word) for word in (*SENTENCE, "</s>")]
        for word, following in pairwise(chain):
            model.lm_head.weight[following] += 10 * meaning[word]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 3
    model.save_pretrained(folder)
    side = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(**side),
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


@pytest.fixture
def address(tmp_path):
    """A server of the model."""
    pytest.importorskip("httpx", reason="needs the captions extra: pip install '.[captions]'")
    pytest.importorskip("fastapi", reason="needs fastapi, which comes with the web extra")
    program = shutil.which("transformers")
    if program is None:
        pytest.skip("needs transformers: pip install '.[test]'")
    make_model(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "serve", str(tmp_path / "model"), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + 200
            while time.monotonic() < end:
                assert server.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/v1", str(tmp_path / "model")
        finally:
            server.terminate()
            server.wait(20)


@pytest.mark.slow
def test_a_real_model_describes_a_photo(address, restorer, photo_path):
    server, model = address
    captioner = CaptionServer(server, model)
    caption = captioner.describe(photo_path, caption_picture(restorer, photo_path))
    assert caption.text == "a small boat on the lake ."
