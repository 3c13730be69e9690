"""What is shipped to run the processes: Procfile, units, image."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from config.declared import declared_settings
from config.settings import load_tunables

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PACKAGES = {"config", "worker", "handlers", "migrations"}
# What the build of the packages reads.
BESIDES = {
    "deploy/requirements.lock",
    "deploy/requirements-otel.lock",
    "pyproject.toml",
    "README.md",
    "pytest_tailrace.py",
}


def procfile() -> dict[str, str]:
    lines = (ROOT / "Procfile").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def unit(name: str) -> dict[str, list[str]]:
    read: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / f"tailrace-{name}.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            option, value = line.split("=", 1)
            read.setdefault(option, []).append(value)
    return read


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]  # type: ignore[misc] # two parts each


def locked(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE))


def test_the_procfile_is_the_documented_one() -> None:
    assert procfile() == {
        "release": "python -m worker migrate",
        "listener": "python -m worker listen",
        "worker": "arq worker.jobs.WorkerSettings",
    }


def test_honcho_reads_the_procfile() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "honcho", "check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "release" in done.stdout + done.stderr


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong_with_a_unit(path: Path) -> None:
    analyse = shutil.which("systemd-analyze")
    if analyse is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run([analyse, "verify", path], capture_output=True, text=True, timeout=120, check=False)
    ours = [line for line in done.stderr.splitlines() if "tailrace" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_a_unit_well_protected(path: Path) -> None:
    analyse = shutil.which("systemd-analyze")
    if analyse is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        [analyse, "security", "--offline=true", "--threshold=30", path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_there_is_a_unit_for_each_process_and_it_runs_what_the_procfile_runs() -> None:
    names = {"release": "migrate", "listener": "listener", "worker": "worker"}
    assert {path.stem for path in UNITS} == {f"tailrace-{name}" for name in names.values()}
    for process, name in names.items():
        assert unit(name)["ExecStart"] == [f"/usr/bin/env {procfile()[process]}"]


@pytest.mark.parametrize("name", ["listener", "worker"])
def test_a_unit_lets_the_process_drain_and_does_not_restart_what_no_restart_mends(name: str) -> None:
    read = unit(name)
    assert (read["Type"], read["NotifyAccess"]) == (["notify"], ["main"])
    # The loop answers nobody while a handler computes, for as long as it may.
    assert int(read["WatchdogSec"][0]) > load_tunables(None).handler_timeout * 2
    assert read["Restart"] == ["on-failure"]
    assert "2" in read["RestartPreventExitStatus"][0].split()
    assert read["KillSignal"] == ["SIGTERM"]
    assert int(read["TimeoutStopSec"][0]) > load_tunables(None).drain_seconds
    assert read["NoNewPrivileges"] == ["yes"]
    assert read["ProtectSystem"] == ["strict"]
    assert read["EnvironmentFile"]
    assert not read.get("EnvironmentFile", [""])[0].startswith("-"), (
        "without settings there is nothing to run"
    )


def test_the_image_holds_the_packages_and_nothing_of_the_stand_in() -> None:
    copied: set[str] = set()
    for instruction, rest in instructions():
        if instruction in {"COPY", "ADD"} and not rest.startswith("--from=build"):
            *sources, _target = shlex.split(rest)
            copied.update(sources)
    assert copied == PACKAGES | BESIDES
    for source in copied:
        assert (ROOT / source).exists()


def test_the_builder_is_given_only_what_the_image_copies() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {line[1:] for line in rules if line.startswith("!")} == PACKAGES | BESIDES


def test_the_image_runs_without_privileges_and_gets_signals_itself() -> None:
    read = instructions()
    assert ("USER", "10001:10001") in read
    assert ("STOPSIGNAL", "SIGTERM") in read
    commands = [rest for instruction, rest in read if instruction == "CMD"]
    assert commands == ['["arq", "worker.jobs.WorkerSettings"]', '["python", "-m", "worker", "listen"]']
    checks = [rest for instruction, rest in read if instruction == "HEALTHCHECK"]
    assert len(checks) == 2
    assert all("/livez" in rest for rest in checks)
    install = next(rest for instruction, rest in read if instruction == "RUN" and "--require-hashes" in rest)
    assert "requirements" in install


@pytest.mark.parametrize(("extra", "lock"), [("", "requirements.lock"), ("otel", "requirements-otel.lock")])
def test_the_image_has_the_extra_that_is_asked_for(extra: str, lock: str) -> None:
    assert ("ARG", "EXTRA=") in instructions()
    install = next(rest for instruction, rest in instructions() if "--require-hashes" in rest)
    # The shell of the image's base is of this kind, too.
    asked = install.rpartition(" -r ")[2]
    done = subprocess.run(
        ["sh", "-c", f"echo {asked}"], env={"EXTRA": extra}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == lock
    assert (DEPLOY / lock).exists()


def test_the_image_sets_only_settings_that_exist() -> None:
    known = {setting.name for setting in declared_settings()}
    of_python = {"PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}
    of_pip = {"PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_CACHE_DIR"}
    for instruction, rest in instructions():
        if instruction == "ENV":
            names = {part.split("=", 1)[0] for part in shlex.split(rest)}
            assert names <= known | of_python | of_pip


def test_the_image_is_built_from_the_versions_that_are_tested() -> None:
    of_image, of_tests = locked(DEPLOY / "requirements.lock"), locked(ROOT / "requirements.lock")
    with_traces = locked(DEPLOY / "requirements-otel.lock")
    assert of_image.items() <= with_traces.items() <= of_tests.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[\[<>=~; ]", line)[0].lower() for line in project["dependencies"]}
    assert wanted <= of_image.keys()
    of_otel = {line.split(">=")[0] for line in project["optional-dependencies"]["otel"]}
    assert of_otel <= with_traces.keys() - of_image.keys()
    for line in project["optional-dependencies"]["standin"]:
        name = re.split(r"[\[<>=~; ]", line)[0].lower()
        assert name not in of_image or name in wanted | {"websockets"}, f"{name} is the stand-in's"


def test_the_example_of_the_environment_names_settings_and_no_secret() -> None:
    known = {setting.name for setting in declared_settings()}
    required = {setting.name for setting in declared_settings() if setting.required}
    lines = (DEPLOY / "tailrace.env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert required <= given.keys() <= known
    assert given["SUPABASE_SERVICE_ROLE_KEY"] == ""
