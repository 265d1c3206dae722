"""What a record is checked for: every rule with its level, and why or where from; all limits.

FAIL can be proved from the files; FLAG is for a person to decide.
"""
import re

TRACKS = ("track_10min_16mb", "track_non_record_16mb")
CAP_BYTES = 16_000_000          # decimal, the whole artifact
CLOCK_SECONDS = 601             # s, of training and of scoring each: 600, one step may overrun
RULE_NATS = 0.005               # nats per token, by which a record beats the best
RULE_P = 0.01
DOCUMENTS_BYTES = 151_078_222   # of fineweb's 50,000 (#1916)

FOLDER_LIMIT = 4 << 20          # bytes of all files
ENTRY_LIMIT = 400               # files and folders
SHOWN_LIMIT = 60                # findings of one folder
CHILD_SECONDS = 20              # of CPU, of the process that reads one folder
CHILD_BYTES = 3 << 30           # of its memory

TABLE = """
machine-path    FLAG  another machine has no such path
readme-words    FLAG  LOOP.md, Submit
environment     FLAG  #1177: another machine, another score
significance    FLAG  README.md, Rules: 0.005 nats at p < 0.01

missing-file    FAIL  LOOP.md, Submit
folder-name     FAIL  LOOP.md, Submit
forbidden-file  FAIL  LOOP.md, Submit; #1028 #1120
file-name       FAIL  19 public folders have spaces: scripts break
file-size       FAIL  LOOP.md, Submit; #1028
link            FAIL  only regular files can be reviewed
secret          FAIL  a published key is lost: revoke it
plain-source    FAIL  LOOP.md, Submit: what runs is what is written
review-limit    FAIL  a verdict in bounded time
change-set      FAIL  LOOP.md, Submit; 359 public requests touch other files

log             FAIL  submit.py writes its end; #2139
log-score       FAIL  all from the logs; #86: claim 1.1502, rerun 1.1864; #2076
readme          FAIL  README and logs agree; #2076
seeds           FAIL  runs of one experiment, each of its own seed; #2124
artifact-cap    FAIL  README.md, Rules
track           FAIL  README.md, Rules: 8xH100, fineweb, 600 s each, three seeds; #1908 #837
proof           FAIL  eval_bpb.py: --trust and a failed replay prove nothing

source-hash     FAIL  the sources as run
judge           FAIL  eval_bpb.py: below its border nothing may change, nor in data/
parent          FAIL  LOOP.md, Submit
copy            FAIL  equal artifacts are one run; #1624
"""
RULES = dict(line.split()[:2] for line in TABLE.splitlines() if line)

IN_NAMES = {  # what no file's name has in it
    "file-name": re.compile(r"[^A-Za-z0-9._+/-]"),
    # Weights and binaries, a coding agent's files, caches, notebooks, files that hold secrets.
    "forbidden-file": re.compile(
        r"\.(ptz?|pth|bin|np[yz]|so|pyd|dll|exe|ckpt|safetensors|onnx|pkl|pickle|parquet|zip|gz|xz|zst"
        r"|tar|whl|pyz|pyc|ipynb|pem)$|(^|/)((CLAUDE|AGENTS|GEMINI|SKILL|program)\.md|__pycache__"
        r"|\.git|\.venv|\.claude|\.cursor|\.codex|\.DS_Store|\.env|\.netrc|id_rsa|id_ed25519"
        r"|credentials)$", re.I),
}
IN_TEXTS = {  # and no file
    "secret": re.compile(r"\b(hf_[A-Za-z0-9]{30}|sk-[A-Za-z0-9_-]{32}|gh[pousr]_[A-Za-z0-9]{30}"
                         r"|AKIA[0-9A-Z]{16})|BEGIN [A-Z ]{0,20}PRIVATE KEY-"),
    "machine-path": re.compile(
        r"(?<![\w.])(/home/|/Users/|/root/|/workspace/|/mnt/|[A-Z]:\\)\w"),
}
FOLDER_NAME = re.compile(r"\d{4}-\d\d-\d\d_[A-Za-z0-9._-]{1,80}")
SOURCE_NAME = re.compile(r"(data/)?(?!test_|__main__)\w{1,40}\.py")

ADDED = re.compile(r"A\t(records/track_(?:10min|non_record)_16mb/[^/]+)/")   # as git says it
COOKIE = re.compile(rb"([^\r\n]*[\r\n]+)?[^\r\n]*coding[:=](?![ \t]*utf-8)", re.I)

# Words by which a source runs or loads what is not written there, in the dump of its syntax tree:
# as a name, a part of a module's name, an attribute, an argument, a whole string. The builtins only
# as plain names, for model.eval(), torch.compile and re.compile are other things.
HIDING = re.compile(
    r"Name\(id='(?:eval|compile)'|[=\[ ]'(?:[^'\s]*\.)?(?:exec|__import__|importlib|_?pickle|cloudpickle"
    r"|dill|joblib|marshal|_?ctypes|cffi|(?:__)?builtins(?:__)?|runpy|zipimport|weights_only"
    r"|allow_pickle)['.]")
SAFE = re.compile(r"keyword\(arg='(?:weights_only', value=Constant\(value=True"
                  r"|allow_pickle', value=Constant\(value=False)\)\)")   # harmless uses of them
