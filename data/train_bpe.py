"""Training a tokenizer: texts -> the bytes of tokenizer.json. Needs the `tokenizers` package."""
import itertools
import json
import re

import numpy as np

from data.dataset import BadInput, package
from data.tokenizer import MAX_PHRASE_BYTES, MAX_PIECE_BYTES, NO_TOKEN, PATTERN, Tokenizer, lower_case

SAMPLE_BYTES = 1_000_000_000   # of text that the pieces are trained on, at most
PHRASE_BYTES = 60_000_000      # of text that the phrases are counted on, at most
# Training takes time with the square of a chunk's length (a word of 100 kB: 10 s), so that a longer
# one is cut here.
TRAINING_PATTERN = PATTERN.replace("+", "{1,256}")


def train_tokenizer(texts, vocab_size, name):
    """Function () -> iterator of texts (after the text rule) -> tokenizer.json of vocab_size
    tokens, a 16th of them phrases.

    The pieces come from a BPE within chunks, then the phrases from counting neighbours. The same
    texts, the same bytes.
    """
    with package("training a tokenizer (not --tokenizer=FILE)"):
        import tokenizers
    n_phrases = vocab_size // 16
    n_pieces = vocab_size - 1 - (256 - len(NO_TOKEN)) - n_phrases
    # ByteLevel writes a byte as the character that it is in Latin-1, or one from 256 on if that is
    # not to be seen.
    others = itertools.count(256)
    byte_of = {}
    for byte in range(256):
        shown = chr(byte).isprintable() and byte != ord(" ")
        byte_of[chr(byte if shown else next(others))] = byte
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(TRAINING_PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + max(n_pieces, 0), initial_alphabet=list(byte_of), max_token_length=MAX_PIECE_BYTES,
        show_progress=False)
    bpe.train_from_iterator(map(lower_case, at_most(SAMPLE_BYTES, texts())), trainer)
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    pieces = [bytes(map(byte_of.get, piece)).decode("latin-1") for piece, _ in vocab if len(piece) > 1]
    spec = {"format": 2, "name": name, "pieces": pieces, "phrases": []}
    tokenizer = Tokenizer(to_json(spec))
    docs = tokenizer.encode_batch(at_most(PHRASE_BYTES, texts()))
    spec["phrases"] = find_phrases(tokenizer, docs, n_phrases)
    found = tokenizer.vocab_size + len(spec["phrases"])
    if found != vocab_size:
        raise BadInput(f"--vocab_size={vocab_size}: single bytes and what the text gives are {found} tokens")
    return to_json(spec)


def find_phrases(tokenizer, docs, n_phrases):
    """Token arrays of documents -> [(left, right), ...]: the most frequent pairs of whole chunks,
    greedily as in BPE.

    Only whole chunks are counted: a phrase that ends in half a word ("of the" + "ory") would break
    up the word.
    """
    # Neighbours that both begin a chunk, before a third that does, are whole chunks.
    inside = re.compile(rb"[a-z0-9'\x80-\xff]")
    begins = np.array([not inside.match(piece) for piece in tokenizer.pieces] + [True] * n_phrases)
    size = np.array([len(piece) for piece in tokenizer.pieces] + [0] * n_phrases)
    size[tokenizer.boundary] = MAX_PHRASE_BYTES   # it is in no phrase
    tokens = np.concatenate([*docs, [tokenizer.boundary]]).astype(np.int64)
    phrases = []
    while len(phrases) < n_phrases:
        left, right = tokens[:-2], tokens[1:-1]
        whole = begins[left] & begins[right] & begins[tokens[2:]] & (left != right)
        whole &= size[left] + size[right] <= MAX_PHRASE_BYTES
        pairs, counts = np.unique(left[whole] << 16 | right[whole], return_counts=True)
        used = set()   # a round takes pairs without a common token, so that their counts stay true
        for index in np.lexsort((pairs, -counts))[:n_phrases - len(phrases)]:
            pair = divmod(int(pairs[index]), 1 << 16)
            if used & {*pair}:
                break
            used |= {*pair}
            at = np.flatnonzero((tokens[:-1] == pair[0]) & (tokens[1:] == pair[1]))
            phrase = tokenizer.vocab_size + len(phrases)
            size[phrase] = size[pair[0]] + size[pair[1]]
            tokens[at] = phrase
            tokens = np.delete(tokens, at + 1)
            phrases.append(pair)
        if not used:
            break
    return phrases


def to_json(spec):
    return json.dumps(spec, ensure_ascii=False, separators=(",", ":")).encode()


def at_most(n_bytes, texts):
    """The first texts of n_bytes in all, the last of them whole."""
    for text in texts:
        yield text
        n_bytes -= len(text.encode())
        if n_bytes <= 0:
            return
