"""
Say a text by SVOX Pico (Apache-2.0), which Whisper-base understands in German, Spanish, French and Italian, as it does not espeak.

  pip install ttspico        # has the voices; a C compiler builds it
  python synth_speech.py --input de.jsonl --language de --out data/de --engine command --tts-command python tools/pico_tts.py de {text} {wav}

Writes  WAV: a WAV file of 16 kHz, a woman's voice
"""
import argparse
import sys

import numpy as np
import soundfile

VOICES = {"en": "en-GB", "de": "de-DE", "es": "es-ES", "fr": "fr-FR", "it": "it-IT"}
RATE_HZ = 16_000


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    p.add_argument("language", choices=VOICES, help="ISO 639-1")
    p.add_argument("text", help="what to say")
    p.add_argument("wav", help="file to write")
    return p.parse_args(argv)


def main(args):
    try:
        import ttspico
    except ImportError:
        raise RuntimeError("no module ttspico; `pip install ttspico` builds it (gcc is needed)") from None
    sound = ttspico.TtsEngine(VOICES[args.language]).speak(args.text)
    if not sound:
        raise ValueError(f"{args.text[:60]!r}: nothing to say")
    soundfile.write(args.wav, np.frombuffer(sound, np.int16), RATE_HZ, format="WAV")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("pico_tts.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
