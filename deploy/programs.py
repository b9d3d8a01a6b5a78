"""The programs of others that the topology runs: where they are, and what starting them takes without an image."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

_POSTGRES_DIRECTORIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -int(path.parent.name))
HOW_TO_GET_THEM = "apt-get install nginx-light postgresql redis-server curl openssl (Debian, Ubuntu)"
_PROGRAMS = ("nginx", "initdb", "postgres", "pg_isready", "redis-server", "redis-cli", "curl", "openssl")


def search_path() -> str:
    """Return PATH with the places where Debian keeps what is for servers."""
    places = [*map(str, _POSTGRES_DIRECTORIES[:1]), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    return os.pathsep.join(places)


def missing_programs() -> list[str]:
    """Return the names of the programs that this machine lacks."""
    missing = [name for name in _PROGRAMS if not shutil.which(name, path=search_path())]
    if os.geteuid() == 0 and database_user() is None:
        missing.append("a user named postgres (PostgreSQL does not run as root)")
    return missing


def database_user() -> str | None:
    """Return whom PostgreSQL runs as, where we are root and it refuses to be; None for ourselves."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return None


def prepare_database(directory: Path, password_file: Path) -> None:
    """Make a database cluster in a directory, as the image's entry point does on its first start."""
    directory.mkdir(mode=0o700)
    user = database_user()
    if user is not None:
        shutil.chown(directory, user, user)
    command = ["initdb", "--username=proxysite", "--pwfile=/dev/stdin", "--auth=scram-sha-256", "--no-sync"]
    with password_file.open("rb") as password:
        subprocess.run(
            [*command, "--encoding=UTF8", "--locale=C", "-D", str(directory)],
            env={"PATH": search_path()},
            cwd=directory,
            stdin=password,
            capture_output=True,
            check=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )


def create_database(port: int, password: str, *, timeout_s: float = 60.0) -> None:
    """Create the database `proxysite` once the server takes connections."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with psycopg.connect(
                host="127.0.0.1", port=port, user="proxysite", password=password, dbname="postgres", autocommit=True
            ) as connection:
                connection.execute("CREATE DATABASE proxysite")
                return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


# Disks


def can_mount() -> bool:
    """Return whether we may mount: as root, and where containers are not forbidden to."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as directory:
        try:
            mount_memory(Path(directory), 4096)
        except (OSError, subprocess.CalledProcessError):
            return False
        unmount(Path(directory))
    return True


def mount_memory(directory: Path, size_bytes: int) -> None:
    """Make a directory a disk of its own, of so many bytes, in memory."""
    options = f"size={size_bytes},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True, capture_output=True)


def unmount(directory: Path) -> None:
    """Take the disk away; what still has files of it open keeps them."""
    subprocess.run(["umount", "--lazy", str(directory)], check=False, capture_output=True)
