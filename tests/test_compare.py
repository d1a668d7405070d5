"""tools/compare.py: its tables say what its records hold."""
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import compare


def test_the_report_shows_every_condition_on_every_set_and_what_training_changed(tiny, tmp_path, capsys):
    sets = [tiny.manifest(tmp_path / name, 4, seed=seed) for seed, name in enumerate(("heard", "human"))]
    compare.main(compare.get_args([
        "--teacher", tiny.llm, "--before", tiny.student, "--after", tiny.student_folder, "--max-new-tokens", "3",
        "--data", *map(str, sets), "--device", "cpu", "--out", str(tmp_path / "out")]))
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    record = json.loads((tmp_path / "out/report.json").read_text())
    assert lines[0] == ("|  | KL8, heard | KL8, human | topic recall, heard | topic recall, human | words misheard, heard "
                        "| words misheard, human |")
    table = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[2:9]}
    assert list(table) == list(record["results"]["heard"]) and len(table) == 7
    after = record["results"]["human"]["student by speech, after"]
    assert table["student by speech, after"][1] == f"{after['kl8']:.2f}" and after["kl8"] > 0
    mean, low, high = record["differences"]["human: control: audio left out"]["kl8"]
    control = record["results"]["human"]["control: audio left out"]
    assert mean == pytest.approx(sum(after["kl8_rows"]) / 4 - sum(control["kl8_rows"]) / 4) and low <= mean <= high
    assert f"| control: audio left out | {mean:+.2f} [{low:+.2f}, {high:+.2f}] |" in capsys.readouterr().out
    assert (tmp_path / "out/report.png").stat().st_size > 5000
