"""One process of a study: `python -m toy_modular.worker CORE` takes jobs as lines of JSON.

It answers each with lines {"note": ...} and one line {"results": [...]} or {"error": ...}. It keeps
to its core, which gives XLA and NumPy one thread each.
"""

import json
import os
import queue
import signal
import sys
import threading


def main(core: int) -> None:
    """Serves jobs from standard input; ends at once when it closes."""
    os.sched_setaffinity(0, {core})
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study ends its workers itself
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may speak among the answers

    from toy_modular.training import train_members
    from toy_modular.workers import Job, describe_error

    def note(text: str) -> None:
        answers.write(json.dumps({"note": text}) + "\n")

    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while True:
        line = jobs.get()
        try:
            job = Job.from_json(line)
            results = train_members(job.configs, job.folders, until=job.until, note=note)
            answers.write(json.dumps({"results": results}) + "\n")
        except Exception as error:  # told to the study, which goes on with other jobs
            answers.write(json.dumps({"error": describe_error(error)}) + "\n")


def _listen(jobs: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)  # the study is gone, and another may go on in its folder at any moment


def _core() -> int:
    """The core of the command line; anything else ends in one line."""
    words = sys.argv[1:]
    if len(words) != 1 or not words[0].isdecimal():
        asked = words in (["-h"], ["--help"])
        usage = (
            "python -m toy_modular.worker CORE: a study starts it; run toy_modular.study instead"
        )
        print(usage, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    return int(words[0])


if __name__ == "__main__":
    main(_core())
