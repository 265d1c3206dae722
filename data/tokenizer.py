"""Byte-level BPE in tiktoken, between a lossless case transform and phrases.

CaseOps. Upper-case letters are written as a marker and the lower-case letter, so "The", "the" and
"THE" share tokens. The marker stands before the word's space: " The" -> "C the", one token more
than " the". Since the transform leaves no A-Z in the text, A-Z are free to be the markers, and
nothing needs an escape:
    C   the next letter is upper case           " The" -> "C the"       "camelCase" -> "camelCcase"
    U   the whole run of letters is upper case  " NASA" -> "U nasa"     "HTTPServer" -> "UhttpCserver"
    L   a U run ends here, before more letters  " PDFs" -> "U pdfLs"
ASCII only: elsewhere Unicode's case tables change from one Python version to the next.

Phrases. Tokens of whole words and marks that often follow each other (", and", " of the", ".C the")
are merged after tiktoken has run. Merges across spaces inside the BPE would break up the pieces of
words.
"""
import hashlib
import json
import re

import numpy as np
import tiktoken

from data.dataset import BadInput

# Chunks that no piece crosses: a word with its space and what follows an apostrophe; up to three
# digits; marks with their space and the case marker behind them (".C" is how a sentence ends);
# white space. No look-around: it would push tiktoken into its backtracking engine, which is slower
# and overflows on a megabyte of spaces.
WORD = r"[\p{L}\p{M}&&[^A-Z]]+"
PATTERN = rf" ?{WORD}(?:['’]{WORD})?| ?\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[CU]?|[A-Z]|\s+"

# Bytes that UTF-8 never has, and letters that the transform never leaves, need no token.
NO_TOKEN = {*b"ABDEFGHIJKMNOPQRSTVWXYZ", 0xC0, 0xC1, *range(0xF5, 0x100)}

MAX_PIECE_BYTES = 64
MAX_PHRASE_BYTES = 128

_CAPITALS = re.compile("( ?)([A-Z]+)(s(?![a-z]))?(?=([a-z])?)")
_MARKED = re.compile(r"C( ?[a-z])|U( ?[a-z]+)L?|[A-Z]")


def _mark(match):
    space, run, plural, goes_on = match.groups(default="")
    run = run.lower()
    if len(run) == 1:
        return f"C{space}{run}{plural}"
    if goes_on:   # the last letter of the run belongs to the next word
        return f"{'C' if len(run) == 2 else 'U'}{space}{run[:-1]}C{run[-1]}"
    return f"U{space}{run}L{plural}" if plural else f"U{space}{run}"


def lower_case(text):
    """text -> the same without A-Z but for the markers C, U, L. restore_case gives it back,
    whatever it holds."""
    return _CAPITALS.sub(_mark, text)


def restore_case(text):
    """Inverse of lower_case. On text that lower_case never writes, a marker without its letters
    vanishes."""
    return _MARKED.sub(lambda m: (m[1] or m[2] or "").upper(), text)


class Tokenizer:
    """Tokenizer(bytes of tokenizer.json). Tokens: 0 the boundary, then single bytes, pieces by
    rank, phrases by rank.

    tokenizer.json is {"format": 2, "name": str, "pieces": [str of Latin-1 characters, a byte each],
    "phrases": [[left token, right token], ...]}; pieces are of at most 64 bytes, phrases of at most
    128. .pairs (phrases, 2) are those of .first_phrase and on. .pieces[token] is the bytes that the
    token stands for, before restore_case; .text_bytes[token] how many bytes of text are in it, for
    a marker is none: summed over the tokens of a text, the UTF-8 bytes of the text.
    """
    boundary = 0

    def __init__(self, blob):
        self.blob = blob
        self.sha256 = hashlib.sha256(blob).hexdigest()
        try:
            spec = json.loads(blob)
            if spec["format"] != 2:
                raise ValueError(f"format {spec['format']!r:.20}, not 2: prepare the dataset again")
            self.pieces = [b"", *(bytes([byte]) for byte in range(256) if byte not in NO_TOKEN),
                           *(piece.encode("latin-1") for piece in spec["pieces"])]
            self.first_phrase = len(self.pieces)
            self.vocab_size = self.first_phrase + len(spec["phrases"])
            longest = max(map(len, self.pieces))
            if len({*self.pieces}) < self.first_phrase or longest > MAX_PIECE_BYTES or self.vocab_size > 65535:
                raise ValueError(f"a piece twice or above {MAX_PIECE_BYTES} bytes, or more than 65,535 tokens")
            for left, right in spec["phrases"]:
                phrase = self.pieces[left] + self.pieces[right]
                if min(left, right) < 1 or len(phrase) > MAX_PHRASE_BYTES:
                    raise ValueError(f"phrase {len(self.pieces)} is no two tokens of {MAX_PHRASE_BYTES} bytes in all")
                self.pieces.append(phrase)
            self.pairs = np.array(spec["phrases"], dtype=np.int64).reshape(-1, 2)
            ranks = {piece: token for token, piece in enumerate(self.pieces[1:self.first_phrase], 1)}
            # tiktoken is twice as fast with a special token than with none; "A" is never in its
            # text.
            self.bpe = tiktoken.Encoding("nanogolf", pat_str=PATTERN, mergeable_ranks=ranks,
                                         special_tokens={"A": 65536})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"
            raise BadInput(f"tokenizer.json: damaged or not ours ({what:.200})") from error
        text_bytes = [len(piece.translate(None, b"CUL")) for piece in self.pieces]
        self.text_bytes = np.array(text_bytes, dtype=np.uint8)
        keys = np.append(self.pairs @ [1 << 16, 1], 1 << 32)   # the last one ends every search
        self.phrases = np.argsort(keys, kind="stable")
        self.keys = keys[self.phrases]

    def phrase_of(self, left, right):
        """Tokens and those after them -> the phrases that they become; vocab_size where they are of
        none."""
        key = left << 16 | right
        at = np.searchsorted(self.keys, key)
        return np.where(self.keys[at] == key, self.first_phrase + self.phrases[at], self.vocab_size)

    def encode(self, text):
        """text -> tokens uint16 (n,), without a boundary token. A lone surrogate -> BadInput."""
        return self.encode_batch([text])[0][1:]

    def encode_batch(self, texts):
        """texts -> [tokens uint16 (1 + n,) of each text, the boundary first]. Faster than encode()
        on short texts."""
        boundary = np.zeros(1, dtype=np.uint32)
        parts = [boundary]
        try:
            for text in map(lower_case, texts):
                parts += [self.bpe.encode_to_numpy(text, disallowed_special=()), boundary]
        except UnicodeEncodeError as error:
            raise BadInput(f"text holds a lone surrogate at character {error.start}") from error
        tokens = np.concatenate(parts).astype(np.int64)
        none = [self.vocab_size]
        phrase = self.phrase_of(tokens[:-1], tokens[1:])   # of each pair of neighbours
        # A pair of lower rank than those it overlaps becomes its phrase, until none is left.
        # Boundaries are in no pair.
        while (at := np.flatnonzero(phrase < self.vocab_size)).size:
            around = np.concatenate((none, phrase, none))
            at = at[(phrase[at] < around[at]) & (phrase[at] <= around[at + 2])]
            tokens[at] = phrase[at]
            tokens = np.delete(tokens, at + 1)
            phrase = np.delete(phrase, at)
            at -= np.arange(len(at))
            for left in (at - 1, at):   # no phrase is the first or the last token: those are boundaries
                phrase[left] = self.phrase_of(tokens[left], tokens[left + 1])
        tokens = tokens.astype(np.uint16)
        return np.split(tokens, np.flatnonzero(tokens == self.boundary)[1:])[:-1]

    def decode(self, tokens):
        """tokens -> text; boundary tokens are dropped. decode(encode(x)) == x for every Unicode
        string.

        Tokens that encode never writes may form invalid UTF-8, which becomes U+FFFD.
        """
        pieces = [self.pieces[token] for token in np.asarray(tokens).tolist()]
        return restore_case(b"".join(pieces).decode("utf-8", "replace"))
