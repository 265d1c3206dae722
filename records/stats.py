"""Is one set of runs better than another? t tests without scipy; `check.py compare`."""
import statistics

import numpy as np

from data.dataset import BadInput
from records.folders import nats_per_bit, part, read_entry
from records.rules import RULE_NATS, RULE_P

MOST_RUNS = 30   # more on a side: an idea that needs more to show is dropped


def t_upper(t, df):
    """P(T > t) of Student's t with df degrees of freedom, any real from 1, within 1e-6.

    T = sqrt(df) sinh(u) turns the density into cosh(u)^-df.
    """
    def tail(start):
        u = np.linspace(start, abs(start) + 40 / df + 9 / df ** 0.5, 20_001)
        return np.trapezoid(np.cosh(u) ** -df, u)
    return tail(np.arcsinh(t / df ** 0.5)) / tail(0.0) / 2


def welch(gain, va, na, vb, nb):
    """One-sided p of gain > 0 by Welch's test; va, vb: variances of na, nb runs, two or more."""
    a = max(va, 1e-20) / na   # equal scores have a spread that no one sees
    b = vb / nb
    df = (a + b) ** 2 / (a ** 2 / (na - 1) + b ** 2 / (nb - 1))   # Satterthwaite
    return t_upper(gain / (a + b) ** 0.5, df)


def comparison(ours, theirs, nats):
    """{seed: val_bpb} of candidate and baseline, nats per bit -> dict of gain, test and verdict.

    A gain above 0: the candidate is better. The same seeds on both sides are compared pair by pair,
    since they share their noise; others by Welch's test. `p` tests gain > 0, `p_written` gain >
    0.005 nats per token, which the written rule asks to be shown at p < 0.01.
    """
    if min(len(ours), len(theirs)) < 2:
        raise BadInput("one run says nothing about noise; each side needs two at least")
    gain = statistics.fmean(theirs.values()) - statistics.fmean(ours.values())
    paired = ours.keys() == theirs.keys()
    va = statistics.variance(ours.values())
    vb = statistics.variance(theirs.values())
    if paired:   # one sample, of differences: as if the other side had no spread
        va = statistics.variance([theirs[seed] - ours[seed] for seed in ours])
        vb = 0.0

    def p_above(margin, more=0):
        return welch(gain - margin, va, len(ours) + more, vb, len(theirs) + more)
    # Would it show with more runs, if gain and spread stay?
    more = next((more for more in range(MOST_RUNS) if p_above(0.0, more) < RULE_P), MOST_RUNS)
    verdict = {0: "keep", MOST_RUNS: "drop"}.get(more, f"run {more} more a side")
    return {"gain_bpb": gain, "gain_nats": gain * nats, "paired": paired, "p": p_above(0.0),
            "p_written": p_above(RULE_NATS / nats), "verdict": verdict}


def compare(ours, theirs):
    """Prints the comparison of candidate with baseline, each named by its runs or records -> the
    comparison. BadInput for what does not compare."""
    if not (ours and theirs):
        raise BadInput("compare RUN... -- RUN...: candidates left, baseline right")
    sides = []
    alike = set()   # what must be, for scores to compare
    for names in (ours, theirs):
        scores = {}
        for name in names:
            entry = read_entry(name)
            if scores.keys() & entry["scores"]:
                raise BadInput(f"{name}: its seed stands twice on one side")
            scores |= entry["scores"]
            config = part(entry, "config")
            dataset = part(entry, "dataset")
            alike.add(f"documents {dataset.get('val_docs_sha256')}, budget "
                      f"{config.get('max_steps')} steps or {config.get('max_seconds')} s")
        sides.append(scores)
    if len(alike) > 1:
        raise BadInput(f"such runs do not compare: {' | '.join(alike)}")
    try:
        c = comparison(*sides, nats_per_bit(dataset))
    except (LookupError, TypeError, ArithmeticError) as e:   # strangers wrote them
        raise BadInput(f"scores or a dataset that cannot be: {e!r}") from None
    for title, scores in zip(("candidate ", "baseline  "), sides):
        print(f"{title} val_bpb {statistics.fmean(scores.values()):.5f}  "
              f"std {statistics.stdev(scores.values()):.5f}  n {len(scores)}")
    print(f"""\
gain       {c['gain_nats']:+.5f} nats per token = {c['gain_bpb']:+.5f} bits per byte, above 0 is better
test       {'paired by seed' if c['paired'] else 'Welch, for the seeds differ'}: one-sided p {c['p']:.3g}
written    {RULE_NATS} nats at p < {RULE_P}: {c['p_written'] < RULE_P}, p {c['p_written']:.3g}
verdict    {c['verdict']}""")
    return c
