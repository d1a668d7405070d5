"""tools/make_voicebench.py and its questions."""
import collections
import importlib.util
import json
import re
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("make_voicebench", ROOT / "tools/make_voicebench.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
FILE = ROOT / "tools/voicebench_questions.jsonl"
ROWS = [json.loads(line) for line in open(FILE)]
MMSU = """law engineering other biology business economics health philosophy psychology history
chemistry physics""".split()
COLUMNS = {"ifeval": {"key", "instruction_id_list", "kwargs"}, "bbh": {"id", "reference"},
           **dict.fromkeys(("openbookqa", "mmsu", "sd-qa"), {"reference"})}


@pytest.fixture
def make(tmp_path):
    """make(rows, name of OUT, options)"""

    def run(rows, out, *options):
        path, out = tmp_path / "in.jsonl", tmp_path / out
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
        argv = ["--questions", path, "--out", out, "--workers", 1, *options]
        tool.main(tool.get_args([str(word) for word in argv]))
        return {path.name: path.read_bytes() for path in (*out.glob("*.*"), *out.glob("wav/*"))
                if path.is_file()}
    return run


def test_questions_cover_all_subsets_and_splits_and_can_be_read_aloud():
    counts = collections.Counter(r["subset"] for r in ROWS)
    assert counts == {"alpacaeval_full": 10, "sd-qa": 10, "mmsu": 12, **dict.fromkeys(
        ("commoneval", "wildvoice", "openbookqa", "bbh", "ifeval", "advbench"), 8)}
    assert sorted(r["split"] for r in ROWS if r["subset"] == "mmsu") == sorted(MMSU)
    assert len(tool.read_questions(FILE)) == len({r["prompt"] for r in ROWS}) == len(ROWS)
    for r in ROWS:
        assert set(r) == {"subset", "split", "prompt"} | COLUMNS.get(r["subset"], set())
        assert r["split"] in {"mmsu": MMSU, "sd-qa": ["usa"]}.get(r["subset"], ["test"])
        assert tool.synth.unspeakable(r["prompt"], 60) is None and r["prompt"].isascii()
        assert len(r.get("kwargs", [])) == len(r.get("instruction_id_list", []))
    options = r"[^\n]+\?\nA\. .+\.\nB\. .+\.\nC\. .+\.\nD\. .+\."
    for subset in ("openbookqa", "mmsu"):
        rows = [r for r in ROWS if r["subset"] == subset and re.fullmatch(options, r["prompt"])]
        assert sorted(r["reference"] for r in rows) == sorted("ABCD" * (counts[subset] // 4))
    tasks = {(r["id"].rpartition("_")[0], r["reference"]) for r in ROWS if r["subset"] == "bbh"}
    assert tasks == {("hyperbaton", "(a)"), ("hyperbaton", "(b)")} | {
        (t, x) for t in ("navigate", "sports_understanding", "web_of_lies") for x in ("yes", "no")}


def test_what_is_spoken_is_the_same_each_time_and_goes_on(make, tmp_path):
    rows = [ROWS[0], {"subset": "bbh", "id": "../a b", "prompt": "Is it\n'so'?"}, ROWS[-10]]
    first, again = make(rows, "a"), make(rows, "b")
    assert first == again and len(first) == 6
    for r in rows:
        line = json.loads(first[f"{r['subset']}-{r.get('split', 'test')}.jsonl"])
        columns = {k: v for k, v in r.items() if k not in ("subset", "split")}
        assert line == {**columns, "audio": line["audio"]}
        samples, rate_hz = soundfile.read(tmp_path / "a" / line["audio"])
        assert rate_hz == 16_000 and samples.ndim == 1 and abs(samples).max() > 0.1
    for path in (tmp_path / "a").glob("*.jsonl"):
        path.unlink()
    [kept, *_] = (tmp_path / "a/wav").iterdir()
    kept.write_bytes(b"not made again")
    assert make(rows, "a") == {**first, kept.name: b"not made again"}
    with pytest.raises(ValueError, match="other questions or options"):
        make(rows[1:], "a")


@pytest.mark.parametrize("row", [[1], {"prompt": "Hi"}, {"subset": "bbh", "prompt": " "}, ROWS[0],
                                 {"subset": "a/b", "prompt": "Hi"}, {"subset": "bbh", "prompt": 3}])
def test_bad_rows_and_rows_that_cannot_be_spoken_are_named(make, row):
    with pytest.raises(ValueError, match=r"in\.jsonl:3: "):
        make([{**ROWS[0], "id": 1}, {**row, "id": 1} if row is ROWS[0] else row], "out")
    with pytest.raises(RuntimeError, match=r"-test-1 cannot be spoken \(false exited 1"):
        make(ROWS[:1], "out", *"--engine command --tts-command false {text} {wav}".split())
