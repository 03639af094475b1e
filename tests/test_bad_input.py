"""Bad input to every command: exit code 2 and one line that names the key or the file."""

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from experiments.shards import write_shard
from models.command_line import run_command

ROOT = Path(__file__).parents[1]
MODULES = {
    "train": "experiments.train",
    "verify": "experiments.verify",
    "data": "experiments.data_command",
    "ladder": "models.ladder",
    "show": "lens_jax.show",
}
COMMANDS = {name: f"python -m {module}" for name, module in MODULES.items()}
COMMANDS["data"] = "python -m experiments.data"
VOCAB = 100

# Words of a command ({tmp} is the folder that `bad_files` fills), and what the line must hold.
# Paths with "data/" are shards of VOCAB ids.
TRAIN = (
    ("sed=1", "unknown key sed=1; did you mean seed?"),
    ("optim.matrxi_lr=1", "did you mean optim.matrix_lr?"),
    ("lr=0.1", "unknown key lr=0.1"),
    ("seed", "'seed' is not key=value"),
    ("--seed=1", "unknown key --seed=1; did you mean seed?"),
    ("seed=1 seed=2", "seed is given twice"),
    ("data=a data.source=b", "data.source is given twice"),
    ("...n_layer=3", "unknown key ...n_layer=3"),
    ("optim=optim.config:OptimConfig", "unknown key optim=optim.config:OptimConfig"),
    ("arch=os:system", "unknown key arch=os:system"),
    ("seed=one", "seed=one: give a whole number"),
    ("seed=-1", "seed=-1: give 0 to"),
    ("seed=1.5", "seed=1.5: give a whole number"),
    ("batch=0", "batch=0: give at least 1"),
    ("tier=d13", "tier=d13: give one of d12, d24"),
    ("ladder=clean rung=betterwin", "rung=betterwin is no rung of ladder=clean"),
    ("ladder=tidy", "ladder=tidy: give one of published, clean"),
    ("size.n_layer=11", "size.n_layer=11 with arch.unet: encoder and decoder need the same depth"),
    ("rung=untied arch.long_short=true", "arch.long_short=True needs a window"),
    ("rung=flexwin arch.long_short=true", "half of half a block is no window"),
    ("rung=flexwin size.block=1", "size.block=1 with arch.window_ramp=half_blocks: give an even"),
    ("rung=baseline arch.row=long", "arch.row=long with arch.position=learned"),
    ("arch.window_ramp=half_blocks", "arch.window_ramp=half_blocks with arch.window=block"),
    ("arch.softcap=0", "arch.softcap=0.0: give a positive finite number"),
    ("arch.window_blocks=0", "arch.window_blocks=0: give at least 1 block"),
    ("size.n_head=24", "arch.position=half_rope needs a multiple of 4 from 8 on"),
    ("rung=muon arch.head_dtype=float8", "arch.head_dtype=float8 with arch.head=tied"),
    ("attention=flash", "attention=flash: give one of auto"),
    ("rung=grok", "rung=grok is no rung"),
    ("profile=laptop", "profile is given twice"),
    ("compute_dtype=fp8", "compute_dtype=fp8: give one of auto"),
    ("arch.qk_norm=maybe", "arch.qk_norm=maybe: give true or false"),
    ("arch.norm_eps=0", "arch.norm_eps=0.0: give a number between 0 and 1"),
    ("rung=muon arch.zero_head=true", "arch.zero_head=True with arch.head=tied"),
    ("size.n_head=7", "size.n_head=7 does not divide"),
    ("size.n_embd=90", "odd heads of 15"),
    ("size.short_row=100", "size.short_row=100 is not a multiple of size.block=16"),
    ("size.long_row=192", "size.long_row=192 is not a multiple of size.short_row=128"),
    ("size.n_layer=0", "size.n_layer=0: give at least 1"),
    ("accumulate=5", "accumulate=5 does not divide"),
    ("max_tokens=10", "max_tokens=10 is less than one step"),
    ("max_tokens=1e300", "max_tokens=1e+300: give at most"),
    ("max_tokens=none", "anneal=budget needs a budget; set max_tokens"),
    ("optim.matrix_lr=nan", "optim.matrix_lr=nan: give a positive finite"),
    ("optim.embed_betas=0.9", "optim.embed_betas=0.9: give 2 values"),
    ("optim.embed_betas=0.9,1", "optim.embed_betas=(0.9, 1.0): give two numbers in [0, 1)"),
    ("optim.warmdown=2", "optim.warmdown=2.0: give a share"),
    ("optim.clip=inf", "optim.clip=inf: give a positive finite norm, or none"),
    ("target_loss=-1", "target_loss=-1.0: give a positive loss"),
    ("target_loss=inf", "target_loss=inf: give a positive loss"),
    ("published_target=nan", "published_target=nan: give a positive loss"),
    ("time_scale=0", "time_scale=0.0: give a positive"),
    ("time_scale=1e6 anneal=published", "time_scale=1e+06 stretches 10,000 reference steps"),
    ("time_scale=1e300", "time_scale=1e+300 stretches"),
    ("max_tokens=1e14", "max_tokens=100000000000000 are more than 2,147,483,647 steps"),
    ("rung=sparsev anneal=published max_tokens=1e8", "after 1228800 tokens; set anneal=budget"),
    ("probes=activations", "probes.names=activations: choose among"),
    ("probes.matrices=attn.c_attn", "probes.matrices=attn.c_attn: choose among"),
    ("probes.layers=12", "probes.layers=12: the model has layers 0 to 11"),
    ("probes.layers=7 probes.matrices=attn.c_q", "probes.layers=7 has no attention in this rung"),
    ("probes.gradient_windows=1", "probes.gradient_windows=1: give 2 to"),
    ("probes.chunk=5", "probes.chunk=5 does not divide"),
    ("probes.groups=0", "probes.groups=0: give at least 1"),
    ("probes.sweeps=0", "probes.sweeps=0: give at least 1, or none"),
    ("probes.sweeps=2 probe_data=batch", "probes.sweeps=2: a training batch is visited once"),
    ("probes.sample=window probes.window=60", "probes.window=60 does not divide the row of 512"),
    ("rung=baseline probes.window=256", "probes.window=256 is longer than the position table"),
    ("data.val_tokens=100", "data.val_tokens=100 is not a multiple of the row"),
    ("data.probe_offset=1", "data.probe_offset=1 lies inside the validation tokens"),
    ("data={tmp}/gpt2/*.bin size.vocab_size=50000", "size.vocab_size=50000: documents of this"),
    ("data={tmp}/gpt2/*.bin size.eot_token=60000", "size.eot_token=60000: the data have a"),
    ("data={tmp}/none/*.bin", "data={tmp}/none/*.bin matches no file"),
    ("data={tmp}/data", "data={tmp}/data is a folder"),
    ("data.folder={tmp}/data", "data.folder={tmp}/data has no fineweb_train_*.bin"),
    ("data={tmp}/data/*val*.bin", "matches only validation shards"),
    ("data={tmp}/broken/truncated.bin", "{tmp}/broken/truncated.bin: is truncated"),
    ("data={tmp}/broken/magic.bin", "{tmp}/broken/magic.bin: begins with 7 instead of"),
    ("data={tmp}/broken/empty.bin", "{tmp}/broken/empty.bin: has 0 bytes"),
    ("data={tmp}/outside/*.bin", "outside the vocabulary of 100"),
    ("data={tmp}/meta/*.bin", "{tmp}/meta/meta.json: is no readable JSON"),
    ("data={tmp}/data/*.bin", "hold 3,000 tokens but 82,048 are held out"),
    ("out={tmp}/data/x_val.bin/run data={tmp}/data/*.bin", "cannot make the run folder"),
    ("out={tmp}/data data={tmp}/data/*.bin", "{tmp}/data is not the folder of a run"),
    ("out={tmp}/new resume=must data={tmp}/data/*.bin", "resume=must: {tmp}/new has no checkpoint"),
    ("out={tmp}/other data={tmp}/data/*.bin", "{tmp}/other belongs to another configuration"),
    (f"out={'x' * 300}", f"out={'x' * 40}...: the name is too long"),
    (f"data={'x' * 300}", f"data.source={'x' * 40}...: the name is too long"),
    ("data=~nobody-at-all/*.bin", "data.source=~nobody-at-all/*.bin: there is no such home"),
    ("resume=perhaps", "resume=perhaps: give one of"),
)
OTHERS = (
    ("verify", "", "no fixture given"),
    ("verify", "{tmp}/none.npz", "{tmp}/none.npz: no such file"),
    ("verify", "{tmp}", "{tmp}: not a fixture"),
    ("verify", "{tmp}/broken/magic.bin", "{tmp}/broken/magic.bin: not a fixture"),
    ("verify", "{tmp}/broken/empty.bin", "{tmp}/broken/empty.bin: not a fixture"),
    ("verify", "{tmp}/array.npy", "{tmp}/array.npy: not a fixture"),
    ("verify", "{tmp}/plain.npz", "{tmp}/plain.npz: not a fixture"),
    ("verify", "{tmp}/cut.npz", "{tmp}/cut.npz: not a fixture"),
    ("verify", "{tmp}/pickled.npz", "{tmp}/pickled.npz: not a fixture"),
    ("verify", "{tmp}/hollow.npz", "{tmp}/hollow.npz: not a fixture (it has no n_layer)"),
    ("data", "fetch", "unknown command fetch"),
    ("data", "corpus vocb=300", "unknown key vocb=300"),
    ("data", "corpus vocab=many", "vocab=many: give a whole number"),
    ("data", "fineweb10B shards=0", "shards=0"),
    ("data", "encode", "encode: no file given"),
    ("data", "encode a.txt tokenizer=gpt3", "tokenizer=gpt3: give one of"),
    ("data", "verify {tmp}/broken/truncated.bin", "{tmp}/broken/truncated.bin: is truncated"),
    ("data", "verify {tmp}/none/*.bin", "{tmp}/none/*.bin: matches no file"),
    ("ladder", "rung=grok", "rung=grok is no rung of the ladder"),
    ("ladder", "ladder=clean rung=betterwin", "is no rung of ladder=clean"),
    ("ladder", "tier=d12", "tier=d12 needs a rung"),
    ("ladder", "rung=muon tier=d1", "tier=d1: give one of"),
    ("ladder", "rnug=muon", "unknown key rnug=muon; did you mean rung?"),
    ("ladder", "muon", "'muon' is not key=value"),
    ("show", "{tmp}/none", "{tmp}/none: no such run folder"),
    ("show", "{tmp}/data", "{tmp}/data: no run folder"),
    ("show", "{tmp}/damaged", "{tmp}/damaged/metrics.jsonl: line 1"),
    ("show", "{tmp}/other out=page.jpg", "out=page.jpg: end the name in"),
    ("show", "{tmp}/other in=1", "unknown argument 'in=1'"),
    ("show", "{tmp}/a {tmp}/b", "2 run folders given"),
)
CASES = [("train", f"profile=laptop {words}", said) for words, said in TRAIN] + list(OTHERS)
AS_PROCESS = (
    ("train", "sed=1", "did you mean seed?"),
    ("train", "size.n_head=7", "size.n_head=7 does not divide"),
    ("train", "data={tmp}/broken/truncated.bin", "is truncated"),
    ("verify", "{tmp}/plain.npz", "{tmp}/plain.npz: not a fixture"),
    ("data", "corpus vocab=many", "vocab=many"),
    ("ladder", "rung=grok", "rung=grok"),
    ("show", "{tmp}/none", "no such run folder"),
)


def fill(tmp: Path) -> None:
    """All the files that the cases name."""
    for name in ("data", "broken", "outside", "meta", "other/spectra", "damaged"):
        (tmp / name).mkdir(parents=True)
    vocabulary = json.dumps({"vocab_size": VOCAB, "eot_token": 0})
    for name in ("data", "broken", "outside"):
        (tmp / name / "meta.json").write_text(vocabulary)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 3000)
    for name in ("data/x_train", "data/x_val", "broken/magic", "broken/truncated", "meta/x_train"):
        write_shard(tmp / f"{name}.bin", tokens)
    write_shard(tmp / "outside/x_train.bin", tokens + 1)
    (tmp / "gpt2").mkdir()
    write_shard(tmp / "gpt2/x_train.bin", tokens)
    (tmp / "meta/meta.json").write_text("{")
    whole = (tmp / "broken/magic.bin").read_bytes()
    (tmp / "broken/truncated.bin").write_bytes(whole[:-100])
    (tmp / "broken/magic.bin").write_bytes(np.int32(7).tobytes() + whole[4:])
    (tmp / "broken/empty.bin").write_bytes(b"")
    np.save(tmp / "array.npy", tokens)
    np.savez(tmp / "plain.npz", tokens=tokens)
    (tmp / "cut.npz").write_bytes((tmp / "plain.npz").read_bytes()[:-40])
    np.savez(tmp / "pickled.npz", meta=np.array([{}], dtype=object))
    meta = np.frombuffer(b'{"rung": "muon"}', np.uint8)
    np.savez(tmp / "hollow.npz", meta=meta)
    (tmp / "other/config.json").write_text('{"seed": 5}')
    (tmp / "damaged/metrics.jsonl").write_text("no json\n")


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("bad")
    fill(tmp)
    return tmp


def split(words: str, tmp: Path) -> list[str]:
    return [word.replace("{tmp}", str(tmp)) for word in words.split()]


@pytest.mark.parametrize(
    ("command", "words", "said"), CASES, ids=[f"{c} {w}".strip()[:60] for c, w, _ in CASES]
)
def test_bad_input_ends_in_one_line(command, words, said, bad_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LENS_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")  # jax of this process has started long ago
    monkeypatch.setattr(sys, "argv", [command, *split(words, bad_files)])
    main = import_module(MODULES[command]).main
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert said.replace("{tmp}", str(bad_files)) in error


def run(command: str, *words: str, cwd: Path = ROOT) -> tuple[subprocess.CompletedProcess, float]:
    began = time.monotonic()
    argv = [sys.executable, *COMMANDS[command].split()[1:], *words]
    shown = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, timeout=120)
    seconds = time.monotonic() - began
    print(f"{command} {' '.join(words)}: {seconds:.2f} s")
    return shown, seconds


@pytest.mark.parametrize(("command", "words", "said"), AS_PROCESS)
def test_bad_input_as_a_process(command, words, said, bad_files):
    if command == "train":
        words = f"profile=laptop out={{tmp}}/run {words}"
    shown, _ = run(command, *split(words, bad_files))
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: ")
    assert shown.stderr.count("\n") == 1
    assert said.replace("{tmp}", str(bad_files)) in shown.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_as_a_process(command):
    shown, _ = run(command, "--help")
    assert shown.returncode == 0
    assert shown.stderr == ""
    assert f"-m {MODULES[command].removesuffix('_command')}" in shown.stdout
