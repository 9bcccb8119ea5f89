"""Small trained tokenizers of the kinds that causal models come with, as backends."""

from __future__ import annotations

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "Hello world, a naïve café at 12: 你好. The capital of France is Paris.  Two  spaces\n",
    "a b c def",
] * 9
SPECIAL = ["<unk>", "<s>", "<|end|>"]


def byte_level(**options: object) -> Tokenizer:
    """Like GPT-2 and Llama 3: bytes as characters; offsets that leave out spaces, unless told otherwise."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(options.get("add_prefix_space", False))
    )
    made.decoder = decoders.ByteLevel()
    if options.get("nfc"):
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(made, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, special_tokens=SPECIAL))
    made.post_processor = processors.ByteLevel(trim_offsets=bool(options.get("trims", True)))
    return made


def llama() -> Tokenizer:
    """Like Llama 2: a space before the text, spaces as marks, bytes of what the vocabulary lacks."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    train(made, trainers.BpeTrainer(vocab_size=420, special_tokens=tokens))
    return made


def gemma() -> Tokenizer:
    """Like Gemma: the same without a space before the text."""
    made = llama()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def unigram() -> Tokenizer:
    """Like T5 and XLNet: words with a mark before each, compatible characters made one."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    train(made, trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>"))
    return made


def word_piece() -> Tokenizer:
    """Like BERT: words in lower case, without accents."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    train(made, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return made


def train(made: Tokenizer, trainer: object) -> None:
    trainer.show_progress = False
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
