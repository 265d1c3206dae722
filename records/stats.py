"""Is one set of runs better than another? t tests without scipy; `check.py compare`."""
import json
import statistics

import numpy as np

from data.dataset import BadInput
from records.folders import is_number, nats_per_bit, read_entry
from records.rules import RULE_NATS, RULE_P

MOST_RUNS = 30   # more on a side: an idea that needs more to show is dropped


def t_upper(t, df):
    """P(T > t) of Student's t with df degrees of freedom, any real from 1, within 1e-6.

    T = sqrt(df) sinh(u) turns the density into cosh(u)^-df.
    """
    def tail(start):
        u = np.linspace(start, start + 40 / df + 9 / df ** 0.5, 20_001)
        y = np.cosh(u) ** -df
        return y.sum() - y[0] / 2
    p = tail(np.arcsinh(abs(t) / df ** 0.5)) / tail(0) / 2
    return float(p if t >= 0 else 1 - p)


def welch(gain, va, na, vb, nb):
    """One-sided p of gain > 0 by Welch's test; va, vb: variances of na, nb runs, two or more."""
    error = va / na + vb / nb
    if error == 0:
        return 0.5 if gain == 0 else float(gain < 0)
    df = error ** 2 / ((va / na) ** 2 / (na - 1) + (vb / nb) ** 2 / (nb - 1))   # Satterthwaite
    return t_upper(gain / error ** 0.5, df)


def smallest_gain(scores):
    """The gain that as many runs a side, of the spread of these, would show at RULE_P, unpaired."""
    n = len(scores)
    variance = statistics.variance(scores)
    low = 0.0
    high = 100 * variance ** 0.5   # above the t of one degree of freedom, 31.8
    for _ in range(40):
        middle = (low + high) / 2
        if welch(middle, variance, n, variance, n) < RULE_P:
            high = middle
        else:
            low = middle
    return high


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
    p = p_above(0.0)
    verdict = "keep" if p < RULE_P else "drop"
    if verdict == "drop" and gain > 0:   # would it show, if gain and spread stay?
        for more in range(1, MOST_RUNS):
            if p_above(0.0, more) < RULE_P:
                verdict = f"run {more} more a side"
                break
    return {"gain_bpb": gain, "gain_nats": gain * nats, "paired": paired, "p": p,
            "p_written": p_above(RULE_NATS / nats), "verdict": verdict}


def load_side(names):
    """Runs, turns or records -> ({seed: val_bpb}, what must be alike for scores to compare, nats
    per bit). BadInput without whole scores."""
    scores = {}
    alike = []
    for name in names:
        entry = read_entry(name)
        for seed, bpb in entry["scores"].items():
            if not is_number(bpb):
                raise BadInput(f"{name}: no whole score; run: python pack.py {name} && python "
                               f"eval_bpb.py {name}/artifact.pyz")
            if seed in scores:
                raise BadInput(f"{name}: seed {seed} stands twice on one side")
            scores[seed] = bpb
        config = entry["config"]
        alike.append(("documents", entry["dataset"]["val_docs_sha256"][:12], "budget",
                      config.get("max_steps") or f"{config.get('max_seconds')} s"))
    return scores, alike, nats_per_bit(entry["dataset"])


def compare(argv):
    """`compare A... -- B... [--json]`: prints the comparison of candidate A with baseline B -> 0."""
    names = [a for a in argv if a != "--json"]
    if names.count("--") != 1 or "--" in (names[0], names[-1]):
        raise BadInput("compare RUN... -- RUN... [--json]: candidates left, baseline right")
    cut = names.index("--")
    ours, alike, _ = load_side(names[:cut])
    theirs, others, nats = load_side(names[cut + 1:])
    if len({*alike, *others}) > 1:
        raise BadInput(f"such runs do not compare: {sorted({*alike, *others}, key=str)}")
    c = comparison(ours, theirs, nats)
    if "--json" in argv:
        print(json.dumps({"candidate": ours, "baseline": theirs, "nats_per_bit": nats, **c}))
        return 0
    for title, scores in (("candidate", ours), ("baseline", theirs)):
        print(f"{title:<10} val_bpb {statistics.fmean(scores.values()):.5f}  "
              f"std {statistics.stdev(scores.values()):.5f}  n {len(scores)}")
    print(f"gain       {c['gain_nats']:+.5f} nats per token = {c['gain_bpb']:+.5f} bits per byte, "
          f"above 0 is better; 1 bit per byte is {nats:.4f} nats per token of the baseline's")
    how = "paired by seed" if c["paired"] else "Welch's test: the seeds differ"
    print(f"test       {how}: one-sided p {c['p']:.3g}")
    met = "met" if c["p_written"] < RULE_P else "not met"
    print(f"written    {RULE_NATS} nats at p < {RULE_P}: {met}, p {c['p_written']:.3g}")
    print(f"verdict    {c['verdict']}")
    return 0
