"""What goes beyond the paper: tools/rollouts.py, tools/beyond.sh, tools/languages.sh and its tools."""
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, manifest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import model as m
import pico_tts
import plot_languages
import rollouts


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(tool, *words):
    tool.main(tool.get_args([str(word) for word in words]))


def test_a_student_answers_by_speech_and_says_that_it_did(tiny, tmp_path):
    path = manifest(tmp_path, 9, reference="Paris.")
    words = (tiny.student_folder, "--data", path, "--max-new-tokens", 6, "--batch-size", 4)
    run(rollouts, *words)
    target = tmp_path / "train-rollouts.jsonl"
    first, rows = target.read_bytes(), rows_of(target)
    assert {r["source"] for r in rows} == {"student"} and all("reference" not in r and r["finish"] in ("stop", "length") for r in rows)
    assert [r["prompt"] for r in rows] == [r["prompt"] for r in rows_of(path)] and all(r["id"].endswith("-own") for r in rows)
    assert all(r["response"] for r in rows)
    for stage in (tmp_path / ".stages").iterdir():  # a run that was stopped after a batch of two
        lines = stage.read_text().splitlines(keepends=True)
        stage.write_text("".join(lines[:4]) + lines[4][:9])
    target.unlink()
    run(rollouts, *words)
    assert target.read_bytes() == first
    run(rollouts, *words, "--seed", 1)
    assert target.read_bytes() != first
    count = len(list((tmp_path / ".stages").iterdir()))
    write_rows(path, [{**row, "instruction": "In one word."} for row in rows_of(path)])
    run(rollouts, *words)  # what the student reads is another question
    assert len(list((tmp_path / ".stages").iterdir())) == count + 1


def test_the_likeliest_answer_is_the_one_that_generate_gives(tiny, tmp_path):
    path = manifest(tmp_path, 5)
    run(rollouts, tiny.student_folder, "--data", path, "--temperature", 0, "--max-new-tokens", 8)
    student = m.load_student(tiny.student_folder)
    asked = [{"audio": str(tmp_path / row["audio"])} for row in rows_of(path)]
    said = {row["id"]: row["response"] for row in rows_of(tmp_path / "train-rollouts.jsonl")}
    for row, text in zip(rows_of(path), student.generate(asked, max_new_tokens=8)):
        assert said.get(f"{row['id']}-own", "") == text


@pytest.mark.parametrize("change, message", [({"prompt": None}, "no id, prompt or audio"), ({"audio": None}, "no id, prompt or audio"),
                                             ({"prompt": 3}, "prompt is '3', expected text")])
def test_rollouts_refuse_rows_that_no_teacher_can_read(tiny, tmp_path, change, message):
    path = manifest(tmp_path, 2)
    write_rows(path, [{**rows_of(path)[0], **change}])
    with pytest.raises(ValueError, match=message):
        run(rollouts, tiny.student_folder, "--data", path)
    assert not (tmp_path / "train-rollouts.jsonl").exists()


# ---- tools/beyond.sh, tools/languages.sh ----

def writes_down(tmp_path):
    """-> environment in which `python` and `pip` only write down how they are called, in tmp_path/calls."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = -c ] && exit 1\necho "$@" >> "$CALLS"\nwhile [ $# -gt 1 ]; do [ "$1" = --out ] && out=$2; shift; done\n'
                                     'if [ -n "$out" ]; then mkdir -p "$out"; cd "$out"; touch args.json log.jsonl train.jsonl divergence.json report.json report.md summary.json; fi\n')
    (tmp_path / "pip").write_text('#!/bin/sh\necho pip "$@" >> "$CALLS"\n')
    for name in ("python", "pip"):
        (tmp_path / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "DATA": str(tmp_path / "data"),
            "STUDENTS": str(tmp_path / "students"), "OUT": "/a/name/that/others/use"}


@pytest.mark.parametrize("name, wanted, rollouts", [
    ("more", "sounds.jsonl --max-steps", False), ("kl", "--ce-weight 0 --max-steps", False), ("early", "--early-tokens 8 --max-steps", False),
    ("reverse", "--ce-weight 0 --loss reverse_kl --max-steps", False), ("own", "sounds.jsonl --max-steps", True), ("own-kl", "--ce-weight 0 --max-steps", True),
    ("own-reverse", "--ce-weight 0 --loss reverse_kl --max-steps", True), ("own-jsd", "--ce-weight 0 --loss jsd --max-steps", True),
    ("again", "--ce-weight 0 --loss reverse_kl --max-steps", True), ("again-old", "--ce-weight 0 --loss reverse_kl --max-steps", True)])
def test_each_run_differs_in_one_thing(tmp_path, name, wanted, rollouts):
    """The script with a `python` that writes down how it is called."""
    for engine in ("piper", "espeak"):
        (tmp_path / "data" / engine).mkdir(parents=True)
        (tmp_path / "data" / engine / "both-train.jsonl").touch()
    env = {**writes_down(tmp_path), "START": "start"}
    script = ["bash", str(ROOT / "tools/beyond.sh")]
    subprocess.run([*script, name], env=env, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    [trained] = [call for call in calls if call.startswith("train_kd.py")]
    assert wanted in trained and ("both-train-rollouts.jsonl" in trained) == rollouts == any("rollouts.py" in call for call in calls)
    first = f"{tmp_path}/students/own-reverse/last"
    assert trained.startswith(f"train_kd.py --student {first if name.startswith('again') else 'start'} ")
    assert not rollouts or f"tools/rollouts.py {first if name == 'again' else 'start'} " in "\n".join(calls)
    assert trained.endswith(f"--out {tmp_path}/students/{name}") and (tmp_path / "students/results" / name / "log.jsonl").exists()
    assert [call.split()[0] for call in calls[-3:]] == ["tools/measure_result.py", "tools/measure_result.py", "tools/plot_beyond.py"]
    (tmp_path / "students" / name / "last").mkdir()
    (tmp_path / "students" / name / "last/config.json").touch()
    subprocess.run([*script, name], env=env, check=True, capture_output=True)  # what is trained is not trained again
    assert (tmp_path / "calls").read_text().count("train_kd.py") == 1
    wrong = subprocess.run([*script, "own-kld"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("own-kld: no such run; expected more, kl, reverse")


def test_languages_differ_in_what_is_distilled_alone(tmp_path):
    done = subprocess.run(["bash", str(ROOT / "tools/languages.sh")], env=writes_down(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "pip install --quiet ttspico"
    base, *distilled = [call for call in calls if call.startswith("train_kd.py")]
    invented = f"{tmp_path}/data/invented"
    assert f"--data {tmp_path}/data/repeat/transcripts.jsonl {tmp_path}/data/repeat/sounds.jsonl --channels s2t" in base
    wanted = " ".join(f"{invented}/{language}/train.jsonl" for language in ("en", "de", "es", "fr"))
    alike = [call.replace("students/all", "students/english").replace(wanted, f"{invented}/en/train.jsonl") for call in distilled]
    alike = [call.replace("students/english-more", "students/english").replace(f"{invented}/more/", f"{invented}/en/") for call in alike]
    assert alike == 3 * distilled[:1]
    assert f"--data {wanted} --ce-weight 0" in distilled[2] and f"--data {invented}/more/train.jsonl --ce-weight 0" in distilled[1]
    assert f"--student {tmp_path}/students/base/last" in distilled[1]
    spoken = [call for call in calls if call.startswith("synth_speech.py")]
    assert len(spoken) == 10 and all(call.endswith("{text} {wav}") for call in spoken)
    assert (tmp_path / "data/de.jsonl").read_text().count('"de-') == 24  # the questions that people wrote
    assert (tmp_path / "students/results/english-more/divergence-fr.json").exists() and (tmp_path / "students/results/speech-invented-more.json").exists()


def test_the_questions_of_all_languages_are_the_same():
    rows = rows_of(ROOT / "tools/language_questions.jsonl")
    asked = {language: [row["id"][3:] for row in rows if row["language"] == language] for language in ("en", "de", "es", "fr")}
    assert all(numbers == asked["en"] for numbers in asked.values()) and len(set(asked["en"])) == 24
    assert len({row["prompt"] for row in rows}) == len(rows) == 96


def test_pico_says_what_it_is_given_in_a_language_of_its_own(tmp_path, monkeypatch, capsys):
    class Engine:
        def __init__(self, voice):
            self.voice = voice

        def speak(self, text):
            said.append((self.voice, text))
            return np.arange(100 * len(text), dtype=np.int16).tobytes()

    said, wav = [], tmp_path / "said.wav"
    monkeypatch.setitem(sys.modules, "ttspico", types.SimpleNamespace(TtsEngine=Engine))
    run(pico_tts, "de", "Wie sp\u00e4t ist es?", wav)
    samples = m.load_audio(wav)
    assert said == [("de-DE", "Wie sp\u00e4t ist es?")] and samples.shape == (1600,) and float(samples[999]) == 999 / 32768
    with pytest.raises(ValueError, match="nothing to say"):
        run(pico_tts, "de", "", tmp_path / "nothing.wav")
    assert not (tmp_path / "nothing.wav").exists()
    with pytest.raises(SystemExit):
        run(pico_tts, "ja", "text", wav)
    assert "invalid choice: 'ja'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ttspico", None)
    with pytest.raises(RuntimeError, match="pip install ttspico"):
        run(pico_tts, "de", "text", wav)


def test_the_table_of_languages_is_made_of_what_was_measured(tmp_path):
    """KL8 of two questions in two languages, by hand."""
    for name, distilled in {"english": 0.4, "english-more": 0.3, "all": 0.1}.items():
        (tmp_path / name).mkdir()
        of = {"cascade": {"kl8_rows": [0.2, 0.2]}}
        for way in ("text", "speech"):
            of |= {f"base by {way}": {"kl8_rows": [1.0, 2.0]}, f"distilled by {way}": {"kl8_rows": [distilled, distilled + 1]}}
        (tmp_path / name / "report.json").write_text(json.dumps({"results": {"en": of, "de": of}}))
    with pytest.raises(ValueError, match="divergence-en.json: no such file; `bash tools/languages.sh` makes it"):
        run(plot_languages, "--results", tmp_path)
    for name in ("base", "english", "english-more", "all"):
        for language in ("en", "de"):
            (tmp_path / name).mkdir(exist_ok=True)
            record = {"subsets": {"alpacaeval_full": {"rows": 2, "F": [0.5, 0.4, 0.6], "M": [0.3, 0.2, 0.4]}}}
            (tmp_path / name / f"divergence-{language}.json").write_text(json.dumps(record))
    run(plot_languages, "--results", tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "|  | en | de |" and len(lines) == 25
    assert "| KL8 by text, base | 1.50 [1.00, 2.00] | 1.50 [1.00, 2.00] |" in lines
    assert "| by speech, four languages less repaired in English | -0.30 [-0.30, -0.30] | -0.30 [-0.30, -0.30] |" in lines
    assert "| M, base | 0.30 [0.20, 0.40] | 0.30 [0.20, 0.40] |" in lines and (tmp_path / "languages.png").stat().st_size > 9000


def test_the_table_of_languages_that_is_shown_is_that_of_the_files():
    folder = ROOT / "results/beyond/languages"
    assert (folder / "table.md").read_text() == "\n".join(plot_languages.table(folder, plot_languages.kl8_of(folder))) + "\n"
