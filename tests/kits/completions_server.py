"""A completions server on a real socket, with a tiny model behind it: what a remote engine is tested against.

It speaks as much of vLLM's API, or of llama.cpp's, as the clients use, and can be told to misbehave. Tokens come from
dense forwards of the whole context, so nothing of ours computes them.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

FIELDS = (
    "model prompt max_tokens stream stream_options temperature top_k top_p min_p repetition_penalty seed logprobs "
    "prompt_logprobs return_token_ids stop_token_ids ignore_eos skip_special_tokens"
).split()


@dataclass
class Faults:
    """What the server does wrong."""

    busy: int = 0  # so many requests are answered 503
    cut_after: int | None = None  # the connection of so many streams is dropped after a token or two
    cuts: int = 0
    polite: bool = False  # such a stream ends as if all had been said
    model: str = "tiny"
    cut_context: int | None = None
    missing: tuple[str, ...] = ()
    shift_tokens: int = 0
    tokens_at_end: int = 0  # so many ids more at a text's end, or fewer
    usage_always: bool = False  # every event tells what was read and cached, as the last one does
    delay: float = 0.0
    together: int = 0  # no stream goes on until so many have run at once


@dataclass
class State:
    model: object
    tokenizer: object
    kind: str = "vllm"
    api_key: str | None = None
    max_length: int = 512
    faults: Faults = field(default_factory=Faults)
    running: int = 0
    most_running: int = 0
    given_up: int = 0  # streams whose client went away
    sampled: int = 0  # tokens of all streams
    requests: list = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@torch.inference_mode()
def next_logits(state, ids):
    with state.lock:
        return state.model(input_ids=torch.tensor([ids])).logits[0].float()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *_):
        pass

    def send(self, what, status=200):
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refused(self):
        state = self.state
        if state.api_key is not None and self.headers.get("Authorization") != f"Bearer {state.api_key}":
            self.send({"error": {"message": "no such key", "type": "auth", "code": 401}}, 401)
            return True
        return False

    def do_GET(self):
        state = self.state
        if self.refused():
            return
        if self.path == "/v1/models":
            owner = "llamacpp" if state.kind == "llama.cpp" else "vllm"
            entry = {"id": "tiny", "object": "model", "owned_by": owner, "max_model_len": state.max_length}
            self.send({"object": "list", "data": [entry]})
        elif self.path == "/version" and state.kind == "vllm":
            self.send({"version": "0.32.0"})
        elif self.path == "/openapi.json" and state.kind == "vllm":
            fields = {name: {} for name in FIELDS if name not in state.faults.missing}
            self.send({"components": {"schemas": {"CompletionRequest": {"properties": fields}}}})
        elif self.path == "/props" and state.kind == "llama.cpp":
            self.send({"default_generation_settings": {"n_ctx": state.max_length}})
        else:
            self.send({"detail": "Not Found"}, 404)

    def do_POST(self):
        state = self.state
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        if state.faults.busy > 0 and not self.path.endswith("/tokenize"):
            state.faults.busy -= 1
            self.send({"error": {"message": "overloaded"}}, 503)
            return
        if self.path == "/tokenize":
            ids = state.tokenizer(payload.get("prompt", payload.get("content")), add_special_tokens=False)["input_ids"]
            ids, more = [i + state.faults.shift_tokens for i in ids], state.faults.tokens_at_end
            self.send({"tokens": ids[:more] if more < 0 else [*ids, *[0] * more]})
        elif self.path in ("/v1/completions", "/completion"):
            state.requests.append(payload)
            if payload.get("stream"):
                self.stream(payload)
            else:
                self.score(payload)
        else:
            self.send({"detail": "Not Found"}, 404)

    def score(self, payload):
        ids = payload["prompt"]
        rows = next_logits(self.state, ids).log_softmax(-1)
        entries = [None] + [{str(t): {"logprob": float(rows[i, t])}} for i, t in enumerate(ids[1:])]
        self.send({"model": self.state.faults.model, "choices": [{"text": "", "prompt_logprobs": entries}]})

    def event(self, what):
        data = b"data: " + (what if isinstance(what, bytes) else json.dumps(what).encode()) + b"\n\n"
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def stream(self, payload):
        state, faults = self.state, self.state.faults
        with state.lock:
            state.running += 1
            state.most_running = max(state.most_running, state.running)
        self.running = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.tokens(payload, state, faults)
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            state.given_up += 1
            self.close_connection = True
        finally:
            self.over()

    def over(self):
        """Running no longer: said before the client can know, who may then send its next request at once."""
        if self.running:
            self.running = False
            with self.state.lock:
                self.state.running -= 1

    def tokens(self, payload, state, faults):
        llama = self.path == "/completion"
        ids = list(payload["prompt"])
        if faults.cut_context:
            ids = ids[-faults.cut_context :]
        count = len(ids)
        most = payload["n_predict" if llama else "max_tokens"]
        stops = set() if llama else set(payload.get("stop_token_ids", ()))
        eos = state.tokenizer.eos_token_id
        generator = torch.Generator().manual_seed(payload.get("seed", 0))
        usage = {"prompt_tokens": count, "prompt_tokens_details": {"cached_tokens": count // 4 * 4}}
        reason, stop = "length", None
        end = time.monotonic() + 60
        while state.most_running < faults.together and time.monotonic() < end:
            time.sleep(0.001)
        for i in range(most):
            if faults.delay:
                time.sleep(faults.delay)
            raw = next_logits(state, ids)[-1]
            logprobs = raw.log_softmax(-1)
            temperature = payload.get("temperature", 1.0)
            if temperature:
                token = int(torch.multinomial((raw / temperature).softmax(-1), 1, generator=generator))
            else:
                token = int(raw.argmax())
            if llama and token == eos:
                reason = "stop"
                break
            ids.append(token)
            with state.lock:
                state.sampled += 1
            if i == most - 1 or token in stops:
                self.over()
            if llama:
                self.event({"content": "", "tokens": [token], "stop": False})
            else:
                choice = {"index": 0, "text": "", "token_ids": [token], "finish_reason": None}
                if payload.get("logprobs"):
                    best = logprobs.topk(payload["logprobs"])
                    top = {f"token_id:{t}": v for t, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
                    choice["logprobs"] = {"token_logprobs": [float(logprobs[token])], "top_logprobs": [top]}
                told = usage if faults.usage_always else None
                self.event({"model": faults.model, "choices": [choice], "usage": told})
            if faults.cut_after is not None and i >= 1 and faults.cuts < faults.cut_after:
                faults.cuts += 1
                if faults.polite:
                    return
                self.close_connection = True
                raise ConnectionResetError
            if token in stops:
                reason, stop = "stop", token
                break
        self.over()
        if llama:
            kind = "eos" if reason == "stop" else "limit"
            self.event({"content": "", "tokens": [], "stop": True, "stop_type": kind, "tokens_evaluated": count})
            return
        choice = {"index": 0, "text": "", "token_ids": [], "finish_reason": reason, "stop_reason": stop}
        self.event({"model": faults.model, "choices": [choice], "usage": None})
        self.event({"model": faults.model, "choices": [], "usage": usage})
        self.event(b"[DONE]")


@contextmanager
def completions_server(model, tokenizer, **options):
    """``(url, state)`` of a server that runs while the block lasts."""
    state = State(model, tokenizer, **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
