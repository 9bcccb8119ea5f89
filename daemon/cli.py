"""The `lensd` command: argv, a TOML file and the environment to a Config, then the right tool.

Heavy imports come inside the commands, so that `--help` and a bad setting answer at once. Exit codes:
0 done, 1 some files failed or were left, or a tolerance was exceeded, 2 bad usage or configuration,
3 the machine failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from daemon.arguments import parser
from daemon.errors import ConfigError, LensdError, MachineError
from daemon.escaping import escape_control, escape_lines
from daemon.streams import open_standard_streams

if TYPE_CHECKING:
    from rich.console import Console

    from daemon.config import Config

DONE, SOME_FAILED, BAD_USAGE, MACHINE_FAILED = 0, 1, 2, 3
RAY_FLAGS = {"executor.workers": "--workers", "executor.address": "--ray-address"}


def share_heap() -> None:
    """Have all of Arrow allocate as the rest of the process does: read when pyarrow is first imported.

    With an allocator of its own its memory comes on top of what the heap keeps (`daemon.model.buffers`).
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    share_heap()
    output = open_standard_streams()
    try:
        code = command(argv)
    finally:
        sys.stdout.flush()
        refusal = None if output is None else output.refusal
    if refusal is not None:
        return complain(MachineError(f"standard output: {refusal.strerror}"), MACHINE_FAILED)
    return code


def command(argv: list[str] | None) -> int:
    try:
        args = parser().parse_args(argv)
        code = COMMANDS[args.command](args)
    except (LensdError, OSError) as error:
        return complain(error, exit_code(error))
    except KeyboardInterrupt:
        return MACHINE_FAILED
    except Exception as error:
        sys.stderr.write(escape_lines(traceback.format_exc()))
        return exit_code(error)
    return code


def exit_code(error: Exception) -> int:
    """Of a bug too: Python's own for it, 1, would say that some files failed."""
    if isinstance(error, ConfigError):
        return BAD_USAGE
    if isinstance(error, LensdError) and not isinstance(error, MachineError):
        return SOME_FAILED
    return MACHINE_FAILED


def complain(error: BaseException | str, code: int) -> int:
    sys.stderr.write(escape_control(f"lensd: {error}") + "\n")
    return code


def say(line: str) -> None:
    """A line of a command's output; names in it are obeyed by no terminal."""
    sys.stdout.write(escape_control(line) + "\n")


def configure(args: argparse.Namespace) -> Config:
    """The validated configuration, with logging set up as it says."""
    from daemon.config import load_config
    from daemon.observe.logs import configure as configure_logs

    flags = flags_of(args)
    config = load_config(args.config, flags=flags)
    check_ray_flags(flags, config)
    told_to_serve = "enabled" in config.http.model_fields_set or flags.get("http.address") is not None
    if getattr(args, "once", False) and not told_to_serve:  # a drain by cron must not take the daemon's port
        config = config.model_copy(update={"http": config.http.model_copy(update={"enabled": False})})
    configure_logs(config.log.format, config.log.level)
    return config


def check_ray_flags(flags: dict[str, Any], config: Config) -> None:
    """Raises ConfigError for a flag of Ray's workers where this process computes."""
    for key, flag in RAY_FLAGS.items():
        if flags.get(key) is not None and config.executor.kind != "ray":
            raise ConfigError(f"{flag} {flags[key]}: there are workers on Ray only: add --executor ray")


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, by their keys. An address is given to be served."""
    flags = {key: value for key, value in vars(args).items() if "." in key}
    if flags.get("http.address") is not None:
        flags["http.enabled"] = True
    if getattr(args, "no_http", False):
        flags["http.enabled"] = False
    return flags


def run_daemon(args: argparse.Namespace) -> int:
    from daemon.config import load_config
    from daemon.settings import SettingsSource

    source = SettingsSource(lambda: load_config(args.config, flags=flags_of(args)), args.config)
    config = configure(args)
    from daemon.observe.logs import failed, for_people
    from daemon.service import serve

    try:
        tally = serve(config, once=args.once, settings_source=None if args.once else source)
    except Exception as error:
        if for_people(config.log.format):
            raise
        failed(error)  # what reads the log reads JSON
        return exit_code(error)
    return SOME_FAILED if args.once and (tally.failed or tally.left) else DONE


def run_demo(args: argparse.Namespace) -> int:
    config = configure(args)
    from daemon.tools.demo import demo

    return demo(config)


def run_verify(args: argparse.Namespace) -> int:
    config = configure(args)
    from daemon.tools.report import print_bits, print_verification

    if args.bits:
        from daemon.tools.bits import verify_bits

        found = verify_bits(config, args.file, samples=args.samples)
        show(args, found, print_bits)
        return DONE if found.passed else SOME_FAILED
    from daemon.tools.verify import verify

    verification = verify(config, args.file, samples=args.samples, batch_sizes=args.batch_sizes)
    show(args, verification, print_verification)
    return DONE if verification.passed else SOME_FAILED


def run_bench(args: argparse.Namespace) -> int:
    config = configure(args)
    from daemon.tools.bench import BATCH_SIZES, bench
    from daemon.tools.bench_report import plot, print_bench

    report = bench(
        config,
        args.files,
        repetitions=args.repetitions,
        batch_sizes=args.batch_sizes or BATCH_SIZES,
        baselines=args.baselines,
        baseline_samples=args.baseline_samples,
    )
    if args.plot is not None:
        plot(report, args.plot)
    show(args, report, print_bench)
    return DONE


def show(args: argparse.Namespace, report: Any, print_report: Callable[[Console, Any], None]) -> None:
    """Write a command's report for people, or as JSON where that is asked for."""
    from rich.console import Console

    if args.json:
        sys.stdout.write(json.dumps(report.as_json(), indent=1) + "\n")
    else:
        print_report(Console(), report)


def run_retry(args: argparse.Namespace) -> int:
    config = configure(args)
    from daemon.source.retry import chosen, retry

    inbox = config.inbox.path
    if not inbox.is_dir():
        raise ConfigError(f"inbox.path = {inbox}: no such folder")
    if args.list:
        for failed in chosen(inbox, args.names):
            say(f"{failed.name}  {failed.failed_at}  {failed.reason}: {failed.message}")
        return DONE
    try:
        done = retry(inbox, args.names)
    except PermissionError as error:
        raise MachineError(f"{error.filename}: {error.strerror}: retry as the daemon's user") from None
    for failed, target in done:
        say(f"{failed.name} -> {target}")
    say(f"{len(done)} put back into {inbox}")
    return DONE


def explore_outboxes(args: argparse.Namespace) -> int:
    from daemon.findings.explore import explore

    explore(args.paths, args.port, say)
    return DONE


def show_status(args: argparse.Namespace) -> int:
    from rich.console import Console

    from daemon.config import load_config
    from daemon.observe.status import to_json
    from daemon.tools.status import fetch_first, healthy, print_status, urls_of

    status = fetch_first([args.url] if args.url is not None else urls_of(load_config(args.config)))
    if args.json:
        sys.stdout.write(json.dumps(json.loads(to_json(status))) + "\n")
    else:
        print_status(Console(), status)
    return DONE if healthy(status) else SOME_FAILED


def run_report(args: argparse.Namespace) -> int:
    from daemon.findings.interrupts import Interrupted, interruptible

    try:
        with interruptible():
            from daemon.findings.command import write_report
            from daemon.findings.report import ReportOptions
            from daemon.findings.sentences import findings

            options = ReportOptions(by=args.by, features=args.features)
            report = write_report(args.outboxes, options, args.output, args.data)
    except Interrupted as error:
        return complain("interrupted: nothing was written", error.exit_code)
    for sentence in findings(report):
        say(sentence)
    say(str(args.output))
    return DONE


def show_saes(args: argparse.Namespace) -> int:
    from daemon.tools.saes import find_dictionaries, table_lines

    found = find_dictionaries(args.words, args.model)
    if args.json:
        sys.stdout.write(json.dumps([entry.as_json() for entry in found], indent=1) + "\n")
    else:
        for line in table_lines(found):
            say(line)
    return DONE


def init_settings(args: argparse.Namespace) -> int:
    from daemon.tools.saes import new_settings, write_new

    write_new(args.output, new_settings(args.model, args.release, args.output))
    say(f"wrote {args.output}: lensd check-config --config {args.output} tries it")
    return DONE


def check_config(args: argparse.Namespace) -> int:
    config = configure(args)
    from daemon.tools.check_config import checked
    from daemon.tools.preview import preview

    for line in checked(config) if args.file is None else preview(config, args.file):
        say(line)
    return DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run_daemon,
    "demo": run_demo,
    "verify": run_verify,
    "bench": run_bench,
    "retry": run_retry,
    "report": run_report,
    "explore": explore_outboxes,
    "saes": show_saes,
    "init": init_settings,
    "check-config": check_config,
    "status": show_status,
}


if __name__ == "__main__":
    sys.exit(main())
