"""First measurement on a GPU: what attention, head, scatter, eigenvalues and whole steps cost.

    python benchmarks/first_gpu.py out=benchmarks/results/h200.json
    python benchmarks/first_gpu.py out=steps.json sections=steps rungs=attnscale,fixedwin
    python benchmarks/first_gpu.py out=tiny.json size=tiny
    python benchmarks/first_gpu.py --help

Where the project is not installed, set PYTHONPATH to its folder. size=tiny is a rehearsal that runs
on any machine. The sections, in order of importance, with rough seconds on an H200, compilation
included, by which the budget is shared out:

  attention_check  40  flash and cuDNN attention and their gradients against dense attention
  float8           70  the head's loss and gradients, bfloat16 against float8, by chunk
  scatter          30  ways to sum the gradient of an embedding, tokens by Zipf's law
  scatter_ftz      20  the same under an XLA flag that lets float32 atomics flush to zero
  attention_time   80  one long row: windows, tiles, other implementations
  steps           170  training steps: tokens per second, MFU, memory, compilation
  gemm             20  bfloat16 products, square and of the shapes of d12
  eigen            40  eigenvalues of covariances, on the device and in float64 on the host
  probe            70  the step that measures on its batch against the plain step

A section named alone runs in this process. Of several each runs in a process of its own, so that
one that breaks the device, or runs out of its memory, leaves the others alone; they share a
compilation cache, which is empty at first unless JAX_COMPILATION_CACHE_DIR names another. The
document is saved after every entry; that of a section still running lies beside out=, under the
section's name too. No entry is begun once its section's share of budget_s= is used up, save a
section's first, and no section once all of budget_s= is; what is left out is named, to be measured
by another call. The exit code is 1 if anything failed.
"""

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import chz
from gpu_job import ABSENT, SIZES, Job, one_line, say

from models.atomic_files import write_json
from models.command_line import UsageError, check_report, flatten, read_command, run_command
from models.ladder import ALL_RUNGS

SECONDS = {
    "attention_check": 40,
    "float8": 70,
    "scatter": 30,
    "scatter_ftz": 20,
    "attention_time": 80,
    "steps": 170,
    "gemm": 20,
    "eigen": 40,
    "probe": 70,
}
RUNGS = ("sparsev", "untied", "fp8head", "softcap", "attnscale", "fixedwin")
GRACE_S = 120  # beyond its share, after which a section is taken to hang
FTZ = "-nvptx-allow-ftz-atomics"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
PACKAGES += tuple(f"jax-cuda{n}-plugin" for n in (12, 13))
PACKAGES += tuple(f"nvidia-{name}-cu{n}" for name in ("cudnn", "cublas") for n in (12, 13))


@chz.chz
class FirstConfig:
    """The keys of the command."""

    out: str = chz.field(default="first_gpu.json", doc="file for the JSON document")
    sections: tuple[str, ...] = chz.field(default=tuple(SECONDS), doc="what to measure, in order")
    rungs: tuple[str, ...] = chz.field(default=RUNGS, doc="rungs of steps, in order, and of probe")
    size: Literal[tuple(SIZES)] = chz.field(default="paper", doc="published sizes, or tiny ones")
    budget_s: float = chz.field(default=540.0, doc="seconds after which nothing more is begun")

    @chz.validate
    def _ranges(self):
        for key, names, known in (
            ("sections", self.sections, tuple(SECONDS)),
            ("rungs", self.rungs, ALL_RUNGS),
        ):
            if not names or len(set(names)) < len(names):
                given = ",".join(names)
                raise ValueError(f"{key}={given}: name at least one, and none twice")
            for name in names:
                if name not in known:
                    raise ValueError(f"{key}={name}: choose among {', '.join(known)}")
        if not 0 < self.budget_s < math.inf:
            raise ValueError(f"budget_s={self.budget_s}: give a positive number of seconds")
        check_report(self.out)


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UsageError."""
    plan = read_command(FirstConfig, __doc__, argv)
    if plan is None:
        return 0
    command = shlex.join(["python", "benchmarks/first_gpu.py", *argv])
    document = {"command": command, **flatten(plan), "environment": {}, "results": {}}
    document |= {"skipped": [], "failed": []}
    run = run_here if len(plan.sections) == 1 else run_apart
    run(plan, document)
    for name, found in document["results"].items():
        document["skipped"] += [f"{name}: {entry}" for entry in found.get("skipped", ())]
        if found.get("failures") or "error" in found:
            document["failed"].append(name)
    write_json(plan.out, document)
    if len(plan.sections) > 1:
        for key in ("skipped", "failed"):
            say(f"{key}: {', '.join(document[key]) or 'nothing'}")
    return 1 if document["failed"] else 0


def run_here(plan: FirstConfig, document: dict[str, Any]) -> None:
    """Measure the one section of the plan in this process; raises UsageError off a GPU."""
    (name,) = plan.sections
    prepare(name)
    from gpu_attention import ATTENTION
    from gpu_parts import PARTS

    document["environment"] = environment()
    if plan.size == "paper" and document["environment"]["platform"] != "gpu":
        raise UsageError("size=paper: there is no GPU here; give size=tiny")
    job = Job(plan.size, plan.budget_s, plan.rungs, lambda: write_json(plan.out, document))
    document["results"][name] = job.found
    job.found["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    say(f"section {name}")
    try:
        (PARTS | ATTENTION)[name](job)
    except Exception as error:
        job.found["error"] = one_line(error)
        say(f"  {job.found['error']}")
    job.close()


def prepare(name: str) -> None:
    """Set what jax reads when it is first used, where there is an NVIDIA driver."""
    if not shutil.which("nvidia-smi"):
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    if name == "scatter_ftz":
        flags = os.environ.get("XLA_FLAGS", ""), f"--xla_backend_extra_options={FTZ}"
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def run_apart(plan: FirstConfig, document: dict[str, Any]) -> None:
    """Measure every section of the plan in a process of its own, as long as the budget lasts."""
    began, total, spent = time.monotonic(), sum(SECONDS[name] for name in plan.sections), 0
    with tempfile.TemporaryDirectory() as cache:
        for name in plan.sections:
            spent += SECONDS[name]
            elapsed = time.monotonic() - began
            if elapsed >= plan.budget_s:
                document["skipped"].append(name)
                continue
            share = max(plan.budget_s * spent / total - elapsed, 1.0)
            part = Path(plan.out).with_suffix(f".{name}.json")
            part.unlink(missing_ok=True)
            words = {"out": part, "sections": name, "rungs": ",".join(plan.rungs)}
            words |= {"size": plan.size, "budget_s": f"{share:.1f}"}
            ended = launch([f"{key}={value}" for key, value in words.items()], share, cache)
            take_part(part, name, ended, document)
            write_json(plan.out, document)
            part.unlink(missing_ok=True)


def launch(words: list[str], share: float, cache: str) -> str:
    """Run this command in a new process with a compilation cache; returns how it ended."""
    command = [sys.executable, os.path.abspath(__file__), *words]
    env = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ
    try:
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, timeout=share + GRACE_S)
        code, stderr = f"ended with code {done.returncode}", done.stderr
    except subprocess.TimeoutExpired as error:
        code, stderr = f"stopped after {share + GRACE_S:.0f} s", error.stderr or b""
    text = stderr.decode(errors="replace")
    print(text, file=sys.stderr, end="", flush=True)
    last = text.strip().splitlines()[-1:]
    return f"{code}: {last[0][:300]}" if last else code


def take_part(part: Path, name: str, ended: str, document: dict[str, Any]) -> None:
    """Move what the process of a section has saved into the document of all."""
    saved = json.loads(part.read_text()) if part.exists() else {"results": {}, "environment": {}}
    found = document["results"][name] = saved["results"].get(name, {"entries": {}})
    document["environment"] = document["environment"] or saved["environment"]
    if "seconds" not in found:  # it did not come to its end
        found["error"] = ended
    failures = len(found.get("failures", ())) + ("error" in found)
    say(f"section {name}: {len(found['entries'])} entries, {failures} failures")


def environment() -> dict[str, Any]:
    """On what, and with which versions."""
    import jax

    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    has_driver = shutil.which(query[0]) is not None
    smi = subprocess.run(query, capture_output=True, text=True).stdout if has_driver else ABSENT
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "platform": jax.default_backend(),
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "memory_limit_bytes": ABSENT if limit is None else limit,
        "driver": smi.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: found for name, found in versions.items() if found is not None},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    run_command(main)
