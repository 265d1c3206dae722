"""Text rules: text -> text, before anything is counted: `raw`, or the leaderboard's `nmt_nfkc`."""
import functools

from data.dataset import package


@functools.cache
def _normalizer():
    with package("--text_rule=nmt_nfkc (not =raw)"):
        import sentencepiece
    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False,
        remove_extra_whitespaces=True)


def raw(text):
    return text


def nmt_nfkc(text):
    """text -> SentencePiece's nmt_nfkc of it: NFKC and more, no controls, single spaces within."""
    return _normalizer().normalize(text).strip(" ")   # of spaces alone it leaves one


TEXT_RULES = {"raw": raw, "nmt_nfkc": nmt_nfkc}
