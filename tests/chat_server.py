"""A server on this machine that speaks as much of OpenAI's chat completions as a judge asks for."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, int], Any]  # of a question and how often it came: the answer's text, or a status to refuse it with


class ChatServer:
    """What was asked, in order, and how many questions were out at once."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.busy = 0
        self.most_busy = 0

    @property
    def questions(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


@contextmanager
def chat_server(answer: Answer, *, finish: str = "stop", takes_s: float = 0.0) -> Iterator[ChatServer]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            with lock:
                said.requests.append(request)
                said.keys.append(self.headers["Authorization"])
                said.busy += 1
                said.most_busy = max(said.most_busy, said.busy)
                text = request["messages"][0]["content"]
                result = answer(text, said.questions.count(text))
            time.sleep(takes_s)
            with lock:
                said.busy -= 1
            status = result if isinstance(result, int) else 200
            message = {"role": "assistant", "content": result}
            choice = {"index": 0, "finish_reason": finish, "message": message}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            data = json.dumps(body if status == 200 else {"error": {"message": "not now"}}).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except BrokenPipeError:  # the judge had waited long enough
                pass

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    said = ChatServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield said
    finally:
        server.shutdown()
        server.server_close()
