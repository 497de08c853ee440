"""Mark judge data by hand: one local page shows an answer at a time, and each decision on it is on
disk before the next is shown.

`--data` is JSON Lines of {"prompt", "answer"}; `--out` gets the same lines with "error": null or
[start, end], characters (code points) of the answer; an "error" that a line came with is neither
shown nor kept. Skips stand in OUT.skipped; without that file the skipped answers are offered again.
Both files change at their end only, by one synced write or one truncation (undo), so a kill leaves
each decision whole or absent. With `--target` and `--judge` each token is shaded by the judge's
doubt. The server listens on loopback, for one person: a token in the address keeps other users and
pages out.
"""
import argparse
import fcntl
import hashlib
import json
import os
import secrets
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cli import UserError, check_writable, run

SKIP = "skip"
MAX_BODY = 10_000_000  # bytes; a decision holds the marked text


# ---------------------------------------------------------------- files

def json_lines(path: Path, torn=lambda tail: False) -> list[tuple[int, int, int, object]]:
    """(number, start and end in bytes, value) of each line that is not blank; one that is not JSON
    is refused, unless it is the last and `torn`.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    lines, end = [], 0
    for number, raw in enumerate(data.split(b"\n"), 1):
        start, end = end, end + len(raw) + 1
        if not raw.strip():
            continue
        try:
            lines.append((number, start, end, json.loads(raw.decode("utf-8"))))
        except ValueError:
            if end <= len(data) or not torn(raw):
                raise UserError(f"{path} line {number} is not JSON") from None
    return lines


def read_answers(path: Path) -> list[tuple[int, dict]]:
    """(line number, line) of each answer."""
    answers = []
    for number, _, _, line in json_lines(path):
        for key in ("prompt", "answer"):
            if not isinstance(line, dict) or not isinstance(line.get(key), str) or not line[key]:
                raise UserError(f"{path} line {number}: {key!r} must be a text that is not empty")
        answers.append((number, {k: v for k, v in line.items() if k != "error"}))
    if not answers:
        raise UserError(f"{path} holds no answers")
    return answers


class Log:
    """A file of JSON lines, made with its first line; `append` and `pop` return when the change is
    on disk.

    `torn(tail)` says whether an unfinished last line is what a killed run can have left; `open`
    cuts it off.
    """

    def __init__(self, path: Path, torn):
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is not a plain file; name another --out")
        self.path, self.fd = path, None
        self.lines = json_lines(path, torn) if path.exists() else []

    def open(self):
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            directory = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(directory)  # the name of a new file is on disk too
            os.close(directory)
            self.cut(self.end()) if self.end() <= os.fstat(self.fd).st_size else self.write(b"\n")
        except BlockingIOError:
            raise UserError(f"{self.path} is in use by another annotate.py; stop that one, or "
                            "name another --out") from None
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}") from None

    def close(self):
        if self.fd is not None:
            os.close(self.fd)

    def end(self) -> int:
        return self.lines[-1][2] if self.lines else 0

    def cut(self, end: int):
        os.ftruncate(self.fd, end)
        os.fsync(self.fd)

    def write(self, data: bytes):
        if os.write(self.fd, data) != len(data):
            raise OSError(None, "no room for the whole line")
        os.fsync(self.fd)

    def append(self, value: dict):
        if self.fd is None:
            self.open()
        # ASCII: a raw U+2028 would end the line for many readers
        start, data = self.end(), json.dumps(value).encode() + b"\n"
        try:
            self.write(data)
        except OSError:
            self.cut(start)
            raise
        self.lines.append((len(self.lines) + 1, start, start + len(data), value))

    def pop(self):
        self.cut(self.lines[-1][1])
        self.lines.pop()


# ---------------------------------------------------------------- decisions

def digest(line: dict) -> str:
    return hashlib.sha256(json.dumps([line["prompt"], line["answer"]]).encode()).hexdigest()[:16]


class Annotation:
    """The answers, the decisions on them in order, and which answer is shown.

    An answer's name, the same in every run, is a hash of its prompt and answer and which of those
    alike it is. A skip says after how many lines of --out it came: so both files together hold the
    order of all decisions, for `undo`.
    """

    def __init__(self, data: Path, out: Path):
        self.data, self.answers = data, read_answers(data)
        if out.exists() and out.samefile(data):
            raise UserError(f"--out is --data, {data}; name another file")
        self.names, count = [], {}
        for _, line in self.answers:
            d = digest(line)
            count[d] = count.get(d, 0) + 1
            self.names.append(f"{d}.{count[d]}")
        self.out, self.skips = Log(out, self.is_torn), Log(out.with_name(out.name + ".skipped"),
                                                           lambda tail: True)
        self.decisions = self.match()  # [(answer's index, None, [start, end] or SKIP)]
        self.out.open()  # only now: a file that is not ours stays as it was
        if self.skips.path.exists():
            self.skips.open()
        self.advance()

    def close(self):
        self.out.close()
        self.skips.close()

    def is_torn(self, tail: bytes) -> bool:
        """Whether the tail is the beginning of a decision on one of the answers: nobody else's file
        is cut.
        """
        bodies = (json.dumps(line)[:-1].encode() + b', "error": ' for _, line in self.answers)
        return any(body.startswith(tail) or tail.startswith(body) for body in bodies)

    def match(self) -> list:
        """The decisions that the two files hold, in the order in which they were made."""
        index, taken, order = {name: i for i, name in enumerate(self.names)}, set(), []
        foreign = "{} line {} is not a decision on an answer of {}; name another --out, or the --data that it was made from"
        for number, _, _, line in self.skips.lines:
            name, after = (line.get("skipped"), line.get("after")) if isinstance(line, dict) else (
                None, None)
            if not isinstance(name, str) or name not in index or name in taken or type(
                    after) is not int:
                raise UserError(foreign.format(self.skips.path, number, self.data))
            taken.add(name)
            order.append((after, 0, index[name], SKIP))
        for before, (number, _, _, line) in enumerate(self.out.lines):
            name = None
            if isinstance(line, dict) and "error" in line and "prompt" in line and "answer" in line:
                d, alike = digest(line), 1
                while (name := f"{d}.{alike}") in taken:
                    alike += 1
            if name not in index or not is_error(line["error"], line["answer"]):
                raise UserError(foreign.format(self.out.path, number, self.data))
            taken.add(name)
            order.append((before, 1, index[name], line["error"]))
        order.sort(key=lambda entry: entry[:2])
        return [entry[2:] for entry in order]

    def advance(self):
        """Show the first answer without a decision; `shown` is None when there is none."""
        done = {i for i, _ in self.decisions}
        self.shown, self.mark = next((i for i in range(len(self.answers)) if i not in done),
                                     None), None

    def decide(self, choice):
        if choice == SKIP:
            self.skips.append({"skipped": self.name, "after": len(self.out.lines),
                               "line": self.answers[self.shown][0]})
        else:
            self.out.append(self.answers[self.shown][1] | {"error": choice})
        self.decisions.append((self.shown, choice))
        self.advance()

    def undo(self):
        if self.decisions:
            index, choice = self.decisions[-1]
            (self.skips if choice == SKIP else self.out).pop()
            self.decisions.pop()
            self.shown, self.mark = index, None if choice == SKIP else choice

    @property
    def name(self):
        return None if self.shown is None else self.names[self.shown]

    def state(self) -> dict:
        """What the page shows."""
        choices = [c for _, c in self.decisions]
        state = {"name": self.name, "total": len(self.answers), "decided": len(choices),
                 "correct": choices.count(None), "skipped": choices.count(SKIP)}
        if self.shown is None:
            return state
        number, line = self.answers[self.shown]
        others = {k: v if isinstance(v, str) else json.dumps(v) for k, v in line.items()
                  if k not in ("prompt", "answer")}
        return state | {"line": number, "prompt": line["prompt"], "answer": line["answer"],
                        "others": others, "mark": self.mark}


def is_error(error, answer) -> bool:
    """Whether this is what "error" may be: null, or [start, end] of at least one character."""
    return error is None or (isinstance(error, list) and len(error) == 2
                             and all(type(x) is int for x in error)
                             and 0 <= error[0] < error[1] <= len(answer))


# ---------------------------------------------------------------- doubt

class Doubt:
    """A target and its judge: how much the judge doubts each token of an answer, by one pass of the
    target.
    """

    def __init__(self, target: Path, judge: Path, chat: bool):
        import torch  # here: it takes seconds, and marking alone needs none of it
        from judge import Judge
        from judge_report import logit
        from model import ModelConfig, fingerprint, load
        from tokenizer import Tokenizer
        config, self.tokenizer, self.chat = ModelConfig.from_dir(target), Tokenizer.from_dir(
            target), chat
        self.head = Judge.load(judge, config.dim, fingerprint(target), str(target),
                               config.quantization and config.quantization.parent)
        self.edge = logit(self.head.threshold)
        self.encode("")  # a missing chat template is told now
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else (
            "cpu", torch.float32)
        self.torch, self.target, self.lock = torch, load(target, device, dtype), threading.Lock()

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer.chat(
            [{"role": "user", "content": prompt}]) if self.chat else self.tokenizer.encode(prompt)

    def __call__(self, prompt: str, answer: str) -> list[tuple[int, int, float]]:
        """(start, end, doubt) of stretches of the answer's characters; doubt is 0.5 at the judge's
        threshold, above it where the judge rejects.

        UserError: it does not fit the context.
        """
        torch, before = self.torch, self.encode(prompt)
        tokens, offsets = self.tokenizer.encode_with_offsets(answer, continuation=True)
        length, limit = len(before) + len(tokens), self.target.config.max_seq_len
        if length > limit:
            raise UserError(f"no doubt shown: prompt and answer have {length} tokens, the "
                            f"target's context is {limit}")
        with torch.inference_mode():
            ids = torch.tensor([before + tokens], device=self.target.norm.weight.device)
            hidden = self.target.features(ids, torch.arange(length, device=ids.device),
                                          self.target.new_cache(length))
            doubts = torch.sigmoid(self.edge
                                   - self.head.scores(hidden[0, len(before):].cpu())).tolist()
        return stretches(offsets, doubts, len(answer))


def stretches(offsets, doubts, length: int) -> list[tuple[int, int, float]]:
    """(start, end, doubt) from each token's start to the next one's; a character that several
    tokens share has the greatest doubt of theirs.
    """
    of = [0.0] * length
    for (a, b), doubt in zip(offsets, doubts):
        of[a:b] = [max(x, doubt) for x in of[a:b]]
    cuts = sorted({0, length} | {a for a, _ in offsets})
    return [(a, b, max(of[a:b])) for a, b in zip(cuts, cuts[1:])]


# ---------------------------------------------------------------- server

class Refused(Exception):
    """Args: HTTP status, and a sentence that the page shows."""


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds that a connection may be silent

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(self.page)

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        fits = length.isdecimal() and int(length) <= MAX_BODY
        # before any refusal: one that leaves it unread resets the connection
        self.body = self.rfile.read(int(length)) if fits else b""
        self.answer(self.act)

    def answer(self, make):
        try:
            self.check_origin()
            status, kind, body, headers = make()
        except Refused as e:
            status, kind, body, headers = e.args[0], "text/plain", e.args[1].encode(), {}
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8",
                            "Content-Length": str(len(body)), "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff",
                            "Cross-Origin-Resource-Policy": "same-origin",
                            "Cross-Origin-Opener-Policy": "same-origin",
                            "Referrer-Policy": "no-referrer", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def check_origin(self):
        """Only this page may ask: a foreign Host is DNS rebinding, a foreign Origin or
        Sec-Fetch-Site another site's page.
        """
        port = self.server.server_address[1]
        suffix = "" if port == 80 else f":{port}"
        every = self.headers.get_all
        host = every("Host", [])
        if len(host) != 1 or host[0] not in ("127.0.0.1" + suffix, "localhost" + suffix):
            raise Refused(403, "this server answers to 127.0.0.1 and localhost only")
        if set(every("Origin", [])) - {f"http://{host[0]}"} or set(every("Sec-Fetch-Site", [])) - {
                "none", "same-origin"}:
            raise Refused(403, "this came from another site; paste the address that annotate.py "
                          "printed into the address bar")

    def page(self):
        if self.path.partition("?")[0] != "/":
            raise Refused(404, "there is one page, /")
        nonce = secrets.token_urlsafe(16)
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
                  "connect-src 'self'; base-uri 'none'; "
                  "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for "
                  "'script'; trusted-types 'none'")
        return 200, "text/html", self.server.html.replace("NONCE", nonce).encode(), {
            "Content-Security-Policy": policy}

    def act(self):
        s = self.server
        if not secrets.compare_digest(self.headers.get("X-Token", "").encode(), s.token.encode()):
            raise Refused(403, "this page is not of the present run; open the address that "
                          "annotate.py printed last")
        try:
            asked = json.loads(self.body.decode())
            name = asked["name"]
        except (ValueError, KeyError, TypeError):
            raise Refused(400, "the request is not what this page sends") from None
        reply = self.doubt(name) if self.path == "/doubt" else self.change(asked, name)
        return 200, "application/json", json.dumps(reply).encode(), {}

    def change(self, asked: dict, name):
        """One request at a time: the present state, after a decision or an undo if that is asked
        about the answer that is shown.
        """
        with self.server.lock:
            a = self.server.annotation
            if self.path not in ("/state", "/decide", "/undo"):
                raise Refused(404, "there is no such request")
            if self.path != "/state" and name != a.name:
                raise Refused(409, "this answer was decided in another window; here is the "
                              "present one")
            try:
                if self.path == "/decide":
                    a.decide(self.choice(asked, a))
                elif self.path == "/undo":
                    a.undo()
            except (OSError, UserError) as e:
                raise Refused(500,
                              f"nothing was saved: {getattr(e, 'strerror', None) or e}") from None
            return a.state()

    @staticmethod
    def choice(asked: dict, a: Annotation):
        """null, SKIP or [start, end], checked: the page sends the marked text too, so an offset
        that was counted otherwise cannot slip in.
        """
        choice = asked.get("choice", ())
        if a.shown is None or choice != SKIP and not is_error(choice, answer := a.answers[a.shown][
                1]["answer"]):
            raise Refused(400, "the request is not what this page sends")
        if isinstance(choice, list) and answer[choice[0]:choice[1]] != asked.get("text"):
            raise Refused(400, "nothing was saved: page and server count the answer's characters "
                          "differently; please report this answer")
        return choice

    def doubt(self, name):
        """The shades of the answer that is shown; none for one that is no longer, so that a slow
        target does not fall behind the person.
        """
        doubt, a = self.server.doubt, self.server.annotation
        if doubt is None:
            return {"runs": []}
        with doubt.lock:
            with self.server.lock:
                line = a.answers[a.shown][1] if name is not None and name == a.name else None
            try:
                return {"runs": doubt(line["prompt"], line["answer"]) if line else []}
            except UserError as e:
                return {"runs": [], "note": str(e)}


class Server(ThreadingHTTPServer):
    def __init__(self, port: int):
        self.lock, self.token = threading.Lock(), secrets.token_urlsafe(16)
        self.html = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as e:
            raise UserError(f"--port {port}: {e.strerror}; choose another, or 0 for any that is "
                            "free") from None

    def handle_error(self, request, address):
        # a closed tab is no error
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, address)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Mark the first error of each answer by hand, in the "
                                "browser.")
    p.add_argument("--data", type=Path, required=True, help='JSON Lines of {"prompt", "answer"}')
    p.add_argument("--out", type=Path, required=True, help="judge data to write, or to go on with")
    p.add_argument("--target", type=Path, help="checkpoint directory; with --judge, shade each "
                   "token by the judge's doubt")
    p.add_argument("--judge", type=Path, help="the target's judge file")
    p.add_argument("--chat", action="store_true", help="put the prompts into the target's chat "
                   "template, as for train_judge.py")
    p.add_argument("--port", type=int, default=8765, help="default 8765; 0 for any that is free")
    args = p.parse_args(argv)
    for bad, message in (
            ((args.target is None) != (args.judge is None), "--target and --judge go together: "
             "give both to see the judge's doubt, or neither"),
            (args.chat and args.target is None, "--chat is for the judge's doubt: it needs "
             "--target and --judge"),
            (not 0 <= args.port < 65536, f"--port is {args.port}; it must be from 0 to 65535"),
    ):
        if bad:
            raise UserError(message)
    check_writable(args.out)
    return args


def main():
    args = parse_args()
    with Server(args.port) as server:
        server.annotation = a = Annotation(args.data, args.out)
        server.doubt = Doubt(args.target, args.judge, args.chat) if args.target else None
        print(f"{len(a.decisions)} of {len(a.answers)} answers decided -> {args.out}\n"
              f"open http://127.0.0.1:{server.server_address[1]}/#{server.token}\nCtrl-C stops; "
              "every decision is on disk", flush=True)
        try:
            server.serve_forever()
        finally:
            print(f"\n{len(a.decisions)} of {len(a.answers)} answers decided -> {args.out}")


if __name__ == "__main__":
    run(main)
