"""An endpoint that does what a test tells it: `with endpoint(reply) as server`."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

from tralign_mini.llm_judge import LLMJudge

TOKENS = (100, 7)  # read and written, as the endpoint says of each answer


def completion(content, finish_reason="stop") -> tuple[int, dict, bytes]:
    """A chat completion: status, headers, body."""
    usage = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*TOKENS, sum(TOKENS))))
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    return sends(body | {"choices": choices, "usage": usage})


def winner(name: str, reason: str = "because") -> tuple[int, dict, bytes]:
    return completion(json.dumps({"reason": reason, "winner": name}))


def sends(body, status: int = 200, **headers) -> tuple[int, dict, bytes]:
    """Any reply: a dict is sent as JSON."""
    kind = {"Content-Type": "application/json"} if isinstance(body, dict) else {"Content-Type": "text/html"}
    return status, kind | headers, json.dumps(body).encode() if isinstance(body, dict) else body.encode()


def answers_in(question: str) -> tuple[str, str]:
    """What stands between the tags of a comparison."""
    return tuple(re.search(f"<answer_{side}>\n(.*)\n</answer_{side}>", question, re.S)[1] for side in "ab")


def longer(question: str, number: int) -> tuple[int, dict, bytes]:
    """A consistent judge: the longer answer wins."""
    a, b = map(len, answers_in(question))
    return winner("A" if a > b else "B" if b > a else "tie")


@contextmanager
def endpoint(reply):
    """A server on a free port; reply(question, number of the request) -> (status, headers, body).

    Yields .url, .questions, .times and .requests (headers and body), in the order in which they came.
    """
    seen, lock = SimpleNamespace(questions=[], times=[], requests=[], url=""), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen.questions)
                seen.questions.append(body["messages"][0]["content"])
                seen.times.append(time.monotonic())
                seen.requests.append((self.path, dict(self.headers), body))
            status, headers, content = reply(seen.questions[number], number)
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # who asked has given up waiting
                self.close_connection = True

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    seen.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()


def make(server, tmp_path, **settings) -> LLMJudge:
    """A judge at that endpoint, its answers kept in tmp_path."""
    return LLMJudge("m", endpoint=server.url, cache=tmp_path / "answers.jsonl", **settings)
