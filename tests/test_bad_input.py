"""Every cause of bad input has a row here: the error is one line that says what was found, what was expected, what to do.

A row is a cause, what makes it, and what the line must match. Exit code 2, and OUT stays as it was. WORKS lists
what looks odd and must go through.
"""
import ast
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, manifest, sound
from safetensors.torch import load_file, save_file

import eval_mmau
import eval_voicebench
import synth_speech
import train_kd

sys.path.insert(0, str(ROOT / "tools"))
import ask
import compare

MODULES = {"train": train_kd, "synth": synth_speech, "vb": eval_voicebench, "mmau": eval_mmau, "ask": ask,
           "compare": compare}


def wrapper(module):
    """What a script does under `if __name__ == "__main__"`, to be run in the module that is imported already."""
    return compile(ast.Module(ast.parse(Path(module.__file__).read_text()).body[-1].body, []), module.__file__, "exec")


WRAPPERS = {name: wrapper(module) for name, module in MODULES.items()}


class Box:
    """A folder with good input for every script; cases spoil it."""

    def __init__(self, folder, tiny):
        self.folder, self.tiny, self.out = folder, tiny, folder / "out"
        self.manifest, self.clip = folder / "train.jsonl", folder / "wav/train-001.flac"
        self.out.mkdir()
        (self.out / "mine.txt").write_text("not to be touched")
        self.rows = [json.loads(line) for line in self.manifest.read_text().splitlines()]
        self.questions = folder / "questions.json"
        self.questions.write_text(json.dumps([{"prompt": f"How are you, {name}?"} for name in ("Ann", "Bo", "Cy")]))
        self.bench = folder / "advbench-test.jsonl"
        self.bench.write_text(json.dumps({"prompt": "Who is it?", "audio": "wav/train-001.flac"}) + "\n")
        self.mmau = folder / "mmau.json"
        self.item = {"id": "train-001", "question": "What?", "choices": ["a bus", "a tram"], "answer": "a bus"}
        self.mmau.write_text(json.dumps([self.item]))

    def good(self, script):
        """Arguments with which the script does its work in a moment."""
        models = ["--teacher", self.tiny.llm, "--student", self.tiny.student_folder]
        return [str(x) for x in {
            "train": [*models, "--data", self.manifest, "--out", self.out, "--dtype", "float32", "--batch-size", 4,
                      "--max-steps", 1, "--device", "cpu"],
            "synth": ["--teacher", self.tiny.llm, "--out", self.out, "--dtype", "float32", "--device", "cpu", "--workers", 1,
                      "--input", self.questions, "--max-new-tokens", 2, "--voices", "en-us"],
            "vb": [*models, "--data", self.folder, "--out", self.out, "--device", "cpu", "--max-new-tokens", 2],
            "mmau": ["--student", self.tiny.student_folder, "--data", self.mmau, "--out", self.out, "--device", "cpu",
                     "--max-new-tokens", 2],
            "ask": ["--student", self.tiny.student_folder, "--max-new-tokens", 2, self.clip],
            "compare": ["--teacher", self.tiny.llm, "--start", self.tiny.student, "--base", self.tiny.student_folder,
                        "--distilled", self.tiny.student_folder, "--device", "cpu", "--data", self.manifest, "--out", self.out, "--max-new-tokens", 2]}[script]]

    def write(self, change, which=1):
        """The manifest with one row changed: a dict of keys, a function, or the line's bytes."""
        lines = [json.dumps(row).encode() for row in self.rows]
        row = self.rows[which]
        lines[which] = (change if isinstance(change, bytes) else
                        json.dumps(change(dict(row)) if callable(change) else {**row, **change}).encode())
        self.manifest.write_bytes(b"\n".join(lines) + b"\n")

    def model(self, name, edit):
        """A copy of one of the tiny models, spoiled."""
        folder = self.folder / name
        shutil.copytree(getattr(self.tiny, {"student": "student_folder"}.get(name, name)), folder)
        edit(folder)
        return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return manifest(tmp_path_factory.mktemp("source"), 5).parent


@pytest.fixture
def box(source, tiny, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    return Box(shutil.copytree(source, tmp_path / "box"), tiny)


def call(script, argv, monkeypatch, capsys):
    """The script's own main and wrapper -> exit code, lines on stderr (progress and argparse's usage aside)."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    try:
        exec(WRAPPERS[script], vars(MODULES[script]))
        code = 0
    except SystemExit as end:
        code = end.code
    lines = [line.split("\r")[-1] for line in capsys.readouterr().err.splitlines()]
    return code, [x for x in lines if x.strip() and not re.match(r"usage:| {4,}|[\w -]+: +\d+(%|row|it|reply|\?)|\d+ items are asked", x)]


def listing(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def refuse(script, argv, pattern, box, monkeypatch, capsys):
    before = listing(box.out)
    code, lines = call(script, argv, monkeypatch, capsys)
    assert len(lines) == 1 and re.search(pattern, lines[0]), lines
    assert code == 2 and listing(box.out) == before


def cases(table):
    return pytest.mark.parametrize("case", list(table.values()), ids=list(table))


# ---- arguments: cause: (script, options, what the line says) ----

def numbers(script, low, **options):
    """--option value is refused, and the line says what is accepted."""
    return {f"{script} --{name.replace('_', '-')} {value}": (
        script, [f"--{name.replace('_', '-')}={value}"], rf"--{name.replace('_', '-')}: {re.escape(str(value))}: expected a number, {low}$")
        for name, values in options.items() for value in (values if isinstance(values, list) else [values])}


ARGUMENTS = {
    **numbers("train", "0 or more", max_steps=-1, eval_every=-2, lr_warmup_steps=-1, global_batch_size=-8,
              max_bad_rows=-1, lora_rank=-1, t2t_weight=-1.0, sound_weight="nan", kd_weight=-0.5, ce_weight="inf"),
    **numbers("train", "1 or more", batch_size=[0, -4], sound_batch_size=0, save_every=0, max_answer_tokens=0),
    **numbers("train", "0 to 1", lr_llm=[-1.0, "nan"], lr_adapter="inf", lr_encoder=2.0),
    **numbers("train", "0.01 or more", temperature=[0.0, -1.0, "nan", "inf"]),
    **numbers("train", "0.001 or more", epochs=[0.0, -1.0, "nan"]),
    **numbers("train", "1e-06 to 0.999999", beta=[0, 1]), **numbers("train", "0 to 4294967296", seed=-1),
    **numbers("synth", "1 or more", workers=0, batch_size=0, max_new_tokens=0, max_words=0),
    **numbers("synth", "0 or more", heldout=-1, limit=-1, max_wer=-0.1, max_bad_rows=-1),
    **numbers("synth", "0 to 1", noise=[2.0, "nan", -0.1]),
    **numbers("vb", "1 or more", batch_size=0, max_new_tokens=0),
    **numbers("vb", "0 or more", limit=-1),
    **numbers("mmau", "1 or more", batch_size=0, max_new_tokens=-1), **numbers("mmau", "0 or more", limit=-1),
    "not a number": ("train", ["--max-steps", "ten"], r"--max-steps: ten: expected a number, 0 or more"),
    "not a whole number": ("train", ["--batch-size", "1.5"], r"--batch-size: 1.5: expected a number, 1 or more"),
    "unknown loss": ("train", ["--loss", "mse"], r"--loss: invalid choice: 'mse' \(choose from .*forward_kl"),
    "unknown part": ("train", ["--train", "head"], r"--train: invalid choice: 'head'"),
    "unknown option": ("train", ["--learning-rate", "1"], r"unrecognized arguments: --learning-rate"),
    "a channel twice": ("train", ["--channels", "s2t", "s2t"], r"--channels s2t s2t: one is named twice"),
    "a part twice": ("train", ["--train", "llm", "llm"], r"--train llm llm: one is named twice"),
    "a manifest twice": ("train", ["--data", "a", "a"], r"--data a a: one is named twice"),
    "nothing to learn": ("train", ["--kd-weight", "0", "--ce-weight", "0"], r"leave nothing to learn; set one"),
    "nothing that trains": ("train", ["--channels", "t2t", "--train", "adapter"], r"trains nothing without --train llm"),
    "global batch": ("train", ["--global-batch-size", "10"], r"10 is not a multiple of --batch-size 4 x 1 processes; use 8"),
    "global batch of all": ("train", ["--global-batch-size", "64"], r"5 rows with a teacher .*a step has 64; give"),
    "unknown engine": ("synth", ["--engine", "festival"], r"--engine: invalid choice: 'festival' \(choose from .*espeak"),
    "no program": ("synth", ["--engine", "command", "--tts-command", "nothere", "{text}", "{wav}"], r"'nothere .*expected an installed"),
    "no {wav}": ("synth", ["--engine", "command", "--tts-command", "cat", "{text}"], r"the words \{text\} and \{wav\}"),
    "no input": ("synth-only", ["--out", "x"], r"the following arguments are required: --input"),
    "no such voice": ("synth", ["--voices", "martian"], r"espeak has no voice 'martian'"),
    "no voice of the language": ("synth-only", ["--out", "x", "--input", "x", "--language", "fr"], r"--language fr needs --voices that"),
    "three takes": ("synth", ["--takes", "3"], r"--takes: invalid choice: 3"),
    "no such piper voice": ("synth", ["--engine", "piper", "--voices", "martian"], r"piper has no voice 'martian'|needs the package piper-tts"),
    "no recogniser": ("synth", ["--max-wer", "0.3", "--asr", "a/b"], r"'a/b' is no local folder.*that can be reached"),
    "student and answers": ("vb", ["--score-only", "x"], r"--score-only: not allowed with argument --student"),
    "unknown subset": ("vb", ["--subsets", "gsm8k"], r"--subsets: invalid choice: 'gsm8k'"),
    "unknown modality": ("vb", ["--modality", "video"], r"--modality: invalid choice: 'video'"),
    "no data folder": ("vb", ["--data", "nowhere"], r"nowhere: no SUBSET-SPLIT.jsonl, as tools/from_hub.py"),
    "subset not there": ("vb", ["--subsets", "bbh"], r"no bbh-SPLIT.jsonl$"),
    "no MMAU file": ("mmau", ["--data", "nowhere.json"], r"No such file.*nowhere.json"),
    "no such mode": ("train", ["--device", "tpu"], r"--device: invalid choice: 'tpu' \(choose from '?cpu'?, '?cuda'?\)"),
    "no student": ("train", ["--student", "nobody/nothing"], r"'nobody/nothing' is no local folder.*tools/offline_models.py"),
    "no teacher": ("synth", ["--teacher", "nobody/nothing"], r"'nobody/nothing' is no local folder.*tools/offline_models.py"),
    "no hub name": ("train", ["--teacher", "a b c/d/e"], r"is no local folder.*no hub id \(ORG/NAME\)"),
    "WHISPER+nothing": ("train", ["--student", "WHISPER+"], r"'' is no local folder"),
    "Whisper that trains": ("train", ["--student", "WHISPER+LLM", "--train", "encoder"], r"--train encoder: .* trains adapter, llm; its Whisper stays"),
    "LoRA without an LLM": ("train", ["--lora-rank", "4", "--train", "adapter"], r"--lora-rank trains the LLM: add llm to --train"),
    "sharded alone": ("train", ["--shard"], r"--shard needs torchrun"),
    "answers too long": ("vb", ["--max-new-tokens", "5000"], r"5000 new ones exceed the LLM's context of 4096; shorten"),
    "answers too long, synth": ("synth", ["--max-new-tokens", "5000"], r"exceed the LLM's context of 4096.*--max-new-tokens"),
    **numbers("ask", "1 or more", max_new_tokens=0), **numbers("compare", "1 or more", limit=0),
    "no question": ("ask-only", ["--student", "x"], r"the following arguments are required: questions"),
    **{f"{name}, which is not there": ("ask", [name], rf"{name}: no such file; give the path of a clip, or a question in words")
       for name in ("nope.wav", "nope.flac", "nope.m4a", "a/nope.webm", "my nope.opus", "nope.WMA", "nope.txt")},
    "a folder": ("ask", [str(ROOT / "tests")], r"tests: a folder; give the path of a clip"),
    "asked in words, and a folder": ("ask", ["What is 3.5 times 2.", "Why?", "/"], r"error: /: a folder;"),
    "nobody to ask": ("ask", ["--student", "nobody/nothing"], r"'nobody/nothing' is no local folder"),
    "nothing to compare": ("compare", ["--data", "nowhere.jsonl"], r"nowhere.jsonl: no such manifest; synth_speech.py"),
}


@cases(ARGUMENTS)
def test_arguments(case, box, monkeypatch, capsys):
    script, options, pattern = case
    monkeypatch.setitem(sys.modules, "datasets", None)
    script, _, only = script.partition("-")  # only these options, or behind the good ones: the last counts
    argv = [*([] if only else box.good(script)), *(x.replace("WHISPER", box.tiny.encoder).replace("+LLM", f"+{box.tiny.llm}") for x in options)]
    refuse(script, argv, pattern, box, monkeypatch, capsys)


# ---- manifests of train_kd.py: cause: (change of the second row, what the line says) ----

def link_out(box):
    """wav/out.flac leads to a readable clip outside of the manifest's folder."""
    soundfile.write(box.folder.parent / "outside.flac", sound(0.5).numpy(), 16_000)
    (box.folder / "wav/out.flac").symlink_to(box.folder.parent / "outside.flac")
    (box.folder / "linked").symlink_to(box.folder.parent)


MANIFESTS = {
    "not JSON": (b"oops", r"train.jsonl:2: not JSON in UTF-8 \(Expecting value"),
    "half a line": (b'{"id": "x", "prompt": "Wh', r"train.jsonl:2: not JSON in UTF-8 \(Unterminated string"),
    "a list": (b"[1, 2]", r"train.jsonl:2: '\[1, 2\]' is no JSON object; expected one a line"),
    "a number": (b"7", r"train.jsonl:2: '7' is no JSON object; expected"),
    "null": (b"null", r"train.jsonl:2: 'None' is no JSON object"),
    "latin-1": ('{"id": "x", "prompt": "Café?", "response": "b"}'.encode("latin-1"), r":2: not JSON in UTF-8 .*byte 0xe9"),
    "UTF-16": ('{"id": "x"}'.encode("utf-16"), r":2: not JSON in UTF-8 .*byte 0xff"),
    "half a surrogate pair": (b'{"id": "x", "prompt": "\\ud83d", "response": "b"}', r":2: not JSON in UTF-8 .*surrogates"),
    "NUL byte": (b'{"id": "x\0"}', r":2: not JSON in UTF-8 \(Invalid control character"),
    "NUL in a path": ({"audio": "wav/\0.flac"}, r":2: audio file 'wav/\\x00.flac' not found below"),
    "newline in a path": ({"audio": "wav/\n.flac"}, r":2: audio file 'wav/\\n.flac' not found"),
    "endless name": ({"audio": "x" * 9999}, r":2: audio file 'x+' not found"),
    "deeply nested": (b'{"id": "x", "a": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", r":2: not JSON in UTF-8 \(maximum recursion"),
    "endless number": (b'{"id": "x", "seconds": 1' + b"0" * 9999 + b"}", r":2: not JSON in UTF-8 \(Exceeds the limit"),
    "no id": (lambda row: {k: row[k] for k in row if k != "id"}, r":2: no id; expected id, prompt, audio, response"),
    "no prompt": (lambda row: {k: row[k] for k in row if k != "prompt"}, r":2: no prompt; expected id, prompt"),
    "no response": (lambda row: {k: row[k] for k in row if k != "response"}, r":2: no response; expected id, prompt"),
    "id null": ({"id": None}, r":2: id None is no text"), "id a list": ({"id": [1]}, r":2: id \[1\] is no text"),
    "prompt a number": ({"prompt": 5}, r":2: prompt is '5', expected text or null"),
    "prompt an object": ({"prompt": {"text": "a"}}, r":2: prompt is .*expected text or null"),
    "response a list": ({"response": ["Yes."]}, r":2: response is .*expected text or null"),
    "reference a number": ({"reference": 1.5}, r":2: reference is '1.5', expected text or null"),
    "system a number": ({"system": 1}, r":2: system is '1', expected text or null"),
    "instruction a list": ({"instruction": []}, r":2: instruction is '\[\]', expected text or null"),
    "finish a truth value": ({"finish": True}, r":2: finish is 'True', expected text or null"),
    "audio a number": ({"audio": 3}, r":2: audio is '3', expected text or null"),
    "id twice": ({"id": "train-000"}, r":2: id 'train-000' .*also that of .*train.jsonl:1; every row needs its own"),
    "id twice, as number": ({"id": 7}, r"other.jsonl:1: id '7' .*also that of .*train.jsonl:2"),
    "prompt blank": ({"prompt": " \n"}, r":2: neither prompt nor audio, or a blank prompt; expected text, or null"),
    "prompt empty, no sound": ({"prompt": "", "audio": None}, r":2: neither prompt nor audio"),
    "clip missing": ({"audio": "wav/none.flac"}, r":2: audio file 'wav/none.flac' not found below .*box; copy it there, and give its path from there"),
    "clip a folder": ({"audio": "wav"}, r":2: audio file 'wav' not found"),
    "absolute path": (lambda row: {**row, "audio": "BOX/" + row["audio"]}, r":2: audio file '/.*box/wav/.*' not found below .*; copy it there"),
    "path with ..": ({"audio": "../outside.flac"}, r":2: audio file '../outside.flac' not found below"),
    "link that leads out": ({"audio": "wav/out.flac"}, r":2: audio file 'wav/out.flac' not found below"),
    "folder that leads out": ({"audio": "linked/outside.flac"}, r":2: audio file 'linked/outside.flac' not found below"),
    "another framework's tag inside": ({"prompt": "Hear <speech> and answer."}, r":2: <audio> or the like inside the prompt"),
    "mark in a system message": ({"system": "a<|audio|>b"}, r"row 'box/train-001': <\|audio\|> stands in a system message or instruction"),
    "a language that Whisper does not know": ({"language": "tlh"}, r"language 'tlh': this Whisper knows en"),
    "prompt over the context": ({"prompt": "What? " * 5000}, r"row 'box/train-001': \d{4,} tokens .* the models have room for 4096; shorten"),
    "system over the context": ({"system": "Sing. " * 5000}, r"row 'box/train-001': \d{4,} tokens .* the models have room for 4096"),
    "two bad rows": ((b"oops", b"oops"), r":2: not JSON.*bad rows: 2; mend them, or leave them out by --max-bad-rows 2"),
}


@cases(MANIFESTS)
def test_manifests(case, box, monkeypatch, capsys):
    change, pattern = case
    link_out(box)
    if isinstance(change, tuple):
        change = b"\n".join(change)
    if callable(change) and "BOX" in str(change(box.rows[1])):
        change = {"audio": f"{box.folder}/{box.rows[1]['audio']}"}
    box.write(change)
    other = []
    if "other.jsonl" in pattern:
        (box.folder / "other.jsonl").write_text(json.dumps({"id": "7", "prompt": "a", "response": "b"}) + "\n")
        other = ["--data", box.manifest, box.folder / "other.jsonl"]
    refuse("train", [*box.good("train"), *other], pattern, box, monkeypatch, capsys)


# ---- whole files: cause: (script, what spoils it, what the line says) ----

def put(name, data):
    return lambda box: (box.folder / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


def bench(name, *rows):
    return put(f"{name}.jsonl", b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))


def every(**keys):
    return lambda box: box.manifest.write_text("".join(json.dumps({**row, **keys}) + "\n" for row in box.rows))


def rename(old, new):
    def spoil(box):
        box.manifest.write_text(box.manifest.read_text().replace(f'"{old}":', f'"{new}":'))
    return spoil


def soundless(box):
    """One row without a teacher among the others."""
    box.write({"prompt": None})


IFEVAL = {"prompt": "?", "audio": "wav/train-001.flac", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
ITEM = {"id": "train-001", "question": "What?", "choices": ["a bus", "a tram"], "answer": "a bus"}
FILES = {
    "manifest missing": ("train", lambda box: box.manifest.unlink(), r"train.jsonl: no such manifest; synth_speech.py writes one"),
    "manifest empty": ("train", put("train.jsonl", b""), r"train.jsonl: no row has prompt and response, which channel t2t needs"),
    "manifest gzipped": ("train", put("train.jsonl", gzip.compress(b"{}")), r"train.jsonl:1: not JSON in UTF-8 .*byte 0x8b"),
    "no answers": ("train", every(response=None), r"no row has prompt and response, which channel t2t needs"),
    "empty answers": ("train", every(response=""), r"no row has prompt and response"),
    "no references": ("train-labels", every(), r"no row has prompt and reference"),
    **{f"audio under {key}": ("train", rename("audio", key), r"no row has audio and response, which channel s2t needs; unknown keys: .*" + key)
       for key in ("audio_path", "audios", "wav")},
    "nothing to measure on": ("train-eval", bench("eval", {"id": "a", "prompt": "a", "response": "b"}), r"no row can be measured; that needs prompt, audio and"),
    "fewer rows about sound than a step": ("train", soundless, r"1 rows without a teacher .*a step has 8"),
    "bad manifest to measure on": ("train-eval", put("eval.jsonl", b"{}"), r"eval.jsonl:1: no id, prompt, response"),
    "input missing": ("synth", lambda box: box.questions.unlink(), r"No such file.*questions.json"),
    "input a folder": ("synth", lambda box: (box.questions.unlink(), box.questions.mkdir()), r"Is a directory.*questions.json"),
    "input not JSON": ("synth", put("questions.json", b'{"prompt": "a"}\n{oops'), r"questions.json:2: not JSON in UTF-8"),
    "input a bad list": ("synth", put("questions.json", b'[{"prompt": "a"},\n{oops]'), r"questions.json:1: not JSON in UTF-8 \(.*line 2 column 2"),
    "input gzipped": ("synth", put("questions.json", gzip.compress(b"[]")), r"questions.json:1: not JSON in UTF-8 .*byte"),
    "input without text": ("synth", put("questions.json", [{"text": "a"}]), r"questions.json:1: no text under prompt, question or"),
    "input of blanks": ("synth", put("questions.json", [{"prompt": " "}]), r"questions.json:1: no text under"),
    "input of numbers": ("synth", put("questions.json", [1]), r"questions.json:1: '1' is no JSON object"),
    "answer a number": ("synth", put("questions.json", [{"prompt": "a", "response": 5, "finish": "stop"}]), r"response is '5', expected text"),
    "nothing speakable": ("synth", put("questions.json", [{"prompt": "{x}"}]), r"no row is left of 1: .*'code': 1"),
    "bench not JSON": ("vb", bench("advbench-test", b"{oops"), r"advbench-test.jsonl:1: not JSON in UTF-8"),
    "bench empty": ("vb", put("advbench-test.jsonl", b""), r"advbench-test.jsonl: no rows of advbench"),
    "bench without prompt": ("vb", bench("advbench-test", {"audio": "x"}), r"advbench-test.jsonl:1: no prompt; advbench needs prompt"),
    "bench prompt a number": ("vb", bench("advbench-test", {"prompt": 1}), r"test.jsonl:1: prompt is '1', expected text"),
    "bench without sound": ("vb", bench("advbench-test", {"prompt": "?"}), r"advbench, '\?': audio file '' not found"),
    "bench sound leads out": ("vb", bench("advbench-test", {"prompt": "?", "audio": "wav/out.flac"}), r"audio file 'wav/out.flac' not found below"),
    "bench sound no audio": ("vb", put("wav/train-001.flac", b"text"), r"train-001.flac: not a readable audio file"),
    "no such letter": ("vb", bench("mmsu-law", {"prompt": "?", "reference": "E"}), r":1: unknown 'e'; mmsu needs prompt, reference"),
    "letter a number": ("vb", bench("mmsu-law", {"prompt": "?", "reference": 1}), r"mmsu-law.jsonl:1: 'int' object has no attribute 'lower'; mmsu needs"),
    "no such task": ("vb", bench("bbh-test", {"prompt": "?", "id": "x", "reference": "yes"}), r"id 'x' names none of hyperbaton"),
    "id a number": ("vb", bench("bbh-test", {"prompt": "?", "id": 1, "reference": "yes"}), r"bbh-test.jsonl:1: argument of type 'int' is not .*; bbh needs prompt, id, reference"),
    "solutions not texts": ("vb", bench("sd-qa-usa", {"prompt": "?", "reference": [1969]}), r"sd-qa-usa.jsonl:1: .*must be str, not int; sd-qa needs prompt, reference"),
    "no such instruction": ("vb", bench("ifeval-test", IFEVAL | {"instruction_id_list": ["a:b"]}), r":1: unknown .b.; ifeval needs"),
    "arguments missing": ("vb", bench("ifeval-test", IFEVAL | {"kwargs": []}), r"ifeval-test.jsonl:1: zip\(\) argument 2 is shorter"),
    "argument missing": ("vb", bench("ifeval-test", IFEVAL | {"instruction_id_list": ["length_constraints:number_words"]}), r"missing 2 required positional arguments: 'relation' and 'num_words'; ifeval needs"),
    "answers not there": ("vb-score", lambda box: None, r"advbench-test-text.jsonl: expected a file named MODEL-SUBSET-MODALITY"),
    "answers without answers": ("vb-score", bench("a-advbench-test-text", {"prompt": "?"}), r"no response; advbench needs prompt, response"),
    "answer not a text": ("vb-score", bench("a-advbench-test-text", {"prompt": "?", "response": 5}), r":1: response is '5', expected text"),
    "replies a number": ("vb-judged", bench("a-commoneval-test-text", {"prompt": "?", "response": "a", "score": 5}), r":1: no list of texts as score"),
    "replies none": ("vb-judged", bench("a-commoneval-test-text", {"prompt": "?", "response": "a", "score": []}), r":1: no list of texts as score"),
    "MMAU not JSON": ("mmau", put("mmau.json", b"[{"), r"mmau.json:1: not JSON in UTF-8"),
    "MMAU in latin-1": ("mmau", put("mmau.json", '[{"id": "é"}]'.encode("latin-1")), r"mmau.json:1: not JSON in UTF-8 .*byte 0xe9"),
    "MMAU no list": ("mmau", put("mmau.json", {"id": 1}), r"mmau.json:1: choices None, expected a list of 2 to 26 texts"),
    "MMAU one choice": ("mmau", put("mmau.json", [ITEM | {"choices": ["a"]}]), r"mmau.json:1: choices \['a'\], expected a list of 2 to 26 texts"),
    "MMAU no question": ("mmau", put("mmau.json", [ITEM | {"question": ""}]), r"mmau.json:1: id, question, choices or another text is empty"),
    "MMAU id twice": ("mmau", put("mmau.json", [ITEM, ITEM]), r"mmau.json: more than one item has the id train-001"),
    "MMAU some answers": ("mmau", put("mmau.json", [ITEM, ITEM | {"id": "x", "answer": ""}]), r"1 of 2 items have answers, not all or none"),
    "MMAU clip missing": ("mmau", put("mmau.json", [ITEM | {"id": "x"}]), r"1 of 1 clips are not in .*first x.wav \(0 files may be it\); name their folder by --audio"),
    "MMAU clip no audio": ("mmau", put("wav/train-001.flac", b""), r"train-001.flac: not a readable audio file"),
    "MMAU no answers to score": ("mmau-score", put("p.json", [ITEM]), r"no item has the key model_output"),
    "asked in noise": ("ask", put("wav/train-001.flac", b"noise"), r"train-001.flac: not a readable audio file"),
    "compared on nothing": ("compare", put("train.jsonl", b"oops"), r"train.jsonl:1: not JSON in UTF-8"),
}


@cases(FILES)
def test_files(case, box, monkeypatch, capsys):
    (script, _, mode), (_, spoil, pattern) = case[0].partition("-"), case
    link_out(box)
    if script == "vb" and not pattern.startswith(("adv", "no adv")) and "train-001" not in pattern:
        box.bench.unlink()
    spoil(box)
    late = {"labels": ["--labels", "reference"], "eval": ["--eval-data", box.folder / "eval.jsonl"]}.get(mode, [])
    argv = [*box.good(script), *late]
    if mode in ("score", "judged"):
        answers = next(box.folder.glob("a-*.jsonl"), box.folder / "a-advbench-test-text.jsonl")
        answers = answers if script == "vb" else box.folder / "p.json"
        argv = ["--score-only", answers, "--out", box.out, "--device", "cpu"]
    refuse(script, argv, pattern, box, monkeypatch, capsys)


# ---- audio: cause: (what writes the clip, what the line says; None = it must work) ----

def wave(samples, rate=16_000, **options):
    return lambda path: soundfile.write(path, np.asarray(samples, dtype=options.pop("dtype", "float32")), rate, **{"format": "WAV", **options})


def cut(share, **options):
    def write(path):
        soundfile.write(path, TONE, 16_000, **options)
        path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    return write


def first_bytes(head):
    return lambda path: path.write_bytes(head)


TONE = sound(0.8).numpy()
AUDIO = {
    "zero bytes": (lambda path: path.write_bytes(b""), r"001.flac: not a readable audio file .*; fetch it again, or convert it: ffmpeg"),
    "text": (lambda path: path.write_text("no sound at all"), r"not a readable audio file .*; fetch it again, or"),
    "m4a": (first_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom"), r"or convert it: ffmpeg -i (\S+001.flac) \1.wav \(bad"),
    "no samples": (wave([]), r"001.flac: 0 samples at 16000 Hz, expected 20 ms to 600 s"),
    "ten samples": (wave(TONE[:10]), r"001.flac: 10 samples at 16000 Hz, expected 20 ms to 600 s"),
    "NaN": (wave(np.where(np.arange(len(TONE)) == 99, np.nan, TONE), subtype="FLOAT"), r"12800 samples up to nan, expected 12800 of -1 to 1"),
    "infinite": (wave(np.where(np.arange(len(TONE)) == 99, np.inf, TONE), subtype="FLOAT"), r"12800 samples up to inf, expected 12800 of -1 to 1"),
    "not scaled": (wave(32768 * TONE, subtype="FLOAT"), r"samples up to \d+.*, expected 12800 of -1 to 1; fetch it again, or scale it"),
    "FLAC cut": (cut(0.5, format="FLAC"), r"001.flac: not a readable audio file \(.*lost sync"),
    "OGG cut": (cut(0.5, format="OGG"), r"001.flac: (not a readable audio file|0 samples)"),
    "MP3 cut": (cut(0.5, format="MP3"), r"001.flac: (\d+ samples up to .*, expected 12800|not a readable)"),
    "WAV's header alone": (cut(0.0017, format="WAV"), r"001.flac: 0 samples|not a readable audio file"),
    "odd rate": (wave(TONE, 16_001), r"12800 samples at 16001 Hz, expected .*rate in steps of 25 Hz; cut or resample it"),
    "one hour": (wave(np.zeros(3600 * 100), 100), r"360000 samples at 100 Hz, expected 20 ms to 600 s"),
    "opposite phases": (wave(np.stack([TONE, -TONE], 1)), None),
    "8 channels": (wave(np.stack([TONE] * 8, 1)), None), "8 kHz": (wave(TONE[::2], 8_000), None),
    "192 kHz": (wave(np.repeat(TONE, 12), 192_000), None), "24 bits": (wave(TONE, subtype="PCM_24"), None),
    "8 bits": (wave(TONE, subtype="PCM_U8"), None), "64-bit float": (wave(TONE, subtype="DOUBLE"), None),
    "silence": (wave(0 * TONE), None), "MP3": (cut(1, format="MP3"), None), "OGG": (cut(1, format="OGG"), None),
    "45 seconds": (wave(np.tile(TONE, 57)[:45 * 16_000]), None)}


@cases(AUDIO)
def test_audio(case, box, monkeypatch, capsys):
    write, pattern = case
    box.write({"seconds": 45 if write is AUDIO["45 seconds"][0] else 0.8})
    write(box.clip)
    if pattern:
        refuse("train", box.good("train"), pattern, box, monkeypatch, capsys)
    else:
        assert call("train", box.good("train"), monkeypatch, capsys) == (0, [])


# ---- models: cause: (which, what spoils its folder, what the line says) ----

def config(**keys):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return edit


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def one_less(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def half(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:500])


def other_vocabulary(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    a, b = [t for t in vocab if len(t) > 1 and "<" not in t][-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(spec))


NO = r"no \w+ can be read from it \("
MODELS = {
    "config not JSON": ("llm", lambda f: (f / "config.json").write_text("{oops"), NO + r".*config.json' is not a valid JSON file"),
    "student's config not JSON": ("student", half("config.json"), r"config.json' is not a valid JSON file"),
    "unknown architecture": ("llm", config(model_type="nope"), NO + r".*model type `nope`"),
    "an image model": ("llm", config(model_type="vit", architectures=["ViTModel"]), r"no weights for embeddings.*; expected all"),
    "another language model": ("llm", config(model_type="bert"), r"do not fit its config.json: no weights for .*; expected all"),
    "its own code": ("llm", config(model_type="own", auto_map={"AutoConfig": "own.C"}), NO + r".*contains custom code"),
    "more layers than weights": ("llm", config(num_hidden_layers=3), r"no weights for model.layers.2.*expected all"),
    "other sizes": ("llm", config(hidden_size=48), NO + r".*size mismatch|ignore_mismatched_sizes"),
    "no weights": ("llm", without("model.safetensors"), NO + r".*no file named model.safetensors.*whose weights are safetensors"),
    "pickled weights alone": ("llm", pickled, NO + r".*no file named model.safetensors.*whose weights are safetensors"),
    "cut weights": ("llm", half("model.safetensors"), NO + r".*header"),
    "no tokenizer": ("llm", without("tokenizer.json", "tokenizer_config.json"), NO + r".*tokenizer"),
    "tokenizer not JSON": ("llm", half("tokenizer.json"), NO + r"(Expecting|Unterminated|Invalid)"),
    "no chat template": ("llm", without("chat_template.jinja"), r"its tokenizer has no chat template; use an instruction-tuned"),
    "a template that refuses": ("llm", lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no') }}"), r"the chat template of .* refuses .*no"),
    "other vocabulary": ("llm", other_vocabulary, r"teacher and student need one tokenizer: .* differ, e.g. in"),
    "capped logits": ("llm", config(final_logit_softcapping=30.0), r"its logits are capped"),
    "student without weights": ("student", without("model.safetensors"), NO + r".*no file named model.safetensors"),
    "student with a weight less": ("student", one_less, r"no weights for adapter.*; expected all"),
    "student without feature extractor": ("student", without("whisper/preprocessor_config.json"), NO + r".*feature extractor"),
    "student without tokenizer": ("student", without("tokenizer.json", "tokenizer_config.json"), NO + r".*tokenizer"),
    "an LLM as student": ("llm as student", lambda f: None, r"a model of type 'llama', expected WHISPER\+LLM, a student of train_kd.py"),
    "an LLM as encoder": ("llm+llm", lambda f: None, r"a model of type 'llama' cannot hear, expected a Whisper"),
    "encoder without extractor": ("encoder+", without("preprocessor_config.json"), NO + r".*feature extractor"),
    "encoder with a weight less": ("encoder+", one_less, r"no weights for .*; expected all"),
}


@cases(MODELS)
def test_models(case, box, monkeypatch, capsys):
    which, edit, pattern = case
    name = re.match(r"\w+", which)[0]
    folder = box.model(name, edit)
    options = {"llm": ["--teacher", folder], "student": ["--student", folder], "llm as student": ["--student", folder],
               "llm+llm": ["--student", f"{folder}+{folder}"], "encoder+": ["--student", f"{folder}+{box.tiny.llm}"]}[which]
    refuse("train", [*box.good("train"), *options], pattern, box, monkeypatch, capsys)
    if which == "llm" and "vocab" not in edit.__name__ and "capped" not in pattern:
        refuse("synth", [*box.good("synth"), *options], pattern, box, monkeypatch, capsys)
    if which == "student":
        refuse("vb", [*box.good("vb"), *options, "--teacher", "none"], pattern, box, monkeypatch, capsys)
        refuse("mmau", [*box.good("mmau"), *options], pattern, box, monkeypatch, capsys)


# ---- the machine: cause: (script, environment, options, what the line says) ----

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
MACHINE = {
    **{f"{script}: no GPU": (script, {}, ["--device", "cuda"], "NVIDIA|CUDA") for script in ("train", "synth", "vb", "mmau")},
    **{f"{script}: no GPU for torchrun": (script, TORCHRUN, ["--device", "cuda"], "NVIDIA|CUDA") for script in ("train", "synth")},
    "port taken": ("train", {**TORCHRUN, "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "TAKEN"}, [], r"address already in use"),
    "torchrun without a world": ("train", {"RANK": "0"}, [], r"environment variable WORLD_SIZE expected"),
    **{f"{script}: OUT a file": (script, {}, ["--out", "FILE"], r"(File exists|Not a directory): .*FILE") for script in ("train", "synth", "compare", "vb", "mmau")},
    "OUT below a file": ("train", {}, ["--out", "FILE/run"], r"Not a directory: .*FILE/run"),
    "OUT read-only": ("train", {}, ["--out", "READONLY/run"], r"(Permission denied|No such file|Read-only|not permitted).*run"),
    "OUT of another run": ("train", {}, ["--out", "DONE"], r"ckpt-000001-0.pt exists: add --resume to go on, or choose another --out"),
    "OUT of other options": ("synth", {}, ["--out", "BEGUN"], r"was begun with other options \(.*seed.*\); repeat them to go on"),
    "checkpoint cut": ("train", {}, ["--out", "DONE", "--resume"], r"DONE: no checkpoint has the SHA-256 that its name says \(1 tried\)"),
}


@cases(MACHINE)
def test_machine(case, box, monkeypatch, capsys):
    script, environment, options, pattern = case
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (box.folder / "FILE").write_text("a file")
    (box.folder / "LOCKED").mkdir(mode=0o500)
    (box.folder / "DONE").mkdir()
    (box.folder / "DONE/ckpt-000001-0.pt").write_bytes(b"PK\3\4 cut")
    (box.folder / "BEGUN/.stages").mkdir(parents=True)
    (box.folder / "BEGUN/.stages/args.json").write_text("{}")
    unwritable = next((p for p in (box.folder / "LOCKED", "/proc/sys", "/sys") if not os.access(p, os.W_OK)), None)
    if "READONLY/run" in options and not unwritable:
        pytest.skip("this user may write everywhere")
    options = [x if x[0] == "-" or x in ("cuda",) else x.replace("READONLY", str(unwritable)) if "READONLY" in x else f"{box.folder}/{x}"
               for x in options]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for key, value in environment.items():
            monkeypatch.setenv(key, value.replace("TAKEN", str(taken.getsockname()[1])))
        before = listing(box.folder)
        refuse(script, [*box.good(script), *options], pattern, box, monkeypatch, capsys)
        assert {k: v for k, v in listing(box.folder).items() if ".cache" not in k} == before


# ---- what must work ----

def as_bytes(change):
    return lambda box: box.manifest.write_bytes(change(box.manifest.read_bytes()))


WORKS = {
    "byte order mark": ("train", as_bytes(lambda data: b"\xef\xbb\xbf" + data)),
    "two files with marks, joined": ("train", as_bytes(lambda data: data.replace(b"\n", b"\n\xef\xbb\xbf", 2))),
    "CRLF": ("train", as_bytes(lambda data: data.replace(b"\n", b"\r\n"))),
    "blank lines": ("train", as_bytes(lambda data: b"\n" + data.replace(b"\n", b"\n \n"))),
    "no newline at the end": ("train", as_bytes(bytes.rstrip)),
    "a JSON list": ("train", as_bytes(lambda data: b"[" + data.strip().replace(b"\n", b",") + b"]")),
    "line separator in a text": ("train", lambda box: box.write('{"id": "x", "prompt": "a\u2028b\x85c", "response": "d"}'.encode())),
    "other scripts": ("train", lambda box: box.write({"prompt": "\u4f60\u597d \U0001f600 \u0440\u0443 e\u0301", "response": "\u0627\u0644"})),
    "NUL in a text": ("train", lambda box: box.write({"prompt": "a\0b"})),
    "unknown keys": ("train", lambda box: box.write({"more": {"of": [1, None]}})),
    "ids of numbers": ("train", lambda box: box.write({"id": 12})),
    "no seconds": ("train", lambda box: box.write(lambda row: {k: row[k] for k in row if k != "seconds"})),
    "seconds null": ("train", lambda box: box.write({"seconds": None})),
    "a megabyte beside the text": ("train", lambda box: box.write({"notes": "x" * 2**20})),
    "an answer over the context, which is cut": ("train", lambda box: box.write({"response": "Yes. " * 9000})),
    "an answer of one token": ("train", lambda box: box.write({"response": "Y", "finish": "length"})),
    "an empty answer": ("train", lambda box: box.write({"response": ""})),
    "no sound": ("train", lambda box: box.write({"audio": None})),
    "special tokens in a text": ("train", lambda box: box.write({"prompt": "<|im_end|>", "response": "<|im_start|>"})),
    "input with a mark": ("synth", put("questions.json", b"\xef\xbb\xbf" + b'{"prompt": "Who is it?"}\r\n')),
    "shell words": ("synth", put("questions.json", [{"prompt": "Say $(touch x); rm"}])),
    "an old OUT": ("mmau", put("out/notes.md", b"mine")),
    "all scripts: vb": ("vb", lambda box: None), "all scripts: ask": ("ask", lambda box: None),
}


@cases(WORKS)
def test_what_looks_odd_and_works(case, box, monkeypatch, capsys):
    script, change = case
    change(box)
    assert call(script, box.good(script), monkeypatch, capsys)[0] == 0
    assert (box.out / "mine.txt").read_text() == "not to be touched"


# ---- --max-bad-rows ----

def spoil(box):
    """Of five rows one is no JSON, one is too long, and one has a clip that is cut."""
    lines = [json.dumps(row).encode() for row in box.rows]
    lines[0], lines[2] = b"oops", json.dumps({**box.rows[2], "prompt": "What? " * 5000}).encode()
    box.manifest.write_bytes(b"\n".join(lines) + b"\n")
    box.clip.write_bytes(box.clip.read_bytes()[:300])


def test_bad_rows_up_to_the_limit_are_left_out_listed_and_said(box, monkeypatch, capsys):
    spoil(box)
    argv = [*box.good("train"), "--batch-size", 2, "--max-bad-rows", 3]
    assert train_kd.main(train_kd.get_args([str(x) for x in argv])) == 0
    said = capsys.readouterr().out
    assert f"3 bad rows are left out, listed in {box.out}/bad_rows.jsonl; 2 train, 0 are measured" in said
    listed = [json.loads(line) for line in (box.out / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == [f"{box.manifest}:1", "box/train-001", "box/train-002"]
    assert [bool(re.search(p, row["reason"])) for p, row in zip(("not JSON", "001.flac: not a readable", "room for"), listed)] == [True] * 3


def test_one_bad_row_more_than_the_limit_is_an_error_that_counts_them(box, monkeypatch, capsys):
    spoil(box)
    code, lines = call("train", [*box.good("train"), "--batch-size", 2, "--max-bad-rows", 2], monkeypatch, capsys)
    assert code == 2 and len(lines) == 1
    assert re.search(r"not JSON.* \(bad rows: 3; mend them, or leave them out by --max-bad-rows 3\)", lines[0])
    assert set(listing(box.out)) == {"mine.txt", "bad_rows.jsonl"}  # those of the first reading


def test_two_processes_leave_out_the_same_rows(box):
    spoil(box)
    argv = [str(x) for x in [*box.good("train"), "--batch-size", 1, "--max-bad-rows", 3]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    forks = []
    for rank in range(2):  # forks, which need not import torch again
        forks.append(os.fork())
        if not forks[-1]:
            code = 1
            try:
                os.dup2(os.open(box.folder / f"said{rank}", os.O_CREAT | os.O_WRONLY), 1)
                os.environ.update(TORCHRUN | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
                with open(1, "w", closefd=False) as sys.stdout:
                    code = train_kd.main(train_kd.get_args(argv))
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in forks] == [0, 0]
    assert "; 2 train, 0 are measured" in (box.folder / "said0").read_text()
    assert len((box.out / "bad_rows.jsonl").read_text().splitlines()) == 3


def test_synth_speech_leaves_unreadable_lines_out_and_lists_them(box, monkeypatch, capsys):
    box.questions.write_bytes(b'{"prompt": "How are you?"}\noops\n{"text": "a"}\n')
    refuse("synth", box.good("synth"), r"questions.json:2: not JSON.*--max-bad-rows 2", box, monkeypatch, capsys)
    code, _ = call("synth", [*box.good("synth"), "--max-bad-rows", 2], monkeypatch, capsys)
    listed = [json.loads(line)["reason"] for line in (box.out / "bad_rows.jsonl").read_text().splitlines()]
    assert code == 0 and len(listed) == 2 and "questions.json:3: no text" in listed[1]
    assert len((box.out / "train.jsonl").read_text().splitlines()) == 1


def test_the_table_has_the_causes_that_the_readme_counts():
    refused = [*ARGUMENTS, *MANIFESTS, *FILES, *(k for k, v in AUDIO.items() if v[1]), *MODELS, *MACHINE]
    works = [*(k for k, v in AUDIO.items() if not v[1]), *WORKS]
    assert len(set(refused)) == len(refused) >= 120 and len(set(works)) == len(works)
    said = re.search(r"(\d+) causes.*?(\d+) oddities", (ROOT / "README.md").read_text(), re.S)
    assert not said or int(said[1]) <= len(refused) and int(said[2]) <= len(works)
