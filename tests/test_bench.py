"""The benchmarks at sizes of seconds: every part compares the same work and writes what it promises."""
import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import bench
import bench_generate
import bench_lib as lib
import bench_loss
import bench_step
import model as m

@pytest.fixture
def measured(tiny, tmp_path, monkeypatch):
    """Function: part and flags -> rows of its table, its results; of rivals that need nothing installed."""
    monkeypatch.setattr(lib, "CONTEXT", "fork")  # which need not import torch
    torch.set_num_threads(1)
    monkeypatch.setattr(m, "cores", lambda: 1)
    monkeypatch.setattr(lib, "installed", lambda rivals: [r for r, packages in rivals.items() if not packages])
    data = tiny.manifest(tmp_path / "data", 6)

    def run(part, *flags):
        bench.main(bench.get_args([
            "--parts", part, "--out", str(tmp_path / "out"), "--device", "cpu", "--llm", tiny.llm, "--whisper", tiny.encoder,
            "--dtype", "float32", "--batch-size", "4", "--answer-tokens", "8", "--repeats", "1", "--data", str(data), *flags]))
        results = json.loads((tmp_path / f"out/{part}.json").read_text())
        assert results["table"] in (tmp_path / "out/README.md").read_text() and torch.__version__.startswith(results["environment"]["torch"])
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in results["table"].splitlines() if line[:1] == "|"]
        return lines[2:], results["results"]
    return run


def test_the_loss_is_compared_in_time_memory_and_exactness(measured):
    rows, _ = measured("loss", "--rows", "64", "--vocab", "500", "--width", "32", "--cases", "trainable head, fp32")
    assert [row[1] for row in rows] == ["plain", "ours"] and rows[1][3] == "1.00"
    assert float(rows[0][6]) < 1e-4 > float(rows[1][6])


def test_the_step_is_compared_with_those_that_train_the_same(measured):
    rows, results = measured("step", "--steps", "1")
    assert [row[:2] for row in rows] == [["text and speech", "plain loop"], ["text and speech", "ours"],
                                         ["text and speech", bench_step.CHECKPOINTING], ["text", "plain loop"], ["text", "ours"],
                                         ["text", bench_step.CHECKPOINTING]]
    for rivals in results.values():
        for rival in rivals.values():  # later steps differ in the learning rate
            assert rival["norms"][0] == pytest.approx(rivals["ours"]["norms"][0], rel=1e-3, abs=1e-5) and len(rival["seconds"]) == 1


def test_hearing_is_compared_on_the_clips_that_are_given(measured):
    rows, results = measured("hearing", "--clips", "3")
    assert [row[0] for row in rows] == bench_generate.RIVALS and rows[1][3:] == ["1.00", "100 %"]
    assert len(results["ours"]["3"]["results"]) == 3


def test_a_worker_that_dies_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "CONTEXT", "fork")
    monkeypatch.setattr(m, "cores", lambda: 1)
    worker = lib.Worker(bench_loss.run, tmp_path)
    sizes = dict(size="frozen head, fp32", rows=32, vocab=64, width=8, device="cpu")
    assert len(worker.ask(rival="ours", **sizes)["seconds"]) == 1
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        worker.ask(rival="nobody", **sizes)
    worker.close()
