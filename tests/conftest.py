"""What the tests share: `tiny`, random models that are built here in a second; `real`, the default ones."""
import itertools
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SYSTEM = "You are a helpful AI assistant named Tiny, made for tests"
CHAT_TEMPLATE = (  # SmolLM2's, with another default system message
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + "
    "'\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
STARTS = ["What is the", "Please describe the", "How would you explain the", "Can you tell me about the",
          "Why do people like the", "Write a short story about the"]
MIDDLES = ["capital of France", "weather in October", "quickest way to learn a language",
           "seven wonders of the world", "difference between salt and sugar", "best recipe for apple cake",
           "music that my grandmother loved"]
QUESTIONS = [f"{start} {middle}?" for middle, start in itertools.product(MIDDLES, STARTS)]
ANSWERS = ["It is not hard: begin with small steps, and practise every day.", "Paris, of course!", "Yes.",
           "Take two of them, wait for an hour, and then look again.", "I think that nobody knows for sure.",
           "Every morning the children walk along the river to school, where Mister Green opens the door."]


def sound(seconds, seed=0):
    """Noise and a tone, (S,) float32 at 16 kHz; the same for the same arguments."""
    noise = torch.randn(int(seconds * 16_000), generator=torch.Generator().manual_seed(seed))
    return 0.05 * noise + 0.2 * torch.sin(torch.arange(len(noise)) * (0.1 + 0.03 * (seed % 50)))


@pytest.fixture(autouse=True)
def own_signals():
    """The scripts' handlers of SIGTERM and Ctrl-C end with the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def whole_prompt(tokenizer, text, system=None):
    """Ids of the chat template, all at once."""
    chat = [{"role": "system", "content": system}] if system else []
    chat.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@torch.inference_mode()
def hidden_rows(student, rows, answers):
    """Hidden states that predict the answers, one (n_i, H) per row."""
    import model as m
    ids = [m.text_ids(student.tokenizer, answer) for answer in answers]
    return student([student.prompt(row) for row in rows], ids).split([len(i) for i in ids])


def manifest(folder, n, *, name="train", seed=0, **options):
    """Write n rows as synth_speech.py does: FOLDER/NAME.jsonl and FOLDER/wav/*.flac -> path of the manifest.

    Clips last 0.3 to 1.5 s. Every other option is a key of the rows: a value for all, or a function from the
    row's number, e.g. response=lambda i: "Yes." if i % 2 else None; audio=None leaves the sound out.
    """
    import soundfile
    folder, rows = Path(folder), []
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    for i in range(n):
        waveform = sound(0.3 + 1.2 * (0.37 * i + 0.61 * seed) % 1.2, 1000 * seed + i)
        row = {"source": "sampled", "language": "en", "response": ANSWERS[i % len(ANSWERS)], "finish": "stop",
               "id": f"{name}-{i:03d}", "prompt": QUESTIONS[(i + 5 * seed) % len(QUESTIONS)],
               "audio": f"wav/{name}-{i:03d}.flac", "voice": "noise", "sample_rate": 16_000, "wer": None,
               "seconds": round(len(waveform) / 16_000, 3)}
        row.update({key: value(i) if callable(value) else value for key, value in options.items()})
        row["finish"] = row["finish"] if row["response"] else None
        if row["audio"]:
            soundfile.write(folder / row["audio"], waveform.numpy(), 16_000, format="FLAC", subtype="PCM_16")
        rows.append(row)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_tokenizer(folder):
    """A byte-level BPE of about 600 tokens, put together as SmolLM2's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(QUESTIONS + ANSWERS + [SYSTEM, "system user assistant\n"], trainers.BpeTrainer(
        vocab_size=600, min_frequency=1, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_whisper(folder):
    """A random Whisper, which hears random bytes of English, with its tokenizer and feature extractor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|nospeech|>", "<|notimestamps|>"]
    vocab = {token: k for k, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    bpe = Tokenizer(models.BPE(vocab, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[0], eos_token=special[0], pad_token=special[0]).save_pretrained(folder)
    WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=len(vocab), num_mel_bins=80, d_model=16, max_source_positions=1500, init_std=0.2, encoder_layers=2,
        encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_target_positions=24, pad_token_id=256, bos_token_id=256, eos_token_id=256, decoder_start_token_id=257,
        suppress_tokens=[], begin_suppress_tokens=[])).save_pretrained(folder)
    (Path(folder) / "generation_config.json").unlink()
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


def build_student(name, size):
    """A student whose adapter says something: an untrained one adds nothing, which hides mistakes."""
    import model as m
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = m.build_student(name)
        torch.nn.init.normal_(student.adapter.words.weight, std=size)
        torch.nn.init.normal_(student.adapter.sound.weight, std=size)
        student.adapter.listens.fill_(True)
    return student


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Random models, 80,000 weights: .llm, .encoder, .student (WHISPER+LLM), .student_folder; .manifest()."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import model as m
    root = tmp_path_factory.mktemp("tiny")
    llm, encoder, folder = (str(root / part) for part in ("llm", "encoder", "student"))
    tokenizer = save_tokenizer(llm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # weights larger than usual, so that every input is felt in every output
        LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            tie_word_embeddings=True, initializer_range=0.2, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained(llm)
        save_whisper(encoder)
    m.save_student(build_student(f"{encoder}+{llm}", 0.2), folder)
    return SimpleNamespace(llm=llm, encoder=encoder, student=f"{encoder}+{llm}", student_folder=folder,
                           manifest=manifest)


@pytest.fixture(scope="session")
def real():
    """Names of the default models; a test that takes it is skipped where they are not."""
    import model as m
    encoder, _, llm = m.DEFAULT_STUDENT.partition("+")
    for name in (encoder, llm):
        if not (ROOT / "models" / name / "config.json").is_file():
            pytest.skip(f"models/{name} is absent; python tools/offline_models.py makes it")
    return SimpleNamespace(llm=llm, encoder=encoder, student=m.DEFAULT_STUDENT)


@pytest.fixture(scope="module")
def tiny_student(tiny):
    return build_student(tiny.student, 0.2)


@pytest.fixture(scope="module")
def real_student(real):
    return build_student(real.student, 0.02)


@pytest.fixture(params=["tiny", "real"])
def student(request):
    """The test runs with both."""
    return request.getfixturevalue(f"{request.param}_student")
