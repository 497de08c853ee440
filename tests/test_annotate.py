"""annotate.py in a real headless browser and over plain HTTP: exact offsets, what is on disk when,
who is refused, bad input.

The browser is driven by ChromeDriver's own HTTP protocol (W3C WebDriver). Where a mark must land is
counted here, in Python's characters.
"""
import base64
import http.client
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
import torch

import annotate
from annotate import Annotation, Doubt, Server, stretches
from common import UserError
from formats.answer_log import AnswerLog
from judge_data.data import read_data

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / "demo"
BEFORE = ROOT / "tests" / "written_before" / "annotate"
CHROME = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
browser_only = pytest.mark.skipif(
    not (CHROME and DRIVER), reason="needs chromium and chromedriver (Debian: apt-get install "
    "chromium chromium-driver)")

QUESTION = ("Question: Mira has 3 eggs. Mira finds 4 more. How many eggs does Mira have now?\n"
            "Answer:")
FAMILY = "👩‍👩‍👧"  # five code points, eight UTF-16 units
ANSWERS = [
    f"First 🎉 line, {FAMILY} is fine.\nSecond e\u0301 line\r\nthird: 3 + 4 = 8 🎈 apples.\n\n"
    "  So 8.\n",
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    "&amp; <b>bold</b>\x00\u2028end",
    "Seven, 7.", "Eight words stand in this plain sentence here. " * 12, "שלום 12 = 13 עולם",
    "last \ud83d one",
]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


@pytest.fixture
def data(tmp_path):
    lines = [{"prompt": f"Prompt {i} <b>&", "answer": a, "domain": "x", "error": [0, 1]}
             for i, a in enumerate(ANSWERS)]
    return write(tmp_path / "answers.jsonl", lines)


class App:
    """annotate.py as a process, and its requests as the page makes them."""

    def __init__(self, data, out, *more, python=()):
        command = [sys.executable, *python, "annotate.py", "--data", data, "--out", out, "--port",
                   "0", *more]
        heed_sigint = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=heed_sigint)  # a background shell's children ignore it
        self.first = self.process.stdout.readline()
        line = self.process.stdout.readline()
        if not line.startswith("open http://127.0.0.1:"):
            self.process.kill()
            raise AssertionError((self.first, line, self.process.stderr.read()))
        self.url = line.split()[1]
        self.port, self.token = int(self.url.split(":")[2].split("/")[0]), self.url.split("#")[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close(), self.process.stderr.close()

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        reply = connection.getresponse()
        return reply.status, reply.read().decode(), dict(reply.getheaders())

    def post(self, path, token=None, headers=None, **body):
        status, text, _ = self.request("POST", path, json.dumps(body), X_Token=token or self.token,
                                       **(headers or {}))
        return (status, json.loads(text)) if status == 200 else (status, text)

    def decide(self, choice, **more):
        _, state = self.post("/state", name=None)
        return self.post("/decide", name=state["name"], choice=choice, **more)


# ---------------------------------------------------------------- the browser

class Browser:
    KEYS = {"shift": "\ue008", "control": "\ue009", "left": "\ue012", "up": "\ue013",
            "right": "\ue014", "down": "\ue015", "end": "\ue010", "home": "\ue011",
            "enter": "\ue007", "escape": "\ue00c"}

    def __init__(self, folder):
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True)
        self.base = None
        while "started successfully on port" not in (line := self.driver.stdout.readline()):
            assert line, "chromedriver did not start"
        self.base = f"http://127.0.0.1:{line.split('port ')[1].split('.')[0].strip()}/session"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", "--disable-dev-shm-usage", "--window-size=1000,900",
                 f"--user-data-dir={folder}"]
        options = {"binary": CHROME, "args": flags}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options,
                        "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        self.base += "/" + session["sessionId"]

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data,
                                         {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(e.read().decode()) from None

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.driver.kill()
            self.driver.communicate()

    def open(self, url):
        self.call("POST", "/url", {"url": "about:blank"})
        self.call("POST", "/url", {"url": url})

    def js(self, script, *args):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def until(self, script, *args):
        end = time.monotonic() + 30
        while not (value := self.js(script, *args)):
            assert time.monotonic() < end, (script, args, self.js("return document.body.innerText"))
            time.sleep(0.05)
        return value

    def decided(self, count):
        self.until("return document.getElementById('where').textContent === arguments[0]",
                   f"{count} of {len(ANSWERS)}")

    def says(self, text):
        self.until("return document.getElementById('said').textContent.includes(arguments[0])",
                   text)

    def point(self, answer, at):
        """The left edge of the answer's character `at`, in the window.

        Text nodes are counted here, not by the page's own code.
        """
        units = len(answer[:at].encode("utf-16-le", errors="surrogatepass")) // 2
        return self.js("""
            const answer = document.getElementById('answer');
            const walk = document.createTreeWalker(answer, NodeFilter.SHOW_TEXT);
            let left = arguments[0];
            for (let node; node = walk.nextNode(); left -= node.length)
              if (left < node.length) {
                const range = document.createRange();
                range.setStart(node, left); range.setEnd(node, left + 1);
                const box = range.getClientRects()[0] || range.getBoundingClientRect();
                return [Math.round(box.left), Math.round(box.top + box.height / 2)];
              }
            throw Error('no such character');""", units)

    def mouse(self, *points, times=1):
        """Press the button at the first point, go over the others, release it."""
        moves = [{"type": "pointerMove", "duration": 20, "x": x, "y": y} for x, y in points]
        self.pointer(*moves[:1], *[{"type": "pointerDown", "button": 0}, *moves[1:],
                                   {"type": "pointerUp", "button": 0}] * times)

    def pointer(self, *steps):
        self.actions({"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"},
                      "actions": list(steps)})

    def drag(self, answer, start, end):
        """Press at the left edge of the character `start`, go and release at that of `end`."""
        (x0, y0), (x1, y1) = self.point(answer, start), self.point(answer, end)
        self.mouse((x0, y0), ((x0 + x1) // 2, (y0 + y1) // 2), (x1, y1))

    def click(self, selector):
        element = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{next(iter(element.values()))}/click", {})

    def actions(self, source):
        self.call("POST", "/actions", {"actions": [source]})

    def press(self, *keys):
        """Each is a key, several held together (shift+right), or that repeated (shift+right*3)."""
        steps = []
        for key in keys:
            key, _, times = key.partition("*")
            held = [self.KEYS.get(k, k) for k in key.split("+")]
            for _ in range(int(times or 1)):
                steps += [{"type": "keyDown", "value": k} for k in held]
                steps += [{"type": "keyUp", "value": k} for k in reversed(held)]
        self.keys(*steps)

    def keys(self, *steps):
        self.actions({"type": "key", "id": "keys", "actions": list(steps)})

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    b = Browser(tmp_path_factory.mktemp("profile"))
    yield b
    b.close()


@browser_only
def test_marks_by_drag_and_keys_land_exactly(browser, data, tmp_path):
    a, out = ANSWERS[0], tmp_path / "out.jsonl"
    first = {"prompt": "Prompt 0 <b>&", "answer": a, "domain": "x"}
    with App(data, out) as app:
        browser.open(app.url)
        browser.decided(0)
        assert browser.js("return document.getElementById('answer').textContent") == a
        # Across an emoji and a line break; across a line break written \r\n; backwards.
        for start, end in ((a.index("🎉"), a.index("ond")), (a.index("line\r"), a.index("rd: 3")),
                           (a.index("So"), a.index("= 8"))):
            browser.drag(a, start, end)
            start, end = sorted((start, end))
            browser.says(f"characters {start} to {end} of {len(a)}:")
            shown = browser.js("return [...document.querySelectorAll('#answer .marked')]"
                               ".map(e => e.textContent).join('')")
            assert shown == a[start:end]
            assert lines_of(out) == []  # a mark is not yet a decision
            browser.press("enter")
            browser.decided(1)
            assert lines_of(out) == [first | {"error": [start, end]}]
            browser.press("u")
            browser.decided(0)
            assert lines_of(out) == []
            browser.says(f"characters {start} to {end} of")  # the undone mark is there to be mended
            browser.press("escape")
        # By keys alone: past the emoji, over the family (one step), the line's end and the break.
        start = a.index(FAMILY)
        browser.press("control+home", f"right*{start}", "shift+right")
        browser.says(f"characters {start} to {start + 5} of")
        browser.press("shift+end", "shift+right*3", "enter")
        browser.decided(1)
        assert lines_of(out) == [first | {"error": [start, a.index("\n") + 3]}]
        browser.press("u")
        browser.decided(0)
        # the last character, a line break
        browser.press("escape", "control+end", "shift+left", "enter")
        browser.decided(1)
        assert lines_of(out) == [first | {"error": [len(a) - 1, len(a)]}]


@browser_only
def test_everything_by_keyboard_across_a_restart(browser, data, tmp_path):
    out = tmp_path / "out.jsonl"
    with App(data, out) as app:
        browser.open(app.url)
        browser.decided(0)
        browser.press("enter")  # nothing is marked
        browser.decided(0)
        browser.says("Nothing is marked")
        # a key held down too long
        browser.js("document.body.dispatchEvent("
                   "new KeyboardEvent('keydown', {key: 'c', repeat: true, bubbles: true}))")
        browser.press("s")
        browser.decided(1)
        # HTML stays text, and a NUL, a line separator and the like are still counted
        assert browser.js("return document.getElementById('answer').textContent") == ANSWERS[1]
        assert browser.js("return document.querySelectorAll("
                          "'#answer script, #answer img, #answer b, #prompt b').length") == 0
        assert browser.js("return document.title") == "Mark the first error"
        browser.press("control+end", "shift+left*3", "c")  # refused: something is marked
        browser.decided(1)
        browser.says("An error is marked")
        browser.press("enter")
        browser.decided(2)
        browser.press("c")
        browser.decided(3)
        a = ANSWERS[3]  # several lines on the screen: down, up and ends of lines
        browser.press("down", "home", "shift+end", "shift+down", "shift+up", "shift+control+right")
        start, end = map(int, browser.js("return document.getElementById('said').textContent"
                                         ".match(/characters (\\d+) to (\\d+)/).slice(1)"))
        tops = [browser.point(a, i)[1] for i in (start - 1, start, end - 8)]
        assert tops[0] < tops[1] <= tops[2] and a[start - 1] == " "
        browser.press("escape", "u")
        browser.decided(2)
        app.process.send_signal(signal.SIGKILL)
        browser.press("c")
        browser.says("does not answer")
    whole = [1, [len(ANSWERS[1]) - 3, len(ANSWERS[1])]]
    marked = lambda: [[ANSWERS.index(line["answer"]), line["error"]] for line in lines_of(out)]
    assert marked() == [whole]
    with App(data, out) as app:
        assert app.first.startswith("2 of 6 answers decided")  # the skip is remembered
        browser.open(app.url)
        browser.decided(2)
        browser.press("u")  # decisions of the earlier run
        browser.decided(1)
        assert marked() == []
        browser.press("u")
        browser.decided(0)
        assert browser.js("return document.getElementById('answer').textContent") == ANSWERS[0]
        assert browser.js("return document.getElementById('undo').disabled")
        for i in range(len(ANSWERS)):
            browser.press("c")
            browser.decided(i + 1)
        assert "Every answer is decided" in browser.js("return document.body.innerText")
        assert [(line["answer"], line["error"])
                for line in lines_of(out)] == [(a, None) for a in ANSWERS]
        # train_judge.py reads all but the half character, which no tokenizer can.
        whole = write(tmp_path / "whole.jsonl", lines_of(out)[:-1])
        assert [e["answer"] for e in read_data(whole)] == ANSWERS[:-1]
        said = browser.call("POST", "/se/log", {"type": "browser"})
        # The page breaks none of its own Content-Security-Policy.
        assert not [e for e in said
                    if e["level"] == "SEVERE" and "ERR_CONNECTION" not in e["message"]]


@browser_only
def test_clicks_and_drags_from_outside(browser, data, tmp_path):
    a = ANSWERS[0]
    with App(data, tmp_path / "out.jsonl") as app:
        browser.open(app.url + "x")
        browser.says("not of the present run")
        browser.open(app.url)
        browser.decided(0)
        browser.mouse(browser.point(a, a.index("ird")), times=2)
        browser.says("“third”")
        browser.mouse(browser.point(a, a.index("is fine")))
        browser.says("Drag over")  # a click places the cursor and clears the mark
        browser.press("shift+right*2")
        browser.says("“is”")
        x, y = browser.js("const b = document.getElementById('prompt').getBoundingClientRect();"
                          "return [b.left + 2, b.top + 5].map(Math.round)")
        browser.mouse((x, y), browser.point(a, a.index("line,")))
        browser.says(f"characters 0 to {a.index('line,')} of")  # what of it lies in the answer
        # the prompt can be selected, and copied, without harm to the mark
        browser.mouse((x, y), (x + 60, y))
        browser.press("shift+right")
        browser.says(f"characters 0 to {a.index('line,') + 1} of")
        assert browser.js("return getSelection().toString()").startswith("Prom")
        browser.mouse(browser.point(a, a.index("ond")))
        browser.keys({"type": "keyDown", "value": browser.KEYS["shift"]})
        browser.mouse(browser.point(a, a.index("third")))
        browser.keys({"type": "keyUp", "value": browser.KEYS["shift"]})
        browser.says(f"characters {a.index('ond')} to {a.index('third')} of")


@browser_only
def test_the_mouse_buttons_right_to_left_and_lone_surrogates(browser, data, tmp_path):
    out = tmp_path / "out.jsonl"
    with App(data, out) as app:
        for _ in range(4):
            app.decide("skip")
        browser.open(app.url)
        browser.decided(4)
        # keys go by the text's own order, whatever way it runs on the screen
        browser.press("right*5", "shift+right*7")
        browser.click("#save")
        browser.decided(5)
        browser.press("right*4", "shift+right*2")
        browser.click("#correct")
        browser.says("An error is marked")
        browser.press("enter")  # a clicked button has not kept the focus: Enter saves
        browser.decided(6)
        assert [(line["answer"], line["error"])
                for line in lines_of(out)] == [(ANSWERS[4], [5, 12]), (ANSWERS[5], [4, 6])]
        browser.click("#undo")
        browser.decided(5)
        browser.press("escape")
        browser.click("#correct")
        browser.decided(6)
        assert lines_of(out)[-1]["error"] is None


@browser_only
def test_the_doubt_is_shown_behind_each_token(browser, tmp_path):
    good = "She has 3 + 4 = 7 eggs."
    data = write(tmp_path / "answers.jsonl", [{"prompt": QUESTION, "answer": good}])
    with App(data, tmp_path / "out.jsonl", "--target", DEMO / "target", "--judge",
             DEMO / "judge.safetensors") as app:
        browser.open(app.url)
        browser.until("return !document.getElementById('legend').hidden")
        shown = browser.js("return [...document.querySelectorAll('#answer span')]"
                           ".map(e => [e.textContent, e.style.getPropertyValue('--doubt')])")
        _, reply = app.post("/doubt", name=app.post("/state", name=None)[1]["name"])
        (x0, y0), (x1, y1) = browser.point(good, 4), browser.point(good, 9)
        # the doubt comes while the person drags
        browser.js("late = 0; setTimeout(() => shade(state.name).then(() => late = 1), 100)")
        browser.pointer({"type": "pointerMove", "x": x0, "y": y0},
                        {"type": "pointerDown", "button": 0},
                        {"type": "pointerMove", "x": x0 + 15, "y": y0},
                        {"type": "pause", "duration": 800},
                        {"type": "pointerMove", "x": x1, "y": y1},
                        {"type": "pointerUp", "button": 0})
        assert browser.js("return late")
        browser.says("characters 4 to 9 of")
    assert [[good[a:b], f"{d:.3f}"] for a, b, d in reply["runs"]] == shown


# ---------------------------------------------------------------- doubt

def test_doubt_is_the_judges_own_score(tmp_path):
    doubt = Doubt(DEMO / "target", DEMO / "judge.safetensors", chat=False)
    prompt, answer = QUESTION, " Mira has 3 + 4 = 9 eggs.\n#### 9"
    ids, offsets = doubt.tokenizer.encode_with_offsets(answer, continuation=True)
    before = doubt.tokenizer.encode(prompt)
    tokens = torch.tensor([before + ids])
    with torch.inference_mode():
        _, hidden = doubt.target(tokens, torch.arange(tokens.shape[1]),
                                 doubt.target.new_cache(tokens.shape[1]))
    t = doubt.head.threshold
    want = (math.log(t / (1 - t)) - doubt.head(hidden[0, len(before):])).sigmoid()
    runs = doubt(prompt, answer)
    assert "".join(answer[a:b] for a, b, _ in runs) == answer
    for (a, b), w in zip(offsets, want.tolist()):
        assert max(d for x, y, d in runs if x < b and y > a) == pytest.approx(w, abs=1e-4)
    # this the judge rejects, that it accepts
    assert max(d for a, _, d in runs if answer[a:].startswith(("9", " 9"))) > 0.5 > runs[0][2]


def test_a_character_of_several_tokens_has_the_greatest_doubt():
    assert stretches([(0, 1), (0, 1), (1, 3)], [0.1, 0.7, 0.2], 3) == [(0, 1, 0.7), (1, 3, 0.2)]
    assert stretches([(0, 2), (1, 3)], [0.3, 0.2], 3) == [(0, 1, 0.3), (1, 3, 0.3)]


# ---------------------------------------------------------------- who may ask

def test_only_this_page_may_ask(data, tmp_path):
    out = tmp_path / "out.jsonl"
    with App(data, out) as app:
        here = f"127.0.0.1:{app.port}"
        assert app.request("GET", "/")[0] == 200
        local = {"Host": f"localhost:{app.port}", "Sec_Fetch_Site": "none"}
        assert app.request("GET", "/", **local)[0] == 200
        name = app.post("/state", name=None)[1]["name"]
        wrong = [{"Host": f"evil.example:{app.port}"}, {"Host": "127.0.0.1"},
                 {"Host": f"127.0.0.1.evil.example:{app.port}"}, {"Host": ""},
                 {"Origin": "http://evil.example"}, {"Origin": "null"},
                 {"Origin": f"http://localhost:{app.port}"}, {"Origin": f"https://{here}"},
                 {"Origin": f"http://127.0.0.1:{app.port + 1}"}, {"Sec_Fetch_Site": "cross-site"},
                 {"Sec_Fetch_Site": "same-site"}]
        for headers in wrong:
            for path in ("/decide", "/undo", "/state", "/doubt"):
                assert app.post(path, headers=headers, name=name, choice=None)[0] == 403, headers
            assert app.request("GET", "/", **headers)[0] == 403, headers
        for token in ("x", "é".encode().decode("latin-1"), app.token + "x"):
            assert app.post("/decide", token=token, name=name, choice=None)[0] == 403
        # no token
        assert app.request("POST", "/decide", json.dumps({"name": name, "choice": None}))[0] == 403
        assert app.request("GET", "/decide")[0] == app.request("GET", "/../annotate.py")[0] == 404
        # no preflight is answered
        assert app.request("OPTIONS", "/decide", Origin="http://evil.example")[0] == 501
        assert lines_of(out) == []
        ours = {"Origin": f"http://{here}", "Sec_Fetch_Site": "same-origin"}
        assert app.post("/decide", headers=ours, name=name, choice=None)[0] == 200
        assert len(lines_of(out)) == 1
        _, html, headers = app.request("GET", "/")
        policy = headers["Content-Security-Policy"]
        nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert f'<script nonce="{nonce}">' in html and app.token not in html
        assert nonce not in app.request("GET", "/")[1]
        sockets = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()]
        listening = [a for a, _, status in sockets
                     if a.endswith(f":{app.port:04X}") and status == "0A"]
        assert listening == [f"0100007F:{app.port:04X}"]  # loopback only


def test_a_decision_that_does_not_fit_the_answer_is_refused(data, tmp_path):
    out = tmp_path / "out.jsonl"
    with App(data, out) as app:
        for choice in ([0, 0], [3, 2], [-1, 2], [0, len(ANSWERS[0]) + 1], [0], [0.0, 1], [True, 2],
                       "x", 0, {}, [0, 1, 2]):
            assert app.decide(choice, text="")[0] == 400, choice
        # the page counted otherwise
        assert app.decide([0, 2], text="Fir")[0] == 400 and app.decide([0, 2])[0] == 400
        # a second window is behind
        assert app.post("/decide", name="other", choice=None)[0] == 409
        assert app.post("/undo", name="other")[0] == 409
        for name in ([], {}, 1, True, 1.5, [app.post("/state", name=None)[1]["name"]]):
            assert app.post("/decide", name=name, choice=None)[0] == 400
        for body in (None, "", "{", "[]", "{}"):
            assert app.request("POST", "/decide", body, X_Token=app.token)[0] == 400
        assert app.request("POST", "/decide", "{}", X_Token=app.token,
                           Content_Length="99999999999")[0] == 400
        assert lines_of(out) == [] and app.decide([0, 2], text="Fi")[0] == 200


# ---------------------------------------------------------------- requests of any shape

@pytest.fixture
def server(data, tmp_path):
    """annotate.py's server in this process, after one decision and one skip."""
    with Server(0) as s, closing(Annotation(data, tmp_path / "out.jsonl")) as s.annotation:
        s.doubt = None
        s.annotation.decide(None)
        s.annotation.decide("skip")
        thread = threading.Thread(target=s.serve_forever, args=(0.01,))
        thread.start()
        yield s
        s.shutdown()
        thread.join()


def say(server, request: bytes, end=True) -> bytes:
    """The answer to raw bytes; `end`: nothing more is sent, else the connection is left open."""
    with socket.create_connection(server.server_address, timeout=20) as s:
        s.sendall(request)
        if end:
            s.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: s.recv(65536), b""))


def raw(server, method=b"POST", path=b"/decide", body=b"", version=b"HTTP/1.1", length=None,
        token=None, host=None, more=()) -> bytes:
    host = b"127.0.0.1:%d" % server.server_address[1] if host is None else host
    headers = [b"Host: " + host, b"X-Token: " + (server.token.encode() if token is None else token),
               b"Content-Length: " + (b"%d" % len(body) if length is None else length), *more]
    line = b" ".join(filter(None, (method, path, version)))
    return b"\r\n".join((line, *headers, b"", body))


DEEP = [b"[" * 100_000, b'{"name":' * 20_000, b'{"name": null, "choice": ' + b"[" * 90_000]
VALUES = ["null", "true", "0", "-1", "1.5", "1e999", "NaN", "[]", "{}", "[0, 1]", "[0.0, 1]",
          "[true, 2]", "[0, 1e400]", "[0, %d]" % 10**60, "9" * 5000, '""', '"skip"', '"\\ud800"',
          '"x"', '{"a": [1]}', '[[0, 1]]', '["0", "1"]', "[0, 1, 2]", "[2, 1]", "[null, null]"]


def odd_request(server, rng) -> bytes:
    """A request with one to three things wrong, never a decision that may be taken."""
    change = {}
    name = json.dumps(server.annotation.name)
    wrong = [v for v in VALUES if v not in ("null", '"skip"')]
    bodies = [
        lambda: b'{"name": %s, "choice": %s, "text": %s}' % tuple(
            v.encode() for v in (name, rng.choice(wrong), rng.choice(VALUES))),
        lambda: b'{"name": %s, "choice": null}' % rng.choice(VALUES[1:]).encode(),
        lambda: rng.choice(VALUES).encode(), lambda: rng.choice(DEEP),
        lambda: rng.randbytes(rng.randrange(60)), lambda: b'{"name": "\xff\xfe"}',
        lambda: b'{"name": null, "name": [%s]}' % name.encode(), lambda: b"\xef\xbb\xbf{}"]
    change["body"] = rng.choice(bodies)()
    more = {
        "method": [b"GET", b"HEAD", b"PUT", b"OPTIONS", b"DELETE", b"\xe9\xff", b"post", b""],
        "path": [b"/", b"/state", b"/undo?x", b"/doubt", b"/\xff\x80", b"//x", b"*", b"",
                 b"/../etc", b"http://evil.example/", b"/%ff%00", b"/" + b"a" * 70_000],
        "version": [b"", b"HTTP/0.9", b"HTTP/9.9", b"HTTP/1.x", b"HTTP/\xb2.1", b"\xff", b"a b"],
        "length": [b"", b"-1", b"1e3", b"9" * 5000, b"99999999999", b"0x10", b"\xb2", b"+5", b"1_0",
                   b"5, 5", b"7"],
        "token": [b"", b"\xe9\xff", "é".encode(), b"x" * 60_000, b"\x00"],
        "host": [b"", b"\xff", b"evil.example", b"127.0.0.1"],
        "more": [[b"Transfer-Encoding: chunked"], [b"\xff\xfe: \x80"], [b"no colon"],
                 [b"A: b"] * 150, [b"X: " + b"y" * 70_000], [b"Expect: 100-continue"],
                 [b"Content-Length: 3"], [b"Origin: \xff"], [b" folded: \x00"]]}
    for key in rng.sample(sorted(more), rng.randrange(3)):
        change[key] = rng.choice(more[key])
    request = raw(server, **change)
    return request[:rng.randrange(len(request))] if rng.random() < 0.05 else request


def test_no_request_breaks_the_server(server, tmp_path, capfd):
    """500 odd requests: each has a status and a sentence, and nothing is changed."""
    rng, state = random.Random(18), server.annotation.state()
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    statuses = set()
    for _ in range(500):
        request = odd_request(server, rng)
        answer = say(server, request)
        head, _, body = answer.partition(b"\r\n\r\n")
        if not request:
            continue
        assert head.startswith(b"HTTP/1.0 "), (request[:300], answer[:300])
        status = int(head.split()[1])
        statuses.add(status)
        if status >= 400 and not request.startswith(b"HEAD"):
            assert body.decode().isprintable() and 10 < len(body) < 200, (request[:300], body)
    assert statuses - {200} == {400, 403, 404, 409, 414, 431, 501, 505}
    assert server.annotation.state() == state
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files
    assert capfd.readouterr().err == ""
    assert say(server, raw(server, body=b'{"name": %s, "choice": null}' % json.dumps(
        server.annotation.name).encode())).startswith(b"HTTP/1.0 200")


def test_silent_clients_are_answered(server, monkeypatch):
    """Ones that announce more than they send, or send more than is read."""
    assert b"400" in say(server, b"GET /\r\n", end=False)[:20]  # HTTP/0.9 ends there
    for length in (b"-1", b"+2", b"0_2", b"1e3", b""):
        said = say(server, raw(server, body=b"{}", length=length), end=False)
        assert b"400" in said[:20] and b"must say its length" in said, length
    monkeypatch.setattr(annotate.Handler, "timeout", 0.2)
    assert b"400" in say(server, raw(server, body=b"{}", length=b"50"), end=False)[:20]
    assert b"400" in say(server, b"GET / HTTP/1.1\r\nHost: x\r\n", end=False)[:20]
    much = raw(server, body=b" " * (annotate.MAX_BODY + 1))
    assert b"400" in say(server, much)[:20]
    assert b"403" in say(server, raw(server, body=b" " * 5_000_000, token=b"x"))[:20]


def test_half_characters_in_data_are_shown_and_kept(tmp_path):
    line = {"prompt": "p\ud800", "answer": "a\udfff b", "k\ud800": "\ud800", "n": {"\udc00": 1}}
    data, out = write(tmp_path / "d.jsonl", [line]), tmp_path / "o.jsonl"
    with App(data, out) as app:
        status, state = app.post("/state", name=None)
        assert status == 200 and state["others"] == {"k\ud800": "\ud800", "n": '{"\\udc00": 1}'}
        assert app.post("/doubt", name=state["name"]) == (200, {"runs": []})
        assert app.decide([1, 2], text="\udfff")[0] == 200
    assert lines_of(out) == [line | {"error": [1, 2]}]


# ---------------------------------------------------------------- what is on disk

def test_a_kill_between_decisions_loses_nothing(data, tmp_path):
    out = tmp_path / "out.jsonl"
    want = []
    for i, choice in enumerate([None, "skip", [0, 1], "skip", [1, 3], None]):
        with App(data, out) as app:
            text = ANSWERS[i][slice(*choice)] if isinstance(choice, list) else ""
            status, state = app.decide(choice, text=text)
            app.process.send_signal(signal.SIGKILL)
            assert status == 200 and state["decided"] == i + 1
            want.append(choice)
    assert [line["error"] for line in lines_of(out)] == [c for c in want if c != "skip"]
    while want:  # and back, a run for each
        with App(data, out) as app:
            name = app.post("/state", name=None)[1]["name"]  # None when all are decided
            assert app.post("/undo", name=name)[0] == 200
            app.process.send_signal(signal.SIGKILL)
        undone = want.pop()
        assert [line["error"] for line in lines_of(out)] == [c for c in want if c != "skip"]
        with closing(Annotation(data, out)) as a:
            assert [c for _, c in a.decisions] == want and a.name == a.names[len(want)], undone


def test_a_kill_at_any_moment_keeps_what_was_answered(tmp_path):
    many = [{"prompt": "p", "answer": f"{i} " * 3000} for i in range(2000)]
    data, out = write(tmp_path / "many.jsonl", many), tmp_path / "out.jsonl"
    rng, known = random.Random(0), 0
    for _ in range(4):
        with App(data, out) as app:
            # one more where the kill fell between the disk and the reply
            assert known <= int(app.first.split()[0]) <= known + 1
            _, state = app.post("/state", name=None)
            threading.Timer(rng.uniform(0.05, 0.4), app.process.kill).start()
            try:
                while True:
                    known = state["decided"]
                    _, state = app.post("/decide", name=state["name"],
                                        choice=rng.choice([None, "skip"]))
            except (OSError, http.client.HTTPException):
                pass
    assert known  # how many depends on the machine


def choices(data, out, *more):
    """What a run finds, and then decides."""
    with closing(Annotation(data, out)) as a:
        found = [c for _, c in a.decisions]
        for choice in more:
            a.decide(choice)
    return found


def test_half_a_line_is_cut_and_only_ours(data, tmp_path):
    out = tmp_path / "out.jsonl"
    assert choices(data, out, None, [0, 2], "skip", None) == []
    whole, skips = out.read_bytes(), Path(f"{out}.skipped")
    two = whole[:whole.index(b"\n", whole.index(b"\n") + 1) + 1]
    for cut in (*range(len(two) + 1, len(whole), 9), len(whole) - 1):
        out.write_bytes(whole[:cut])
        all_there = cut == len(whole) - 1  # but for the line's end
        assert choices(data, out) == [None, [0, 2], "skip"] + [None] * all_there
        assert out.read_bytes() == (whole if all_there else two)
    out.write_bytes(whole)
    skips.write_bytes(skips.read_bytes() + b'{"skipped": "ab')
    assert choices(data, out) == [None, [0, 2], "skip", None]
    for foreign in (b"my notes", b'{"prompt": "mine", "answ', b"[1, 2"):
        out.write_bytes(foreign)
        with pytest.raises(UserError, match="out.jsonl, line 1: not JSON"):
            Annotation(data, out)
        assert out.read_bytes() == foreign


def test_same_answers_are_told_apart_and_skips_come_back_without_their_file(tmp_path):
    same = [{"prompt": "p", "answer": "a", "n": i} for i in range(3)]
    data, out = write(tmp_path / "d.jsonl", same), tmp_path / "o.jsonl"
    choices(data, out, None, "skip", [0, 1])
    assert [line["n"] for line in lines_of(out)] == [0, 2]
    with closing(Annotation(data, out)) as a:
        assert a.decisions == [(0, None), (1, "skip"), (2, [0, 1])] and a.shown is None
    Path(f"{out}.skipped").unlink()
    with closing(Annotation(data, out)) as a:
        assert a.state()["decided"] == 2 and a.shown is not None


def test_decisions_written_before_are_resumed(tmp_path):
    """Commit 3686f6e wrote them; a kill left the beginning of a last one."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    data, out = tmp_path / "to_mark.jsonl", tmp_path / "marked.jsonl"
    lines, skips = out.read_bytes().splitlines(True), Path(f"{out}.skipped").read_bytes()
    with closing(Annotation(data, out)) as a:
        assert a.decisions == [(0, None), (1, [8, 9]), (2, "skip"), (3, [0, 3]), (4, "skip")]
        assert a.shown == 5 and out.read_bytes() == b"".join(lines[:3])
        a.decide([5, 6])
        for _ in range(2):
            a.undo()
    assert out.read_bytes() == b"".join(lines[:3])
    assert Path(f"{out}.skipped").read_bytes() == skips.splitlines(True)[0]


def test_lines_that_another_run_wrote_meanwhile_are_not_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    late, early = AnswerLog(path), AnswerLog(path)
    early.append({"n": 1})
    with pytest.raises(UserError, match="in use by another run"):
        late.append({"n": 2})
    early.close()
    with pytest.raises(UserError, match="changed by another run"):
        late.open()
    assert lines_of(path) == [{"n": 1}]
    early.append({"n": 3})  # its own lines it knows
    assert lines_of(path) == [{"n": 1}, {"n": 3}]


def test_marking_alone_needs_no_torch():
    code = "import annotate, sys; assert not {'torch', 'sentencepiece'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_full_disk_saves_nothing_and_says_so(data, tmp_path):
    limit = ("import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
             "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); del sys.argv[0]; "
             "runpy.run_path(sys.argv[0], run_name='__main__')")
    out = tmp_path / "out.jsonl"
    with App(data, out, python=("-c", limit)) as app:
        assert app.decide(None)[0] == 200
        before = out.read_bytes()
        status, said = app.decide(None)
        assert status == 500 and said.startswith("nothing was saved")
        assert out.read_bytes() == before and app.post("/state", name=None)[1]["decided"] == 1


OTHER_HANDS = {
    "removed": (lambda p: p.unlink(), "was removed or renamed"),
    "renamed": (lambda p: p.rename(f"{p}.old"), "was removed or renamed"),
    "replaced": (lambda p: (p.rename(f"{p}.old"), shutil.copy(f"{p}.old", p)), "was replaced"),
    "grown": (lambda p: p.open("a").write('{"foreign": 1}\n'), "was changed by another"),
    "shrunk": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "was changed by another"),
    "emptied": (lambda p: p.write_bytes(b""), "was changed by another"),
}


@pytest.mark.parametrize("which", ["out.jsonl", "out.jsonl.skipped"])
@pytest.mark.parametrize("how", OTHER_HANDS)
def test_a_file_that_another_hand_changed_is_left_alone(server, tmp_path, how, which):
    """No decision is taken and none undone; put back, the file is written to again."""
    path, (change, what) = tmp_path / which, OTHER_HANDS[how]
    whole, state = path.read_bytes(), server.annotation.state()
    ask = lambda path, **more: say(server, raw(server, path=path, body=json.dumps(
        {"name": server.annotation.name, **more}).encode())).decode()
    change(path)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for said in (ask(b"/decide", choice=None), ask(b"/decide", choice="skip"), ask(b"/undo")):
        assert "500" in said[:15] and f"nothing was saved: {path} {what}" in said, said
    assert server.annotation.state() == state
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files
    if how in ("renamed", "grown"):
        if how == "renamed":
            Path(f"{path}.old").rename(path)
        else:
            os.truncate(path, len(whole))
        assert "200" in ask(b"/decide", choice="skip")[:15] and "200" in ask(b"/undo")[:15]
        assert path.read_bytes() == whole


def test_a_removed_directory_is_said(data, tmp_path):
    """Also under a name with a terminal escape."""
    folder = tmp_path / "a\x1b"
    folder.mkdir()
    with App(data, folder / "out.jsonl") as app:
        assert "a\\x1b" in app.first and "\x1b" not in app.first
        assert app.decide(None)[0] == 200
        shutil.rmtree(folder)
        status, said = app.decide(None)
        assert status == 500 and "a\\x1b/out.jsonl was removed" in said


def test_ctrl_c_stops_with_the_count(data, tmp_path):
    with App(data, tmp_path / "out.jsonl") as app:
        app.decide(None)
        app.process.send_signal(signal.SIGINT)
        rest, err = app.process.communicate(timeout=30)
        assert (app.process.returncode, err) == (130, "") and "1 of 6 answers decided" in rest


# ---------------------------------------------------------------- bad input

def refused(*args):
    p = subprocess.run([sys.executable, "annotate.py", "--port", "0", *map(str, args)], cwd=ROOT,
                       capture_output=True, text=True, timeout=120)
    assert (p.returncode, p.stdout) == (2, ""), (p.returncode, p.stdout, p.stderr)
    assert p.stderr.startswith("error: ") and p.stderr.count("\n") == 1, p.stderr
    return p.stderr


@pytest.mark.parametrize("line, message", [
    (b"{", "not JSON"), (b"[1]", "not a JSON object"), (b'{"prompt": "p"}', "'answer'"),
    (b'{"answer": "a"}', "'prompt'"), (b'{"prompt": "p", "answer": ""}', "'answer'"),
    (b'{"prompt": "p", "answer": ["a"]}', "'answer'"), (b"\xff", "not UTF-8 text"),
])
def test_a_bad_line_is_named(tmp_path, line, message):
    data = tmp_path / "d.jsonl"
    data.write_bytes(b'{"prompt": "p", "answer": "a"}\r\n\n' + line + b"\n")
    with pytest.raises(UserError, match=f"d.jsonl, line 3: {message}"):
        Annotation(data, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()


def test_bad_arguments_are_told_in_a_line(data, tmp_path):
    out, empty, other = tmp_path / "o.jsonl", tmp_path / "empty.jsonl", tmp_path / "other.jsonl"
    empty.write_text("\n")
    write(other, [{"prompt": "Prompt 0 <b>&", "answer": ANSWERS[0], "error": None},
                  {"prompt": "q", "answer": "not among them", "error": None}])
    assert "holds no answers" in refused("--data", empty, "--out", out)
    assert "cannot read" in refused("--data", tmp_path / "none.jsonl", "--out", out)
    assert "is not a directory" in refused("--data", data, "--out", tmp_path / "no" / "o.jsonl")
    assert "it is a directory" in refused("--data", data, "--out", tmp_path)
    assert "is also --data" in refused("--data", data, "--out", data)
    assert f"{other}, line 2 is not a decision on an answer of {data}" in refused(
        "--data", data, "--out", other)
    for line in ('{"skipped": ["x"], "after": 0}', '{"skipped": "x.1", "after": 0}'):
        Path(f"{out}.skipped").write_text(line + "\n")
        with pytest.raises(UserError, match="o.jsonl.skipped, line 1 is not a decision"):
            Annotation(data, out)
    Path(f"{out}.skipped").unlink()
    assert "it is not a plain file" in refused("--data", data, "--out", "/dev/null")
    for more in (["--target", DEMO / "target"], ["--judge", DEMO / "judge.safetensors"]):
        assert "--target and --judge go together" in refused("--data", data, "--out", out, *more)
    doubt = ["--target", tmp_path / "none", "--judge", DEMO / "judge.safetensors"]
    assert "does not exist" in refused("--data", data, "--out", out, *doubt)
    assert "--port" in refused("--data", data, "--out", out, "--port", "70000")
    with App(data, out) as app:
        assert "o.jsonl is in use by another run" in refused("--data", data, "--out", out)
        assert "choose another" in refused("--data", data, "--out", tmp_path / "p.jsonl", "--port",
                                           app.port)
