"""The judge of eval_voicebench.py with a bad server: nothing is lost, nothing asked twice."""
import collections
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import eval_voicebench as ev

KEY = "sk-tests-only-0123456789abcdef"
OPEN = [{"prompt": f"Why is {i} {{odd}}?", "response": f"As {i} {{}} is."} for i in range(8)]
QA = [{"prompt": f"Who won {i}?", "response": f"{i}.", "reference": f"Nr {i}"} for i in range(4)]
BREAKDOWNS = [(500, {}, b"oops"), (503, {}, b"<html>"), "hang", "close", (502, {}, b"\xff\xfe"),
              (429, {"Retry-After": "0.001"}, b""), (200, {}, b'{"choices": []}'), (408, {}, b""),
              (200, {}, b"[1, 2]"), (200, {}, b'{"choices"'), (200, {}, b'{"error": "no"}'),
              (200, {"Content-Length": "999"}, b'{"choices": [{"')]


def replying(*replies):
    choices = [{"message": {"content": reply}} for reply in replies]
    return 200, {}, json.dumps({"choices": choices}).encode()


def row_of(body):
    return next(row for row in QA + OPEN if row["prompt"] in body["messages"][0]["content"])


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        with server.lock:
            k = len(server.seen)
            server.seen.append((body, self.path, self.headers["Authorization"]))
        answer = server.behave(k, body)
        if isinstance(answer, str):
            return answer == "hang" and server.released.wait()
        self.send_response(answer[0])
        for name, value in {"Content-Length": len(answer[2]), **answer[1]}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(answer[2])

    do_GET, log_message = do_POST, lambda *_: None


@pytest.fixture
def server(monkeypatch, tmp_path):
    """.behave(k, body) -> answer to request k: (status, headers, content), "hang" or "close"."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(ev, "JUDGE_BACKOFF_S", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.lock, server.released = [], threading.Lock(), threading.Event()
    server.url, server.cache = f"http://127.0.0.1:{server.server_port}/v1", tmp_path / "cache"
    usual = {"url": server.url, "model": "a judge", "key": KEY, "timeout_s": 9}
    server.judge = lambda rows, **options: ev.judge_all(rows, server.cache, **{**usual, **options})
    server.handle_error = lambda *_: None  # who asked may be gone
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*"))


def test_rows_get_their_replies_whatever_goes_wrong_and_a_restart_asks_nothing(server, capsys):
    failures = dict(zip((row["prompt"] for row in OPEN + QA), BREAKDOWNS, strict=True))
    tries = collections.Counter()

    def behave(_, body):
        row = row_of(body)
        tries[row["prompt"]] += 1
        if tries[row["prompt"]] <= 2:
            return failures[row["prompt"]]
        return replying(*[f"{row['response']} {KEY}"] * body["n"])  # a server that repeats the key

    server.behave = behave
    replies = server.judge(OPEN + QA, timeout_s=0.5)
    assert replies == [[row["response"] + " ***"] * 3 for row in OPEN + QA]
    for body, path, authorization in server.seen:
        text, row = body["messages"][0]["content"], row_of(body)
        assert row["response"] in text and row.get("reference", "") in text
        assert ("yes or no" in text) == ("reference" in row)
        assert (body["model"], body["temperature"], body["n"]) == ("a judge", 0.5, 3)
        assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    cache = server.cache.read_bytes()
    assert server.judge((OPEN + QA)[::-1]) == replies[::-1] and len(server.seen) == 3 * 12
    assert server.cache.read_bytes() == cache and KEY not in "".join(capsys.readouterr())


@pytest.mark.parametrize("refuses", [False, True])
def test_a_server_without_n_is_asked_again(server, refuses):
    no = 400, {}, b'{"error": "Only one completion choice is allowed"}'
    server.behave = lambda k, body: no if refuses and body["n"] > 1 else replying("3")
    for _ in range(2):
        assert server.judge(OPEN[:2], concurrency=1) == [["3"] * 3] * 2
        assert len(server.seen) == 6 + refuses


def test_equal_rows_are_asked_once_and_only_for_what_is_missing(server):
    server.behave = lambda k, body: replying("4", "4", "4")  # more than asked for, later
    assert server.judge(OPEN[:1] * 3 + OPEN[1:2], samples=2) == [["4", "4"]] * 4
    assert server.judge(OPEN[:1]) == [["4"] * 3] and server.judge(OPEN[:1], samples=1) == [["4"]]
    for change in ({"temperature": 0}, {"model": "b"}, {"rows": [{**OPEN[0], "response": "No"}]}):
        server.judge(**{"rows": OPEN[:1], "samples": 1, **change})
    assert [body["n"] for body, *_ in server.seen] == [2, 2, 1, 1, 1, 1]


def test_nonsense_is_kept_and_counted(server):
    server.behave = lambda k, body: replying("4", None, "I like turtles")
    replies = server.judge(OPEN[:1]) + server.judge(QA[:1])
    assert replies == [["4", "", "I like turtles"]] * 2 and len(server.seen) == 2
    assert ev.judged_score(replies[0]) == (4.0, 2) and ev.judged_score(["?"]) == (None, 1)
    votes = {"yes yes no": 1.0, "no No. ?": 0.0, "yes no ?": 0.5, "?": None, "": None}
    assert {text: ev.judged_vote(text.split()) for text in votes} == votes


def test_it_waits_as_long_as_the_server_says_else_longer_each_time(server, monkeypatch):
    waits = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            return super().wait() if timeout is None else waits.append(timeout)

    replies = [(429, {"Retry-After": "70"}, b""), *[(429, {"Retry-After": "Friday"}, b"")] * 4]
    server.behave = lambda k, body: (replies + [replying("4", "4", "4")])[k]
    monkeypatch.setattr(ev, "JUDGE_BACKOFF_S", 1)
    monkeypatch.setattr(ev.threading, "Event", Event)
    assert server.judge(OPEN[:1]) == [["4"] * 3] and waits[0] == 70 and len(waits) == 5
    assert all(2**i / 2 <= wait <= 2**i for i, wait in enumerate(waits[1:], 2))


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_stops_at_once_in_one_line_without_the_key(server, status):
    server.behave = lambda k, body: (status, {}, f"bad\nrequest: {KEY} {KEY[:12]}".encode())
    with pytest.raises(RuntimeError, match=f"HTTP {status}.* 0 of 8 .*JUDGE_API_KEY") as caught:
        server.judge(OPEN, concurrency=1)
    assert len(server.seen) == 1 and KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert status not in (401, 403) or KEY[:12] not in str(caught.value)


def test_after_its_attempts_it_stops_and_the_same_call_goes_on(server):
    server.behave = lambda k, body: replying("2", "2", "2") if k < 3 else "close"
    with pytest.raises(RuntimeError, match="3 of 8 rows are judged, the same command goes on"):
        server.judge(OPEN, concurrency=1, attempts=4)
    server.behave = lambda k, body: replying("5", "5", "5")
    assert server.judge(OPEN) == [["2"] * 3] * 3 + [["5"] * 3] * 5 and len(server.seen) == 12


def test_a_redirect_does_not_carry_the_key_away(server):
    server.behave = lambda k, body: (404 if k else 302, {"Location": server.url + "/else"}, b"")
    with pytest.raises(RuntimeError, match="HTTP 404"):
        server.judge(OPEN[:1])
    assert [authorization for *_, authorization in server.seen] == [f"Bearer {KEY}", None]


def test_killed_in_the_middle_it_asks_for_no_reply_that_it_has(server):
    server.behave = lambda k, body: replying("3", "3", "3") if k < 5 else "hang"
    code = "import json, sys, eval_voicebench as ev; ev.judge_all(**json.loads(sys.argv[1]))"
    options = {"rows": OPEN, "cache_path": str(server.cache), "url": server.url, "model": "a judge"}
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(options)],
                               cwd=Path(ev.__file__).parent, stderr=subprocess.DEVNULL)
    server.cache.touch()
    while process.poll() is None and server.cache.read_bytes().count(b"\n") < 5:
        server.released.wait(0.01)
    process.kill()
    process.wait()
    lines, asked = server.cache.read_bytes().splitlines(keepends=True), len(server.seen)
    server.cache.write_bytes(b"".join(lines[:4]) + lines[4][:30])  # killed while writing
    server.behave = lambda k, body: replying("3", "3", "3")
    assert server.judge(OPEN) == [["3"] * 3] * 8 and len(server.seen) - asked == 8 - 4
    after = server.cache.read_bytes().splitlines(keepends=True)
    assert after[:4] == lines[:4] and len({json.loads(line)["key"] for line in after}) == 8


@pytest.mark.parametrize("option", [{"key": f"{KEY}\nX: 1"}, {"key": f"é{KEY}"}, {"url": "a/v1"},
                                    {"url": f"http://me:{KEY}@host/v1"}])
def test_what_cannot_work_is_refused_before_anything_is_asked(server, option):
    with pytest.raises(ValueError, match="http://HOST/v1") as caught:
        server.judge(OPEN, **option)
    assert KEY not in str(caught.value) and not server.seen


@pytest.mark.parametrize("read, value, replies", [
    (ev.read_score, 4, "4|4.0| 4\n|Score: 4|[[4]]|**4**|4/5|**4**/5|4 / 5.0|4 out of 5|4. Yes, 4|"
     "I would give it a 4.|On a scale of 1 to 5: 4|Score (1-5): 4.|<think>2 or 3?</think>\n4"),
    (ev.read_score, 4.5, "4.5"), (ev.read_score, 1, "1|Score (1-5): 1"), (ev.read_score, 5, "5/5"),
    (ev.read_score, None, "|four|0|6|-4|10/10|8/10|4/4|3%|3 or 4|3-4|4,5|1-5|<think>4|4, as 2 are"),
    (ev.read_vote, True, "Yes|yes.|YES!|**Yes**|[[yes]]|Yes, it does.|Yes\nIt does.|Answer: yes|"
     "The answer is yes.|**Answer:** Yes|Yes - both agree|It names him.\nYes.|<think>0</think>yes"),
    (ev.read_vote, False, "No|no.|No, because yes is not enough|**No**|\"No\"|My answer: No."),
    (ev.read_vote, None, "|Yes and no|yes/no|Yes or no?|Nobody|No doubt about it|Maybe|Not me|"
     "There is no error.|Yes.\nNo.|Eyes|I know: yes or no|<think>Yes")])
def test_replies_are_read_or_not_but_never_guessed(read, value, replies):
    replies = replies.split("|")
    assert {text: read(text) for text in replies} == dict.fromkeys(replies, value)
