"""Read Python sources as data: unwrap what is encoded, find the signs that rules.py names, tell copies and changes.

Nothing here runs or imports what it reads. A finding is `emit(rule, file, message, line)` of the review that is given.
"""
import ast
import base64
import bz2
import io
import itertools
import keyword
import lzma
import re
import sys
import tokenize
import warnings
import zlib

import zstandard

from records.rules import (BAD_BYTE_COUNTS, BASE_PACKAGES, CLOCK_SECONDS, FINEWEB_VAL_BYTES, IDENTIFIERS, LAYER_LIMIT,
                           LOADS_CODE, MACHINE_PATH, NETWORK, NETWORK_COMMAND, PUBLIC_PACKAGES, SECRET,
                           SOURCE_LIMIT, TARGET, TEXT, TRAIN, TRAIN_LOADER, VAL, VAL_DATA, WALLCLOCK)

RAW_LZMA = [{"id": lzma.FILTER_LZMA2, "dict_size": 64 << 20}]
DECOMPRESSORS = (  # (bytes, most bytes out) -> bytes; each stops at the limit, whatever the stream promises
    lambda data, room: zlib.decompressobj(47).decompress(data, room),   # zlib and gzip
    lambda data, room: zlib.decompressobj(-15).decompress(data, room),
    lambda data, room: lzma.LZMADecompressor(memlimit=256 << 20).decompress(data, room),
    lambda data, room: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=RAW_LZMA).decompress(data, room),
    lambda data, room: bz2.BZ2Decompressor().decompress(data, room),
    lambda data, room: zstandard.ZstdDecompressor(max_window_size=1 << 26).stream_reader(data).read(room))
ARMOURS = (base64.b85decode, base64.a85decode, base64.b64decode, base64.b32decode, base64.b16decode)
WORDS = re.compile(rb"[ \t]\S+[ \t]")   # armour and compressed literals have no words between blanks at their start


def as_bytes(literal):
    return literal if isinstance(literal, bytes) else literal.encode("utf-8", "replace")


def unwrap(value, room, layer=0):
    """A long literal -> the source text inside, at most `room` bytes, or None. Armours and compressors nest."""
    packed = as_bytes(value)
    forms = [packed] if isinstance(value, bytes) else []
    if not WORDS.search(packed[:400]):
        for decode in ARMOURS:
            try:
                forms.append(decode(re.sub(rb"\s+", b"", packed)))   # armour may be broken into lines
            except ValueError:
                continue
    for form in forms:
        for decompress in (*DECOMPRESSORS, lambda data, room: data):
            try:
                out = decompress(form, room)
            except Exception:  # every decoder has errors of its own, and a payload of another kind is the common case
                continue
            text = out.decode("utf-8", "ignore")
            if len(text) > 0.9 * len(out) and re.search(r"\bimport \w|\bdef \w+\(|^\w+ *=", text, re.M):
                return text
            if layer < LAYER_LIMIT and out != value and (inner := unwrap(out, room, layer + 1)):
                return inner
    return None


def parse(review, name, text):
    """Source text -> tree, or None, with a finding where it does not parse: that may be written for a later Python, so
    its f-strings are emptied, then whole lines left out, to read the rest."""
    lines, first = text.splitlines(), None
    for _ in range(40):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
            break
        except SyntaxError as e:
            first, at = first or e, min(e.lineno or 1, len(lines)) - 1
            line = re.sub(r"""\b(f|rf|fr)(["']).*\2""", '""', lines[at], flags=re.I)
            lines[at] = line if line != lines[at] else re.match(r"\s*", line)[0] + "pass"
            text = "\n".join(lines)
        except (RecursionError, MemoryError, ValueError) as e:
            return review.emit("review-limit", name, f"cannot be parsed within limits ({type(e).__name__})")
    else:
        tree = None
    if first:
        version = ".".join(map(str, sys.version_info[:2]))
        what = f"{first.msg}; {'but for such lines' if tree else 'NOT READ, only searched'}"
        review.emit("python-syntax", name, f"does not parse on Python {version}: {what}", first.lineno or 1)
    return tree


def dotted(node):
    """`a.b.c` of a chain of names, else ''."""
    parts = []
    while isinstance(node, ast.Attribute) and len(parts) < 20:
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def root_name(node):
    """`a` of `a[1:].copy().b`, else ''."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def identifiers(*nodes):
    """{lower-case identifier: its first line} of everything named at or below the nodes."""
    out = {}
    for n in itertools.chain.from_iterable(map(ast.walk, nodes)):
        for field in ("id", "attr", "arg", "name"):
            if isinstance(name := getattr(n, field, None), str):
                out.setdefault(name.lower(), getattr(n, "lineno", 1))
    return out


def constants(kind, *nodes):
    """The constants of a type at or below the nodes."""
    found = (n.value for node in nodes for n in ast.walk(node) if isinstance(n, ast.Constant))
    return [v for v in found if isinstance(v, kind)]


def matching(names, pattern):
    return next((n for n in names if re.search(pattern, n)), None)


def scan_text(review, name, text):
    """The rules that read any text: keys, and the marks that scripts and logs leave."""
    hits = [(SECRET.search(text), "secret", "a key or token")]
    if name.endswith((".py", ".sh", ".log", ".txt")) or "!" in name:
        hits += [(pattern.search(text), rule, message) for pattern, rule, message in TEXT]
        hits += [(m, "clock-override", f"a wall clock of {m[1]} s in the ten-minute track")
                 for m in WALLCLOCK.finditer(text) if review.record and not 0 < float(m[1]) <= CLOCK_SECONDS]
    for m, rule, message in hits:
        if m:
            review.emit(rule, name, message, text.count("\n", 0, m.start()) + 1)


def scan(review, name, text, depth=0):
    """All rules that read one source, and whatever is wrapped inside it."""
    review.scanned += len(text)
    if review.scanned > SOURCE_LIMIT:
        return review.emit("review-limit", name, f"over {SOURCE_LIMIT:,} characters of source in all; not read")
    scan_text(review, name, text)
    if (tree := parse(review, name, text)) is None:
        words = {m[0].lower(): text.count("\n", 0, m.start()) + 1 for m in re.finditer(r"[A-Za-z_]\w*", text)}
        return scan_names(review, name, words)
    review.trees[name] = tree
    nodes = list(ast.walk(tree))
    optional = [n for n in nodes if isinstance(n, ast.Try) and n.handlers or isinstance(n, ast.With) and any(
        matching(identifiers(i.context_expr), "^importerror$") for i in n.items)]
    guarded = {id(n) for t in optional for n in ast.walk(t)}
    runs_text = False
    # What stands below the border of eval_bpb.py is compared with the root's; strictly, so is all of confine.py.
    above = text.partition("\n# The judge")[0] if name == "eval_bpb.py" else text
    above = "" if name == "data/confine.py" and review.strict else above
    review.judge = above.count("\n") + 2 if above else 0
    # `from os import system as run` makes run() a call of os.system.
    review.aliases = {a.asname or a.name: f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom)
                      for a in n.names if n.module in ("os", "subprocess", "pickle", "marshal", "ctypes", "importlib")}
    for n in nodes:
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            scan_import(review, name, n, id(n) in guarded)
        elif isinstance(n, ast.Call):
            runs_text = scan_call(review, name, n) or runs_text
        elif isinstance(n, ast.Name) and n.id in ("exec", "eval") and isinstance(n.ctx, ast.Load) and not runs_text:
            review.emit("dynamic-code", name, f"{n.id} under another name", n.lineno)
            runs_text = True
        elif isinstance(n, ast.Constant) and isinstance(n.value, int):
            if n.value in BAD_BYTE_COUNTS or abs(n.value - FINEWEB_VAL_BYTES) < 10_000 and offline(name):
                why = BAD_BYTE_COUNTS.get(n.value, "count the documents instead")
                review.emit("byte-count", name, f"{n.value:,} bytes are written into the code: {why}", n.lineno)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and MACHINE_PATH.match(n.value):
            review.emit("machine-path", name, f"a path of one machine: {n.value[:60]}", n.lineno)
        elif isinstance(n, (ast.Assign, ast.AnnAssign)) and n.value:
            to = " ".join(identifiers(*(n.targets if isinstance(n, ast.Assign) else [n.target])))
            loads = isinstance(n.value, ast.Call) and re.search(TRAIN_LOADER, dotted(n.value.func))
            if (loads or re.search(TRAIN, to)) and not re.search("val|test", to) and (read := reads_val(n.value)):
                rule = "val-calibration" if "calib" in to else "val-in-training"
                review.emit(rule, name, f"{to} reads {read[:60]}", n.lineno)
            if re.search(r"bytes_per_token$", to) and isinstance(n.value, ast.Constant):
                review.emit("byte-count", name, "bytes per token as a constant: count the documents instead", n.lineno)
        elif isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
            scan_function(review, name, n)
    scan_order(review, name, [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))])
    scan_names(review, name, identifiers(tree))
    scan_literals(review, name, nodes, runs_text, depth)


def scan_names(review, name, names):
    for pattern, rule, message in IDENTIFIERS:
        if found := matching(names, pattern):
            review.emit(rule, name, f"{found}: {message}", names[found])


def reads_val(node):
    """The validation text that an expression takes, on any branch of a condition, or ''."""
    if isinstance(node, (ast.Name, ast.Attribute, ast.Constant)):
        word = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None) or str(getattr(node, "value", ""))
        return word if re.search(VAL_DATA, word) else ""
    inside = [n for n in ast.iter_child_nodes(node) if n is not getattr(node, "test", None)]
    if isinstance(node, ast.Call) and re.search("train", " ".join(constants(str, node))) and not any(
            isinstance(n, ast.IfExp) for n in ast.walk(node)):
        return ""   # such as glob("fineweb_train_*.bin", but="fineweb_val_*.bin")
    chosen = isinstance(node, (ast.IfExp, ast.BoolOp, ast.Call, ast.keyword, ast.List, ast.Tuple, ast.JoinedStr,
                               ast.BinOp))
    return next(filter(None, map(reads_val, inside)), "") if chosen else ""


def scan_order(review, name, functions):
    """Score before learn, by the order of lines: in a function that does both, and in whatever calls one that only
    learns. A count of steps is no score, nor is what stands in a loop over epochs, which learns before it is back."""
    def marks(f):
        epochs = {id(n) for loop in ast.walk(f) if isinstance(loop, ast.For) and "epoch" in " ".join(
            identifiers(loop.target)) for n in ast.walk(loop)}
        earlier = {id(n) for t in ast.walk(f) if isinstance(t, (ast.If, ast.For)) and matching(identifiers(
            t.test if isinstance(t, ast.If) else t.iter), r"prev|scored|pending") for n in ast.walk(t)}
        learn, score = [], []
        for n in ast.walk(f):
            if isinstance(n, ast.Call):
                last = n.func.attr if isinstance(n.func, ast.Attribute) else dotted(n.func)
                if (last == "backward" or last in learners and last != f.name) and id(n) not in earlier:
                    learn.append(n.lineno)
                elif re.match(r"(eval|score)_", last) and last not in learners:
                    score.append(n.lineno)
            elif id(n) not in epochs and (
                    isinstance(n, ast.AugAssign) and matching(identifiers(n.target), "loss|nll|bits|bpb|score")
                    or isinstance(n, ast.With) and matching(identifiers(*(i.context_expr for i in n.items)),
                                                            "no_grad|inference_mode")):
                score.append(n.lineno)
        return learn, score

    learners = set()
    on_val = [f for f in functions if re.search(r"ttt|adapt|test_time|score|eval", f.name.lower())
              and matching(identifiers(f), VAL)]
    learners = {f.name for f in on_val if (m := marks(f))[0] and not m[1]}
    called = {dotted(n.func) for f in functions for n in ast.walk(f) if isinstance(n, ast.Call)}
    for f in functions:
        learn, score = marks(f)
        calls = [n for n in ast.walk(f) if isinstance(n, ast.Call) and dotted(n.func) in learners]
        if f in on_val and f.name not in learners & called:
            first = min(learn, default=0)
        elif calls and f.name not in learners:
            first = min(n.lineno for n in calls)
        else:
            continue
        if first and first < min(score, default=first + 1):
            review.emit("score-first", name, f"{f.name} learns from validation text before it scores any", first)


def scan_literals(review, name, nodes, runs_text, depth):
    """Source inside long literals is read by the same rules; what cannot be decoded beside an exec is a finding."""
    literals = (n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, (str, bytes))
                and len(n.value) > (40 if runs_text else 2000))
    for i, n in enumerate(literals, 1):
        room = SOURCE_LIMIT - review.scanned
        inner = unwrap(n.value, room) if room > 0 and depth < LAYER_LIMIT else None
        size, inside = f"{len(n.value):,} characters", f"{name}!{i}"
        if inner is not None:
            review.inner[inside] = inner
            review.emit("encoded-source", name, f"{size} hold {len(inner):,} of source: {inside}", n.lineno)
            if len(inner) >= room:
                review.emit("review-limit", inside, f"decodes to over {room:,} characters; the rest was not read")
            scan(review, inside, inner, depth + 1)
        elif runs_text and len(n.value) > 200 and not WORDS.search(as_bytes(n.value)):
            review.emit("payload", name, f"{size} beside an exec could not be decoded", n.lineno)


def offline(name):
    """Whether a file belongs to the run itself, not to the preparation of data."""
    return not re.search(r"prepare|download|fetch|upload", name)


def scan_import(review, name, node, guarded):
    modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] * (not node.level)
    here = {part for n in review.names for part in n.removesuffix(".py").split("/")}
    usual = () if review.strict else PUBLIC_PACKAGES
    known = {*sys.stdlib_module_names, *BASE_PACKAGES, *here, *review.requirements, *usual}
    for module in filter(None, modules):
        top = module.split(".")[0]
        if offline(name) and {top, module, *(f"{module}.{a.name}" for a in node.names)} & NETWORK and top not in here:
            review.emit("network", name, f"imports {module}; scoring is offline", node.lineno)
        elif top not in known and not guarded:
            review.emit("import", name, f"{top} is not standard, not required, not in this folder", node.lineno)


def scan_call(review, name, node):
    """The rules on one call. True if it runs text as code."""
    called = review.aliases.get(dotted(node.func), dotted(node.func))
    given = identifiers(*node.args, *node.keywords)
    if called in ("min", "torch.minimum", "np.minimum") and matching(given, r"(^|_)(loss|losses|nll|bpb)(_|$)"):
        review.emit("best-of", name, "takes the smaller of two losses", node.lineno)
    if called.startswith(("subprocess.", "os.system", "os.popen")) and offline(name):
        if m := NETWORK_COMMAND.search(" ".join(constants(str, node))):
            review.emit("network", name, f"runs {m[1]}", node.lineno)
    if re.search(r"hessian|calib|gptq", called.lower()):
        if val := matching(given, VAL):
            review.emit("val-calibration", name, f"{called}() is given {val}", node.lineno)
        elif (train := matching(given, TRAIN)) and not (review.strict and name == "train_gpt.py"):
            review.emit("train-data-late", name, f"{called}() is given {train}: inside the 600 s?", node.lineno)
    unsafe = called == "torch.load" and any(k.arg == "weights_only" and getattr(k.value, "value", 1) is False
                                            for k in node.keywords)
    if (unsafe or LOADS_CODE.fullmatch(called)) and node.lineno < review.judge:
        review.emit("loaded-code", name, f"{called}(): brings in code that is not written here", node.lineno)
    if isinstance(node.func, ast.Subscript) and dotted(node.func.value) in ("__builtins__", "builtins.__dict__"):
        called = " ".join(constants(str, node.func.slice))
    runs = called in ("exec", "eval", "__import__", "builtins.exec", "builtins.eval", "runpy.run_path") \
        or (called == "compile" and len(node.args) >= 3)
    if runs:
        review.emit("dynamic-code", name, f"{called}(): what runs is not what is written here", node.lineno)
    return runs


def scan_function(review, name, f):
    """The rules on the inputs of scoring, by what a function and its variables are called."""
    names, title, below = identifiers(f), f.name.lower(), list(ast.walk(f))
    bought = {n.id for n in below if isinstance(n, ast.Name) and re.search(VAL_DATA, n.id)}   # and what is made of it
    for n in sorted((n for n in below if isinstance(n, (ast.Assign, ast.Call))), key=lambda n: n.lineno):
        if isinstance(n, ast.Assign) and root_name(n.value) in bought:
            bought |= set(identifiers(*n.targets))
        elif (isinstance(n, ast.Call) and dotted(n.func).endswith(".compress") and n.args
              and root_name(n.args[0]) in bought):
            review.emit("paid-prefix", name, f"{f.name} compresses validation text", n.lineno)
    if re.search(r"eval|ttt|gptq|quant|calib|serialize|pack", title) and (found := matching(names, TRAIN)):
        if not (review.strict and name == "train_gpt.py"):   # here calibration is part of training, on its clock
            review.emit("train-data-late", name, f"{f.name} uses {found}: inside the 600 s?", names[found])
    if re.search(r"n_?gram|cache|hash|ppm|hint|expert|mix", title):
        for n in (n for n in below if isinstance(n, ast.BinOp) and isinstance(n.op, (ast.BitXor, ast.Mod))):
            if found := matching(identifiers(n), TARGET):
                review.emit("target-in-key", name, f"{f.name} hashes {found}, the token to be predicted", n.lineno)
    strings = constants(str, f)
    if "\u2581" in strings and matching(names, r"lut|bytes|table"):
        if not matching(names, r"is_byte") and not any("<0x" in s for s in strings):
            review.emit("byte-lut", name, f"{f.name} has no case for byte tokens, which are one byte each", f.lineno)
        sums = [n for n in below if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add)]
        plus_one = [n.lineno for n in sums if "encode" in identifiers(n) and 1 in constants(int, n)]
        if plus_one and matching(names, r"leading_space|has_space"):
            review.emit("byte-lut", name, f"{f.name} counts leading spaces here and again later (+17 %)", plus_one[0])


def content(text):
    """The source inside a wrapped source, or the text as it is."""
    for _ in range(LAYER_LIMIT):
        packed = max(re.findall(r"""["']([^"'\\]{200,})["']""", text), key=len, default="")
        if len(packed) < len(text) / 2 or (inner := unwrap(packed, SOURCE_LIMIT)) is None:
            break
        text = inner
    return text


def fingerprint(text, k=12):
    """Hashes of every k consecutive tokens; names, numbers and strings are made equal, so renaming hides no copy."""
    kinds = []
    try:
        for t in tokenize.generate_tokens(io.StringIO(text).readline):
            if t.type == tokenize.NAME:
                kinds.append(t.string if keyword.iskeyword(t.string) else "n")
            elif t.type in (tokenize.OP, tokenize.NUMBER, tokenize.STRING):
                kinds.append({tokenize.NUMBER: "0", tokenize.STRING: "s"}.get(t.type, t.string))
    except (tokenize.TokenError, SyntaxError):
        pass  # the tokens before the damage still identify the file
    return {zlib.crc32(" ".join(kinds[i:i + k]).encode()) for i in range(len(kinds) - k + 1)}


def definitions(tree):
    """({name: code} of functions and methods, without comments or docstrings; {name: constant} of module, classes)."""
    functions, fields = {}, {}
    for owner, body in [("", tree.body)] + [(f"{c.name}.", c.body) for c in tree.body if isinstance(c, ast.ClassDef)]:
        for n in body:
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body_only = n.body[ast.get_docstring(n, clean=False) is not None:]
                functions[owner + n.name] = "".join(map(ast.dump, [n.args, *body_only]))
            elif isinstance(n, (ast.Assign, ast.AnnAssign)) and isinstance(n.value, (ast.Constant, ast.UnaryOp)):
                target = n.targets[0] if isinstance(n, ast.Assign) else n.target
                fields[owner + dotted(target)] = ast.unparse(n.value)[:60]
    return functions, fields


def changes(tree, parent):
    """What really changed since the parent, in one line: definitions changed, added, removed; constants old -> new."""
    (new, y), (old, x) = definitions(tree), definitions(parent)
    parts = [f"{word} {', '.join(names[:8])}{' ...' * (len(names) > 8)}" for word, names in (
        ("changed", sorted(k for k in old.keys() & new.keys() if old[k] != new[k])),
        ("added", sorted(new.keys() - old.keys())), ("removed", sorted(old.keys() - new.keys()))) if names]
    parts += [f"{k} {x[k]} -> {y[k]}" for k in sorted(x.keys() & y.keys()) if x[k] != y[k]][:12]
    return "; ".join(parts) or "nothing but comments and layout"
