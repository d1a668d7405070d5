"""tools/judge.py with a bad server: nothing is lost, nothing asked twice; its replies are read."""
import collections
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval_voicebench as ev
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import judge as tool

KEY = "sk-tests-only-0123456789abcdef"
OPEN = [{"prompt": f"Why is {i} {{odd}}?", "response": f"As {i} {{}} is."} for i in range(8)]
QA = [{"prompt": f"Who won {i}?", "response": f"{i}.", "reference": f"Nr {i}"} for i in range(4)]
BREAKDOWNS = [(500, {}, b"oops"), (503, {}, b"<html>"), "hang", "close", (502, {}, b"\xff\xfe"),
              (429, {"Retry-After": "0.001"}, b""), (200, {}, b'{"choices": []}'), (408, {}, b""),
              (200, {}, b"[1, 2]"), (200, {}, b'{"choices"'), (200, {}, b'{"error": "no"}'),
              (200, {"Content-Length": "999"}, b'{"choices": [{"')]


def replying(reply):
    return 200, {}, json.dumps({"choices": [{"message": {"content": reply}}]}).encode()


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
    monkeypatch.setattr(tool, "BACKOFF_S", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.lock, server.released = [], threading.Lock(), threading.Event()
    server.url, server.cache = f"http://127.0.0.1:{server.server_port}/v1", tmp_path / ".stages/judge.0.jsonl"
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setattr(tool, "TIMEOUT_S", 9)

    def judge(rows, **options):
        usual = dict(url=server.url, model="a judge", samples=1, max_tokens=1024, out=tmp_path)
        rows = [dict(row) for row in rows]
        tool.add_scores(SimpleNamespace(**{**usual, **options}), rows)
        return [row["score"] for row in rows]

    server.judge = judge
    server.handle_error = lambda *_: None  # who asked may be gone
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file())


def test_rows_get_their_replies_whatever_goes_wrong_and_a_restart_asks_nothing(server, monkeypatch, capsys):
    failures = dict(zip((row["prompt"] for row in OPEN + QA), BREAKDOWNS, strict=True))
    tries = collections.Counter()

    def behave(_, body):
        row = row_of(body)
        tries[row["prompt"]] += 1
        if tries[row["prompt"]] <= 2:
            return failures[row["prompt"]]
        return replying(f"{row['response']} {KEY}")  # a server that repeats the key

    server.behave = behave
    monkeypatch.setattr(tool, "TIMEOUT_S", 0.5)
    replies = server.judge(OPEN + QA)
    assert replies == [[row["response"] + " ***"] for row in OPEN + QA]
    for body, path, authorization in server.seen:
        text, row = body["messages"][0]["content"], row_of(body)
        assert row["response"] in text and row.get("reference", "") in text
        assert ("yes or no" in text) == ("reference" in row)
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("a judge", 0.5, 1024)
        assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    cache = server.cache.read_bytes()
    assert server.judge((OPEN + QA)[::-1]) == replies[::-1] and len(server.seen) == 3 * 12
    assert server.cache.read_bytes() == cache and KEY not in "".join(capsys.readouterr())


def test_equal_rows_are_asked_once_and_only_for_what_is_missing(server):
    server.behave = lambda k, body: replying(str(k))
    first = server.judge(OPEN[:1] * 3 + OPEN[1:2], samples=2)
    assert first[0] == first[1] == first[2] and len(server.seen) == 4
    assert server.judge(OPEN[:1], samples=3)[0][:2] == first[0] and server.judge(OPEN[:1]) == [first[0][:1]]
    for change in ({"model": "b"}, {"rows": [{**OPEN[0], "response": "No"}]}):
        server.judge(**{"rows": OPEN[:1], **change})
    assert len(server.seen) == 4 + 1 + 2
    server.judge([{**OPEN[0], "response": "<think>so</think>" + OPEN[0]["response"]}])  # it reads no thoughts
    assert len(server.seen) == 4 + 1 + 2


def test_nonsense_is_kept_and_counted(server):
    server.behave = lambda k, body: replying(["4", "I like turtles"][k % 2])
    replies = server.judge(OPEN[:1], samples=2)[0]
    assert sorted(replies) == ["4", "I like turtles"] == sorted(server.judge(OPEN[:1], samples=2)[0])
    replies = {"4 ? turtles": (0.8, 1), "5 4 1": (2.0, 3), "?": (0, 0)}
    for text, mark in replies.items():
        marks, readable = ev.grade("commoneval", {"response": "So."}, text.split())
        assert marks == [pytest.approx(mark)] and readable == mark[1] / len(text.split())
    votes = {"yes yes no": (1, True), "no No. ?": (0, True), "yes no ?": (0.5, True), "?": (0, False)}
    for text, mark in votes.items():
        assert ev.grade("sd-qa", {"response": "So.", "reference": "x"}, text.split())[0] == [(False, 1), mark]


@pytest.mark.parametrize("blank", [None, "", "<think>hm", []])
def test_blank_replies_are_asked_again_and_kept_nowhere(server, blank):
    server.behave = lambda k, body: replying(blank if k < 2 else "3")
    assert server.judge(OPEN[:1]) == [["3"]] and len(server.seen) == 3
    server.behave = lambda k, body: replying(blank)
    with pytest.raises(RuntimeError, match="blank.*--max-tokens"):
        server.judge(OPEN[1:2])
    assert len(server.cache.read_bytes().splitlines()) == 1
    server.behave = lambda k, body: replying("2")
    assert server.judge(OPEN[:2], max_tokens=9000) == [["3"], ["2"]]


def test_a_list_of_text_parts_is_read(server):
    parts = [{"type": "thinking", "thinking": [{"text": "5?"}]}, {"type": "text", "text": "4"}, {"type": "other"}, "/5"]
    server.behave = lambda k, body: replying(parts)
    assert server.judge(OPEN[:1]) == [["4/5"]]


@pytest.mark.parametrize("status", [400, 422])
def test_a_judge_that_knows_no_max_tokens_or_temperature_is_asked_without(server, status, capsys):
    def behave(k, body):
        for field in ("max_tokens", "temperature"):
            if field in body:
                return status, {}, f'{{"error": "Unsupported: \'{field}\'"}}'.encode()
        return replying("4")

    server.behave = behave
    assert server.judge(OPEN) == [["4"]] * 8
    assert server.judge(OPEN) == [["4"]] * 8 and sum("max_tokens" not in body for body, *_ in server.seen) < 8 + 8
    said = capsys.readouterr().err
    assert said.count("refuses max_tokens and is asked without") == said.count("refuses temperature") == 1


def test_it_waits_as_long_as_the_server_says_else_longer_each_time(server, monkeypatch):
    waits = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            return super().wait() if timeout is None else bool(waits.append(timeout))

    replies = [(429, {"Retry-After": "70"}, b""), *[(429, {"Retry-After": "Friday"}, b"")] * 4]
    server.behave = lambda k, body: (replies + [replying("4")])[k]
    monkeypatch.setattr(tool, "BACKOFF_S", 1)
    monkeypatch.setattr(tool.threading, "Event", Event)
    assert server.judge(OPEN[:1]) == [["4"]] and waits[:2] == [0, 70] and len(waits) == 6
    assert all(2**i / 2 <= wait <= 2**i for i, wait in enumerate(waits[2:], 2))


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_stops_at_once_in_one_line_without_the_key(server, status, monkeypatch):
    monkeypatch.setattr(tool, "WORKERS", 1)
    server.behave = lambda k, body: (status, {}, f"bad\nrequest: {KEY} {KEY[:12]}".encode())
    with pytest.raises(RuntimeError, match=f"HTTP {status}.* 0 of 8 .*JUDGE_API_KEY") as caught:
        server.judge(OPEN)
    assert status == 400 or len(server.seen) == 1  # 400 might be the first row's alone
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert status not in (401, 403) or KEY[:12] not in str(caught.value)


@pytest.mark.parametrize("refusal", [(400, {}, b"too long"), (200, {}, json.dumps({"choices": [
    {"finish_reason": "content_filter", "message": {"content": None}}]}).encode())], ids=["too long", "filter"])
def test_a_row_that_it_refuses_though_it_answers_others_is_unreadable(server, refusal, capsys):
    server.behave = lambda k, body: refusal if row_of(body) in OPEN[:2] else replying("3")
    assert server.judge(OPEN) == [[tool.REFUSED]] * 2 + [["3"]] * 6
    assert ev.read_score(tool.REFUSED) is ev.read_vote(tool.REFUSED) is None and "refused" in capsys.readouterr().err
    count = len(server.seen)
    assert server.judge(OPEN)[0] == [tool.REFUSED] and len(server.seen) == count


def test_a_reply_that_was_cut_is_no_score(server):
    """A thinking judge whose thoughts no tag opens."""
    cut = json.dumps({"choices": [{"finish_reason": "length", "message": {"content": "At first glance that would be a 4, but"}}]}).encode()
    server.behave = lambda k, body: (200, {}, cut) if k == 0 else replying("2")
    assert server.judge(OPEN[:1]) == [["2"]]


def test_after_its_attempts_it_stops_and_the_same_call_goes_on(server, monkeypatch):
    monkeypatch.setattr(tool, "WORKERS", 1)
    server.behave = lambda k, body: replying("2") if k < 3 else "close"
    with pytest.raises(RuntimeError, match="3 of 8 rows are judged, the same command goes on"):
        server.judge(OPEN)
    assert len(server.seen) == 3 + tool.ATTEMPTS
    server.behave = lambda k, body: replying("5")
    assert server.judge(OPEN) == [["2"]] * 3 + [["5"]] * 5


def test_a_redirect_is_not_followed_with_the_key(server):
    server.behave = lambda k, body: (302, {"Location": server.url + "/else"}, b"")
    with pytest.raises(RuntimeError, match="HTTP 302"):
        server.judge(OPEN[:1])
    assert len(server.seen) == 1


def test_killed_in_the_middle_it_asks_for_no_reply_that_it_has(server):
    server.behave = lambda k, body: replying("3") if k < 5 else "hang"
    code = ("import json, sys, types; sys.path.insert(0, 'tools'); import judge; "
            "judge.add_scores(types.SimpleNamespace(**json.loads(sys.argv[1])), json.loads(sys.argv[2]))")
    options = {"url": server.url, "model": "a judge", "samples": 1, "max_tokens": 1024,
               "out": str(server.cache.parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(options), json.dumps(OPEN)],
                               cwd=Path(ev.__file__).parent, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (server.cache.exists() and server.cache.read_bytes().count(b"\n") == 5):
        server.released.wait(0.01)
    process.kill()
    process.wait()
    lines, asked = server.cache.read_bytes().splitlines(keepends=True), len(server.seen)
    server.cache.write_bytes(b"".join(lines[:4]) + lines[4][:30])  # killed while writing
    server.behave = lambda k, body: replying("3")
    assert server.judge(OPEN) == [["3"]] * 8 and len(server.seen) - asked == 8 - 4
    after = server.cache.read_bytes().splitlines(keepends=True)
    assert after[:4] == lines[:4] and len({json.loads(line)["id"] for line in after}) == 8


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, server, *files, **more):
    options = {"--url": server.url, "--model": "a judge", "--samples": 2, "--out": tmp_path / "judged", **more}
    argv = [*files, *(word for pair in options.items() for word in pair)]
    return tool.main(tool.get_args([str(word) for word in argv]))


def test_files_are_judged_where_they_need_it_and_scored_from_there(server, tmp_path, capsys):
    server.behave = lambda k, body: replying("yes" if "quiz" in body["messages"][0]["content"] else "5")
    files = [write(tmp_path / "teacher-t-commoneval-text.jsonl", [OPEN[0], {**OPEN[1], "score": ["1"]}]),
             write(tmp_path / "teacher-t-sd-qa-text.jsonl", QA[:1]),
             write(tmp_path / "teacher-t-advbench-text.jsonl", OPEN[:2])]
    run(tmp_path, server, *files)
    assert len(server.seen) == 4 and "2 answers are judged" in capsys.readouterr().out
    judged = sorted((tmp_path / "judged").glob("*.jsonl"))
    assert [path.name for path in judged] == ["teacher-t-advbench-text.jsonl", *(f.name for f in files[:2])]
    assert json.loads(judged[1].read_text().splitlines()[0]) == {**OPEN[0], "score": ["5", "5"], "judge": "a judge"}
    ev.main(ev.get_args(["--score-only", *map(str, judged), "--out", str(tmp_path / "out")]))
    subsets = json.loads((tmp_path / "out/report.json").read_text())["subsets"]
    assert subsets["commoneval"]["teacher text"][0] == pytest.approx(11 / 3)  # of three replies: 5, 5, 1
    assert subsets["sd-qa"]["teacher text"][0] == 50 and subsets["sd-qa"]["note"] == "judged by a judge"
    run(tmp_path, server, *files)
    assert len(server.seen) == 4


@pytest.mark.parametrize("key", [f"{KEY}\nX: 1", f"é{KEY}"])
def test_a_key_that_cannot_work_is_refused_before_anything_is_asked(server, monkeypatch, tmp_path, key):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    with pytest.raises(ValueError, match="JUDGE_API_KEY") as caught:
        run(tmp_path, server, write(tmp_path / "a-commoneval-text.jsonl", OPEN))
    assert KEY not in str(caught.value) and not server.seen


def test_bad_files_and_options_are_refused(server, tmp_path, capsys):
    file = write(tmp_path / "a-commoneval-text.jsonl", OPEN)
    with pytest.raises(ValueError, match="is the folder of .*; choose another"):
        run(tmp_path, server, file, **{"--out": tmp_path})
    with pytest.raises(ValueError, match="expected a file named MODEL-SUBSET-MODALITY"):
        run(tmp_path, server, tmp_path / "b.jsonl")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="a second file of this name; judge it into another --out"):
        run(tmp_path, server, file, write(other / "a-commoneval-text.jsonl", OPEN))
    for url in ("localhost", "http://me:pw@x/v1"):
        with pytest.raises(SystemExit):
            run(tmp_path, server, file, **{"--url": url})
        assert "expected a URL like http://HOST/v1, without a password" in capsys.readouterr().err
    assert not server.seen


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
