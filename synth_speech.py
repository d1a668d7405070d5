"""
Turn text instructions into training data: teacher answers and speech, checked by a recogniser.

  python synth_speech.py --sample-prompts 1000 --out data/quick    # the teacher invents them
  python synth_speech.py --input alpaca.json --out data/alpaca --max-wer 0.3
  torchrun --nproc_per_node=8 synth_speech.py --hub-dataset Open-Orca/OpenOrca --out data/orca

Reads   JSON lines or a JSON list; keys: prompt | instruction (+ input) | question
        (+ system_prompt), response or output
Writes  OUT/train.jsonl (the manifest), heldout.jsonl, wav/*.flac (16 kHz mono), summary.json
Stop it at any moment; the same command goes on. Nothing is made twice.
"""
import argparse
import collections
import ctypes
import hashlib
import html
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging

import model as m

# of 57 tried, the ones that Whisper-base hears best
VOICES = ["en-us", "en-us+m1", "en-us+m3", "en-us+m6", "en-us+m7", "en-us+m8", "en-us+f1",
          "en-us+f2", "en-us+f5", "en-us+Gene", "en-us+Mike", "en-us+rob", "en-us+robert",
          "en-us+edward", "en-gb-x-rp", "en-gb-x-rp+m3", "en-gb-x-rp+f5"]
# words a minute that Whisper hears well; espeak's pitch scale is 0-99
RATE_WPM, PITCH = (130, 170), (35, 65)
SAMPLE_CHUNK = 256  # prompts that are sampled together


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("prompts")
    g.add_argument("--input", help="JSON lines or JSON list")
    g.add_argument("--hub-dataset",
                   help="data set id of the hub, streamed (needs the package datasets)")
    g.add_argument("--sample-prompts", type=int, default=0, help="prompts that the teacher invents")
    g.add_argument("--drill", type=int, default=0,
                   help="extra rows that only teach hearing: prompts "
                   "with words exchanged for random words of the teacher's vocabulary")
    g.add_argument("--limit", type=int, default=0, help="read at most so many rows; 0 = all")
    g.add_argument("--max-bad-rows", type=int, default=0,
                   help="leave out so many unreadable rows; OUT/bad_rows.jsonl lists them")
    g.add_argument("--max-words", type=int, default=40,
                   help="longest prompt; 40 words are about 16 s of speech")
    g.add_argument("--exclude", help="file of prompts to keep out, "
                   "and all that share 8 words in a row with them")
    g.add_argument("--heldout", type=int, default=0, help="rows for OUT/heldout.jsonl")
    g = p.add_argument_group("answers")
    g.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM, local folder or hub id")
    g.add_argument("--revision", help="revision of hub models")
    g.add_argument("--answers", type=int, default=-1,
                   help="rows that get an answer, the held-out first; -1 = all. "
                   "Rows without one still teach hearing (CTC warm start)")
    g.add_argument("--max-new-tokens", type=int, default=128,
                   help="longest answer in tokens; longer ones are cut")
    g.add_argument("--batch-size", type=int, default=384,
                   help="answers generated together, at first")
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                   help="of the teacher; auto measures which is faster")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=["cuda", "cpu"], help="for teacher and recogniser")
    g = p.add_argument_group("speech")
    g.add_argument("--engine", choices=["espeak", "hf", "command"], default="espeak",
                   help="hf: --tts-model, command: --tts-command")
    g.add_argument("--voices", nargs="+", default=VOICES,
                   help="espeak voices to draw from, or {voice} of --tts-command")
    g.add_argument("--tts-model", help="text-to-speech model of transformers, folder or hub id")
    g.add_argument("--workers", type=int, default=m.cores(),
                   help="processes that synthesise")
    g.add_argument("--language", default="en", help="language of prompts and speech (ISO 639-1)")
    g.add_argument("--max-wer", type=float, default=0,
                   help="drop rows heard worse, e.g. 0.3; 0 = keep all")
    g.add_argument("--wer-sample", type=float, default=0,
                   help="measure only this share of rows, 0-1")
    g.add_argument("--asr", default="openai/whisper-base",
                   help="Whisper model that transcribes the speech back")
    p.add_argument("--preview", type=int, default=0,
                   help="write OUT/preview.html to listen to so many rows")
    p.add_argument("--seed", type=int, default=0, help="of sampling, voices and held-out choice")
    p.add_argument("--out", required=True, help="output folder")
    p.add_argument("--tts-command", nargs=argparse.REMAINDER, default=[], metavar="WORD",
                   help="LAST option: a program and its arguments with {text} {wav} {voice}, e.g. "
                   "flite -voice slt -t {text} -o {wav}")
    args = p.parse_args(argv)
    if sum(map(bool, (args.input, args.hub_dataset, args.sample_prompts))) != 1:
        p.error("give exactly one of --input FILE, --hub-dataset ID, --sample-prompts N")
    if args.engine == "hf" and not args.tts_model:
        p.error("--engine hf needs --tts-model")
    words = args.tts_command
    if args.engine == "command" and not ({"{text}", "{wav}"} <= set(words)
                                         and shutil.which(words[0])):
        p.error(f"--tts-command {' '.join(words)!r}: expected an installed program "
                "and the words {text} and {wav}")
    m.check_options(p, args, workers=1, batch_size=1, max_new_tokens=1, max_words=1, heldout=0,
                    sample_prompts=0, drill=0, limit=0, answers=-1, preview=0, max_bad_rows=0,
                    wer_sample=(0, 1), max_wer=0, seed=(0, 2**32))
    if args.engine == "espeak" and args.language != "en" and args.voices == VOICES:
        p.error(f"--language {args.language} needs --voices that speak it, "
                f"e.g. --voices {args.language}")
    return args


# ---- rows ----

def first_of(row, *keys):
    return next((row[k].strip() for k in keys
                 if isinstance(row.get(k), str) and row[k].strip()), None)


def to_row(raw, row_id):
    """One input object with any of the common key sets -> row of the manifest,
    still without answer and speech."""
    prompt = first_of(raw, "prompt", "question", "instruction")
    if prompt and not first_of(raw, "prompt", "question") and first_of(raw, "input"):
        prompt = f"{prompt}\n{raw['input'].strip()}"
    row = {"id": str(raw.get("id") or row_id), "prompt": prompt}
    if "finish" in raw:  # a manifest of ours: keep the teacher's answer
        return {**row, **{k: raw[k] for k in ("system", "instruction", "response", "finish",
                                              "reference", "source") if raw.get(k) is not None}}
    optional = {"system": first_of(raw, "system", "system_prompt"),
                "reference": first_of(raw, "reference", "response", "output")}
    return {**row, **{k: v for k, v in optional.items() if v}}


def read_rows(path, limit=0, bad=None):
    """JSON lines or JSON list -> rows; raises ValueError that names the line, or adds it to bad."""
    path = Path(path)

    def parse(raw, where):
        if "finish" in raw:  # a manifest of ours
            m.check_texts(raw, where, "system", "instruction", "response", "finish", "reference",
                          "source")
        row = to_row(raw, f"{path.stem}-{int(where.rsplit(':', 1)[1]):06d}")
        if not row["prompt"]:
            raise ValueError(f"{where}: no text under prompt, question or instruction")
        return row

    return m.json_lines(path, parse, bad)[:limit or None]


def hub_rows(name, limit):
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RuntimeError("--hub-dataset needs the package datasets: "
                           "pip install datasets") from error
    stream = load_dataset(name, split="train", streaming=True)
    stream = stream.take(limit) if limit else stream
    stream = tqdm(stream, desc="hub rows", unit="row")
    return [to_row(raw, f"{name.split('/')[-1]}-{i:06d}") for i, raw in enumerate(stream)]


def unspeakable(text, max_words, language="en"):
    """Why a text cannot be read out loud, or None."""
    if not text or not re.search(r"[^\W_]", text):
        return "empty"
    if len(text.split()) > max_words or len(text) > 12 * max_words:
        return "too long"
    if re.search(r"https?:|www\.|\w@\w|\w\.(?:com|org|net|io)\b", text):
        return "url"
    if re.search(r"```|[{}<>\\=^~`]|\b\w+\(\)|\w_\w|"
                 r"\w\.(?:py|js|java|cpp|csv|json|html)\b|//", text):
        return "code"
    if re.search(r"\|.*\||\t", text):
        return "table"
    if re.search(r"(?m)^\s*(?:[-*#•]|\d+[.)])\s|\*\*|\[|\]|#", text):
        return "mark-up"
    latin = language in ("en", "de", "fr", "es", "it", "pt", "nl")
    if latin and re.search(r"[^\W\d_]", re.sub(r"[\u0041-\u024f]", "", text)):
        return "other script"
    symbols = r"[\x00-\x08\x0e-\x1f\ufffd\u2190-\u2bff\ue000-\uf8ff\U0001f000-\U0001ffff]"
    return "not plain text" if re.search(symbols, text) else None


def tidy(text):
    """White space and typographic quotes made plain."""
    plain = {0x2018: "'", 0x2019: "'", 0x201c: '"', 0x201d: '"', 0x2013: "-", 0x2014: ", "}
    return " ".join(text.translate(plain).split())


def readable(text):
    """Numbers and signs as words, for engines that do not read them themselves (espeak does)."""
    try:
        from num2words import num2words
    except ImportError as error:
        raise RuntimeError("this engine needs numbers written out: "
                           "pip install num2words") from error
    for sign, word in (("&", " and "), ("%", " percent"), ("+", " plus "), ("$", " dollars "),
                       ("°", " degrees")):
        text = text.replace(sign, word)
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)

    def in_words(number):
        return f" {num2words(float(number[0]) if '.' in number[0] else int(number[0]))} "

    return tidy(re.sub(r"\d+(?:\.\d+)?", in_words, text))


def fingerprints(text):
    """What two texts share if one is nearly the other:
    the normalised form, or any 8 words in a row."""
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return {" ".join(words)} | {" ".join(words[i:i + 8]) for i in range(len(words) - 7)}


def choose(rows, args, drops):
    """Filter rows, drop near-duplicates, split off the held-out ones
    -> rows in input order, `split` set."""
    seen = (set().union(*(fingerprints(tidy(r["prompt"])) for r in read_rows(args.exclude)))
            if args.exclude else set())
    kept, ids = [], set()
    for row in rows:
        reason = unspeakable(row["prompt"], args.max_words, args.language)
        row["prompt"] = tidy(row["prompt"] or "")
        marks = fingerprints(row["prompt"])
        reason = reason or ("near-duplicate" if marks & seen
                            else "duplicate id" if row["id"] in ids else None)
        if reason:
            drops.append({"id": row["id"], "reason": reason, "prompt": row["prompt"]})
            continue
        seen |= marks
        ids.add(row["id"])
        kept.append(row)
    kept = kept[:args.sample_prompts or None]
    held = set(random.Random(args.seed).sample(range(len(kept)), min(args.heldout, len(kept))))
    for i, row in enumerate(kept):
        row["split"] = "heldout" if i in held else "train"
    return kept


def drill_rows(rows, count, vocabulary, seed):
    """Training prompts with about half of their words exchanged for random ones:
    many words, no generation."""
    if any(r["id"].startswith("drill-") for r in rows):
        raise ValueError("the input has drill rows already, whose ids would be given twice; "
                         "leave --drill out")
    word = re.compile(r"[\u0120\u2581][A-Za-z][a-z]{2,}")  # first, BPE's mark of a word's start
    words = sorted(token[1:] for token in vocabulary if word.fullmatch(token))
    sources, drilled = [r["prompt"].split() for r in rows if r["split"] == "train"], []
    for k in range(count if sources else 0):
        rng = random.Random(f"drill {seed} {k}")
        said = [re.sub(r"^[\w']+", rng.choice(words), w) if rng.random() < 0.45 else w
                for w in sources[k % len(sources)]]
        drilled.append({"id": f"drill-{k:06d}", "prompt": " ".join(said), "source": "drill",
                        "split": "train"})
    return drilled


# ---- stages: append-only files, one a rank, so that every stage goes on where it stopped ----

class Stage:
    """OUT/.stages/NAME.RANK.jsonl. `done` holds what any rank wrote so far;
    a half-written last line is cut off."""

    def __init__(self, out, name, rank):
        folder = Path(out) / ".stages"
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder, self.own = name, folder, folder / f"{name}.{rank}.jsonl"
        if self.own.exists():
            data = self.own.read_bytes()
            os.truncate(self.own, data.rfind(b"\n") + 1)
        self.done = {}

    def load(self):
        for path in sorted(self.folder.glob(f"{self.name}.*.jsonl")):
            self.done.update((record["id"], record)
                             for record in map(json.loads, path.read_text().split("\n")[:-1]))
        return self.done

    def add(self, records):
        with open(self.own, "a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


# ---- prompts and answers by the teacher ----

def measured_dtype(device):
    """bfloat16 where matrix products in it are faster than in float32."""
    def seconds(dtype):
        a, b = (torch.randn(256, 576, dtype=dtype, device=device),
                torch.randn(576, 1536, dtype=dtype, device=device))
        times = []
        for _ in range(20):
            start = time.perf_counter()
            (a @ b)[0, 0].item()
            times.append(time.perf_counter() - start)
        return sorted(times)[10]
    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def sample_prompts(teacher, tokenizer, seed, chunk):
    """SAMPLE_CHUNK prompts: the teacher continues its own chat template
    where the user begins to speak."""
    before, _ = m.chat_parts(tokenizer)
    start = teacher.get_input_embeddings()(torch.tensor(before, device=teacher.device))
    generator = torch.Generator(teacher.device).manual_seed(1_000_003 * seed + chunk)
    end = m.end_token(tokenizer)
    outputs = m.generate(teacher, [start] * SAMPLE_CHUNK, max_new_tokens=32, eos_ids=[end],
                         temperature=1.0, generator=generator)
    return [{"id": f"sampled-{chunk:04d}-{i:03d}", "prompt": tokenizer.decode(ids[:-1])}
            for i, ids in enumerate(outputs) if ids[-1] == end and len(ids) > 1]


def answer(teacher, tokenizer, rows, max_new_tokens):
    """Greedy answers to a batch of rows -> records with response and finish."""
    end, embed = m.end_token(tokenizer), teacher.get_input_embeddings()
    prompts = []
    for row in rows:
        before, after = m.chat_parts(tokenizer, row.get("system"), row.get("instruction"))
        ids = before + m.text_ids(tokenizer, row["prompt"]) + after
        prompts.append(embed(torch.tensor(ids, device=teacher.device)))
    outputs = m.generate(teacher, prompts, max_new_tokens=max_new_tokens, eos_ids=[end])
    return [{"id": row["id"], "finish": "stop" if ids[-1] == end else "length", "tokens": len(ids),
             "response": tokenizer.decode(ids[:-1] if ids[-1] == end else ids)}
            for row, ids in zip(rows, outputs)]


# ---- speech engines: make_engine(args) -> speak(text, voice, rng) -> (samples float32, Hz) ----

def espeak_engine():
    import _ctypes

    import espeakng_loader
    callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int,
                                     ctypes.c_void_p)

    def speak(text, voice, rng):
        chunks = []

        @callback_type
        def collect(samples, count, _events):
            if samples and count:
                chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        # loaded anew for each row (3 ms): its oscillators' phase outlives even espeak_Terminate
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        # 2: synchronous, by callback
        rate_hz = library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0)
        try:
            if rate_hz <= 0:
                raise RuntimeError("espeak-ng did not start; reinstall the package espeakng-loader")
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # it takes the time otherwise
            library.espeak_SetSynthCallback(collect)
            variant = Path(espeakng_loader.get_data_path(), "voices", "!v", voice.partition("+")[2])
            # espeak ignores a variant that it lacks
            if library.espeak_SetVoiceByName(voice.encode()) != 0 or not variant.exists():
                raise ValueError(f"espeak has no voice {voice!r}")
            library.espeak_SetParameter(1, rng.randint(*RATE_WPM), 0)
            library.espeak_SetParameter(3, rng.randint(*PITCH), 0)
            data = text.encode()
            library.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)  # 1: UTF-8
            library.espeak_Synchronize()
            library.espeak_Terminate()
        finally:
            _ctypes.dlclose(library._handle)
        return np.concatenate(chunks or [np.zeros(0, np.int16)]).astype(np.float32) / 32768, rate_hz

    return speak


def hf_engine(name, revision):
    from transformers import pipeline
    pipe = pipeline("text-to-speech", model=m.resolve(name, revision), trust_remote_code=False,
                    model_kwargs={"use_safetensors": True})

    def speak(text, _voice, rng):
        torch.manual_seed(rng.getrandbits(32))
        result = pipe(readable(text))
        return np.asarray(result["audio"], np.float32).reshape(-1), result["sampling_rate"]

    return speak


def command_engine(words):
    import soundfile

    def speak(text, voice, _rng):
        with tempfile.TemporaryDirectory() as folder:
            wav = os.path.join(folder, "speech.wav")
            values = {"{text}": readable(text).lstrip("-"), "{wav}": wav, "{voice}": voice}
            result = subprocess.run([values.get(w, w) for w in words],  # never through a shell
                                    capture_output=True, text=True, errors="replace", timeout=300)
            if result.returncode or not os.path.exists(wav):
                said = result.stderr.strip()[-200:] or "no audio file"
                raise ValueError(f"{words[0]} exited {result.returncode}: {said}")
            return (soundfile.read(wav, dtype="float32", always_2d=True)[0].mean(1),
                    soundfile.info(wav).samplerate)

    return speak


def start_worker(args):
    global speak  # one engine a process
    torch.set_num_threads(1)
    if multiprocessing.parent_process():  # a killed parent tells its workers nothing
        threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                         daemon=True).start()
    speak = {"espeak": espeak_engine, "hf": lambda: hf_engine(args.tts_model, args.revision),
             "command": lambda: command_engine(args.tts_command)}[args.engine]()


def synthesise(job):
    """(row id, text, seed, voices, OUT) -> record.
    The file appears complete, under its final name, or not at all."""
    import soundfile
    from torchaudio.functional import resample
    row_id, text, seed, voices, out = job
    rng = random.Random(f"{seed} {row_id}")
    voice = rng.choice(voices)
    try:
        samples, rate_hz = speak(text, voice, rng)
    except (ValueError, OverflowError, soundfile.LibsndfileError,
            subprocess.TimeoutExpired) as error:
        return {"id": row_id, "error": str(error)}
    if (len(samples) < rate_hz // 10 or not np.isfinite(samples).all()
            or np.abs(samples).max() < 1e-3):
        return {"id": row_id, "error": f"no sound ({len(samples)} samples)"}
    samples = resample(torch.from_numpy(samples), rate_hz, m.SAMPLE_RATE).clamp(-1, 1).numpy()
    plain = re.fullmatch(r"[\w.-]{1,80}", row_id) and row_id.strip(".")
    name = row_id if plain else hashlib.sha1(row_id.encode()).hexdigest()
    path = Path(out) / "wav" / f"{name}.flac"
    flac = io.BytesIO()  # in a file soundfile would hide that the disk is full
    soundfile.write(flac, samples, m.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    path.with_suffix(".tmp").write_bytes(flac.getvalue())
    os.replace(path.with_suffix(".tmp"), path)
    return {"id": row_id, "audio": f"wav/{name}.flac", "voice": voice, "sample_rate": m.SAMPLE_RATE,
            "seconds": round(len(samples) / m.SAMPLE_RATE, 3)}


# ---- the recogniser ----

def load_recogniser(args):
    from transformers import WhisperForConditionalGeneration, WhisperProcessor
    folder = m.resolve(args.asr, args.revision)
    whisper = m.from_folder(WhisperForConditionalGeneration, folder,
                            dtype=measured_dtype(args.device))
    return whisper.to(args.device).eval(), m.from_folder(WhisperProcessor, folder)


def word_error_rates(whisper, processor, waveforms, texts, language):
    """Transcribe (S_i,) waveforms and compare, after Whisper's own text normalisation
    -> [(rate, transcript), ...]."""
    from transformers.models.whisper.english_normalizer import (BasicTextNormalizer,
                                                                EnglishTextNormalizer)
    normalise = EnglishTextNormalizer({}) if language == "en" else BasicTextNormalizer()
    inputs = processor([w.numpy() for w in waveforms], sampling_rate=m.SAMPLE_RATE,
                       return_tensors="pt", return_attention_mask=True).to(whisper.device)
    longest = max(len(text.split()) for text in texts)
    with torch.inference_mode():
        ids = whisper.generate(inputs.input_features.to(whisper.dtype),
                               attention_mask=inputs.attention_mask, language=language,
                               task="transcribe", max_new_tokens=min(400, 4 * longest + 20))
    results = []
    for heard, text in zip(processor.batch_decode(ids, skip_special_tokens=True), texts):
        reference, words = normalise(text).split(), normalise(heard).split()
        results.append((m.edit_distance(reference, words) / max(1, len(reference)), heard.strip()))
    return results


# ---- main ----

def gather_prompts(args, raw, out, rank, world, teacher):
    """Rows from the file, the hub or the teacher, filtered and split; the same on every rank."""
    drops = []
    if raw:
        return choose(raw, args, drops), drops
    stage = Stage(out, "prompts", rank)
    bar = tqdm(total=args.sample_prompts, desc="prompts", unit="row", disable=rank > 0)
    while True:
        chunks = stage.load()
        drops.clear()
        # chunks in order up to the first gap: the choice cannot depend on when the run was stopped
        complete = next(i for i in range(len(chunks) + 1) if i not in chunks)
        rows = choose([dict(row) for i in range(complete) for row in chunks[i]["rows"]],
                      args, drops)
        bar.update(len(rows) - bar.n)
        if len(rows) == args.sample_prompts:
            return rows, drops
        if complete * SAMPLE_CHUNK > 40 * args.sample_prompts + 40 * SAMPLE_CHUNK:
            raise RuntimeError(f"{len(rows)} usable prompts in {complete * SAMPLE_CHUNK} samples; "
                               "raise --max-words, or use another teacher")
        chunk = complete + rank
        if chunk not in chunks:
            stage.add([{"id": chunk, "rows": sample_prompts(*teacher(), args.seed, chunk)}])
        if world > 1:
            dist.barrier()


def answer_all(args, stage, rows, rank, world, teacher):
    """Answers in batches of like length, a batch or more for each process; the plan depends on
    the rows and on `world` alone, so a restart gives the same answers."""
    wanted = [r for split in ("heldout", "train") for r in rows
              if r["split"] == split and r.get("source") != "drill"]
    wanted = wanted[:args.answers if args.answers >= 0 else None]
    wanted = sorted((r for r in wanted if not r.get("response")),
                    key=lambda r: (len(r["prompt"]), r["id"]))
    size = max(1, min(args.batch_size, -(-len(wanted) // world)))
    plan = [wanted[i:i + size] for i in range(0, len(wanted), size)]
    todo = [b for i, b in enumerate(plan)
            if i % world == rank and any(r["id"] not in stage.done for r in b)]
    tokens, start = 0, time.perf_counter()
    with tqdm(total=sum(map(len, plan)), initial=len(stage.done), desc="answers", unit="row",
              disable=rank > 0) as bar:
        for batch in todo:
            records = answer(*teacher(), batch, args.max_new_tokens)
            stage.add([r for r in records if r["id"] not in stage.done])
            tokens += sum(r["tokens"] for r in records)
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tok/s")
    return tokens / (time.perf_counter() - start)


def speak_all(args, stage, rows, out, rank, world):
    (out / "wav").mkdir(exist_ok=True)
    mine = [r for i, r in enumerate(rows) if i % world == rank]
    todo = [(r["id"], r["prompt"], args.seed, args.voices, str(out)) for r in mine
            if r["id"] not in stage.done]
    if not todo:
        return
    with (ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), start_worker,
                              (args,)) as pool,
          tqdm(total=len(mine), initial=len(mine) - len(todo), desc="speech", unit="row",
               disable=rank > 0) as bar):
        for record in pool.map(synthesise, todo,
                               chunksize=min(16, 1 + len(todo) // (4 * args.workers))):
            stage.add([record])
            bar.update()


def check_all(args, stage, rows, speech, out, rank, world):
    """Word error rates of all rows, or of a sample; sorted by length, in batches of 16."""
    share = 1.0 if args.max_wer else args.wer_sample
    chosen = [r for r in rows if "audio" in speech[r["id"]]
              and (args.max_wer or r.get("source") != "drill")
              and random.Random(f"wer {args.seed} {r['id']}").random() < share]
    chosen.sort(key=lambda r: (speech[r["id"]]["seconds"], r["id"]))
    plan = [chosen[i:i + 16] for i in range(0, len(chosen), 16)]
    todo = [b for i, b in enumerate(plan)
            if i % world == rank and any(r["id"] not in stage.done for r in b)]
    recogniser = load_recogniser(args) if todo else None
    for batch in tqdm(todo, desc="transcribing", unit="batch", disable=rank > 0):
        waveforms = [m.load_audio(out / speech[r["id"]]["audio"]) for r in batch]
        rates = word_error_rates(*recogniser, waveforms, [r["prompt"] for r in batch],
                                 args.language)
        stage.add([{"id": r["id"], "wer": round(w, 4), "heard": heard}
                   for r, (w, heard) in zip(batch, rates) if r["id"] not in stage.done])


def preview(rows):
    """A page to listen to some rows; every text is escaped."""
    cells = ("<tr><td><audio controls preload=none src='{audio}'></audio>"
             "<td>{prompt}<td>{response}<td>{voice}<td>{wer}")
    lines = [cells.format(**{k: html.escape(str(v), quote=True) for k, v in row.items()})
             for row in rows]
    return ("<!doctype html><meta charset=utf-8><title>Rows to listen to</title>\n"
            "<style>td{padding:.4em;border-bottom:1px solid #ccc}</style>\n"
            "<table>\n<tr><th>speech<th>prompt<th>teacher's answer<th>voice<th>word error rate\n"
            + "\n".join(lines) + "\n</table>\n")


def write_results(args, out, rows, drops, stages, tokens_per_s):
    """Merge the stages in input order -> manifests, dropped.jsonl, summary.json, preview.html."""
    answers, speech, rates = stages
    manifests = {"train": [], "heldout": []}
    for row in rows:
        spoken, wer = speech[row["id"]], rates.get(row["id"], {}).get("wer")
        if "error" in spoken or (args.max_wer and wer > args.max_wer):
            reason = "no speech" if "error" in spoken else f"word error rate over {args.max_wer}"
            detail = spoken.get("error", wer)
            drops.append({"id": row["id"], "reason": reason, "prompt": row["prompt"],
                          "detail": detail})
            continue
        reply = answers.get(row["id"], {})
        manifests[row.pop("split")].append({
            "source": "sampled" if args.sample_prompts else args.input or args.hub_dataset,
            "language": args.language, "response": None, "finish": None, **row,
            **{k: reply[k] for k in ("response", "finish") if k in reply},
            **{k: spoken[k] for k in ("audio", "voice", "seconds", "sample_rate")}, "wer": wer})
    kept = manifests["train"] + manifests["heldout"]
    if not kept:
        raise RuntimeError(f"no row is left of {len(rows)}: "
                           f"{collections.Counter(d['reason'] for d in drops)}")
    for name, content in (*manifests.items(), ("dropped", drops)):
        if content or name != "heldout":
            m.write_atomically(out / f"{name}.jsonl",
                             "".join(json.dumps(row) + "\n" for row in content))
    measured = [row["wer"] for row in kept if row["wer"] is not None]
    summary = {"rows": {k: len(v) for k, v in manifests.items()},
               "answered": sum(r["response"] is not None for r in kept),
               "hours": round(sum(r["seconds"] for r in kept) / 3600, 3),
               "voices": len({r["voice"] for r in kept}),
               "mean_wer": round(float(np.mean(measured)), 4) if measured else None,
               "wer_measured_on": len(measured), "answer_tokens_per_s": round(tokens_per_s, 1),
               "dropped": collections.Counter(d["reason"] for d in drops)}
    m.write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    if args.preview:
        m.write_atomically(out / "preview.html", preview(kept[:args.preview]))
    print(json.dumps(summary, indent=1))
    return len(drops) and any(d["reason"] == "no speech" for d in drops)


def main(args):
    signal.signal(signal.SIGTERM, m.stop_now)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        cores = m.cores()  # torchrun sets one thread a process
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    if args.engine == "espeak":  # fail before the teacher works, not after
        for voice in args.voices:
            espeak_engine()("a", voice, random.Random(0))
    out = Path(args.out)
    bad = []
    raw = read_rows(args.input, args.limit, bad) if args.input else []
    if (said := m.leave_out(bad, args.max_bad_rows, out, rank == 0)) and rank == 0:
        print(said)
    raw = hub_rows(args.hub_dataset, args.limit) if args.hub_dataset else raw
    unimportant = ("workers", "preview", "device", "out")
    plan, plan_path = ({k: v for k, v in vars(args).items() if k not in unimportant},
                       out / ".stages" / "args.json")
    plan["content of the input"] = hashlib.sha1(json.dumps(raw).encode()).hexdigest()
    if plan_path.exists() and json.loads(plan_path.read_text()) != plan:
        old = json.loads(plan_path.read_text())
        changed = ", ".join(k for k in plan if plan[k] != old.get(k))
        raise ValueError(f"{out} was begun with other options ({changed}); repeat them to go on, "
                         "or choose another --out")
    for name in filter(None, (args.tts_model, (args.max_wer or args.wer_sample) and args.asr)):
        m.resolve(name, args.revision)
    dtype_path, loaded = out / ".stages" / "dtype", []
    # measured once: a restart must not answer in another precision; a bad teacher leaves no trace
    if rank == 0 and not dtype_path.exists():
        dtype = str(measured_dtype(args.device)) if args.dtype == "auto" else args.dtype
        dtype = dtype.removeprefix("torch.")
        if args.answers and not all(row.get("response") for row in raw or [{}]):
            loaded.append(m.load_llm(args.teacher, getattr(torch, dtype), args.revision))
            m.check_context(loaded[0][0].to(args.device), 1, args.max_new_tokens)
        dtype_path.parent.mkdir(parents=True, exist_ok=True)
        m.write_atomically(dtype_path, dtype)
    if rank == 0:
        m.write_atomically(plan_path, json.dumps(plan))
    if world > 1:
        dist.barrier()

    def teacher():  # only when something is left to generate
        if not loaded:
            loaded.append(m.load_llm(args.teacher, getattr(torch, dtype_path.read_text()),
                                     args.revision))
            loaded[0][0].to(args.device)
        return loaded[0]

    rows, drops = gather_prompts(args, raw, out, rank, world, teacher)
    if args.drill:
        tokenizer = m.from_folder(AutoTokenizer, m.resolve(args.teacher, args.revision))
        rows += drill_rows(rows, args.drill, tokenizer.get_vocab(), args.seed)
    stages = [Stage(out, name, rank) for name in ("answers", "speech", "wer")]
    for stage in stages:
        stage.load()
    tokens_per_s = answer_all(args, stages[0], rows, rank, world, teacher)
    loaded.clear()
    speak_all(args, stages[1], rows, out, rank, world)
    if world > 1:
        dist.barrier()
    if args.max_wer or args.wer_sample:
        check_all(args, stages[2], rows, stages[1].load(), out, rank, world)
    failed = False
    if world > 1:
        dist.barrier()
    if rank == 0:
        failed = write_results(args, out, rows, drops, [stage.load() for stage in stages],
                               tokens_per_s)
    if world > 1:
        dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args()))
    except (ValueError, RuntimeError, OSError) as error:
        print("synth_speech.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
