"""`m6rec VERB ...`: finds the verb, imports only its module, turns how it ended into an exit code.

0 success · 2 the user's input or configuration is wrong · 69 the other processes of the job did not come · 70 training
hung (training/watchdog) · 75 saved, may be requeued · 130 interrupted · 1 a fault of our own. Errors are one line on stderr; M6REC_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import m6rec_jax
from m6rec_jax.allocator import keep_freed_memory
from m6rec_jax.errors import Alone, InputError, Requeue, mendable
from m6rec_jax.topologies import quiet_without_chips

DEVICES = Path("/dev")
SUCCESS, FAULT, WRONG_INPUT, ALONE, REQUEUE, INTERRUPTED = 0, 1, 2, 69, 75, 130

# verb: (module in this package, function taking argv, what it does)
VERBS = {
    "data fetch": ("data", "fetch", "fetch a public data set: its tables and a data card"),
    "data card": ("data", "card", "draft a data card from the tables in a folder"),
    "prepare": ("prepare", "prepare", "turn raw tables into a dataset: clean, tokenise, code, split"),
    "train": ("train", "train", "pretrain a model on datasets; run again to resume"),
    "tune": ("tune", "tune", "tune a run for one task: a few numbers beside its frozen parameters"),
    "plan": ("plan", "plan", "compile a configuration for hardware that is not here"),
    "sweep": ("sweep", "sweep", "search settings: many runs, the best configuration"),
    "evaluate": ("recommend", "evaluate", "measure a run against popularity, item-kNN and the counting floor"),
    "compare": ("compare", "compare", "tell whether runs differ: paired tests over the same users"),
    "generate": ("recommend", "generate", "recommend to many users at once, into Parquet"),
    "embed": ("recommend", "embed", "write vectors of users or items, into Parquet"),
    "profile": ("recommend", "profile", "write what users do and are interested in, into Parquet"),
    "export": ("export", "export", "write the weights of a run for other programs"),
    "verify": ("verify", "verify", "check the files of a dataset or run against their digests"),
    "doctor": ("doctor", "doctor", "show versions, devices, memory and missing extras"),
    "demo": ("demo", "demo", "everything once, on MovieLens-100K: fetch to report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; never raises. Left alone by its job, the process ends here."""
    keep_freed_memory()  # now, while this is the only thread
    argv = list(sys.argv[1:] if argv is None else argv)
    if not _debug():  # libraries log the tracebacks of their threads; what matters of them we say in one line
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("jax._src.xla_bridge").addFilter(_plugins)
    quiet_without_chips()
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except InputError as error:
        return _end(WRONG_INPUT, str(error))
    except Alone as error:  # jax would wait at the exit, five minutes more, for those who do not come
        os._exit(_end(ALONE, str(error)))
    except Requeue as error:
        return _end(REQUEUE, str(error) or "saved after a termination signal; the same command resumes")
    except KeyboardInterrupt:
        return _end(INTERRUPTED, "interrupted; the same command continues where it stopped")
    except SystemExit as error:  # --help
        return error.code if isinstance(error.code, int) else SUCCESS
    except Exception as error:
        line = _mendable(error)
        if line:
            return _end(WRONG_INPUT, line)
        hint = "" if _debug() else "; M6REC_DEBUG=1 in front of the command prints the traceback"
        return _end(FAULT, f"a fault of m6rec itself: {type(error).__name__}: {error}{hint}")


def _run(argv: list[str]) -> int:
    if not argv:
        raise InputError("no verb given; m6rec --help lists them")
    if argv[0] in ("-h", "--help"):
        print(overview())
        return SUCCESS
    if argv[0] == "--version":
        print(f"m6rec {m6rec_jax.__version__}")
        return SUCCESS
    words = 2 if any(verb.startswith(f"{argv[0]} ") for verb in VERBS) else 1
    if words == 2 and argv[1:2] in (["-h"], ["--help"]):
        print(overview(f"{argv[0]} "))
        return SUCCESS
    verb = " ".join(argv[:words])
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        raise InputError(
            f"{verb}: unknown verb; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(VERBS)}"
        )
    find(verb)(argv[words:])
    return SUCCESS


def find(verb: str) -> Callable[[list[str]], None]:
    """The function behind a verb."""
    module, function, _ = VERBS[verb]
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)


def overview(group: str = "") -> str:
    """The verbs (those of one group, if named) with a line each."""
    lines = [f"  {verb:<12} {what}" for verb, (_, _, what) in VERBS.items() if verb.startswith(group)]
    return "\n".join(
        [
            "usage: m6rec VERB [options]",
            "",
            "Pretrain generative recommenders in JAX and serve them.",
            "",
            "verbs:",
            *lines,
            "",
            "m6rec VERB --help shows the options of a verb and an example; m6rec --version the version.",
        ]
    )


def _end(code: int, text: str) -> int:
    if _debug():
        traceback.print_exc()
    print(f"m6rec: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


def _plugins(record: logging.LogRecord) -> bool:
    """A plugin of jax that does not load: one line in place of a traceback, and none where it has no device to serve."""
    if record.exc_info is None or "plugin" not in record.getMessage():
        return True
    if any(DEVICES.glob("nvidia[0-9]*")):
        print(f"m6rec: {record.getMessage().splitlines()[0]} ({record.exc_info[1]})", file=sys.stderr)
    return False


def _debug() -> bool:
    return os.environ.get("M6REC_DEBUG", "") not in ("", "0")


def _mendable(error: Exception) -> str | None:
    """One line for faults of the machine that the user can mend: no space, no permission, no device memory."""
    if (found := mendable(error)) is not None:
        refused, way_out = found
        where = (error.filename if isinstance(error, OSError) else None) or "writing"
        return f"{where}: {refused}; {way_out}, then run the command again"
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error):
        first = " ".join(str(error).split())[:160]
        return f"out of device memory ({first}); lower data.rows, raise train.accumulate, or set model.remat=full"
    return None
