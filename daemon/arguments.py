"""The command line of `lensd` as argparse has it; dotted names of arguments are configuration keys."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from daemon.argument_types import baseline_names, input_file, path, positive, sizes
from daemon.escaping import escape_control

STATUS = """Asks a running daemon what it does. Exit codes: 0 live and ready, 1 not so (loading, draining,
paused, stalled), 3 no answer."""


class Parser(argparse.ArgumentParser):
    """One whose complaints are obeyed by no terminal: arguments may be file names, put there by a shell."""

    def error(self, message: str) -> NoReturn:
        super().error(escape_control(message))


def parser() -> argparse.ArgumentParser:
    root = Parser(
        prog="lensd",
        description="Reads text with a language model and sparse autoencoders, and writes Parquet.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = add_command(commands, "run", "process what is dropped into the inbox")
    run.add_argument("--once", action="store_true", help="drain what is there, then exit")
    run.add_argument("--http", metavar="HOST:PORT", dest="http.address", help="metrics and health")
    run.add_argument("--no-http", action="store_true", help="serve no metrics and health")
    demo = add_command(commands, "demo", "the bundled 200 samples through the bundled model")
    add_verify(commands)
    add_bench(commands)
    retry = commands.add_parser("retry", help="put failed files back into the inbox")
    retry.add_argument("names", nargs="*", metavar="NAME", help="files in failed/ (default: all)")
    retry.add_argument("--list", action="store_true", help="show them and their reasons, move nothing")
    retry.add_argument("--config", type=path, metavar="FILE", help="TOML settings")
    retry.add_argument("--inbox", metavar="DIR", dest="inbox.path")
    add_report(commands)
    add_explore(commands)
    add_catalog(commands)
    check = add_command(commands, "check-config", "validate settings, folders, model and SAEs")
    check.add_argument(
        "--file",
        type=input_file,
        metavar="F",
        help="only show how its first records are read; loads no weights",
    )
    status = commands.add_parser("status", help="what a running daemon does", description=STATUS)
    status.add_argument("--config", type=path, metavar="FILE", help="TOML settings of the daemon")
    status.add_argument("--url", metavar="URL", help="of the daemon (default: http.address)")
    status.add_argument("--json", action="store_true", help="print it as JSON")
    for command in (run, demo, check):
        command.add_argument("--inbox", metavar="DIR", dest="inbox.path")
        command.add_argument("--outbox", metavar="DIR", dest="outbox.path")
    for command in (run, check):
        command.add_argument(
            "--executor", metavar="KIND", dest="executor.kind", help="local, or ray: many workers"
        )
        command.add_argument(
            "--workers", metavar="N", dest="executor.workers", help="ray: processes, or auto"
        )
        command.add_argument(
            "--ray-address", metavar="A", dest="executor.address", help="ray: HOST:PORT of its head"
        )
    return root


def add_report(commands: Any) -> None:
    summary = "one HTML page of what published folders say, with their statistics"
    report = commands.add_parser("report", help=summary, description=summary)
    report.add_argument(
        "outboxes", nargs="+", type=path, metavar="OUTBOX", help="an outbox, or a folder published in one"
    )
    report.add_argument(
        "-o", "--output", type=path, default=Path("report.html"), metavar="FILE", help="default report.html"
    )
    report.add_argument("--by", metavar="COLUMN", help="groups by this column or field (default: domain)")
    report.add_argument(
        "--features", type=positive, default=50, metavar="N", help="shown with examples (default 50)"
    )
    report.add_argument(
        "--data", type=path, metavar="FILE", help="also write every feature's statistics, as Parquet"
    )


def add_catalog(commands: Any) -> None:
    summary = "the dictionaries that SAELens names: where they read, and how they run here"
    saes = commands.add_parser("saes", help=summary, description=summary)
    saes.add_argument("words", nargs="*", metavar="WORD", help="in release, id or model; all must be there")
    saes.add_argument("--model", metavar="M", help="only those of models whose name holds this")
    saes.add_argument("--json", action="store_true", help="print all that is known of each as JSON")
    summary = "write a commented lensd.toml"
    init = commands.add_parser("init", help=summary, description=summary)
    init.add_argument("--model", metavar="M", help="as `lensd saes` names it (default: the bundled one)")
    init.add_argument("--release", metavar="R", help="of dictionaries, as `lensd saes` names it")
    init.add_argument("-o", type=path, default=Path("lensd.toml"), metavar="FILE", dest="output")


def add_explore(commands: Any) -> None:
    summary = "an outbox in embedding-atlas, in a browser"
    explore = commands.add_parser("explore", help=summary, description=summary)
    explore.add_argument("paths", nargs="+", type=path, metavar="OUTBOX", help="outbox, or a folder in one")
    explore.add_argument("--port", type=positive, metavar="N", help="on loopback (default: a free one)")


def add_verify(commands: Any) -> None:
    verify = add_command(commands, "verify", "compare with one text at a time, plain Hugging Face + SAELens")
    verify.add_argument(
        "file", nargs="?", type=input_file, metavar="FILE", help="input file (default: the demo's)"
    )
    verify.add_argument(
        "--bits",
        action="store_true",
        help="compare batches of many sizes and orders with one another instead, bit for bit",
    )
    verify.add_argument("--samples", type=positive, metavar="N", help="only the first N samples")
    verify.add_argument(
        "--batch-sizes",
        type=sizes,
        default=(1, 8, 32),
        metavar="N,N",
        help="samples per batch (default 1,8,32)",
    )
    verify.add_argument("--json", action="store_true", help="print the report as JSON")


def add_bench(commands: Any) -> None:
    bench = add_command(commands, "bench", "speed and memory, beside what people run instead")
    bench.add_argument(
        "files", nargs="*", type=input_file, metavar="FILE", help="input files (default: the demo's)"
    )
    bench.add_argument("--json", action="store_true", help="print the report as JSON")
    bench.add_argument("--plot", type=path, metavar="PNG", help="draw speed and memory by batch size")
    bench.add_argument("--repetitions", type=positive, default=5, metavar="N", help="default 5")
    bench.add_argument("--batch-sizes", type=sizes, metavar="N,N", help="samples per batch (1,4,8,16,32)")
    bench.add_argument(
        "--baselines",
        type=baseline_names,
        metavar="NAME,NAME",
        help="only these (sequential, original, idiomatic 32, ...)",
    )
    bench.add_argument("--baseline-samples", type=positive, metavar="N", help="on which these run")
    bench.add_argument("--positions", metavar="P", dest="analysis.positions", help="last, all, mean, max")


def add_command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """A subcommand with the options that all share; dotted `dest`s are configuration keys."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.add_argument("--config", type=path, metavar="FILE", help="TOML settings")
    command.add_argument("--model", metavar="NAME", dest="model.name", help="preset, folder or hub name")
    command.add_argument("--device", metavar="DEV", dest="model.device", help="auto, cpu, cuda, cuda:N, mps")
    command.add_argument(
        "--dtype", metavar="T", dest="model.dtype", help="float32, float64, bfloat16, float16"
    )
    command.add_argument("--max-batch-tokens", metavar="N", dest="batching.max_batch_tokens")
    command.add_argument("--log-format", metavar="F", dest="log.format", help="auto, console, json")
    return command
