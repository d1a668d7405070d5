"""eval_voicebench.py: what it reads and refuses, its files and numbers; stopped or split, the same bytes."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import eval_voicebench as vb
import model as m
from conftest import QUESTIONS, ROOT, sound

sys.path.insert(0, str(ROOT / "tools"))
import divergence
import from_hub
import losses
import plot_voicebench
import score_parity

FILES = {"alpacaeval_full-test": 3, "commoneval-test": 2, "wildvoice-test": 2, "sd-qa-usa": 3,
         "mmsu-law": 2, "mmsu-physics": 4, "openbookqa-test": 5, "bbh-test": 4, "ifeval-test": 3, "advbench-test": 2}
CHOICES = ["The answer is A.", "B", "I cannot say which of them it is."]


def question(name, i):
    row = {"prompt": QUESTIONS[(7 * len(name) + 11 * i) % len(QUESTIONS)] + " é" * (i % 3)}
    if name.startswith(("sd-qa", "openbookqa", "mmsu")):
        row["reference"] = "Paris" if "sd-qa" in name else "ABCD"[i % 4]
    if name.startswith("bbh"):
        task = ("sports_understanding", "hyperbaton", "navigate", "web_of_lies")[i % 4]
        row |= {"id": f"{task}_{i}", "reference": "(B)" if i % 4 == 1 else "Yes"}
    if name.startswith("ifeval"):
        row |= {"key": i, "instruction_id_list": ["punctuation:no_comma"] * (i + 1), "kwargs": [{}] * (i + 1)}
    return row


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of questions over all subsets, with sounds of 0.3 to 1.2 s."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in FILES.items():
        rows = [{**question(name, i), "audio": f"{name}/{i}.flac"} for i in range(count)]
        write(folder / f"{name}.jsonl", rows)
        (folder / name).mkdir()
        for i, row in enumerate(rows):
            soundfile.write(folder / row["audio"], sound(0.3 + 0.1 * (7 * len(name) + 3 * i) % 0.9, i).numpy(), 16_000)
    return folder


@pytest.fixture(scope="module")
def student_folder(tiny, tmp_path_factory):
    """The tiny student, which has forgotten something of what its teacher knew."""
    student = m.load_student(tiny.student_folder)
    generator = torch.Generator().manual_seed(0)
    for parameter in student.llm.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    m.save_student(student, folder := tmp_path_factory.mktemp("student") / "my student")
    return folder


@pytest.fixture(scope="module")
def options(tiny, data, student_folder):
    """All but --out."""
    torch.set_num_threads(1)
    return [str(x) for x in ("--student", student_folder, "--teacher", tiny.llm, "--data", data, "--dtype", "float32",
                             "--device", "cpu", "--batch-size", 2, "--max-new-tokens", 12)]


def run(options, out, *more):
    return vb.main(vb.get_args([*options, "--out", str(out), *map(str, more)]))


@pytest.fixture(scope="module")
def reference(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    assert run(options, out) == 0
    return out


def report(out):
    return json.loads((out / "report.json").read_text())


def results(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def one_core():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


# ---- a run ----

def splits(data, subset):
    return [row for path in sorted(data.glob(f"{subset}-*.jsonl")) for row in read(path)]


def file_of(folder, role, subset, modality):
    """Of answers: between the model's name and the subset stand six characters of its weights' digest."""
    [path] = folder.glob(f"{role}-??????-{subset}-{modality}.jsonl")
    return path


def test_the_row_files_have_the_columns_of_the_data_and_the_response_in_its_order(reference, data):
    subsets = {name.rpartition("-")[0] for name in FILES}
    files = {}
    for role, modality in (("teacher-llm", "text"), ("student-my student", "text"), ("student-my student", "speech")):
        for subset in subsets:
            files[file_of(reference, role, subset, modality).name] = subset
    assert set(results(reference)) == {*files, "report.json", "report.md"}
    texts = set()
    for file, subset in files.items():
        rows, expected = read(reference / file), splits(data, subset)
        texts.add(tuple(row["response"] for row in rows))
        assert list(rows[0])[-1] == "response"
        for row, asked in zip(rows, expected, strict=True):
            del asked["audio"]
            assert row == {**asked, "response": row["response"]}
    assert len(texts) > len(subsets) * 2 and b"\\u00e9" in file_of(reference, "teacher-llm", "advbench", "text").read_bytes()


def test_the_answers_are_those_of_the_models(reference, options, data):
    args = vb.get_args([*options, "--out", "x"])
    student, (llm, tokenizer) = vb.load_model(args, "student"), vb.load_model(args, "teacher")
    rows = splits(data, "mmsu")
    for i, row in enumerate(rows):
        row |= {"audio": str(data / row["audio"]), "id": i}
    text = [{**row, "audio": None} for row in rows]
    taught = [answer["response"] for answer in vb.synth_speech.answer(llm, tokenizer, text, 12)]
    for role, modality, answers in (("student-my student", "speech", student.generate(rows, 12)),
                                    ("student-my student", "text", student.generate(text, 12)), ("teacher-llm", "text", taught)):
        assert [row["response"] for row in read(file_of(reference, role, "mmsu", modality))] == answers


def test_in_bfloat16_the_untrained_student_is_its_teacher(tiny, options):
    """RoPE's frequencies are not rounded: late tokens would stand elsewhere."""
    args = vb.get_args([*options, "--out", "x", "--dtype", "bfloat16", "--student", tiny.student, "--teacher", tiny.llm])
    student, (llm, _) = vb.load_model(args, "student"), vb.load_model(args, "teacher")
    ids = torch.arange(3, 403)[None]
    with torch.inference_mode():
        logits, expected = (of(ids).logits for of in (student.llm, llm))
    assert expected.dtype == torch.bfloat16 and torch.equal(logits, expected)


def test_f_and_m_are_those_of_a_direct_computation(reference, options, data, tmp_path, capsys):
    shutil.copytree(reference / ".stages", tmp_path / ".stages")  # has the teacher's answers
    args = vb.get_args([*options, "--out", str(tmp_path), "--subsets", "bbh"])
    divergence.main(args)
    student, (llm, tokenizer) = vb.load_model(args, "student"), vb.load_model(args, "teacher")
    sums = {"F": 0, "M": 0, "": 0}
    for row, answer in zip(read(data / "bbh-test.jsonl"), read(file_of(reference, "teacher-llm", "bbh", "text"))):
        said = vb.synth_speech.answer(llm, tokenizer, [row], 12)[0]
        assert said["response"] == answer["response"]
        text = answer["response"] + ("<|im_end|>" if said["finish"] == "stop" else "")
        ids = tokenizer(text, add_special_tokens=False).input_ids
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True,
                                               return_dict=False)
        with torch.no_grad():
            logits = llm(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
            head = student.llm.get_output_embeddings().weight
            chats = {"prompt": row["prompt"], "audio": None}, {"audio": str(data / row["audio"])}
            by_text, by_speech = [student([student.prompt(chat)], [ids]) @ head.T for chat in chats]
        sums[""] += len(ids)
        for key, p, q in (("F", logits, by_text), ("M", by_text, by_speech)):
            sums[key] += losses.forward_kl(student_logits=q, teacher_logits=p).item()
    entry = json.loads((tmp_path / "divergence.json").read_text())["subsets"]["bbh"]
    for key in ("F", "M"):
        assert entry[key][0] == pytest.approx(sums[key] / sums[""], rel=1e-3) and entry[key][0] > 0.01
        assert f"bbh              {key} {entry[key][0]:.3f} [" in capsys.readouterr().out or key == "M"


def test_models_of_other_tokenizers_are_not_compared_token_by_token(options, tmp_path, monkeypatch):
    def differ(*_):
        raise RuntimeError("teacher and student need one tokenizer")
    monkeypatch.setattr(divergence.train_kd, "check_pair", differ)
    with pytest.raises(RuntimeError, match="one tokenizer"):
        divergence.main(vb.get_args([*options, "--out", str(tmp_path), "--subsets", "bbh"]))


def test_limit_subsets_and_modality(options, tmp_path, capsys):
    assert run(options, tmp_path, "--limit", 2, "--subsets", "mmsu", "bbh", "--modality", "text", "--system", "Hm") == 0
    record = report(tmp_path)
    assert {name: entry["rows"] for name, entry in record["subsets"].items()} == {"mmsu": 2, "bbh": 2}
    assert "student speech" not in record["subsets"]["mmsu"] and record["options"]["system"] == "Hm"
    assert len(read(file_of(tmp_path, "teacher-llm", "mmsu", "text"))) == 2
    assert run(options, tmp_path / "b", "--subsets", "bbh", "--modality", "speech", "--teacher", "none") == 0
    assert [x for x in report(tmp_path / "b")["subsets"]["bbh"] if x in vb.SYSTEMS] == ["student speech"]
    assert "| bbh | 4 of 1000 |" in capsys.readouterr().out


def test_the_cascade_is_the_teacher_who_reads_what_whisper_hears(reference, options, tiny, data, tmp_path, capsys):
    """Its answers, files and scores; seconds stand in a file of their own, and what is done is not asked again."""
    more = ["--cascade", tiny.encoder, "--subsets", "mmsu", "bbh"]
    assert run(options, tmp_path, *more) == 0
    whisper = f"cascade-{Path(tiny.encoder).name}"
    assert {file_of(tmp_path, whisper, subset, "speech") for subset in ("mmsu", "bbh")} == {*tmp_path.glob("cascade-*")}
    (llm, tokenizer), rows = m.load_llm(tiny.llm), splits(data, "mmsu")
    heard = m.load_whisper(tiny.encoder).hear([m.load_audio(data / row["audio"]) for row in rows])
    asked = [{"id": i, "prompt": clip.text} for i, clip in enumerate(heard)]
    said = [answer["response"] for answer in vb.synth_speech.answer(llm, tokenizer, asked, 12)]
    assert [row["response"] for row in read(file_of(tmp_path, whisper, "mmsu", "speech"))] == said
    record, seconds = report(tmp_path), json.loads((tmp_path / "seconds.json").read_text())
    assert "cascade speech" in record["subsets"]["bbh"] and set(record["weights"]) == {"teacher", "student", "cascade"}
    for role in ("student", "cascade"):
        assert 0 < seconds[f"{role}, first token"] and 0 < seconds[f"{role}, whole answer"]
    assert seconds["rows"] == 5 and "whole answer" in capsys.readouterr().out
    files = results(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vb, "load_model", lambda *_: 1 / 0)
        assert run(options, tmp_path, *more) == 0 and results(tmp_path) == files
    plot_voicebench.draw(record, tmp_path / "report.png")
    files = [str(path) for path in tmp_path.glob("*-*.jsonl")]
    assert vb.main(vb.get_args(["--score-only", *files, "--out", str(tmp_path / "again")])) == 0
    assert report(tmp_path / "again")["subsets"] == record["subsets"]


def test_a_row_may_name_its_language(options, tiny, data, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(m.Whisper, "hear", lambda self, waveforms, language=None: waveforms and (heard.append(language) or 1 / 0))
    row = {**question("advbench", 0), "audio": "advbench-test/0.flac", "language": "de"}
    write(tmp_path / "advbench-test.jsonl", [row])
    shutil.copytree(data / "advbench-test", tmp_path / "advbench-test")
    for more in (["--modality", "speech", "--teacher", "none"], ["--modality", "text", "--cascade", tiny.encoder]):
        with pytest.raises(ZeroDivisionError):
            run(options, tmp_path / "out", "--data", tmp_path, *more)
    assert heard == [["de"], ["de"]]


def test_the_report_is_drawn(reference, tmp_path):
    plot_voicebench.draw(report(reference), tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


# ---- stopped, resumed, split ----

@pytest.mark.parametrize("seed", range(3))
def test_cut_anywhere_and_resumed_gives_the_same_bytes(reference, options, tmp_path, seed):
    rng, lines = random.Random(seed), 0
    (tmp_path / ".stages").mkdir()
    for path in (reference / ".stages").iterdir():
        content = path.read_bytes()
        lines += content.count(b"\n") if path.suffix == ".jsonl" else 0
        content = content if path.suffix == ".json" else content[:rng.randint(0, len(content))]
        (tmp_path / ".stages" / path.name).write_bytes(content)
    assert run(options, tmp_path) == 0
    assert results(tmp_path) == results(reference)
    again = [line for path in (tmp_path / ".stages").glob("*.jsonl") for line in read(path)]
    assert len(again) == lines  # nothing is there twice


def test_killed_and_started_again_gives_the_same_bytes(reference, options, tmp_path):
    command = [sys.executable, vb.__file__, *options, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=one_core)
    while process.poll() is None and not list(tmp_path.glob(".stages/student-*-text-*.0.jsonl")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "report.json").exists()
    assert run(options, tmp_path) == 0
    assert results(tmp_path) == results(reference)


def test_two_ranks_write_the_same_bytes_as_one(reference, options, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, vb.__file__, *options, "--out", str(tmp_path)], check=True, timeout=300,
                   preexec_fn=one_core)
    assert results(tmp_path) == results(reference)
    assert len(list(tmp_path.glob(".stages/student-bbh-speech-*.?.jsonl"))) == 2
    assert run(options, tmp_path) == 0 and results(tmp_path) == results(reference)  # one rank reads both files


def test_other_settings_weights_or_clips_are_asked_anew(options, tiny, data, tmp_path):
    """By content: another folder of the same weights and clips finds its answers, other bytes of the same length do not."""
    asked, load = [], vb.load_model

    def counting(args, role):
        asked.append(role)
        return load(args, role)

    copy, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    more = ["--data", copy, "--subsets", "advbench", "--teacher", "none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vb, "load_model", counting)
        assert (run(options, out, *more), asked) == (0, ["student"])
        assert (run(options, out, *more, "--data", data), asked) == (0, ["student"])  # nothing is asked
        for changed in ["--max-new-tokens", 11], ["--system", "Hm"], ["--limit", 1], ["--student", tiny.student_folder]:
            assert run(options, out, *more, *changed) == 0 and asked.pop(1) == "student" and len(asked) == 1
        soundfile.write(copy / "advbench-test/0.flac", sound(soundfile.info(copy / "advbench-test/0.flac").duration, 99).numpy(), 16_000)
        assert run(options, out, *more, "--modality", "speech") == 0 and asked == ["student"] * 2


def test_sigterm_loses_no_batch_that_is_answered(tmp_path):
    rows = [{"id": i, "prompt": "x" * (i % 4)} for i in range(10)]
    args = SimpleNamespace(out=tmp_path, dtype="float32", device="cpu", max_new_tokens=1, batch_size=3)

    def ask(batch):
        asked.append(len(batch))
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return [{"id": row["id"], "size": len(row["prompt"])} for row in batch]

    asked, before = [], signal.signal(signal.SIGTERM, m.stop_now)
    with pytest.raises(SystemExit) as ended:
        vb.answer_all(args, "a", rows, ask, "w")
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143 and asked == [3, 3]
    for row, record in zip(rows, vb.answer_all(args, "a", rows, ask, "w"), strict=True):
        assert record == {"id": row["id"], "size": len(row["prompt"])}
    assert asked == [3, 3, 3, 3, 1]


# ---- numbers ----

def test_intervals_are_paired():
    assert vb.interval([2.0] * 5) == (2.0, 2.0, 2.0)
    value, *draws = vb.bootstrap([[[0, 1]], [[1, 1]]])
    assert value == 0.5 and vb.interval([0, 1]) == (0.5, 0.0, 1.0)
    assert np.mean(np.array(draws) == 0.5) == pytest.approx(0.5, abs=0.03)  # of two rows, each once: half of the draws
    a, b = [1, 0, 1, 0], [0.75, -0.25, 0.75, -0.25]               # far apart from row to row, but not from each other
    draws_a = vb.bootstrap([[[x, 1]] for x in a], 3)
    draws_b = vb.bootstrap([[[x, 1]] for x in b], 3)
    assert vb.spread(draws_a - draws_b, 100) == pytest.approx([25, 25, 25]) and vb.spread(draws_a)[0] == 0.5
    ratio = vb.bootstrap([[[1, 1], [3, 4]], [[0, 1], [0, 2]]])    # instructions: 3 of 4 and 0 of 2
    assert ratio[0] == pytest.approx((1 / 2 + 3 / 6) / 2)


def test_score_only_equals_the_scores_of_the_run(reference, options, tmp_path):
    files = sorted(reference.glob("*-*.jsonl"))
    assert vb.main(vb.get_args(["--score-only", *map(str, files), "--out", str(tmp_path)])) == 0
    a, b = report(reference), report(tmp_path)
    assert a["subsets"] == b["subsets"] and a["means"] == b["means"] and not b.get("weights")
    assert not [p for p in tmp_path.iterdir() if p.name == ".stages"]


def answered(folder, model="student-x", modality="text", **responses):
    """Answer files, a list of responses (or (response, replies of a judge)) for each subset; _ stands for -."""
    for name, answers in responses.items():
        name, rows = name.replace("sd_qa", "sd-qa"), []
        for i, answer in enumerate(answers):
            text, replies = (answer, None) if isinstance(answer, str) else answer
            rows.append({**question(name, i), "response": text, **({"score": replies} if replies else {})})
        write(folder / f"{model}-{name}-{modality}.jsonl", rows)


def scores(folder, *more):
    files = map(str, folder.glob("*.jsonl"))
    assert vb.main(vb.get_args(["--score-only", *files, "--out", str(folder / "out"), *map(str, more)])) == 0
    return report(folder / "out")


ALL = dict(alpacaeval_full=[("So.", ["4", "5"]), ("So.", ["3", "nonsense"])], commoneval=[("So.", ["1"])],
           wildvoice=[("So.", ["2"])], sd_qa=[("Paris", ["Yes", "yes", "No"]), ("It is Paris.", ["No"])],
           mmsu=CHOICES, openbookqa=["A", "A"], bbh=["Yes", "The answer is (A).", "No.", "Hm"],
           ifeval=["none", "some, yes", "one, two"], advbench=["I'm sorry, I can't.", "Sure!"])


def test_scores_and_means_by_hand(tmp_path):
    answered(tmp_path, **ALL)
    record = scores(tmp_path)
    shown = {name: entry["student text"][0] for name, entry in record["subsets"].items()}
    by_hand = {"alpacaeval_full": 4, "commoneval": 1, "wildvoice": 2, "sd-qa": (100 + 50) / 2, "mmsu": 200 / 3,
               "openbookqa": 50, "bbh": 25, "advbench": 50, "ifeval": 100 * (1 / 3 + 1 / 6) / 2}
    assert shown == pytest.approx(by_hand)
    assert record["subsets"]["mmsu"]["unreadable"]["student text"] == pytest.approx(100 / 3)  # and counts as wrong
    assert record["subsets"]["bbh"]["unreadable"]["student text"] == 25
    assert record["subsets"]["alpacaeval_full"]["unreadable"]["student text"] == 25  # of the judge's replies
    parts = [v * (20 if name in ("alpacaeval_full", "commoneval", "wildvoice") else 1) for name, v in by_hand.items()]
    assert record["means"]["nine-task mean"]["student text"][0] == pytest.approx(sum(parts) / 9)
    assert "leaderboard" in (tmp_path / "out" / "report.md").read_text()


def test_without_a_judge_what_needs_one_is_in_no_mean(tmp_path):
    answered(tmp_path, commoneval=["So."], sd_qa=["Paris", "Rome"], openbookqa=["A", "A"], advbench=["Sure!"])
    record = scores(tmp_path)
    assert record["subsets"]["sd-qa"]["student text"][0] == 50 and "student text" not in record["subsets"]["commoneval"]
    assert record["means"]["mean of what is scored"]["student text"][0] == 25
    assert record["means"]["nine-task mean"]["note"].startswith("lacks alpacaeval_full, commoneval, ")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("| not judged: tools/judge.py |") == 2 and "qa_match" in text


def test_forgetting_and_gap_of_answer_files(tmp_path):
    for model, modality, texts in (("teacher-t", "text", ["A", "B", "C"]), ("student-s", "text", ["A", "B", "D"]),
                                   ("student-s", "speech", ["A", "no", "no"])):
        answered(tmp_path, model, modality, openbookqa=texts)
    entry = scores(tmp_path)["subsets"]["openbookqa"]
    assert entry["forgetting"][0] == pytest.approx(100 / 3) and entry["modality gap"][0] == pytest.approx(100 / 3)
    assert entry["forgetting"][1] == 0 and entry["forgetting"][2] == 100


def test_mrr_is_student_by_speech_over_teacher_by_text(tmp_path):
    letters = ["A", "B", "C", "D"] * 5
    teacher = letters[:16] + ["no"] * 4                          # 16 of 20 right
    for model, modality, texts in (("teacher-t", "text", teacher), ("student-s", "text", teacher),
                                   ("student-s", "speech", letters[:12] + ["no"] * 8), ("cascade-w", "speech", letters)):
        answered(tmp_path, model, modality, openbookqa=texts, advbench=["I cannot"] * 4 if model != "teacher-t" else ["Sure."] * 4)
    record = scores(tmp_path)
    entry, mean = record["subsets"]["openbookqa"], record["means"]["mean of what is scored"]
    assert entry["MRR"][0] == pytest.approx(12 / 16) and 0.4 < entry["MRR"][1] < 0.75 < entry["MRR"][2] <= 1
    assert entry["cascade speech"][0] == 100 and "MRR" not in record["subsets"]["advbench"]  # a teacher that never refuses
    assert mean["MRR"][0] == pytest.approx((60 + 100) / (80 + 0)) and mean["cascade speech"][0] == 100
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 0.750 [0." in text and "| cascade speech |" in text and "MRR: student speech / teacher text" in text
    for modality in ("text", "speech"):  # paired: where student and teacher answer alike, nothing is uncertain
        answered(tmp_path, "student-s", modality, openbookqa=teacher)
    assert scores(tmp_path)["subsets"]["openbookqa"]["MRR"] == [1, 1, 1]


def test_rows_with_replies_are_scored_and_a_subset_in_part_is_not(tmp_path):
    """tools/judge.py and the official script write replies as "score"."""
    answered(tmp_path, commoneval=[("So.", ["5", "5"]), ("So.", ["1"])], sd_qa=[("Rome", ["yes"]), "Rome"], openbookqa=["A"])
    record = scores(tmp_path)
    assert record["subsets"]["commoneval"]["student text"][0] == pytest.approx(11 / 3)  # of three replies: 5, 5, 1
    assert record["subsets"]["sd-qa"]["student text"][0] == 0 and not record["subsets"]["sd-qa"]["counts"]
    assert record["subsets"]["commoneval"]["note"] == "judged by whoever wrote the score of the files"
    answered(tmp_path, commoneval=[("So.", ["nonsense"])])
    with pytest.raises(RuntimeError, match="commoneval, student text: none of the judge's replies can be read"):
        scores(tmp_path)


def test_the_official_evaluators_are_asked_beside_ours(tmp_path, monkeypatch, capsys):
    def compare(*names):
        for module in [name for name in sys.modules if name.split(".")[0] == "src"]:
            monkeypatch.delitem(sys.modules, module)
        score_parity.main(score_parity.get_args(["--official", str(tmp_path / "clone"), *map(str, tmp_path.glob("*.jsonl"))]))
        return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]

    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "clone" / "src").mkdir(parents=True)
    answered(tmp_path, **ALL)
    with pytest.raises(RuntimeError, match="--official .* cannot import src.evaluator"):
        compare()
    (tmp_path / "clone" / "src" / "evaluator.py").write_text(
        "import random\nclass E:\n    def __init__(self, result): self.result = result\n"
        "    def evaluate(self, data):\n        print('noise'); data[0].clear(); return self.result\n"
        "evaluator_mapping = {k: (lambda r=r: E(r)) for k, r in {'open': {'gpt': 3.0}, 'qa': {'panda': 40, 'gpt': 60},"
        " 'mcq': {'acc': 30, 'fail': 1}, 'bbh': {'acc': 20}, 'ifeval': {'final': 0.1}, 'harm': {'refusal_rate': 0.9}}.items()}")
    lines = compare()
    assert {line[2]: (float(line[-2]), float(line[-1])) for line in lines[:-1]} == {
        "alpacaeval_full": (4, 3), "commoneval": (1, 3), "wildvoice": (2, 3), "sd-qa": (75, 50), "mmsu": (66.67, 30),
        "openbookqa": (50, 30), "bbh": (25, 20), "ifeval": (25, 10), "advbench": (50, 90)}
    assert lines[-1][2:] == ["nine-task", "mean", f"{(140 + 291.67) / 9:.2f}", f"{(180 + 230) / 9:.2f}"]
    answered(tmp_path, commoneval=["So."])
    assert ["not", "judged"] in [line[-2:] for line in compare()]


# ---- input ----

def test_the_hub_is_copied_without_decoding_and_its_limit_is_evenly_spaced(data, tmp_path, monkeypatch):
    class Data(list):
        cast_column = lambda self, name, kind: self if (name, kind) == ("audio", "raw") else None

    def load_dataset(name, subset, split, revision):
        asked.append((name, subset, split, revision))
        rows = read(data / ("mmsu-physics.jsonl" if subset == "mmsu" else f"{subset}-{split}.jsonl"))
        return Data({**row, "audio": {"path": "x", "bytes": (data / row["audio"]).read_bytes()}} for row in rows)

    asked, module = [], ModuleType("datasets")
    module.load_dataset, module.Audio = load_dataset, lambda decode: "raw" if decode is False else None
    monkeypatch.setitem(sys.modules, "datasets", module)
    args = ["hlt-lab/voicebench@r1", "--out", str(tmp_path), "--subsets", "sd-qa", "mmsu", "bbh", "--limit", "2"]
    for _ in range(2):  # the second finds all there
        from_hub.main(from_hub.get_args(args))
    assert asked == [("hlt-lab/voicebench", *rest, "r1") for rest in (
        ("sd-qa", "usa"), ("mmsu", "+".join(from_hub.MMSU)), ("bbh", "test"))]
    with pytest.raises(ValueError, match="holds a copy by .*limit.: 2.*choose another --out"):  # a trial is not the whole
        from_hub.main(from_hub.get_args(args[:-2]))
    ids = [row["id"] for row in read(tmp_path / "bbh-test.jsonl")]  # bbh is sorted by task
    assert ids == [question("bbh", 0)["id"], question("bbh", 2)["id"]] and len(list((tmp_path / "audio").iterdir())) == 6
    read_back, digests = vb.read_data(vb.get_args(["--student", "x", "--out", "x", "--data", str(tmp_path)]))
    assert {name: len(asked["speech"]) for name, asked in read_back.items()} == {"sd-qa": 2, "mmsu": 2, "bbh": 2}
    assert digests["mmsu-test.jsonl"] == m.digest(tmp_path / "mmsu-test.jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match="pip install datasets"):
        from_hub.main(from_hub.get_args([*args[:2], str(tmp_path / "new")]))


def test_a_split_may_have_a_hyphen(options, data, tmp_path):
    shutil.copytree(data / "bbh-test", tmp_path / "bbh-test")
    shutil.copy(data / "bbh-test.jsonl", tmp_path / "bbh-dev-1.jsonl")
    assert run(options, tmp_path / "out", "--data", tmp_path, "--teacher", "none", "--modality", "text") == 0
    assert report(tmp_path / "out")["subsets"]["bbh"]["rows"] == 4


BAD = {"no such folder": (None, "data: no SUBSET-SPLIT.jsonl"), "nothing in it": ({}, "no SUBSET-SPLIT.jsonl"),
       "another name": ({"bhh-test": [question("bbh", 0)]}, "no SUBSET-SPLIT.jsonl"),
       "no JSON": ({"bbh-test": "{oops\n"}, "bbh-test.jsonl:1: not JSON"),
       "a list": ({"bbh-test": "[1]\n"}, "bbh-test.jsonl:1: '1' is no JSON object; expected one a line"),
       "no rows": ({"bbh-test": ""}, "bbh-test.jsonl: no rows of bbh"),
       "no column": ({"bbh-test": [{"prompt": "?", "id": "navigate_1"}]}, "bbh-test.jsonl:1: no reference; bbh needs"),
       "no task": ({"bbh-test": [{"prompt": "?", "id": "x", "reference": "yes"}]}, "names none of hyperbaton, navigate"),
       "no letter": ({"mmsu-law": [{"prompt": "?", "reference": "E"}]}, "mmsu-law.jsonl:1: unknown 'e'; mmsu needs prompt, reference"),
       "no sound": ({"advbench-test": [{"prompt": "?", "audio": "a.wav"}]}, "audio file .*a.wav"),
       "no audio": ({"advbench-test": [{"prompt": "?"}]}, "advbench, '\\?': audio file .* not found"),
       "no answers": ({"student-x-advbench-test-text": [{"prompt": "?"}]}, "no response; advbench needs"),
       "other name": ({"student-advbench": []}, "expected a file named MODEL-SUBSET-MODALITY.jsonl"),
       "twice": ({f"{x}-advbench-text": [{"prompt": "?", "response": ""}] for x in "ab"}, "a second file of advbench"),
       "two models": ({f"student-{x}-{y}-text": [{"prompt": "?", "response": ""}] for x, y in (("a", "advbench"), ("b", "commoneval"))},
                      "commoneval-text.jsonl: a second file of .* or of another model|advbench-text.jsonl: a second .* another model"),
       "other questions": ({"teacher-a-advbench-test-text": [{"prompt": "?", "response": ""}],
                            "b-advbench-test-text": [{"prompt": "!", "response": ""}]}, "other questions than another file"),
       "no answers at all": ({"a-advbench-text": []}, "no rows of advbench"),
       "language no text": ({"advbench-test": [{"prompt": "?", "language": 7}]}, "language is '7', expected text or null"),
       "score no list": ({"a-commoneval-text": [{"prompt": "?", "response": "", "score": "4"}]}, "no list of texts as score"),
       "score empty": ({"a-commoneval-text": [{"prompt": "?", "response": "", "score": []}]}, "no list of texts as score")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_a_model_is_loaded(tmp_path, case):
    files, message = BAD[case]
    for name, content in (files or {}).items():
        path = write(tmp_path / "data" / f"{name}.jsonl", [] if isinstance(content, str) else content)
        path.write_text(content if isinstance(content, str) else path.read_text())
    if files == {}:
        (tmp_path / "data").mkdir()
    given = ["--score-only", *map(str, (tmp_path / "data").glob("*"))]
    if not any(name.endswith("text") or name == "student-advbench" for name in files or {}):
        given = ["--data", str(tmp_path / "data"), "--student", "no/model", "--teacher", "no/model"]
    with pytest.raises(ValueError, match=message) as error:
        vb.main(vb.get_args([*given, "--out", str(tmp_path / "out"), "--device", "cpu"]))
    assert "\n" not in str(error.value)


def test_bad_options_are_refused(tmp_path, capsys):
    for given, message in ((["--student", "a", "--subsets", "mtbench"], "invalid choice: 'mtbench'"), ([], "--student --score-only is required"),
                           (["--student", "a", "--score-only", "x"], "not allowed with argument --student"), (["--device", "tpu"], "'tpu'"),
                           (["--student", "a", "--limit", "-1"], "--limit")):
        with pytest.raises(SystemExit) as ended:
            vb.get_args([*given, "--out", str(tmp_path)])
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_cascade_needs_a_teacher_and_a_whisper_before_anything_is_asked(options, tiny, tmp_path):
    for more, message in ((["--teacher", "none", "--cascade", tiny.encoder], "--cascade asks the teacher"),
                          (["--cascade", "no/whisper"], "no/whisper")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            run(options, tmp_path, "--subsets", "advbench", *more)
    assert not list(tmp_path.glob(".stages/*"))


def test_the_script_ends_with_one_line_and_code_2(tmp_path):
    command = [sys.executable, vb.__file__, "--student", "no/model", "--data", tmp_path / "no", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and not result.stdout
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("eval_voicebench.py: ")
