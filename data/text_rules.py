"""Text rules: text -> text, before anything is counted. `raw` changes nothing, `nmt_nfkc` is the leaderboard's."""
import functools

from data.dataset import BadInput


@functools.cache
def _normalizer():
    try:
        import sentencepiece
    except ImportError as error:
        raise BadInput("--text_rule=nmt_nfkc needs: pip install sentencepiece   (or give --text_rule=raw)") from error
    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=True)


def raw(text):
    return text


def nmt_nfkc(text):
    """text -> SentencePiece's nmt_nfkc of it: NFKC and more, no controls, white space is single spaces within."""
    return _normalizer().normalize(text).strip(" ")   # one space is all that it leaves of a text of spaces


TEXT_RULES = {"raw": raw, "nmt_nfkc": nmt_nfkc}
