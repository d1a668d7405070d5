"""What the README and the layout promise."""
import ast
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import soundfile

import eval_mmau
import eval_voicebench
import synth_speech
import train_kd

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TOP = {"README.md", "requirements.txt", "train_kd.py", "synth_speech.py", "eval_voicebench.py", "eval_mmau.py", "model.py", "losses.py",
       "test_losses.py", "LICENSE", ".gitignore", ".ci", "tests", "tools", "results"}


def test_nothing_else_lies_at_the_top_level():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {f.split("/")[0] for f in files} <= TOP


def test_every_file_and_function_that_the_readme_names_exists():
    for path, function in re.findall(r"`([\w/]+\.py):([\w.]+)`", README):
        name = function.split(".")[-1]
        assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / path).read_text(), re.M), f"{path}:{function}"
    for path in re.findall(r"`((?:tools|results|tests)/[\w./-]+\w)`", README):
        assert (ROOT / path).exists(), path


def test_every_flag_that_the_readme_shows_exists():
    sources = "".join((ROOT / f).read_text() for f in (
        "train_kd.py", "synth_speech.py", "eval_voicebench.py", "eval_mmau.py", *(f"tools/{name}.py" for name in (
            "compare", "ask", "bench", "from_hub", "judge", "make_voicebench", "preview", "result_data", "run_results", "sample_prompts", "score_parity", "sound_questions", "tts_server"))))
    ours = set(re.findall(r"--[a-z][\w-]+", README)) - {"--help", "--nproc_per_node", "--shutdown-timeout"}  # torchrun's
    assert ours and not [flag for flag in sorted(ours) if f'"{flag}"' not in sources]


def test_a_half_made_environment_is_made_again(tmp_path):
    """As where Debian's python3-venv was missing."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "python3").write_text('#!/bin/sh\n[ "$2" = venv ] && echo "exit 7" > "$3/bin/activate"\n')
    (tmp_path / "python3").chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name in ("test.sh", "quickstart.sh"):
        (tmp_path / ".venv/bin/activate").unlink(missing_ok=True)
        assert subprocess.run(["bash", tmp_path / "tools" / name], env=env, capture_output=True).returncode == 7


def test_no_placeholder_is_left():
    assert not re.findall(r"@[A-Z_]+@", README)


@pytest.mark.parametrize("script", ["train_kd", "synth_speech", "eval_voicebench", "eval_mmau", "model", "losses"])
def test_importing_a_script_does_nothing(script):
    code = (f"import torch, sys; sys.path.insert(0, {str(ROOT)!r}); state = torch.random.get_rng_state(); import {script}; "
            "assert torch.equal(state, torch.random.get_rng_state()) and not torch.distributed.is_initialized()")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stdout, result.stderr


def test_losses_import_torch_only():
    imports = re.findall(r"^(?:from|import) (\w+)", (ROOT / "losses.py").read_text(), re.M)
    assert set(imports) - set(sys.stdlib_module_names) == {"torch"}


def test_every_row_of_a_table_of_measurements_stands_in_a_file_of_results():
    logs = "".join(path.read_text() for path in sorted((ROOT / "results").rglob("*.md")))
    first, *sections = README.split("\n## ")
    shown = [section for section in sections if section.startswith(("What the quickstart shows", "Speed and memory"))]
    assert len(shown) == 2
    rows = [line for line in "\n".join([first, *shown]).splitlines() if line.startswith("|") and re.search(r"\d\.\d", line)]
    assert len(rows) >= 8 and not [row for row in rows if row not in logs]


def test_it_is_short_enough_to_be_read():
    lines = README.splitlines()
    assert len(lines) <= 200 and not [line for line in lines if len(line) > 140 and not line.startswith("|")]


RECIPES = (ROOT / "results/README.md").read_text().split("\n## Recipes")[1]


def test_the_commands_of_the_recipes_are_commands(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "8"}.items():  # as torchrun sets them
        monkeypatch.setenv(name, value)
    parsed = {}
    for script in (synth_speech, train_kd, eval_voicebench, eval_mmau):
        shown = re.findall(rf"{script.__name__}\.py ((?:.*\\\n)*.*)", RECIPES)  # with the lines that go on
        assert shown, script.__name__
        for line in shown:
            parsed[script.__name__] = script.get_args(shlex.split(line.replace("\\\n", " ")))
    assert parsed["synth_speech"].tts_command[-2:] == ["{text}", "{wav}"] and parsed["train_kd"].global_batch_size == 64


def test_clotho_becomes_rows_about_sounds(tmp_path, monkeypatch):
    folder = tmp_path / "data/clotho"
    (folder / "audio_files").mkdir(parents=True)
    soundfile.write(folder / "audio_files/rain.wav", np.zeros(16000), 16000)
    (folder / "clotho_aqa_train.csv").write_text("file_name,QuestionText,answer,confidence\n"
                                                 "rain.wav,Is it raining?,yes,yes\nrain.wav,Is it raining?,no,maybe\n")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"<<'EOF'\n(.*?)\n    EOF", RECIPES, re.S)[1]
    subprocess.run([sys.executable, "-c", "\n".join(line[4:] for line in code.split("\n"))], check=True)
    [row] = train_kd.read_manifest(folder / "train.jsonl")
    assert (row["prompt"], row["instruction"], row["response"]) == (None, "Is it raining?", "Yes.")


# lines; of model and train_kd 560 were wanted: together they may not grow
LIMITS = {"losses.py": 300, "model.py": 893, "train_kd.py": 923, "synth_speech.py": 548, "eval_voicebench.py": 700, "eval_mmau.py": 210}


@pytest.mark.parametrize("name, limit", LIMITS.items())
def test_a_script_keeps_to_its_size(name, limit):
    source = (ROOT / name).read_text()
    lines, flags = source.splitlines(), re.findall(r'(?:add|add_argument)\("--', source)
    assert len(lines) <= limit and len(flags) <= 40
    assert not [line for line in lines if len(line) > 100]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name not in ("main", "get_args"):
            assert node.end_lineno - node.lineno < 60, f"{name}:{node.name}"
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            assert node.end_lineno - node.lineno < 180


@pytest.mark.parametrize("name", ["train_kd.py", "losses.py"])
def test_there_is_a_comment_for_five_lines_of_code(name):
    source, code, comments = (ROOT / name).read_text(), set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += 1
        elif token.string.strip():
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    assert comments >= 0.2 * len(code)
