#!/usr/bin/env bash
# The data of tools/run_results.py, in data/result: questions with the data sets' answers and the teacher's, spoken; and what is
# held out. README.md says where the two files are; --speech: recordings of people, a folder with manifest.jsonl (path, text).
#
#   bash tools/result_data.sh --webquestions FILE --nq FILE [--speech FOLDER]      12 minutes on two cores
#   PROMPTS=4000 bash tools/result_data.sh ...       more to train on than 800 prompts, in data/result-4000: 45 minutes
#
# Stopped anywhere, the same command goes on. Of the voices' conditions only rate and background noise are drawn: room and
# telephone band are left out, and so is the language of the speaker.
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$tools") prompts=${PROMPTS:-800} name=result
[ "$prompts" = 800 ] || name=result-$prompts
data=$root/data/$name
started=$SECONDS
say() { printf '\n== %4d s  %s\n' $((SECONDS - started)) "$*"; }
synth() { python "$root/synth_speech.py" --max-new-tokens 24 "$@"; }
unheard="en-us+klatt2 en-us+klatt4 en-us+klatt6 en-us+m4 en-us+m5 en-us+f3 en-us+f4"

say "questions: what is trained on, what is held out, which of these the teacher answers right"
python "$tools/result_data.py" questions --prompts "$prompts" --heldout "${HELDOUT:-1000}" --out "$data" "$@"

say "what is trained on: the teacher's answers, each prompt spoken twice, half of the prompts by Piper"
synth --input "$data/train-piper.jsonl" --engine piper --takes 2 --heldout 32 --out "$data/piper"

say "the other half by espeak, men and women"
synth --input "$data/train-espeak.jsonl" --takes 2 --heldout 32 --out "$data/espeak" \
    --voices en-us+m1 en-us+m3 en-us+m6 en-us+m7 en-us+m8 en-us+f1 en-us+f2 en-us+f5

say "held out: the questions in Piper's voice, in espeak voices that are never trained on, sounds in these, human questions"
synth --input "$data/ask-heard.jsonl" --engine piper --out "$data/heard"
synth --input "$data/ask-unheard.jsonl" --voices $unheard --out "$data/unheard"
synth --input "$data/espeak/heldout.jsonl" --takes 2 --voices $unheard --out "$data/unheard-sounds"
synth --input "$tools/questions.jsonl" --engine piper --out "$data/human"
python "$tools/sound_questions.py" "$data"/{piper,espeak,unheard-sounds}
python "$tools/preview.py" "$data/piper/train.jsonl"
python "$tools/result_data.py" both --out "$data"

say "done: python tools/run_results.py --data data/$name"
