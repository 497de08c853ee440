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
import contextlib
import hashlib
import json
import secrets
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common import (
    Line,
    Parser,
    UserError,
    check_apart,
    check_writable,
    json_lines,
    refuse,
    run,
    say,
    visible,
)
from formats.answer_log import AnswerLog
from judge_data.data import check_texts, is_error

PAGE = Path(__file__).with_name("judge_data") / "annotate.html"
SKIP = "skip"
MAX_BODY = 10_000_000  # bytes; a decision holds the marked text
LINGER = 2.0  # seconds for what a client still sends after its answer


# ---------------------------------------------------------------- decisions

def read_answers(path: Path) -> list[Line]:
    """The answers to decide on, without the "error" that they came with."""
    answers = []
    for line in json_lines(path, holding="answers", halves=True):
        check_texts(line.value, line.where)
        answers.append(line._replace(value={k: v for k, v in line.value.items() if k != "error"}))
    return answers


def digest(line: dict) -> str:
    return hashlib.sha256(json.dumps([line["prompt"], line["answer"]]).encode()).hexdigest()[:16]


class Annotation:
    """The answers, the decisions on them in order, and which answer is shown.

    An answer's name, the same in every run, is a hash of its prompt and answer and its number among
    equal ones. A skip says after how many lines of --out it came, so both files together hold the
    order of all decisions, for `undo`.
    """

    def __init__(self, data: Path, out: Path):
        self.data, self.answers = data, read_answers(data)
        check_apart({"--out": out, "the list of skips": out.with_name(out.name + ".skipped")},
                    {"--data": data})
        self.names, count = [], {}
        for line in self.answers:
            d = digest(line.value)
            count[d] = count.get(d, 0) + 1
            self.names.append(f"{d}.{count[d]}")
        self.out = AnswerLog(out, torn=self.is_torn)
        self.skips = AnswerLog(out.with_name(out.name + ".skipped"))
        self.decisions = self.match()  # [(answer's index, None, [start, end] or SKIP)]
        self.out.open()  # only now: a file that is not ours stays as it was
        if self.skips.path.exists():
            self.skips.open()
        self.advance()

    def close(self):
        self.out.close()
        self.skips.close()

    def is_torn(self, tail: bytes) -> bool:
        """Whether the tail is the beginning of a decision on one of the answers.

        Nobody else's file is cut.
        """
        bodies = (json.dumps(line.value)[:-1].encode() + b', "error": ' for line in self.answers)
        return any(body.startswith(tail) or tail.startswith(body) for body in bodies)

    def match(self) -> list:
        """The decisions that the two files hold, in the order in which they were made."""
        index, taken, order = {name: i for i, name in enumerate(self.names)}, set(), []
        foreign = (f"is not a decision on an answer of {self.data}; name another --out, or the "
                   "--data that it was made from")
        for where, line, *_ in self.skips.lines:
            name, after = line.get("skipped"), line.get("after")
            if (not isinstance(name, str) or name not in index or name in taken
                    or type(after) is not int):
                raise UserError(f"{where} {foreign}")
            taken.add(name)
            order.append((after, 0, index[name], SKIP))
        for before, (where, line, *_) in enumerate(self.out.lines):
            name = None
            if "error" in line and "prompt" in line and "answer" in line:
                d, alike = digest(line), 1
                while (name := f"{d}.{alike}") in taken:
                    alike += 1
            if name not in index or not is_error(line["error"], line["answer"]):
                raise UserError(f"{where} {foreign}")
            taken.add(name)
            order.append((before, 1, index[name], line["error"]))
        order.sort(key=lambda entry: entry[:2])
        return [entry[2:] for entry in order]

    def advance(self):
        """Show the first answer without a decision; `shown` is None when there is none."""
        done = {i for i, _ in self.decisions}
        self.shown = next((i for i in range(len(self.answers)) if i not in done), None)
        self.mark = None

    def check(self):
        """Refuse to go on where one of the two files is not as this run left it."""
        self.out.check()
        self.skips.check()

    def decide(self, choice):
        self.check()
        line = self.answers[self.shown]
        if choice == SKIP:
            self.skips.append({"skipped": self.name, "after": len(self.out.lines),
                               "line": line.number})
        else:
            self.out.append(line.value | {"error": choice})
        self.decisions.append((self.shown, choice))
        self.advance()

    def undo(self):
        if self.decisions:
            self.check()
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
        line = self.answers[self.shown]
        others = {k: v if isinstance(v, str) else json.dumps(v) for k, v in line.value.items()
                  if k not in ("prompt", "answer")}
        return state | {"line": line.number, "prompt": line.value["prompt"],
                        "answer": line.value["answer"], "others": others, "mark": self.mark}


# ---------------------------------------------------------------- doubt

class Doubt:
    """A target and its judge: how much the judge doubts each token of an answer."""

    def __init__(self, target: Path, judge: Path, chat: bool):
        import torch  # here: these take seconds, and marking alone needs none of them

        from checkpoint import load
        from judge_data.report import logit
        from load import load_judge
        from tokenizer import Tokenizer
        self.tokenizer, self.chat = Tokenizer.from_dir(target), chat
        self.head = load_judge(judge, target)
        self.edge = logit(self.head.threshold)
        self.tokenizer.prompt("", chat)  # a missing chat template is reported now
        device, dtype = "cpu", torch.float32
        if torch.cuda.is_available():
            device, dtype = "cuda", torch.bfloat16
        self.torch, self.target, self.lock = torch, load(target, device, dtype), threading.Lock()

    def __call__(self, prompt: str, answer: str) -> list[tuple[int, int, float]]:
        """(start, end, doubt) of stretches of the answer's characters, by one pass of the target.

        Doubt is 0.5 at the judge's threshold, above it where the judge rejects. Raises UserError
        for an answer that exceeds the context.
        """
        torch, before = self.torch, self.tokenizer.prompt(prompt, self.chat)
        tokens, offsets = self.tokenizer.encode_with_offsets(answer, continuation=True)
        length, limit = len(before) + len(tokens), self.target.config.max_seq_len
        if length > limit:
            raise UserError(f"no doubt shown: prompt and answer have {length} tokens, the "
                            f"target's context is {limit}")
        with torch.inference_mode():
            ids = torch.tensor([before + tokens], device=self.target.norm.weight.device)
            hidden = self.target.features(ids, torch.arange(length, device=ids.device),
                                          self.target.new_cache(length))
            scores = self.head(hidden[0, len(before):].cpu())
            doubts = torch.sigmoid(self.edge - scores).tolist()
        return stretches(offsets, doubts, len(answer))


def stretches(offsets, doubts, length: int) -> list[tuple[int, int, float]]:
    """(start, end, doubt) from each token's start to the next one's.

    A character that several tokens share has the greatest doubt of theirs.
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
        self.answer(self.act)

    def parse_request(self):
        """http.server's, which would wait for the headers of HTTP/0.9."""
        with contextlib.suppress(TimeoutError):
            if len(self.raw_requestline.split()) == 3:
                return super().parse_request()
        self.command, self.requestline = None, ""
        self.send_error(400)

    def send_error(self, code, *_):
        """What http.server itself refuses: syntax, methods, lengths."""
        self.reply(code, "text/plain", f"this is no request that the page sends: "
                   f"{self.responses[code][0]}".encode(), {})

    def answer(self, make):
        try:
            self.check_origin()
            self.reply(*make())
        except Refused as e:
            self.reply(e.args[0], "text/plain", visible(e.args[1]).encode(), {})

    def reply(self, status: int, kind: str, body: bytes, headers: dict):
        self.request_version = self.protocol_version  # HTTP/0.9 would get no status
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8",
                            "Content-Length": str(len(body)), "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff",
                            "Cross-Origin-Resource-Policy": "same-origin",
                            "Cross-Origin-Opener-Policy": "same-origin",
                            "Referrer-Policy": "no-referrer", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def check_origin(self):
        """Only this page may ask.

        A foreign Host is DNS rebinding, a foreign Origin or Sec-Fetch-Site another site's page.
        """
        port = self.server.server_address[1]
        suffix = "" if port == 80 else f":{port}"
        every = self.headers.get_all
        host = every("Host", [])
        if len(host) != 1 or host[0] not in ("127.0.0.1" + suffix, "localhost" + suffix):
            raise Refused(403, "this server answers to 127.0.0.1 and localhost only")
        if (set(every("Origin", [])) - {f"http://{host[0]}"}
                or set(every("Sec-Fetch-Site", [])) - {"none", "same-origin"}):
            raise Refused(403, "this came from another site; paste the address that annotate.py "
                          "printed into the address bar")

    def page(self):
        if self.path.partition("?")[0] != "/":
            raise Refused(404, "there is one page, /")
        nonce = secrets.token_urlsafe(16)
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
                  "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors "
                  "'none'; require-trusted-types-for 'script'; trusted-types 'none'")
        html = self.server.html.replace("NONCE", nonce)
        return 200, "text/html", html.encode(), {"Content-Security-Policy": policy}

    def act(self):
        s = self.server
        if not secrets.compare_digest(self.headers.get("X-Token", "").encode(), s.token.encode()):
            raise Refused(403, "this page is not of the present run; open the address that "
                          "annotate.py printed last")
        try:
            asked = json.loads(self.body().decode())
            name = asked["name"]
            if not isinstance(name, str | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refused(400, "the request is not what this page sends") from None
        reply = self.doubt(name) if self.path == "/doubt" else self.change(asked, name)
        return 200, "application/json", json.dumps(reply).encode(), {}

    def body(self) -> bytes:
        """The body, of the length that the headers say."""
        said = self.headers.get_all("Content-Length", [])
        if len(said) != 1 or not said[0].isdecimal() or int(said[0]) > MAX_BODY:
            raise Refused(400, f"the request must say its length, at most {MAX_BODY:,} bytes")
        try:
            body = self.rfile.read(int(said[0]))
        except TimeoutError:
            body = b""
        if len(body) < int(said[0]):
            raise Refused(400, "the request is shorter than it says")
        return body

    def change(self, asked: dict, name):
        """The present state, after a decision or an undo if that is asked for.

        One request at a time, and only about the answer that is shown.
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
                why = getattr(e, "strerror", None) or e
                raise Refused(500, f"nothing was saved: {why}") from None
            return a.state()

    @staticmethod
    def choice(asked: dict, a: Annotation):
        """None, SKIP or [start, end], checked.

        The page sends the marked text too, so that no offset counted otherwise slips in.
        """
        choice = asked.get("choice", ())
        answer = "" if a.shown is None else a.answers[a.shown].value["answer"]
        if a.shown is None or choice != SKIP and not is_error(choice, answer):
            raise Refused(400, "the request is not what this page sends")
        if isinstance(choice, list) and answer[choice[0]:choice[1]] != asked.get("text"):
            raise Refused(400, "nothing was saved: page and server count the answer's characters "
                          "differently; please report this answer")
        return choice

    def doubt(self, name):
        """The shades of the answer that is shown.

        None for one that is shown no longer, so that a slow target does not fall behind.
        """
        doubt, a = self.server.doubt, self.server.annotation
        if doubt is None:
            return {"runs": []}
        with doubt.lock:
            with self.server.lock:
                line = None
                if name is not None and name == a.name:
                    line = a.answers[a.shown].value
            try:
                return {"runs": doubt(line["prompt"], line["answer"]) if line else []}
            except UserError as e:
                return {"runs": [], "note": str(e)}


class Server(ThreadingHTTPServer):
    def __init__(self, port: int):
        self.lock, self.token = threading.Lock(), secrets.token_urlsafe(16)
        self.html = PAGE.read_text(encoding="utf-8")
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as e:
            raise UserError(f"--port {port}: {e.strerror}; choose another, or 0 for any that is "
                            "free") from None

    def shutdown_request(self, request):
        """Close a connection after what the client still sends: bytes left unread would reset it,
        and the answer might be lost.
        """
        end = time.monotonic() + LINGER
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(LINGER)
            while request.recv(1 << 16) and time.monotonic() < end:
                pass
        self.close_request(request)

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):  # a closed tab
            super().handle_error(request, address)


def parse_args(argv=None):
    p = Parser(description="Mark the first error of each answer by hand, in the "
                                "browser.")
    p.add_argument("--data", type=Path, required=True, help='JSON Lines of {"prompt", "answer"}')
    p.add_argument("--out", type=Path, required=True, help="judge data to write, or to resume")
    p.add_argument("--target", type=Path,
                   help="checkpoint directory; with --judge, shade each token by the judge's doubt")
    p.add_argument("--judge", type=Path, help="the target's judge file")
    p.add_argument("--chat", action="store_true",
                   help="put the prompts into the target's chat template, as for train_judge.py")
    p.add_argument("--port", type=int, default=8765, help="default 8765; 0 for any that is free")
    args = p.parse_args(argv)
    refuse(
        ((args.target is None) != (args.judge is None), "--target and --judge go together: give "
         "both to see the judge's doubt, or neither"),
        (args.chat and args.target is None, "--chat is for the judge's doubt: it needs --target "
         "and --judge"),
        (not 0 <= args.port < 65536, f"--port is {args.port}; it must be from 0 to 65535"))
    check_writable(args.out)
    return args


def main():
    args = parse_args()
    with Server(args.port) as server:
        server.annotation = a = Annotation(args.data, args.out)
        server.doubt = Doubt(args.target, args.judge, args.chat) if args.target else None
        say(f"{len(a.decisions)} of {len(a.answers)} answers decided -> {args.out}\n"
            f"open http://127.0.0.1:{server.server_address[1]}/#{server.token}\nCtrl-C stops; "
            "every decision is on disk")
        try:
            server.serve_forever()
        finally:
            say(f"\n{len(a.decisions)} of {len(a.answers)} answers decided -> {args.out}")


if __name__ == "__main__":
    run(main)
