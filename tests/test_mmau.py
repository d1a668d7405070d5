"""eval_mmau.py: the official rule, letters, tables; a stopped run gives the same files."""
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import soundfile
from conftest import ROOT, sound

import eval_mmau as mmau
import eval_voicebench as vb

sys.path.insert(0, str(ROOT / "tools"))
import from_hub

FOUR, KEYS = ["A tram", "A bus", "Tram bell", "Ferry"], ["D", "F#m", "A", "Gm"]
MOODS, TWO = ["calm, then sad", "sad, then calm", "calm", "calm"], ["Yes", "No"]
EIGHT = ["one", "two", "three", "four", "five", "six", "seven", "eight of them"]


def item(number, choices, answer, **more):
    return {"id": f"clip-{number}", "audio_id": f"./test-mini-audios/clip-{number}.wav",
            "question": f"What is heard in part {number}?", "choices": choices, "answer": answer,
            "task": ("sound", "music", "speech")[number % 3], "category": "Reasoning",
            "difficulty": ("easy", "hard", "medium")[number % 3], **more}


ITEMS = [item(0, FOUR, "Ferry"), item(1, KEYS, "A"), item(2, MOODS, "calm", category=["Reasoning"]),
         item(3, TWO, "No", category=["Reasoning", "Hearing"]), item(4, EIGHT, "three")]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(vb, "DRAWS", 50)
    (tmp_path / "clips").mkdir()
    for i, kind in enumerate(("wav", "flac", "ogg", "wav", "wav")):
        soundfile.write(tmp_path / f"clips/clip-{i}.{kind}", sound(0.4 + 0.2 * i).numpy(), 16_000)
    return write(tmp_path / "mini.json", ITEMS)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def run(*arguments):
    return mmau.main(mmau.get_args([str(a) for a in (*arguments, "--device", "cpu")]))


def ask(tiny, data, out, *more):
    return run("--student", tiny.student_folder, "--data", data, "--out", out, "--batch-size", 2,
               "--max-new-tokens", 6, "--dtype", "float32", *more)


@pytest.mark.parametrize("choices, answer, hits, misses", [
    (FOUR, "A bus", ["a BUS!", "It is a bus"], ["bus", "a bus or tram", "B", "", "...", "buses a"]),
    (FOUR, "Ferry", ["(B) Ferry", "ferry ferry"], ["(A) Ferry", "Tram bell, Ferry"]),
    (MOODS, "calm, then sad", ["then, sad: calm", "sad, then calm"], ["calm", "calm then"]),
    (MOODS, "calm", ["calm", "Calm mood"], ["calm then", "sad"]), (TWO, "No", ["no!"], ["yes, no"]),
    (KEYS, "F#m", ["F#m", "f m"], ["F", "F#m A"]), (["É", "don't"], "don't", ["don t"], ["dont"])])
def test_the_official_rule_compares_sets_of_words(choices, answer, hits, misses):
    for said in hits + misses:
        assert mmau.string_match(said, answer, choices) is (said in hits), said


@pytest.mark.parametrize("option, choices, predictions", [
    ("A bus", FOUR, ["B", "b", " (B)", "B.", "b)", "**B**", "[B]", "B: a thing", "B\nIt hoots.",
                     "B, because", "The answer is B", "The answer is (B) A bus.", "Answer: B",
                     "the answer is: **B. A bus**", "Option B", "The answer is A bus.", "B) bus",
                     "The answer is B. Option A is wrong.", "A bus. No tram.", "I choose (b)."]),
    ("Ferry", FOUR, ["(A) Ferry", "The answer is the ferry.", "D", "Ferry, since it is no tram"]),
    ("D", KEYS, ["D", "(D)", "A. D", "The answer is D"]), ("F#m", KEYS, ["B", "(B) F#m"]),
    ("A", KEYS, ["A", "C", "The answer is a"]), ("Gm", KEYS, ["(D) Gm", "The answer is Gm, as A"]),
    ("calm", MOODS, ["C", "D", "The answer is calm.", "(B) calm"]), ("No", TWO, ["B", "no", "(B)"]),
    ("eight of them", EIGHT, ["H", "(H) eight", "eight of them", "The answer is H"]),
    ("A bus", FOUR, ["\\boxed{B}", "\\boxed{\\text{B}}", "So \\(x\\), hence $\\boxed{B}$.", "The answer is $\\boxed{B}$.", "\\text{B}",
                     "$B$", "\\boxed{\\mathbf{(B)}}", "\\boxed{A bus}", "\\boxed{\\text{B. A bus}}", "答案是B", "答案：B", "答案是：\n\nB", "答案是Ｂ。",
                     "选B", "我选择B。", "正确选项是B", "答案应该是（Ｂ）", "答案是B选项", "答案是B，因为有声音", "不选A，选B", "【B】", "Ｂ", "（Ｂ）",
                     "**Ｂ**", "Ａｎｓｗｅｒ： Ｂ", "The answer is Ｂ．"]),
    ("F#m", KEYS, ["\\boxed{B}", "答案是B", "Ｂ"]), ("D", KEYS, ["\\boxed{D}", "Ｄ"]),
    (None, FOUR, ["答案不是B", "不选B", "\\boxed{E}", "答案是A。答案是B。", "选项B是错的"]),
    ("A bus", FOUR, ["<think>tram?</think>B", "A tram, no </think> B", "<answer>B</answer>", "<think>D</think>\n(B) A bus"]),
    (None, FOUR, ["<think>The answer is B", "", "A tram and a bus", "E", "(Z)", "A or B", "A tramway", "The answer is a boat",
                  "A. A tram\nB. A bus\nC. Tram bell", "The answer is not B", "At B flat",
                  "The answer is A. The answer is B."]), (None, TWO, ["C", "The answer is C"])])
def test_letters_and_statements_are_read_and_no_match_is_lost(option, choices, predictions):
    rows = [item(0, choices, choices[0]) | {"id": str(i), "model_output": said} for i, said in enumerate(predictions)]
    assert {row["option"] for row in mmau.score(rows)["items"]} == {option}
    for choice in choices:
        for said in (choice, f"(C) {choice}", f"No option, {choice}", f"{choice}: choice B"):
            assert mmau.string_match(said, choice, choices) <= mmau.string_match(
                mmau.read_option(said, choices), choice, choices), said


def test_a_run_that_was_stopped_gives_the_same_files(tiny, data, tmp_path, capsys):
    out, names = tmp_path / "out", ("predictions.json", "report.json", "report.md")
    assert ask(tiny, data, out) == 0
    files = {name: (out / name).read_bytes() for name in names}
    assert capsys.readouterr().out == files["report.md"].decode()
    rows = json.loads((out / "predictions.json").read_text())
    assert [row.pop("model_output").__class__ for row in rows] == [str] * 5 and rows == ITEMS
    (stage,) = (out / ".stages").glob("mmau-*.0.jsonl")
    os.truncate(stage, stage.stat().st_size - 9)
    (out / "predictions.json").unlink()
    assert ask(tiny, data, out) == 0
    assert files == {name: (out / name).read_bytes() for name in names}
    assert run("--score-only", out / "predictions.json", "--out", tmp_path) == 0
    assert (tmp_path / "report.md").read_bytes() == files["report.md"]


def test_raw_and_read_scores_by_group(data, tmp_path):
    def scored(outputs, items=ITEMS):
        rows = [i | ({"model_output": o} if o else {}) for i, o in zip(items, outputs)]
        assert run("--score-only", write(tmp_path / "x", rows), "--out", tmp_path) == 0
        return json.loads((tmp_path / "report.json").read_text())
    report = scored(["(A) Ferry", "A", "D", None, "C"])
    tables = {name: (row["n"], row["raw"][0], row["read"][0]) for name, row in report["tables"].items()}
    expected = {"total: all": (5, 0.2, 0.8), "total: always first option": (5, 0, 0), "task: sound": (2, 0, 0.5),
                "total: random option": (5, 0.325, 0.325),  # two of MOODS are right
                "category: Reasoning": (5, 0.2, 0.8), "category: Hearing": (1, 0, 0)}
    assert expected.items() <= tables.items() and "sub-category: not given" in tables
    ordered = [name for name in tables if "diff" in name]
    assert ordered == ["difficulty: easy", "difficulty: medium", "difficulty: hard"]
    assert [row["option"] for row in report["items"]] == ["Ferry", "A", "calm", None, "three"]
    assert report["missing"] == 1 and report["not_among_choices"] == 0
    assert scored(["a horn"], items=[item(0, FOUR, "A tram horn")])["not_among_choices"] == 1
    with pytest.raises(ValueError, match="model_output"):
        scored([None] * 5)


def test_what_only_reading_finds_leaves_the_official_column_as_it_is():
    for said in ("\\boxed{B}", "答案是B", "Ｂ", "（Ｂ）", "<answer>B</answer>"):
        (row,) = mmau.score([item(0, FOUR, "A bus", model_output=said)])["items"]
        assert (row["raw"], row["read"]) == (False, True), said


def test_a_limit_takes_evenly_spaced_items(data, tmp_path):
    rows = [i | {"model_output": "A"} for i in ITEMS]
    assert run("--score-only", write(tmp_path / "x", rows), "--out", tmp_path, "--limit", 2) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["id"] for row in report["items"]] == ["clip-0", "clip-2"]


def test_clips_that_are_missing_or_empty_are_named_or_left_out(tiny, data, tmp_path, capsys):
    (tmp_path / "clips/clip-2.ogg").unlink()
    with pytest.raises(ValueError, match=r"1 of 5 clips .*clip-2\.wav.*--only-available"):
        ask(tiny, data, tmp_path / "out")
    assert ask(tiny, data, tmp_path / "out", "--only-available", "--audio", tmp_path) == 0
    assert "4 items are asked" in capsys.readouterr().err
    soundfile.write(tmp_path / "clips/clip-0.wav", sound(0.01).numpy(), 16_000)
    command = [sys.executable, ROOT / "eval_mmau.py", "--data", data, "--limit", "1"]
    done = subprocess.run([*command, "--out", tmp_path / "new"], capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"eval_mmau\.py: .* 20 ms .*\n", done.stderr)


def test_clips_of_one_name_are_told_apart_by_their_folders(tiny, data, tmp_path):
    heard = []
    for folder, seconds in (("sound", 0.5), ("music", 0.9)):
        (tmp_path / "two" / folder).mkdir(parents=True)
        soundfile.write(tmp_path / "two" / folder / "1.wav", sound(seconds).numpy(), 16_000)
    names = ["./sound/1.wav", "music/1.wav"]
    items = [item(i, FOUR, "Ferry", audio_id=name) for i, name in enumerate(names)]
    by_id = [{**row, "audio_id": None, "id": name} for row, name in zip(items, ("sound/1", "music/1"))]
    args = SimpleNamespace(prompt_suffix="", only_available=False)
    assert [row["seconds"] for row in mmau.find_clips(by_id, tmp_path / "two", args)[1]] == pytest.approx([0.5, 0.9])
    heard = [row["seconds"] for row in mmau.find_clips(items, tmp_path / "two", args)[1]]
    assert heard == pytest.approx([0.5, 0.9])
    for wrong in (item(2, FOUR, "Ferry", audio_id="1.wav"), item(2, FOUR, "Ferry", audio_id="speech/1.wav")):
        with pytest.raises(ValueError, match=r"1 of 1 clips .*2 files may be it"):
            mmau.find_clips([wrong], tmp_path / "two", args)
        with pytest.raises(ValueError, match="1 of 3 clips"):
            mmau.find_clips([*items, wrong], tmp_path / "two", args)


def test_a_clip_with_other_bytes_is_asked_again(tiny, data, tmp_path, monkeypatch):
    answers = iter("ABC")
    monkeypatch.setattr(vb, "load_model", lambda *_: SimpleNamespace(
        generate=lambda rows, count: [next(answers)] * len(rows)))
    more = ["--limit", 1]
    said = []
    for seed in (0, 0, 1):
        soundfile.write(tmp_path / "clips/clip-0.wav", sound(0.4, seed).numpy(), 16_000)  # of one length
        assert ask(tiny, data, tmp_path / "out", *more) == 0
        said.append(json.loads((tmp_path / "out/predictions.json").read_text())[0]["model_output"])
    assert said == ["A", "A", "B"]


def test_the_split_without_answers_is_asked_alike(tiny, data, tmp_path, monkeypatch, capsys):
    write(data, [{**i, "answer": ""} for i in ITEMS])
    monkeypatch.setattr(vb, "load_model", lambda *_: SimpleNamespace(
        generate=lambda rows, count: [row["instruction"] for row in rows]))
    assert ask(tiny, data, tmp_path, "--limit", 1, "--prompt-suffix", " Speak.") == 0
    (row,) = json.loads((tmp_path / "predictions.json").read_text())
    assert row["model_output"] == (
        "What is heard in part 0?  Select one option from the provided choices.\n"
        "['A tram', 'A bus', 'Tram bell', 'Ferry']. Speak.")
    assert "submission file is" in capsys.readouterr().out


def test_the_hub_gives_what_the_file_gives(data, tmp_path, monkeypatch):
    def hub_row(i):
        lettered = {c: f"({'ABCDEFGH'[k]}) {c}" for k, c in enumerate(i["choices"])}
        others = {k: i[k] for k in ("id", "task", "category", "difficulty")}
        choices = [lettered[c] for c in i["choices"]]
        return {"context": {"bytes": i["id"].encode()}, "instruction": i["question"],
                "other_attributes": json.dumps(others), "choices": choices,
                "answer": lettered[i["answer"]]}
    loads, rows = [], {("context", "not decoded"): list(map(hub_row, ITEMS))}
    table = SimpleNamespace(cast_column=lambda name, kind: rows[name, kind])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
        Audio=lambda decode: "decoded" if decode else "not decoded",
        load_dataset=lambda *names, **options: loads.append((names, options)) or table))
    from_hub.main(from_hub.get_args(["some/MMAU@r1", "--out", str(tmp_path / "hub")]))
    assert loads == [(("some/MMAU", None), {"split": "test", "revision": "r1"})]
    assert mmau.read_items(tmp_path / "hub/mmau.json") == mmau.read_items(data)
    assert (tmp_path / "hub/clip-2.wav").read_bytes() == b"clip-2"


@pytest.mark.parametrize("content, message", [
    ("[{", "not JSON"), ({"id": 1}, "expected a list"), ([], "0 of 0 items"),
    (ITEMS + ITEMS[:1], r"more than one item has the id clip-0"), ([ITEMS[0] | {"choices": []}], r"choices \[\]"),
    ([ITEMS[0] | {"choices": ["one"]}], "2 to 26"), ([ITEMS[0] | {"question": ""}], ":1: id"),
    ([ITEMS[0] | {"choices": ["a", 2]}], ":1: id"), ([ITEMS[0] | {"answer": ""}, ITEMS[1]], "1 of")])
def test_bad_data_is_refused_before_any_model_is_loaded(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        run("--data", write(tmp_path / "bad.json", content), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
