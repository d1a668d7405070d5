"""What goes beyond the paper: tools/augment.py, rollouts.py, captions.py."""
import json
import random
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import manifest, sound

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import augment
import captions
import model as m
import rollouts
import train_kd


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(tool, *words):
    tool.main(tool.get_args([str(word) for word in words]))


# ---- augment ----

def power_db(x):
    return float(10 * torch.log10(x.square().mean()))


def band_power(waveform, low_hz, high_hz):
    spectrum = torch.fft.rfft(waveform).abs().square()
    hertz = torch.fft.rfftfreq(len(waveform), 1 / 16_000)
    return float(spectrum[(hertz >= low_hz) & (hertz < high_hz)].sum())


def test_noise_stands_as_far_below_the_voice_as_its_row_says(tmp_path):
    path = manifest(tmp_path, 5)
    clips = [tmp_path / row["audio"] for row in rows_of(path)]
    hiss = tmp_path / "hiss.wav"
    soundfile.write(hiss, sound(0.4, 7).numpy(), 16_000)
    seen = set()
    for seed in range(30):
        clean = sound(1.0, seed)
        noisy, what = augment.noise(clean, random.Random(seed), clips, [hiss], (0, 20))
        name, snr = what.removesuffix(" dB").split(", ")
        seen.add(name)
        assert 0 <= float(snr) <= 20 and len(noisy) == len(clean)
        assert power_db(clean) - power_db(noisy - clean) == pytest.approx(float(snr), abs=0.06)
    assert seen == {"coloured", "babble", "recorded"}


def test_a_telephone_keeps_300_to_3400_hz_alone_and_a_codec_changes_little():
    clean = torch.randn(32_000, generator=torch.Generator().manual_seed(0)) * 0.05
    line, _ = augment.phone(clean, random.Random(0))
    assert len(line) == len(clean)
    assert band_power(line, 4200, 8000) < 0.01 * band_power(clean, 4200, 8000)
    assert band_power(line, 0, 100) < 0.1 * band_power(clean, 0, 100)
    assert band_power(line, 800, 2500) > 0.3 * band_power(clean, 800, 2500)
    tone, names = sound(1.5, 3) * 0.5, set()
    for seed in range(12):
        coded, name = augment.codec(tone, random.Random(seed))
        names.add(name)
        assert not torch.equal(coded, tone) and abs(power_db(coded) - power_db(tone)) < 3
    assert names == set(augment.CODECS)


def test_echoes_follow_the_sound_and_speed_changes_its_length():
    click = torch.zeros(16_000)
    click[4000] = 0.5
    heard, seconds = augment.room(click, random.Random(1))
    assert not heard[:3990].abs().max() > 1e-4 and heard[4000] == pytest.approx(0.5, abs=1e-4)
    early, late = heard[4001:4001 + int(seconds * 8000)], heard[4001 + int(seconds * 8000):]
    assert power_db(early) > power_db(late) + 20
    for seed in range(6):
        fast, factor = augment.speed(sound(1.0), random.Random(seed))
        assert len(fast) == pytest.approx(16_000 / factor, abs=2)


def test_rows_keep_what_is_said_and_clips_are_drawn_by_id(tmp_path):
    path = manifest(tmp_path, 12, prompt=lambda i: f"What is {i}?" if i < 10 else None, wer=0.1)
    run(augment, path)
    clean, rows = rows_of(path)[:10], rows_of(tmp_path / "train-augmented.jsonl")
    assert [(r["id"], r["prompt"], r["response"]) for r in rows] == [(f"{r['id']}-augmented", r["prompt"], r["response"]) for r in clean]
    assert all(r["augment"] and "wer" not in r for r in rows) and len({json.dumps(r["augment"]) for r in rows}) > 5
    sounds = [(tmp_path / r["audio"]).read_bytes() for r in rows]
    assert len(train_kd.read_manifest(tmp_path / "train-augmented.jsonl", {}) + train_kd.read_manifest(path)) == 22
    for file in (tmp_path / "augmented").iterdir():
        file.unlink()
    for stage in (tmp_path / ".stages").iterdir():
        stage.unlink()
    run(augment, path)
    assert [(tmp_path / r["audio"]).read_bytes() for r in rows] == sounds
    run(augment, path, "--kinds", "phone", "--seed", 1)
    assert [r["augment"] for r in rows_of(tmp_path / "train-augmented.jsonl")] == [{"phone": "gsm"}] * 10


def test_clips_that_the_recogniser_mishears_are_left_out(tiny, tmp_path):
    path = manifest(tmp_path, 4)
    run(augment, path, "--kinds", "room", "--max-wer", 1000, "--asr", tiny.encoder)
    rows = rows_of(tmp_path / "train-augmented.jsonl")
    assert len(rows) == 4 and all(r["wer"] > 0.5 and r["heard"] for r in rows)  # a random Whisper
    with pytest.raises(ValueError, match="each of 4 clips is heard worse than --max-wer 0.01"):
        run(augment, path, "--kinds", "room", "--max-wer", 0.01, "--asr", tiny.encoder)


@pytest.mark.parametrize("rows, words, message", [
    ([{"id": 1}], [], r"train.jsonl:1: no id or audio; expected a manifest"),
    ([{"id": 1, "audio": "wav/train-000.flac", "prompt": None}], [], "none of 1 rows has a prompt"),
    ([{"id": 1, "audio": "../a.wav", "prompt": "Hi"}], [], "not found"),
    (None, [], "no such manifest"),
    ([{"id": 1, "audio": "wav/train-000.flac", "prompt": "Hi"}], ["--noise-folder", "nowhere"], "--noise-folder nowhere: no .wav"),
])
def test_augment_refuses_in_one_line(tmp_path, rows, words, message):
    path = manifest(tmp_path, 1)
    path.unlink() if rows is None else write_rows(path, rows)
    with pytest.raises(ValueError, match=message):
        run(augment, path, *words)


# ---- roll-outs ----

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


# ---- captions ----

@pytest.mark.parametrize("row, caption", [
    ({"sex": "woman", "rate": "fast", "background": "rain"}, "[A woman speaks fast, with rain in the background.]"),
    ({"rate": "slow", "background": "quiet"}, "[Someone speaks slowly, in a quiet room.]"),
    ({"sex": "man", "background": "quiet"}, None), ({"rate": "fast"}, None)])
def test_a_caption_says_what_the_row_says(row, caption):
    assert captions.caption_of(row) == caption


def twins(folder, n):
    """A manifest of n prompts in two clips each."""
    path = manifest(folder, 2 * n, prompt=lambda i: f"What is {i // 2}?", rate=lambda i: ["fast", "slow"][i % 2], background="quiet")
    rows = rows_of(path)
    for k, row in enumerate(rows):
        row["id"] = f"ask-{k // 2}" + "-take2" * (k % 2)
    write_rows(path, rows)
    return path


def test_captioned_rows_are_answered_anew_and_can_be_trained_on(tiny, tmp_path):
    path = twins(tmp_path, 3)
    run(captions, "make", path, "--teacher", tiny.llm, "--max-new-tokens", 5)
    rows = train_kd.read_manifest(tmp_path / "train-captioned.jsonl")
    assert [r["prompt"] for r in rows][:2] == [f"[Someone speaks {how}, in a quiet room.] What is 0?" for how in ("fast", "slowly")]
    assert all(isinstance(r["response"], str) and r["finish"] in ("stop", "length") for r in rows) and len(rows) == 6
    write_rows(path, [{"id": 1, "prompt": "Hi", "audio": "wav/train-000.flac"}])
    with pytest.raises(ValueError, match="no row has rate and background"):
        run(captions, "make", path, "--teacher", tiny.llm)


def test_what_the_right_voice_gains_is_measured_against_the_twin_clip(tiny, tmp_path):
    path = twins(tmp_path, 4)
    run(captions, "make", path, "--teacher", tiny.llm, "--max-new-tokens", 5)
    run(captions, "measure", tiny.student_folder, "--data", tmp_path / "train-captioned.jsonl", "--teacher", tiny.llm, "--start",
        tiny.student, "--out", tmp_path / "report")
    kl8 = json.loads((tmp_path / "report/captions.json").read_text())["kl8"]
    assert set(kl8) == {"teacher by text", "cascade", tiny.student_folder}
    assert min(kl8["teacher by text"]["twin"]) > 0 and set(kl8["teacher by text"]["own"]) == {0.0}
    for ways in kl8.values():
        assert len(ways["own"]) == len(ways["twin"]) == 8
    own, twin = kl8[tiny.student_folder]["own"], kl8[tiny.student_folder]["twin"]
    assert own != twin
    table = (tmp_path / "report/captions.md").read_text()
    assert "8 clips, 4 prompts" in table and f"{sum(own) / 8:.3f}" in table
    same = [{**row, "audio": "wav/train-000.flac"} for row in rows_of(tmp_path / "train-captioned.jsonl")]
    write_rows(path.with_name("same.jsonl"), same)
    run(captions, "measure", tiny.student_folder, "--data", path.with_name("same.jsonl"), "--teacher", tiny.llm, "--start", tiny.student,
        "--out", tmp_path / "report")
    kl8 = json.loads((tmp_path / "report/captions.json").read_text())["kl8"]
    assert kl8[tiny.student_folder]["own"] == pytest.approx(kl8[tiny.student_folder]["twin"], rel=1e-3)
    write_rows(path.with_name("one.jsonl"), rows_of(tmp_path / "train-captioned.jsonl")[:1])
    with pytest.raises(ValueError, match="no clip has a twin"):
        run(captions, "measure", tiny.student_folder, "--data", path.with_name("one.jsonl"), "--teacher", tiny.llm, "--start", tiny.student,
            "--out", tmp_path / "report")
