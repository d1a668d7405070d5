"""The benchmarks at sizes of seconds: every part writes what it promises, and operations are counted right."""
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_SIZES, build_student
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "tools"))
import bench
import bench_generate
import bench_growth
import bench_lib as lib
import bench_loss
import bench_step

import model as m
import train_kd

RUNS = {module.__file__: module.run for module in (bench_loss, bench_step, bench_generate, bench_growth)}


class Forked(lib.Worker):
    """A Worker without the seconds that imports take: the benchmark's process is a copy of the test's."""

    def __init__(self, script, log, **environment):
        self.log, self.started = Path(log), time.time()
        self.pipe, end = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=self.work, args=(end, script, environment))
        self.process.start()
        end.close()

    def work(self, end, script, environment):
        os.environ.update(environment)
        torch.set_num_threads(1)
        self.pipe.close()
        lib.take_turn = lambda: (end.send(None), end.recv())
        while True:  # until it is killed
            end.send(json.loads(json.dumps(RUNS[str(script)](**end.recv()))))

    def send(self, **job):
        self.pipe.send(json.loads(json.dumps(job)))

    def receive(self):
        return self.pipe.recv()

    def close(self, patience_s=20):
        self.process.kill()
        self.process.join()


@pytest.fixture
def measured(tiny, tmp_path, monkeypatch, capsys):
    """Function: part and flags -> its Markdown and its results, of rivals that need nothing installed."""
    monkeypatch.setattr(lib, "Worker", Forked)
    monkeypatch.setattr(lib, "installed", lambda rivals: [r for r, packages in rivals.items() if not packages])
    points = {"width": 32, "rows": 8, "vocab": 64, "clips": 1, "answer rows": [8, 16], "vocabulary": [32, 64],
              "batch": [1, 2], "clip seconds": [1, 2], "processes": [1, 2]}
    monkeypatch.setitem(bench_growth.POINTS, "cpu", points)
    monkeypatch.setattr(bench_step, "questions", lambda: [
        "What is the capital of France?", "Why do people like the weather in October?", "Can you tell me a story?"])

    def run(part, *flags):
        bench.main(bench.get_args([
            "--parts", part, "--out", str(tmp_path), "--device", "cpu", "--llm", tiny.llm, "--encoder", tiny.encoder,
            "--dtype", "float32", "--batch-size", "4", "--answer-tokens", "8", "--repeats", "1",
            *flags]))
        assert (tmp_path / f"{part}.png").stat().st_size > 5000
        return (tmp_path / f"{part}.md").read_text(), json.loads((tmp_path / f"{part}.json").read_text())
    return run


def rows_of(text, header):
    """The table with this header -> {first cell: list of the others}."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line == "| " + " | ".join(header) + " |")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[start + 2:] if line.startswith("|")]
    return {name: rest for name, *rest in cells}


def test_the_loss_is_compared_in_time_memory_and_exactness(measured):
    text, results = measured("loss", "--rows", "64", "--vocab", "500", "--width", "32",
                             "--cases", "trainable head, fp32")
    rows = rows_of(text, ["", "s", "ours / it, time", "GiB above inputs", "ours / it, memory", "error of the gradient"])
    assert list(rows) == ["GEMMs alone", "plain", "ours"]
    assert rows["ours"][1] == "1.00"
    assert float(rows["plain"][4]) < 1e-4 > float(rows["ours"][4])
    assert results["environment"]["torch"] == torch.__version__


def test_the_step_is_compared_and_its_time_is_accounted_for(measured):
    text, results = measured("step", "--steps", "1")
    rows = rows_of(text, ["", "examples/s", "ours / it, speed", "GiB above weights, gradients, optimizer",
                          "ours / it, memory", "GiB in all", "of the matmul peak", "start to first step, s"])
    assert list(rows)[:5] == ["plain loop", "ours", "ours, caches", *bench_step.MEMORY_ALONE]
    dual = results["settings"]["dual"]
    ours, cached = dual["ours"], dual["ours, caches"]
    assert dual["plain loop"]["grad_norm"] == pytest.approx(ours["grad_norm"], rel=0.02)  # they train the same
    assert cached["grad_norm"] == pytest.approx(ours["grad_norm"], rel=0.02)
    assert dual[bench_step.CHANNELS_IN_ONE]["grad_norm"] == pytest.approx(ours["grad_norm"], rel=0.02)
    parts = sum(seconds for phase, seconds in ours["phases"].items() if phase != "step")
    assert 0 < parts <= ours["phases"]["step"] and min(ours["phases"].values()) >= 0
    assert ours["flops"]["encoder"] > 0 and ours["flops"]["teacher body"] > 0
    assert "encoder" not in cached["flops"] and "teacher body" not in cached["flops"]
    assert ours["tokens"]["rows"] == 2 * 4 * 8
    work = rows_of(text, ["", "off", "on", "off, share", "on, share"])
    assert {"teacher body", "all operations", "time: backward", "time: rest"} <= set(work)


def test_answers_are_compared_in_tokens_a_second_by_text_and_by_speech(measured):
    text, results = measured("answers", "--prompts", "4", "--spoken", "3")
    header = ["", "prompts", "dtype", "tokens/s", "ours / it, speed"]
    by_text, by_speech = (rows_of(part, header) for part in text.split("**Answers by speech**"))
    assert list(by_text) == ["transformers, float32", "transformers, bfloat16", "ours, 4 prompts", "ours"]
    assert list(by_speech) == ["transformers, float32", "ours"]
    assert by_text["ours"][3] == by_speech["ours"][3] == "1.00" and by_speech["ours"][0] == "3"


def test_both_ways_to_answer_by_speech_give_the_same_number_of_tokens(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_generate, "RIVAL_BATCH", 2)
    rows = [{"audio": row["audio"]} for row in train_kd.read_manifest(tiny.manifest(tmp_path, 3))]
    student = bench_generate.load(tiny.student, "float32", "cpu")
    assert bench_generate.ours_speech(rows, student) == bench_generate.rival_speech(rows, student) > 3


def test_growth_has_an_exponent_for_each_series(measured):
    text, results = measured("growth")
    rows = rows_of(text, ["size", "of", "sizes", "seconds", "exponent", "MiB above inputs or state", "exponent"])
    assert set(rows) == {"answer rows", "vocabulary", "batch", "clip seconds", "processes"}
    assert all(s["time_exponent"] is not None for s in results["series"].values())


def test_the_exponent_is_that_of_a_power():
    assert bench_growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert bench_growth.exponent([1, 2], [0, 1]) is None


def test_a_worker_that_dies_says_why(tmp_path):
    sizes = dict(case="frozen head, fp32", rows=8, vocab=64, width=8, device="cpu")
    with lib.Worker(bench_loss.__file__, tmp_path / "log") as worker:
        assert len(worker.ask(rival="ours", calls=2, **sizes)["seconds"]) == 2
        with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
            worker.ask(rival="nobody", calls=1, **sizes)


def test_operations_are_those_that_torch_counts(tiny, tmp_path):
    student = build_student(tiny.student, 0.2, **TINY_SIZES).train()
    student.encoder.requires_grad_(False)
    teacher, tokenizer = m.load_llm(tiny.llm)
    args = train_kd.get_args(["--data", "x", "--out", "x"])
    rows = train_kd.read_manifest(tiny.manifest(
        tmp_path, 3, prompt="Why do people like the seven wonders of the world?",
        response="Every morning the children walk along the river."))
    item = train_kd.Rows(rows, student, tokenizer, args)[2]
    items = [item, {**item, "id": "again"}]  # of like lengths: padding is no work that must be done
    heads = [llm.get_output_embeddings().weight for llm in (student.llm, teacher.requires_grad_(False))]

    def addmm(shape, a, b, *_, **__):
        return 2 * a[0] * a[1] * b[1]
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm})
    with counter, sdpa_kernel(SDPBackend.MATH):
        taught = dict(zip((i["id"] for i in items), train_kd.teacher_rows(teacher, items)))
        for channel in ("t2t", "s2t"):
            hidden, logits, lengths, head = student(**train_kd.student_inputs(items, channel))
            loss = train_kd.channel_loss(args, items, hidden, head, taught, heads[1])[0]
            (loss + (logits.sum() if logits is not None else 0)).backward()
    with torch.no_grad():
        heard = student.read(*student.spell(student.features([item["clip"]])))[0][0]
    before, said, answer = len(item["before"]), len(item["said"]), len(item["answer"])
    rest, asked = len(item["after"]) + answer, len(item["teacher_prompt"])
    counts = {"teacher": [[asked, *[asked + answer] * 2]], "rows": [2 * answer] * 2,
              "t2t": [[before + said, *[before + said + rest] * 2]], "s2t": [[before, *[before + len(heard) + rest] * 2]],
              "frames": [item["clip"].shape[1]] * 2, "positions": [-(-item["clip"].shape[1] // 2)] * 2,
              "events": 2 * len(heard)}
    flops = bench_step.step_flops(student.config, teacher.config, counts, len(student.processors["classes"]) + 1)
    assert sum(flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.03)
