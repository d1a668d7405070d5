"""tools/result_data.py, run_results.py, measure_result.py, plot_results.py: the result, on tiny models and a few rows."""
import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, sound

sys.path.insert(0, str(ROOT / "tools"))
import eval_voicebench as vb
import measure_result
import plot_results
import result_data
import run_results
import synth_speech
import train_kd

EASY = [json.loads(line) for line in open(ROOT / "tools/easy_questions.jsonl")]
RESULTS = ROOT / "results/result"


# ---- questions ----

def test_easy_questions_are_short_unlike_others_and_do_not_hold_their_answers():
    human = {json.loads(line)["prompt"] for line in open(ROOT / "tools/questions.jsonl")}
    assert len(EASY) == len({row["prompt"] for row in EASY}) >= 300
    for row in EASY:
        assert set(row) == {"prompt", "reference"} and row["prompt"] not in human and row["prompt"].endswith("?")
        assert row["reference"] and all(0 < len(answer.split()) <= 2 for answer in row["reference"]), row
        assert not vb.qa_match(row["prompt"], row["reference"]), row
        assert synth_speech.unspeakable(row["prompt"], 20) is None


def test_the_written_questions_to_train_on_share_nothing_with_those_to_measure_on():
    options = synth_speech.get_args(["--input", "x", "--exclude", str(ROOT / "tools/questions.jsonl"), "--max-words", "18", "--out", "x"])
    rows = synth_speech.m.json_lines(ROOT / "tools/train_questions.jsonl", synth_speech.to_row)
    kept, drops = synth_speech.choose(rows, options)
    assert len(kept) == 36 and not drops


def test_the_split_is_drawn_by_the_prompt_alone():
    splits = [result_data.split_of(row["prompt"]) for row in EASY]
    assert 0.2 < splits.count("dev") / len(splits) < 0.3 and set(splits) == {"dev", "test"}
    assert [result_data.split_of(p) for p in ("What is the capital of France?", "How many days are in a week?")] == [
        "test", "test"]
    assert result_data.split_of("a") == result_data.split_of("a")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Small files in the data sets' own forms -> arguments."""
    monkeypatch.setattr(result_data, "NQ_TRAIN", 8)
    monkeypatch.setattr(result_data, "SPARE", 1)
    monkeypatch.setattr(result_data, "ALL_TEST", 3)
    web = [{"qId": f"w{k}", "qText": f"who founded the town number {k} of the north?", "answers": ["Ada", "Ada Smith"]} for k in range(12)]
    web[0] = {"qId": "w0", "qText": "is Ada the name of Ada?", "answers": ["Ada"]}
    nq = [{"question": f"which river runs beside hill number {k}", "answer": ["Po"]} for k in range(14)]
    (tmp_path / "web.json").write_text(json.dumps(web))
    (tmp_path / "nq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nq))
    (tmp_path / "easy.jsonl").write_text(json.dumps({"prompt": "What is two plus two?", "reference": ["4"]}) + "\n")

    def arguments(*more):
        words = ["--webquestions", tmp_path / "web.json", "--nq", tmp_path / "nq.jsonl", "--easy", tmp_path / "easy.jsonl",
                 "--heldout", 4, "--prompts", 6, "--out", tmp_path / "out", *more]
        return ["questions", *map(str, words)]
    return arguments


def test_what_is_held_out_is_never_trained_on(files):
    train, candidates, drops = result_data.draw(result_data.get_args(files()))
    assert len(train) == 8  # 6 prompts, and one of each engine for sounds
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in candidates}
    held = [row["id"] for row in candidates if row["id"].startswith("nq")]
    assert held == [f"nq-{k:06d}" for k in range(9, 15)]  # rows 9 to 14 of the file
    assert all(int(row["id"][-6:]) <= 8 for row in train if row["id"].startswith("nq"))
    assert "Which river runs beside hill number 9?" in {row["prompt"] for row in candidates}
    assert [row["reference"] for row in candidates if row["id"].startswith("webq")][0] == ["Ada", "Ada Smith"]


def test_a_question_that_holds_its_answer_is_left_out_and_listed(files):
    args = result_data.get_args(files("--heldout", "11"))
    _, candidates, drops = result_data.draw(argparse.Namespace(**{**vars(args), "prompts": 2}))
    found = [drop["prompt"] for drop in drops if drop["reason"] == "answer stands in the question"]
    assert found == ["Is Ada the name of Ada?"] and found[0] not in {row["prompt"] for row in candidates}


def answered(count):
    rows = []
    for k in range(count):
        prompt = f"Question {k}?"
        rows.append({"id": f"q-{k}", "prompt": prompt, "right": k % 3 == 0, "response": "Yes.", "split": result_data.split_of(prompt)})
    return rows


def test_the_retention_set_is_what_the_teacher_answers_right():
    rows = answered(60)
    chosen = result_data.choose_sets(rows, least=20)
    assert {row["id"] for row in chosen if "retention" in row["sets"]} == {f"q-{k}" for k in range(0, 60, 3)}
    more = answered(400)
    chosen = result_data.choose_sets(more, least=20)
    drawn = [row for row in chosen if "all" in row["sets"]]
    assert [sum(row["split"] == split for row in drawn) for split in ("test", "dev")] == [200, 67]
    assert {row["right"] for row in drawn} == {True, False}
    with pytest.raises(ValueError, match="answers 20 of 60 candidates right, expected 21 or more: hold out more"):
        result_data.choose_sets(answered(60), least=21)


def test_the_teacher_is_asked_once_and_its_answers_are_kept(files, tiny, monkeypatch):
    args = result_data.get_args(files("--teacher", tiny.llm, "--least", "1", "--batch-size", "32", "--device", "cpu"))
    monkeypatch.setattr(vb, "qa_match", lambda response, reference: "two" in response)  # of a random model nothing is right
    monkeypatch.setattr(result_data.vb, "qa_match", lambda response, reference: len(response) % 2 == 0 and "?" not in response)
    result_data.before_speech(args)
    first = (Path(args.out) / "questions.jsonl").read_bytes()
    rows = [json.loads(line) for line in first.splitlines()]
    assert {"id", "prompt", "reference", "response", "finish", "right", "split", "sets"} == set(rows[0])
    asked = [json.loads(line) for line in open(Path(args.out) / "ask-unheard.jsonl")]
    assert {row["id"] for row in asked} == {row["id"] for row in rows if row["right"]}
    assert len(open(Path(args.out) / "train-piper.jsonl").readlines()) == 4
    monkeypatch.setattr(synth_speech, "load_teacher", lambda args: pytest.fail("asked again"))
    result_data.before_speech(args)
    assert (Path(args.out) / "questions.jsonl").read_bytes() == first


@pytest.mark.parametrize("line, said", [
    ('{"question": "who sang it"}', "nq.jsonl:1: {\"question\": \"who sang it\"}: expected qText, question or prompt, and a list"),
    ('{"question": "who sang it", "answer": []}', "nq.jsonl:1"), ('{"question": " ", "answer": ["Po"]}', "nq.jsonl:1"),
    ('{"question": "who", "answer": "Po"}', "1 questions, expected 9 or more"), ("no JSON", "nq.jsonl:1: not JSON")])
def test_bad_questions_are_one_line(files, tmp_path, capsys, line, said):
    (tmp_path / "nq.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError) as error:
        result_data.draw(result_data.get_args(files()))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_recordings_are_copied_with_the_sex_of_known_readers(tmp_path):
    import soundfile
    rows = []
    for name in ("speech/ljspeech/LJ-1.wav", "speech/librispeech/1272-1.wav", "speech/harvard_x/a.wav", "speech/fsdd/0.wav"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sound(0.5).numpy(), 16_000)
        rows.append({"path": name, "text": "THE COAT"})
    (tmp_path / "speech/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = argparse.Namespace(speech=str(tmp_path / "speech"), out=str(tmp_path / "out"))
    result_data.copy_recordings(args)
    repeated = train_kd.read_manifest(tmp_path / "out/recordings/repeated.jsonl")
    sexes = train_kd.read_manifest(tmp_path / "out/recordings/sounds.jsonl")
    assert len(repeated) == 3 and [(row["kind"], row["response"]) for row in sexes] == [("woman", "Woman."), ("man", "Man.")]
    (tmp_path / "speech/manifest.jsonl").write_text(json.dumps({"path": "speech/ljspeech/none.wav", "text": "a"}))
    with pytest.raises(ValueError, match="manifest.jsonl:1: audio file .* not found"):
        result_data.copy_recordings(args)


# ---- measuring ----

def test_noise_is_so_many_db_below_the_voice_and_always_the_same():
    voice = 0.1 * sound(2)
    mixed = measure_result.noisy(voice, 10, seed=3)
    noise = mixed - voice
    assert 10 * torch.log10(voice.square().mean() / noise.square().mean()) == pytest.approx(10, abs=0.1)
    assert torch.equal(mixed, measure_result.noisy(voice, 10, seed=3)) and not torch.equal(mixed, measure_result.noisy(voice, 10, seed=4))
    assert measure_result.noisy(10 * voice, 0, seed=3).abs().max() <= 1


def test_right_and_wrong_go_to_the_sets_of_each_question():
    known = {"a": {"reference": ["Paris"], "right": True, "sets": ["retention", "all"]},
             "b": {"reference": ["4"], "right": True, "sets": ["retention"]},
             "c": {"reference": ["Po"], "right": False, "sets": ["all"]}}
    answers = {"text": {"a": "It is Paris.", "b": "five", "c": "the Po"}, "heard": {"a": "Rome", "b": "four", "c": "no"},
               "unheard": {"a": "paris", "b": "no"}}
    right, candidates = measure_result.grade(answers, known)
    assert candidates == {"questions": 3, "teacher": ["a", "b"], "text": ["a", "c"]}
    assert right == {
        "retention": {"text": {"a": 1, "b": 0}, "heard": {"a": 0, "b": 1}, "unheard": {"a": 1, "b": 0}},
        "all": {"teacher": {"a": 1, "c": 0}, "text": {"a": 1, "c": 1}, "heard": {"a": 0, "c": 0}}}


def test_mrr_pairs_what_is_said_to_one_question():
    every = {"teacher": {str(k): k % 2 for k in range(40)}, "heard": {str(k): k % 2 for k in range(39, -1, -1)}}
    record = {"right": {"retention": {"text": {"1": 1}, "heard": {"1": 1}}, "all": every}, "divergences": {}, "controls": {}, "topics": {},
              "sounds": {}, "candidates": {"questions": 2, "teacher": ["1"], "text": ["1"]}}
    assert measure_result.summary_of(record, 0)["MRR"] == [1, 1, 1, 40]  # alike on each question: no draw of them changes that


def test_words_that_are_wrong_are_counted_without_case_and_marks():
    assert measure_result.wrong_words(["MEND THE COAT", "Go out"], ["Mend the coat.", "Go up!"]) == 0.2


# ---- all of it, on tiny models ----

@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    """What tools/result_data.sh would have made."""
    folder = tmp_path_factory.mktemp("result") / "data"
    answer = {"response": lambda i: ("It is Paris.", "Four, I think.")[i % 2], "reference": lambda i: ("Paris", "4")[i % 2]}
    kinds = {"prompt": None, "instruction": lambda i: ("Fast or slow?", "Man or woman?")[i // 2 % 2],
             "kind": lambda i: ("rate", "sex")[i // 2 % 2], "response": lambda i: ("Fast.", "Slowly.", "Man.", "Woman.")[i % 4]}
    transcripts = {"prompt": None, "instruction": "Repeat.", "response": "Yes."}
    for engine in ("piper", "espeak"):
        tiny.manifest(folder / engine, 4, name="both-train", **answer)
        tiny.manifest(folder / engine, 4, name="sounds", seed=1, **kinds)
        tiny.manifest(folder / engine, 4, name="transcripts", seed=2, **transcripts)
        tiny.manifest(folder / engine, 4, name="sounds-heldout", seed=3, **kinds)
    for seed, name in enumerate(("heard", "unheard", "human"), 4):
        tiny.manifest(folder / name, 6, seed=seed, id=lambda i: f"q-{i}", prompt=lambda i: f"What is the capital of number {i}?",
                      response=answer["response"])
    tiny.manifest(folder / "unheard-sounds", 4, name="sounds", seed=7, **kinds)
    tiny.manifest(folder / "recordings", 2, name="repeated", seed=8, prompt=None, instruction="Repeat what you hear.", kind="repeated")
    tiny.manifest(folder / "recordings", 2, name="sounds", seed=9, prompt=None, instruction="Man or woman?", response="Man.", kind="man")
    rows = []
    for i in range(6):
        rows.append({"id": f"q-{i}", "prompt": f"What is the capital of number {i}?", "reference": ["Paris", "4"], "right": i < 4,
                     "split": "test", "sets": ["retention", "all"] if i < 4 else ["all"]})
    result_data.write_rows(folder / "questions.jsonl", rows)
    return folder


@pytest.fixture
def drive(tiny, data, monkeypatch):
    """drive(OUT, *options) -> exit code; the scripts that it calls run in this process, and are listed in drive.calls."""
    def call(words, log):
        script, *words = words
        module = {"train_kd.py": train_kd, "measure_result.py": measure_result}[Path(script).name]
        run.calls.append((Path(script).stem, Path(words[words.index("--out") + 1]).name))
        if run.calls[-1][1] in run.breaks:
            raise RuntimeError("exit code 2: train_kd.py: loss nan in step 3")
        Path(log).touch()
        module.main(module.get_args([*words, "--device", "cpu"]))

    def run(out, *options, folder=data):
        run.calls.clear()
        words = ["--data", folder, "--out", out / "out", "--results", out / "results", "--teacher", tiny.llm, "--student", tiny.student,
                 "--base-steps", 1, "--max-steps", 1, "--batch-size", 2, "--sound-batch-size", 2, "--limit", 4, *options]
        return run_results.main(run_results.get_args([str(word) for word in words]))

    run.calls, run.breaks = [], set()
    monkeypatch.setattr(run_results, "call", call)
    monkeypatch.setattr(run_results.signal, "signal", lambda *_: None)
    return run


def test_runs_are_done_once_fail_alone_and_are_made_again_when_their_rows_change(drive, data, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    drive.breaks = {"R1"}
    runs = ["--only", "start", "base", "R1", "R6"]
    assert drive(tmp_path, *runs, folder=folder) == 1
    assert drive.calls == [("measure_result", "start"), ("train_kd", "base"), ("measure_result", "base"), ("train_kd", "R1"),
                           ("train_kd", "R6"), ("measure_result", "R6")]
    results = tmp_path / "results"
    assert (results / "R1/failed.txt").read_text() == "exit code 2: train_kd.py: loss nan in step 3\n"
    assert "failed: R1: exit code 2: train_kd.py: loss nan in step 3" in capsys.readouterr().out
    for name in ("command.txt", "args.json", "log.jsonl", "measured.json", "answers.jsonl"):
        assert (results / "R6" / name).stat().st_size > 0
    assert not list((tmp_path / "out").glob("*/ckpt-*"))  # they are large
    command = (results / "R6/command.txt").read_text()
    assert command.startswith("python train_kd.py --teacher") and "--labels" not in command and "/sounds.jsonl" in command

    drive.breaks = set()  # what is done stays, what failed is tried again
    assert drive(tmp_path, *runs, folder=folder) == 0
    assert drive.calls == [("train_kd", "R1"), ("measure_result", "R1")] and not (results / "R1/failed.txt").exists()
    assert drive(tmp_path, *runs, folder=folder) == 0 and drive.calls == []

    path = folder / "piper/both-train.jsonl"
    path.write_text(path.read_text().replace("It is Paris.", "It is Rome."))
    assert drive(tmp_path, "--only", "base", folder=folder) == 0
    assert drive.calls == [("train_kd", "base"), ("measure_result", "base")]

    plot_results.main(plot_results.get_args(["--results", str(results)]))
    table = (results / "table.md").read_text().splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table[2:table.index("")]}
    assert list(rows) == ["teacher", "cascade", "base", "R1", "R6"]
    assert "R3 (S2T, response, CE) not run" in table[table.index("") + 1]
    assert all(len(cells) == len(table[0].split(" | ")) for cells in rows.values())
    measured = json.loads((results / "R6/measured.json").read_text())
    for place, what in ((2, "candidates, text"), (4, "retention, heard")):
        assert rows["R6"][place] == "{:.2f} [{:.2f}, {:.2f}]".format(*measured["summary"][what])
    assert rows["R6"][-1] == "*77.19* |" and rows["teacher"][4] == rows["cascade"][2] == rows["cascade"][3] == "" != rows["cascade"][4]
    told = "| R6 | {:+.2f} [{:+.2f}, {:+.2f}] | ".format(*measured["summary"]["candidates, text - teacher"])
    assert len([line for line in table if line.startswith(told)]) == 1
    assert all((results / name).stat().st_size > 5000 for name in ("retention.png", "repair.png"))


def test_nothing_starts_without_a_base_or_without_data(drive, tmp_path, capsys):
    assert drive(tmp_path, "--only", "R4") == 1 and drive.calls == []
    assert "there is no base to start from" in (tmp_path / "results/R4/failed.txt").read_text()
    with pytest.raises(ValueError, match="both-train.jsonl: no such file; expected the folder that `bash tools/result_data.sh` writes"):
        drive(tmp_path, "--only", "base", folder=tmp_path)


def test_the_untrained_student_is_teacher_and_cascade_and_goes_on_where_it_was_stopped(tiny, data, tmp_path, capsys, monkeypatch):
    args = measure_result.get_args([tiny.student, "--data", str(data), "--teacher", tiny.llm, "--start", tiny.student, "--noise-db", "10", "5", "0",
                                    "--device", "cpu", "--out", str(tmp_path)])
    with monkeypatch.context() as broken:
        broken.setattr(measure_result, "topic_recall", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
        with pytest.raises(OSError, match="stopped"):
            measure_result.main(args)
    assert not (tmp_path / "measured.json").exists()
    asked = []
    answers_to = measure_result.answers_to
    monkeypatch.setattr(measure_result, "answers_to", lambda student, prompts, *most: asked.append(len(prompts)) or answers_to(student, prompts, *most))
    measure_result.main(args)  # goes on with topics: by text and by speech, and what is repeated
    assert asked == [6, 6, 2] and not (tmp_path / "parts.json").exists()
    shown = capsys.readouterr().err
    assert "100%" in shown and "divergences: 100%" in shown
    record = json.loads((tmp_path / "measured.json").read_text())
    assert record["summary"]["F, heard"][0] == pytest.approx(0, abs=1e-4) and record["sounds"] == {}
    assert record["summary"]["agreement, human, text"][0] == 1 and record["summary"]["KL8, heard, speech"][0] > 0
    assert set(record["right"]["retention"]) == {"text", "heard", "unheard", "10 dB", "5 dB", "0 dB"}
    assert record["summary"]["retention, text"][3] == 4 and record["summary"]["all, heard"][3] == 6
    known, text = (set(record["candidates"][who]) for who in ("teacher", "text"))
    value, low, high, count = record["summary"]["candidates, text - teacher"]
    assert record["candidates"]["questions"] == count == 6 and value == round((len(text) - len(known)) / 6, 4) and low <= value <= high
    assert measure_result.is_measured(args)
    rollouts = data / "piper/both-train-rollouts.jsonl"  # which tools/rollouts.py adds, and nothing here reads
    rollouts.touch()
    assert measure_result.is_measured(args)
    rollouts.unlink()
    for option in ("seed", "limit"):
        assert not measure_result.is_measured(argparse.Namespace(**{**vars(args), option: 5}))


@pytest.mark.parametrize("run, words", [
    ("R1", "--channels s2t --labels reference --kd-weight 0"), ("R2", "--channels s2t --labels reference --max-steps"),
    ("R3", "--channels s2t --kd-weight 0 --max-steps"), ("R4", "--channels s2t --max-steps"), ("R5", "--channels t2t --max-steps"),
    ("R8", "--ce-weight 0 --kd-weight 1 --temperature 1 --lora-rank 16 --max-steps"), ("R9", "sounds.jsonl --lora-rank 16 --max-steps"),
    ("R10", "--ce-weight 0 --kd-weight 1 --temperature 1 --max-steps"), ("lambda25", "--kd-weight 0.25 --ce-weight 0.75 --max-steps 100")])
def test_the_runs_differ_in_what_the_table_says_and_read_the_same_rows(data, run, words):
    args = run_results.get_args(["--data", str(data), "--out", "out/x", "--seed", "2"])
    assert args.results == "out/x/results"  # not what this repository shows
    commands = {name: " ".join(run_results.command_of(args, name)) for name in ("R6", run)}
    assert words in commands[run] and f"--out out/x/{run}-seed2" in commands[run] and "out/x/base-seed2/last" in commands[run]
    rows = [command.split("--data ")[1].split(" --")[0] for command in commands.values()]
    assert rows[0] == rows[1] and "transcripts" not in rows[0]
    plans = []
    for command in commands.values():
        options = train_kd.get_args([*command.split()[2:]])
        train_rows = train_kd.read_rows(options)[0]
        plans.append([[train_rows[k]["id"] for part in step for k in part] for step in train_kd.plan_steps(train_rows, argparse.Namespace(
            **{**vars(options), "batch_size": 2, "global_batch_size": 2, "sound_batch_size": 2}))])
    assert plans[0] == plans[1] and len(plans[0]) == 100


def test_a_run_is_the_same_in_another_folder_and_on_another_computer(tiny, data, tmp_path, monkeypatch):
    """Made again it would be deleted first."""
    keys = []
    for folder, amx in (("a", False), ("./a", False), ("b", True)):
        monkeypatch.setattr(run_results, "has_amx", lambda amx=amx: amx)
        args = run_results.get_args(["--data", str(data), "--out", str(tmp_path / folder), "--student", tiny.student])
        keys.append(run_results.key_of(args, "base"))
    assert len(set(keys)) == 1 and run_results.key_of(argparse.Namespace(**{**vars(args), "save_every": 3}), "base") == keys[0]
    assert run_results.key_of(argparse.Namespace(**{**vars(args), "base_steps": 3}), "base") != keys[0]
    assert "--max-steps 25 " in " ".join(run_results.command_of(args, "steps25"))
    gentle = argparse.Namespace(**{**vars(args), "base_lr": 3e-5})
    assert "--lr-llm 3e-05 " in " ".join(run_results.command_of(gentle, "base"))
    assert run_results.command_of(gentle, "R6") == run_results.command_of(args, "R6")
    best = " ".join(run_results.command_of(args, "R8"))
    assert "--lora-rank 16 --max-steps 100 " in best and "--lr-llm 0.001 " in best and "--max-bad-rows" not in best
    args.max_bad_rows = 2
    assert "--max-bad-rows 2" in " ".join(run_results.command_of(args, "R6"))


def test_another_teacher_answers_what_is_spoken_already(tiny, data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    for engine in result_data.ENGINES:
        shutil.copyfile(folder / engine / "both-train.jsonl", folder / engine / "train.jsonl")
    asked = result_data.read_rows(folder / "questions.jsonl")
    never = {**asked[0], "id": "q-9", "prompt": "Was this spoken?", "sets": []}
    result_data.write_rows(folder / "questions.jsonl", [*({**row, "sets": row["sets"][:1]} for row in asked), never])
    monkeypatch.setattr(result_data.synth, "answer", lambda teacher, tokenizer, rows, most: [
        {"id": row["id"], "response": f"To {row['prompt'][-2:]} I say 4.", "finish": "stop"} for row in rows])
    monkeypatch.setattr(result_data.vb, "qa_match", lambda response, reference: "To 0?" in response or "To 5?" in response)
    args = result_data.get_args(["answers", "--teacher", tiny.llm, "--out", str(folder), "--device", "cpu"])
    result_data.answer_again(args)
    first = (folder / "questions.jsonl").read_bytes()
    result_data.answer_again(args)
    assert (folder / "questions.jsonl").read_bytes() == first
    rows = result_data.read_rows(folder / "questions.jsonl")
    assert [row["id"] for row in rows] == [f"q-{i}" for i in range(6)]  # what no clip asks is gone
    assert [row["right"] for row in rows] == [True, False, False, False, False, True]
    assert [row["sets"][1:] for row in rows] == [["retention"], [], [], [], ["all"], ["retention", "all"]]
    before, after = (result_data.read_rows(path / "heard/train.jsonl") for path in (data, folder))
    assert [row["response"] for row in after] == [f"To {i}? I say 4." for i in range(6)]
    assert [row["audio"] for row in after] == [row["audio"] for row in before]
    assert len(result_data.read_rows(folder / "espeak/both-train.jsonl")) == 4
    assert "of 6 spoken questions the teacher answers 2 right" in capsys.readouterr().out


def test_a_part_of_the_prompts_is_among_more_of_them_with_all_its_clips(tiny, tmp_path, monkeypatch):
    for engine in result_data.ENGINES:
        tiny.manifest(tmp_path / engine, 12, name="train", prompt=lambda i: f"Question {i // 2}?", response="Yes.", reference="yes")
        (tmp_path / engine / "sounds.jsonl").touch()
    monkeypatch.setattr(result_data, "PARTS", (4, 8, 500))
    result_data.after_speech(result_data.get_args(["both", "--out", str(tmp_path)]))
    rows = {}
    for part in ("", "-4", "-8"):
        rows[part] = [row["id"] for row in result_data.read_rows(tmp_path / f"espeak/both-train{part}.jsonl")]
    assert [len(ids) for ids in rows.values()] == [12, 4, 8]  # two clips of 2 and of 4 prompts; the other engine has as many
    assert set(rows["-4"]) < set(rows["-8"]) < set(rows[""])
    assert not list(tmp_path.glob("*/both-train-500.jsonl"))  # there are not so many
    monkeypatch.setitem(run_results.PROMPTS, "prompts500", 4)
    args = run_results.get_args(["--data", str(tmp_path), "--out", "x", "--max-steps", "7"])
    command = " ".join(run_results.command_of(args, "prompts500"))
    assert f"{tmp_path}/espeak/both-train-4.jsonl" in command and "--lora-rank 16 --max-steps 7 " in command and "--lr-llm 0.001 " in command


def test_runs_go_side_by_side_and_wait_for_the_base_of_their_seed(tmp_path, monkeypatch, capsys):
    """Each is a process of this script; a stand-in writes when it began, base before it has been measured."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(
        "import sys, time; from pathlib import Path\n"
        "seed, run = (sys.argv[len(sys.argv) - sys.argv[::-1].index(f'--{name}')] for name in ('seeds', 'only'))\n"
        "out = Path(sys.argv[sys.argv.index('--out') + 1], run + ('' if seed == '0' else f'-seed{seed}'))\n"
        "assert sys.argv[len(sys.argv) - sys.argv[::-1].index('--jobs')] == '1'\n"
        "base = out.parent / out.name.replace(run, 'base') / 'last/config.json'\n"
        "assert run in ('start', 'base') or base.exists(), 'begun before its base'\n"
        "(out / 'last').mkdir(parents=True)\n"
        "(out / 'last/config.json').touch()\n"
        "for _ in range(600):  # base is measured until R6 has ended\n"
        "    time.sleep(0.1 * (run == 'base' and not (out.parent / out.name.replace('base', 'R6') / 'ended').exists()))\n"
        "(out / 'ended').touch()\n"
        "assert run != 'base' or (out.parent / out.name.replace('base', 'R6') / 'ended').exists(), 'R6 waited for what is measured'\n"
        "sys.exit(run == 'R1')\n")
    words = ["--data", "d", "--out", str(tmp_path / "out"), "--jobs", "3", "--seeds", "0", "1", "--only", "R6", "R1", "base", "start"]
    monkeypatch.setattr(run_results, "__file__", str(stand_in))
    monkeypatch.setattr(sys, "argv", ["run_results.py", *words])
    monkeypatch.setattr(run_results.signal, "signal", lambda *_: None)
    assert run_results.main(run_results.get_args(words)) == 1
    assert "5 of 7 runs are there; failed: [(0, 'R1'), (1, 'R1')]" in capsys.readouterr().out
    assert sorted(path.parent.name for path in tmp_path.glob("out/*/ended")) == ["R1", "R1-seed1", "R6", "R6-seed1", "base", "base-seed1", "start"]


# ---- what fails is told ----

@pytest.mark.parametrize("code, told", [("print('first'); print('the reason'); raise SystemExit(2)", "exit code 2: the reason"),
                                        ("raise SystemExit(3)", "exit code 3: it said nothing")])
def test_a_script_that_fails_is_told_by_its_last_line(tmp_path, code, told):
    with pytest.raises(RuntimeError, match=told):
        run_results.call(["-c", code], tmp_path / "log")
    with pytest.raises(SystemExit):  # stopped from outside: the driver stops as well
        run_results.call(["-c", "raise SystemExit(143)"], tmp_path / "log")


def test_who_stops_the_driver_stops_the_run_which_keeps_what_it_has(tmp_path):
    child = ("import signal, sys, time; signal.signal(15, lambda *_: (open('ended', 'w').close(), sys.exit(0))); "
             "open('begun', 'w').close(); time.sleep(60)")
    code = (f"import signal, sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import run_results; from pathlib import Path; "
            f"signal.signal(15, run_results.m.stop_now); run_results.call(['-c', {child!r}], Path('log'))")
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (tmp_path / "begun").exists() or driver.poll() is not None:
            break
        time.sleep(0.05)
    driver.terminate()
    assert driver.wait(60) == 143 and (tmp_path / "ended").exists() and "the same command goes on" in driver.stderr.read()


def test_the_data_script_says_what_it_needs():
    result = subprocess.run(["bash", str(ROOT / "tools/result_data.sh")], capture_output=True, text=True)
    assert result.returncode == 2 and "questions needs --webquestions FILE and --nq FILE" in result.stderr


@pytest.mark.parametrize("script, words, said", [
    ("run_results.py", ["--data", "nowhere", "--out", "x"], "both-train.jsonl: no such file"),
    ("measure_result.py", ["nobody", "--data", "nowhere", "--out", "x"], "questions.jsonl: no such file"),
    ("plot_results.py", ["--results", "nowhere"], "nowhere: no such folder")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, script, words, said):
    result = subprocess.run([sys.executable, str(ROOT / "tools" / script), *words], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and said in result.stderr and result.stderr.startswith(script)


# ---- tables ----

def test_repair_is_the_share_of_bases_loss_that_is_made_good():
    bound, base, run = ({str(k): value for k, value in enumerate(values)} for values in ([1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]))
    assert plot_results.repaired(run, base, bound)[0] == pytest.approx(2 / 3)
    assert plot_results.repaired(bound, base, bound)[0] == 1 and plot_results.repaired(base, base, bound)[0] == 0
    assert plot_results.repaired(run, bound, bound) is None  # nothing was lost
    assert plot_results.change(run, base)[0] == pytest.approx(0.5)
    assert plot_results.change({"0": 1, "9": 5}, {"0": 0, "8": 7})[0] == 1  # only questions that both have


def test_sounds_are_compared_row_by_row_and_drawn_by_prompt():
    before = {"sounds": {"heard": {"rate": [1, 0, 0, 0]}, "recordings": {"man": [1]}}}
    after = {"sounds": {"heard": {"rate": [1, 1, 0, 1]}, "recordings": {"man": [0]}}}
    mean, low, high = plot_results.sounds_change(after, before)
    assert (mean, low, high) == (0.5, 0.5, 0.5)  # of each prompt one of two clips more: no draw of prompts changes that


def a_record(right, kl=0.0):
    """Of one student: right or not on two questions, KL8 on one."""
    of = dict(zip("ab", right))
    told = {"kl8": [kl]}
    return {"right": {"retention": dict.fromkeys(plot_results.WAYS, of)}, "divergences": {"human": {"ids": ["h"], "text": told, "speech": told}},
            "summary": {f"retention, {way}": [sum(right) / 2, 0.0, 1.0, 2] for way in plot_results.WAYS}}


def test_differences_are_of_the_means_of_all_seeds_that_both_runs_have():
    results = {"R3": a_record([0, 0]), "R4": a_record([1, 0], 0.5), "R6": a_record([1, 1]), "R4-seed1": a_record([0, 0], 1.5),
               "R6-seed1": a_record([0, 0], 0.5), "R6-seed2": a_record([1, 0]), "R10": a_record([0, 0])}
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in plot_results.pairs_table(results)}
    assert rows["| R6 - R4"][:2] == ["0, 1", "+0.25 [+0.00, +0.50]"]  # question b by half, a by nothing
    assert rows["| R6 - R4"][-1] == "-0.75 [-0.75, -0.75] |"  # the mean over two seeds of KL8
    assert rows["| R4 - R3"][:2] == ["0", "+0.50 [+0.00, +1.00]"] and rows["| R10 - R6"][0] == "0" and rows["| R6 - R1"][0] == "not run"


def test_runs_stand_beside_those_of_another_folder():
    here = {"R6": a_record([1, 1], 0.5), "R8": "not run", "R10": a_record([1, 1])}
    there = {"R6": a_record([0, 1], 1.5), "R6-seed1": a_record([0, 0], 0.5), "R8": a_record([1, 1])}
    lines = plot_results.beside_table(here, there, "results/other")
    assert len(lines) == 3 and lines[2].startswith("| R6 - results/other | 0, 1 | +0.75 [+0.50, +1.00] |")
    assert lines[2].endswith("| -0.50 [-0.50, -0.50] |")


def test_curves_are_drawn_of_the_runs_that_are_there(tmp_path):
    results = {"base": a_record([0, 0]), "R6": a_record([1, 1]), "R8": a_record([1, 1]), "lambda100": "not run"}
    plot_results.draw_curves(results, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()  # one point is no curve
    for name in ("steps25", "prompts1000"):
        results[name] = a_record([1, 0])
    plot_results.draw_curves(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_runs_that_were_measured_otherwise_are_in_no_table(tmp_path):
    for name, limit in (("start", 0), ("base", 20)):
        (tmp_path / name).mkdir()
        options = {"split": "test", "limit": limit, "seed": 0, "device": "cpu", "teacher": "t", "start": "s"}
        (tmp_path / name / "measured.json").write_text(json.dumps({"options": options}))
        (tmp_path / name / "answers.jsonl").write_text('{"id": "a", "text": "Yes."}')
    with pytest.raises(ValueError, match="measured with limit 0 and 20; expected one for all"):
        plot_results.read_results(tmp_path)


def test_the_readme_shows_the_files_table():
    parts = (ROOT / "README.md").read_text().split("<!-- result -->")
    table = RESULTS / "table.md"
    if len(parts) > 1:
        assert len(parts) == 3 and parts[1].strip() == table.read_text().partition("\n\n")[0].strip()
    if table.exists():  # and the file what was measured
        assert table.read_text() == plot_results.to_text(plot_results.read_results(RESULTS))


def test_the_readme_tells_what_the_files_say():
    told = " ".join((ROOT / "README.md").read_text().split())
    rows = {}
    for folder in ("result", "result-4000"):
        for line in (ROOT / "results" / folder / "table.md").read_text().splitlines():
            cells = line.strip("| ").split(" | ")
            rows.setdefault((folder, cells[0], len(cells)), cells)
    right = {}
    for run in ("base", "R3", "R6", "R8"):
        for seed in ("", "-seed1", "-seed2"):
            record = json.loads((RESULTS / (run + seed) / "measured.json").read_text())["candidates"]
            right.setdefault(run, []).append(len(record["text"]))
    shown = {run: "{} ({}, {})".format(*right[run]) for run in ("R6", "R8")}
    assert (f"Of **all** {record['questions']:,} candidates base has {right['base'][0]} right, the teacher {len(record['teacher'])}, R3 {right['R3'][0]} "
            f"(other seeds: {right['R3'][1]}, {right['R3'][2]}), R6 {shown['R6']}, R8 {shown['R8']}:") in told
    for run, said in (("R3", "R3 repairs {} by text and {} heard"), ("R6", "R6 {} and {},"), ("R8", "**R8** {} and {} (goal: 80%)")):  # three seeds
        few = [sorted(int(share.strip("%")) for share in cell.split(", ")) for cell in rows["result", run, 8][-2:]]
        assert said.format(*(f"{shares[0]} to {shares[-1]}%" for shares in few)) in told
    pairs = {pair: rows["result", pair, 8][2] for pair in ("R4 - R3", "R6 - R4", "R2 - R1", "R10 - R6")}
    assert all(f"({pair} {value})" in told for pair, value in pairs.items())
    by_text, heard = rows["result-4000", "R6 - R3", 8][2:4]
    assert f"R6 - R3 is {by_text} by text, {heard} heard; R8 repairs {rows['result-4000', 'R8', 14][1]} by text" in told
    missed = (rows[folder, "R8", 9][3].split()[0] for folder in ("result", "result-4000"))
    assert "R8: {}; five times the prompts: {}".format(*missed) in told
