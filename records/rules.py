"""What a record is checked for: every rule with its level and its source, the limits, and the patterns that find signs.

FAIL can be proved from the files; FLAG is for a person to decide; INFO is context. The source is the public challenge's
README, or an issue or pull request of openai/parameter-golf (#N) with the grade of the ruling (maintainer,
author-withdrawn, community, unruled), or the file of this project that says it. What was never ruled on never FAILs.
"""
import re

TRACKS = ("track_10min_16mb", "track_non_record_16mb")
CLOCK_SECONDS, CLOCK_SLACK = 600, 1.0                # training and scoring have 600 s each; one step may overrun
RULE_NATS, RULE_P, PRACTISED_P = 0.005, 0.01, 0.25   # public README; as accepted in May 2026 (#1900, #1902)
BEST_PUBLIC_BPB = 1.05651                            # #2135, folded by the audit #2146
FINEWEB_VAL_DOCS, FINEWEB_VAL_BYTES = 50_000, 151_078_222     # data/README.md; #1916
BYTES_PER_TOKEN = {"sp1024": 2.436, "sp4096": 3.319, "sp8192": 3.7266, "caseops": 3.1572}   # of that validation text
BAD_TOKEN_COUNTS = {9_662_464: "10,000 documents only", 36_562_944: "a parallel preparation split (#2109)"}
BAD_BYTE_COUNTS = {164_594_398: "wrong, #2138", 176_332_748: "wrong, #1804"}
FILE_LIMIT, ENTRY_LIMIT, FINDING_LIMIT = 5 << 20, 400, 300    # bytes of one file, files, findings
SOURCE_LIMIT, LAYER_LIMIT = 2 << 20, 4                        # sources: characters in all; depth of wrapping
CHILD_CPU_SECONDS, CHILD_BYTES = 60, 3 << 30                  # of the process that reads one folder

LEVELS = ("INFO", "FLAG", "FAIL")
RULES = {  # rule: (level for this repository's records, level for folders from elsewhere, where the rule comes from)
    # the package
    "folder-name": ("FAIL", "FLAG", "public README, submission process"),
    "folder-date": ("FLAG", "INFO", "public README, submission process"),
    "missing-file": ("FAIL", "FLAG", "public README, required files 1-4"),
    "log-count": ("FAIL", "FLAG", "public README, p < 0.01 needs logs"),
    "json": ("FAIL", "FAIL", "public README, required file 2"),
    "json-strict": ("FAIL", "FLAG", "RFC 8259"),
    "json-field": ("FAIL", "FLAG", "public README, required file 2"),
    "json-value": ("FAIL", "FAIL", "a score is a positive number"),
    "forbidden-file": ("FAIL", "FLAG", "#1028 #1120, maintainer"),
    "secret": ("FAIL", "FLAG", "a published key is lost: revoke it"),
    "link": ("FAIL", "FAIL", "only regular files can be reviewed"),
    "file-name": ("FAIL", "FLAG", "19 public folders have spaces; scripts break"),
    "file-size": ("FAIL", "FLAG", "#1028, maintainer"),
    "python-syntax": ("FAIL", "FLAG", "public README, required file 4"),
    "import": ("FAIL", "FLAG", "public README, required file 4"),
    "machine-path": ("FLAG", "INFO", "public README, required file 4"),
    "track": ("FAIL", "FLAG", "public README, 10 minutes on 8xH100"),
    "change-set": ("FAIL", "FAIL", "public README, a pull request only adds a new folder"),
    "review-limit": ("FAIL", "FLAG", "a verdict in bounded time"),
    "readme-words": ("FLAG", "FLAG", "public README, required file 1"),
    # the budgets
    "artifact-cap": ("FAIL", "FAIL", "public README FAQ, maintainer"),
    "artifact-bytes": ("FAIL", "FLAG", "public README FAQ"),
    "code-bytes": ("FAIL", "FLAG", "public README FAQ; #1145 #1437, community"),
    "train-clock": ("FAIL", "FLAG", "public README, 10 minutes; maintainer"),
    "eval-clock": ("FAIL", "FLAG", "public README FAQ, 10 minutes; maintainer"),
    "clock-override": ("FAIL", "FLAG", "#1908 #1956, community"),
    "network": ("FAIL", "FLAG", "public README FAQ, maintainer"),
    "train-data-late": ("FLAG", "FLAG", "#609, maintainer; README.md, Rules"),
    # the score
    "val-in-training": ("FAIL", "FAIL", "#44, maintainer"),
    "paid-prefix": ("FAIL", "FLAG", "#44 #262 #402, maintainer: validation text in the artifact"),
    "score-first": ("FLAG", "FLAG", "#402, maintainer; #1017 C3"),
    "pre-quant-ttt": ("FLAG", "FLAG", "#1376, community"),
    "val-calibration": ("FLAG", "FLAG", "#1919, community"),
    "target-in-key": ("FLAG", "FLAG", "#779, maintainer; #1017 C2"),
    "target-gate": ("FLAG", "FLAG", "#2018, community"),
    "mixture": ("INFO", "INFO", "#677, maintainer: legal if counted, causal and normalised"),
    "best-of": ("FLAG", "FLAG", "#573; #1017 C4, community"),
    "byte-lut": ("FLAG", "FLAG", "#1719 #1143 #897, author-withdrawn"),
    "byte-count": ("FLAG", "FLAG", "#2138; #1017, community"),
    "bpb-arithmetic": ("FAIL", "FLAG", "eval_bpb.py"),
    "val-count": ("FAIL", "FLAG", "#837; data/README.md"),
    "data-overlap": ("FLAG", "FLAG", "#2127, community"),
    "limited-score": ("FAIL", "FLAG", "#1835, community"),
    "audit": ("FAIL", "INFO", "eval_bpb.py"),
    "rescore": ("FAIL", "FAIL", "eval_bpb.py"),
    "dynamic-code": ("FAIL", "FLAG", "records/LOOP.md: sources are plain; #1603, community"),
    "loaded-code": ("FAIL", "FLAG", "records/LOOP.md: sources are plain; weights are no pickle"),
    "encoded-source": ("FAIL", "INFO", "records/LOOP.md: sources are plain"),
    "payload": ("FAIL", "FLAG", "#1804, community: an unreadable scorer cannot be checked"),
    "judge-changed": ("FLAG", "INFO", "eval_bpb.py"),
    "unruled": ("INFO", "INFO", "unruled"),
    "score-range": ("FLAG", "FLAG", "280 public claims below 1.0, nearly all errors; community"),
    # statistics and provenance
    "seeds": ("FAIL", "FLAG", "public README, inter-run variance; #2124 #2139"),
    "seed-mean": ("FAIL", "FLAG", "#2076, community"),
    "seed-spread": ("FLAG", "FLAG", "merged records have a std of 0.0002-0.0017; community"),
    "log-score": ("FAIL", "FLAG", "#86, maintainer: claim 1.1502, rerun 1.1864"),
    "readme-score": ("FAIL", "FLAG", "#2076, community"),
    "source-hash": ("FAIL", "INFO", "records/LOOP.md: the sources as run"),
    "environment": ("FLAG", "FLAG", "#1177, community"),
    "significance": ("FLAG", "INFO", "public README, 0.005 nats at p < 0.01; maintainer"),
    "parent": ("FAIL", "INFO", "records/LOOP.md: lineage"),
    "tainted-parent": ("FLAG", "FLAG", "records/rulings.json"),
    "near-copy": ("FLAG", "FLAG", "#1624, community"),
    "nearest": ("INFO", "INFO", "records/LOOP.md: lineage"),
}

BASE_PACKAGES = {"torch", "numpy", "tiktoken", "zstandard", "triton"}   # triton comes with torch where it is used
PUBLIC_PACKAGES = ("sentencepiece", "brotli", "tqdm", "kernels", "flash_attn", "flash_attn_interface", "mlx", "einops")
NETWORK = {"requests", "urllib.request", "http.client", "httpx", "aiohttp", "ftplib", "socket", "huggingface_hub",
           "datasets", "wandb", "boto3"}
# Calls that run or load what is not written in the source, by their full name.
LOADS_CODE = re.compile(r"(cloud)?pickle\.loads?|joblib\.load|marshal\.loads?|ctypes\.(CDLL|cdll\.LoadLibrary|PyDLL)"
                        r"|os\.(exec\w+|spawn\w+|posix_spawnp?)"
                        r"|importlib\.(import_module|util\.spec_from_file_location)")
NETWORK_COMMAND = re.compile(r"\b(curl|wget|git clone|pip3? install|aria2c|scp|rsync)\b")
FORBIDDEN = (   # (pattern on the name inside the folder, what it is)
    (re.compile(r"\.(ptz?|pth|bin|np[yz]|so|pyd|dll|exe|ckpt|safetensors|onnx|pkl|pickle|parquet"
                r"|zip|gz|xz|zst|tar|whl|pyz)$", re.I), "weights or a binary"),
    (re.compile(r"(^|/)(CLAUDE|AGENTS|GEMINI|SKILL|program)\.md$|(^|/)\.(claude|cursor|codex)(/|$)"),
     "a coding agent's file"),
    (re.compile(r"(^|/)(__pycache__|\.git|\.ipynb_checkpoints|node_modules|\.venv|\.DS_Store)(/|$)|\.pyc$"), "a cache"),
    (re.compile(r"\.ipynb$"), "a notebook"),
    (re.compile(r"(^|/)(\.env|\.netrc|id_rsa|id_ed25519|credentials)$|\.pem$"), "a file that holds secrets"))
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b"
                    r"|BEGIN [A-Z ]{0,20}PRIVATE KEY-")
MACHINE_PATH = re.compile(r"(/home/|/Users/|/root/|/workspace/|/mnt/|[A-Z]:\\)\w")
IDENTIFIERS = (   # (pattern on a lower-case identifier, rule, message)
    (r"paid_?prefix|prefix_blob|val_prefix", "paid-prefix", "validation text bought with bytes of the artifact"),
    (r"pre_?quant_?(ttt|adapt)", "pre-quant-ttt", "learns from validation text that is not scored yet"),
    (r"within_(gate|word)|word_gate|agree2plus", "target-gate", "a gate that knows the token to be predicted"),
    (r"(^|_)ppm(_|$)|n_?gram_?(cache|mix|table|hash|tilt)|val_n_?gram", "mixture",
     "probe that it sums to 1 over the vocabulary"),
    (r"slot_(delta|lr|steps?|epochs?)$|use_slot", "unruled",
     "SLOT: most fail the flip test (#1240); a causal one was never ruled on (#1336)"),
    (r"dirichlet", "unruled", "Dirichlet-smoothed caches were never ruled on (#948)"),
    (r"ttt_epochs", "unruled", "several epochs over text after it was scored were never ruled on (#1698)"),
    (r"^casefold$", "unruled", "lossy case folding was never ruled on (#1604)"))
TEXT = (          # (pattern on sources, scripts and logs, rule, message)
    (re.compile(r"(?im)\btrain_on_val\w*['\"]?\s*[:=]\s*['\"]?(1|true)\b|\btrain\w*[:=][^\s;,]*(fineweb_val|val_?only)"
                r"|^(?!.*\b(not|no|never|without|test.time|ttt|scored|evaluated)\b)"
                r"[\w :\[\]-]{0,30}\btrain(ing|s|ed)? on (the )?val(idation)?\b"),
     "val-in-training", "says that it trains on validation text"),
    (re.compile(r"(?i)paid[_ ]prefix(:| blob)"), "paid-prefix", "validation text bought with bytes of the artifact"),
    (re.compile(r"train_shards:1499|datasets/datasets"), "data-overlap",
     "a sign of validation documents in the training split"),
    (re.compile(r"val[-_]docs['\"]?,.{0,80}default\s*=\s*10_?000\b"), "data-overlap",
     "prepares 10,000 validation documents: 40,000 of the 50,000 stay in training"),
    (re.compile(r"FORCE_STOP_[A-Z]+"), "clock-override", "a switch that replaces the clock"))
WALLCLOCK = re.compile(r"MAX_WALLCLOCK_SECONDS['\"]?\s*[=:,]\s*['\"]?(\d[\d_]*(?:\.\d+)?)")
# What identifiers mean: validation text, a source of training text, the token that is to be predicted.
VAL = r"(^|_)val(id|idation)?(_|$)"
TRAIN = r"(^|_)train_(files?|loader|shards?|data|tokens|pattern)"
VAL_DATA = r"(^|_)val(id|idation)?_(files?|pattern|tokens|data|shards?|path)$|(^|[/_])val_\S*\.bin|fineweb_val"
TRAIN_LOADER = r"(^|\.)(Distributed|Train)\w*Loader$"
TARGET = r"^(y|tgt|targets?|labels?|(tgt|target)_ids?|y_\w+)$"
