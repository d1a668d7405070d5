"""
Serve a text-to-speech model of transformers: it is loaded once, synth_speech.py asks it for each clip.

  python tools/tts_server.py facebook/mms-tts-eng &
  python synth_speech.py --input in.jsonl --out data/mms --engine command \
      --tts-command curl -sf --data-raw {text} -o {wav} localhost:8123

Reads   the body of a POST: the text to say, in UTF-8. These models read no numbers: they get them as words
Writes  the answer: a WAV file. The same text always sounds alike. Only this machine can ask.
"""
import argparse
import io
import sys
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import model as m
from readable import readable


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("model", help="text-to-speech model of transformers, folder or hub id")
    p.add_argument("--port", type=m.number(int, 0, 65535), default=8123, help="of this machine; 0: any that is free")
    p.add_argument("--language", default="en", help="of the numbers in a text (ISO 639-1)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="of the model")
    return p.parse_args(argv)


def say(speaker, text):
    """Text -> bytes of a WAV file."""
    torch.manual_seed(zlib.crc32(text.encode()))  # whatever was said before
    result, wav = speaker(text), io.BytesIO()
    samples = np.asarray(result["audio"], np.float32).reshape(-1)
    soundfile.write(wav, samples, result["sampling_rate"], format="WAV", subtype="FLOAT")
    return wav.getvalue()


def start(args):
    """-> server that has the model and waits for serve_forever."""
    speaker = transformers.pipeline("text-to-speech", model=m.resolve(args.model), device=args.device, trust_remote_code=False,
                                    model_kwargs={"use_safetensors": True})

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                text = self.rfile.read(int(self.headers["Content-Length"])).decode()
                wav = say(speaker, readable(text, args.language))
            except (ValueError, RuntimeError, LookupError, TypeError) as error:  # a text that this model cannot say
                print(f"{text!r}: {error}", file=sys.stderr, flush=True)  # curl -f does not tell
                return self.send_error(500, explain=str(error))
            self.send_response(200)
            self.send_header("Content-Length", str(len(wav)))
            self.end_headers()
            self.wfile.write(wav)

        def log_message(self, *_):
            """Nothing a clip."""

    HTTPServer.request_queue_size = 1024  # callers that wait; of 5 the sixth would be refused for a while
    return HTTPServer(("127.0.0.1", args.port), Handler)


if __name__ == "__main__":
    try:
        server = start(get_args())
        print(f"waiting at localhost:{server.server_port}", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)
    except (ValueError, RuntimeError, OSError) as error:
        print("tts_server.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
