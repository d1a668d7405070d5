"""tools/compare.py: its tables say what its records hold."""
import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import compare


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory):
    """One report on two sets of questions and one about the sound, by the untrained and by a spoilt student."""
    root = tmp_path_factory.mktemp("compare")
    sets = [tiny.manifest(root / name, 6, seed=seed) for seed, name in enumerate(("heard", "human"))]
    sounds = tiny.manifest(root / "voices", 4, prompt=None, response="Fast.", kind=lambda i: ("rate", "sex")[i % 2])
    compare.main(compare.get_args([
        "--teacher", tiny.llm, "--start", tiny.student, "--base", tiny.student_folder, "--distilled", tiny.student_folder,
        "--max-new-tokens", "3", "--device", "cpu", "--data", *map(str, sets), "--sounds", str(sounds), "--out", str(root / "out")]))
    return root / "out", json.loads((root / "out/report.json").read_text())


def test_the_table_has_every_condition_and_the_records_means(report):
    out, record = report
    lines = (out / "report.md").read_text().splitlines()
    assert lines[0] == "|  | KL8, heard | KL8, human | topic recall, human | sounds right, voices |"
    table = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[2:10]}
    assert list(table) == list(record["results"]["human"]) and len(table) == 8
    for label, cells in table.items():
        rows = record["results"]["human"][label]["kl8_rows"]
        assert cells[1] == f"{sum(rows) / 6:.2f}"
    assert table["teacher by text"][0] == "0.00" and float(table["base by speech"][0]) > 0
    assert (out / "report.png").stat().st_size > 5000


def test_damage_by_speech_is_paired_with_the_cascade(report):
    _, record = report
    of = record["results"]["heard"]
    mean, low, high = record["damage"]["heard"]["base: damage by speech"]
    differences = [a - b for a, b in zip(of["base by speech"]["kl8_rows"], of["cascade"]["kl8_rows"])]
    assert mean == pytest.approx(sum(differences) / 6) and low <= mean <= high
    text = record["damage"]["heard"]["base: damage by text"][0]
    assert text == pytest.approx(0, abs=1e-6)  # its LLM is the teacher, nothing was forgotten


def test_the_controls_hear_nothing_or_another_clip(report):
    _, record = report
    of = record["results"]["human"]
    by_speech, silent, other = (of[label]["kl8_rows"] for label in ("distilled by speech", compare.SILENT, compare.OTHER))
    assert all(a != b and a != c and b != c for a, b, c in zip(by_speech, silent, other))
    assert len(set(silent)) > 1  # the same prompt, but each question's own answer


def test_two_sets_of_one_name_are_refused(capsys):
    with pytest.raises(SystemExit):
        compare.get_args(["--base", "b", "--distilled", "d", "--out", "x", "--data", "human/train.jsonl", "human/heldout.jsonl"])
    assert "two files in folders of one name" in capsys.readouterr().err


def test_intervals_draw_prompts_with_all_their_clips():
    """Two clips of a prompt are no two samples: the interval is that of the prompts."""
    values, prompts = [0, 0, 1, 1, 1, 0], ["a", "a", "b", "b", "c", "c"]
    assert compare.interval(values, prompts, 3) == compare.vb.interval([0, 1, 0.5], 3)
    assert compare.interval(values[:5], prompts[:5], 3)[0] == pytest.approx(0.6)  # a mean over values, not over prompts
    assert compare.prompt_of({"prompt": None, "id": "heard/x-take2-sex"}) == compare.prompt_of({"prompt": None, "id": "heard/x-rate"})


def test_sounds_are_right_where_the_answer_is_word_for_word(report):
    _, record = report
    answers = record["sounds"]["voices"]["base by speech"]
    assert len(answers) == 4 and all(right == (answer.strip() == "Fast.") for _, right, answer, _ in answers)


def test_each_question_has_its_own_kl_also_where_one_comes_twice(tiny):
    """Two takes of a prompt are one question by text, and another set may ask it again."""
    import model as m
    student, (teacher, _) = m.load_student(str(tiny.student_folder)), m.load_llm(tiny.llm)
    with torch.no_grad():
        student.llm.model.norm.weight.mul_(1.5)
    questions, nothing = [], torch.zeros(0, student.config.whisper["d_model"])
    for ids in ([3, 4, 5], [3, 4, 5], [6, 7], [8, 9, 10, 11]):
        item = {"answer": [12, 13], "teacher_ids": ids}
        questions.append(compare.Question({**item, "s2t": m.Prompt(ids, [], nothing, nothing, [])}))
        questions[-1].item["taught"] = compare.train_kd.teacher_rows(teacher, [item])[0]
    prompts, known = [q.by_speech for q in questions], {}
    alone = [compare.kl8(student, teacher, [p], [q], {})[0] for p, q in zip(prompts, questions)]
    for _ in range(2):
        assert compare.kl8(student, teacher, prompts, questions, known) == pytest.approx(alone, rel=1e-4)
    assert len(known) == len(set(alone)) == 3
