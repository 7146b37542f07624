"""What a photo shows, in words: from a text file beside it, or from a server that looks at it.

A caption is never needed: whatever goes wrong is a remark, and the photo is restored without. It is no setting, so no
request to a server of ours can have it call an address.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import threading
import time
import unicodedata
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from engine.errors import BackendError, RestoreError, UsageError, first_line, from_os_error
from engine.image.preprocess import PhotoLike
from engine.image.preview import small_jpeg
from engine.pipeline.restorer import Restorer
from engine.settings import MAX_TEXT

#: The source of captions that are text files beside the photos.
SIDECAR = "sidecar"
#: The environment's key for the server, sent as OpenAI's clients send theirs.
KEY_VARIABLE = "RESTORE_CAPTION_KEY"
#: Longer side in pixels of what a server is shown: as much as common models look at.
SHOWN_PX = 1024

_INSTRUCTION = (
    "Describe this photo in one or two sentences for someone who will restore it: the subject, materials, surroundings "
    "and light. It is blurred and noisy: do not mention blur, noise, quality or the photo itself."
)
_MAX_TOKENS = 160
#: Characters of a caption; what is longer is no answer to the instruction.
_MAX_CAPTION = 1200
_MAX_ANSWER_BYTES = 1_000_000
#: Seconds for one answer: a large model on a CPU needs a minute or two.
_ANSWER_S = 180.0
_CONNECT_S = 5.0
_ATTEMPTS = 3
_BUSY = (429, 500, 502, 503, 504)
#: Photos in a row without an answer, after which a server is not asked any more.
_GIVE_UP_AFTER = 3
#: How models begin when they will not answer.
_REFUSAL = re.compile(
    r"(i['’]?m (very |really )?sorry|sorry\b|i (can['’]?t|can ?not|am unable|am not able|won['’]?t)\b|unable to\b|"
    r"as an? (ai|artificial|language)|i (do not|don['’]?t) (see|have access))",
    re.IGNORECASE,
)
_THOUGHTS = re.compile(r"<think(ing)?>.*?(</think(ing)?>|\Z)", re.DOTALL | re.IGNORECASE)


class CaptionError(RestoreError):
    """There is no caption; the photo is restored without."""


@dataclass(frozen=True)
class Caption:
    """What a photo shows.

    Attributes:
        text: in words; empty if there is none.
        source: "sidecar", or the server's address.
        model: that the server was asked for; None for its own choice, and for a text file.
        problem: why there is no text, if something went wrong.
    """

    text: str
    source: str
    model: str | None = None
    problem: str | None = None

    def joined(self, prompt: str) -> str:
        """Return a prompt with the caption behind it, as the networks are told."""
        return ", ".join(part for part in (prompt.strip(), self.text) if part)[:MAX_TEXT]

    def as_data(self, prompt: str) -> dict[str, Any]:
        """Return what a result's metadata keeps of it; `prompt` is what was asked for without it."""
        data = {"source": self.source, "model": self.model, "prompt": prompt, "text": self.text}
        return data if self.problem is None else {**data, "problem": self.problem}


class Captioner(Protocol):
    """Who knows what photos show.

    Attributes:
        source, model: as in `Caption`.
        looks: whether it must be shown the photo.
    """

    @property
    def source(self) -> str: ...

    @property
    def model(self) -> str | None: ...

    @property
    def looks(self) -> bool: ...

    def describe(self, photo: Path, picture: bytes | None) -> Caption:
        """Return a photo's caption.

        Args:
            photo: its file.
            picture: a JPEG of its stage 1, for those who look.
        Raises:
            CaptionError: there is none.
        """
        ...


@dataclass(frozen=True)
class Sidecar:
    """Text files beside the photos, `boat.txt` for `boat.jpg`, as trainers have them."""

    source: str = SIDECAR
    model: None = None
    looks: bool = False

    def describe(self, photo: Path, picture: bytes | None = None) -> Caption:
        """Return what the text file says; see `Captioner`."""
        path = sidecar_of(photo)
        try:
            with path.open("rb") as file:
                content = file.read(4 * MAX_TEXT + 1)
        except FileNotFoundError:
            raise CaptionError(f"no caption: there is no {path.name}") from None
        except OSError as error:
            raise CaptionError(f"no caption: {from_os_error(error, path, 'read it', 'read').problem}") from error
        try:
            text = _plain(content.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise CaptionError(f"no caption: {path.name} is no text in UTF-8") from None
        if len(text) > MAX_TEXT:
            raise CaptionError(f"no caption: {path.name} is longer than {MAX_TEXT} characters")
        if not text:
            raise CaptionError(f"no caption: {path.name} is empty")
        return Caption(text, self.source)


@dataclass
class CaptionServer:
    """A server that speaks OpenAI's chat completions with images, such as vLLM, llama.cpp, Ollama or LM Studio.

    Attributes:
        source: its address, up to and without `/chat/completions`.
        model: that it is asked for; None leaves out the name where the server has one model only.
        key: sent to it as a bearer token; never shown.
    """

    source: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    looks: bool = True
    _failures: int = 0

    def describe(self, photo: Path, picture: bytes | None) -> Caption:
        """Ask the server; see `Captioner`."""
        assert picture is not None, "it must be shown the photo"
        if self._failures >= _GIVE_UP_AFTER:
            raise CaptionError(
                f"no caption: {self.source} did not answer for {_GIVE_UP_AFTER} photos, and is left alone"
            )
        try:
            answer = self._answer(picture)
        except CaptionError:
            self._failures += 1
            raise
        self._failures = 0
        return Caption(_caption_in(answer, self.source), self.source, self.model)

    def _answer(self, picture: bytes) -> bytes:
        import httpx
        from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

        ask = retry(
            retry=retry_if_exception_type((httpx.ConnectError, httpx.RemoteProtocolError, _BusyError)),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            reraise=True,
        )(self._ask)
        try:
            return ask(picture)
        except httpx.TimeoutException as error:
            raise CaptionError(f"no caption: {self.source} did not answer in time") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CaptionError(f"no caption: {self.source} is not reached: {str(error)[:200]}") from error

    def _ask(self, picture: bytes) -> bytes:
        """Send one request, and return the answer's body: bounded in size, and in time as a whole."""
        import httpx

        body: dict[str, Any] = {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": _INSTRUCTION},
                        {"type": "image_url", "image_url": {"url": _data_url(picture)}},
                    ],
                }
            ],
            "max_tokens": _MAX_TOKENS,
            "temperature": 0,
            "stream": False,
        }
        if self.model is not None:
            body["model"] = self.model
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        end = time.monotonic() + _ANSWER_S
        timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
        # An answer that sends somebody elsewhere would send the photo there.
        with (
            httpx.Client(timeout=timeout, follow_redirects=False) as client,
            client.stream("POST", f"{self.source}/chat/completions", json=body, headers=headers) as response,
        ):
            content = b""
            for chunk in response.iter_bytes(65_536):
                content += chunk
                if len(content) > _MAX_ANSWER_BYTES:
                    raise CaptionError(f"no caption: {self.source} sent more than {_MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > end:
                    raise CaptionError(f"no caption: {self.source} did not answer in time")
            if response.status_code in _BUSY:
                raise _BusyError(f"no caption: {self.source} answered {response.status_code}{_said(content)}")
            if response.status_code != httpx.codes.OK:
                raise CaptionError(f"no caption: {self.source} answered {response.status_code}{_said(content)}")
            return content


class _BusyError(CaptionError):
    """The server may answer if it is asked again."""


def make_captioner(caption: str, model: str | None = None) -> Captioner | None:
    """Return who says what photos show.

    Args:
        caption: "none", "sidecar", or a server's address.
        model: that a server is asked for.
    Raises:
        UsageError: the address is none, or there is a model without a server.
        BackendError: the library that asks servers is missing.
    """
    if caption in ("none", SIDECAR):
        if model is not None:
            raise UsageError("only a server has models", where="--caption-model", fix="add --caption URL")
        return Sidecar() if caption == SIDECAR else None
    address = urlsplit(caption)
    if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        raise UsageError(
            "is no server's address",
            where="--caption",
            expected="none, sidecar, or an address such as http://localhost:8000/v1",
            found=caption,
        )
    if address.username is not None or address.password is not None:
        fix = f"put the key into the environment, as {KEY_VARIABLE}"
        raise UsageError("an address is no place for a key: metadata would hold it", where="--caption", fix=fix)
    try:
        import httpx  # noqa: F401
        import tenacity  # noqa: F401
    except ModuleNotFoundError as error:
        fix = "pip install 'restoration-engine[captions]'"
        raise BackendError(
            "--caption with a server needs a library", found=f"no module {error.name}", fix=fix
        ) from error
    source = caption.rstrip("/").removesuffix("/chat/completions")
    return CaptionServer(source, model, os.environ.get(KEY_VARIABLE))


def caption_picture(restorer: Restorer, photo: PhotoLike) -> bytes:
    """Return what a captioner that looks is shown: the photo's stage 1 as a small JPEG."""
    return small_jpeg(restorer.stage1(photo), SHOWN_PX)


def ask_ahead(captioner: Captioner, photo: Path, picture: bytes | None) -> Future[Caption]:
    """Ask what a photo shows while something else is done; what goes wrong is the caption's `problem`.

    In a thread that nobody waits for: an answer may be minutes away when the work is interrupted.

    Args:
        captioner: who is asked.
        photo, picture: as for `Captioner.describe`.
    """
    asked: Future[Caption] = Future()

    def ask() -> None:
        try:
            asked.set_result(captioner.describe(photo, picture))
        except CaptionError as error:
            asked.set_result(Caption("", captioner.source, captioner.model, error.problem))
        except Exception as error:  # a library's; no caption is worth a photo
            problem = f"no caption: {type(error).__name__}: {first_line(error)}"
            asked.set_result(Caption("", captioner.source, captioner.model, problem))

    threading.Thread(target=ask, name="caption", daemon=True).start()
    return asked


def asked_of(captioner: Captioner | None) -> dict[str, Any]:
    """Return what a result's metadata says of captions before there is one; nothing where none is wanted."""
    return {} if captioner is None else {"caption": {"source": captioner.source, "model": captioner.model}}


def as_asked(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return a result's metadata as it was asked for: with the prompt and whose caption, without the caption."""
    caption, settings = provenance.get("caption"), provenance.get("settings")
    if not isinstance(caption, dict) or not isinstance(settings, dict):
        return provenance
    asked = {"source": caption.get("source"), "model": caption.get("model")}
    return {**provenance, "settings": {**settings, "prompt": caption.get("prompt")}, "caption": asked}


def add_captions(
    parser: argparse.ArgumentParser,
    sources: str = "none|sidecar|URL",
    *,
    default: str = "none",
    what: str = "what photos show, added to the prompt",
) -> None:
    """Add the options that say where captions come from.

    Args:
        parser: of the command.
        sources: that it knows. default: the one that it takes by itself.
        what: captions are, for the help.
    """
    group = parser.add_argument_group("captions")
    beside = "sidecar is the text file beside each photo, boat.txt for boat.jpg; " if SIDECAR in sources else ""
    group.add_argument(
        "--caption",
        default=default,
        metavar=sources,
        help=f"{what}; {beside}URL is a server that speaks OpenAI's chat completions "
        f"with images, such as http://localhost:8000/v1, and is sent a small picture; its key is in ${KEY_VARIABLE}; "
        f"default: {default}",
    )
    group.add_argument("--caption-model", metavar="NAME", help="that the server is asked for; default: its own choice")


def sidecar_of(photo: Path) -> Path:
    """Return where a photo's text file is, if it has one."""
    return photo.with_suffix(".txt")


def _caption_in(answer: bytes, source: str) -> str:
    """Return the caption that a server's answer holds.

    Raises:
        CaptionError: it holds none, or nonsense.
    """
    try:
        choice = json.loads(answer)["choices"][0]
        message = choice["message"]
        text, refusal = message["content"], message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CaptionError(f"no caption: {source} did not answer as a chat does{_said(answer)}") from None
    if isinstance(text, list):  # parts, as some servers write them
        text = " ".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    if refusal or text is None or not isinstance(text, str):
        raise CaptionError(f"no caption: the model refused{_said(str(refusal or '').encode())}")
    text = _plain(_THOUGHTS.sub(" ", text)).strip("\"'“” ")
    if choice.get("finish_reason") == "length":  # cut off: what is whole of it
        text = text[: text.rfind(".") + 1] or text
    if not text:
        raise CaptionError("no caption: the model said nothing")
    if _REFUSAL.match(text):
        raise CaptionError(f"no caption: the model refused{_said(text.encode())}")
    words = text.lower().split()
    if len(text) > _MAX_CAPTION or not any(letter.isalpha() for letter in text):
        raise CaptionError(f"no caption: the model answered with {len(text)} characters of something else")
    if len(words) > 30 and len(set(words)) < len(words) / 4:
        raise CaptionError("no caption: the model repeated itself")
    return text


def _plain(text: str) -> str:
    """Return a text in one line, without control characters."""
    kept = (letter if unicodedata.category(letter)[0] != "C" else " " for letter in text)
    return " ".join("".join(kept).split())


def _said(content: bytes) -> str:
    text = _plain(content[:300].decode("utf-8", "replace"))
    return f": {text[:150]}" if text else ""


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
