"""The proof of a score that a stranger's code has made: a new child is asked again, with all that
follows hidden, and must give the same nats. Such numbers could have been coded and decoded."""
import math
import secrets

import numpy as np

from data.dataset import BadInput, Progress

# Nats by which one place may move, for rounding, and all on average, either way: a replay that is
# cheaper than its score is of another model.
PLACE_TOLERANCE = {"cpu": 1e-4, "cuda": 0.05, "mps": 0.05}
MEAN_TOLERANCE = {"cpu": 1e-6, "cuda": 1e-4, "mps": 1e-4}
# Places, at least. Leaks at 1 of 2,000 are then seen with 99 %, and are worth what records differ
# by, 0.005 nats per token, if one saves what a guess among 16,384 tokens costs.
DRAWS = 9200
PATIENCE = 60.0  # s that a replay may take, beside four times what scoring took


def draw(sizes, n):
    """sizes {document: targets} -> {document: places, rising, (k,) int64}: n of all, each as likely
    as any other, the documents in a random order."""
    random = secrets.SystemRandom()
    docs = random.sample([*sizes], len(sizes))
    ends = np.cumsum([sizes[doc] for doc in docs])
    drawn = np.sort(random.sample(range(ends[-1]), n))
    places = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
    return {doc: part - end + sizes[doc] for doc, part, end in zip(docs, places, ends) if len(part)}


def plan(text, places, slots, chunk):
    """{document: places, rising} -> [documents (B,), starts (B,), call (B, T) int64] of each round:
    which call asks a place; 0: none. A slot's places are asked in rising order: an earlier call
    shows no more than what precedes."""
    rounds = []
    ends = {doc: each[-1] + 1 for doc, each in places.items()}
    for docs, starts in text.deal(ends, slots, chunk):
        asked = np.zeros((slots, chunk), bool)
        for slot, doc in enumerate(docs):
            at = places.get(doc, starts[:0]) - starts[slot]
            asked[slot, at[(0 <= at) & (at < chunk)]] = True
        rounds.append((docs, starts, asked * asked.cumsum(1)))
    return rounds


def replay(predictor, text, nats, rounds):
    """-> by how many nats each place has moved (n,), asked again in a new predictor."""
    moves = []
    with Progress("replaying", len(rounds), "rounds") as progress:
        for docs, starts, call in rounds:
            inputs, targets, real = text.cut(docs, starts, predictor.chunk)
            for k in range(1, call.max() + 1):
                asked = call == k
                hidden = asked.cumsum(1) > asked  # behind the place that its slot asks
                shown = np.where(hidden, text.noise(inputs.shape), inputs)
                found = text.count(predictor.predict(starts == 0, shown), targets, asked)
                for again, slot, at in zip(found, *np.nonzero(asked)):
                    moves.append(again - nats[docs[slot]][starts[slot] + at])
            predictor.predict(starts == 0, inputs)
            predictor.learn(targets, real)
            progress.add()
    return np.array(moves)


def verdict(moves, n_targets, vocab_size, kind):
    """Moves of a replay (n,) on a kind of device -> pass or FAIL, and what a pass is worth, in the
    units of the record rule."""
    worst, mean = np.abs(moves).max(), moves.mean()
    passed = worst <= PLACE_TOLERANCE[kind] and abs(mean) <= MEAN_TOLERANCE[kind]
    share = 1 - 0.01 ** (1 / len(moves)) if len(moves) < n_targets else 0.0
    gain = share * math.log(vocab_size) + MEAN_TOLERANCE[kind]
    return (f"{'pass' if passed else 'FAIL'}: {len(moves)} of {n_targets} places, drawn at random and "
            f"asked again with what follows hidden, moved {worst:.1e} nats at most (allowed "
            f"{PLACE_TOLERANCE[kind]}), {mean:+.1e} on average (allowed {MEAN_TOLERANCE[kind]}); with "
            f"99 %, leaks of ln V nats each are worth at most {gain:.6f} nats per token")


def prove(judge, scored, text, nats, gather):
    """The judge's predictor `scored`, now closed, has paid nats {document: (n,)} -> verdict on all
    ranks' documents. gather(value) -> every rank's value."""
    gather()  # all children that scored are gone
    if not judge.lacking:
        judge.confine.forget_files()
    gather()  # and what they left in memory
    sizes = {doc: len(each) for doc, each in nats.items()}
    n, n_targets = sum(sizes.values()), sum(text.sizes)
    shape = scored.slots, scored.chunk
    spent = judge.phases.seconds
    round_seconds = (spent["score"] + spent["learn"]) * math.prod(shape) / n
    # At the speed of scoring; about a quarter of the slots hold a place that a call asks. All ranks
    # draw at the rate of the slowest, so that all places are equally likely.
    affordable = judge.args.audit_seconds / round_seconds * scored.slots / 4
    rate = max(min(gather(affordable / n)), DRAWS / n_targets)
    places = draw(sizes, min(n, math.ceil(rate * n)))
    rounds = plan(text, places, *shape)
    # Of predict and learn; in scoring two a round.
    calls = sum(call.max() + 2 for _, _, call in rounds)
    seconds = PATIENCE + 4 * (spent["load"] + round_seconds * calls / 2)
    try:
        predictor = judge.predictor(seconds)
        if (predictor.slots, predictor.chunk) != shape:
            raise BadInput("a new predictor has other slots and chunks")
        moves = replay(predictor, text, nats, rounds)
    except BadInput as e:
        moves = f"FAIL: {e}"
    found = gather(moves)
    for failed in found:
        if isinstance(failed, str):
            return failed
    return verdict(np.concatenate(found), n_targets, text.vocab_size, judge.device.split(":")[0])
