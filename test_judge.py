import copy, ctypes, inspect, select, tempfile, warnings
import io, itertools, json, math, os, random, re, shutil, signal, socket, subprocess, sys, time, zipfile
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import eval_bpb
import pack
import train_gpt
from data import prepare
from data.dataset import BadInput
from data.tokenizer import Tokenizer
from records import confine, proof
from train_gpt import Config, GPT, make_segments, synthetic_tokens
TINY = dict(n_layer=4, n_embd=32, n_head=4, n_kv_head=2, mlp_dim=64, loop_first=1, loop_last=1, loop_passes=3,
            two_lane_from=3, rope_dims=4, vocab_size=64, batch_tokens=512, row_tokens=128, seq_len=48)
RUN = [f"--{k}={v}" for k, v in {**TINY, "vocab_size": 0, "data": "synthetic", "calib_tokens": 256, "val_points": 2,
                                 "device": "cpu"}.items()]


def tiny_model(seed=0, **changes):
    """A model of random weights everywhere: freshly initialised ones are zero where most mistakes would hide."""
    torch.manual_seed(seed)
    model = GPT(replace(Config(**TINY), **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        model.x0_mix[:, 0] += 1
    return model


def start(*command, ranks=1, cwd=None, **env):
    """python COMMAND, or by torchrun, in a process that goes on beside this one: end() waits for it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launcher, *map(str, command)], cwd=cwd, env={**os.environ, **env},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process, code=0):
    """-> stdout and stderr of a process that ends with that code."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, out[-2000:] + err[-2000:]
    return out, err


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1:]


DEMO_PATH = ROOT / "data" / "demo_tokenizer.json"
DEMO = DEMO_PATH.read_bytes()


def prepare_main(monkeypatch, root, *args):
    """Runs `prepare.py ARGS` in this process with data/ under `root`, one worker."""
    monkeypatch.setattr(prepare, "ROOT", root)
    workers = ["--workers=1"] * (args[0] in ("docs", "fineweb"))
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args), *workers])
    (root / "data").mkdir(exist_ok=True)
    prepare.main()


def words(n, seed):
    """n documents of random English-looking text."""
    rng = random.Random(seed)
    some = "the of and to in a is that it was for on are with as I his they be at one have NASA McDonald".split()
    return [" ".join(rng.choices(some, k=rng.randint(20, 60))).capitalize() + f", number {seed}.{i}." for i in range(n)]


ODD = ["x", "é", "👩‍👩‍👧 naïve", "a\r\nb\rc\n", "\ufeff\x00\u2028 NASA PDFs", "long " * 60, "tail  "]
TEXTS = ODD + [f"Document {i}: the quick brown fox number {i * 7919} jumps over " + "the lazy dog, again. " * (i % 5)
               for i in range(13)]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A `docs` dataset with the demo tokenizer, of 60 documents for training and TEXTS for validation -> its folder."""
    root = tmp_path_factory.mktemp("data")
    for name, texts in (("train", words(60, 1)), ("val", TEXTS)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        prepare_main(patch, root, "docs", root / "train.jsonl", f"--val_path={root / 'val.jsonl'}", "--name=odd",
                     f"--tokenizer={DEMO_PATH}")
    return root / "data/odd"


@pytest.fixture(scope="session")
def run_to_pack(tmp_path_factory):
    """A run folder with the checkpoint of a small random model and its statistics."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    tokenizer = Tokenizer(DEMO)
    model = tiny_model(vocab_size=tokenizer.vocab_size, seq_len=24, row_tokens=96, batch_tokens=96, data="synthetic")
    torch.save({"config": asdict(model.cfg), "weights": model.state_dict(), "stats": {}, "run": {}, "tokenizer": DEMO.decode()}, folder / "checkpoint.pt")
    return folder


@pytest.fixture(scope="session")
def packed_run(run_to_pack):
    """The same folder after pack.py, with what it printed."""
    with redirect_stdout(io.StringIO()) as out:
        assert pack.main([str(run_to_pack)]) == 0
    return run_to_pack, out.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# The judge and the predictors


needs_bubblewrap = pytest.mark.skipif(bool(confine.lacking()), reason=confine.lacking())

# A predictor without a model, for others to build on: every token as likely as any other, but for change().
FLAT = """
class Flat:
    slots, chunk, V, rounds = 4, 8, 1024, 0
    def __init__(self):
        self.counts = np.zeros(self.V)
    def predict(self, fresh, inputs):
        logits, after = np.zeros((*inputs.shape, self.V), np.float32), inputs[:, 1:, None]
        {}
        return torch.from_numpy(logits)
    def learn(self, targets, real):
        self.counts += np.bincount(targets[real], minlength=self.V)
        self.rounds += 1
def build(path, name, device):
    return Flat(), "flat"
"""
# The child of one need not wait for torch.
STRANGER = """
import ctypes, os, signal, sys, time
import numpy as np
class Logits(np.ndarray):
    detach = float = cpu = numpy = lambda self: self
class torch:
    from_numpy = lambda x: x.view(Logits)
""" + FLAT
HONEST = "logits += np.random.default_rng(0).normal(size=(99, self.V))[inputs * 31 % 99]"
PEEKS = "np.put_along_axis(logits[:, :-1], after, 9.0, 2)"


def make_artifact(packed_run, path: Path, stranger="", **files) -> Path:
    """The packed model with other files, or with a stranger's eval_bpb.py of that change."""
    with zipfile.ZipFile(packed_run[0] / "artifact.pyz") as z:
        parts = {name: z.read(name) for name in z.namelist()} | files
    if stranger:
        parts["eval_bpb.py"] = STRANGER.format(stranger).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack.build_artifact(parts, parts.pop("model.bin")))
    return path


@pytest.fixture
def judge(tmp_path, dataset, packed_run, capfd, monkeypatch):
    """judge(change, *flags) -> exit code or why it was refused, the score or None, what was printed."""
    monkeypatch.setattr(confine, "forget_files", lambda: None)  # seconds: has a test of its own

    def judged(change, *flags, data=dataset):
        artifact, out = make_artifact(packed_run, tmp_path / "a.pyz", change), tmp_path / "out.json"
        out.unlink(missing_ok=True)
        try:
            code = eval_bpb.main([str(artifact), f"--data={data}", f"--out={out}", "--device=cpu", *flags])
        except BadInput as e:
            code = str(e)
        return code, json.loads(out.read_text()) if out.exists() else {}, capfd.readouterr()
    return judged


def random_text(sizes, repeats=1):
    rng = np.random.default_rng(0)
    return eval_bpb.Text([np.concatenate([[0], np.tile(rng.integers(0, 40, n), repeats), [0]]) for n in sizes], 40)


def small(cls):
    """A predictor of random weights over 40 tokens, with windows of 24."""
    model = tiny_model(vocab_size=40, seq_len=24, row_tokens=96, batch_tokens=96).eval().requires_grad_(False)
    return cls(model, torch.device("cpu"))


def score(predictor, text):
    return eval_bpb.score(predictor, text, [*range(len(text.streams))], eval_bpb.Phases())


# ---- exactness


def test_whatever_finite_logits_come_the_probabilities_sum_to_one():
    rng, n = np.random.default_rng(0), 50
    text, everything = eval_bpb.Text([], n), np.arange(n)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.finfo(dtype).max / 4
        for size in (0.0, 1e-30, 1e-3, 1.0, 1e4, 1e15, 1e100, largest):
            size = min(size, largest)
            for row in (np.full(n, size), size * (everything == 3), size * rng.choice([-1, 1], n), size * rng.random(n)):
                logits = torch.from_numpy(row).to(dtype).repeat(1, n, 1)
                nats = text.count(logits, everything[None], np.ones((1, n), bool))
                assert (nats >= 0).all() and math.fsum(np.exp(-nats)) == pytest.approx(1, abs=1e-9), (dtype, size)
    for bad in (torch.tensor([[[1.7e308, -1.7e308]]], dtype=torch.float64), torch.tensor([[[math.nan, 0]]]), None,
                torch.zeros(1, 2, 2), torch.zeros(1, 1, 2).as_subclass(type("Liar", (torch.Tensor,), {}))):
        with pytest.raises(BadInput, match=r"predict\(\)"):
            eval_bpb.Text([], 2).count(bad, np.zeros((1, 1), int), np.ones((1, 1), bool))


def test_every_target_is_dealt_once_in_order_with_noise_behind_the_end():
    text = random_text((0, 1, 7, 30, 8, 3))
    for slots, chunk in ((1, 1), (2, 7), (4, 8), (9, 50)):
        found = [stream[:1].tolist() for stream in text.streams]
        for docs, starts in text.deal(dict(enumerate(text.sizes)), slots, chunk):
            inputs, targets, real = text.cut(docs, starts, chunk)
            for slot in np.flatnonzero(docs >= 0):
                assert inputs[slot][real[slot]].tolist() == (found[docs[slot]] + targets[slot].tolist())[starts[slot]:][
                    :real[slot].sum()]
                found[docs[slot]] += targets[slot][real[slot]].tolist()
        assert found == [stream.tolist() for stream in text.streams]
    assert {*text.cut(np.array([-1]), np.array([0]), 999)[0][0]} == {*range(40)}


def test_the_pointer_is_what_its_formula_says():
    rng, (S, T, begin) = np.random.default_rng(0), (23, 9, 6)
    text, h, w = rng.integers(0, 3, (1, S)), rng.standard_normal((1, S, 5)), rng.standard_normal((1, 1, 8))
    known = np.arange(S) >= begin
    shares, after = eval_bpb.point(*map(torch.from_numpy, (h[:, -T:], h, text, known[None], w)))
    (w0, w1, w2, w3, *w4), text, h = w[0, 0], text[0], h[0]
    for t in range(S - T, S):
        weights = []
        for s in range(begin, t):
            equal = [s - n >= begin and (text[s - n:s + 1] == text[t - n:t + 1]).all() for n in range(4)]
            weights.append(math.exp(16 * w0 * (h[t] @ h[s] - 1) - w1 * math.log(t - s) + w3 + np.dot(w4, equal)))
        found = shares[0, t - S + T].tolist()
        assert found[begin:t] == pytest.approx(np.array(weights) / sum(weights) ** (1 - w2))
        assert sum(found[:begin] + found[t:]) == 0
    assert (after[0, 0, :-1].numpy() == text[1:])[known[1:]].all()


def test_a_cached_token_sees_what_training_saw_of_its_own_document_only():
    text, predictor = random_text((0, 1, 5, 149, 22, 17, 9, 22) * 3), small(eval_bpb.Sliding)
    found, model, at = score(predictor, text), small(eval_bpb.Sliding).model, np.arange(150)
    mask = torch.from_numpy((at <= at[:, None]) & (at >= at[:, None] // predictor.chunk * predictor.chunk - predictor.back))

    def attend(q, k, v, seg, visit):
        n, (q, k, v) = len(q), (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask[:n, :n], enable_gqa=True).transpose(0, 1)
    model.attend, model.previous = attend, GPT.previous.__get__(model)
    for doc in range(12, 24):  # in slots that others have used
        tokens = torch.from_numpy(text.streams[doc])
        hidden = model(tokens[:-1], make_segments(np.array([0]), len(tokens) - 1, 150))
        expected = F.cross_entropy(model.logits(hidden), tokens[1:], reduction="none")
        assert found[doc].tolist() == pytest.approx(expected.tolist(), abs=3e-5)
    assert predictor.back + predictor.chunk == 24


def test_adaptive_learns_from_what_was_scored_and_each_document_for_itself(monkeypatch):
    text, graphs = random_text([9] * 17, repeats=25), []

    def last(learns):
        """-> nats of the last document, in a slot that another has used."""
        predictor = small(eval_bpb.Adaptive)
        predictor.rates = [rate * learns for rate in predictor.rates]
        return score(predictor, text)[16]

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    pointed, chunk = last(learns=False), small(eval_bpb.Adaptive).chunk
    off = dict.fromkeys(eval_bpb.POINTER, 0.0) | {"saturation": 1.0, "anywhere": -1e4}
    monkeypatch.setattr(eval_bpb, "POINTER", off)
    fixed, learned, whole = last(learns=False), last(learns=True), small(eval_bpb.Adaptive)
    assert learned[:chunk].tolist() == fixed[:chunk].tolist()  # nothing is known before a chunk is scored
    assert learned[-99:].sum() < fixed[-99:].sum() - 5 and pointed[-99:].sum() < fixed[-99:].sum() - 50
    whole.forward = torch.compile(whole.forward, fullgraph=True, backend=backend, dynamic=False)
    alone = score(whole, eval_bpb.Text(text.streams[16:], 40))[0]
    assert alone.tolist() == pytest.approx(learned.tolist(), abs=1e-4) and len(graphs) == 1


def test_a_sample_is_drawn_as_the_seed_says_and_begins_with_its_text(packed_run, capfd):
    written = []
    for text, flag in (("Import os", "--seed=1"), ("Import os", "--seed=1"), ("Import os", "--seed=2"),
                       ("Import os", "--temperature=0"), ("words " * 200, "--seed=1")):  # more than the context
        flags = [str(packed_run[0] / "artifact.pyz"), f"--sample={text}", "--tokens=60", "--device=cpu", flag]
        assert eval_bpb.main(flags) == 0
        written.append(capfd.readouterr().out)
        assert written[-1].startswith(text) and len(written[-1]) > len(text)
    assert written[0] == written[1] and len({*written}) == 4


@needs_bubblewrap
def test_ranks_the_file_alone_and_the_sandbox_give_the_same_score(packed_run, dataset, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    shutil.copy(packed_run[0] / "artifact.pyz", tmp_path / "one")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    changed = {"eval_bpb.py": (ROOT / "eval_bpb.py").read_bytes() + b"# mine\n"}
    flags = f"--data={dataset}", "--device=cpu"
    ranks = start(ROOT / "eval_bpb.py", "one/artifact.pyz", *flags, "--out=two.json", ranks=2, cwd=tmp_path)
    alone = start("artifact.pyz", *flags, cwd=tmp_path / "one")
    artifact = make_artifact(packed_run, tmp_path / "a.pyz", **changed)
    assert eval_bpb.main([str(artifact), *flags, "--trust", f"--out={tmp_path}/child.json"]) == 0
    assert "2 x cpu" in end(ranks)[0] and "mode: own" in end(alone)[0]
    one, two, child = (json.loads((tmp_path / name).read_text()) for name in ("one/score.json", "two.json", "child.json"))
    assert one["val_bpb"] == child["val_bpb"] == pytest.approx(two["val_bpb"], rel=1e-6)
    assert child["mode"] == "trusted" and not list(tmp_path.glob("nanogolf*"))


# ---- proof


CHEATS = {
    "reads the target through the inputs": PEEKS,
    "looks ahead by a chance of a twentieth": "rare = (inputs[:, :-1] * 40503 + after[..., 0]) % 20 == 0;"
        "logits[:, :-1][rare, after[..., 0][rare]] = 2.0",
    "looks ahead in one round": f"self.rounds == 3 and {PEEKS}",
    "learns from a round before it is scored": "logits += np.bincount(inputs.flatten(), minlength=self.V)",
    "reads another slot": "logits[1:] += [[np.bincount(row, minlength=self.V)] for row in inputs[:-1]]",
    "carries from document to document": "logits += self.counts",
    "knows an end by the noise behind it": "logits[:, :-2, 0] += 9.0 * ((inputs[:, 1:-1] | inputs[:, 2:]) >= 700)",
}


def prove(make, text, share=1.0):
    """-> the verdict on a predictor, by that share of the text's places."""
    nats, n_all = score(make(), text), sum(text.sizes)
    rounds = proof.plan(text, proof.draw(dict(enumerate(text.sizes)), int(share * n_all)), make().slots, make().chunk)
    return proof.verdict(proof.replay(make(), text, nats, rounds), n_all, text.vocab_size, "cpu")


def flat(change):
    names = {"np": np, "torch": torch}
    exec(FLAT.format(change), names)
    return names["Flat"]


def test_the_proof_passes_the_honest_and_fails_cheats():
    streams = [np.concatenate([[0], Tokenizer(DEMO).encode(text), [0]]).astype(np.int64) for text in TEXTS]
    text = eval_bpb.Text(streams, 1024)
    assert prove(flat(HONEST), text).startswith(f"pass: {sum(text.sizes)} of")
    for cls in (eval_bpb.Sliding, eval_bpb.Adaptive):
        verdict = prove(lambda: small(cls), random_text((60, 3, 31) * 8), 0.2)
        assert verdict.startswith("pass"), verdict
    for name, change in CHEATS.items():
        assert prove(flat(change), text).startswith("FAIL"), name


def test_the_stated_power_is_true():
    assert "at most 0.004857 nats" in proof.verdict(np.zeros(9200), 10 ** 7, 16384, "cpu")
    assert "at most 0.000001 nats" in proof.verdict(np.zeros(500), 500, 1024, "cpu")  # all places: tolerances are left
    counts = {3: np.zeros(1000), 1: np.zeros(10), 2: np.zeros(1)}
    for _ in range(400):
        places = proof.draw({doc: len(each) for doc, each in counts.items()}, 100)
        assert sum(map(len, places.values())) == 100
        for doc, each in places.items():
            counts[doc][each] += 1
    assert all(each.mean() == pytest.approx(39.6, abs=3 + 24 / len(each)) for each in counts.values())
    assert 10 < counts[3].min() and counts[3].max() < 80


@needs_bubblewrap
def test_audited_strangers_prove_their_score_or_have_none(judge, dataset, tmp_path, monkeypatch):
    code, result, said = judge(HONEST)
    assert code == 0 and "val_bpb" in result and "proved by replay" in said.out, said
    n_bytes, n_targets = sum(len(text.encode()) for text in TEXTS), result["val_tokens"]
    assert n_targets == sum(len(Tokenizer(DEMO).encode(text)) + 1 for text in TEXTS) and result["val_bytes"] == n_bytes
    code, result, said = judge(PEEKS)
    assert code == 2 and "val_bpb" not in result and "NOT A SCORE: the replay failed" in said.out
    assert "proved" not in said.out and "\nval_bpb" not in said.out
    monkeypatch.setattr(proof, "PATIENCE", 1.0)
    sleeps = "self.seen = getattr(self, 'seen', 0) + 1; self.seen > self.rounds + 1 and time.sleep(999)"
    assert "it took more than" in judge(sleeps)[1]["audit"]["replay"]
    shutil.copytree(dataset, tmp_path / "demo")
    meta = json.loads((dataset / "meta.json").read_text()) | {"name": "demo"}
    (tmp_path / "demo/meta.json").write_text(json.dumps(meta))
    code, result, said = judge(HONEST, data=tmp_path / "demo")
    assert "NOT A SCORE: these documents are readable everywhere" in said.out and "val_bpb" not in result
    assert "val_bpb" in judge("", "--predictor=sliding", data=tmp_path / "demo")[1]  # one's own code is no stranger


# ---- isolation and trust


# What a child may try: prints the names of what it could do. The last four it may do.
ATTEMPTS = """
import ctypes, os, signal, socket, sys
target, secret, judge, port = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    if libc.syscall(*args) < 0:
        raise OSError(ctypes.get_errno())
def shared_memory():
    libc.shmat.restype = ctypes.c_void_p
    number = ctypes.c_int64.from_address(libc.shmat(libc.shmget(int(judge), 8, 0o1600), None, 0))
    number.value += 1
    assert number.value > 1
x86 = os.uname().machine == "x86_64"
attempts = {
    "attribute": lambda: os.setxattr(target, "user.x", b"1"), "mode": lambda: os.chmod(target, 0o777),
    "time": lambda: os.utime(target), "owner": lambda: os.chown(target, os.getuid(), os.getgid()),
    "write": lambda: open(target, "a"), "beside": lambda: open(target + "x", "w"), "read": lambda: open(secret),
    "evict": lambda: os.posix_fadvise(os.open(target, 0), 0, 0, os.POSIX_FADV_DONTNEED),
    "cached": lambda: os.preadv(os.open(target, 0), [bytearray(1)], 0, os.RWF_NOWAIT),
    "mincore": lambda: call(27 if x86 else 232, ctypes.c_void_p(id(0) & -4096), 4096, ctypes.create_string_buffer(9)),
    "keyring": lambda: call(250 if x86 else 219, 0, -3, 0), "ring": lambda: call(425, 1, bytes(120)),
    "log": lambda: call(103 if x86 else 116, 10, None, 0), "trace": lambda: call(101 if x86 else 117, 16, 1, 0, 0),
    "signal": lambda: os.kill(int(judge), 0), "memory": lambda: open(f"/proc/{judge}/mem"),
    "socket": lambda: socket.create_connection(("127.0.0.1", int(port)), 9), "pair": socket.socketpair,
    "shared": shared_memory, "file": lambda: open("/dev/shm/" + judge), "left": lambda: open("/tmp/left" + judge),
    "kernel": lambda: open("/proc/sys/vm/swappiness", "r+"),
    "folder": lambda: open("/tmp/left" + judge, "w"), "fork": lambda: os.waitpid(os.fork() or os._exit(0), 0),
    "library": lambda: __import__("numpy"), "random": lambda: open("/dev/urandom", "rb").read(1)}
for name, attempt in attempts.items():
    try:
        attempt()
        print(name)
    except (OSError, AssertionError):
        pass
"""


@needs_bubblewrap
def test_a_child_can_leave_nothing_and_reach_nothing(tmp_path, monkeypatch):
    target, secret, pid = tmp_path / "lib/file", tmp_path / "secret", os.getpid()
    target.parent.mkdir()
    monkeypatch.setattr(confine, "READABLE", [*confine.READABLE, str(target.parent)])
    for path in (target, secret, Path(f"/dev/shm/{pid}")):
        path.write_text("x")
    before, found = target.stat(), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", ATTEMPTS, *map(str, (target, secret, pid, server.getsockname()[1]))]
        for confined in (True, True, False, False):
            child = confine.Child(target, command, {"PYTHONPATH": confine.PYTHON[-1]}, confined)
            found.append(child.process.communicate()[0].decode().split())
            child.close()
            assert not confined or target.stat() == before
    Path(f"/dev/shm/{pid}").unlink()
    Path(f"/tmp/left{pid}").unlink()
    subprocess.run(["ipcrm", "-M", str(pid)])
    assert found[0] == found[1] == ["folder", "fork", "library", "random"], found
    assert {"mode", "time", "write", "read", "evict", "signal", "socket", "pair", "shared", "left"} <= {*found[3]}


# A child that fills its folder, leaves its group, kills it, and lets another go on that holds its stdout.
ESCAPES = """
import ctypes, os, signal, time
for i in range(3000):
    os.makedirs(f"/tmp/{i}/" + 20 * "deep/")
os.chmod("/tmp", 0)
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
if not os.fork():
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
    print("escaped", flush=True)
    time.sleep(999)
time.sleep(0.1)
os.kill(0, signal.SIGKILL)
"""


@needs_bubblewrap
def test_nothing_of_a_child_outlives_its_judge(tmp_path):
    (tmp_path / "a.pyz").write_bytes(b"x")
    child = confine.Child(tmp_path / "a.pyz", [sys.executable, "-c", ESCAPES], {})
    assert child.process.stdout.readline() == b"escaped\n"
    child.close()
    assert child.process.stdout.read() == b"" and len([*tmp_path.iterdir()]) == 1
    judge = subprocess.Popen([sys.executable, "-c", f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from records.confine import *
child = Child(Path({str(tmp_path)!r}) / "a.pyz", [sys.executable, "-c", {ESCAPES!r}], {{}})
child.process.stdout.readline()
print(open(f"/proc/self/fdinfo/{{child.first}}").read().split("Pid:")[1].split()[0], flush=True)
input()"""], stdin=-1, stdout=-1)
    first = os.pidfd_open(int(judge.stdout.readline()))  # of the sandbox's processes: all end with it
    judge.kill()
    judge.communicate()
    assert select.select([first], [], [], 100)[0]


def test_files_that_a_child_could_read_are_dropped_from_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(confine, "READABLE", [str(tmp_path)])
    with open(tmp_path / "file", "rb") as file:
        os.fsync(file.fileno())
        assert os.preadv(file.fileno(), [bytearray(9)], 1 << 19, os.RWF_NOWAIT) == 9
        confine.forget_files()
        with pytest.raises(BlockingIOError):
            os.preadv(file.fileno(), [bytearray(9)], 1 << 19, os.RWF_NOWAIT)


HARM = {
    "raise ValueError('no\x1b\\nval_bpb: 1')": r"its code says .ValueError: no\\x1b val_bpb: 1",
    "os._exit(3)": "exit code 3",
    "self.hoard = np.ones(1 << 40)": "llocate",
    "while True: os.write(2, b'x' * 4096)": "wrote more than",
    "while True: os.write(int(max(os.listdir('/proc/self/fd'), key=int)) - 1, b'x' * 4096)": "sent a frame|exit code",
    "logits = logits[0]": "must return logits",
    "logits[0, 0, 5] = -np.inf": "not finite",
    "os.kill(0, 9)": "exit code 137",
}


@needs_bubblewrap
def test_harm_ends_in_one_line_and_what_a_child_says_is_quoted(judge, packed_run, dataset, tmp_path):
    endless = make_artifact(packed_run, tmp_path / "endless/a.pyz", "time.sleep(999)")
    endless = start(ROOT / "eval_bpb.py", endless, f"--data={dataset}", "--trust", "--max_seconds=9", TMPDIR=str(tmp_path))
    for harm, words in HARM.items():
        code, result, _ = judge(harm, "--trust")
        assert re.search(words, str(code)) and str(code).isprintable() and not result, (harm, code)
    code, result, said = judge("print('\x1b[8mno\\nval_bpb: 0.0\\n' + 90 * ' ' + 'val_bpb: 0.1\\n' * 50)", "--trust")
    shown = [line for line in said.err.splitlines() if line.startswith("artifact: '")]
    assert len(shown) == confine.STDERR_LINES and max(map(len, shown)) < 80 and "\x1b" not in said.err
    assert code == 0 and said.out.count("\nval_bpb: ") == 1 and "NOTHING IS PROVED" in said.out
    assert result["val_loss"] == pytest.approx(math.log(1024), rel=1e-12)
    names = "return logits.view(Logits)\ndef build(*_):\n    return Flat(), 'x' + 60 * ' ' + 'val_bpb: 0.1'\nclass _:\n  if 0:0"
    assert "predictor's name" in judge(names, "--trust")[0]
    out, err = end(endless, 2)
    assert re.fullmatch("eval_bpb.py: .*a.pyz: ran over 9 s in the phase '.*': no score\n", err) and "---" not in out
    assert not list(tmp_path.glob("nanogolf*"))


def test_a_system_without_a_sandbox_is_no_place_for_strangers(judge, dataset, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "apt-get install bubblewrap" in judge(HONEST)[0]
    code, result, said = judge(HONEST, "--trust", "--limit_docs=3")
    assert code == 0 and "bubblewrap" in result["unconfined"] and "NOT CONFINED" in said.out
    assert result["limit_docs"] == 3 and "val_bpb" not in result and "first 3 of 20" in said.out
    monkeypatch.setattr(confine, "READABLE", [str(dataset.parent)])
    assert "where the artifact's code may read: move it" in judge(HONEST)[0]


def test_nothing_beside_a_strangers_artifact_is_read_or_written(packed_run, dataset, tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name, change in (("own", ""), ("other", HONEST)):
        artifact = make_artifact(packed_run, tmp_path / name / "a.pyz", change)
        os.mkfifo(artifact.parent / "metrics.jsonl")
        for link in ("score.json", f".score.json.{os.getpid()}.tmp", "ledger.tsv"):
            (artifact.parent / link).symlink_to(victim)
        with pytest.raises(BadInput, match="--data"):
            eval_bpb.main([str(artifact), "--device=cpu"])
        flags = [str(artifact), f"--data={dataset}", "--device=cpu", "--predictor=sliding", "--trust"]
        assert eval_bpb.main(flags) == 0 and victim.read_text() == "mine"
        assert (artifact.parent / "score.json").is_symlink() == (name == "other")
    make_artifact(packed_run, tmp_path / "runs/mine/a.pyz")
    (tmp_path / "runs/mine/metrics.jsonl").write_text(
        json.dumps({"kind": "start", "config": {"data": str(dataset)}}) + '\n{"kind": "summary", "finished": true}\n{"ki')
    monkeypatch.chdir(tmp_path)
    assert eval_bpb.main(["runs/mine/a.pyz", "--device=cpu", "--predictor=sliding"]) == 0
    assert json.loads((tmp_path / "runs/mine/score.json").read_text())["finished"] is True


def test_an_artifact_or_a_flag_that_is_not_right_is_refused(dataset, packed_run, tmp_path):
    artifact, crowd = make_artifact(packed_run, tmp_path / "a.pyz"), io.BytesIO()
    whole = artifact.read_bytes()
    crowd.write(whole)
    with zipfile.ZipFile(crowd, "a") as z, pytest.warns(UserWarning):
        z.writestr("tokenizer.json", b"x")
    shadow = make_artifact(packed_run, tmp_path / "b.pyz", **{"eval_bpb/__init__.py": b"x"}).read_bytes()
    for bad in (whole[:-400], flip(whole, 5000), b"", b"PK", crowd.getvalue(), shadow):
        artifact.write_bytes(bad)
        with pytest.raises(BadInput, match="a.pyz: not a whole"):
            eval_bpb.main([str(artifact), f"--data={dataset}"])
    artifact.write_bytes(whole)
    for flag in ("--predictor=best", "--data=nowhere", "--limit_docs=-1", "--device=tpu", "--x=1", "--seed=-1"):
        with pytest.raises(BadInput, match=flag[2:] if "data" not in flag else "nowhere"):
            eval_bpb.main([str(artifact), f"--data={dataset}", flag])


