"""What the README and the layout promise."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
            "compare", "ask", "bench", "from_hub", "judge", "make_voicebench", "result_data", "run_results", "score_parity"))))
    ours = set(re.findall(r"--[a-z][\w-]+", README)) - {"--help", "--nproc_per_node"}
    assert ours and not [flag for flag in sorted(ours) if f'"{flag}"' not in sources]


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
