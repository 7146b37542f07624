"""The page: what stands where, and what happens when something is pressed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.base import Component

from engine.backends.face_detector import INSTALL_DETECTOR
from engine.bundle.manifest import Bundle, Manifest
from engine.cli.captions import Captioner, caption_picture
from engine.cli.faces import face_style
from engine.errors import RestoreError, UsageError
from engine.image.formats import RAW, READ_SUFFIXES
from engine.page import faces, fragments, presets, runs
from engine.page.controls import FOLDED, IN_SIGHT, control_of, group_of, settings_from, values_of
from engine.page.desk import CancellationError, Desk
from engine.page.sessions import Result, Sessions
from engine.pipeline.faces import FaceRestorer
from engine.settings import Settings

#: No fonts from elsewhere.
THEME = gr.themes.Default(
    primary_hue=gr.themes.colors.blue,
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
#: Events of the page are no one else's; programs have `restore` alone.
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "preprocess": False, "concurrency_limit": None}
_QUIET: dict[str, Any] = {**_PRIVATE, "show_progress": "hidden"}
#: Shows how far the work is where the page is one column, and that lies below the buttons.
_SHOW_STATUS = """() => {
  const status = document.querySelector("#status");
  if (status.getBoundingClientRect().top > innerHeight / 2) status.scrollIntoView({block: "start"});
}"""
#: Presses a button that downloads, once its file is there.
_PRESS_DOWNLOAD = "() => document.querySelector('#zip-file').click()"


def css() -> str:
    """Return the page's style sheet."""
    return (files("engine.page") / "page.css").read_text("utf-8") + face_style()


@dataclass(frozen=True)
class Page:
    """The page of a bundle.

    Attributes:
        bundle: that restores.
        desk: that it restores at.
        sessions: of its visitors.
        most_photos: that may be dropped at once.
        captioner: who says what a photo shows, where a visitor asks; None asks nobody.
        faces: that finds and restores faces; None leaves them out of the page.
    """

    bundle: Bundle
    desk: Desk
    sessions: Sessions
    most_photos: int
    captioner: Captioner | None = None
    faces: FaceRestorer | None = None

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def defaults(self) -> Settings:
        return self.manifest.defaults

    def build(self) -> gr.Blocks:
        """Return the page as Gradio's blocks."""
        with gr.Blocks(title="Restore photos", analytics_enabled=False, fill_width=True) as blocks:
            gr.HTML(fragments.header(self.manifest.name, self.manifest.notice))
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=300):
                    parts = self._asked()
                with gr.Column(scale=3, min_width=300):
                    parts |= self._given()
            self._for_programs()
            _connect(self, blocks, parts)
        return blocks

    def _asked(self) -> dict[str, Component]:
        """Lay out what a person gives."""
        types = [*READ_SUFFIXES, *RAW.suffixes, "image"]
        parts: dict[str, Component] = {
            "photos": gr.File(label="Photos", file_count="multiple", file_types=types, height=150, elem_id="photos")
        }
        parts["prompt"] = control_of("prompt", self.defaults)
        if self.captioner is not None:
            parts["describe"] = gr.Button("Describe the photo", size="sm", elem_id="describe")
            gr.HTML(fragments.hint(f"Sends a small picture of the first photo to {self.captioner.source}"))
        with gr.Row(elem_id="in-sight"):
            parts |= {name: control_of(name, self.defaults) for name in IN_SIGHT[1:]}
        parts |= presets.lay_out(self.manifest)
        if self.faces is not None:
            parts |= faces.lay_out()
        with gr.Row():
            reset = f"Bundle's settings ({self.manifest.preset})"
            parts["reset"] = gr.Button(reset, size="sm", elem_id="reset", min_width=120)
            parts["dice"] = gr.Button("Another seed", size="sm", elem_id="dice", min_width=120)
        with gr.Row():
            parts["restore"] = gr.Button("Restore", variant="primary", elem_id="restore", min_width=120)
            parts["cancel"] = gr.Button("Cancel", interactive=False, elem_id="cancel", min_width=120)
        with gr.Accordion("More settings", open=False, elem_id="more"):
            for group, names in groupby(FOLDED, key=group_of):
                gr.HTML(f"<h2>{group.capitalize()}</h2>")
                with gr.Row():
                    parts |= {name: control_of(name, self.defaults) for name in names}
            if self.faces is not None:
                gr.HTML("<h2>Faces</h2>")
                parts |= faces.lay_out_words()
        return parts

    def _given(self) -> dict[str, Component]:
        """Lay out what a person gets."""
        parts: dict[str, Component] = {
            "status": gr.HTML(fragments.summary("Drop a photo, and press Restore.", []), elem_id="status"),
            "compare": gr.ImageSlider(
                label="Before and after",
                type="filepath",
                interactive=False,
                visible=False,
                max_height=640,
                buttons=["fullscreen"],
                elem_id="compare",
            ),
            "result": gr.HTML(visible=False, elem_id="result"),
        }
        with gr.Row(visible=False, elem_id="with-result") as with_result:
            parts["download"] = gr.DownloadButton(
                "Download", variant="primary", size="md", elem_id="download", min_width=120
            )
            parts["again"] = gr.Button("Again with these", size="md", elem_id="again", min_width=120)
            parts["zip"] = gr.Button("Download all", size="md", elem_id="zip", min_width=120)
        parts["with_result"] = with_result
        parts["gallery"] = gr.Gallery(
            label="Results",
            visible=False,
            allow_preview=False,
            columns=4,
            height="auto",
            object_fit="contain",
            interactive=False,
            buttons=[],
            elem_id="gallery",
        )
        # Pressed by the page itself, once the file is there.
        parts["zip_file"] = gr.DownloadButton("All results", elem_id="zip-file", elem_classes="unseen")
        parts["shown"] = gr.State(-1)
        return parts

    def _for_programs(self) -> None:
        """Add what programs call: a photo and settings in, the result and how it was made out."""
        photo = gr.File(label="photo", visible=False)
        settings = gr.JSON(label="settings", visible=False)
        restored, report = gr.File(label="restored", visible=False), gr.JSON(label="report", visible=False)
        gr.Button(visible=False).click(
            self._restore_for_program,
            [photo, settings],
            [restored, report],
            api_name="restore",
            api_description="Restore a photo; settings by the names of the command line's options, with _ for -.",
            concurrency_limit=None,
            preprocess=False,
        )

    async def _restore_for_program(
        self, photo: dict[str, Any] | None, settings: dict[str, Any] | None, request: gr.Request
    ) -> tuple[str, dict[str, Any]]:
        try:
            session = self.sessions.of(_name_of(request))
            values = _mapping(settings)
            asked = faces.asked(values.pop("faces", None))
            if asked is not None and self.faces is None:
                raise UsageError("this page has no faces", where="faces", fix=INSTALL_DETECTOR)
            preset = presets.asked(self.manifest, values.pop("preset", None))
            chosen = settings_from(values, self.manifest.settings(preset))
            found = self.sessions.adopt(session, _paths([photo] if photo else None))
            if len(found) != 1:
                raise UsageError("no photo", where="photo", fix="give one file")
            async for event in runs.restore(self.desk, session, found, chosen, asked, preset):
                if event.error is not None:
                    raise event.error.at(found[0].name)
                if event.result is not None:
                    return str(event.result.output), event.result.report
        except RestoreError as error:
            raise gr.Error(fragments.sentence(error), print_exception=False) from error
        raise AssertionError("a run ends with a result or an error")

    # -- what happens -----------------------------------------------------------------------------

    async def restore(
        self, photos: Any, values: Mapping[str, Any], request: gr.Request
    ) -> AsyncIterator[dict[str, Any]]:
        """Restore what was dropped; yields what changes on the page, by the parts' names."""
        session = self.sessions.of(_name_of(request))
        failures: list[tuple[str, str]] = []
        made: list[Result] = []
        try:
            settings = settings_from({name: values[name] for name in (*IN_SIGHT, *FOLDED)}, self.defaults)
            preset = presets.asked(self.manifest, values.get("preset"))
            found = self.sessions.adopt(session, _paths(photos))
            asked = faces.settings_from(values, found)
            if not found:
                raise UsageError("no photo yet", where="Photos", fix="drop one or more, or press to choose them")
            if len(found) > self.most_photos:
                fix = "drop fewer, or use the command line for whole folders"
                raise UsageError(
                    "too many photos", where="Photos", expected=f"up to {self.most_photos}", found=len(found), fix=fix
                )
            yield {"restore": gr.update(interactive=False), "cancel": gr.update(interactive=True)}
            cancelled = False
            async for event in runs.restore(self.desk, session, found, settings, asked, preset):
                name = event.ticket.photo.name
                if event.result is not None:
                    made.append(event.result)
                    yield {**self._shown(session.results, len(session.results) - 1), "gallery": self._gallery(session)}
                elif isinstance(event.error, CancellationError):
                    cancelled = True
                elif event.error is not None:
                    failures.append((name, fragments.sentence(event.error)))
                else:
                    yield {"status": fragments.progress(name, event.place, event.ticket.progress)}
            yield {"status": fragments.summary(_heading(len(made), len(failures), cancelled), failures)}
        except RestoreError as error:
            yield {"status": fragments.problem(error)}
        yield {"restore": gr.update(interactive=True), "cancel": gr.update(interactive=False)}

    def cancel(self, request: gr.Request) -> dict[str, Any]:
        """Take back what a visitor has at the desk."""
        for run in list(self.sessions.of(_name_of(request)).runs):
            self.desk.cancel(run)
        return {"cancel": gr.update(interactive=False)}

    def show(self, selected: gr.SelectData, request: gr.Request) -> dict[str, Any]:
        """Show the result that was chosen in the gallery."""
        return self._shown(self.sessions.of(_name_of(request)).results, int(selected.index))

    def again(self, index: int, request: gr.Request) -> dict[str, Any]:
        """Put a result's photo and settings where they can be changed."""
        results = self.sessions.of(_name_of(request)).results
        if not 0 <= index < len(results):
            return {}
        result = results[index]
        shown = {} if self.faces is None else faces.again(result)
        return {"photos": [str(result.photo)], **values_of(result.settings), **self._preset(result.preset), **shown}

    def reset(self) -> dict[str, Any]:
        """Put the bundle's settings back."""
        return {**values_of(self.defaults), **self._preset(None)}

    def choose(self, preset: str) -> dict[str, Any]:
        """Put a preset's settings into the fields."""
        try:
            return presets.chosen(self.manifest, preset)
        except RestoreError as error:
            raise gr.Error(fragments.sentence(error), print_exception=False) from error

    async def describe(self, photos: Any, request: gr.Request) -> dict[str, Any]:
        """Put what the first photo shows into the prompt."""
        assert self.captioner is not None, "without one there is no button"
        session = self.sessions.of(_name_of(request))
        try:
            found = self.sessions.adopt(session, _paths(photos)[:1])
            if not found:
                raise UsageError("no photo yet", where="Photos", fix="drop one, or press to choose it")
            picture = await asyncio.wrap_future(self.desk.call(lambda restorer: caption_picture(restorer, found[0])))
            caption = await asyncio.to_thread(self.captioner.describe, found[0], picture)
        except RestoreError as error:
            raise gr.Error(fragments.sentence(error), print_exception=False) from error
        return {"prompt": caption.text}

    async def find_faces(self, photos: Any, values: Mapping[str, Any], request: gr.Request) -> dict[str, Any]:
        """Show the faces of the first photo, to be chosen from."""
        assert self.faces is not None, "without it there is no button"
        face_restorer, session = self.faces, self.sessions.of(_name_of(request))
        try:
            settings = settings_from({name: values[name] for name in (*IN_SIGHT, *FOLDED)}, self.defaults)
            found = self.sessions.adopt(session, _paths(photos)[:1])
            if not found:
                raise UsageError("no photo yet", where="Photos", fix="drop one, or press to choose it")
            work = self.desk.call(lambda restorer: faces.found_in(found[0], face_restorer, restorer, settings))
            return await asyncio.wrap_future(work)
        except RestoreError as error:
            raise gr.Error(fragments.sentence(error), print_exception=False) from error

    def forget_faces(self, photos: Any, known: Any) -> dict[str, Any]:
        """Hide the faces that were found in another photo."""
        paths = [path for name in _paths(photos) if (path := Path(name)).is_file()]
        return {} if faces.is_of(known, paths) else faces.hidden()

    async def zip(self, request: gr.Request) -> dict[str, Any]:
        """Write a visitor's results into one file."""
        session = self.sessions.of(_name_of(request))
        try:
            return {"zip_file": str(await asyncio.to_thread(session.zip))}
        except (RestoreError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def arrive(self, request: gr.Request) -> None:
        """Note that a page is open."""
        self.sessions.of(_name_of(request)).has_page = True

    def leave(self, request: gr.Request) -> None:
        """Give up what a visitor has at the desk, and remove the files."""
        self.end(_name_of(request))

    def end(self, name: str) -> None:
        """End a visit: its work and its files."""
        session = self.sessions.end(name)
        for run in list(session.runs) if session is not None else ():
            self.desk.cancel(run)

    def _shown(self, results: Sequence[Result], index: int) -> dict[str, Any]:
        result = results[index]
        return {
            "compare": gr.update(value=(str(result.before), str(result.after)), visible=True),
            "result": gr.update(value=fragments.result(result, self.manifest), visible=True),
            "with_result": gr.update(visible=True),
            "download": str(result.output),
            "shown": index,
        }

    def _preset(self, name: str | None) -> dict[str, Any]:
        """Return what the chooser of presets shows, where there is one."""
        return {"preset": name or self.manifest.preset} if self.manifest.presets else {}

    def _gallery(self, session: Any) -> Any:
        pictures = [(str(each.after), each.photo.name) for each in session.results]
        return gr.update(value=pictures, visible=len(pictures) > 1, selected_index=len(pictures) - 1)


def _connect(page: Page, blocks: gr.Blocks, parts: dict[str, Component]) -> None:
    """Say what happens when something is pressed."""
    settings = {name: parts[name] for name in (*IN_SIGHT, *FOLDED)}
    face_controls = {name: parts[name] for name in faces.CONTROLS if name in parts}
    preset = {name: parts[name] for name in ("preset",) if name in parts}
    asked = {**settings, **preset, **face_controls}
    told = [parts[name] for name in ("status", "compare", "result", "with_result", "download", "shown", "gallery")]
    shown = [parts[name] for name in ("compare", "result", "with_result", "download", "shown")]

    def updates(changes: dict[str, Any]) -> dict[Component, Any]:
        return {parts[name]: value for name, value in changes.items()}

    face_view = [parts["faces_found"]] if face_controls else []

    async def restore(given: dict[Component, Any], request: gr.Request) -> AsyncIterator[dict[Component, Any]]:
        values = {name: given[part] for name, part in asked.items()}
        async for changes in page.restore(given[parts["photos"]], values, request):
            yield updates(changes)

    def cancel(request: gr.Request) -> dict[Component, Any]:
        return updates(page.cancel(request))

    def show(selected: gr.SelectData, request: gr.Request) -> dict[Component, Any]:
        return updates(page.show(selected, request))

    def again(index: int, request: gr.Request) -> dict[Component, Any]:
        return updates(page.again(index, request))

    def reset() -> dict[Component, Any]:
        return updates(page.reset())

    def choose(name: str) -> dict[Component, Any]:
        return updates(page.choose(name))

    async def describe(photos: Any, request: gr.Request) -> dict[Component, Any]:
        return updates(await page.describe(photos, request))

    async def zip_results(request: gr.Request) -> dict[Component, Any]:
        return updates(await page.zip(request))

    async def find_faces(given: dict[Component, Any], request: gr.Request) -> dict[Component, Any]:
        values = {name: given[part] for name, part in settings.items()}
        return updates(await page.find_faces(given[parts["photos"]], values, request))

    def forget_faces(photos: Any, known: Any) -> dict[Component, Any]:
        return updates(page.forget_faces(photos, known))

    working = [parts["restore"], parts["cancel"]]
    parts["restore"].click(restore, {parts["photos"], *asked.values()}, [*told, *working], **_QUIET)
    parts["restore"].click(None, None, None, js=_SHOW_STATUS, api_visibility="private")
    parts["cancel"].click(cancel, None, [parts["cancel"]], **_QUIET)
    parts["gallery"].select(show, None, shown, **_QUIET)
    parts["again"].click(again, [parts["shown"]], [parts["photos"], *asked.values(), *face_view], **_QUIET)
    parts["reset"].click(reset, None, [*settings.values(), *preset.values()], **_QUIET)
    for chooser in preset.values():  # by a visitor; not when it shows what another button has put there
        chooser.input(choose, [chooser], list(settings.values()), **_QUIET)
    parts["dice"].click(lambda: str(random.randrange(2**31)), None, parts["seed"], **_QUIET)
    busy = {**_PRIVATE, "show_progress": "minimal"}
    if face_view:
        shows = [parts[name] for name in ("faces", "face_choice", "faces_of")]
        parts["find_faces"].click(find_faces, {parts["photos"], *settings.values()}, [*shows, *face_view], **busy)
        parts["photos"].change(forget_faces, [parts["photos"], parts["faces_of"]], [*shows[1:], *face_view], **_QUIET)
    if "describe" in parts:
        parts["describe"].click(describe, [parts["photos"]], [parts["prompt"]], **busy)
    zipped = parts["zip"].click(zip_results, None, [parts["zip_file"]], **_QUIET)
    zipped.success(None, None, None, js=_PRESS_DOWNLOAD, api_visibility="private")
    blocks.load(page.arrive, None, None, **_QUIET)
    blocks.unload(page.leave)


def _heading(restored: int, failed: int, cancelled: bool) -> str:
    counts = [f"{restored} restored"] if restored or not cancelled else []
    counts += [f"{failed} failed"] if failed else []
    counts += ["cancelled"] if cancelled else []
    text = ", ".join(counts)
    return text[0].upper() + text[1:]


def _name_of(request: gr.Request) -> str:
    """Return Gradio's name for a visit."""
    name = request.session_hash
    if not name:
        raise gr.Error("no session: call through the page or gradio_client", print_exception=False)
    return str(name)


def _paths(photos: Any) -> list[str]:
    """Return where uploaded files lie, from what the browser says of them."""
    items = photos if isinstance(photos, list) else [] if photos is None else [photos]
    return [str(item["path"]) for item in items if isinstance(item, dict) and item.get("path")]


def _mapping(settings: Any) -> dict[str, Any]:
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError("no settings", where="settings", expected='an object such as {"steps": 8}')
    return settings
