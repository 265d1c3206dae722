"""Is one set of runs better than another? Welch's t test without scipy, and the `compare` command of check.py."""
import json
import math
import statistics
from pathlib import Path

from data.dataset import BadInput
from records.ledger import is_number, load_submission, read_run, seed_results
from records.rules import PRACTISED_P, RULE_NATS, RULE_P


def incomplete_beta(a, b, x):
    """Regularised incomplete beta I_x(a, b), by Lentz's continued fraction (Numerical Recipes 6.4); about 13 digits."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)   # the fraction converges fast on this side only
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    f, c, d = 1.0, 1.0, 0.0
    for i in range(1000):
        m = i // 2
        if i == 0:
            numerator = 1.0
        elif i % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / ((1 + numerator * d) or 1e-300)
        c = (1 + numerator / c) or 1e-300
        f *= c * d
        if abs(1 - c * d) < 1e-15:
            break
    return front * (f - 1)


def t_upper(t, df):
    """P(T > t) of Student's t with df (any positive real) degrees of freedom."""
    if math.isinf(t):
        return float(t < 0)
    tail = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2
    return tail if t >= 0 else 1 - tail


def welch(gain, va, na, vb, nb):
    """(t, df, p) of the one-sided test of gain > 0; va, vb: sample variances. Without any spread p is 0, 1, or 0.5."""
    error = va / na + vb / nb
    if error == 0:
        return (math.copysign(math.inf, gain), math.inf, float(gain < 0)) if gain else (0.0, math.inf, 0.5)
    df = error ** 2 / ((va / na) ** 2 / max(na - 1, 1) + (vb / nb) ** 2 / max(nb - 1, 1))   # Welch-Satterthwaite
    return gain / error ** 0.5, df, t_upper(gain / error ** 0.5, df)


def t_critical(p, df):
    """The t with P(T > t) = p < 0.5, by bisection."""
    low, high = 0.0, 1e9
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_upper(middle, df) > p else (low, middle)
    return high


def comparison(a, b, nats_per_bit):
    """Candidate's and baseline's scores in bits per byte -> dict of gain, tests and what it would take.

    nats_per_bit turns bits per byte into nats per token: ln 2 x bytes / tokens of the dataset. `p` tests gain > 0;
    `p_written` tests gain > 0.005 nats, which is what the written rule asks to be shown at p < 0.01. A side with one
    run borrows the other's variance. BadInput where both have one.
    """
    va, vb = (statistics.variance(x) if len(x) > 1 else None for x in (a, b))
    if va is None and vb is None:
        raise BadInput("one run a side says nothing about noise; at least one side needs two")
    va, vb = (vb if va is None else va), (va if vb is None else vb)
    gain, margin = statistics.fmean(b) - statistics.fmean(a), RULE_NATS / nats_per_bit
    t, df, p = welch(gain, va, len(a), vb, len(b))
    p_written = welch(gain - margin, va, len(a), vb, len(b))[2]

    def runs_needed(shift):
        sizes = range(max(2, len(a), len(b)), 1001) if gain > shift else ()
        return next((n for n in sizes if welch(gain - shift, va, n, vb, n)[2] < RULE_P), None)
    error = (va / len(a) + vb / len(b)) ** 0.5
    return {"gain_bpb": gain, "gain_nats": gain * nats_per_bit, "t": t, "df": df, "p": p, "p_written": p_written,
            "written_rule": p_written < RULE_P, "practised_rule": gain > 0 and p < PRACTISED_P,
            "noise_floor_bpb": t_critical(RULE_P, df) * error if error else 0.0,
            "runs_for_any_gain": runs_needed(0.0), "runs_for_written_rule": runs_needed(margin)}


def nats_per_bit(dataset):
    """Nats per token in one bit per byte, from the dataset's own counts; None where they are missing."""
    parts = [dataset.get(k) for k in ("val_bytes", "val_tokens")] if isinstance(dataset, dict) else [None]
    return math.log(2) * parts[0] / parts[1] if all(is_number(x) and x > 0 for x in parts) else None


def load_scores(path):
    """A run or a record folder -> ([(seed, val_bpb)], dataset dict). BadInput where there is no whole score."""
    path = Path(path)
    if (path / "submission.json").is_file():
        submission = load_submission(path)
        rows, data = [(s, v.get("val_bpb")) for s, v in seed_results(submission)], submission.get("dataset")
    else:
        run = read_run(path)
        rows, data = [(str(run["seed"]), run["val_bpb"])], run["dataset"]
    if not rows or not all(is_number(v) and v > 0 for _, v in rows):
        raise BadInput(f"{path}: no whole score (score it with: python eval_bpb.py {path})")
    if nats_per_bit(data) is None:
        raise BadInput(f"{path}: no dataset with val_tokens and val_bytes, so nats cannot be told from bits")
    return rows, data


def compare(argv):
    """`compare A... -- B... [--json]`: prints the comparison of candidate A with baseline B; returns 0."""
    as_json = "--json" in argv
    argv = [a for a in argv if a != "--json"]
    if argv.count("--") != 1 or "--" in (argv[0], argv[-1]) or any(a.startswith("-") and a != "--" for a in argv):
        raise BadInput("compare RUN... -- RUN... [--json]: candidates on the left, baseline on the right")
    cut = argv.index("--")
    loaded = [[load_scores(p) for p in side] for side in (argv[:cut], argv[cut + 1:])]
    sides = [[row for rows, _ in side for row in rows] for side in loaded]
    datas = [data for side in loaded for _, data in side]
    if len({d.get("val_docs_sha256") for d in datas}) > 1:
        raise BadInput(f"scored on different documents: {', '.join(sorted({str(d.get('name')) for d in datas}))}")
    a, b = ([v for _, v in side] for side in sides)
    data, factor = datas[-1], nats_per_bit(datas[-1])
    c = comparison(a, b, factor)
    one, two = map(dict, sides)
    if one.keys() == two.keys() and len(one) == len(a) == len(b) > 1:   # the same seeds: their noise is partly shared
        d = [two[s] - one[s] for s in one]
        c["p_paired"] = welch(statistics.fmean(d), statistics.variance(d), len(d), 0.0, 1)[2]
    if as_json:
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in c.items()}
        print(json.dumps({"candidate": a, "baseline": b, "nats_per_bit": factor, **finite}))
        return 0
    for title, values in (("candidate", a), ("baseline", b)):
        spread = f"std {statistics.stdev(values):.5f}" if len(values) > 1 else "one run, no spread"
        print(f"{title:<10} val_bpb {statistics.fmean(values):.5f}  {spread}  n {len(values)}")
    print(f"gain       {c['gain_nats']:+.5f} nats per token = {c['gain_bpb']:+.5f} bits per byte "
          f"(dataset {data.get('name')}: 1 bit per byte is {factor:.4f} nats per token)")
    if len({d.get("tokenizer_sha256") for d in datas}) > 1:
        print("           the tokenizers differ: nats are per token of the baseline's")
    paired = f", paired by seed p {c['p_paired']:.3g}" if "p_paired" in c else ""
    print(f"Welch      t {c['t']:.3f}, df {c['df']:.2f}, one-sided p {c['p']:.3g}{paired}")
    met = {True: "met", False: "not met"}
    print(f"written    {RULE_NATS} nats at p < {RULE_P}: {met[c['written_rule']]}, p {c['p_written']:.3g}")
    print(f"practised  any gain at p < {PRACTISED_P}: {met[c['practised_rule']]}")
    print(f"noise      with this spread and these runs, a gain under {c['noise_floor_bpb']:.5f} bits per byte "
          f"does not reach p < {RULE_P}")
    print(f"to settle  runs a side if gain and spread stay: {c['runs_for_any_gain'] or 'no number'} for any gain, "
          f"{c['runs_for_written_rule'] or 'no number'} for the written rule")
    return 0
