"""Pieces of the page that say something: progress, errors, a result's settings. All texts are escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from engine.bundle.manifest import Manifest
from engine.cli.faces import boxes_html
from engine.cli.report_page import sizes_and_time
from engine.cli.summary import reason
from engine.errors import RestoreError
from engine.image.photo import Pixels
from engine.page.controls import differences
from engine.page.desk import Progress
from engine.page.sessions import Result
from engine.pipeline.faces import told
from engine.units import format_duration

_TEMPLATES = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_STATUS = _TEMPLATES.from_string("""
<div class="status" role="status">
{% if picture %}
  <img class="estimate" src="{{ picture }}" alt="What {{ name }} will be">
{% endif %}
  <div class="told">
{% if heading %}
    <p class="heading">{{ heading }}</p>
{% endif %}
{% if steps %}
    <progress max="{{ steps }}" value="{{ done }}" aria-label="Steps"></progress>
{% endif %}
{% if detail %}
    <p class="detail">{{ detail }}</p>
{% endif %}
{% if failures %}
    <ul class="failures">
  {% for photo, sentence in failures %}
      <li><b>{{ photo }}</b>: {{ sentence }}</li>
  {% endfor %}
    </ul>
{% endif %}
  </div>
</div>
""")
_RESULT = _TEMPLATES.from_string("""
<div class="result">
  <p class="heading">{{ name }}</p>
  <p class="detail">{{ facts }}</p>
{% for note in notes %}
  <p class="detail">Note: {{ note }}</p>
{% endfor %}
{% if faces %}
  <p class="detail">{{ faces }}</p>
{% endif %}
</div>
""")
_FACES = _TEMPLATES.from_string("""
<div class="faces">
  <div class="picture"><img src="{{ picture }}" alt="The photo, with a numbered box around each face">{{ boxes }}</div>
  <p class="detail">{{ told }}</p>
</div>
""")
_HINT = _TEMPLATES.from_string('<p class="detail">{{ text }}</p>')
_HEADER = _TEMPLATES.from_string("""
<header class="top">
  <h1>Restore photos</h1>
  <p class="detail">Bundle {{ name }}{% if notice %}: {{ notice }}{% endif %}</p>
</header>
""")


def header(name: str, notice: str) -> str:
    """Return the page's head: the bundle, and what everybody who uses it should know."""
    return _HEADER.render(name=name, notice=notice)


def hint(text: str) -> str:
    """Return a line of help for a button."""
    return _HINT.render(text=text)


def progress(photo: str, place: str, now: Progress) -> str:
    """Return how far a photo is.

    Args:
        photo: its name.
        place: which of how many, as "2 of 5", or empty.
        now: how far it is.
    """
    if not now.begun:
        others = f"{now.ahead} photo{'s' * (now.ahead != 1)}"
        detail = f"Waiting for {others} of others" if now.ahead else "Waiting"
        return _STATUS.render(name=photo, heading=_named(photo, place), detail=detail, steps=now.steps, done=0)
    if now.done == 0:
        detail = f"Preparing: {now.stage}" if now.stage else "Reading"
    elif now.done < now.steps:
        left = "" if now.seconds_left is None else f", about {format_duration(max(1, round(now.seconds_left)))} left"
        detail = f"Step {now.done} of {now.steps}{left}"
    else:
        detail = "Finishing" if now.stage == "steps" else f"Finishing: {now.stage}"
    if now.part:
        detail = f"{detail} ({now.part})"
    picture = None if now.picture is None else data_url(now.picture)
    return _STATUS.render(
        name=photo, heading=_named(photo, place), detail=detail, steps=now.steps, done=now.done, picture=picture
    )


def summary(heading: str, failures: list[tuple[str, str]]) -> str:
    """Return how a run ended: a line, and a sentence for each photo that failed."""
    return _STATUS.render(heading=heading, failures=failures)


def sentence(error: RestoreError) -> str:
    """Return an error as one sentence, with what to do; without a photo's place, which is the server's."""
    text = reason(error)
    if error.expected:
        text += f", expected {error.expected}"
    return f"{text}. To do: {error.fix}." if error.fix else f"{text}."


def problem(error: RestoreError) -> str:
    """Return what is wrong with what was asked for."""
    return _STATUS.render(failures=[(error.where or "Not started", sentence(error))])


def result(made: Result, manifest: Manifest) -> str:
    """Return what a result is: sizes, time, its preset, and the settings that differ from that or the bundle's."""
    faces = _sentence(told(made.report["faces"])) if "faces" in made.report else ""
    return _RESULT.render(name=made.output.name, facts=caption(made, manifest), notes=made.notes, faces=faces)


def faces(picture: str, found: Mapping[str, Any]) -> str:
    """Return a photo with a numbered box around each face.

    Args:
        picture: its address.
        found: the faces, as a result's provenance has them.
    """
    boxes = Markup(boxes_html(found))  # which has escaped what it shows
    return _FACES.render(picture=picture, boxes=boxes, told=_sentence(told(found, is_done=False)))


def caption(made: Result, manifest: Manifest) -> str:
    """Return a result's sizes, time and settings in one line."""
    preset = [] if made.preset is None else [f"preset {made.preset}"]
    told = differences(made.settings, manifest.settings(made.preset))
    return ", ".join([sizes_and_time(made.report), *preset, *told])


def data_url(picture: Pixels) -> str:
    """Return a small picture, f32[h, w, 3] in [0, 1], as the address of an image."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(buffer, "WEBP", quality=80, method=0)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _named(photo: str, place: str) -> str:
    return f"{photo} ({place})" if place else photo
