"""The command as a user runs it: a process, its exit code and what it prints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import tiny

LENSD = (sys.executable, "-m", "daemon.cli")
PATIENCE = 120.0  # seconds before a wait on a condition gives up


def lensd(*args: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LENSD, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), **env},
        timeout=PATIENCE,
    )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    pause = 0.05
    while not condition():
        assert time.monotonic() < deadline, f"gave up waiting: {what}"
        time.sleep(pause)  # between two looks at another process


@pytest.fixture(scope="module")
def tiny_toml(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "lensd.toml"
    path.write_text(tiny.make_tiny(folder).toml() + "[inbox]\nsettle_seconds = 0\nrescan_seconds = 0.2\n")
    return path


class Daemon:
    """A running `lensd run` with its HTTP server on a free port."""

    def __init__(self, toml: Path, root: Path, *args: str) -> None:
        self.inbox = root / "inbox"
        self.outbox = root / "outbox"
        self.log = root / "log"
        command = [*LENSD, "run", "--config", toml, "--inbox", self.inbox, "--outbox", self.outbox]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*map(str, command), "--http", "127.0.0.1:0", "--log-format", "json", *args],
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
            )

    def events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def event(self, name: str) -> dict[str, object]:
        wait_until(
            lambda: any(event["event"] == name for event in self.events()) or self.process.poll() is not None,
            name,
        )
        return next(event for event in self.events() if event["event"] == name)

    def get(self, path: str) -> tuple[int, str]:
        url = str(self.event("http.listening")["url"])
        try:
            with urllib.request.urlopen(url + path, timeout=PATIENCE) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@pytest.fixture
def daemon(tiny_toml, tmp_path) -> Iterator[Daemon]:
    started = Daemon(tiny_toml, tmp_path)
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.process.wait()


def test_help_and_config_errors_come_before_heavy_imports(tmp_path):
    (tmp_path / "bad.toml").write_text("[model]\ndtype = 'f9'\n")
    program = (
        "import sys\n"
        "from daemon.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        f"assert main(['run', '--config', {str(tmp_path / 'bad.toml')!r}]) == 2\n"
        "heavy = {'torch', 'transformers', 'sae_lens', 'transformer_lens', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith(f"lensd: {tmp_path}/bad.toml: model.dtype:")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_once_exits_0_when_all_is_committed(tiny_toml, tmp_path):
    (tmp_path / "inbox").mkdir()
    tiny.write_json(tmp_path / "inbox" / "a.json", tiny.contrast_records(4))
    result = lensd("run", "--config", tiny_toml, "--once", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("outbox/a-*/metrics.parquet"))) == 1


@pytest.mark.slow
def test_once_exits_1_when_a_file_failed(tiny_toml, tmp_path):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox" / "bad.json").write_text("[{")
    result = lensd("run", "--config", tiny_toml, "--once", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert (tmp_path / "inbox" / "failed" / "bad.json.reason.json").is_file()


@pytest.mark.slow
def test_bad_usage_and_bad_settings_exit_2(tmp_path):
    assert lensd("run", "--no-such-flag").returncode == 2
    result = lensd("run", "--once", "--max-batch-tokens", "many", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("lensd: flag: batching.max_batch_tokens: ")
    result = lensd("check-config", "--model", str(tmp_path / "nowhere"), cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


EMPTY_PATHS = {
    "environment": ((), {"LENSD_INBOX__PATH": ""}, None),
    "a space in the environment": ((), {"LENSD_INBOX__PATH": " "}, None),
    "flag": (("--inbox", ""), {}, None),
    "outbox": (("--outbox", ""), {}, None),
    "model": (("--model", ""), {}, None),
    "settings": ((), {}, '[inbox]\npath = ""\n'),
    "settings of the outbox": ((), {}, '[outbox]\npath = ""\n'),
    "settings file": (("--config", ""), {}, None),
    "address": (("--http", ""), {}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("given", EMPTY_PATHS.values(), ids=EMPTY_PATHS)
@pytest.mark.parametrize("command", [("run", "--once"), ("check-config",)], ids=["run", "check-config"])
def test_an_empty_path_is_refused_and_the_working_folder_left_alone(tmp_path, command, given):
    args, env, settings = given
    if args[:1] == ("--http",) and command[0] != "run":
        pytest.skip("no flag of this command")
    mine = {"data.json": "[]", "table.xlsx": "a,b", "notes.txt": "mine"}
    for name, content in mine.items():
        (tmp_path / name).write_text(content)
    if settings is not None:
        args = ("--config", tmp_path.parent / f"{tmp_path.name}.toml")
        args[1].write_text(settings)
    elsewhere = () if "--outbox" in args or settings else ("--outbox", tmp_path.parent / "elsewhere")
    result = lensd(*command, *elsewhere, *args, cwd=tmp_path, **env)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == mine


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_file_that_is_not_there_is_told_before_a_model_is_loaded(command, tmp_path):
    for name, said in (("missing.json", "no such file"), (".", "is a folder: name a file in it")):
        result = lensd(command, tmp_path / name, "--model", "smollm2-135m")
        assert result.returncode == 2
        assert result.stderr == f"lensd: {tmp_path / name}: {said}\n"


@pytest.mark.slow
def test_check_config_names_what_it_loaded(tiny_toml, tmp_path):
    result = lensd("check-config", "--config", tiny_toml, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"ok: model \(LlamaForCausalLM, 4 layers, d_model 32\) in float32 on cpu", result.stdout)
    assert "ok: blocks.1.hook_resid_post: sae-1 (jumprelu, d_sae 96)" in result.stdout


@pytest.mark.slow
def test_verify_agrees_with_one_at_a_time_in_float64(tiny_toml, tmp_path):
    path = tiny.write_json(tmp_path / "v.json", tiny.contrast_records(9))
    result = lensd(
        "verify", path, "--config", tiny_toml, "--dtype", "float64", "--batch-sizes", "1,2,3,5,8,13", "--json"
    )
    report = json.loads(result.stdout)
    assert result.returncode == 0, result.stdout
    assert report["passed"] is True
    assert [run["batch_size"] for run in report["reports"]] == [1, 2, 3, 5, 8, 13]
    for run in report["reports"]:
        assert run["feature_flips"] == run["set_flips"] == 0
        assert max(column["absolute"] for column in run["columns"]) <= 1e-6


@pytest.mark.slow
def test_the_daemon_takes_files_as_they_come_and_drains_on_sigterm(daemon):
    daemon.event("model.loaded")
    wait_until(lambda: daemon.get("/readyz")[0] == 200, "ready")
    assert daemon.get("/livez")[0] == 200
    for number in range(3):
        staged = daemon.inbox / f".{number}.json"
        tiny.write_json(staged, tiny.contrast_records(5 + number))
        staged.rename(daemon.inbox / f"{number}.json")
    wait_until(lambda: len(list(daemon.outbox.glob("*/manifest.json"))) == 3, "three outputs")
    wait_until(lambda: 'lensd_files_total{outcome="committed"} 3.0' in daemon.get("/metrics")[1], "metric")
    metrics = daemon.get("/metrics")[1]
    assert 'lensd_samples_total{outcome="committed"} 18.0' in metrics
    assert daemon.stop() == 0
    assert [event["signal"] for event in daemon.events() if event["event"] == "service.draining"] == [
        "SIGTERM"
    ]
    assert sorted(path.name for path in (daemon.inbox / "done").iterdir()) == ["0.json", "1.json", "2.json"]


@pytest.mark.slow
def test_a_second_signal_forces_and_gives_the_file_back(daemon):
    daemon.event("model.loaded")
    wait_until(lambda: daemon.get("/readyz")[0] == 200, "ready")
    staged = daemon.inbox / ".big.jsonl"
    staged.write_text("\n".join(json.dumps(record) for record in tiny.contrast_records(20_000)))
    staged.rename(daemon.inbox / "big.jsonl")
    wait_until(lambda: list(daemon.inbox.glob(".claimed/*/1/big.jsonl")) != [], "claimed")
    daemon.process.send_signal(signal.SIGTERM)
    daemon.event("service.draining")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(PATIENCE) == 3
    assert (daemon.inbox / "big.jsonl").is_file()
    assert list(daemon.outbox.glob("*/manifest.json")) == []
    assert "forced to stop" in daemon.log.read_text()


@pytest.mark.slow
def test_a_taken_port_is_one_line(daemon, tiny_toml, tmp_path):
    url = str(daemon.event("http.listening")["url"])
    address = url.removeprefix("http://").rstrip("/")
    result = lensd("run", "--config", tiny_toml, "--http", address, "--inbox", tmp_path / "i2", cwd=tmp_path)
    assert result.returncode == 2
    assert address in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_command_reads_its_settings_again_at_sighup_all_of_them_or_none(tiny_toml, tmp_path):
    settings = tmp_path / "lensd.toml"
    good = tiny_toml.read_text()
    settings.write_text(good)
    daemon = Daemon(settings, tmp_path)
    try:
        daemon.event("model.loaded")
        wait_until(lambda: daemon.get("/readyz")[0] == 200, "readiness")

        def told(text: str, outcome: str, number: int) -> None:
            settings.write_text(text)
            daemon.process.send_signal(signal.SIGHUP)
            line = f'lensd_config_reloads_total{{outcome="{outcome}"}} {number:.1f}\n'
            wait_until(lambda: line in daemon.get("/metrics")[1], line)

        told(good + "[outbox]\nmin_free_bytes = 1_000_000_000_000_000_000\n", "applied", 1)
        wait_until(lambda: daemon.get("/readyz")[0] == 503, "the new floor of free space")
        told(good, "applied", 2)
        wait_until(lambda: daemon.get("/readyz")[0] == 200, "the old one")
        changed = [event["changed"] for event in daemon.events() if event["event"] == "settings.applied"]
        assert changed == [["outbox.min_free_bytes"]] * 2

        full = "[outbox]\nmin_free_bytes = 1_000_000_000_000_000_000\n"
        told(good + full + "[analysis]\nseed = 'none'\n", "rejected", 1)
        told(good + full + "[http]\naddress = '127.0.0.1:1'\n[analysis]\npositions = 'all'\n", "rejected", 2)
        wait_until(lambda: "Settings refused" in daemon.get("/")[1], "the page to say so")
        messages = [event["message"] for event in daemon.events() if event["event"] == "settings.rejected"]
        assert "analysis.seed" in messages[0]
        assert "analysis.positions: can't change without a restart" in messages[1]
        assert daemon.get("/readyz")[0] == 200
        assert 'lensd_config_reloads_total{outcome="applied"} 2.0\n' in daemon.get("/metrics")[1]

        tiny.write_json(tmp_path / "draft", tiny.contrast_records(3))
        (tmp_path / "draft").rename(daemon.inbox / "study.json")
        wait_until(lambda: len(list(daemon.outbox.glob("study-*/metrics.parquet"))) == 1, "its results")
        assert daemon.stop() == 0
    finally:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("bench", "--baselines", ""), "--baselines: an empty name names none"),
        (("bench", "--baselines", "sequential,,original"), "--baselines: an empty name names none"),
        (("verify", "--batch-sizes", "a,b"), "expected numbers above 0, such as 1,8,32 (got 'a,b')"),
        (("verify", "--batch-sizes", ""), "expected numbers above 0, such as 1,8,32 (got '')"),
        (("bench", "--batch-sizes", "0"), "expected numbers above 0, such as 1,8,32 (got '0')"),
        (("bench", "--repetitions", "x"), "expected a number above 0 (got 'x')"),
    ],
)
def test_lists_and_numbers_of_flags_are_refused_with_what_is_expected(args, said, capsys):
    from daemon import cli

    try:
        code = cli.main(list(args))
    except SystemExit as error:
        code = error.code
    assert code == 2
    stderr = capsys.readouterr().err
    assert said in stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["run", "check-config"])
@pytest.mark.parametrize(
    "flag", [("--workers", "2"), ("--workers", "auto"), ("--ray-address", "10.0.0.1:6379")]
)
@pytest.mark.parametrize("kind", [(), ("--executor", "local")])
def test_flags_of_workers_are_refused_without_ray(command, flag, kind, capsys):
    from daemon import cli

    assert cli.main([command, *flag, *kind]) == 2
    refusal = f"lensd: {' '.join(flag)}: there are workers on Ray only: add --executor ray\n"
    assert capsys.readouterr().err == refusal


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("local", ("--workers", "2", "--executor", "ray")),
        ("ray", ("--workers", "2", "--ray-address", "10.0.0.1:6379")),
    ],
)
def test_flags_of_workers_are_taken_wherever_ray_is_asked_for(kind, flags, tmp_path):
    from daemon import cli
    from daemon.config import load_config

    path = tmp_path / "lensd.toml"
    path.write_text(f'[executor]\nkind = "{kind}"\n')
    given = cli.flags_of(cli.parser().parse_args(["run", *flags]))
    config = load_config(path, {}, given)
    cli.check_ray_flags(given, config)
    assert config.executor.workers == 2


def test_workers_of_the_file_do_not_keep_a_run_from_being_local(tmp_path):
    from daemon import cli
    from daemon.config import load_config

    path = tmp_path / "lensd.toml"
    path.write_text('[executor]\nkind = "ray"\nworkers = 2\n')
    given = cli.flags_of(cli.parser().parse_args(["run", "--executor", "local"]))
    cli.check_ray_flags(given, load_config(path, {}, given))


@pytest.mark.parametrize(
    ("flags", "enabled"),
    [((), False), (("--http", "127.0.0.1:0"), True), (("--http", "127.0.0.1:0", "--no-http"), False)],
)
def test_an_address_given_as_a_flag_is_served_whatever_the_file_says(flags, enabled, tmp_path):
    from daemon import cli
    from daemon.config import load_config

    path = tmp_path / "lensd.toml"
    path.write_text("[http]\nenabled = false\n")
    args = cli.parser().parse_args(["run", *flags])
    assert load_config(path, {}, cli.flags_of(args)).http.enabled is enabled
