"""A small server of chat completions that answers as a test wants: well, badly, late, too much or not at all."""

import base64
import io
import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def chat(text, **more):
    return json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": text, **more}, "finish_reason": "stop"}]}
    )


class Model:
    """A server of chat completions, and what it was asked. `answers` are given one after the other, the last for ever.

    An answer is a body, a status with a body, or a function that writes to the connection itself.
    """

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def answer(self, handler):
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.asked.append((handler.path, dict(handler.headers), json.loads(body)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer(handler)
            return
        status, text = answer if isinstance(answer, tuple) else (200, answer)
        content = text if isinstance(text, bytes) else text.encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    @property
    def pictures(self):
        """The pictures that it was shown."""
        urls = [body["messages"][0]["content"][1]["image_url"]["url"] for _, _, body in self.asked]
        return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))) for url in urls]


@contextmanager
def serving(model):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            with suppress(BrokenPipeError, ConnectionResetError):  # it was hung up on
                model.answer(self)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
