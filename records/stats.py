"""Is one set of runs better than another? t tests without scipy, and the `compare` command of check.py."""
import json
import math
import statistics
from pathlib import Path

import numpy as np

from data.dataset import BadInput
from records.ledger import is_number, read_entry
from records.rules import PRACTISED_P, RULE_NATS, RULE_P


def t_upper(t, df):
    """P(T > t) of Student's t with df degrees of freedom, any real from 1: T = sqrt(df) sinh(u) turns the density into
    cosh(u)^-df, which Simpson's rule integrates to seven digits."""
    def tail(start):
        u, step = np.linspace(start, start + 40 / df + 9 / df ** 0.5, 4001, retstep=True)
        y = np.cosh(u) ** -df
        return float(step * (4 * y[1::2].sum() + 2 * y[::2].sum() - y[0] - y[-1]))
    p = tail(math.asinh(abs(t) / df ** 0.5)) / tail(0) / 2
    return p if t >= 0 else 1 - p


def welch(gain, va, na, vb, nb):
    """(t, df, p), one-sided, of gain > 0; va, vb: variances of two runs or more. With none p is 0, 0.5 or 1."""
    error = va / na + vb / nb
    if error == 0:
        return (math.copysign(math.inf, gain), math.inf, float(gain < 0)) if gain else (0.0, math.inf, 0.5)
    df = error ** 2 / ((va / na) ** 2 / (na - 1) + (vb / nb) ** 2 / (nb - 1))   # Welch-Satterthwaite
    return gain / error ** 0.5, df, t_upper(gain / error ** 0.5, df)


def t_critical(p, df):
    """The t with P(T > t) = p < 0.5, by bisection."""
    low, high = 0.0, 1e9
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_upper(middle, df) > p else (low, middle)
    return high


def comparison(ours, theirs, nats_per_bit):
    """{seed: val_bpb} of the candidate and of the baseline, bits per byte -> dict of gain (above 0: the candidate is
    better), test, verdict and what it would take.

    The same seeds on both sides are compared pair by pair, since they share their noise; others by Welch's test.
    nats_per_bit turns bits per byte into nats per token: ln 2 x bytes / tokens of the dataset. `p` tests gain > 0;
    `p_written` tests gain > 0.005 nats, which is what the written rule asks to be shown at p < 0.01. BadInput where a
    side has one run: that says nothing about noise.
    """
    if min(len(ours), len(theirs)) < 2:
        raise BadInput("one run says nothing about noise; each side needs two at least")
    a, b = [*ours.values()], [*theirs.values()]
    paired = ours.keys() == theirs.keys()
    va, vb = statistics.variance(a), statistics.variance(b)
    if paired:   # one sample, of differences: as if the other had no spread
        va, vb = statistics.variance([theirs[s] - ours[s] for s in ours]), 0.0

    def test(shift, k=0):
        """-> (t, df, p) of gain > shift, with these runs or with k a side."""
        return welch(gain - shift, va, k or len(a), vb, k or len(b))

    def runs_needed(shift):
        sizes = range(max(2, len(a), len(b)), 1001) if gain > shift else ()
        return next((k for k in sizes if test(shift, k)[2] < RULE_P), None)

    gain, margin = statistics.fmean(b) - statistics.fmean(a), RULE_NATS / nats_per_bit
    t, df, p = test(0.0)
    error = (va / len(a) + vb / len(b)) ** 0.5
    more = runs_needed(0.0)
    verdict = "keep" if p < RULE_P else "drop"
    if verdict == "drop" and more and more <= 30:
        verdict = f"run {more - min(len(a), len(b))} more a side"
    return {"gain_bpb": gain, "gain_nats": gain * nats_per_bit, "paired": paired, "t": t, "df": df, "p": p,
            "p_written": test(margin)[2], "written_rule": test(margin)[2] < RULE_P,
            "practised_rule": gain > 0 and p < PRACTISED_P, "verdict": verdict,
            "noise_floor_bpb": t_critical(RULE_P, df) * error if error else 0.0,
            "runs_for_any_gain": more, "runs_for_written_rule": runs_needed(margin)}


def nats_per_bit(dataset):
    """Nats per token in one bit per byte, from the dataset's own counts; None where they are missing."""
    size, tokens = dataset.get("val_bytes"), dataset.get("val_tokens")
    return math.log(2) * size / tokens if all(is_number(x) and x > 0 for x in (size, tokens)) else None


def load_scores(path):
    """A run or a record folder -> ({seed: val_bpb}, dataset dict, {what must be alike: value}). BadInput where there is
    no whole score."""
    e = read_entry(path)
    if not e["scores"] or not all(is_number(v) and v > 0 for v in e["scores"].values()):
        pack = "" if e["record"] or (Path(path) / "artifact.pyz").is_file() else f"python pack.py {path} && "
        raise BadInput(f"{path}: no whole score (score it with: {pack}python eval_bpb.py {path}/artifact.pyz)")
    if nats_per_bit(e["dataset"]) is None:
        raise BadInput(f"{path}: no dataset with val_tokens and val_bytes, so nats cannot be told from bits")
    alike = {"documents": str(e["dataset"].get("val_docs_sha256"))[:12], "predictor": e["predictor"]}
    alike |= {key: e["config"].get(key) for key in ("max_seconds", "max_steps")}
    alike["steps"] = e["steps"] if alike["max_steps"] else None
    return e["scores"], e["dataset"], alike


def compare(argv):
    """`compare A... -- B... [--json]`: prints the comparison of candidate A with baseline B; returns 0."""
    as_json = "--json" in argv
    argv = [a for a in argv if a != "--json"]
    if argv.count("--") != 1 or "--" in (argv[0], argv[-1]) or any(a.startswith("-") and a != "--" for a in argv):
        raise BadInput("compare RUN... -- RUN... [--json]: candidates on the left, baseline on the right")
    cut = argv.index("--")
    loaded = [[load_scores(p) for p in side] for side in (argv[:cut], argv[cut + 1:])]
    ours, theirs = ({s: v for rows, _, _ in side for s, v in rows.items()} for side in loaded)
    if len(ours) + len(theirs) < sum(len(rows) for side in loaded for rows, _, _ in side):
        raise BadInput("a seed stands twice on one side")
    datas = [data for side in loaded for _, data, _ in side]
    for key in loaded[0][0][2]:
        values = {str(alike[key]) for side in loaded for _, _, alike in side if alike[key] is not None}
        if len(values) > 1:
            raise BadInput(f"not alike in {key}: {', '.join(sorted(values))}; such runs do not compare")
    data, factor = datas[-1], nats_per_bit(datas[-1])
    c = comparison(ours, theirs, factor)
    if as_json:
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in c.items()}
        print(json.dumps({"candidate": ours, "baseline": theirs, "nats_per_bit": factor, **finite}))
        return 0
    for title, values in (("candidate", [*ours.values()]), ("baseline", [*theirs.values()])):
        mean, std = statistics.fmean(values), statistics.stdev(values)
        print(f"{title:<10} val_bpb {mean:.5f}  std {std:.5f}  n {len(values)}")
    print(f"gain       {c['gain_nats']:+.5f} nats per token = {c['gain_bpb']:+.5f} bits per byte, above 0 is better "
          f"(dataset {data.get('name')}: 1 bit per byte is {factor:.4f} nats per token)")
    if len({d.get("tokenizer_sha256") for d in datas}) > 1:
        print("           the tokenizers differ: nats are per token of the baseline's")
    how = "paired by seed" if c["paired"] else "Welch's test: the seeds differ"
    print(f"test       {how}: t {c['t']:.3f}, df {c['df']:.2f}, one-sided p {c['p']:.3g}")
    met = {True: "met", False: "not met"}
    print(f"written    {RULE_NATS} nats at p < {RULE_P}: {met[c['written_rule']]}, p {c['p_written']:.3g}")
    print(f"practised  any gain at p < {PRACTISED_P}: {met[c['practised_rule']]}")
    print(f"noise      with this spread and these runs, a gain under {c['noise_floor_bpb']:.5f} bits per byte "
          f"does not reach p < {RULE_P}")
    print(f"to settle  runs a side if gain and spread stay: {c['runs_for_any_gain'] or 'no number'} for any gain, "
          f"{c['runs_for_written_rule'] or 'no number'} for the written rule\nverdict    {c['verdict']}")
    return 0
