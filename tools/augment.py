"""
Clips as the world has them: faster or slower, in a room, in noise, over a telephone, through a codec.

  python tools/augment.py data/result/piper/train.jsonl
  python tools/augment.py data/orca/train.jsonl --kinds noise room --snr 0 15 --noise-folder MY_NOISES

Each kind befalls half of the clips; what befell a clip is drawn by its id and stands in its row: {"augment": {"room": 0.41, "noise":
"babble, 7.2 dB"}}. What is said and answered stays, so a teacher's cache serves both forms, and train_kd.py reads both manifests together.
Reads   a manifest of synth_speech.py, or of your own recordings
Writes  beside it MANIFEST-augmented.jsonl and augmented/*.flac. Stopped anywhere, the same command goes on.
Rows whose prompt is null are left out: what they say about a sound would no longer be true.
"""
import argparse
import functools
import hashlib
import io
import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile
import torch
from torchaudio import functional as A

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as m
import synth_speech as synth

KINDS = ("speed", "room", "noise", "phone", "codec")  # in the order in which they befall a clip
SPEEDS = [0.86, 0.9, 0.94, 1.06, 1.1, 1.14]           # that turn 16 kHz into a rate that resamples quickly
ROOM_S = (0.15, 0.6)    # until an echo has died down by 60 dB
DIRECT_DB = (0, 10)     # the direct sound over its echoes
TALKERS = (3, 6)        # of babble
CODECS = {"opus": ("OGG", "OPUS"), "vorbis": ("OGG", "VORBIS"), "mp3": ("MP3", "MPEG_LAYER_III")}
PHONE_HZ = 8000


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("manifest", help="JSON lines with id, prompt, audio")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what may befall a clip")
    p.add_argument("--snr", nargs=2, type=m.number(float, -20, 60), default=[0, 20], metavar=("LOW", "HIGH"), help="dB, voice over noise")
    p.add_argument("--noise-folder", help="audio files that are noise, too, beside coloured noise and the babble of other rows")
    p.add_argument("--max-wer", type=m.number(float, 0), default=0, help="leave out clips that the recogniser hears worse; 0: unheard")
    p.add_argument("--asr", default="openai/whisper-base", help="Whisper model that hears them")
    p.add_argument("--language", default="en", help="of the speech that the recogniser hears (ISO 639-1)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="of the recogniser")
    p.add_argument("--seed", type=m.number(int, 0, 2**32), default=0, help="of all that is drawn")
    return p.parse_args(argv)


# ---- what befalls a clip: (waveform (S,) at 16 kHz, rng) -> the same, what it was ----

def speed(waveform, rng):
    factor = rng.choice(SPEEDS)  # pitch and all, as a tape
    return A.resample(waveform, round(m.SAMPLE_RATE * factor), m.SAMPLE_RATE), factor


def room(waveform, rng):
    """Echoes: noise that dies down, some dB below the direct sound."""
    seconds, direct_db = rng.uniform(*ROOM_S), rng.uniform(*DIRECT_DB)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    times = torch.arange(1, round(seconds * m.SAMPLE_RATE)) / m.SAMPLE_RATE        # s
    echoes = torch.randn(len(times), generator=generator) * 10 ** (-3 * times / seconds)
    echoes *= 10 ** (-direct_db / 20) / echoes.norm()
    response = torch.cat([torch.ones(1), echoes])
    return A.fftconvolve(waveform, response)[:len(waveform)], round(seconds, 2)


def coloured(num_samples, rng):
    """Noise whose power falls by f^-a: white (0), pink (1), brown (2), and between -> (S,)"""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    spectrum = torch.fft.rfft(torch.randn(num_samples, generator=generator))
    slope = rng.uniform(0, 2)
    heard = torch.arange(1, len(spectrum) + 1) * m.SAMPLE_RATE / num_samples       # Hz
    return torch.fft.irfft(spectrum * heard.clamp(min=50) ** (-slope / 2), num_samples)


def looped(waveform, num_samples, rng):
    """A piece of a recording that begins anywhere, again from its start where it ends -> (S,)"""
    waveform = waveform.roll(-rng.randrange(len(waveform)))
    return waveform.repeat(-(-num_samples // len(waveform)))[:num_samples]


def noise(waveform, rng, clips, recordings, snr):
    """Coloured, babble of other clips, or one of the recordings."""
    sources = ["coloured", "babble", *["recorded"] * bool(recordings)]
    source, snr_db, size = rng.choice(sources), rng.uniform(*snr), len(waveform)
    if source == "coloured":
        sound = coloured(size, rng)
    elif source == "recorded":
        sound = looped(m.load_audio(rng.choice(recordings)), size, rng)
    else:
        voices = []
        for path in rng.sample(clips, min(len(clips), rng.randint(*TALKERS))):
            voice = looped(m.load_audio(path), size, rng)
            voices.append(voice / voice.norm().clamp(min=1e-6))
        sound = torch.stack(voices).sum(0)
    return A.add_noise(waveform, sound, torch.tensor(snr_db)), f"{source}, {snr_db:.1f} dB"


def through(samples, rate_hz, kind, subtype, **options):
    """Write and read a lossy format -> (S',), the same rate."""
    file = io.BytesIO()
    soundfile.write(file, samples.clamp(-1, 1).numpy(), rate_hz, format=kind, subtype=subtype, **options)
    file.seek(0)
    return torch.from_numpy(soundfile.read(file, dtype="float32")[0])


def phone(waveform, rng):
    """300 to 3,400 Hz, and GSM's codec."""
    line = A.resample(A.lowpass_biquad(A.highpass_biquad(waveform, m.SAMPLE_RATE, 300), m.SAMPLE_RATE, 3400), m.SAMPLE_RATE, PHONE_HZ)
    line = through(line, PHONE_HZ, "WAV", "GSM610")
    return A.resample(line, PHONE_HZ, m.SAMPLE_RATE)[:len(waveform)], "gsm"


def codec(waveform, rng):
    name = rng.choice(sorted(CODECS))
    return through(waveform, m.SAMPLE_RATE, *CODECS[name], compression_level=rng.uniform(0.8, 1))[:len(waveform)], name


# ---- a manifest ----

def augment(waveform, kinds, befalls, rng):
    """Let each of the kinds befall a clip with a chance of one half, at least one -> waveform (S',) within -1 to 1, {kind: what it was}."""
    chosen = [kind for kind in kinds if rng.random() < 0.5] or [rng.choice(kinds)]
    found = {}
    for kind in chosen:
        waveform, found[kind] = befalls[kind](waveform, rng)
    return waveform / max(1.0, float(waveform.abs().max())), found


def audio_files(folder):
    files = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in (".wav", ".flac", ".mp3", ".ogg")]
    for path in files:
        m.audio_seconds(path)  # raises ValueError
    if not files:
        raise ValueError(f"--noise-folder {folder}: no .wav, .flac, .mp3 or .ogg file; expected some")
    return files


def read_rows(path):
    """Rows that say something -> with their clips' paths; how many others there are."""
    def parse(row, where):
        m.check_texts(row, where, "prompt", "audio")
        if "id" not in row or not row.get("audio"):
            raise ValueError(f"{where}: no id or audio; expected a manifest of synth_speech.py")
        return row | {"clip": m.file_below(path.parent, row["audio"], where)}

    rows = m.json_lines(path, parse)
    kept = [row for row in rows if row.get("prompt")]
    if not kept:
        raise ValueError(f"{path}: none of {len(rows)} rows has a prompt; expected what synth_speech.py writes as train.jsonl")
    return kept, len(rows) - len(kept)


def make(row, args, key, befalls):
    """Write a row's augmented clip, whole or not at all -> its record."""
    rng = random.Random(f"{key} {row['id']}")
    waveform, found = augment(m.load_audio(row["clip"]), args.kinds, befalls, rng)
    audio = f"augmented/{Path(row['audio']).stem}-{key[:8]}.flac"
    temporary = Path(args.out, audio).with_suffix(".tmp")
    soundfile.write(temporary, waveform.numpy(), m.SAMPLE_RATE, format="FLAC")
    os.replace(temporary, Path(args.out, audio))
    return {"id": row["id"], "audio": audio, "augment": found, "seconds": round(len(waveform) / m.SAMPLE_RATE, 3)}


def main(args):
    m.start_processes(args.device)
    path = Path(args.manifest)
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest; synth_speech.py writes one")
    rows, others = read_rows(path)
    recordings = audio_files(args.noise_folder) if args.noise_folder else []
    clips = [row["clip"] for row in rows]
    add_noise = functools.partial(noise, clips=clips, recordings=recordings, snr=args.snr)
    befalls = {"speed": speed, "room": room, "noise": add_noise, "phone": phone, "codec": codec}
    content = [args.seed, args.kinds, args.snr, *map(m.digest, clips + recordings)]  # what all clips depend on
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    args.out = path.parent
    (args.out / "augmented").mkdir(exist_ok=True)

    with ThreadPoolExecutor(m.cores()) as pool:
        work = functools.partial(make, args=args, key=key, befalls=befalls)
        made = synth.staged(args, f"augmented-{key[:16]}", rows, 64, lambda batch: pool.map(work, batch))
    asked = [{"prompt": row["prompt"], **made[row["id"]]} for row in rows if args.max_wer]
    whisper = functools.cache(lambda: m.load_whisper(args.asr).to(args.device))
    heard = synth.staged(args, f"augmented-heard-{key[:16]}", asked, 32, lambda batch: synth.listen(args, whisper(), batch))

    kept = []
    for row in rows:
        clean = {name: value for name, value in row.items() if name not in ("clip", "wer", "heard")}
        record = {**clean, **made[row["id"]], **heard.get(row["id"], {}), "id": f"{row['id']}-augmented"}
        if not args.max_wer or record["wer"] <= args.max_wer:
            kept.append(record)
    if not kept:
        raise ValueError(f"{path}: each of {len(rows)} clips is heard worse than --max-wer {args.max_wer}; raise it, or --snr")
    if m.ranks()[0] == 0:
        target = path.with_name(f"{path.stem}-augmented.jsonl")
        m.write_atomically(target, "".join(json.dumps(record) + "\n" for record in kept))
        print(f"{target}: {len(kept)} rows; {len(rows) - len(kept)} heard worse than --max-wer, {others} without a prompt are left out")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("augment.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
