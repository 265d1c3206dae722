"""Byte-level BPE in tiktoken, between a lossless case transform and phrases.

CaseOps. Upper-case letters are written as a marker and the lower-case letter, so "The", "the" and "THE" share tokens.
The marker stands before the word's space: " The" -> "C the", one token more than " the". Since the transform leaves no
A-Z in the text, A-Z are free to be the markers, and nothing needs an escape:
    C   the next letter is upper case           " The" -> "C the"       "camelCase" -> "camelCcase"
    U   the whole run of letters is upper case  " NASA" -> "U nasa"     "HTTPServer" -> "UhttpCserver"
    L   a U run ends here, before more letters  " PDFs" -> "U pdfLs"
ASCII only: elsewhere Unicode's case tables change from one Python version to the next.

Phrases. Tokens of whole words and marks that often follow each other (", and", " of the", ".C the") are merged after
tiktoken has run. Merges across spaces inside the BPE would break up the pieces of words.
"""
import hashlib
import json
import re

import numpy as np
import tiktoken

from data.dataset import BadInput

# Bytes that UTF-8 never has, and letters that the transform never leaves, need no token.
NO_TOKEN = {*b"ABDEFGHIJKMNOPQRSTVWXYZ", 0xC0, 0xC1, *range(0xF5, 0x100)}

MAX_PHRASES = 4096   # a table of their left by their right tokens is held

_MARKED = re.compile(r"C( ?[a-z])|U( ?[a-z]+)L?|[A-Z]")


def lower_case(texts):
    """texts -> the same texts without A-Z but for the markers C, U, L. restore_case gives each back, whatever it holds.

    On bytes in numpy, all texts at once: five times as fast as a regular expression that calls back for each capital.
    """
    encoded = [text.encode() for text in texts]
    joined = b"\0".join(encoded) + b"\0\0"
    byte = np.frombuffer(joined, dtype=np.uint8)
    upper = np.flatnonzero(byte - ord("A") < 26)   # uint8 wraps around, so one comparison does for both ends
    if not upper.size:
        return texts
    gap = np.flatnonzero(np.diff(upper) > 1)
    first, end = upper[np.append(0, gap + 1)], upper[np.append(gap, len(upper) - 1)] + 1   # of each run of A-Z
    long = end - first > 1
    goes_on = long & (byte[end] - ord("a") < 26)
    plural = goes_on & (byte[end] == ord("s")) & (byte[end + 1] - ord("a") >= 26)
    camel = goes_on & ~plural                      # the last letter of the run belongs to the next word
    one = ~long | camel & (end - first == 2)
    before = first - ((byte[first - 1] == ord(" ")) & (first > 0))
    at = np.concatenate((before, end[plural], end[camel] - 1))
    marker = np.concatenate((np.where(one, ord("C"), ord("U")), np.full(np.count_nonzero(plural), ord("L")),
                             np.full(np.count_nonzero(camel), ord("C"))))   # in the order of `at`
    order = np.argsort(at)
    at = at[order]
    out, is_letter = np.empty(len(byte) + len(at), dtype=np.uint8), np.ones(len(byte) + len(at), dtype=bool)
    is_letter[marked := at + np.arange(len(at))] = False
    out[marked], out[is_letter] = marker[order], np.frombuffer(joined.lower(), dtype=np.uint8)
    end = np.cumsum([len(data) + 1 for data in encoded]) - 1
    start = np.append(0, end[:-1] + 1)
    spans = zip(start + np.searchsorted(at, start), end + np.searchsorted(at, end), strict=True)
    data = out.tobytes()
    return [data[start:end].decode() for start, end in spans]


def restore_case(text):
    """Inverse of lower_case. On text that lower_case never writes, a marker without its letters vanishes."""
    return _MARKED.sub(lambda m: (m[1] or m[2] or "").upper(), text)


_BOUNDARY = np.zeros(1, dtype=np.uint32)


class Tokenizer:
    """Tokenizer(bytes of tokenizer.json). Tokens: 0 the boundary, then single bytes, pieces by rank, phrases by rank.

    tokenizer.json is {"format": 1, "name": str, "pattern": regular expression of the chunks that no piece crosses,
    "pieces": [str of Latin-1 characters, a byte each], "phrases": [[left token, right token], ...]}.
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
            self.pieces = [b"", *(bytes([byte]) for byte in range(256) if byte not in NO_TOKEN),
                           *(piece.encode("latin-1") for piece in spec["pieces"])]
            self.first_phrase = len(self.pieces)
            for left, right in spec["phrases"]:
                if not (0 < left < len(self.pieces) and 0 < right < len(self.pieces)):
                    raise ValueError(f"phrase [{left}, {right}] is not of earlier tokens")
                self.pieces.append(self.pieces[left] + self.pieces[right])
                if len(self.pieces[-1]) > 1024:
                    raise ValueError(f"phrase [{left}, {right}] is longer than 1,024 bytes")
            self.vocab_size = len(self.pieces)
            if len(set(self.pieces[:self.first_phrase])) != self.first_phrase or self.vocab_size > 65535:
                raise ValueError("repeated pieces, or more than 65,535 tokens")
            if len(spec["phrases"]) > MAX_PHRASES:
                raise ValueError(f"more than {MAX_PHRASES} phrases")
            ranks = {piece: token for token, piece in enumerate(self.pieces[1:self.first_phrase], 1)}
            pattern = f"{spec['pattern']}|(?s:.)"   # whatever the pattern leaves out is a chunk too: nothing is lost
            # tiktoken is twice as fast with a special token than with none; "A" is never in its text.
            self.bpe = tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"A": 65536})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"tokenizer.json: damaged or not ours ({type(error).__name__}: {error})") from error
        # phrase_of[row[left] + column[right]] is the pair's phrase, or vocab_size: row 0 and column 0 are of no phrase.
        pairs = np.array(spec["phrases"], dtype=np.intp).reshape(-1, 2)
        self.row, self.column = np.zeros((2, self.vocab_size), dtype=np.intp)
        for index, side in zip((self.row, self.column), pairs.T, strict=True):
            used = np.unique(side)
            index[used] = np.arange(1, len(used) + 1)
        self.row *= self.column.max() + 1
        self.phrase_of = np.full(self.row.max() + self.column.max() + 1, self.vocab_size, dtype=np.int32)
        self.phrase_of[self.row[pairs[:, 0]] + self.column[pairs[:, 1]]] = np.arange(self.first_phrase, self.vocab_size)

    def encode(self, text):
        """text -> tokens uint16 (n,), without a boundary token. A lone surrogate -> BadInput."""
        return self.encode_batch([text])[0][1:]

    def encode_batch(self, texts):
        """texts -> [tokens uint16 (1 + n,) of each text, the boundary first]. Faster than encode() on short texts."""
        try:
            lower = lower_case([*texts])
        except UnicodeEncodeError as error:
            raise BadInput(f"text holds a lone surrogate at character {error.start}") from error
        parts = [_BOUNDARY]
        for text in lower:
            parts += [self.bpe.encode_to_numpy(text, disallowed_special=()), _BOUNDARY]
        tokens = np.concatenate(parts).astype(np.intp)
        none = self.vocab_size   # in `phrase`, which holds the phrase of each pair of neighbours
        phrase = self.phrase_of.take(self.row.take(tokens[:-1]) + self.column.take(tokens[1:]))
        # A pair of lower rank than those it overlaps becomes its phrase, until none is left. Boundaries are in no pair.
        while (at := np.flatnonzero(phrase < none)).size:
            around = np.concatenate(([none], phrase, [none]))
            at = at[(phrase[at] < around[at]) & (phrase[at] <= around[at + 2])]
            tokens[at] = phrase[at]
            keep = np.ones(len(tokens), dtype=bool)
            keep[at + 1] = False
            tokens, phrase = tokens[keep], phrase[keep[1:]]
            at -= np.arange(len(at))
            for left in (at - 1, at):   # no phrase is the first or the last token: those are boundaries
                phrase[left] = self.phrase_of.take(self.row.take(tokens[left]) + self.column.take(tokens[left + 1]))
        tokens = tokens.astype(np.uint16)
        return np.split(tokens, np.flatnonzero(tokens == self.boundary)[1:])[:-1]

    def decode(self, tokens):
        """tokens -> text; boundary tokens are dropped. decode(encode(x)) == x for every Unicode string.

        Tokens that encode never writes may form invalid UTF-8, which becomes U+FFFD.
        """
        pieces = [self.pieces[token] for token in np.asarray(tokens).tolist()]
        return restore_case(b"".join(pieces).decode("utf-8", "replace"))
