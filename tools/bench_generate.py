"""
Hearing: clips a second of model.py:Whisper.hear against WhisperForConditionalGeneration.generate: the same clips, greedy,
English; features are counted on both sides; each at its best batch size of BATCHES.
The same dtype on both sides; loading is not counted. Called by bench.py.
"""
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bench_lib as lib
import model as m
import train_kd

BATCHES = [8, 16, 32]
RIVALS = ["transformers' generate", "ours"]
LOADED = {}


def hear(rival, size, name, dtype, device, audio):
    """Clips, `size` at a time -> seconds, texts."""
    if not LOADED:
        folder, LOADED["waveforms"] = m.resolve(name), [m.load_audio(path) for path in audio]
        LOADED["parts"] = WhisperFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        LOADED["model"] = (m.load_whisper(name, dtype) if rival == "ours" else
                           WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()).to(device)
    waveforms, (extractor, tokenizer), model = LOADED.values()
    texts, start = [], lib.now(device)
    for first in range(0, len(waveforms), size):
        some = waveforms[first:first + size]
        if rival == "ours":
            texts += [heard.text for heard in model.hear(some, "en")]
            continue
        options = {"max_new_tokens": model.config.max_target_positions - 8}
        if getattr(model.generation_config, "is_multilingual", False):
            options |= {"language": "en", "task": "transcribe"}
        mel = extractor([w.numpy() for w in some], sampling_rate=m.SAMPLE_RATE, return_tensors="pt")
        ids = model.generate(mel.input_features.to(device, dtype), **options)
        texts += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return {"seconds": lib.now(device) - start, "results": texts}


@torch.inference_mode()
def run(dtype, **job):
    return hear(dtype=getattr(torch, dtype), **job)


def summary(answers, count):
    """{rival: {size: answers}}, count(size, answer) things -> {rival: {size: {rate, all, equal, results}}}"""
    found = {}
    for rival, of in answers.items():
        found[rival] = {}
        for size, some in of.items():
            rates = [count(one) / one["seconds"] for one in some]
            pairs = list(zip(some[0]["results"], answers["ours"][size][0]["results"]))
            found[rival][size] = {"rate": lib.median(rates), "all": rates, "equal": sum(a == b for a, b in pairs) / len(pairs),
                                  "results": some[0]["results"]}
    return found


def measure_hearing(args):
    with tempfile.TemporaryDirectory() as folder:
        clips = train_kd.read_manifest(lib.manifest_of(args, Path(folder) / "data", args.clips))
        clips.sort(key=lambda row: row["seconds"])  # as hear_all does
        answers = lib.compare(run, RIVALS, sorted({min(size, args.clips) for size in BATCHES}), args, name=args.whisper,
                              dtype=args.dtype, audio=[row["audio"] for row in clips])
    found, rows = summary(answers, lambda one: len(clips)), []
    best = {rival: max(of, key=lambda size: of[size]["rate"]) for rival, of in found.items()}
    for rival, of in found.items():
        r = of[best[rival]]
        speed = found["ours"][best["ours"]]["rate"] / r["rate"]
        rows.append([rival, best[rival], f"{r['rate']:.2f}", f"{speed:.2f}", f"{100 * r['equal']:.0f} %"])
    length = sum(row["seconds"] for row in clips) / len(clips)
    title = f"**Hearing**: {len(clips)} clips, {length:.1f} s each, {args.whisper}, {args.dtype}, {args.device}"
    return found, title, lib.table(["", "clips together", "clips/s", "ours / it, speed", "texts equal to ours"], rows)
