"""Print the Python that runs fp8moe from this checkout, making an environment for it first if need be.

Needs nothing but the standard library. The Python that runs this script is taken as it is if its torch is 2.11 or newer
and sees a GPU: there torch was chosen for the GPU's driver, and nothing of it is replaced. Else `.venv` is made (once,
and again when what it is made from changes) with the versions of constraints.txt; with `--own-environment` in any case,
and with `--frameworks` also with those that `fp8moe.integrations` is for. Progress goes to stderr.
"""

import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "constraints.txt"
SOURCES = (CONSTRAINTS, ROOT / "pyproject.toml")
PACKAGES = ("hypothesis", "matplotlib", "pytest", "rich")  # what the extra `test` brings beside torch
WITH_FRAMEWORKS = " with frameworks"

SEES_GPU = """
import torch
version = tuple(int(part) for part in torch.__version__.split(".")[:2])
raise SystemExit(not (version >= (2, 11) and torch.cuda.is_available()))
"""


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this script is what tells
        raise SystemExit(f"fp8moe needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}")
    frameworks = "--frameworks" in sys.argv[1:]
    own = frameworks or "--own-environment" in sys.argv[1:]
    if not own and subprocess.run([sys.executable, "-c", SEES_GPU], stderr=subprocess.DEVNULL).returncode == 0:
        add_missing_packages(sys.executable)
        print(sys.executable)
    else:
        print(make_environment(frameworks))


def add_missing_packages(python: str) -> None:
    """Install what the tests and the demo need beside torch, if it is not there; torch and triton stay as they are."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        run(python, "-m", "pip", "install", "--quiet", *missing)
    if importlib.util.find_spec("xdist") is None:
        command = (python, "-m", "pip", "install", "--quiet", "--retries=0", "pytest-xdist")
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            print("without pytest-xdist the tests run one after another", file=sys.stderr)


def make_environment(frameworks: bool) -> Path:
    python = VENV / ("Scripts" if sysconfig.get_platform().startswith("win") else "bin") / "python"
    stamp = VENV / "made-from"
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES) + sys.version.encode()).hexdigest()
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    install = (*pip, "install", "--quiet", "-c", str(CONSTRAINTS), "-e")
    if not (stamp.is_file() and stamp.read_text().startswith(digest)):
        print(f"making {VENV.name} (torch and the rest, once; about a minute)", file=sys.stderr)
        venv.create(VENV, clear=True)  # without pip: Debian's Python cannot put it there
        run(*install, f"{ROOT}[dev]")
        stamp.write_text(digest)
    if frameworks and stamp.read_text() != digest + WITH_FRAMEWORKS:
        print(f"adding transformers, torchtitan and others to {VENV.name} (about a minute)", file=sys.stderr)
        run(*install, f"{ROOT}[frameworks]")
        stamp.write_text(digest + WITH_FRAMEWORKS)
    return python


def run(*command: str) -> None:
    """Run with the output on stderr: stdout is for the answer alone."""
    subprocess.run(command, stdout=sys.stderr, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
