"""Byte-level BPE in tiktoken between a lossless case transform and phrases.

CaseOps. Upper-case letters are written as a marker and the lower-case letter, so that "The", "the" and "THE" share their tokens.
The marker stands before the word's space: " The" -> "C the", one token more than " the". Since the transform leaves no A-Z in the
text, A-Z are free to be the markers, and nothing needs an escape:
    C   the next letter is upper case           " The" -> "C the"       "camelCase" -> "camelCcase"
    U   the whole run of letters is upper case  " NASA" -> "U nasa"     "HTTPServer" -> "UhttpCserver"
    L   a U run ends here, before more letters  " PDFs" -> "U pdfLs"
Only ASCII letters are transformed: a case pair costs nothing where it is rare, and Unicode's tables change between Python versions.

Phrases. Tokens of whole chunks that often follow each other (", and", " of the", ".C the") are merged after tiktoken has run. Words
keep their own pieces, which merging across spaces inside the BPE would break up.
"""
import hashlib
import json
import re

import numpy as np
import tiktoken

from data.dataset import BadInput

# Chunks that no piece crosses: a word with its space and its apostrophes; digits; punctuation with its space and the marker behind
# it (".C" is how a sentence ends); white space. No look-around: it would push tiktoken into its backtracking engine, which is slower
# and overflows on a megabyte of spaces.
PATTERN = (r" ?[\p{L}\p{M}&&[^A-Z]]+(?:['\u2019][\p{L}\p{M}&&[^A-Z]]+)?| ?\p{N}{1,3}|"
           r" ?[^\s\p{L}\p{N}]+[CU]?|[A-Z]|\s+").replace(r"\u2019", "\u2019")
# Bytes that UTF-8 never has, and letters that the transform never leaves, need no token.
NO_TOKEN = {*b"ABDEFGHIJKMNOPQRSTVWXYZ", 0xC0, 0xC1, *range(0xF5, 0x100)}

_UPPER_RUN = re.compile(r" ?[A-Z]+")
_MARKED = re.compile(r"C( ?[a-z])|U( ?[a-z]+)L?|[A-Z]")


def _lower_run(match):
    run, text, end = match[0], match.string, match.end()
    lower = run.lower()
    letters = len(run) - (run[0] == " ")
    if letters == 1:
        return "C" + lower
    following = text[end:end + 2]
    if not ("a" <= following[:1] <= "z"):
        return "U" + lower
    if following[0] == "s" and not ("a" <= following[1:] <= "z"):
        return "U" + lower + "L"
    return ("C" if letters == 2 else "U") + lower[:-1] + "C" + lower[-1]


def lower_case(text):
    """text -> the same text without A-Z but for the markers C, U, L. restore_case(lower_case(x)) == x for every x."""
    return _UPPER_RUN.sub(_lower_run, text)


def restore_case(text):
    """Inverse of lower_case. On text that lower_case never writes, a marker without its letters vanishes."""
    return _MARKED.sub(lambda m: (m[1] or m[2] or "").upper(), text)


_BOUNDARY = np.zeros(1, dtype=np.uint32)


class Tokenizer:
    """Tokenizer(bytes of tokenizer.json). Tokens: 0 the boundary, then the single bytes, the pieces in order of rank, the phrases.

    tokenizer.json is {"format": 1, "name": str, "pattern": regular expression that cuts the text into chunks,
    "pieces": [str of Latin-1 characters, a byte each], "phrases": [[left token, right token], ...]}, the earlier the stronger.
    .pieces[token] is the bytes that the token stands for, before restore_case.
    """
    boundary = 0

    def __init__(self, blob):
        self.blob, self.sha256 = blob, hashlib.sha256(blob).hexdigest()
        try:
            spec = json.loads(blob)
            if spec["format"] != 1:
                raise ValueError(f"format {spec['format']}, this code reads format 1")
            self.name = str(spec["name"])
            legacy = "phrases" not in spec and spec.setdefault("phrases", []) == []  # SHIM
            self.pieces = [b"", *(bytes([byte]) for byte in range(256) if legacy or byte not in NO_TOKEN),
                           *(piece.encode("latin-1") for piece in spec["pieces"])]
            self.first_phrase = len(self.pieces)
            for left, right in spec["phrases"]:
                if not (0 < left < len(self.pieces) and 0 < right < len(self.pieces)):
                    raise ValueError(f"phrase [{left}, {right}] is not of earlier tokens")
                self.pieces.append(self.pieces[left] + self.pieces[right])
            self.vocab_size = len(self.pieces)
            if len(set(self.pieces[:self.first_phrase])) != self.first_phrase or self.vocab_size > 65535:
                raise ValueError("repeated pieces, or more than 65,535 tokens")
            ranks = {piece: token for token, piece in enumerate(self.pieces[1:self.first_phrase], 1)}
            self.bpe = tiktoken.Encoding(self.name, pat_str=f"{spec['pattern']}|(?s:.)", mergeable_ranks=ranks, special_tokens={})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"tokenizer.json: damaged, or of another program ({type(error).__name__}: {error})") from error
        # phrase_of[row[left], column[right]] is the phrase's token; row 0, column 0 and absent pairs hold vocab_size.
        pairs = np.array(spec["phrases"], dtype=np.int64).reshape(-1, 2)
        self.row, self.column = np.zeros((2, self.vocab_size), dtype=np.intp)
        for index, side in zip((self.row, self.column), pairs.T):
            used = np.unique(side)
            index[used] = np.arange(1, len(used) + 1)
        self.phrase_of = np.full((self.row.max() + 1, self.column.max() + 1), self.vocab_size, dtype=np.int32)
        self.phrase_of[self.row[pairs[:, 0]], self.column[pairs[:, 1]]] = np.arange(self.first_phrase, self.vocab_size)

    def encode(self, text):
        """text -> tokens uint16 (n,), without a boundary token. A lone surrogate -> BadInput."""
        return self.encode_batch([text])[0][1:]

    def encode_batch(self, texts):
        """texts -> [tokens uint16 (1 + n,) of each text, the boundary first]. Faster than encode() on short texts."""
        parts = []
        for text in texts:
            try:
                text.isascii() or text.encode()
            except UnicodeEncodeError as error:
                raise BadInput(f"text holds a lone surrogate at character {error.start}, which UTF-8 cannot carry") from error
            tokens = self.bpe.encode_to_numpy(lower_case(text), disallowed_special=())
            parts += [_BOUNDARY, tokens]
        tokens = np.concatenate(parts or [_BOUNDARY])
        # A pair that is stronger than the pairs it overlaps becomes its phrase, until no pair is left. No pair holds a boundary.
        while True:
            phrase = self.phrase_of[self.row[tokens[:-1]], self.column[tokens[1:]]]
            at = np.flatnonzero(phrase < self.vocab_size)
            if not at.size:
                break
            around = np.concatenate(([self.vocab_size], phrase, [self.vocab_size]))
            at = at[(phrase[at] < around[at]) & (phrase[at] <= around[at + 2])]
            tokens[at] = phrase[at]
            tokens = np.delete(tokens, at + 1)
        tokens = tokens.astype(np.uint16)
        return np.split(tokens, np.flatnonzero(tokens == self.boundary)[1:]) if texts else []

    def decode(self, tokens):
        """tokens -> text; boundary tokens are dropped. decode(encode(x)) == x for every Unicode string.

        Tokens that encode never writes may form invalid UTF-8, which becomes U+FFFD.
        """
        pieces = self.pieces
        return restore_case(b"".join([pieces[token] for token in np.asarray(tokens).tolist()]).decode("utf-8", "replace"))
