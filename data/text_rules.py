"""Text rules: text -> text, before anything is counted. `raw` changes nothing, `nmt_nfkc` is the leaderboard's."""
import functools
import re
import unicodedata

# Compositions that Unicode added after version 14 (that of Python 3.11), as hexadecimal code points.
_NEWER_COMPOSITIONS = """
105D2+307=105C9 105DA+307=105E4 11382+113C9=11383 11384+113BB=11385 1138B+113C2=1138E 11390+113C9=11391
113C2+113B8=113C7 113C2+113C2=113C5 113C2+113C9=113C8 1611E+1611E=16121 1611E+16129=16122 1611E+1611F=16123
16129+1611F=16124 1611E+16120=16125 1611E+1611E+1611F=16126 1611E+16129+1611F=16127 1611E+1611E+16120=16128
16D67+16D67=16D68 16D63+16D67=16D69 16D63+16D67+16D67=16D6A"""
_NEWER_CHARS = dict(zip(map(chr, [0xA7F1, *range(0x1CCD6, 0x1CCFA), *range(0x1E030, 0x1E06E)]),
                        "SABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                        "абвгдежзиклмопрстуфхцчшыэюꚉәіјөүӏабвгдежзиклопсуфхцчшъыґіѕџҫꙑұ", strict=True))


@functools.cache
def _nmt_tables():
    """-> {char: text}, {char: its NFKD, if one char}, {2 to 4 NFKD chars: composed}, and three regexes: a char of the
    first table, a char that is not the first of some composition, a run of those with the char before it.

    Built as sentencepiece builds its nmt_nfkc map: NFKC of every character, and the composition of every sequence whose
    NFKD is that of one character. Besides, some characters are spaces, controls vanish, and U+FF5E stays. Equal to
    sentencepiece 0.2.3 in all 225,276 keys of its map (0.2.0 lacks 551: U+061C and what Unicode 14 to 17 added).
    """
    single = dict.fromkeys("\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\u2581\ufeff\ufffd", " ")
    single |= dict.fromkeys(map(chr, [*range(1, 9), 11, *range(14, 32), 0x7F, 0x8F, 0x9F]), "")
    single, nfkd, composed = single | _NEWER_CHARS, dict(_NEWER_CHARS), {}
    for code in [*range(0x80, 0x3400), *range(0xA000, 0xD800), *range(0xF900, 0x20000), *range(0x2F800, 0x2FA20)]:
        parts = unicodedata.normalize("NFKD", char := chr(code))
        if parts == char or char == "\uff5e":
            continue
        if (whole := unicodedata.normalize("NFKC", char)) != char:
            single[char] = whole
        if len(parts) == 1:
            nfkd[char] = parts
        elif len(parts) <= 4 and (whole := unicodedata.normalize("NFC", parts)) != parts:
            composed[parts] = whole
    for line in _NEWER_COMPOSITIONS.split():
        *parts, whole = (chr(int(code, 16)) for code in re.split("[+=]", line))
        composed["".join(parts)] = whole
    tails = {char for parts in composed for char in parts[1:]}
    tails |= {char for char, part in nfkd.items() if part in tails}

    def one_of(chars):   # re compares a class's members above U+FFFF one by one, so those go in as one range
        return "[" + re.escape("".join(char for char in chars if char < "\U00010000")) + "\U00010000-\U0010ffff]"
    return (single, nfkd, composed, re.compile(one_of(single)), re.compile(one_of(tails)),
            re.compile(f".{one_of(tails)}+", re.S))


def nmt_nfkc(text):
    """text -> sentencepiece's nmt_nfkc of it, extra white space removed, no dummy prefix."""
    single, nfkd, composed, single_re, tail_re, run_re = _nmt_tables()

    def compose(match):   # the longest match at each place, from left to right; a composition is not composed again
        out, at, run = [], 0, match[0]
        while at < len(run):
            whole, size = run[at], 1
            for n in range(min(4, len(run) - at), 1, -1):
                parts = "".join([nfkd.get(char, char) for char in run[at:at + n]])
                if parts in composed:
                    whole, size = composed[parts], n
                    break
            out.append(whole)
            at += size
        return "".join(out)

    if not text.isascii() and tail_re.search(text):
        text = run_re.sub(compose, text)
    text = single_re.sub(lambda match: single.get(match[0], match[0]), text)
    return re.sub("  +", " ", text).strip(" ")


TEXT_RULES = {"raw": lambda text: text, "nmt_nfkc": nmt_nfkc}
